"""`bench matrix`: every subset of the primitives, searched with equal budgets, beside its controls.

Each subset is a search like any other (`bench.plans`, `bench.programme`): what exists is reused, and the searches may
be run in any order, also by `bench search`. What comes of it is said in `bench.matrix_summary`,
from the rows that the searches left, whoever ran them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from bench.campaign import CONTROLS, Ready, trial_config
from bench.config import PRIMITIVE_NAMES, Strict, StudyConfig, UserError
from bench.files import read_yaml
from bench.kinds import KINDS
from bench.learning.primitives import PRIMITIVES
from bench.learning.rules import ANY, parse_rule, subsets
from bench.matrix_summary import Cell, summarize_matrix
from bench.pace import seconds_per_epoch
from bench.place import Options, Place
from bench.plans import BUDGET, Wanted, find_wanted, plan, read_searches, renamed
from bench.programme import Programme, Say, check_own_name, conclude, recorded
from bench.reading import read_config, read_rows
from bench.runs import Outcome, carry_out
from bench.searched import Searched, confirmed_rows, read_searched
from bench.space import Space
from bench.spaces import DEFAULT, SETTINGS

#: The rules that the subsets stand beside; of these, `bench.campaign.CONTROLS` run beside every search anyway.
BESIDE = ("backprop", "feedback", "kolen-pollack", "sign", "frozen")


@dataclass(frozen=True, kw_only=True)
class MatrixConfig(Strict):
    """Which subsets, on which networks. ``any``: also one search over subset and coefficients together."""

    name: str
    archs: tuple[str, ...]
    dataset: str
    primitives: tuple[str, ...] = PRIMITIVE_NAMES
    space: str = DEFAULT
    any: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        subsets(self.primitives)
        if self.any and set(self.primitives) != set(PRIMITIVE_NAMES):
            raise UserError("--any searches all five primitives: leave --primitives out, or --any.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """An older plan names its space ``scaling``."""
        return super().from_dict(renamed(values, scaling="space"))


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A matrix of which nothing can be refused any more, as far as one can know before it begins.

    ``searches``: all of it; ``run``: what this start is to run.
    """

    config: MatrixConfig
    searches: Mapping[Wanted, Ready]
    run: Sequence[Wanted]

    @property
    def place(self) -> Place:
        """Of its first search."""
        return next(iter(self.searches.values())).place


def prepare_matrix(
    config: MatrixConfig,
    *,
    only: Sequence[str],
    given: Mapping[str, Any],
    changes: Mapping[str, Any],
    options: Options,
) -> Prepared:
    """Find the searches, or plan them; ``given`` and ``changes`` as in `bench.plans.plan`, with its errors.

    ``only``: canonical names of the rules to run, a part of the matrix; empty: all.
    """
    searches = plan(searches_of(config), given=given, changes=changes, options=options)
    if config.any:
        settled = next(iter(searches.values())).config
        trials = len(subsets(config.primitives)) * settled.trials
        budget = {name: getattr(settled, name) for name in BUDGET} | {"trials": trials}
        begun = settled.recipe
        searches |= plan(any_of(config), given=budget, changes=changes, options=options, begun=begun)
    check_own_name(config.name, searches.values())
    run = [w for w in searches if not only or w.rule in only]
    return Prepared(config=config, searches=searches, run=run)


def searches_of(config: MatrixConfig) -> list[Wanted]:
    """Every subset, and the rules beside them, on every network."""
    rules = [*(rule.name for rule in subsets(config.primitives)), *(name for name in BESIDE if name not in CONTROLS)]
    return [Wanted.of(rule, arch, config.dataset, config.space) for arch in config.archs for rule in rules]


def any_of(config: MatrixConfig) -> list[Wanted]:
    """The searches over all subsets at once, if they are part of the matrix."""
    return [Wanted.of(ANY, arch, config.dataset, config.space) for arch in config.archs] if config.any else []


