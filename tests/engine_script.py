"""A source with a script: what the tests of the director and of the engine hand out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench import director
from bench.config import TrialConfig, TrialResult

EPOCHS = 3


def config(value: float = 0.5) -> TrialConfig:
    return TrialConfig(rule="sparse", epochs=EPOCHS, coefficients={"sparse": value})


class Script:
    """A source with a fixed list of tasks, that writes down all that happens."""

    def __init__(self, tasks: list[director.Task | director.Wait], stop: Mapping[str, int] | None = None) -> None:
        self.tasks, self.stop = list(tasks), stop or {}
        self.events: list[tuple[str, ...]] = []
        self.results: dict[str, TrialResult] = {}
        self.live: set[str] = set()
        self.most = 0

    def next(self) -> director.Task | director.Wait | None:
        return self.tasks.pop(0) if self.tasks else None

    def started(self, uid: str) -> None:
        self.events.append(("started", uid))
        self.live.add(uid)
        self.most = max(self.most, len(self.live))

    def reported(self, uid: str, epoch: int, metrics: Mapping[str, float]) -> bool:
        assert metrics.keys() == {"val_acc"}
        self.events.append(("reported", uid, str(epoch)))
        return self.stop.get(uid) == epoch

    def completed(self, uid: str, result: TrialResult) -> None:
        self.events.append(("completed", uid))
        self.live.discard(uid)
        assert uid not in self.results
        self.results[uid] = result

    def epochs_of(self, uid: str) -> list[int]:
        return [int(e[2]) for e in self.events if e[:2] == ("reported", uid)]


def task(uid: str, **options: Any) -> director.Task:
    return director.Task(uid=uid, config=config(), options=options)
