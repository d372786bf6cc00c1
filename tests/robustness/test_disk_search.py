"""`bench search` whose disk, numbers or data fail under it, for real; and the same command again, which goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from dataset_files import write_folder
from small_disk import SmallDisk, small_disk

pytestmark = [pytest.mark.faults, pytest.mark.filterwarnings("ignore")]  # MLflow's and SQLAlchemy's own

TRIALS = 4
NAME = "s"
QUICK = [
    *("--rule", "mirror", "--arch", "lenet", "--trials", str(TRIALS), "--epochs", "3", "--confirm-seeds", "1"),
    *("--name", NAME, "--concurrent", "2", "--scheduler", "none"),
    *("--set", "batch_size=16", "--set", "augment=false", "--json"),
]


class Search:
    """`bench search` under ``results``, with what its tests ask of it."""

    def __init__(self, results: Path, *more: str) -> None:
        self.results, self.folder, self.more = results, results / NAME, more

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "bench.cli", "search", *QUICK, "--results", str(self.results), *self.more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def rows(self, study: str = NAME) -> list[dict[str, Any]]:
        path = self.results / study / "rows.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def until(self, process: subprocess.Popen[str], true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not true():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def last_words(self, process: subprocess.Popen[str]) -> str:
        """Its one line of an error, with status 2 and no traceback."""
        out, err = process.communicate(timeout=300)
        assert process.returncode == 2, (process.returncode, err)
        assert out == ""
        assert "Traceback" not in err
        line = err.splitlines()[-1]
        assert line.startswith("bench: ")
        return line

    def end(self) -> dict[str, Any]:
        """The same command again."""
        process = self.start()
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    def states(self) -> Counter[str]:
        """Optuna's, from the journal alone."""
        storage = JournalStorage(JournalFileBackend(str(self.folder / "journal.log")))
        (study,) = storage.get_all_studies()
        return Counter(TrialState(trial.state).name for trial in storage.get_all_trials(study._study_id))

    def assert_whole(self, **statuses: int) -> None:
        """Exactly so many trials of each status, each filed once; and MLflow has what the rows have."""
        from mlflow import MlflowClient

        trials = [row for row in self.rows() if row["kind"] == "search"]
        assert Counter(row["status"] for row in trials) == statuses
        assert [row["uid"] for row in sorted(trials, key=lambda r: r["uid"])] == [f"s-{i:04d}" for i in range(TRIALS)]
        client = MlflowClient(f"sqlite:///{self.results.resolve()}/mlflow.db")
        runs = client.search_runs([client.get_experiment_by_name("bench").experiment_id], max_results=1000)
        told = {run.data.tags["bench.uid"]: run for run in runs if run.data.tags["bench.kind"] != "study"}
        filed = {row["uid"]: row for row in (*self.rows(), *self.rows("controls"))}
        assert {uid: run.data.tags["bench.status"] for uid, run in told.items()} == {
            uid: row["status"] for uid, row in filed.items()
        }
        assert len(told) == len(runs) - 1
        assert "RUNNING" not in {run.info.status for run in runs}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", 12) as made:
        yield made


@pytest.mark.parametrize("rows", [0, 2])
def test_a_disk_that_fills_in_the_middle(disk: SmallDisk, rows: int) -> None:
    search = Search(disk.path / "results", "--set", "train_examples=64")
    process = search.start()
    search.until(process, lambda: len(search.rows()) >= rows and (search.folder / "checkpoints").exists())
    disk.fill()
    said = search.last_words(process)
    assert "no space left on device; free space there, and the same command goes on." in said
    before = search.rows()  # whole lines: they are read here
    disk.free()
    assert sum(search.end()["trials"].values()) == TRIALS
    assert search.rows()[: len(before)] == before
    search.assert_whole(finished=TRIALS)


def test_a_results_folder_that_becomes_read_only(disk: SmallDisk) -> None:
    search = Search(disk.path / "results", "--set", "train_examples=64")
    process = search.start()
    search.until(process, lambda: len(search.rows()) >= 1)
    with disk.read_only(search.results):
        said = search.last_words(process)
    assert "; make it writable, and the same command goes on." in said  # by whichever file it met first
    assert re.search("read-only file system|permission denied", said)
    search.end()
    search.assert_whole(finished=TRIALS)


def test_a_results_folder_that_is_removed_and_put_back(tmp_path: Path) -> None:
    search = Search(tmp_path / "results", "--set", "train_examples=64")
    process = search.start()
    search.until(process, lambda: len(search.rows()) >= 1)
    search.results.rename(tmp_path / "elsewhere")
    said = search.last_words(process)
    assert "no such file or directory; put it back, or mount it again, and the same command goes on." in said
    assert not search.folder.exists(), "half a study was made anew"
    shutil.rmtree(search.results, ignore_errors=True)
    (tmp_path / "elsewhere").rename(search.results)
    search.end()
    search.assert_whole(finished=TRIALS)


def test_trials_that_all_diverge_are_told_as_that_everywhere(tmp_path: Path) -> None:
    search = Search(tmp_path / "results", "--set", "train_examples=64", "--set", "lr=1e30")
    found = search.end()
    assert found["trials"] == {"finished": 0, "stopped": 0, "diverged": TRIALS, "failed": 0}
    search.assert_whole(diverged=TRIALS)
    assert search.states() == {"COMPLETE": TRIALS}
    assert all(row["reason"].startswith("epoch 1: ") for row in search.rows())
    assert {row["metrics"]["val_acc"] for row in search.rows()} == {0.1}


def test_a_bug_that_every_trial_meets_ends_the_search_and_its_trials_are_not_run_again(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", {"train": 20, "test": 4}, size=(28, 28))
    search = Search(tmp_path / "results", "--dataset", f"imagefolder:{data}", "--concurrent", "1")
    process = search.start()
    search.until(process, (search.folder / "journal.log").exists)  # the data was looked at; no worker has it yet
    broken = data / "train" / "cat" / "00.png"
    image = broken.read_bytes()
    broken.write_bytes(image[:60])
    said = search.last_words(process)
    assert "3 trials in a row failed alike: " in said
    assert "00.png" in said
    failed = search.rows()
    assert [(row["uid"], row["status"]) for row in failed] == [(f"s-{i:04d}", "failed") for i in range(3)]
    assert all("00.png" in row["reason"] for row in failed)
    broken.write_bytes(image)
    assert search.end()["trials"] == {"finished": TRIALS - 3, "stopped": 0, "diverged": 0, "failed": 3}
    assert search.rows()[:3] == failed
    search.assert_whole(finished=TRIALS - 3, failed=3)
    assert search.states() == {"FAIL": 3, "COMPLETE": TRIALS - 3}
