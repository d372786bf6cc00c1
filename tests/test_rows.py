"""The file of result rows: what is appended is read back, and a crash costs at most the row in flight."""

from __future__ import annotations

import json
import math
import multiprocessing
import resource
from pathlib import Path

import pytest

from bench.config import TrialConfig, TrialResult, UserError
from bench.rows import FIELDS, RowFile, result_of, row, table

CONFIG = TrialConfig(rule="mirror", coefficients={"amp": 0.5, "decay": 1e-3}, step_epochs=(3.0,), schedule="step")


def result(**changes: object) -> TrialResult:
    values: dict[str, object] = {
        "config": CONFIG,
        "status": "finished",
        "metrics": {"val_acc": 0.75, "val_loss": 0.1 + 0.2},
        "history": [{"epoch": 1.0, "val_acc": 0.5}, {"epoch": 2.0, "val_acc": 0.75}],
        "provenance": {"git_revision": None, "versions": {"torch": "2.13.0"}},
    }
    return TrialResult(**{**values, **changes})  # type: ignore[arg-type]


def filed(uid: str, **changes: object) -> dict[str, object]:
    return row(uid, "study", "search", result(**changes))


def some_rows(path: Path, n: int = 3) -> RowFile:
    file = RowFile(path)
    for i in range(n):
        file.append(filed(f"study-{i:04d}"))
    return file


def test_a_row_is_its_result(tmp_path: Path) -> None:
    some_rows(tmp_path / "rows.jsonl", 1)
    (read,) = RowFile(tmp_path / "rows.jsonl").read()
    assert tuple(read) == FIELDS
    assert result_of(read) == result()
    assert (read["uid"], read["study"], read["kind"], read["test_read"]) == ("study-0000", "study", "search", False)


def test_test_read_says_whether_test_was_read() -> None:
    assert filed("a", metrics={"val_acc": 0.5, "test_acc": 0.4})["test_read"] is True


def test_rows_keep_their_order_and_are_found_by_uid(tmp_path: Path) -> None:
    file = some_rows(tmp_path / "new" / "folder" / "rows.jsonl")
    assert [r["uid"] for r in file.read()] == ["study-0000", "study-0001", "study-0002"]
    assert file.by_uid()["study-0001"]["uid"] == "study-0001"
    assert RowFile(tmp_path / "none.jsonl").read() == []


@pytest.mark.parametrize(
    ("uid", "changes", "said"),
    [
        ("a", {"metrics": {"val_area": 1.0000000000000002}}, "not a share of 1"),
        ("a", {"metrics": {"val_loss": 1e200}}, "metrics.val_loss must be less than"),
        ("a" * 251, {}, "uid must have at most 250"),
        ("a\ud800", {}, "uid must be a valid string"),
    ],
)
def test_what_could_not_be_read_again_is_not_filed(
    tmp_path: Path, uid: str, changes: dict[str, object], said: str
) -> None:
    """One such row, and every later read of the file is refused."""
    file = some_rows(tmp_path / "rows.jsonl", 1)
    with pytest.raises(UserError, match=f"is not filed, for it could not be read again: .*{said}"):
        file.append(filed(uid, **changes))
    assert [r["uid"] for r in RowFile(file.path).read()] == ["study-0000"]


