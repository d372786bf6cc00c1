"""The record in MLflow, read back from a real SQLite store: complete, once, and true after every kind of end."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import delivery
from bench.config import StudyConfig, TrialConfig, TrialResult, UserError
from bench.mlflow_store import Store
from bench.rows import row
from bench.stores import check_uri, embedded, shown
from bench.tracking import Tracker

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),  # MLflow's own use
]

CONFIG = TrialConfig(rule="mirror", arch="resnet18", coefficients={"amp": 0.5, "decay": 1e-3}, seed=3)


class Book:
    """One SQLite store, made once for this file; every test has its own study in it."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self.uri, self.artifacts = embedded(results)
        self.said: list[str] = []

    def open(self) -> Tracker:
        return Tracker.open(uri=self.uri, artifacts=self.artifacts, spool=self.results / "spool", say=self.said.append)

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


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Book:
    return Book(tmp_path_factory.mktemp("results"))


@pytest.fixture
def name(request: pytest.FixtureRequest, book: Book) -> str:
    """A study of this test's own."""
    book.said.clear()
    return str(request.node.name).replace("[", "-").rstrip("]")


def delivered(tracker: Tracker) -> None:
    assert tracker.flush(60)


def epochs(n: int) -> list[dict[str, float]]:
    return [{"epoch": float(e), "val_acc": 0.5 + 0.1 * e, "train_loss": 1.0 / e} for e in range(1, n + 1)]


def finished(n: int = 3, **changes: Any) -> TrialResult:
    values: dict[str, Any] = {
        "config": CONFIG,
        "status": "finished",
        "metrics": {"val_acc": 0.5 + 0.1 * n, "test_acc": 0.25},
        "history": epochs(n),
        "provenance": {"git_revision": "abc", "versions": {"torch": "2.13.0"}},
    }
    return TrialResult(**{**values, **changes})


def run_whole(tracker: Tracker, uid: str, result: TrialResult) -> None:
    tracker.start(uid, "search", result.config)
    for n, metrics in enumerate(result.history, 1):
        tracker.report(uid, n, metrics)
    tracker.finish(uid, result)


def test_a_study_is_a_parent_with_one_level_of_children(book: Book, name: str, tmp_path: Path) -> None:
    (tmp_path / "best.yaml").write_text("rule: mirror\n")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "x").write_text("x")
    config = StudyConfig(name=name, rule="mirror", arch="resnet18", dataset="digits", recipe={"lr": 0.2})
    with book.open() as tracker:
        tracker.study(name, config=config.to_dict(), tags={"bench.rule": "mirror"})
        tracker.dataset("digits", "d" * 64)
        run_whole(tracker, f"{name}-0000", finished())
        tracker.headline({"val_acc": 0.8, "not_a_number": float("nan")})
        tracker.artifacts([tmp_path / "best.yaml", tmp_path / "more"])
        delivered(tracker)
        assert tracker.close() == 0
        link = tracker.link()
    parent, (child,) = book.parent(name), book.children(name).values()
    assert link["parent_run_id"] == parent.info.run_id
    assert link["experiment_id"] == parent.info.experiment_id
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert parent.data.params["recipe.lr"] == "0.2"
    assert parent.data.params["trials"] == "20"
    assert parent.data.metrics == {"val_acc": 0.8}
    assert parent.data.tags["bench.not_finite"] == "not_a_number"
    assert [a.path for a in book.client().list_artifacts(parent.info.run_id)] == ["best.yaml", "more"]
    assert child.data.params["coefficients.decay"] == "0.001"
    assert child.data.params["nesterov"] == "true"
    tags = {k.removeprefix("bench."): v for k, v in child.data.tags.items() if k.startswith("bench.")}
    del tags["git_revision"]
    assert tags == {
        "study": name,
        "uid": f"{name}-0000",
        "kind": "search",
        "status": "finished",
        "rule": "mirror",
        "arch": "resnet18",
        "dataset": "digits",
        "seed": "3",
    }
    assert child.data.tags["provenance.versions.torch"] == "2.13.0"
    assert child.info.run_name == f"search 0000 · {name}"
    assert book.points(child, "val_acc") == [(1, 0.6), (2, 0.7), (3, 0.8)]
    assert book.points(child, "test_acc") == [(3, 0.25)]
    for run in (parent, child):
        (entry,) = run.inputs.dataset_inputs
        assert (entry.dataset.name, entry.dataset.digest) == ("digits", "d" * 36)
        assert json.loads(entry.dataset.source)["sha256"] == "d" * 64
    assert book.said == []


