"""MLflow outages against a real server: down for a while, slow, gone for good; and a search through all of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import mlflow_queue
from bench.files import write_yaml
from bench.rows import RowFile, row
from bench.tracking import Tracker
from mlflow_book import CONFIG, Book, epochs, finished
from mlflow_server import Server, SlowProxy
from test_sync import IDENTITY, NAME, STUDY, tell

pytestmark = [
    pytest.mark.faults,
    pytest.mark.filterwarnings("ignore"),  # MLflow's and SQLAlchemy's own, in the client that this test reads with
]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "server"
    folder.mkdir()
    one = Server(folder)
    one.start()
    try:
        one.ready()
        yield one
    finally:
        one.kill()


def bench(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=500)


def synced(folder: Path, uri: str) -> dict[str, Any]:
    """What a `bench sync` in a process of its own did; MLflow agrees then."""
    done = bench("sync", "--tracking-uri", uri, "--json", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def book_of(server: Server, tmp_path: Path) -> Book:
    remote = Book(tmp_path / "results")
    remote.uri = server.uri
    return remote


def begin(results: Path) -> None:
    write_yaml(results / NAME / "study.yaml", {"id": IDENTITY, "runs_on": f"cpu {'d' * 64}", "config": STUDY.to_dict()})


def test_a_slow_server_holds_nothing_up_and_loses_nothing(server: Server, tmp_path: Path) -> None:
    results, said = tmp_path / "results", []
    begin(results)
    with SlowProxy(server.port) as proxy:
        proxy.delay = 2.0
        tracker = Tracker.open(uri=proxy.uri, artifacts=None, results=results, say=said.append)
        before = proxy.answered
        tell(tracker)
        tracker.start("a", "search", CONFIG)
        longest = 0.0
        for n in range(1, 301):
            begun = time.perf_counter()
            tracker.report("a", n, epochs(n)[-1])
            longest = max(longest, time.perf_counter() - begun)
        assert proxy.answered - before <= 1, "300 epochs were reported while the server gave one answer"
        RowFile(results / NAME / "rows.jsonl").append(row("a", NAME, "search", finished(300)))
        tracker.finish("a", finished(300))
        left = tracker.close(timeout=10)
        print(f"longest put {longest * 1e3:.2f} ms; {left} operations left")
        assert left > 290
        assert "bench sync records from the rows" in said[-1]
        proxy.delay = 0.0
        found = synced(tmp_path, proxy.uri)
    assert [(s["recorded"], s["agrees"]) for s in found["studies"]] == [(1, True)]
    remote = book_of(server, tmp_path)
    child = remote.children(NAME)["a"]
    history = sorted(remote.client().get_metric_history(child.info.run_id, "epoch"), key=lambda p: p.timestamp)
    assert [point.step for point in history] == list(range(1, 301))
    assert child.info.status == "FINISHED"


DRIVER = """
import os, signal, sys, time
from pathlib import Path
from bench.rows import RowFile, row
from bench.tracking import Tracker
from mlflow_book import CONFIG, epochs, finished
from test_sync import NAME, tell

results, uri, server = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
tracker = Tracker.open(uri=uri, artifacts=None, results=results)
tell(tracker)
tracker.start("before", "search", CONFIG)
assert tracker.flush(100)
os.killpg(server, signal.SIGKILL)
tracker.report("before", 1, epochs(1)[0])
for uid in ("filed", "lost"):
    tracker.start(uid, "search", CONFIG)
    tracker.report(uid, 1, epochs(1)[0])
RowFile(results / NAME / "rows.jsonl").append(row("filed", NAME, "search", finished(2)))
tracker.finish("filed", finished(2))
time.sleep(2)  # it tries, and is refused
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_driver_killed_in_an_outage_and_no_further_run(server: Server, tmp_path: Path) -> None:
    results = tmp_path / "results"
    begin(results)
    command = [sys.executable, "-c", DRIVER, str(results), server.uri, str(server.group)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "does not answer" in done.stdout
    away = bench("sync", "--tracking-uri", server.uri, cwd=tmp_path)
    assert away.returncode == 1
    assert len(away.stderr.splitlines()) == 1
    server.kill()
    server.start()
    server.ready()
    (study,) = synced(tmp_path, server.uri)["studies"]
    assert (study["recorded"], study["ended"], study["agrees"]) == (1, 2, True)
    remote = book_of(server, tmp_path)
    children = remote.children(NAME)
    assert {uid: r.info.status for uid, r in children.items()} == {"before": "KILLED", "filed": "FINISHED"}
    assert remote.parent(NAME).info.status == "KILLED"
    assert remote.points(children["filed"], "val_acc") == [(1, 0.6), (2, 0.7)]


def test_down_in_the_middle_and_back(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_queue, "LAST_WAIT", 0.5)
    results, said = tmp_path / "results", []
    begin(results)
    with Tracker.open(uri=server.uri, artifacts=None, results=results, say=said.append) as tracker:
        tell(tracker)
        tracker.start("a", "search", CONFIG)
        for n in range(1, 31):
            tracker.report("a", n, epochs(n)[-1])
            if n == 10:
                assert tracker.flush(100)
                server.kill()
            if n == 20:
                assert not tracker.flush(3)
                server.start()
        tracker.finish("a", finished(30))
        assert tracker.flush(100)
    assert [line.split(" (")[0].split("; ")[0] for line in said] == [
        f"MLflow at {server.uri} does not answer",
        f"MLflow at {server.uri} answers again.",
    ]
    remote = book_of(server, tmp_path)
    assert [step for step, _ in remote.points(remote.children(NAME)["a"], "val_acc")] == list(range(1, 31))
    assert remote.parent(NAME).info.status == "FINISHED"


SEARCH = [
    *("search", "--rule", "mirror", "--arch", "lenet", "--trials", "3", "--epochs", "2", "--confirm-seeds", "1"),
    *("--concurrent", "2", "--scheduler", "none", "--set", "train_examples=64", "--set", "batch_size=32"),
    *("--set", "augment=false", "--json"),
]


def test_a_search_whose_server_is_gone_for_good(server: Server, tmp_path: Path) -> None:
    """It ends as it would have; the next morning there is a server again, and nobody starts the search once more."""
    name = "mirror-lenet-digits"
    path = tmp_path / "results" / name / "rows.jsonl"
    command = [sys.executable, "-m", "bench.cli", *SEARCH, "--tracking-uri", server.uri]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        while not path.exists() and process.poll() is None:
            time.sleep(0.05)
        server.kill()
        out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    summary = json.loads(out)
    assert sum(summary["trials"].values()) == 3
    assert "bench sync records from the rows" in err
    server.start()
    server.ready()
    (study,) = synced(tmp_path, server.uri)["studies"]
    assert study["recorded"] > 0
    remote = book_of(server, tmp_path)
    children = remote.children(name)
    assert {r.info.status for r in (*children.values(), remote.parent(name))} == {"FINISHED"}
    controls = RowFile(tmp_path / "results" / "controls" / "rows.jsonl").by_uid()
    assert children.keys() == RowFile(path).by_uid().keys() | controls.keys()
    best = summary["confirmed"][0]["test_acc"]["mean"]
    assert remote.parent(name).data.metrics["test_acc"] == pytest.approx(best)
    assert "report.html" in remote.files(remote.parent(name))
