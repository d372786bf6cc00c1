"""`bench sync`: after a killed driver, an outage or a lost database MLflow has what the rows have, once."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from bench.cli import main
from bench.config import StudyConfig
from bench.files import write_yaml
from bench.journal import claim
from bench.mlflow_client import Client
from bench.rows import RowFile, row
from bench.space_files import load_space
from bench.tracking import Tracker, sharing
from mlflow_book import CONFIG, Book, delivered, finished, free_port, made, run_whole

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),  # MLflow's own use
]

NAME = "mirror-resnet18-digits"
STUDY = StudyConfig(
    name=NAME,
    rule="mirror",
    arch="resnet18",
    dataset="digits",
    trials=3,
    space=load_space("mirror", "resnet18", space="reference").to_dict(),
)
IDENTITY = "0123456789abcdef"


@pytest.fixture
def book(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Book:
    """A results folder of this test's own, on a store that was made once."""
    whole = made(tmp_path_factory.getbasetemp() / "made")
    if not whole.results.exists():
        whole.results.mkdir()
        with whole.open() as tracker:
            tracker.study("another", config={})
            delivered(tracker)
    results = tmp_path / "results"
    results.mkdir()
    shutil.copy(whole.results / "mlflow.db", results / "mlflow.db")
    return Book(results)


def begin(results: Path, *uids: str) -> Path:
    """A study's folder, with rows of these trials."""
    folder = results / NAME
    write_yaml(folder / "study.yaml", {"id": IDENTITY, "runs_on": f"cpu {'d' * 64}", "config": STUDY.to_dict()})
    for uid in uids:
        RowFile(folder / "rows.jsonl").append(row(uid, NAME, "search", finished(2)))
    return folder


def tell(tracker: Tracker) -> None:
    """As `bench.search` begins."""
    tags = {"bench.rule": "mirror", "bench.arch": "resnet18", "bench.seed": STUDY.seed}
    tracker.study(NAME, config=STUDY.to_dict(), tags=tags, identity=IDENTITY)
    tracker.dataset("digits", "d" * 64)


