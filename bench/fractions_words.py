"""What `bench.fractions` found, in words: a table of each rule, and one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.cells import difference, spread_of

#: `bench.fractions.MARGIN`, in words.
LEAST = "a point"
#: The headings of `rows_of`.
COLUMNS = ("share", "val acc %, ± sd", "less the whole batch's, points [95 %]", "diverged", "failed")


def rows_of(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row for each share of a rule's batches, the whole batch first."""
    return [
        (
            f"{line['fraction']:g}",
            spread_of(line["val_acc"]),
            difference(line["versus_whole"]),
            f"{line['diverged']}",
            f"{line['failed']}",
        )
        for line in found["lines"]
    ]


def sentence(rule: str, found: Mapping[str, Any]) -> str:
    """What a rule's table comes to."""
    if found["enough"] is None:
        return f"{rule}: no share is known to lose less than {LEAST}: it takes more seeds, or a larger split."
    if found["enough"] == 1.0:
        return f"{rule}: the largest share is worse than the whole batch already."
    line = next(line for line in found["lines"] if line["fraction"] == found["enough"])
    lost = line["versus_whole"]
    return (
        f"{rule}: the smallest share that is known to lose less than {LEAST}, as every larger one: {found['enough']:g} "
        f"(95 % interval of what it loses: to {max(0.0, -100 * lost['low']):.2f} points, n {lost['n']})."
    )
