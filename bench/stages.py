"""Where the seconds go: the code names its stages, and whoever wants to know adds them up.

Unless somebody listens, a stage costs a microsecond. While somebody does, each begins and ends with a wait for the GPU,
if there is one: the times are then those of the work, and the whole is slower than a run to which nobody listens.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass
class Clock:
    """Seconds and calls by stage; of one within another, the inner one's seconds are the inner one's alone."""

    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    _within: list[float] = field(default_factory=list)

    def begin(self) -> float:
        self._within.append(0.0)
        return _now()

    def end(self, name: str, began: float) -> None:
        gone = _now() - began
        self.seconds[name] = self.seconds.get(name, 0.0) + gone - self._within.pop()
        self.calls[name] = self.calls.get(name, 0) + 1
        if self._within:
            self._within[-1] += gone


_clock: Clock | None = None


@contextmanager
def listening() -> Iterator[Clock]:
    """Within, the stages of this process go onto the clock."""
    global _clock  # a stage is named where no clock could be handed in
    before, _clock = _clock, Clock()
    try:
        yield _clock
    finally:
        _clock = before


@contextmanager
def stage(name: str) -> Iterator[None]:
    """What runs within is this stage."""
    clock = _clock
    if clock is None:
        yield
        return
    began = clock.begin()
    try:
        yield
    finally:
        clock.end(name, began)


def waiting(name: str, items: Iterable[T]) -> Iterator[T]:
    """The items; the time until each is there is this stage."""
    rest = iter(items)
    while True:
        with stage(name):
            item = next(rest, _END)
        if item is _END:
            return
        yield item  # type: ignore[misc]


_END = object()


def _now() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return time.perf_counter()
