"""From the studies of all subsets of primitives to what each primitive does, on one architecture.

An effect is a difference of confirmed accuracies. At every seed it is averaged over its contexts, the subsets that
something is added to, each of the same weight; then it is estimated over seeds. The best configuration of a study is
chosen by validation, so that a difference on test is not one of luck in choosing. A study without any trial that
finished stands at chance: that a rule diverges whatever its coefficients is a result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

from bench.curves import above_chance
from bench.learning.rules import parse_rule
from bench.rows import Row
from bench.statistics import CONFIDENCE, estimate, mean_by_seed, share, verdict, versus
from bench.summary import REFERENCE, by_configuration, by_seed, entry

#: The control that is the empty subset: B is fixed.
EMPTY = "feedback"

NOTHING_FINISHED = "nothing finished"

ACCURACIES = ("val_acc", "test_acc")

#: What the difference that adding something makes says of it.
ADDED = {"better": "raises", "worse": "lowers", "not distinguishable": "not distinguishable"}
#: What the interaction of two says of adding both.
TOGETHER = {"better": "more than the sum", "worse": "less than the sum", "not distinguishable": "not distinguishable"}

Subset = frozenset[str]
#: (sign, subset) of the accuracies that an effect is made of in one context.
Terms = Sequence[tuple[int, Subset]]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The study of one subset of primitives, or of one control, on the one architecture.

    ``searched`` and ``confirmed``: its rows of these kinds; a control may have no search.
    """

    rule: str
    primitives: tuple[str, ...]
    searched: Sequence[Row]
    confirmed: Sequence[Row]
    control: bool = False
    complete: bool = True

    @cached_property
    def best(self) -> list[Row]:
        """The confirmed rows of its best configuration, by validation mean; empty if none has an accuracy."""
        groups = [(by_seed(_measured(rows), "val_acc"), rows) for rows in by_configuration(self.confirmed)]
        measured = [(math.fsum(found.values()) / len(found), rows) for found, rows in groups if found]
        return max(measured, key=lambda group: group[0])[1] if measured else []

    @property
    def outcome(self) -> str:
        """``confirmed``, `NOTHING_FINISHED`, or why it has no accuracy."""
        if not self.complete:
            return "not complete"
        if self.best:
            return "confirmed"
        if self.confirmed:
            return "every confirmed run failed"
        status = [row["status"] for row in self.searched]
        diverged, failed = status.count("diverged"), status.count("failed")
        if diverged > failed and diverged + failed == len(status):
            return NOTHING_FINISHED
        return "most trials failed" if failed and diverged + failed == len(status) else "not confirmed"


@dataclass(frozen=True, kw_only=True)
class _Study:
    """A cell that has accuracies, by name and seed."""

    cell: Cell
    found: Mapping[str, Any]
    accuracies: Mapping[str, Mapping[int, float]]

    @property
    def choice(self) -> tuple[float, str]:
        """What the best is chosen by: the least is the best."""
        return -self.found["val_acc"]["mean"], self.cell.rule

    def local(self, kinds: Mapping[str, str]) -> bool:
        return all(kinds[name] == "local" for name in self.cell.primitives)


