"""A power cut in the last line, at each of its bytes: it is cut off, and said, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from optuna.distributions import FloatDistribution

from bench.config import StudyConfig, TrialConfig, TrialResult, UserError
from bench.journal import mend
from bench.rows import RowFile, row
from bench.study import Study

SPACE = {"sparse": FloatDistribution(0.1, 1.0)}


def open_study(folder: Path, said: list[str]) -> Study:
    config = StudyConfig(
        name="s", rule="sparse", arch="lenet", dataset="digits", trials=9, epochs=3, sampler="random", scheduler="none"
    )
    return Study.open(folder, config, SPACE, say=said.append, chance=0.1)


def result(value: float = 0.5) -> TrialResult:
    return TrialResult(config=TrialConfig(rule="sparse"), status="finished", metrics={"val_acc": value})


def torn(line: bytes) -> Iterator[bytes]:
    """What a power cut leaves of a line: its beginning, or that with zeros in the place of the rest, or of more."""
    for cut in range(len(line)):
        yield line[:cut]
        if cut % 16 == 0:
            yield line[:cut] + bytes(len(line) - cut)
            yield line[:cut] + bytes(4096)


def split(path: Path) -> tuple[bytes, bytes]:
    """What is before the last line, and the last line."""
    data = path.read_bytes()
    at = data.rfind(b"\n", 0, -1) + 1
    return data[:at], data[at:]


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """Of three trials, the last of which is told in the last line."""
    with open_study(tmp_path, []) as study:
        for value in (0.3, 0.4, 0.5):
            proposal = study.ask()
            assert proposal is not None
            study.tell(proposal.uid, result(value))
    return tmp_path / "journal.log"


def test_a_journal_torn_at_any_byte_is_cut_to_its_last_whole_line(journal: Path) -> None:
    before, line = split(journal)
    for tail in torn(line):
        journal.write_bytes(before + tail)
        said: list[str] = []
        mend(journal, said.append)
        assert journal.read_bytes() == before
        assert said == (
            [f"{journal}: cut off its last line, which was not written to its end ({len(tail)} bytes)."] if tail else []
        )
        mend(journal, pytest.fail)  # once


@pytest.mark.parametrize("remains", [lambda line: line[:-1], lambda line: line[:20], lambda line: bytes(len(line))])
def test_the_trial_of_a_torn_line_goes_on_and_the_study_ends_with_all_of_them(
    journal: Path, remains: Callable[[bytes], bytes]
) -> None:
    before, line = split(journal)
    journal.write_bytes(before + remains(line))
    said: list[str] = []
    with open_study(journal.parent, said) as study:
        assert (study.counts().finished, study.counts().running) == (2, 1)
        asked = []
        while proposal := study.ask():
            asked.append(proposal.uid)
            study.tell(proposal.uid, result())
        assert asked == [f"s-{i:04d}" for i in range(2, 9)]
        assert study.counts().finished == 9
    assert ["cut off" in text for text in said] == [True, False]


def test_a_journal_of_nothing_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "journal.log").touch()
    (tmp_path / "journal.log.lock").symlink_to(tmp_path / "journal.log")
    (tmp_path / "journal.log.lock1234.rename").symlink_to(tmp_path / "journal.log")
    said: list[str] = []
    with open_study(tmp_path, said) as study:
        assert study.ask() is not None
    assert said == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal.log", "lock"]


def test_a_line_in_the_middle_that_is_damaged_is_no_torn_one(journal: Path) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    damaged = b"".join([lines[0], bytes(len(lines[1]) - 1) + b"\n", *lines[2:]])
    journal.write_bytes(damaged)
    with pytest.raises(UserError, match="line 2 is damaged; restore the file"):
        mend(journal, pytest.fail)
    assert journal.read_bytes() == damaged


def test_rows_torn_at_any_byte_lose_that_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    file = RowFile(path)
    for i in range(3):
        file.append(row(f"s-{i:04d}", "s", "search", result()))
    before, line = split(path)
    for number, tail in enumerate(torn(line)):
        path.write_bytes(before + tail)
        said: list[str] = []
        again = RowFile(path, say=said.append)
        assert list(again.by_uid()) == ["s-0000", "s-0001"]
        if number % 16:  # an append waits for the disk
            continue
        again.append(row("s-0002", "s", "search", result()))
        assert path.read_bytes() == before + line
        assert ["torn" in text for text in said] == ([True, True] if tail else [])
        (tmp_path / "rows.jsonl.torn").unlink(missing_ok=True)
