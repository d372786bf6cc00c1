"""How small a share of each batch is enough for B: accuracy at several shares, beside that of the whole batch.

For each rule, its best known coefficients; for each seed, one training with each share, and the whole batch among them;
differences are paired by seed. Only validation is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import headlines
from bench.checkpoint import location
from bench.config import Strict, TrialConfig, UserError, check_range, digest, study_name
from bench.director import WAIT, Task, Wait
from bench.learning.rules import parse_rule
from bench.learning.switch import examples_seen
from bench.pages.fractions import fractions_page
from bench.place import Options, Place, survey
from bench.programme import conclude, recorded
from bench.robustness_plan import rules_of
from bench.rows import Row, RowFile
from bench.runs import Outcome, Planned, Recorder, Runs, carry_out
from bench.statistics import estimate, versus

BOOK = "fractions.yaml"
#: Other seeds than those of confirmations and of robustness.
FIRST_SEED = 3000
#: Accuracy that a share may lose and be called enough: one point.
MARGIN = 0.01


@dataclass(frozen=True, kw_only=True)
class FractionsConfig(Strict):
    """``rules``: by name, the whole TrialConfig of each (its seed and share are not used). ``fractions``: below 1."""

    name: str
    rules: dict[str, dict[str, Any]]
    fractions: tuple[float, ...]
    seeds: int = 5

    def __post_init__(self) -> None:
        self._settle()
        check_range("fractions", "seeds", self.seeds, 1, 10**4)
        for fraction in self.fractions:
            check_range("fractions", "fraction", fraction, 0, 1, open_low=True)
            if fraction == 1.0:
                raise UserError("fractions: the whole batch is always among them; name shares below 1, e.g. 0.5,0.25.")
        if not self.rules or not self.fractions:
            raise UserError("fractions: name a rule and a share below 1, e.g. --rule mirror --fractions 0.5,0.25.")
        for values in self.rules.values():
            trial = TrialConfig.from_dict(values)
            batch = trial.batch_size // trial.accumulate
            if len({examples_seen(share, batch) for share in self.shares()}) < len(self.shares()):
                shares = ", ".join(f"{share:g}" for share in self.shares())
                raise UserError(f"fractions: of {batch} examples, some of {shares} are the same; name fewer shares.")

    def shares(self) -> list[float]:
        """The whole batch, then the parts, falling."""
        return sorted({1.0, *self.fractions}, reverse=True)

    def trial(self, rule: str, fraction: float, seed: int) -> TrialConfig:
        return TrialConfig.from_dict({**self.rules[rule], "feedback_fraction": fraction, "seed": seed})

    def all_seeds(self) -> range:
        return range(FIRST_SEED, FIRST_SEED + self.seeds)


class Fractions(Runs):
    """The source of all its trainings (an `director.Source`), the whole batch of each seed first."""

    def __init__(self, config: FractionsConfig, place: Place, tracker: Recorder, rows: RowFile) -> None:
        super().__init__(config.name, place, tracker, {"speed": rows})
        self.config = config
        runs = [(r, f, s) for s in config.all_seeds() for f in config.shares() for r in config.rules]
        self._uids = {run: f"{config.name}-{digest([place.key, config.trial(*run).identity()])}" for run in runs}
        self._plans = {uid: Planned(config=config.trial(*which), kind="speed") for which, uid in self._uids.items()}

    @property
    def complete(self) -> bool:
        """Nothing is left to run."""
        return not any(self._open(self._plans))

    def next(self) -> Task | Wait | None:
        for uid, plan in self._open(self._plans):
            return self._task(uid, plan.with_options(checkpoint=location(self._checkpoint(uid))))
        return WAIT if self._running else None

    def record_known(self) -> None:
        """Tell MLflow what an earlier start left as rows."""
        for known in self._rows_of(self._plans):
            self._tracker.record(known["uid"], known["kind"], known)

    def summary(self) -> dict[str, Any]:
        """What is known by now, rule by rule."""
        first = TrialConfig.from_dict(next(iter(self.config.rules.values())))
        status = [row["status"] for uid in self._uids.values() if (row := self._row_of(uid)) is not None]
        return {
            "study": self.name,
            "complete": len(status) == len(self._uids) and "failed" not in status,
            "arch": first.arch,
            "dataset": first.dataset,
            "epochs": first.epochs,
            "batch_size": first.batch_size,
            "seeds": list(self.config.all_seeds()),
            "runs": {name: status.count(name) for name in ("finished", "diverged", "failed")},
            "rules": {rule: self._of_rule(rule) for rule in self.config.rules},
        }

    def _of_rule(self, rule: str) -> dict[str, Any]:
        rows = {fraction: self._by_seed(rule, fraction) for fraction in self.config.shares()}
        whole = _accuracies(rows[1.0])
        lines = [_line(fraction, found, whole) for fraction, found in rows.items()]
        return {"lines": lines, "enough": enough(lines), "config": self.config.rules[rule]}

    def _by_seed(self, rule: str, fraction: float) -> dict[int, Row]:
        known = ((seed, self._row_of(self._uids[rule, fraction, seed])) for seed in self.config.all_seeds())
        return {seed: row for seed, row in known if row is not None}

    def outlook(self) -> str:
        """What there is to do, in one line."""
        done = self._settled(self._plans)
        epochs = next(iter(self.config.rules.values()))["epochs"]
        return f"{len(self._plans)} trainings of {epochs} epochs" + (f", of which {done} are known" if done else "")

    def render(self) -> str:
        """The live display."""
        done = self._settled(self._plans)
        head = f"{self.name}: {done}/{len(self._plans)} trainings · {self._time(len(self._plans) - done)}"
        return "\n".join([head, *self._lines()])


def _accuracies(rows: Mapping[int, Row]) -> dict[int, float]:
    """By seed; a diverged run is at chance, a failed one has none."""
    return {seed: row["metrics"]["val_acc"] for seed, row in rows.items() if "val_acc" in row["metrics"]}


def _line(fraction: float, rows: Mapping[int, Row], whole: Mapping[int, float]) -> dict[str, Any]:
    own = _accuracies(rows)
    status = [row["status"] for row in rows.values()]
    return {
        "fraction": fraction,
        "val_acc": estimate(list(own.values())).to_dict() if own else None,
        "versus_whole": None if fraction == 1.0 else versus(own, whole),
        **{name: status.count(name) for name in ("diverged", "failed")},
    }


def enough(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """The smallest share that is enough, as is every larger one: it loses less than `MARGIN` against the whole batch.

    A share is enough if its 95 % interval says so, too little if the interval lies below 0 (also one of no width, of
    which a verdict says nothing), and otherwise it is not known, for want of seeds. 1.0: the largest share is too
    little. None: of the largest it is not known.
    """
    found = None
    for line in sorted(lines, key=lambda line: -line["fraction"]):
        if line["fraction"] == 1.0:
            continue
        lost = line["versus_whole"]
        if lost is None or lost["low"] is None:
            break
        if lost["low"] <= -MARGIN:
            return 1.0 if found is None and lost["high"] < 0 else found
        found = line["fraction"]
    return found


@dataclass(frozen=True, kw_only=True)
class Ready:
    """What can be begun."""

    config: FractionsConfig
    place: Place


def prepare_fractions(
    name: str | None,
    rules: Sequence[str],
    fractions: Sequence[float],
    *,
    seeds: int,
    arch: str | None,
    dataset: str | None,
    changes: Mapping[str, Any],
    files: Sequence[Path],
    options: Options,
) -> Ready:
    """Everything that it needs, tried out; UserError for what cannot work, before anything is written.

    Coefficients: those of ``files`` (a best.yaml), else of the rule's own search under the results. ``arch``,
    ``dataset``: None, those of the first file, else of a TrialConfig. ``name``: None, by these two.
    """
    if not rules and not files:
        raise UserError("--fractions: name rules that have been searched, --rule R[,R...], or a --config FILE of each.")
    blind = [rule for rule in rules if not parse_rule(rule).sees_activity]
    if blind:
        raise UserError(f"--fractions has no effect on {', '.join(blind)}, which see no activity: leave them out.")
    known = rules_of(rules, arch=arch, dataset=dataset, changes=changes, files=files, options=options)
    wanted = {rule: config.to_dict() for rule, config in known.items() if parse_rule(rule).sees_activity}
    first = next(iter(known.values()))
    name = name or study_name("fractions", first.arch, first.dataset)
    config = FractionsConfig(name=name, rules=wanted, fractions=tuple(fractions), seeds=seeds)
    for rule in config.rules:
        place = survey(options, config.trial(rule, min(config.fractions), FIRST_SEED))
    return Ready(config=config, place=place)


def fractions(
    ready: Ready,
    *,
    say: Callable[[str], None],
    watch: Callable[[Fractions], Callable[[], None]] | None = None,
) -> tuple[Outcome, dict[str, Any]]:
    """Run it to its end, or go on with it; the summary of what is known by then."""
    config, place = ready.config, ready.place
    folder = place.options.results / config.name
    with recorded(config, config.name, BOOK, place, tags={"bench.rules": ",".join(config.rules)}, say=say) as tracker:
        source = Fractions(config, place, tracker, RowFile(folder / "rows.jsonl", say=say))
        source.record_known()
        source.sweep()
        outcome = carry_out(source, place, folder / "ray.log", say=say, watch=watch)
        summary = source.summary()
        numbers = headlines.fractions(summary)
        return outcome, conclude(tracker, folder, BOOK, summary, headline=numbers, page=fractions_page, end=outcome)
