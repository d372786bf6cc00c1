"""What `bench.matrix_summary` found, in words: the ranking of subsets, effects, interactions, and what follows.

Accuracies are in %, differences of accuracies in percentage points.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.cells import NOTHING, count, difference, interval, spread, spread_of
from bench.summary import REFERENCE

#: The headings of the tables.
TABLE_COLUMNS = (
    "",
    "rule",
    "local",
    "val %",
    "test % (n)",
    f"test − {REFERENCE}, points [95 %]",
    "diverged trials",
    "cost floor",
    "seconds",
)
EFFECT_COLUMNS = (
    "primitive",
    "kind",
    "test, points [95 %]",
    "validation, points [95 %]",
    "contexts",
    "smallest, test",
    "largest, test",
)
INTERACTION_COLUMNS = (
    "pair",
    "adding both, test, points [95 %]",
    "interaction, test, points [95 %]",
    "interaction, validation",
    "contexts",
)
LOCALITY_COLUMNS = ("", "subsets", "best", "its test %", "mean test %", "diverged trials")

#: Under `effect_rows` and `interaction_rows`.
EFFECT_CAPTION = (
    "effect: accuracy with − accuracy without, mean over the subsets that it is added to (contexts; the empty one is "
    "feedback), at every seed, then [95 %] over seeds (n)",
    "interaction: what adding both does beyond the sum of adding each",
    "a study in which nothing finished stands at chance",
)


def table_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Subsets and controls, the best validation mean first."""
    return [
        (
            str(place),
            found["name"],
            "control" if found["control"] else "yes" if found["local"] else "no",
            spread(found["val_acc"]),
            _test(found),
            _against(found),
            count(found["lost"]),
            f"{found['cost_floor']:.2f}",
            spread(found["train_seconds"], 1),
        )
        for place, found in enumerate(summary["table"], 1)
    ]


def table_caption(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """Under `table_rows`, a line each: budget, definitions, and how much of the verdicts is luck."""
    found, subsets = summary["comparisons"], summary["subsets"]
    lines = [
        f"{subsets['measured']} of {subsets['expected']} subsets, {summary['trials']} trials of {summary['epochs']} "
        f"epochs each; ± is the standard deviation over seeds (n); cost floor: of a step, in those of {REFERENCE}",
    ]
    if found["subsets"]:
        lines.append(
            f"each verdict is one 95 % interval by itself: of {found['subsets']} comparisons without any difference, "
            f"about {found['by_chance']:.1f} would say otherwise"
        )
    if summary["left_out"]:
        lines.append("left out: " + "; ".join(f"{left['rule']} ({left['reason']})" for left in summary["left_out"]))
    return tuple(lines)


def effect_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What each primitive does."""
    return [
        (
            found["primitive"],
            found["kind"],
            difference(found["test_acc"]),
            difference(found["val_acc"]),
            _contexts(found["test_acc"], found["contexts_expected"]),
            _end(found["test_acc"], "smallest"),
            _end(found["test_acc"], "largest"),
        )
        for found in summary["effects"]
    ]


def interaction_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What each pair does."""
    return [
        (
            " + ".join(found["primitives"]),
            difference(found["both"]["test_acc"]),
            difference(found["interaction"]["test_acc"]),
            difference(found["interaction"]["val_acc"]),
            _contexts(found["interaction"]["test_acc"], found["contexts_expected"]),
        )
        for found in summary["interactions"]
    ]


def locality_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Subsets of local primitives alone, then those with a non-local one."""
    sides = ((name, summary["locality"][key]) for name, key in (("local only", "local"), ("non-local", "non_local")))
    return [
        (
            name,
            str(side["subsets"]),
            side["best"] or NOTHING,
            spread_of(side["test_acc"]),
            spread_of(side["mean"]["test_acc"]),
            count(side["lost"]),
        )
        for name, side in sides
    ]


def verdict_lines(summary: Mapping[str, Any]) -> list[str]:
    """What the matrix answers, one sentence a question; each claims what its own 95 % interval allows, and no more."""
    return [_locality(summary["locality"]), *_cheapest(summary), *any_lines(summary["any"])]


def any_lines(found: Mapping[str, Any] | None) -> list[str]:
    """How one search over all subsets at once compares with the matrix; nothing to say where there was none."""
    if found is None:
        return []
    budget = f"{found['trials']} trials against {found['matrix_trials']}"
    same = "" if found["same_budget"] else ", not the same budget"
    start = f"one search over all subsets ({budget}{same})"
    if found["versus"] is None:
        return [f"{start}: not compared ({found['outcome']})."]
    chose = f"chose {found['rule']}" if found["rule"] else found["outcome"]
    versus = found["versus"]
    return [
        f"{start} {chose}: the best of the matrix ({found['best']}) − it is {_points(versus)}: {versus['verdict']}."
    ]


def _test(found: Mapping[str, Any]) -> str:
    if found["outcome"] != "confirmed":
        return f"{found['outcome']}: chance"
    bad = [f"{found[name]} {name}" for name in ("diverged", "failed") if found[name]]
    return ", ".join([spread_of(found["test_acc"]), *bad])


def _against(found: Mapping[str, Any]) -> str:
    if found["name"] == REFERENCE:
        return NOTHING
    return difference(found[f"test_acc_versus_{REFERENCE}"], len(found["seeds"]))


def _contexts(value: Mapping[str, Any] | None, expected: int) -> str:
    number = value["contexts"] if value else 0
    return str(number) if number == expected else f"{number} of {expected}"


def _end(value: Mapping[str, Any] | None, name: str) -> str:
    return NOTHING if value is None else f"{value[name]['value'] * 100:+.2f} on {value[name]['context']}"


def _points(value: Mapping[str, Any]) -> str:
    return f"{interval(value)} points on test, n = {value['n']}"


def _locality(found: Mapping[str, Any]) -> str:
    versus = found["best_versus"]
    if versus is None:
        return "local against non-local: not compared, one of them has no accuracy, or they have no seed in common."
    local, other = (f"{found[side]['best']}, best of {found[side]['subsets']}" for side in ("local", "non_local"))
    return f"local only ({local}) − non-local ({other}): {_points(versus)}: {versus['verdict']}."


def _cheapest(summary: Mapping[str, Any]) -> list[str]:
    found, all_of_them = summary["cheapest"], summary["comparisons"]
    lines = [
        f"against {REFERENCE}, of {all_of_them['subsets']} subsets {all_of_them['better']} are better, "
        f"{all_of_them['worse']} worse, and {all_of_them['not_distinguishable']} not distinguishable; "
        f"{all_of_them['at_chance']} learned nothing, {all_of_them['without_interval']} have no interval."
    ]
    if all_of_them["at_chance"] == all_of_them["subsets"]:
        return [*lines, "cheapest: none, for no subset learned anything."]
    if found is None:
        return [
            *lines,
            f"cheapest: none; every subset that learned something is worse than {REFERENCE}, or has no interval.",
        ]
    said = found["versus"]
    equal = " (no proof of equality)" if said["verdict"] == "not distinguishable" else ""
    return [
        *lines,
        f"cheapest of those that are not worse than {REFERENCE}: {found['rule']}, cost floor "
        f"{found['cost_floor']:.2f}: {_points(said)}, ± {said['half_width'] * 100:.2f}: {said['verdict']}{equal}.",
    ]