def matrix(
    prepared: Prepared,
    *,
    say: Say,
    watch: Callable[[Programme], Callable[[], None]] | None = None,
    trial: str = "bench.trial:run_trial",
) -> tuple[Outcome, dict[str, Any]]:
    """Run the matrix to its end, or go on with it; the summary of what is known by then."""
    config, place = prepared.config, prepared.place
    folder = place.options.results / config.name
    with recorded("matrix", config, config.name, place, say=say) as tracker:
        with Programme(config.name, [prepared.searches[w] for w in prepared.run], say=say) as programme:
            outcome = carry_out(programme, place, folder / "ray.log", trial=trial, say=say, watch=watch)
            programme.end(outcome)
        searches = _read(place.options.results, prepared.searches)
        rows = [row for found in searches.values() for row in (*found.confirmed, *found.controls)]
        for uid, row in {row["uid"]: row for row in rows}.items():  # several searches have one control
            tracker.record(uid, row["kind"], row)
        summary = {**summarize(config, searches), "busy": programme.busy}
        return outcome, conclude("matrix", tracker, folder, summary, end=outcome)


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of what lies in the folders of its searches."""
    config = MatrixConfig.from_dict(read_config(folder / KINDS["matrix"].manifest))
    return summarize(config, read_searches(folder.parent, [*searches_of(config), *any_of(config)]))


def summarize(config: MatrixConfig, searches: Mapping[Wanted, Searched]) -> dict[str, Any]:
    """`bench.matrix_summary` of each network of which there is a search, and the budget."""
    budget = next(iter(searches.values())).config
    by_arch = {arch: {w: s for w, s in searches.items() if w.arch == arch} for arch in config.archs}
    firsts = [next(iter(found.values())) for found in by_arch.values() if found]
    return {
        "study": config.name,
        "dataset": config.dataset,
        "space": config.space,
        "trials": budget.trials,
        "epochs": budget.epochs,
        "complete": searches.keys() >= {*searches_of(config), *any_of(config)}
        and all(found.complete for found in searches.values())
        and all(len(first.controls) >= len(CONTROLS) * budget.confirm_seeds for first in firsts),
        "archs": {arch: _summary_of(config, found, budget) for arch, found in by_arch.items() if found},
    }


def _summary_of(config: MatrixConfig, searches: Mapping[Wanted, Searched], budget: StudyConfig) -> dict[str, Any]:
    """Of one network."""
    cells = {w.rule: _cell(w.rule, found) for w, found in searches.items()}
    whole = cells.pop(ANY, None)
    first = next(iter(searches.values()))
    for rule in CONTROLS:
        rows = [row for row in first.controls if row["config"]["rule"] == rule]
        if rows:
            cells[rule] = Cell(rule=rule, primitives=(), searched=(), confirmed=rows, control=True)
    return summarize_matrix(
        list(cells.values()),
        primitives=config.primitives,
        kinds={name: row.kind for name, row in PRIMITIVES.items()},
        chance=first.data.chance,
        examples=first.data.examples["val"],
        trials=budget.trials,
        epochs=budget.epochs,
        any_study=whole,
    )


def _cell(rule: str, found: Searched) -> Cell:
    return Cell(
        rule=rule,
        primitives=() if rule == ANY else parse_rule(rule).primitives,
        searched=found.searched,
        confirmed=found.confirmed,
        control=rule in BESIDE,
        complete=found.complete,
    )


def _read(results: Path, begun: Mapping[Wanted, Ready]) -> dict[Wanted, Searched]:
    """What these searches have by now, whoever ran them; also those without a row."""
    controls = read_rows(results / "controls" / "rows.jsonl")
    found = {w: read_searched(results, r.config, controls, r.place.data) for w, r in begun.items()}
    return {w: each for w, each in found.items() if each is not None}


def outlook(prepared: Prepared) -> list[dict[str, Any]]:
    """What a start would run, and about how long: a line for each search; nothing is written.

    ``seconds`` of the runs that are left, one after the other: the measured pace of backprop on that network, times
    the rule's cost floor. At most that long: trials that diverge or are stopped end sooner.
    """
    pace: dict[str, float] = {}
    lines = []
    for w in prepared.run:
        ready = prepared.searches[w]
        config, rows = ready.config, read_rows(ready.folder / "rows.jsonl")
        trials = config.trials if Space.from_dict(config.space).searched else 1
        searched = sum(row["kind"] == "search" for row in rows)
        confirmed = sum(row["status"] != "failed" for row in confirmed_rows(config, rows))
        left = max(0, trials - searched) + max(0, config.confirm_seeds - confirmed)
        if left and w.arch not in pace:
            plain = trial_config(config, {}, rule="backprop")
            pace[w.arch] = seconds_per_epoch(plain, ready.place.options, threads=ready.place.share.threads)
        floor = 1.7 if w.rule == ANY else parse_rule(w.rule).cost_floor
        lines.append(
            {
                "study": config.name,
                "rule": w.rule,
                "arch": w.arch,
                "trials": trials,
                "known": searched,
                "runs": left,
                "seconds": left * config.epochs * floor * pace.get(w.arch, 0.0),
            }
        )
    return lines


def _comparable(subset: StudyConfig, whole: StudyConfig) -> bool:
    """Whether they differ in no more than what each searches, and how many trials it has."""
    ours, theirs = (
        {name: value for name, value in config.recipe.items() if name not in SETTINGS} for config in (subset, whole)
    )
    fields = ("epochs", "seed", "confirm_seeds", "scheduler")
    return ours == theirs and all(getattr(subset, name) == getattr(whole, name) for name in fields)


def beside(ready: Ready, space: str) -> dict[str, Any] | None:
    """How a search over all subsets at once (`ANY`) compares with the matrix of its network; None: there is none."""
    results, own = ready.place.options.results, ready.config
    for book in sorted(results.glob(f"*/{KINDS['matrix'].manifest}")):
        config = MatrixConfig.from_dict(read_yaml(book).get("config", {}))
        if own.arch not in config.archs or (config.dataset, config.space) != (own.dataset, space):
            continue
        rules = [rule.name for rule in subsets(config.primitives)]
        wanted = [Wanted.of(rule, own.arch, own.dataset, space) for rule in rules]
        if len(rules) < len(subsets()):  # of other primitives than this search has
            continue
        known = {w: begun for w in wanted if (begun := find_wanted(results, w)) and _comparable(begun, own)}
        if known:
            whole = Wanted.of(ANY, own.arch, own.dataset, space)
            searches = {**{w: replace(ready, config=begun) for w, begun in known.items()}, whole: ready}
            summary = summarize(config.replace(archs=[own.arch]), _read(results, searches))
            found: dict[str, Any] | None = summary["archs"][own.arch]["any"]
            return found
    return None
