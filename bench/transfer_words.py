"""What `bench.transfer_summary` found, in words: a matrix per rule, the table of pairs, and the ranking.

Accuracies are in %, differences of accuracies in percentage points.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.cells import NOTHING, count, difference, interval, spread_of
from bench.transfer_summary import portability

#: To be said under `pair_rows`, a line each.
PAIRS_CAPTION = (
    "regret: test accuracy of the target's own best − that of the source's best on the target, in points, paired by "
    "seed; 'lower': the moved run is, with the whole 95 % interval",
    "moved back: the same for the target's best on the source. Where it is 'higher' there, the source's search missed "
    "what suits both, and a regret is not one of the network alone",
    "ρ: Spearman's, of the validation accuracies of the same configurations on both (n); diverged runs stand at chance",
    "lost: of the source's best quarter (those above chance there), how many diverge or fall to chance on the target",
    "± is the standard deviation over seeds (n); each verdict is one 95 % interval by itself",
)
#: Under `matrix_rows`.
MATRIX_CAPTION = (
    "rows: where the coefficients were found; columns: where they were used",
    "diagonal: test accuracy of its own best, % ± standard deviation (n); elsewhere: regret on test, points [95 %] (n)",
)
#: Under `ranking_rows`.
RANKING_CAPTION = (
    "mean regret: over the rule's pairs at every seed, then estimated over seeds; of these networks, not of others",
    "against the next: difference of the mean test regrets over the pairs that both have, paired by seed",
)

#: Instead of a regret of 0 that no run could have made another.
SAME = "0: both chose the same"

#: The headings of the tables.
PAIR_COLUMNS = (
    "rule",
    "space",
    "from → to",
    "native test %",
    "moved test %",
    "regret, points [95 %]",
    "moved back, points [95 %]",
    "ρ [95 %] (n)",
    "lost",
    "backprop test %",
)
RANKING_COLUMNS = (
    "",
    "rule",
    "space",
    "pairs",
    "mean regret test, points [95 %]",
    "validation, points [95 %]",
    "worst pair, points",
    "mean ρ (pairs)",
    "lost",
    "against the next, points [95 %]",
)


def pair_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row per pair; a regret that is not there says why."""
    return [
        (
            pair["rule"],
            pair["space"],
            f"{pair['source']} → {pair['target']}",
            _runs(pair["native"]),
            _runs(pair["moved"]),
            pair["reason"] or (SAME if pair["same"] else difference(pair["regret"]["test_acc"])),
            SAME if pair["same"] else difference(pair["back_regret"]["test_acc"]),
            _rank(pair["rank"]),
            _lost(pair["lost"]),
            _runs(pair["reference"]),
        )
        for pair in summary["pairs"]
    ]


def matrices(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(rule, space) of every matrix that there is, in order of appearance."""
    return list(dict.fromkeys((pair["rule"], pair["space"]) for pair in summary["pairs"]))


def matrix_columns(summary: Mapping[str, Any], rule: str, space: str) -> tuple[str, ...]:
    """The headings of `matrix_rows`: the networks that it was carried to."""
    return ("from \\ to", *portability(summary, rule, space)["archs"])


def matrix_rows(summary: Mapping[str, Any], rule: str, space: str) -> list[tuple[str, ...]]:
    """One row per network that the coefficients are from."""
    found = portability(summary, rule, space)
    return [(source, *(_place(found, source, target) for target in found["archs"])) for source in found["archs"]]


def ranking_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row per rule and space, the least mean regret first."""
    return [
        (
            NOTHING if found["place"] is None else str(found["place"]),
            found["rule"],
            found["space"],
            _pairs(found),
            difference(found["regret"]["test_acc"]),
            difference(found["regret"]["val_acc"]),
            _worst(found["worst"]),
            _rho(found["rho"]),
            count(found["lost"]),
            _next(found["versus_next"]),
        )
        for found in summary["rules"]
    ]


def _runs(found: Mapping[str, Any]) -> str:
    """Test accuracy, and what of the runs did not go well."""
    bad = [f"{found[name]} {name}" for name in ("diverged", "failed") if found[name]]
    return ", ".join([spread_of(found["test_acc"]), *bad])


def _place(found: Mapping[str, Any], source: str, target: str) -> str:
    if source == target:
        return spread_of(found["native"][source])
    value = found["regret"][source].get(target)
    if value is not None and (source, target) in found["same"]:
        return SAME
    return NOTHING if value is None else f"{interval(value)} (n {value['n']})"


def _gaps(value: Mapping[str, Any]) -> list[str]:
    return [f"{value[name]} {name}" for name in ("failed", "missing") if value[name]]


def _rank(value: Mapping[str, Any]) -> str:
    rho = NOTHING if value["rho"] is None else interval(value, 1, 2, name="rho")
    return ", ".join([f"{rho} (n {value['n']})", *_gaps(value)])


def _lost(value: Mapping[str, Any]) -> str:
    idle = [f"{value['nothing_to_lose']} at chance at home"] if value["nothing_to_lose"] else []
    return ", ".join([count(value), *_gaps(value), *idle])


def _pairs(found: Mapping[str, Any]) -> str:
    measured = found["regret"]["test_acc"]["pairs"] if found["regret"]["test_acc"] else 0
    return str(measured) if measured == found["pairs"] else f"{measured} of {found['pairs']}"


def _worst(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return NOTHING
    return f"{value['mean'] * 100:+.2f} (n {value['n']}) {value['source']} → {value['target']}"


def _rho(value: Mapping[str, Any]) -> str:
    return NOTHING if value["mean"] is None else f"{value['mean']:+.2f} ({value['pairs']})"


def _next(value: Mapping[str, Any] | None) -> str:
    return NOTHING if value is None else f"{difference(value)}, {value['pairs']} pairs"
