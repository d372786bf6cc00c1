"""Cells of terminal tables: an estimate in a few characters, and a dash where there is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.config import one_line

#: What stands where there is nothing to say.
NOTHING = "–"


def spread(value: Mapping[str, Any] | None, scale: float = 100) -> str:
    """Mean ± standard deviation over seeds."""
    if value is None:
        return NOTHING
    sd = "" if value["sd"] is None else f" ± {value['sd'] * scale:.2f}"
    return f"{value['mean'] * scale:.2f}{sd}"


def spread_of(value: Mapping[str, Any] | None, scale: float = 100) -> str:
    """Mean ± standard deviation, and over how many seeds."""
    return NOTHING if value is None else f"{spread(value, scale)} (n {value['n']})"


def margin(value: Mapping[str, Any] | None, scale: float, digits: int) -> str:
    """Mean ± half of the width of the 95 % interval."""
    if value is None:
        return NOTHING
    half = "" if value["high"] is None else f" ± {(value['high'] - value['mean']) * scale:.{digits}f}"
    return f"{value['mean'] * scale:.{digits}f}{half}"


def interval(value: Mapping[str, Any], scale: float = 100, digits: int = 2, *, name: str = "mean") -> str:
    """A number with its sign, and its 95 % interval, if it has one."""
    ends = ""
    if value["low"] is not None:
        ends = f" [{value['low'] * scale:+.{digits}f}, {value['high'] * scale:+.{digits}f}]"
    return f"{value[name] * scale:+.{digits}f}{ends}"


def pairs(value: Mapping[str, Any], n: int) -> str:
    """How many seeds a difference is over, where that is not the n which the row states."""
    return "" if value["n"] == n else f" (n {value['n']})"


def difference(value: Mapping[str, Any] | None, n: int | None = None) -> str:
    """A difference in percentage points: interval, verdict, and how many seeds it is over unless that is ``n``."""
    return NOTHING if value is None else f"{interval(value)} {value['verdict']}{pairs(value, -1 if n is None else n)}"


def inert(value: Any) -> Any:
    """What a program that opens a CSV takes for text: a name from a copied file may begin as a formula does."""
    if not isinstance(value, str):
        return value
    return one_line(f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value)


def count(value: Mapping[str, Any] | None) -> str:
    """So many of so many."""
    return f"{value['count']}/{value['of']}" if value and value["of"] else NOTHING
