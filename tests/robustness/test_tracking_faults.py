"""The record in MLflow when something is killed: nothing lost, nothing twice, nothing left running."""

from __future__ import annotations

import contextlib
import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import mlflow_queue
from bench.mlflow_client import Client
from bench.mlflow_queue import UnreachableError
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
tracker = Tracker.open(uri=uri, artifacts=artifacts, results=results)
tracker.study(name, config={})
for uid in ("goes-on", "filed", "lost"):
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
        tracker.study(name, config={})
        tracker.record("filed", "search", row("filed", name, "search", finished(2)))
        tracker.start("goes-on", "search", CONFIG)
        delivered(tracker)
        statuses = {uid: r.info.status for uid, r in book.children(name).items()}
        assert statuses == {"goes-on": "RUNNING", "filed": "FINISHED", "lost": "KILLED"}
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
            other.study(name, config={"a": 1}, sweep=False)
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
    assert "answers again" in book.said[1]
    assert len(book.said) == 2


def test_an_exception_ends_open_runs(book: Book, name: str) -> None:
    tracker = book.open()
    with pytest.raises(KeyboardInterrupt), tracker:  # noqa: PT012 (the block is what is tested)
        tracker.study(name, config={})
        tracker.start("a", "search", CONFIG)
        raise KeyboardInterrupt
    assert book.children(name)["a"].info.status == "KILLED"
    assert book.parent(name).info.status == "KILLED"


def test_an_operation_whose_answer_was_lost_may_come_twice(
    book: Book, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them: carried out, said to be not, and tried again with nothing remembered."""
    (tmp_path / "file").write_text("x")

    def told(study: str) -> Any:
        with book.open() as tracker:
            tracker.study(study, config={"trials": 3}, identity="one")
            tracker.dataset("digits", "0" * 64)
            run_whole(tracker, "a", finished(2, status="diverged", metrics={"val_acc": 0.1}))
            run_whole(tracker, "b", finished(2))
            tracker.record("c", "control", row("c", "other", "control", finished(2)))
            tracker.start("d", "search", CONFIG)
            tracker.report("d", 1, epochs(1)[0])
            tracker.interrupt()
            for value in (0.7, 0.8):
                tracker.headline({"val_acc": value})
                tracker.curve("update/mirror/test_acc", {0.0: 0.9, 0.1: value})
                delivered(tracker)  # so that the two have different times, as two starts of a search have
            tracker.artifacts([tmp_path / "file"])
            assert tracker.close(timeout=60) == 0
        assert book.files(book.parent(study)) == {"file"}
        found = book.snapshot(study)
        for _, _, tags, *_ in found:
            del tags["bench.study"], tags["mlflow.runName"]
        return found

    wanted = told(f"{name}-twin")
    assert len(wanted) == 5
    asked, calls = Client.asked, itertools.count()

    @contextlib.contextmanager
    def lossy(client: Client) -> Iterator[None]:
        with asked(client):
            yield
        if next(calls) % 2 == 0:
            raise UnreachableError("the answer is lost")

    monkeypatch.setattr(Client, "asked", lossy)
    monkeypatch.setattr(mlflow_queue, "FIRST_WAIT", 0.01)
    assert told(name) == wanted
    assert next(calls) == 2 * 20


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
    monkeypatch.setattr(mlflow_queue, "LAST_WAIT", 0.5)
    said: list[str] = []
    remote = Book(tmp_path)
    remote.uri = server.uri

    def begin(study: str, *, goes_on: bool = True) -> Tracker:
        tracker = Tracker.open(uri=server.uri, artifacts=None, results=tmp_path, say=said.append)
        tracker.study(study, config={"trials": 1})
        if goes_on:
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
    assert "bench sync records from the rows" in said[-1]
    assert not patient.flush(0.5)
    server.start()
    server.ready()
    again = begin("hasty", goes_on=False)  # the next start of the same command
    again.record("a", "search", row("a", "hasty", "search", finished(40)))
    again.artifacts([tmp_path / "best.yaml"])
    delivered(again)
    assert again.close() == 0
    delivered(patient)
    assert patient.close() == 0
    for study in ("patient", "hasty"):
        (child,) = remote.children(study).values()
        assert child.info.status == remote.parent(study).info.status == "FINISHED"
        for key in ("val_acc", "train_loss", "epoch"):
            assert [step for step, _ in remote.points(child, key)] == list(range(1, 41))
        files = remote.client().list_artifacts(remote.parent(study).info.run_id)
        assert [file.path for file in files] == ["best.yaml"]
