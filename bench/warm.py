"""Warm starts: a search that begins with what another one found, and what that saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.config import StudyConfig, UserError
from bench.learning.rules import ANY
from bench.plans import find_study
from bench.proposals import fits
from bench.rows import Row, RowFile
from bench.space import UPDATE_FIELDS, Space
from bench.spaces import space_of

#: So many of the source's configurations are tried first, and no more than a quarter of the budget.
MOST = 5


def warm_trials(results: Path, source: str, config: StudyConfig, space: Space) -> tuple[dict[str, Any], ...]:
    """The source's best configurations, best first, as values of the searched parameters of ``space``.

    Those outside of this space are left out. UserError if there is no such search, if it is of another rule or kind of
    space (whose coefficients mean something else), or if none of its configurations lies in this space.
    """
    before = find_study(results, config.name)
    if before is not None and before.warm_from == source:  # a search that goes on keeps what it began with
        return before.warm
    known = find_study(results, source)
    if known is None:
        raise UserError(f"--warm-from {source}: there is no search of this name in {results}.")
    if config.rule == ANY:
        raise UserError("--warm-from is of one rule's coefficients, and has no effect on --rule any: leave it out.")
    if (known.arch, known.dataset) == (config.arch, config.dataset):
        raise UserError(
            f"--warm-from {source}: it is of the same network and data, so that its trials would cost nothing here; to "
            "go on with it, give it a larger --trials."
        )
    if known.rule != config.rule:
        raise UserError(f"--warm-from {source}: it is of the rule {known.rule!r}, and this of {config.rule!r}.")
    theirs, ours = (space_of({"rule": each.rule, **each.recipe}) for each in (known, config))
    if theirs != ours:
        raise UserError(
            f"--warm-from {source}: its space is {theirs!r}, and this {ours!r}: its coefficients mean something else; "
            f"name the same --space, or another search."
        )
    rows = _finished(results, source)
    best = sorted(rows, key=lambda row: (-row["metrics"]["val_acc"], row["uid"]))
    values = [{**row["config"]["coefficients"], **{n: row["config"].get(n) for n in UPDATE_FIELDS}} for row in best]
    params = [{name: value[name] for name in space.searched if name in value} for value in values]
    inside = [p for p in params if fits(p, space.distributions(), space.conditions())]
    if not inside:
        raise UserError(f"--warm-from {source}: none of its finished configurations lies in this search's space.")
    unlike = [p for i, p in enumerate(inside) if p not in inside[:i]]
    return tuple(unlike[: max(1, min(MOST, config.trials // 4))])


def saved(results: Path, config: StudyConfig, cold: str) -> dict[str, Any]:
    """How many trials a warm start saved against the search ``cold``, of the same budget and without it.

    ``level`` is the best validation accuracy that both reached (the lower one of ``warm_best`` and ``cold_best``);
    ``warm`` and ``cold`` are the numbers of trials, from 1, until each had a trial of its full budget at that level;
    ``saved`` is their difference. One search each: without an interval. ``reason``: why there is nothing to compare.
    """
    other = find_study(results, cold)
    names = ("level", "warm", "cold", "saved", "warm_best", "cold_best")
    nothing = {"study": cold, **dict.fromkeys(names)}
    if other is None:
        return {**nothing, "reason": "there is no cold search of the same budget; the same command without --warm-from"}
    differ = [name for name in _SAME if getattr(other, name) != getattr(config, name)]
    if differ:
        return {**nothing, "reason": f"{cold} differs in {', '.join(differ)}"}
    if other.warm:
        return {**nothing, "reason": f"{cold} had a warm start, too"}
    if short := [name for name in (config.name, cold) if len(_trials(results, name)) < config.trials]:
        return {**nothing, "reason": f"{' and '.join(short)} has not run all of its trials"}
    ours, theirs = _finished(results, config.name), _finished(results, cold)
    if not ours or not theirs:
        return {**nothing, "reason": "one of the two has no finished trial"}
    bests = [max(row["metrics"]["val_acc"] for row in rows) for rows in (ours, theirs)]
    level = min(bests)
    warm, later = _first(ours, level), _first(theirs, level)
    found = {"level": level, "warm": warm, "cold": later, "saved": later - warm}
    return {"study": cold, **found, "warm_best": bests[0], "cold_best": bests[1], "reason": None}


#: What a cold search must have in common with a warm one.
_SAME = ("rule", "arch", "dataset", "trials", "epochs", "seed", "sampler", "scheduler", "objective", "recipe", "space")


def _trials(results: Path, study: str) -> list[Row]:
    """The trials of a search, in the order in which they were proposed."""
    rows = RowFile(results / study / "rows.jsonl", say=lambda _: None).read()
    return sorted((row for row in rows if row["kind"] == "search"), key=lambda row: row["uid"])


def _finished(results: Path, study: str) -> list[Row]:
    """Those that had their full budget."""
    return [row for row in _trials(results, study) if row["status"] == "finished"]


def _first(rows: Sequence[Mapping[str, Any]], level: float) -> int:
    reached = next(row for row in rows if row["metrics"]["val_acc"] >= level)
    return int(str(reached["uid"]).rpartition("-")[2]) + 1
