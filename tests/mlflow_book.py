"""A real MLflow store for the tests to write to and to read back, made once; and studies to put into it."""

from __future__ import annotations

import functools
import socket
from pathlib import Path
from typing import Any

import pytest

from bench.config import TrialConfig, TrialResult
from bench.stores import embedded
from bench.tracking import Tracker

CONFIG = TrialConfig(rule="mirror", arch="resnet18", coefficients={"amp": 0.5, "decay": 1e-3}, seed=3)


class Book:
    """One SQLite store; every test has its own study in it."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self.uri, self.artifacts = embedded(results)
        self.said: list[str] = []

    def open(self) -> Tracker:
        return Tracker.open(uri=self.uri, artifacts=self.artifacts, results=self.results, say=self.said.append)

    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    def runs(self, condition: str) -> list[Any]:
        client = self.client()
        number = client.get_experiment_by_name("bench").experiment_id
        return list(client.search_runs([number], condition, order_by=["attributes.start_time ASC"]))

    def parent(self, study: str) -> Any:
        (found,) = self.runs(f"tags.`bench.study` = '{study}' AND tags.`bench.kind` = 'study'")
        return found

    def children(self, study: str) -> dict[str, Any]:
        found = self.runs(f"tags.`mlflow.parentRunId` = '{self.parent(study).info.run_id}'")
        assert len({r.data.tags["bench.uid"] for r in found}) == len(found), "a uid twice"
        return {r.data.tags["bench.uid"]: r for r in found}

    def points(self, run: Any, key: str) -> list[tuple[int, float]]:
        return [(p.step, p.value) for p in self.client().get_metric_history(run.info.run_id, key)]

    def files(self, run: Any) -> set[str]:
        """The names of its artifacts."""
        return {file.path for file in self.client().list_artifacts(run.info.run_id)}

    def snapshot(self, study: str) -> Any:
        """All that MLflow holds of a study, without ids and times."""
        found = []
        for run in (self.parent(study), *(child for _, child in sorted(self.children(study).items()))):
            tags = {k: v for k, v in run.data.tags.items() if k != "mlflow.parentRunId"}
            points = {key: self.points(run, key) for key in run.data.metrics}
            inputs = [entry.dataset.digest for entry in run.inputs.dataset_inputs]
            found.append((run.info.status, run.data.params, tags, points, inputs))
        return found


#: The store under this folder: several test files share one, for making it takes seconds.
made = functools.cache(Book)


def study_name(request: pytest.FixtureRequest, book: Book) -> str:
    """A study of this test's own, with nothing said yet."""
    book.said.clear()
    return str(request.node.name).replace("[", "-").rstrip("]")


def delivered(tracker: Tracker) -> None:
    assert tracker.flush(60)


def epochs(n: int) -> list[dict[str, float]]:
    return [{"epoch": float(e), "val_acc": min(1.0, 0.5 + 0.1 * e), "train_loss": 1.0 / e} for e in range(1, n + 1)]


def finished(n: int = 3, **changes: Any) -> TrialResult:
    values: dict[str, Any] = {
        "config": CONFIG,
        "status": "finished",
        "metrics": {"val_acc": min(1.0, 0.5 + 0.1 * n), "test_acc": 0.25},
        "history": epochs(n),
        "provenance": {"git_revision": "abc", "versions": {"torch": "2.13.0"}},
    }
    return TrialResult(**{**values, **changes})


def run_whole(tracker: Tracker, uid: str, result: TrialResult) -> None:
    tracker.start(uid, "search", result.config)
    for n, metrics in enumerate(result.history, 1):
        tracker.report(uid, n, metrics)
    tracker.finish(uid, result)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