def test_a_uid_is_filed_once_also_by_another_process_object(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    first, second = RowFile(path), RowFile(path)
    first.append(filed("a"))
    second.append(filed("b"))
    for file, uid in ((first, "b"), (second, "a"), (RowFile(path), "a")):
        with pytest.raises(UserError, match=f"uid '{uid}' is there already"):
            file.append(filed(uid))
    assert [r["uid"] for r in first.read()] == ["a", "b"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_refused_by_name(tmp_path: Path, bad: float) -> None:
    file = some_rows(tmp_path / "rows.jsonl", 1)
    before = file.path.read_bytes()
    with pytest.raises(UserError, match=r"row b: metrics\.val_loss, history\.0\.val_acc is not finite"):
        file.append(filed("b", metrics={"val_loss": bad}, history=[{"epoch": 1.0, "val_acc": bad}]))
    assert file.path.read_bytes() == before


def test_wrong_keys_are_refused(tmp_path: Path) -> None:
    values = filed("a")
    del values["metrics"]
    with pytest.raises(UserError, match="metrics"):
        RowFile(tmp_path / "rows.jsonl").append(values)
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize("tail", [b'{"uid": "torn", "stu', b'{"uid": "torn", "stu\n', b"\0\0\0"])
def test_a_torn_last_line_is_said_and_cut_by_the_next_append(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    some_rows(path, 2)
    with path.open("ab") as file:
        file.write(tail)
    torn = path.read_bytes()
    said: list[str] = []
    again = RowFile(path, say=said.append)
    assert [r["uid"] for r in again.read()] == ["study-0000", "study-0001"]
    assert path.read_bytes() == torn, "reading changed the file"
    again.append(filed("torn"))
    assert [r["uid"] for r in again.read()] == ["study-0000", "study-0001", "torn"]
    assert ["torn" in line for line in said] == [True, True]
    assert tail in (tmp_path / "rows.jsonl.torn").read_bytes()


def test_every_prefix_of_the_file_gives_the_rows_that_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    whole = some_rows(path, 3).path.read_bytes()
    for cut in range(0, len(whole) + 1, 7):
        path.write_bytes(whole[:cut])
        assert len(RowFile(path, say=lambda _: None).read()) == whole[:cut].count(b"\n")


def test_a_corrupt_line_in_the_middle_is_named_and_never_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    some_rows(path, 3)
    lines = path.read_text().splitlines(keepends=True)
    lines[1] = lines[1][:20] + "\n"
    path.write_text("".join(lines))
    for use in (lambda: RowFile(path).read(), lambda: RowFile(path).append(filed("new"))):
        with pytest.raises(UserError, match=r"rows\.jsonl, line 2: not a result row"):
            use()
    assert path.read_text() == "".join(lines)


def test_a_uid_twice_in_a_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    text = some_rows(path, 1).path.read_text()
    path.write_text(text + text)
    with pytest.raises(UserError, match="line 2: uid 'study-0000' a second time"):
        RowFile(path).read()


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        RowFile(tmp_path / "file" / "rows.jsonl").append(filed("a"))


def test_a_write_that_stops_in_the_middle_leaves_no_half_line(tmp_path: Path) -> None:
    file = some_rows(tmp_path / "rows.jsonl", 1)
    before = file.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write"):
            file.append(filed("a"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.path.read_bytes() == before
    file.append(filed("a"))
    assert list(file.by_uid()) == ["study-0000", "a"]


def _append_many(path: Path, name: str) -> None:
    file = RowFile(path)
    for i in range(20):
        file.append(filed(f"{name}-{i}"))


def test_two_processes_append_without_loss(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_append_many, args=(path, name)) for name in ("a", "b")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert sorted(r["uid"] for r in RowFile(path).read()) == sorted(f"{n}-{i}" for n in "ab" for i in range(20))


def test_table_has_one_line_per_run_and_flat_columns() -> None:
    diverged = filed("b", status="diverged", reason="loss is nan", metrics={"val_acc": 0.1}, history=[])
    frame = table([filed("a"), diverged])
    assert list(frame["uid"]) == ["a", "b"]
    assert list(frame["status"]) == ["finished", "diverged"]
    assert list(frame["config.coefficients.amp"]) == [0.5, 0.5]
    assert list(frame["config.step_epochs"]) == [(3.0,), (3.0,)]
    assert list(frame["metrics.val_acc"]) == [0.75, 0.1]
    assert frame["metrics.val_loss"].isna().tolist() == [False, True]
    assert list(frame["provenance.versions.torch"]) == ["2.13.0"] * 2
    assert not [c for c in frame.columns if c.startswith("history")]
    assert frame.groupby("config.step_epochs").size().tolist() == [2]


def test_table_of_nothing_still_has_its_columns() -> None:
    assert list(table([]).columns) == ["uid", "study", "kind", "status", "reason", "test_read"]


def test_the_file_is_plain_json_lines(tmp_path: Path) -> None:
    lines = some_rows(tmp_path / "rows.jsonl", 2).path.read_text().splitlines()
    assert [json.loads(line)["config"]["rule"] for line in lines] == ["mirror", "mirror"]