@pytest.mark.parametrize(
    ("status", "run_status"),
    [("finished", "FINISHED"), ("stopped", "FINISHED"), ("diverged", "FINISHED"), ("failed", "FAILED")],
)
def test_every_end_has_its_status(book: Book, name: str, status: str, run_status: str) -> None:
    result = finished(2, status=status, reason=None if status == "finished" else f"why {status}")
    with book.open() as tracker:
        tracker.study(name, config={})
        run_whole(tracker, "a", result)
        delivered(tracker)
    (child,) = book.children(name).values()
    assert child.info.status == run_status
    assert child.info.end_time is not None
    assert child.data.tags["bench.status"] == status
    assert child.data.tags.get("bench.reason") == result.reason


def test_the_latest_accuracy_of_a_diverged_run_is_chance(book: Book, name: str) -> None:
    with book.open() as tracker:
        tracker.study(name, config={})
        run_whole(tracker, "a", finished(2, status="diverged", reason="loss is nan", metrics={"val_acc": 0.1}))
        run_whole(tracker, "b", finished(0, status="diverged", reason="loss is nan", metrics={"val_acc": 0.1}))
        delivered(tracker)
    children = book.children(name)
    assert [children[uid].data.metrics["val_acc"] for uid in "ab"] == [0.1, 0.1]
    assert book.points(children["a"], "val_acc") == [(1, 0.6), (2, 0.7), (3, 0.1)]
    assert book.points(children["b"], "val_acc") == [(0, 0.1)]


def test_what_is_not_finite_never_reaches_mlflow_and_is_named(book: Book, name: str) -> None:
    with book.open() as tracker:
        tracker.study(name, config={})
        tracker.start("a", "search", CONFIG)
        tracker.report("a", 1, {"val_acc": 0.1, "train_loss": float("inf"), "norm": float("nan")})
        delivered(tracker)
    (child,) = book.children(name).values()
    assert child.data.metrics == {"val_acc": 0.1, "epoch": 1.0}
    assert child.data.tags["bench.not_finite"] == "train_loss, norm in epoch 1"


def test_limits_of_a_request_and_of_a_value(book: Book, name: str) -> None:
    config = {"long": "x" * 20_000, "many": {f"p{i}": i for i in range(250)}}
    metrics = {f"layer{i}/angle": float(i) for i in range(1500)}
    with book.open() as tracker:
        tracker.study(name, config=config, tags={"note": "y" * 20_000})
        tracker.start("a", "search", CONFIG)
        tracker.report("a", 1, metrics)
        delivered(tracker)
    parent, (child,) = book.parent(name), book.children(name).values()
    assert len(parent.data.params) == 251
    assert parent.data.params["long"] == "x" * 4999 + "…"
    assert parent.data.tags["note"] == "y" * 4999 + "…"
    assert child.data.metrics == {**metrics, "epoch": 1.0}
    assert book.said == []


