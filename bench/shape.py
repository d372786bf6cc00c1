"""Whether a line of a file is a result row: its keys, and the kinds of their values, before anything is made of them.

A file of rows may come from somebody else. What is checked is what tables and pages are made of: a value of another
kind would end them in the middle. Whether a configuration can be run is not asked here (`TrialConfig.from_dict` does).
"""

from __future__ import annotations

import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Literal, get_args

from bench.config import PRIMITIVE_NAMES, Kind, Status, TrialConfig, UserError, is_text

#: Nothing that is measured comes near; the squares of larger numbers, of which deviations are made, do not fit a float.
LARGEST = 1e100

#: A study's name becomes the name of a folder and of a page: no path, and nothing that a shell or a browser reads.
STUDY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")

#: A study's name, of at most 100 characters, and what a run is of it.
LONGEST_UID = 250

#: Metrics that are shares of 1, by how their name begins or ends.
_SHARE = re.compile(r".*_(acc|top5|area)(/.*)?")

Fits = Callable[[Any], bool]


def check_row(row: Mapping[str, Any]) -> None:
    """UserError that says what of it is wrong. ``evaluation`` may be missing: older releases did not write it."""
    _check("", row, _ROW, needed=[name for name in _ROW if name != "evaluation"])
    _check("config.", row["config"], _config(), needed=("rule", "arch", "dataset", "epochs", "seed", "coefficients"))
    _check("evaluation.", row.get("evaluation", {}), _EVALUATION)
    _check("provenance.", row["provenance"], _PROVENANCE)
    for name in row["config"]["coefficients"]:
        if name not in PRIMITIVE_NAMES:
            raise UserError(f"config.coefficients has {name!r}, which is no primitive")
    for where, metrics in (("metrics", row["metrics"]), *(("history", epoch) for epoch in row["history"])):
        for name, value in metrics.items():
            if _SHARE.fullmatch(name) and not 0 <= value <= 1:
                raise UserError(f"{where}.{name} is {value}, not a share of 1")


def check_text(line: bytes) -> None:
    r"""UserError if a string on this line of JSON is no text: "\ud83d" is half of a character; no page can have it."""
    if b"\\u" in line and not is_text(json.dumps(json.loads(line), ensure_ascii=False)):
        raise UserError("it has half of a character")


def _check(where: str, values: Mapping[str, Any], kinds: Mapping[str, Fits], needed: typing.Iterable[str] = ()) -> None:
    if missing := [name for name in needed if name not in values]:
        raise UserError(f"{where}{missing[0]} is missing")
    for name, value in values.items():
        if name in kinds and not kinds[name](value):
            raise UserError(f"{where}{name} cannot be {str(value)[:80]!r}")


def _fits(kind: Any) -> Fits:
    """Whether a value is of this declared type, as JSON has it."""
    origin, arguments = typing.get_origin(kind), get_args(kind)
    if origin in (typing.Union, types.UnionType):
        either = [_fits(argument) for argument in arguments]
        return lambda value: any(fits(value) for fits in either)
    if origin is Literal:
        return lambda value: isinstance(value, str) and value in arguments
    if origin in (tuple, list):
        each = _fits(arguments[0])
        return lambda value: isinstance(value, list) and all(map(each, value))
    if origin is dict:
        inner = _fits(arguments[1])
        return lambda value: isinstance(value, dict) and all(map(inner, value.values()))
    if kind is Any:
        return lambda _: True
    return {float: _is_number, int: _is_whole, type(None): lambda value: value is None}.get(
        kind, lambda value: isinstance(value, kind)
    )


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -LARGEST < value < LARGEST and (isinstance(value, int) or math.isfinite(value))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_count(value: Any) -> bool:
    return _is_whole(value) and value > 0


_ROW: dict[str, Fits] = {
    "uid": lambda value: isinstance(value, str) and 0 < len(value) <= LONGEST_UID,
    "study": lambda value: isinstance(value, str) and STUDY_NAME.fullmatch(value) is not None,
    "kind": _fits(Kind),
    "status": _fits(Status),
    "reason": _fits(str | None),
    "test_read": _fits(bool),
    "config": _fits(dict[str, Any]),
    "evaluation": _fits(dict[str, Any]),
    "metrics": _fits(dict[str, float]),
    "history": _fits(list[dict[str, float]]),
    "provenance": _fits(dict[str, Any]),
}
_EVALUATION: dict[str, Fits] = {
    **dict.fromkeys(("site", "gradient", "file"), _fits(str)),
    **dict.fromkeys(("draws", "attacked", "queries"), _is_count),
    "level": _is_number,
}
_PROVENANCE: dict[str, Fits] = {
    **dict.fromkeys(("device", "device_name", "dataset_digest", "platform", "cpu", "network"), _fits(str)),
    "git_revision": _fits(str | None),
    "versions": _fits(dict[str, str]),
    "examples": _fits(dict[str, int]),
    "classes": _is_count,
    "seconds": _is_number,
}


@lru_cache(maxsize=1)
def _config() -> dict[str, Fits]:
    hints = typing.get_type_hints(TrialConfig)
    return {**{name: _fits(hints[name]) for name in TrialConfig.field_names()}, "epochs": _is_count}