def summarize_matrix(
    cells: Sequence[Cell],
    *,
    primitives: Sequence[str],
    kinds: Mapping[str, str],
    chance: float,
    examples: int,
    trials: int,
    epochs: int,
    any_study: Cell | None = None,
) -> dict[str, Any]:
    """The whole matrix: JSON-ready. Accuracies and differences are shares in [0, 1].

    ``primitives``: those of which the subsets were made; ``kinds``: local or non-local, by primitive. ``chance`` and
    ``examples`` are of the validation split; ``trials`` and ``epochs`` the budget of each study.

    ``table``: see `_line`, best validation mean first. ``left_out``: {rule, reason} of the cells without accuracies.
    ``subsets``: how many, controls not among them. ``effects``: of each primitive, over the subsets without it.
    ``interactions``: of each pair, over the subsets without either; ``both``: of adding the two; ``interaction``: what
    that is more than the sum of adding each (accuracies, see `_effect`). ``locality``, ``cheapest``, ``comparisons``,
    ``any``: see the functions of these names. ValueError for a subset that stands twice, or of other primitives.
    """
    _check(cells, primitives)
    studies = _studies((*cells, any_study) if any_study else cells, chance)
    of_any = next((s for s in studies if s.cell is any_study), None)
    studies = [s for s in studies if s is not of_any]
    subsets = [s for s in studies if not s.cell.control]
    known = {frozenset(s.cell.primitives): s for s in subsets}
    known |= {frozenset(): s for s in studies if s.cell.control and s.cell.rule == EMPTY}
    given = [cell for cell in cells if not cell.control]
    return {
        "primitives": list(primitives),
        "kinds": {name: kinds[name] for name in primitives},
        "chance": chance,
        "examples": examples,
        "trials": trials,
        "epochs": epochs,
        "table": [_line(study, kinds) for study in studies],
        "left_out": [{"rule": c.rule, "reason": c.outcome} for c in cells if all(s.cell is not c for s in studies)],
        "subsets": {
            "expected": 2 ** len(primitives) - 1,
            "given": len(given),
            "measured": len(subsets),
            "nothing_finished": sum(s.cell.outcome == NOTHING_FINISHED for s in subsets),
        },
        "effects": [_added(p, primitives, kinds, known) for p in primitives],
        "interactions": [_paired(pair, primitives, known) for pair in combinations(primitives, 2)],
        "locality": _locality(subsets, kinds),
        "cheapest": _cheapest(subsets, chance, examples),
        "comparisons": _comparisons(subsets, chance, examples),
        "any": any_study and _any(any_study, of_any, subsets, given),
    }


def _check(cells: Iterable[Cell], primitives: Sequence[str]) -> None:
    seen: set[object] = set()
    for cell in cells:
        if not (cell.control or set(cell.primitives) <= set(primitives)):
            raise ValueError(f"{cell.rule} is no subset of {', '.join(primitives)}")
        key = cell.rule if cell.control else frozenset(cell.primitives)
        if key in seen:
            raise ValueError(f"{cell.rule} stands twice")
        seen.add(key)


def _measured(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["status"] != "failed"]


def _studies(cells: Sequence[Cell], chance: float) -> list[_Study]:
    """The cells that have accuracies, the best first."""
    confirmed = {id(cell): cell.best for cell in cells if cell.outcome == "confirmed"}
    seeds = sorted({row["config"]["seed"] for rows in confirmed.values() for row in _measured(rows)})
    reference = [
        row for cell in cells if cell.control and cell.rule == REFERENCE for row in confirmed.get(id(cell), ())
    ]
    found = []
    for cell in cells:
        if cell.outcome == "confirmed":
            found.append(_study(cell, cell.best, reference))
        elif cell.outcome == NOTHING_FINISHED and seeds:
            found.append(_study(cell, _guessers(cell, seeds, chance), reference))
    return sorted(found, key=lambda study: study.choice)


def _study(cell: Cell, rows: Sequence[Row], reference: Sequence[Row]) -> _Study:
    accuracies = {name: by_seed(_measured(rows), name) for name in ACCURACIES}
    return _Study(cell=cell, found=entry(rows, reference), accuracies=accuracies)


def _guessers(cell: Cell, seeds: Iterable[int], chance: float) -> list[Row]:
    """What a study in which nothing finished stands for: a network that guesses, at every seed."""
    config = {**cell.searched[0]["config"], "coefficients": {}}
    metrics = dict.fromkeys(ACCURACIES, chance)
    return [{"config": {**config, "seed": seed}, "status": "finished", "metrics": metrics} for seed in seeds]


def _line(study: _Study, kinds: Mapping[str, str]) -> dict[str, Any]:
    """One study: the keys of `bench.summary.entry` for its best configuration, and these.

    ``name``: of the cell; ``rule`` is the configuration's. ``local``: whether every primitive is (None for a control).
    ``outcome``: confirmed, or nothing finished: then the accuracies are those of guessing. ``trials``: by status.
    ``lost``: see `_diverged`. The training time that was measured is ``train_seconds``.
    """
    cell = study.cell
    status = [row["status"] for row in cell.searched]
    return {
        **study.found,
        "name": cell.rule,
        "primitives": list(cell.primitives),
        "control": cell.control,
        "local": None if cell.control else study.local(kinds),
        "cost_floor": parse_rule(cell.rule).cost_floor,
        "outcome": cell.outcome,
        "trials": {name: status.count(name) for name in ("finished", "stopped", "diverged", "failed")},
        "lost": _diverged(cell.searched),
    }