def sync(results: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    status = main(["sync", "--results", str(results), "--json", *options])
    return status, json.loads(capsys.readouterr().out)


DRIVER = """
import os, signal, sys
from pathlib import Path
from bench.tracking import Tracker
from mlflow_book import CONFIG, Book, epochs
from test_sync import tell

tracker = Book(Path(sys.argv[1])).open()
tell(tracker)
for uid in ("filed", "lost", "later"):
    tracker.start(uid, "search", CONFIG)
    tracker.report(uid, 1, epochs(1)[0])
    if uid == sys.argv[2]:
        assert tracker.flush(100)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("reached", ["", "filed", "later"])
def test_after_a_killed_driver_all_is_there_and_nothing_runs(
    book: Book, capsys: pytest.CaptureFixture[str], reached: str
) -> None:
    """``reached``: how far the record had come when the driver was killed; "": to no certain place."""
    begin(book.results, "filed")
    done = subprocess.run([sys.executable, "-c", DRIVER, str(book.results), reached], check=False)
    assert done.returncode == -signal.SIGKILL
    status, found = sync(book.results, capsys)
    (study,) = found["studies"]
    assert (status, study["recorded"], study["agrees"]) == (0, 1, True)
    children = book.children(NAME)
    assert children["filed"].info.status == "FINISHED"
    assert book.points(children["filed"], "val_acc") == [(1, 0.6), (2, 0.7)]
    others = [run for uid, run in children.items() if uid != "filed"]
    assert {(r.info.status, r.data.tags["bench.status"]) for r in others} <= {("KILLED", "interrupted")}
    if reached == "later":
        assert study["ended"] == 3, "two trials without a row, and the study's own run"
        assert children.keys() == {"filed", "lost", "later"}
        assert book.points(children["lost"], "val_acc") == [(1, 0.6)]
    assert book.parent(NAME).info.status == "KILLED"
    assert "rows.jsonl" in book.files(book.parent(NAME))
    before = book.snapshot(NAME)
    status, found = sync(book.results, capsys)
    assert status == 0
    assert found["studies"] == [{**study, "recorded": 0, "ended": 0}]
    assert book.snapshot(NAME) == before


def test_from_the_rows_alone_mlflow_has_what_the_driver_would_have_told_it(
    book: Book, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Book(book.results.parent / "other")  # nobody has told this one anything
    shutil.copytree(book.results, other.results)
    for results in (book.results, other.results):
        begin(results, "a", "b")
    with book.open() as tracker:
        tell(tracker)
        run_whole(tracker, "a", finished(2))
        run_whole(tracker, "b", finished(2))
        delivered(tracker)
    assert sync(book.results, capsys)[0] == 0  # its numbers and files
    status, found = sync(other.results, capsys)
    assert status == 0
    assert [(s["recorded"], s["ended"], s["agrees"]) for s in found["studies"]] == [(2, 0, True)]
    assert timeless(other.snapshot(NAME)) == timeless(book.snapshot(NAME))
    assert other.files(other.parent(NAME)) == book.files(book.parent(NAME)) == {"study.yaml", "rows.jsonl"}


def timeless(snapshot: Any) -> Any:
    """Without whose revision it is: of a run's start, or of its row."""
    return [
        (s, p, {k: v for k, v in tags.items() if k != "bench.git_revision"}, *rest) for s, p, tags, *rest in snapshot
    ]


def test_a_study_under_a_living_driver_is_left_to_it(book: Book, capsys: pytest.CaptureFixture[str]) -> None:
    folder = begin(book.results, "a")
    with book.open() as tracker, claim(folder):
        tell(tracker)
        tracker.start("a", "search", CONFIG)
        delivered(tracker)
        for _ in range(2):
            status, found = sync(book.results, capsys)
            assert status == 0
            assert [(s["agrees"], s["recorded"], s["ended"]) for s in found["studies"]] == [(None, 0, 0)]
            assert "left to its driver" in found["studies"][0]["note"]
            assert book.children(NAME)["a"].info.status == book.parent(NAME).info.status == "RUNNING"


def test_single_trainings_are_recorded_and_ended_too(book: Book, capsys: pytest.CaptureFixture[str]) -> None:
    left_by_killed_trainings(book)
    with sharing(book.results / "train") as alone:
        assert alone
        _, found = sync(book.results, capsys)
        assert [s["agrees"] for s in found["studies"]] == [None]
        assert book.children("train")["train-2"].info.status == "RUNNING"
    _, found = sync(book.results, capsys)
    assert [(s["study"], s["recorded"], s["agrees"]) for s in found["studies"]] == [("train", 1, True)]
    assert {uid: r.info.status for uid, r in book.children("train").items()} == {
        "train-1": "FINISHED",
        "train-2": "KILLED",
    }


def left_by_killed_trainings(book: Book) -> None:
    """One killed after its row, of which MLflow has nothing, and one before."""
    RowFile(book.results / "train" / "rows.jsonl").append(row("train-1", "train", "train", finished(2)))
    tracker = book.open()
    tracker.study("train", config={})
    tracker.start("train-2", "train", CONFIG)
    delivered(tracker)


def test_the_next_training_records_and_ends_what_a_killed_one_left(
    book: Book, capsys: pytest.CaptureFixture[str]
) -> None:
    left_by_killed_trainings(book)
    quick = ["--set", "train_examples=64", "--set", "batch_size=32", "--epochs", "1", "--results", str(book.results)]
    with sharing(book.results / "train"):  # another one is under way: it may be train-2
        assert main(["train", "--rule", "backprop", "--arch", "lenet", *quick]) == 0
        statuses = {uid: run.info.status for uid, run in book.children("train").items()}
        assert (statuses.pop("train-1"), statuses.pop("train-2")) == ("FINISHED", "RUNNING")
        assert list(statuses.values()) == ["FINISHED"]
    assert book.points(book.children("train")["train-1"], "val_acc") == [(1, 0.6), (2, 0.7)]
    assert main(["train", "--rule", "backprop", "--arch", "lenet", *quick]) == 0
    assert book.children("train")["train-2"].info.status == "KILLED"
    capsys.readouterr()


def test_what_mlflow_refuses_is_said_and_the_rest_is_recorded(book: Book, capsys: pytest.CaptureFixture[str]) -> None:
    begin(book.results, "a", "b")
    with book.open() as tracker:
        tell(tracker)
        tracker.start("a", "search", CONFIG.replace(lr=0.7))
        delivered(tracker)
    status, found = sync(book.results, capsys)
    (study,) = found["studies"]
    assert (status, study["recorded"], study["agrees"]) == (1, 1, False)
    assert "the row of a is not recorded (a was recorded with another lr)" in study["note"]
    assert book.children(NAME)["b"].info.status == "FINISHED"


def test_a_run_that_was_deleted_in_mlflow_is_recorded_again(book: Book, capsys: pytest.CaptureFixture[str]) -> None:
    begin(book.results, "a", "b")
    assert sync(book.results, capsys)[0] == 0
    before = timeless(book.snapshot(NAME))
    book.client().delete_run(book.children(NAME)["a"].info.run_id)
    assert sync(book.results, capsys)[1]["studies"][0]["recorded"] == 1
    assert timeless(book.snapshot(NAME)) == before


def test_one_damaged_study_does_not_keep_the_others_from_it(book: Book, capsys: pytest.CaptureFixture[str]) -> None:
    begin(book.results, "a")
    for name, text in (
        ("empty", ""),
        ("none", "id: x\nconfig: {}\n"),
        ("text", "id: x\nconfig: {name: text, rule: 3}"),
    ):
        (book.results / name).mkdir()
        (book.results / name / "study.yaml").write_text(text)
    (book.results / "plan").mkdir()
    (book.results / "plan" / "summary.json").write_text("{")
    transfer = {"name": "plan", "rules": ["mirror"], "source": "lenet", "targets": ["mlp"], "dataset": "digits"}
    write_yaml(book.results / "plan" / "transfer.yaml", {"id": "y", "runs_on": "cpu x", "config": transfer})
    status, found = sync(book.results, capsys)
    assert status == 1
    assert {s["study"]: s["agrees"] for s in found["studies"]} == {
        NAME: True,
        **dict.fromkeys(("empty", "none", "text", "plan"), False),
    }
    assert all("\n" not in s["note"] for s in found["studies"])


def test_one_damaged_row_does_not_keep_the_others_from_it(book: Book, capsys: pytest.CaptureFixture[str]) -> None:
    folder = begin(book.results, "a", "b", "c")
    lines = (folder / "rows.jsonl").read_text().splitlines()
    damaged = json.loads(lines[1])
    damaged["config"]["momentum"] = 7
    (folder / "rows.jsonl").write_text("\n".join([lines[0], json.dumps(damaged), lines[2], ""]))
    status, found = sync(book.results, capsys)
    (study,) = found["studies"]
    assert (status, study["recorded"], study["agrees"]) == (1, 2, False)
    assert "the row of b is not recorded (" in study["note"]
    assert "momentum" in study["note"]
    assert set(book.children(NAME)) == {"a", "c"}
    assert book.files(book.parent(NAME)) == {"study.yaml", "rows.jsonl"}


def test_a_parent_run_is_made_once_whoever_makes_it(
    book: Book, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`bench sync` and a driver that begins, which need no folder to themselves in a matrix, both find none."""
    begin(book.results)
    asked, both, create = threading.Event(), threading.Barrier(2), Client.create

    def slow(client: Client, *what: Any) -> str:
        asked.set()
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(1.0)
        return create(client, *what)

    monkeypatch.setattr(Client, "create", slow)
    other = threading.Thread(target=main, args=[["sync", "--results", str(book.results)]])
    other.start()
    assert asked.wait(60)
    with book.open() as tracker:
        tell(tracker)
        delivered(tracker)
    other.join()
    capsys.readouterr()
    assert len(book.runs("tags.`bench.kind` = 'study' AND tags.`bench.study` = '" + NAME + "'")) == 1


def test_bad_input_and_a_store_that_is_away(book: Book, capsys: pytest.CaptureFixture[str]) -> None:
    begin(book.results, "a")
    for options in (
        ["--results", str(book.results / "nowhere")],
        ["--results", str(book.results), "--tracking-uri", "x"],
    ):
        assert main(["sync", *options]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    gone = ["--results", str(book.results), "--tracking-uri", f"http://127.0.0.1:{free_port()}"]
    assert main(["sync", *gone]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "nothing is lost" in line
