"""Whole plans without Ray, MLflow or training: the engine is a loop, a trial a formula, MLflow a list of calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import engine
from bench.config import TrialConfig, TrialResult
from bench.pages.parts import Page

#: A trial: its validation accuracy; None is a divergence.
Formula = Callable[[TrialConfig], float | None]


class Silent:
    """A tracker that writes down what it is told."""

    calls: list[tuple[str, tuple[Any, ...]]]

    def __init__(self) -> None:
        self.calls = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **_: self.calls.append((name, arguments))


class Stage:
    """Stands for Ray and MLflow. ``runs``: the (uid, configuration) of what ran; ``stop_after``: an interruption."""

    def __init__(self, formula: Formula) -> None:
        self.formula = formula
        self.stop_after: int | None = None
        self.runs: list[tuple[str, TrialConfig]] = []
        self.trackers: list[Silent] = []

    def play(self, source: engine.Source, *, concurrent: int, **_: Any) -> str:
        """`bench.engine.run`: as many at a time, the oldest ends first."""
        under_way: list[engine.Task] = []
        while True:
            exhausted = False
            while len(under_way) < concurrent and not exhausted:
                task = source.next()
                if isinstance(task, engine.Task):
                    assert task.uid not in {t.uid for t in under_way}, "a run was handed out twice"
                    source.started(task.uid)
                    under_way.append(task)
                else:
                    assert task is None or under_way, "the source waits for nothing"
                    exhausted = True
            if not under_way:
                return "done"
            if self.stop_after is not None and len(self.runs) >= self.stop_after:
                return "interrupted"
            self._end(source, under_way.pop(0))

    def _end(self, source: engine.Source, task: engine.Task) -> None:
        config, accuracy = task.config, self.formula(task.config)
        self.runs.append((task.uid, config))
        reached = 0.1 if accuracy is None else accuracy
        metrics = {"val_acc": reached, "train_seconds": 1.0}
        if task.options.get("read_test"):
            metrics["test_acc"] = reached - 0.01
        stopped = False
        for epoch in range(1, config.epochs + 1) if accuracy is not None else ():
            if stopped := source.reported(task.uid, epoch, {"val_acc": reached * epoch / config.epochs}):
                break
        status = "stopped" if stopped else "finished" if accuracy is not None else "diverged"
        result = TrialResult(
            config=config,
            status=status,  # type: ignore[arg-type]
            reason=None if status == "finished" else "as told",
            metrics=metrics,
            provenance={"dataset_digest": "d"},
        )
        source.completed(task.uid, result)

    @contextlib.contextmanager
    def tracker(self, **_: Any) -> Iterator[Silent]:
        """`bench.tracking.Tracker.open`."""
        self.trackers.append(Silent())
        yield self.trackers[-1]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Formula], Stage]]:
    def set_up(formula: Formula) -> Stage:
        made = Stage(formula)
        monkeypatch.setattr("bench.engine.run", made.play)
        for module in ("search", "programme"):
            monkeypatch.setattr(f"bench.{module}.Tracker.open", made.tracker)
        # a tenth of a second for each of hundreds of searches; what is on a page is tested with the pages
        monkeypatch.setattr(
            "bench.search.search_page", lambda *_: Page(title="a search", kind="", facts={}, sections=())
        )
        return made

    return set_up


def rows(path: Path) -> list[dict[str, Any]]:
    import json

    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
