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
from bench.delivery import UnreachableError
from bench.files import write_yaml
from bench.journal import claim
from bench.mlflow_client import Client
from bench.mlflow_store import Store
from bench.rows import RowFile, row
from bench.space_files import load_space
from bench.spool import Spool, survey
from bench.stores import embedded, key
from bench.tracking import Tracker
from mlflow_book import CONFIG, Book, delivered, epochs, finished, free_port, made, run_whole

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
from mlflow_book import CONFIG, Book, epochs, finished, run_whole
from test_sync import tell

tracker = Book(Path(sys.argv[1])).open()
tell(tracker)
for uid in ("filed", "lost", "later"):
    tracker.start(uid, "search", CONFIG)
    tracker.report(uid, 1, epochs(1)[0])
    if uid == sys.argv[2]:
        assert tracker.flush(100)
tracker.finish("filed", finished(2))
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
    (left,) = survey(book.results / "spool")
    assert not left.held
    status, found = sync(book.results, capsys)
    (study,) = found["studies"]
    assert status == 0
    assert study["delivered"] == left.operations > 0
    assert study["recorded"] == 0
    assert study["ended"] == 3, "two trials without a row, and the study's own run"
    children = book.children(NAME)
    assert {uid: r.info.status for uid, r in children.items()} == {
        "filed": "FINISHED",
        "lost": "KILLED",
        "later": "KILLED",
    }
    assert children["lost"].data.tags["bench.status"] == "interrupted"
    assert book.parent(NAME).info.status == "KILLED"
    assert book.points(children["filed"], "val_acc") == [(1, 0.6), (2, 0.7)]
    assert book.points(children["lost"], "val_acc") == [(1, 0.6)]
    assert "rows.jsonl" in book.files(book.parent(NAME))
    assert list((book.results / "spool").glob("*.jsonl")) == []
    before = book.snapshot(NAME)
    status, found = sync(book.results, capsys)
    assert status == 0
    assert found["studies"] == [{**study, "delivered": 0, "ended": 0}]
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
    """Without the times in tags, and whose revision it is: of a run's start, or of its row."""
    dropped = ("bench.begun", "bench.git_revision")
    return [(s, p, {k: v for k, v in tags.items() if k not in dropped}, *rest) for s, p, tags, *rest in snapshot]


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


def test_a_driver_that_holds_no_folder_is_known_by_its_spool(book: Book, capsys: pytest.CaptureFixture[str]) -> None:
    begin(book.results)  # as of a matrix, which several processes may run
    with book.open() as tracker:
        tell(tracker)
        delivered(tracker)
        _, found = sync(book.results, capsys)
        assert [s["agrees"] for s in found["studies"]] == [None]
        assert book.parent(NAME).info.status == "RUNNING"
    _, found = sync(book.results, capsys)
    assert [s["agrees"] for s in found["studies"]] == [True]


def test_what_a_dead_driver_left_ends_nothing_of_a_living_one(
    book: Book, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file comes, by another process, when the study has long been taken up again."""
    with monkeypatch.context() as outage:

        def away(store: Store, operation: object) -> None:
            raise UnreachableError(f"{store} {operation}")

        outage.setattr(Store, "deliver", away)
        dead = book.open()
        tell(dead)
        for uid in ("again", "only here", "done"):
            dead.start(uid, "search", CONFIG)
            dead.report(uid, 1, epochs(1)[0])
        dead.headline({"val_acc": 0.1})
        dead.finish("done", finished(2))
        assert dead.close("FAILED", timeout=0) == 13
    (file,) = (book.results / "spool").glob("*.jsonl")
    file.rename(tmp_path / "aside")
    with book.open() as living:
        tell(living)
        living.start("again", "search", CONFIG)
        living.headline({"val_acc": 0.9})
        delivered(living)
        (tmp_path / "aside").rename(file)
        with book.open() as other:
            delivered(other)
        statuses = {uid: r.info.status for uid, r in book.children(NAME).items()}
        assert statuses == {"again": "RUNNING", "only here": "KILLED", "done": "FINISHED"}
        assert book.parent(NAME).info.status == "RUNNING"
        assert book.points(book.parent(NAME), "val_acc") == [(0, 0.9)]
        living.report("again", 1, epochs(1)[0])
        living.finish("again", finished(2))
    children = book.children(NAME)
    assert {r.info.status for r in (*children.values(), book.parent(NAME))} == {"FINISHED", "KILLED"}
    assert book.points(children["again"], "val_acc") == book.points(children["done"], "val_acc") == [(1, 0.6), (2, 0.7)]
    assert book.points(children["only here"], "val_acc") == [(1, 0.6)]


def test_single_trainings_are_recorded_and_ended_too(book: Book, capsys: pytest.CaptureFixture[str]) -> None:
    RowFile(book.results / "train" / "rows.jsonl").append(row("train-1", "train", "train", finished(2)))
    with book.open() as tracker:
        tracker.study("train", config={}, live=None)
        tracker.start("train-2", "train", CONFIG)
        delivered(tracker)
        _, found = sync(book.results, capsys)
        assert [s["agrees"] for s in found["studies"]] == [None]
        tracker.end = lambda _: None  # type: ignore[method-assign]  # as if it were killed here
    _, found = sync(book.results, capsys)
    assert [(s["study"], s["recorded"], s["agrees"]) for s in found["studies"]] == [("train", 1, True)]
    assert {uid: r.info.status for uid, r in book.children("train").items()} == {
        "train-1": "FINISHED",
        "train-2": "KILLED",
    }


def test_the_spool_of_another_store_is_named(book: Book, capsys: pytest.CaptureFixture[str]) -> None:
    for store in ("http://***@host:5000", "http://elsewhere"):
        file = Spool(book.results / "spool", key(store, book.results), store).create("a study")
        assert file is not None
        file.append(b"{}")
        file.close()
    assert main(["sync", "--results", str(book.results)]) == 0
    said = capsys.readouterr().out
    assert "1 operations are for http://***@host:5000: bench sync --tracking-uri http://***@host:5000 (with its" in said
    assert "1 operations are for http://elsewhere: bench sync --tracking-uri http://elsewhere delivers them." in said


def test_what_is_refused_is_counted_and_the_rest_is_delivered(book: Book, capsys: pytest.CaptureFixture[str]) -> None:
    begin(book.results, "a")
    uri, _ = embedded(book.results)
    file = Spool(book.results / "spool", key(uri, book.results), uri).create(NAME)
    assert file is not None
    file.append(b'{"op": "begin", "stu')
    file.close()
    status, found = sync(book.results, capsys)
    assert (status, found["rejected"]) == (1, 1)
    assert [(s["recorded"], s["agrees"]) for s in found["studies"]] == [(1, True)]
    (entry,) = (book.results / "spool" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(entry)["operation"] == '{"op": "begin", "stu'
    assert sync(book.results, capsys)[0] == 0


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
    assert "1 rows have no run; the row of b is damaged (" in study["note"]
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