def test_a_run_goes_on_with_one_value_per_epoch(book: Book, name: str) -> None:
    with book.open() as tracker:
        tracker.study(name, config={})
        tracker.start("a", "search", CONFIG)
        for n, metrics in enumerate(epochs(3), 1):
            tracker.report("a", n, metrics)
        tracker.interrupt()
        delivered(tracker)
    (child,) = book.children(name).values()
    assert (child.info.status, child.data.tags["bench.status"]) == ("KILLED", "interrupted")
    with book.open() as tracker:
        tracker.study(name, config={})
        tracker.start("a", "search", CONFIG)
        delivered(tracker)
        assert book.children(name)["a"].info.status == "RUNNING"
        # From the checkpoint of epoch 2: epoch 3 again (a GPU gives another value), then 5; 4 went missing.
        tracker.report("a", 3, {"val_acc": 0.79, "train_loss": 0.3})
        tracker.report("a", 5, epochs(5)[4])
        tracker.finish("a", finished(5))
        delivered(tracker)
    (child,) = book.children(name).values()
    assert child.info.status == "FINISHED"
    for key in ("val_acc", "train_loss", "epoch"):
        assert Counter(step for step, _ in book.points(child, key)) == Counter([1, 2, 3, 4, 5])


def test_trials_may_grow_and_other_parameters_of_a_run_may_not(book: Book, name: str) -> None:
    with book.open() as tracker:
        tracker.study(name, config={"trials": 20, "rule": "mirror"})
        run_whole(tracker, "a", finished())
        delivered(tracker)
    with book.open() as tracker:
        tracker.study(name, config={"trials": 40, "rule": "mirror"})
        tracker.start("a", "search", CONFIG.replace(lr=0.7))
        delivered(tracker)
        tracker.interrupt()
    parent, (child,) = book.parent(name), book.children(name).values()
    assert parent.data.params["trials"] == "20"
    assert parent.data.tags["now.trials"] == "40"
    assert child.data.params["lr"] == "0.1"
    assert "refused an operation (a was recorded with another lr)" in book.said[0]
    (book.results / "spool" / "rejected.jsonl").unlink()


def test_a_row_is_recorded_once_whole(book: Book, name: str) -> None:
    control = row("control-1", "another", "control", finished(4))
    with book.open() as tracker:
        tracker.study(name, config={})
        tracker.record("control-1", "control", control)
        tracker.record("control-1", "control", control)
        delivered(tracker)
    with book.open() as tracker:
        tracker.study(name, config={})
        tracker.record("control-1", "control", control)
        delivered(tracker)
    (child,) = book.children(name).values()
    assert child.info.status == "FINISHED"
    assert child.data.tags["bench.from_study"] == "another"
    assert child.data.tags["bench.git_revision"] == "abc"
    assert [step for step, _ in book.points(child, "val_acc")] == [1, 2, 3, 4]


