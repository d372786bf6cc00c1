"""The record in MLflow when something is killed: nothing lost, nothing twice, nothing left running."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import delivery
from bench.mlflow_store import Store
from bench.rows import row
from bench.tracking import Tracker
from mlflow_book import CONFIG, Book, delivered, epochs, finished, made, run_whole, study_name
from mlflow_server import Server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),  # MLflow's own use
]


@pytest.fixture
def book(tmp_path_factory: pytest.TempPathFactory) -> Book:
    return made(tmp_path_factory.getbasetemp())


@pytest.fixture
def name(request: pytest.FixtureRequest, book: Book) -> str:
    return study_name(request, book)


KILLED_DRIVER = """
import os, signal, sys
from pathlib import Path
from bench.config import TrialConfig
from bench.stores import embedded
from bench.tracking import Tracker

results, name = Path(sys.argv[1]), sys.argv[2]
uri, artifacts = embedded(results)
tracker = Tracker.open(uri=uri, artifacts=artifacts, spool=results / "spool")
tracker.study(name, config={})
for uid in ("goes-on", "filed", "lost", "elsewhere"):
    tracker.start(uid, "search", TrialConfig(rule="mirror", coefficients={"amp": 0.5, "decay": 1e-3}, seed=3))
    tracker.report(uid, 1, {"val_acc": 0.6, "train_loss": 1.0})
assert tracker.flush(60)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_after_the_driver_was_killed_nothing_stays_running(book: Book, name: str) -> None:
    command = [sys.executable, "-c", KILLED_DRIVER, str(book.results), name]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert {r.info.status for r in book.children(name).values()} == {"RUNNING"}
    with book.open() as tracker:
        tracker.study(name, config={}, live=["elsewhere"])
        tracker.record("filed", "search", row("filed", name, "search", finished(2)))
        tracker.start("goes-on", "search", CONFIG)
        delivered(tracker)
        statuses = {uid: r.info.status for uid, r in book.children(name).items()}
        assert statuses == {"goes-on": "RUNNING", "filed": "FINISHED", "lost": "KILLED", "elsewhere": "RUNNING"}
        tracker.finish("goes-on", finished(2))
        delivered(tracker)
    children = book.children(name)
    for uid in ("goes-on", "filed"):
        assert book.points(children[uid], "val_acc") == [(1, 0.6), (2, 0.7)]
    assert book.parent(name).info.status == "FINISHED"


def test_what_was_made_twice_because_an_answer_was_lost_is_ended(book: Book, name: str) -> None:
    """The server took it after all, later than it was asked for again; here as the older of the two."""
    with book.open() as tracker:
        tracker.study(name, config={"a": 1})
        for uid in ("goes-on", "over"):
            tracker.start(uid, "search", CONFIG)
            tracker.report(uid, 1, epochs(1)[0])
        tracker.finish("over", finished(2))
        delivered(tracker)
        kept = [book.parent(name), *book.children(name).values()]
        for run in kept:
            tags = {key: value for key, value in run.data.tags.items() if key not in ("bench.status", "mlflow.user")}
            book.client().create_run(run.info.experiment_id, run.info.start_time - 1000, tags, run.info.run_name)
        with book.open() as other:
            other.study(name, config={"a": 1}, live=["goes-on"])
            delivered(other)
        tracker.finish("goes-on", finished(2))
        delivered(tracker)
    found = book.runs(f"tags.`bench.study` = '{name}'")
    again = [run for run in found if "bench.duplicate" in run.data.tags]
    assert {run.data.tags["bench.duplicate"] for run in again} == {run.info.run_id for run in kept}
    assert [run.info.status for run in again] == ["KILLED"] * 3
    assert {run.info.run_id: run.info.status for run in found if run not in again} == {
        run.info.run_id: "FINISHED" for run in kept
    }


def test_a_place_for_artifacts_that_cannot_be_written_is_waited_for(book: Book, name: str, tmp_path: Path) -> None:
    (tmp_path / "best.yaml").write_text("rule: mirror\n")
    with book.open() as tracker:
        tracker.study(name, config={})
        delivered(tracker)
        place = book.artifacts / book.parent(name).info.run_id
        place.parent.mkdir(exist_ok=True)
        place.write_text("a file, where its folder is to be made")
        tracker.artifacts([tmp_path / "best.yaml"])
        while not book.said:
            time.sleep(0.01)
        assert "does not answer" in book.said[0]
        place.unlink()
        delivered(tracker)
    assert book.files(book.parent(name)) == {"best.yaml"}
    assert not (book.results / "spool" / "rejected.jsonl").exists()