def _diverged(searched: Iterable[Row]) -> dict[str, Any] | None:
    """The share of a search's trials that diverged, of those that did not fail; the interval takes them as independent.

    A sampler that learns proposes less of what diverged: this is of the search, and not of the space.
    """
    status = [row["status"] for row in _measured(searched)]
    return share(status.count("diverged"), len(status)).to_dict() if status else None


# --- effects


def _contexts(primitives: Sequence[str], without: Iterable[str]) -> Iterator[Subset]:
    rest = [name for name in primitives if name not in without]
    for size in range(len(rest) + 1):
        yield from map(frozenset, combinations(rest, size))


def _added(p: str, primitives: Sequence[str], kinds: Mapping[str, str], known: Mapping[Subset, _Study]) -> Any:
    terms = {s: ((1, s | {p}), (-1, s)) for s in _contexts(primitives, {p})}
    effects = {name: _effect(name, terms, known, ADDED) for name in ACCURACIES}
    return {"primitive": p, "kind": kinds[p], "contexts_expected": len(terms), **effects}


def _paired(pair: tuple[str, str], primitives: Sequence[str], known: Mapping[Subset, _Study]) -> Any:
    p, q = pair
    contexts = list(_contexts(primitives, pair))
    both = {s: ((1, s | {p, q}), (-1, s)) for s in contexts}
    more = {s: ((1, s | {p, q}), (-1, s | {p}), (-1, s | {q}), (1, s)) for s in contexts}
    return {
        "primitives": [p, q],
        "contexts_expected": len(contexts),
        "both": {name: _effect(name, both, known, ADDED) for name in ACCURACIES},
        "interaction": {name: _effect(name, more, known, TOGETHER) for name in ACCURACIES},
    }


def _effect(
    name: str, terms: Mapping[Subset, Terms], known: Mapping[Subset, _Study], words: Mapping[str, str]
) -> dict[str, Any] | None:
    """Mean, sd, n, low, high, ``verdict``; over how many ``contexts``; ``smallest`` and ``largest`` {value, context}.

    A context counts if all of its subsets have accuracies, a seed if all of the contexts have it. None without any.
    """
    values = {
        known[context].cell.rule: _sum(name, signed, known)
        for context, signed in terms.items()
        if all(subset in known for _, subset in signed)
    }
    averaged = mean_by_seed(list(values.values()))
    if not averaged:
        return None
    found = estimate(list(averaged.values()))
    means = {context: math.fsum(by[seed] for seed in averaged) / len(averaged) for context, by in values.items()}
    ranked = sorted(means, key=lambda context: round(means[context], 12))  # equal ones in their order
    smallest, largest = ranked[0], ranked[-1]
    return {
        **found.to_dict(),
        "verdict": words[verdict(found)],
        "contexts": len(values),
        "smallest": {"value": means[smallest], "context": smallest},
        "largest": {"value": means[largest], "context": largest},
    }


def _sum(name: str, terms: Terms, known: Mapping[Subset, _Study]) -> dict[int, float]:
    several = [(sign, known[subset].accuracies[name]) for sign, subset in terms]
    seeds = set.intersection(*(set(values) for _, values in several))
    return {seed: math.fsum(sign * values[seed] for sign, values in several) for seed in seeds}


# --- comparisons


def _locality(subsets: Sequence[_Study], kinds: Mapping[str, str]) -> dict[str, Any]:
    """Subsets of local primitives alone, against all others.

    ``local``, ``non_local``: how many ``subsets``, the ``best`` by validation, its ``val_acc`` and ``test_acc``, the
    ``mean`` over all of them, and what was ``lost`` in their searches. ``best_versus`` and ``mean_versus``: local −
    non-local, on test. There are more non-local subsets to choose the best from.
    """
    sides = {
        "local": [study for study in subsets if study.local(kinds)],
        "non_local": [study for study in subsets if not study.local(kinds)],
    }
    best = [side[0].accuracies["test_acc"] if side else {} for side in sides.values()]
    means = [mean_by_seed([study.accuracies["test_acc"] for study in side]) for side in sides.values()]
    described = {name: _side(side) for name, side in sides.items()}
    return {**described, "best_versus": versus(*best), "mean_versus": versus(*means)}


