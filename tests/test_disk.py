"""A disk that is really full, read-only or gone: one clear line, nothing half written, and then on it goes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.distributions import FloatDistribution
from torch import nn

from bench.checkpoint import prepare_checkpoint, read_checkpoint, write_checkpoint
from bench.cli import main
from bench.config import StudyConfig, TrialConfig, TrialResult, UserError
from bench.director import Director
from bench.disk import DiskError, disk_error, find_disk_error
from bench.files import write_atomic
from bench.journal import claim
from bench.rows import RowFile, row
from bench.study import Study
from bench.worker import Running
from engine_script import Script, task
from small_disk import SmallDisk, small_disk

SPACE = {"sparse": FloatDistribution(0.1, 1.0)}
TRIALS = 60


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", 1) as made:
        yield made


def open_study(folder: Path, said: list[str]) -> Study:
    config = StudyConfig(
        name="s",
        rule="sparse",
        arch="lenet",
        dataset="digits",
        epochs=3,
        trials=TRIALS,
        sampler="random",
        scheduler="none",
    )
    return Study.open(folder, config, SPACE, say=said.append, chance=0.1)


def result(**changes: Any) -> TrialResult:
    values = {"config": TrialConfig(rule="sparse"), "status": "finished", "metrics": {"val_acc": 0.5}, **changes}
    return TrialResult(**values)


def search(study: Study) -> None:
    """All that is left of it."""
    while proposal := study.ask():
        study.report(proposal.uid, 1, 0.4)
        study.tell(proposal.uid, result())


def assert_whole(journal: Path) -> None:
    lines = journal.read_bytes().split(b"\n")
    assert lines.pop() == b""
    for line in lines:
        json.loads(line)


def test_a_journal_on_a_full_disk_ends_with_a_whole_line_and_goes_on_when_there_is_room(disk: SmallDisk) -> None:
    folder, said = disk.path / "s", list[str]()
    for spare in range(3):  # the disk is full again a few pages later: in the middle of another line
        with open_study(folder, said) as study:
            disk.fill(spare)
            with pytest.raises(DiskError, match=r"journal\.log: no space left.*free space there, and the same command"):
                search(study)
        assert_whole(folder / "journal.log")
        disk.free()
    with open_study(folder, said) as study:
        search(study)
        assert study.counts().finished == TRIALS
    assert not [line for line in said if "cut off" in line]


def test_rows_on_a_full_disk_are_whole_and_each_is_there_once(disk: SmallDisk) -> None:
    file, uids = RowFile(disk.path / "s" / "rows.jsonl", say=pytest.fail), [f"s-{i:04d}" for i in range(40)]
    history = [{"epoch": float(i), "val_acc": 0.5} for i in range(1, 50)]  # rows that fill less or more than a page
    full = 0
    for i, uid in enumerate(uids):
        if i % 10 == 5:
            disk.fill()
        try:
            file.append(row(uid, "s", "search", result(history=history)))
        except DiskError:
            full += 1
            assert_whole(file.path)
            disk.free()
            file.append(row(uid, "s", "search", result(history=history)))
    assert full >= 2
    assert [found["uid"] for found in RowFile(file.path).read()] == uids


def save(path: Path, epoch: int) -> None:
    model = nn.Linear(300, 300)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = [{"epoch": float(number)} for number in range(1, epoch + 1)]
    config = TrialConfig(rule="sparse")
    write_checkpoint(path, config=config, epoch=epoch, history=history, model=model, optimizer=optimizer)


@pytest.mark.parametrize("spare", [0, 1, 20])
def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(disk: SmallDisk, spare: int) -> None:
    path = disk.path / "trial.pt"
    save(path, 1)
    disk.fill(spare)
    with pytest.raises(DiskError, match=r"cannot write .*trial\.pt: no space left on device"):
        save(path, 2)
    assert sorted(p.name for p in disk.path.iterdir()) == ["filler", "trial.pt"]
    assert read_checkpoint(path)["epoch"] == 1
    disk.free()
    save(path, 2)
    assert read_checkpoint(path)["epoch"] == 2


def test_a_file_that_is_replaced_is_the_old_one_where_the_new_one_does_not_fit(disk: SmallDisk) -> None:
    path = disk.path / "best.yaml"
    write_atomic(path, "old")
    disk.fill()
    with pytest.raises(UserError, match="No space left"):
        write_atomic(path, "new" * 10_000)
    assert path.read_text() == "old"
    assert sorted(p.name for p in disk.path.iterdir()) == ["best.yaml", "filler"]


def test_nothing_is_begun_where_there_is_no_room(disk: SmallDisk, capsys: pytest.CaptureFixture[str]) -> None:
    disk.fill()
    arguments = ["search", "--rule", "mirror", "--arch", "lenet", "--results", str(disk.path / "results")]
    assert main(arguments) == 2
    assert (
        "No space left on device; choose a folder that can be written, or make room there." in capsys.readouterr().err
    )
    assert list((disk.path / "results").iterdir()) == []
    with pytest.raises(DiskError, match="no space left"), claim(disk.path / "s"):
        pass


@pytest.mark.parametrize("parent", [False, True])
def test_what_was_removed_is_not_made_anew_with_half_of_what_was_in_it(disk: SmallDisk, parent: bool) -> None:
    results = disk.path / "results"
    folder = results / "s"
    with open_study(folder, []) as study:
        rows, fresh = RowFile(folder / "rows.jsonl"), RowFile(folder / "other.jsonl")
        rows.append(row("s-0000", "s", "search", result()))
        again = RowFile(rows.path)
        assert len(again.read()) == 1
        shutil.rmtree(results if parent else folder)
        for file in (rows, fresh, again):
            with pytest.raises(DiskError, match="no such file or directory; put it back, or mount it again"):
                file.append(row("s-0001", "s", "search", result()))
        with pytest.raises(DiskError, match=r"journal\.log: no such file"):
            study.ask()
        with pytest.raises(DiskError, match=r"there is no folder .*; make it, put it back or mount it again"):
            prepare_checkpoint(folder / "checkpoints" / "s-0001.pt")
    assert list(disk.path.rglob("*")) == ([] if parent else [results])


def test_a_journal_or_rows_that_alone_were_removed_are_missed(disk: SmallDisk) -> None:
    folder = disk.path / "s"
    with open_study(folder, []) as study:
        RowFile(folder / "rows.jsonl").append(row("s-0000", "s", "search", result()))
        known = RowFile(folder / "rows.jsonl")
        known.read()
        (folder / "rows.jsonl").unlink()
        (folder / "journal.log").unlink()
        with pytest.raises(DiskError):
            known.append(row("s-0001", "s", "search", result()))
        with pytest.raises(DiskError):
            study.ask()
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_a_disk_that_became_read_only_is_named_as_that_by_every_writer(disk: SmallDisk) -> None:
    folder = disk.path / "s"
    with open_study(folder, []) as study:
        rows = RowFile(folder / "rows.jsonl")
        rows.append(row("s-0000", "s", "search", result()))
        save(folder / "trial.pt", 1)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        writers: list[Callable[[], object]] = [
            lambda: rows.append(row("s-0001", "s", "search", result())),
            study.ask,
            lambda: save(folder / "trial.pt", 2),
            lambda: prepare_checkpoint(folder / "checkpoints" / "s-0001.pt"),
        ]
        with disk.read_only(folder):
            for write in writers:
                with pytest.raises(DiskError, match="read-only file system; make it writable, and the same command"):
                    write()
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        for write in writers:
            write()


def test_output_that_the_log_has_no_room_for_does_not_come_out_elsewhere(disk: SmallDisk) -> None:
    code = (
        "import sys; from pathlib import Path; from bench.streams import quiet\n"
        "with quiet(Path(sys.argv[1])): print('noise' * 100); print('noise', file=sys.stderr)\n"
        "print('result')"
    )
    (disk.path / "ray.log").touch()
    disk.fill()
    done = subprocess.run(
        [sys.executable, "-c", code, disk.path / "ray.log"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "result\n", "")


def test_a_result_that_cannot_be_printed_is_one_line(disk: SmallDisk) -> None:
    disk.fill()
    with (disk.path / "out").open("w") as out:
        done = subprocess.run(
            [sys.executable, "-m", "bench.cli", "list", "--json"],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (
        done.stderr
        == "bench: cannot use a file: no space left on device; free space there, and the same command goes on.\n"
    )
    assert done.returncode == 2


# --- whose fault it is


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE])
def test_an_error_of_the_disk_is_found_behind_others(code: int) -> None:
    try:
        try:
            raise OSError(code, os.strerror(code), "data.bin")
        except OSError:
            raise RuntimeError("a library's own words")  # noqa: B904  (as torch does)
    except RuntimeError as error:
        found = find_disk_error(error)
    assert found is not None
    assert str(found).startswith(f"cannot use data.bin: {os.strerror(code)[0].lower()}")


def test_other_errors_are_not_the_disks() -> None:
    for error in (FileNotFoundError(errno.ENOENT, "no"), ValueError("no"), OSError("no number"), MemoryError()):
        assert find_disk_error(error) is None
    assert "mend that" in str(disk_error("x", OSError("no number")))


def test_a_trial_whose_disk_is_full_is_not_failed_and_ends_the_run(disk: SmallDisk, tmp_path: Path) -> None:
    config = TrialConfig(rule="backprop", arch="lenet", dataset="digits", epochs=2, train_examples=32, batch_size=32)
    script, said = Script([task("a"), task("b")]), list[str]()
    director = Director(
        script,
        trial="bench.trial:run_trial",
        room=lambda: 2,
        log=tmp_path / "log",
        say=said.append,
        tick=None,
        interrupted=lambda: False,
    )
    director.suggest("1")
    disk.fill()
    options = {"checkpoint": str(disk.path / "a.pt"), "device": "cpu"}
    running = Running({"trial": "bench.trial:run_trial", "config": config.to_dict(), "options": options})
    director.returned("1", running.next_message())
    assert isinstance(director.fault, DiskError)
    assert "a.pt: no space left on device" in str(director.fault)
    assert director.stopping
    assert script.results == {}
    assert "PytorchStreamWriter" not in str(director.fault)
