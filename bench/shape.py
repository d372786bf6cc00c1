"""Whether a line of a file is a result row: its keys, and the types of their values, before anything is made of them.

A file of rows may come from somebody else. What is checked is what tables and pages are made of: a value of another
type would end them in the middle. Whether a configuration can be run is not asked here (`TrialConfig.from_dict` does).
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any

from bench.config import PRIMITIVE_NAMES, Kind, Status, TrialConfig, UserError, fields_model, is_text, validate

#: Nothing that is measured comes near; the squares of larger numbers, of which deviations are made, do not fit a float.
LARGEST = 1e100

#: A study's name becomes the name of a folder and of a page: no path, and nothing that a shell or a browser reads.
STUDY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")

#: A study's name, of at most 100 characters, and what a run is of it.
LONGEST_UID = 250

#: Metrics that are shares of 1, by how their name begins or ends.
_SHARE = re.compile(r".*_(acc|top5|area)(/.*)?")


def check_row(row: Mapping[str, Any]) -> None:
    """UserError that says what of it is wrong. ``evaluation`` may be missing: older releases did not write it."""
    validate("", _model(), row)
    for name in row["config"]["coefficients"]:
        if name not in PRIMITIVE_NAMES:
            raise UserError(f"config.coefficients has {name!r}, which is no primitive.")
    for where, metrics in (("metrics", row["metrics"]), *(("history", epoch) for epoch in row["history"])):
        for name, value in metrics.items():
            if _SHARE.fullmatch(name) and not 0 <= value <= 1:
                raise UserError(f"{where}.{name} is {value}, not a share of 1.")


def check_text(line: bytes) -> None:
    r"""UserError if a string on this line of JSON is no text: "\ud83d" is half of a character; no page can have it."""
    if b"\\u" in line and not is_text(json.dumps(json.loads(line), ensure_ascii=False)):
        raise UserError("it has half of a character.")


@cache
def _model() -> Any:
    """The row as pydantic has it; keys that are not here are not looked at."""
    from pydantic import Field

    whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]
    numbers = {int: whole, float: Annotated[float, Field(gt=-LARGEST, lt=LARGEST, allow_inf_nan=False)]}
    count = Annotated[int, Field(gt=0, lt=2**63)]
    hints = typing.get_type_hints(TrialConfig)
    needed = ("rule", "arch", "dataset", "epochs", "seed", "coefficients")
    texts = ("device", "device_name", "dataset_digest", "platform", "cpu", "network")
    evaluation = {
        **dict.fromkeys(("site", "gradient", "file"), (str, "")),
        **dict.fromkeys(("draws", "attacked", "queries"), (count, 1)),
        "level": (float, 0.0),
    }
    provenance: dict[str, tuple[Any, Any]] = {
        **dict.fromkeys(texts, (str, "")),
        "git_revision": (str | None, None),
        "versions": (dict[str, str], {}),
        "examples": (dict[str, int], {}),
        "classes": (count, 1),
        "seconds": (float, 0.0),
    }
    config = {name: (hints[name], ... if name in needed else None) for name in TrialConfig.field_names()}
    row = {
        "uid": (Annotated[str, Field(min_length=1, max_length=LONGEST_UID)], ...),
        "study": (Annotated[str, Field(pattern=rf"\A{STUDY_NAME.pattern}\z")], ...),
        "kind": (Kind, ...),
        "status": (Status, ...),
        "reason": (str | None, ...),
        "test_read": (bool, ...),
        "config": (fields_model("config", {**config, "epochs": (count, ...)}, numbers), ...),
        "evaluation": (fields_model("evaluation", evaluation, numbers), None),
        "metrics": (dict[str, float], ...),
        "history": (list[dict[str, float]], ...),
        "provenance": (fields_model("provenance", provenance, numbers), ...),
    }
    return fields_model("row", row, numbers)
