"""What the figures of a transfer have in common: the pairs of a rule, and what is said of n, budget and losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.cells import interval
from bench.transfer_words import SAME

#: How the test set was used: in a regret, and in a rank correlation or a lost share.
TEST = "test was read once per confirmed run; nothing was chosen by it"
VALIDATION = "validation only, search seed; test was not read"

#: The columns of `ends`.
ENDS = ("mean", "sd", "n", "low", "high")


def pairs_of(summary: Mapping[str, Any], rule: str, space: str) -> list[Mapping[str, Any]]:
    return [pair for pair in summary["pairs"] if (pair["rule"], pair["space"]) == (rule, space)]


def key(pair: Mapping[str, Any]) -> tuple[str, str, str, str]:
    return pair["rule"], pair["space"], pair["source"], pair["target"]


def ends(value: Mapping[str, Any] | None) -> list[Any]:
    return [value and value[name] for name in ENDS]


def note(summary: Mapping[str, Any]) -> str:
    whole = "" if summary["complete"] else "; not all is run yet"
    return f"{summary['dataset']}; searches of {summary['trials']} trials × {summary['epochs']} epochs{whole}"


def seeds(estimates: Iterable[Mapping[str, Any] | None]) -> str:
    """Over how many seeds these are, and what is shown of their spread."""
    found = sorted({value["n"] for value in estimates if value})
    if not found:
        return "no seed is measured"
    if found == [1]:
        return "one seed, and so without an interval"
    return f"n = {found[0] if len(found) == 1 else f'{found[0]} to {found[-1]}'} seeds; mean and 95 % interval"


def losses(pairs: Sequence[Mapping[str, Any]]) -> str:
    """How many confirmed runs did not go well; those of a target's own best count once, whatever is moved there."""
    own = {(pair["rule"], pair["space"], pair["target"]): pair["native"] for pair in pairs}
    sides = {"moved": [pair["moved"] for pair in pairs], "native": list(own.values())}
    counts = {name: [sum(side[name] for side in runs) for runs in sides.values()] for name in ("diverged", "failed")}
    diverged, failed = (f"{moved} moved and {native} native runs" for moved, native in counts.values())
    return f"{diverged} diverged and count at chance; {failed} failed and have no accuracy"


def said(pair: Mapping[str, Any]) -> str:
    """A pair's regret, or why there is none, and what of its runs did not go well."""
    regret = pair["regret"]["test_acc"]
    if regret is None:
        return str(pair["reason"])
    if pair["same"]:
        return SAME
    lines = [f"regret {interval(regret)} points (n {regret['n']})", f"moved run: {regret['verdict']}"]
    for side in ("moved", "native"):
        lines += [f"{pair[side][what]} {side} {what}" for what in ("diverged", "failed") if pair[side][what]]
    return "<br>".join(lines)