def _side(studies: Sequence[_Study]) -> dict[str, Any]:
    means = {name: mean_by_seed([study.accuracies[name] for study in studies]) for name in ACCURACIES}
    return {
        "subsets": len(studies),
        "best": studies[0].cell.rule if studies else None,
        **{name: studies[0].found[name] if studies else None for name in ACCURACIES},
        "mean": {name: estimate(list(by.values())).to_dict() if by else None for name, by in means.items()},
        "lost": _diverged(row for study in studies for row in study.cell.searched),
    }


def _against(study: _Study) -> dict[str, Any] | None:
    """Its test difference to backprop; None without one, and of one seed, which has no interval."""
    found: dict[str, Any] | None = study.found[f"test_acc_versus_{REFERENCE}"]
    return None if found is None or found["low"] is None else found


def _learned(study: _Study, chance: float, examples: int) -> bool:
    return bool(study.found["val_acc"]["mean"] > above_chance(chance, examples))


def _cheapest(subsets: Sequence[_Study], chance: float, examples: int) -> dict[str, Any] | None:
    """The subset of the least cost floor (then the fewest primitives, then the best) that is not worse than backprop.

    That it is not distinguishable is no proof of equality: ``versus`` has its interval, and the ``half_width`` of that.
    Of the subsets that learned something, on validation. None where there is none, or no interval.
    """
    fit = [(s, v) for s in subsets if _learned(s, chance, examples) and (v := _against(s)) and v["verdict"] != "worse"]
    if not fit:
        return None
    study, found = min(fit, key=lambda pair: (*_cost(pair[0]), pair[0].choice))
    return {
        "rule": study.cell.rule,
        "primitives": list(study.cell.primitives),
        "cost_floor": _cost(study)[0],
        **{name: study.found[name] for name in ACCURACIES},
        "versus": {**found, "half_width": (found["high"] - found["low"]) / 2},
    }


def _cost(study: _Study) -> tuple[float, int]:
    return parse_rule(study.cell.rule).cost_floor, len(study.cell.primitives)


def _comparisons(subsets: Sequence[_Study], chance: float, examples: int) -> dict[str, Any]:
    """How many subsets have a test difference to backprop with an interval, by verdict; how many learned nothing.

    ``by_chance``: how many verdicts of better or worse are expected where there is no difference at all.
    """
    said = [found["verdict"] for found in map(_against, subsets) if found]
    return {
        "subsets": len(said),
        "better": said.count("better"),
        "worse": said.count("worse"),
        "not_distinguishable": said.count("not distinguishable"),
        "without_interval": len(subsets) - len(said),
        "at_chance": sum(not _learned(study, chance, examples) for study in subsets),
        "by_chance": (1 - CONFIDENCE) * len(said),
    }


def _epochs(cells: Sequence[Cell]) -> set[int]:
    """How long their trials were to train."""
    return {row["config"]["epochs"] for cell in cells for row in cell.searched}


def _any(cell: Cell, found: _Study | None, subsets: Sequence[_Study], given: Sequence[Cell]) -> dict[str, Any]:
    """The search over all subsets at once, against a search of each.

    ``rule``, ``coefficients``: which subset it chose. ``best``: the matrix's, by validation. ``versus``: best of the
    matrix − best of any, on test. ``trials``, ``matrix_trials``: what each took; ``same_budget``: whether as many.
    """
    trials, matrix = len(cell.searched), sum(len(study.searched) for study in given)
    chose = found is not None and cell.outcome == "confirmed"
    return {
        "outcome": cell.outcome,
        "rule": found.found["rule"] if found and chose else None,
        "coefficients": found.found["coefficients"] if found and chose else None,
        **{name: found.found[name] if found else None for name in ACCURACIES},
        "best": subsets[0].cell.rule if subsets else None,
        "versus": versus(*(s.accuracies["test_acc"] for s in (subsets[0], found))) if found and subsets else None,
        "trials": trials,
        "matrix_trials": matrix,
        "same_budget": trials == matrix and _epochs([cell]) == _epochs(given),
    }


# --- its numbers in MLflow


def headline(summary: Mapping[str, Any]) -> dict[str, float]:
    """Test accuracies of the subsets and effects of the primitives, by network."""
    found = {}
    for arch, whole in summary["archs"].items():
        for line in whole["table"]:
            if line["test_acc"]:
                found[f"{arch}/{line['name']}/test_acc"] = line["test_acc"]["mean"]
        for effect in whole["effects"]:
            if effect["test_acc"]:
                found[f"{arch}/effect/{effect['primitive']}"] = effect["test_acc"]["mean"]
    return found
