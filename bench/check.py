"""One finding of ``bench doctor``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bench.config import Strict

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, kw_only=True)
class Check(Strict):
    """One finding. warn: it works, but worse than it could; fail: it will not work. ``remedy`` is empty if ok."""

    name: str
    status: Status
    detail: str
    remedy: str = ""