def test_an_exception_ends_open_runs(book: Book, name: str) -> None:
    tracker = book.open()
    with pytest.raises(KeyboardInterrupt), tracker:  # noqa: PT012 (the block is what is tested)
        tracker.study(name, config={})
        tracker.start("a", "search", CONFIG)
        raise KeyboardInterrupt
    assert book.children(name)["a"].info.status == "KILLED"
    assert book.parent(name).info.status == "KILLED"


def test_every_operation_may_come_twice(book: Book, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operation twice, with nothing remembered in between, and then all of them again."""
    operations: list[Any] = []
    once = Store.deliver

    def noted(store: Store, operation: Any) -> None:
        operations.append(operation)
        once(store, operation)

    monkeypatch.setattr(Store, "deliver", noted)
    (tmp_path / "file").write_text("x")
    with book.open() as tracker:
        tracker.study(name, config={"trials": 3})
        tracker.dataset("digits", "0" * 64)
        run_whole(tracker, "a", finished(2, status="diverged", metrics={"val_acc": 0.1}))
        run_whole(tracker, "b", finished(2))
        tracker.record("c", "control", row("c", "other", "control", finished(2)))
        tracker.start("d", "search", CONFIG)
        tracker.interrupt()
        tracker.headline({"val_acc": 0.7})
        delivered(tracker)  # so that the two have different times, as two starts of a search have
        tracker.headline({"val_acc": 0.8})
        tracker.artifacts([tmp_path / "file"])
        assert tracker.close(timeout=60) == 0
    before = book.snapshot(name)
    assert len(before) == 5
    assert len(operations) == 17
    twin = f"{name}-twin"
    for operation in [op for op in operations for _ in range(2)]:
        tags = {**operation.get("tags", {}), "bench.study": twin, "bench.identity": twin}
        once(Store(book.uri, book.artifacts, "bench"), {**operation, "study": twin, "identity": twin, "tags": tags})
    assert [(s, p, m, i) for s, p, _, m, i in book.snapshot(twin)] == [(s, p, m, i) for s, p, _, m, i in before]
    for operation in operations:
        once(Store(book.uri, book.artifacts, "bench"), operation)
    assert book.snapshot(name) == before


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    one = Server(tmp_path)
    one.start()
    try:
        yield one
    finally:
        one.kill()


@pytest.mark.faults
def test_a_server_killed_in_the_middle_costs_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "LAST_WAIT", 0.5)
    said: list[str] = []
    remote = Book(tmp_path)
    remote.uri = server.uri

    def begin(study: str) -> Tracker:
        tracker = Tracker.open(uri=server.uri, artifacts=None, spool=tmp_path / study, say=said.append)
        tracker.study(study, config={"trials": 1})
        tracker.start("a", "search", CONFIG)
        return tracker

    (tmp_path / "best.yaml").write_text("x: 1")
    server.ready()
    patient, hasty = begin("patient"), begin("hasty")
    for n in range(1, 41):
        for tracker in (patient, hasty):
            tracker.report("a", n, epochs(n)[-1])
        if n == 20:
            delivered(patient)
            patient.report("a", 20, epochs(20)[-1])
        if n == 21:
            server.kill()
    for tracker in (patient, hasty):
        tracker.finish("a", finished(40))
        tracker.artifacts([tmp_path / "best.yaml"])
    assert hasty.close(timeout=0.5) > 20
    assert "they are kept in" in said[-1]
    assert not patient.flush(0.5)
    server.start()
    server.ready()
    with Tracker.open(uri=server.uri, artifacts=None, spool=tmp_path / "hasty", say=said.append) as again:
        assert again.flush(60)
    assert not list((tmp_path / "hasty").glob("*.jsonl"))
    delivered(patient)
    assert patient.close() == 0
    for study in ("patient", "hasty"):
        (child,) = remote.children(study).values()
        assert child.info.status == remote.parent(study).info.status == "FINISHED"
        for key in ("val_acc", "train_loss", "epoch"):
            assert [step for step, _ in remote.points(child, key)] == list(range(1, 41))
        files = remote.client().list_artifacts(remote.parent(study).info.run_id)
        assert [file.path for file in files] == ["best.yaml"]
