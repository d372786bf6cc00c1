"""`bench confirm`: train named configurations with the same fresh seeds, and compare test accuracy seed by seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.checkpoint import location
from bench.compare import compare
from bench.compare_words import CAPTION, COLUMNS, TEXTS, table_rows
from bench.config import Strict, TrialConfig, UserError, check_range, digest
from bench.director import WAIT, Task, Wait
from bench.kinds import KINDS
from bench.pages.parts import Page, Section, Table
from bench.place import Options, Place, survey
from bench.programme import conclude, recorded
from bench.reading import SearchRows, read_config, read_rows
from bench.rows import Row, RowFile, last_attempts
from bench.runs import Outcome, Planned, Recorder, Runs, carry_out

#: Not the seeds by which a search chose its best, nor those of robustness.
FIRST_SEED = 3000


@dataclass(frozen=True, kw_only=True)
class ConfirmationConfig(Strict):
    """``configs``: by name, the whole TrialConfig of each, in order (its seed is not used)."""

    name: str
    configs: dict[str, dict[str, Any]]
    seeds: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("confirmation", "seeds", self.seeds, 1, 1000)
        if len(self.by_digest()) < len(self.configs) or len(self.configs) < 2:
            raise UserError("confirmation: name two or more configurations that differ in more than the seed.")
        if len({TrialConfig.from_dict(values).dataset for values in self.configs.values()}) > 1:
            raise UserError("confirmation: the configurations are of several data sets; name those of one.")

    def by_digest(self) -> dict[str, str]:
        """The names of the configurations, by what they are but for the seed."""
        return {_digest(TrialConfig.from_dict(values)): name for name, values in self.configs.items()}

    def all_seeds(self) -> range:
        return range(FIRST_SEED, FIRST_SEED + self.seeds)


def _digest(config: TrialConfig) -> str:
    return config.replace(seed=0).digest()


class Confirmation(Runs):
    """The source of all its trainings (a `director.Source`), seed by seed."""

    def __init__(self, config: ConfirmationConfig, place: Place, tracker: Recorder, rows: RowFile) -> None:
        super().__init__(config.name, place, tracker, {"confirm": rows})
        trials = [{**values, "seed": seed} for seed in config.all_seeds() for values in config.configs.values()]
        plans = [Planned(config=TrialConfig.from_dict(trial), kind="confirm") for trial in trials]
        self._plans = {f"{config.name}-{digest([place.key, plan.config.identity()])}": plan for plan in plans}

    @property
    def complete(self) -> bool:
        """Nothing is left to run."""
        return not any(self._open(self._plans))

    def next(self) -> Task | Wait | None:
        for uid, plan in self._open(self._plans):
            return self._task(uid, plan.with_options(read_test=True, checkpoint=location(self._checkpoint(uid))))
        return WAIT if self._running else None

    def rows(self) -> list[Row]:
        return self._rows_of(self._plans)

    def outlook(self) -> str:
        """What there is to do, in one line."""
        return f"{len(self._plans)} trainings, of which {self._settled(self._plans)} are known"

    def render(self) -> str:
        """The live display."""
        done = self._settled(self._plans)
        head = f"{self.name}: {done}/{len(self._plans)} trainings · {self._time(len(self._plans) - done)}"
        return "\n".join([head, *self._lines()])


def sides(config: ConfirmationConfig, rows: Sequence[Row]) -> list[SearchRows]:
    """The runs of each configuration, as `bench.compare.compare` takes them: confirmed, without a search."""
    names, found = config.by_digest(), {name: list[Row]() for name in config.configs}
    for row in rows:
        trial = TrialConfig.from_dict(row["config"])
        if (name := names.get(_digest(trial))) is not None and trial.seed in config.all_seeds():
            found[name].append({**row, "config": trial.to_dict()})
    return [SearchRows(name=n, config=None, searched=[], confirmed=own, controls=[]) for n, own in found.items()]


def summarize(config: ConfirmationConfig, rows: Sequence[Row]) -> dict[str, Any]:
    """`bench.compare.compare` of the configurations that have runs; nothing before the first of them has one."""
    known = sides(config, rows)
    begun = [side for side in known if side.confirmed and known[0].confirmed]
    status = [row["status"] for side in known for row in side.confirmed]
    nothing: dict[str, Any] = {"first": known[0].name, "studies": [], "controls": [], "notes": []}
    return {
        "study": config.name,
        "dataset": TrialConfig.from_dict(next(iter(config.configs.values()))).dataset,
        "seeds": list(config.all_seeds()),
        "runs": {name: status.count(name) for name in ("finished", "diverged", "failed")},
        "complete": len(status) == config.seeds * len(config.configs) and "failed" not in status,
        **(compare(begun) if begun else nothing),
    }


def read(folder: Path) -> tuple[ConfirmationConfig, list[Row]]:
    """The configuration and the rows that a confirmation keeps in its folder."""
    config = ConfirmationConfig.from_dict(read_config(folder / KINDS["confirmation"].manifest))
    return config, last_attempts(read_rows(folder / "rows.jsonl"))


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of what a confirmation keeps in its folder."""
    return summarize(*read(folder))


def headline(summary: Mapping[str, Any]) -> dict[str, float]:
    """Test accuracy of each configuration, and its difference to the first; none before all are trained."""
    lines = summary["studies"] if summary["complete"] else ()
    found = {f"{line['study']}/test_acc": line["test_acc"]["mean"] for line in lines}
    return found | {f"{line['study']}/versus_first": line["test_acc_versus_first"]["mean"] for line in lines[1:]}


def confirmation_page(summary: Mapping[str, Any]) -> Page:
    """The table of the configurations, and what is unequal between them."""
    runs = ", ".join(f"{n} {status}" for status, n in summary["runs"].items() if n) or "none"
    facts = {"Data set": summary["dataset"], "Seeds": f"{len(summary['seeds'])}", "Runs": runs}
    title = f"Differences to {summary['first']}"
    table = Table(title=title, columns=COLUMNS, rows=table_rows(summary), notes=CAPTION, texts=TEXTS)
    unfinished = [] if summary["complete"] else ["Not all is trained yet: what stands here may change."]
    section = Section(title="Configurations", lines=summary["notes"], parts=[table])
    return Page(title=summary["study"], kind="confirmation", facts=facts, sections=[section], lines=unfinished)


def prepare(config: ConfirmationConfig, options: Options) -> Place:
    """Where its runs run; UserError for what cannot work, before anything is written."""
    places = [survey(options, TrialConfig.from_dict(values)) for values in config.configs.values()]
    return places[0]


def confirm(
    config: ConfirmationConfig,
    place: Place,
    *,
    say: Callable[[str], None],
    watch: Callable[[Confirmation], Callable[[], None]] | None = None,
) -> tuple[Outcome, dict[str, Any]]:
    """Run it to its end, or go on with it; the summary of what is known by then."""
    folder = place.options.results / config.name
    with recorded("confirmation", config, config.name, place, say=say) as tracker:
        source = Confirmation(config, place, tracker, RowFile(folder / "rows.jsonl", say=say))
        source.record(source.rows())  # what an earlier start left, MLflow may lack
        source.sweep()
        outcome = carry_out(source, place, folder / "ray.log", say=say, watch=watch)
        summary = summarize(config, source.rows())
        return outcome, conclude("confirmation", tracker, folder, summary, end=outcome)
