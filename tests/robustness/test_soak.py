"""Twenty kills at random moments of one search: driver, worker, everything at once, Ctrl-C, SIGTERM."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import bench.engine  # noqa: F401  (psutil comes with Ray)
from mlflow_book import Book
from soak_driver import EPOCHS, NAME

HERE = Path(__file__).parents[1]
KILLS, TRIALS = 20, 30


class Start:
    """One start of the search, in a process group of its own."""

    def __init__(self, results: Path) -> None:
        command = [sys.executable, str(HERE / "soak_driver.py"), str(results), str(TRIALS)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)

    def hit(self, what: str) -> None:
        """The fault itself: ``worker``: one that trains, if there is one by now."""
        if what == "driver":
            self.process.kill()
        elif what == "all":
            os.killpg(self.process.pid, signal.SIGKILL)
        elif what == "worker":
            for worker in self._workers()[:1]:
                worker.kill()
        else:
            self.process.send_signal(signal.Signals[what])

    def _workers(self) -> list[Any]:
        import psutil

        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if "Trainable" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def end(self) -> tuple[int, list[str]]:
        lines = (self.process.communicate(timeout=600)[0] or "").splitlines()
        return self.process.returncode, lines


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own
def test_twenty_kills_at_random_moments_lose_double_and_halve_nothing(tmp_path: Path) -> None:
    chance = random.Random(20)
    hits: Counter[str] = Counter()
    for _ in range(KILLS):
        start = Start(tmp_path)
        what = chance.choice(["driver", "driver", "all", "worker", "SIGINT", "SIGTERM"])
        try:
            start.process.wait(chance.uniform(1, 25))
        except subprocess.TimeoutExpired:
            start.hit(what)
            hits[what] += 1
        if what == "worker":
            time.sleep(chance.uniform(0, 5))
            start.hit("driver")
        start.end()
    assert sum(hits.values()) == KILLS, f"the search was over before its time: {hits}"

    status, lines = Start(tmp_path).end()
    assert (status, lines[-1]) == (0, "done"), lines
    rows = [json.loads(line) for line in (tmp_path / NAME / "rows.jsonl").read_text().splitlines()]
    assert Counter(row["kind"] for row in rows) == {"search": TRIALS, "confirm": 1}
    assert sorted(row["uid"] for row in rows if row["kind"] == "search") == [f"{NAME}-{i:04d}" for i in range(TRIALS)]
    assert {row["status"] for row in rows} == {"finished"}
    assert all([epoch["epoch"] for epoch in row["history"]] == [1, 2, 3] for row in rows)
    _agrees(Book(tmp_path), rows)
    assert list((tmp_path / NAME / "checkpoints").iterdir()) == []


def _agrees(book: Book, rows: list[dict[str, Any]]) -> None:
    """MLflow has each run once, ended as its row says, with each epoch once; the study's own too."""
    children = book.children(NAME)
    assert {row["uid"] for row in rows} <= set(children)
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    assert book.parent(NAME).info.status == "FINISHED"
    for row in rows:
        points = book.points(children[row["uid"]], "epoch")
        # each once; what a killed driver had not delivered may come after what the next one tells
        assert sorted(step for step, _ in points) == list(range(1, EPOCHS + 1)), row["uid"]