def test_studies_of_one_name_are_told_apart_by_identity(book: Book, name: str) -> None:
    for identity in ("one", "two"):
        with book.open() as tracker:
            tracker.study(name, config={"who": identity}, identity=identity)
            run_whole(tracker, "a", finished())
            delivered(tracker)
    parents = book.runs(f"tags.`bench.study` = '{name}' AND tags.`bench.kind` = 'study'")
    assert [p.data.params["who"] for p in parents] == ["one", "two"]
    for parent in parents:
        assert len(book.runs(f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")) == 1


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


def test_an_exception_ends_open_runs(book: Book, name: str) -> None:
    tracker = book.open()
    with pytest.raises(KeyboardInterrupt), tracker:  # noqa: PT012 (the block is what is tested)
        tracker.study(name, config={})
        tracker.start("a", "search", CONFIG)
        raise KeyboardInterrupt
    assert book.children(name)["a"].info.status == "KILLED"
    assert book.parent(name).info.status == "KILLED"


def snapshot(book: Book, study: str) -> Any:
    """All that MLflow holds of a study, without ids and times."""
    found = []
    for run in (book.parent(study), *(child for _, child in sorted(book.children(study).items()))):
        tags = {k: v for k, v in run.data.tags.items() if k != "mlflow.parentRunId"}
        points = {key: book.points(run, key) for key in run.data.metrics}
        inputs = [entry.dataset.digest for entry in run.inputs.dataset_inputs]
        found.append((run.info.status, run.data.params, tags, points, inputs))
    return found


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
    before = snapshot(book, name)
    assert len(before) == 5
    assert len(operations) == 17
    twin = f"{name}-twin"
    for operation in [op for op in operations for _ in range(2)]:
        tags = {**operation.get("tags", {}), "bench.study": twin, "bench.identity": twin}
        once(Store(book.uri, book.artifacts, "bench"), {**operation, "study": twin, "identity": twin, "tags": tags})
    assert [(s, p, m, i) for s, p, _, m, i in snapshot(book, twin)] == [(s, p, m, i) for s, p, _, m, i in before]
    for operation in operations:
        once(Store(book.uri, book.artifacts, "bench"), operation)
    assert snapshot(book, name) == before


def test_misuse_is_an_error(book: Book, name: str) -> None:
    with book.open() as tracker:
        with pytest.raises(ValueError, match="start before study"):
            tracker.start("a", "search", CONFIG)
        with pytest.raises(UserError, match="quotes"):
            tracker.study("it's", config={})
        tracker.study(name, config={})
        with pytest.raises(ValueError, match="before start"):
            tracker.report("a", 1, {})
        with pytest.raises(ValueError, match="before start"):
            tracker.finish("a", finished())
        with pytest.raises(UserError, match="no such file"):
            tracker.artifacts([Path("nowhere")])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("ftp://host/x", "unknown scheme"),
        ("results/mlflow.db", "unknown scheme"),
        ("http://127.0.0.1:{port}", "no MLflow server answers"),
        ("http://", "no MLflow server answers"),
        ("postgresql://user:secret@127.0.0.1:{port}/x", "no database answers"),
        ("sqlite://", "names no file"),
        ("sqlite:///{tmp}/text", "no SQLite database"),
        ("sqlite:///{tmp}/text/mlflow.db", "in a folder you may write"),
    ],
)
def test_an_address_that_cannot_work_is_refused_in_one_line(tmp_path: Path, uri: str, said: str) -> None:
    (tmp_path / "text").write_text("this is plain text\n")
    uri = uri.format(port=free_port(), tmp=tmp_path)
    with pytest.raises(UserError, match=said) as caught:
        Tracker.open(uri=uri, artifacts=None, spool=tmp_path, say=pytest.fail)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_another_server_is_not_taken_for_mlflow() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with pytest.raises(UserError, match="is not an MLflow server"):
            check_uri(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join()


def test_a_password_is_not_shown() -> None:
    assert shown("postgresql://me:secret@host/db") == "postgresql://***@host/db"
    assert shown("http://host:5000") == "http://host:5000"


def test_mlflow_is_imported_in_the_thread_alone() -> None:
    code = "import sys, bench.tracking; print([m for m in ('mlflow', 'pandas', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


class Server:
    """A real MLflow server on one port, that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._store = f"sqlite:///{folder}/mlflow.db"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(self.port)]
        extra = {"MLFLOW_BACKEND_STORE_URI": self._store, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--artifacts-destination", str(self._folder / "artifacts")],
                env={**os.environ, **extra},
                cwd=self._folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def ready(self) -> None:
        for _ in range(600):
            try:
                check_uri(self.uri)
            except UserError:
                time.sleep(0.1)
            else:
                return
        pytest.fail((self._folder / "log").read_text())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    one = Server(tmp_path)
    one.start()
    try:
        yield one
    finally:
        one.kill()


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
    assert not list((tmp_path / "hasty").iterdir())
    delivered(patient)
    assert patient.close() == 0
    for study in ("patient", "hasty"):
        (child,) = remote.children(study).values()
        assert child.info.status == remote.parent(study).info.status == "FINISHED"
        for key in ("val_acc", "train_loss", "epoch"):
            assert [step for step, _ in remote.points(child, key)] == list(range(1, 41))
        files = remote.client().list_artifacts(remote.parent(study).info.run_id)
        assert [file.path for file in files] == ["best.yaml"]
