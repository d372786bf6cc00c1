"""A results folder and its copy on a store: which is newer, what is uploaded, and what must never be lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.config import UserError
from bench.copies import Index, Use, belongs, bring, changed, files, send, sweep, whole_lines
from bench.lease import TakenError
from bench.objects import ObjectsAwayError, Store
from flaky_store import Flaky, away

STORE = Store("fsspec+flaky://lab/x")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    Flaky.reset()
    yield
    Flaky.reset()


class Machine:
    """A machine's copy of a study s."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.index = folder, Index(folder)
        self.said: list[str] = []

    def bring(self, use: Use = "writes") -> None:
        bring(STORE, self.folder, self.index, use=use, say=self.said.append)

    def send(self) -> int:
        return send(STORE, self.folder, self.index, lambda: None)

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def trial(self, number: int, *, row: bool = True) -> None:
        """The lines of a trial that was asked for, and told with its row."""
        uid = f"s-{number:04d}"
        self.append("journal.log", {"ask": {"uid": uid}})
        if row:
            self.append("rows.jsonl", {"uid": uid, "kind": "search"})
            self.append("journal.log", {"tell": number})

    def append(self, name: str, line: object) -> None:
        (self.folder / "s").mkdir(parents=True, exist_ok=True)
        with (self.folder / "s" / name).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def files(self) -> dict[str, str]:
        paths = [p for p in (self.folder / "s").rglob("*") if p.is_file()]
        return {p.relative_to(self.folder).as_posix(): p.read_text() for p in paths}

    def uids(self) -> list[str]:
        return [json.loads(line)["uid"] for line in (self.folder / "s" / "rows.jsonl").read_text().splitlines()]


@pytest.fixture
def a(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "a")


@pytest.fixture
def b(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("s/rows.jsonl", True),
        ("s/journal.log", True),
        ("s/study.yaml", True),
        ("s/report.html", True),
        ("controls/rows.jsonl", True),
        ("spool/spool-k-1.jsonl", True),
        ("s/rows.jsonl.torn", True),
        ("s/lock", False),
        ("s/drivers/driver-1a", False),
        ("s/ray.log", False),
        ("s/journal.log.lock", False),
        ("s/journal.log.lock.1a.rename", False),
        ("s/.best.yaml.1a.tmp", False),
        ("s/checkpoints/s-0001.pt", False),
        ("s/networks/s-1.pt", False),
        *((f"{study}/rows.jsonl", True) for study in ("networks", "checkpoints", "drivers", "lock", "ray.log")),
        ("networks/networks/s-1.pt", False),
        ("spool/spool-k-1.new", False),
        ("mlartifacts/1/a/rows.jsonl", False),
        ("mlflow.db", False),
        (".mirror/index.json", False),
        (".lease", False),
    ],
)
def test_what_belongs_on_the_store(tmp_path: Path, name: str, kept: bool) -> None:
    assert belongs(name) is kept
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    assert [found for found, _ in files(tmp_path)] == [name] * kept


def test_another_machine_goes_on_and_the_first_follows(a: Machine, b: Machine) -> None:
    a.trial(0)
    a.write("s/study.yaml", "trials: 1")
    a.write("s/report.html", "a page")
    assert a.send() == 4
    assert a.send() == 0
    b.bring()
    assert b.files() == {n: t for n, t in a.files().items() if n != "s/report.html"}
    assert b.send() == 0
    b.trial(1)
    b.write("s/study.yaml", "trials: 2")
    assert b.send() == 3
    a.bring("shows")
    assert a.files() == {**b.files(), "s/report.html": "a page"}
    assert a.uids() == ["s-0000", "s-0001"]
    assert a.said == b.said == []


def test_what_the_store_has_as_before_is_not_read_again(a: Machine) -> None:
    for number in range(3):
        a.trial(number)
    a.send()
    Flaky.asked.clear()
    Machine(a.folder).bring()
    assert not [path for what, path in Flaky.asked if what == "read"]


def test_after_a_kill_this_machines_copy_is_the_newer(a: Machine) -> None:
    a.trial(0)
    a.send()
    a.trial(1)
    with (a.folder / "s" / "rows.jsonl").open("a") as file:
        file.write('{"uid": "s-00')  # torn
    before = a.files()
    again = Machine(a.folder)
    again.bring()
    assert again.files() == before
    again.send()
    assert STORE.read("s/rows.jsonl").decode().splitlines() == before["s/rows.jsonl"].splitlines()[:2]


def test_a_lost_index_changes_nothing(a: Machine) -> None:
    a.trial(0)
    a.send()
    a.trial(1)
    (a.folder / ".mirror" / "index.json").write_text('{"torn')
    before = a.files()
    again = Machine(a.folder)
    again.bring()
    assert again.files() == before
    assert again.send() == 2
    assert STORE.read("s/journal.log").decode() == before["s/journal.log"]


def test_two_ways_from_one_state_are_refused_and_nothing_is_touched(a: Machine, b: Machine) -> None:
    a.trial(0)
    a.send()
    b.bring()
    a.trial(1)
    b.trial(2)
    b.send()
    before, there = a.files(), STORE.listing()
    with pytest.raises(UserError, match=r"s went on both in .*move the latter away") as raised:
        a.bring()
    assert "\n" not in str(raised.value)
    assert a.files() == before
    with pytest.raises(TakenError, match=r"another machine wrote s/rows\.jsonl meanwhile"):
        a.send()
    assert STORE.listing() == there
    (a.folder / "s").rename(a.folder.parent / "away")
    a.bring()
    assert a.files() == b.files()


def test_rows_ahead_here_and_a_journal_ahead_there_are_two_ways_too(a: Machine, b: Machine) -> None:
    a.trial(0)
    a.send()
    b.bring()
    b.trial(1, row=False)
    b.send()
    a.append("rows.jsonl", {"uid": "s-c", "kind": "confirm"})
    with pytest.raises(UserError, match="went on both"):
        Machine(a.folder).bring()


def test_what_was_uploaded_and_is_gone_is_not_brought_back_to_life(a: Machine) -> None:
    a.trial(0)
    a.send()
    STORE.remove("s/rows.jsonl")
    with pytest.raises(UserError, match=r"no longer has s/rows.jsonl.*restore it there, or move"):
        Machine(a.folder).bring()
    (a.folder / "s").rename(a.folder.parent / "away")
    again = Machine(a.folder)
    again.bring()
    assert set(again.files()) == {"s/journal.log"}


@pytest.mark.parametrize("puts", range(5))
def test_a_kill_between_any_two_uploads_leaves_a_state_to_go_on_from(a: Machine, b: Machine, puts: int) -> None:
    """What the journal says is over has its row; what has a row is known to the journal."""
    a.trial(0)
    a.send()
    a.trial(1)
    a.trial(2, row=False)
    a.write("s/study.yaml", "trials: 3")
    done = 0

    def killed(what: str, _: str) -> None:
        nonlocal done
        done += what == "move"
        if done > puts:
            raise ConnectionError("killed")

    Flaky.fault = staticmethod(killed)
    if puts < 3:
        with pytest.raises(ObjectsAwayError):
            a.send()
    else:
        a.send()
    Flaky.fault = None
    b.bring()
    files = b.files()
    journal = [json.loads(line) for line in files["s/journal.log"].splitlines()]
    asked = {line["ask"]["uid"] for line in journal if "ask" in line}
    told = {f"s-{line['tell']:04d}" for line in journal if "tell" in line}
    assert told <= set(b.uids()) <= asked
    assert {"s-0000"} <= told
    assert b.said == (["s: 1 trials were uploaded in part only, and are run again."] if puts == 2 else [])
    again = Machine(a.folder)  # and where it was killed, nothing is lost
    again.bring()
    again.send()
    assert again.uids() == ["s-0000", "s-0001"]
    assert STORE.read("s/journal.log").decode() == a.files()["s/journal.log"]


def test_a_row_that_is_written_while_it_is_asked_what_changed_comes_before_its_journal(a: Machine, b: Machine) -> None:
    class Asked(Index):
        def is_here(self, name: str, path: Path) -> bool:
            answer = super().is_here(name, path)
            if name == "s/rows.jsonl" and len(a.uids()) == 1:
                a.append("rows.jsonl", {"uid": "s-0001", "kind": "search"})
                a.append("journal.log", {"tell": 1})
            return answer

    a.trial(0)
    a.send()
    a.trial(1, row=False)
    a.index = Asked(a.folder)
    a.send()
    b.bring()
    assert '{"tell": 1}' in b.files()["s/journal.log"]
    assert b.uids() == ["s-0000", "s-0001"]


def stopped_between_rows_and_journal(a: Machine, *numbers: int) -> None:
    """A has uploaded the rows of these further trials, and not the journal; it lives."""
    for number in numbers:
        a.trial(number)

    def away_now(what: str, path: str) -> None:
        if what == "move" and path.endswith("journal.log"):
            away(what, path)

    Flaky.fault = staticmethod(away_now)
    with pytest.raises(ObjectsAwayError):
        a.send()
    Flaky.fault = None


@pytest.mark.parametrize("use", ["reads", "writes"])
def test_a_row_that_came_before_its_journal_is_there_when_that_has_come(a: Machine, b: Machine, use: Use) -> None:
    a.trial(0)
    a.send()
    stopped_between_rows_and_journal(a, 1)
    b.bring(use)
    assert b.uids() == (["s-0000", "s-0001"] if use == "reads" else ["s-0000"])
    assert b.said == ([] if use == "reads" else ["s: 1 trials were uploaded in part only, and are run again."])
    assert a.send() == 1  # the journal
    with pytest.raises(TakenError):  # nothing is overwritten by what B has
        b.send()
    assert b"s-0001" in STORE.read("s/rows.jsonl")
    again = Machine(b.folder)
    again.bring()
    again.trial(2)
    again.send()
    assert [json.loads(line)["uid"] for line in STORE.read("s/rows.jsonl").splitlines()] == [
        f"s-{n:04d}" for n in range(3)
    ]
    assert again.files() == {name: STORE.read(name).decode() for name in again.files()}


def test_what_came_in_part_is_known_without_an_index_too(a: Machine, b: Machine) -> None:
    a.trial(0)
    a.send()
    stopped_between_rows_and_journal(a, 1)
    b.bring("reads")
    (b.folder / ".mirror" / "index.json").unlink()
    again = Machine(b.folder)
    again.bring()
    assert again.uids() == ["s-0000"]


@pytest.mark.parametrize("first", ["reads", "writes"])
@pytest.mark.parametrize("been_there", [True, False])
def test_what_came_in_part_is_run_again_by_who_goes_on(a: Machine, b: Machine, first: Use, been_there: bool) -> None:
    """Also a row before the last: ``s-0001`` ended while the journal was uploaded that knows s-0002 alone."""
    a.trial(0)
    a.append("journal.log", {"ask": {"uid": "s-0002"}})
    a.send()
    if been_there:
        b.bring(first)
    stopped_between_rows_and_journal(a, 1, 2)
    for use in (first, first, "reads", "writes"):
        b = Machine(b.folder)
        b.bring(use)
    assert b.uids() == ["s-0000", "s-0002"]
    assert set(b.said) == {"s: 1 trials were uploaded in part only, and are run again."}
    b.trial(1)
    b.send()
    c = Machine(b.folder.parent / "c")
    c.bring()
    assert c.uids() == ["s-0000", "s-0002", "s-0001"]
    assert c.said == []
    with pytest.raises(UserError, match="went on both"):
        a.bring()
    assert a.uids() == ["s-0000", "s-0001", "s-0002"]


def test_a_row_that_is_written_while_the_journal_is_uploaded_comes_with_the_next(a: Machine, b: Machine) -> None:
    a.trial(0)

    def meanwhile(*_: str) -> None:
        Flaky.fault = None
        a.trial(1)  # after the journal was read, before the rows are

    Flaky.fault = staticmethod(meanwhile)
    a.send()
    b.bring()
    assert b.uids() == ["s-0000"]
    assert a.send() == 2
    b.bring()
    assert b.uids() == ["s-0000", "s-0001"]


def test_what_is_delivered_is_removed_from_the_store_and_nothing_else_is(a: Machine) -> None:
    a.trial(0)
    a.write("spool/spool-k-1.jsonl", "{}\n")
    a.write("s/best.yaml", "rule: sparse")
    a.send()
    (a.folder / "spool" / "spool-k-1.jsonl").unlink()
    (a.folder / "s" / "best.yaml").unlink()
    a.send()
    assert set(STORE.listing()) == {"s/rows.jsonl", "s/journal.log", "s/best.yaml"}


def test_a_store_that_is_away_at_the_start_is_not_an_empty_one(a: Machine, b: Machine) -> None:
    a.trial(0)
    a.send()
    Flaky.fault = staticmethod(away)
    with pytest.raises(ObjectsAwayError):
        b.bring()
    Flaky.fault = None
    b.trial(7)  # begun anew, as if it had been empty
    with pytest.raises(TakenError):
        b.send()
    assert b"s-0000" in STORE.read("s/rows.jsonl")


def test_remains_of_killed_runs_are_swept(a: Machine) -> None:
    a.trial(0)
    a.send()
    for name in ("s-0000.pt", "s-0000.pt.1", "s-0001.pt", "control-1.pt"):
        STORE.put(f"s/checkpoints/{name}", b"")
    STORE.put("controls/rows.jsonl", b'{"uid": "control-1"}\n')
    STORE.put("s/rows.jsonl.0a1b2c3d.part", b"")
    sweep(STORE)
    assert {"s/checkpoints/s-0001.pt"} == {n for n in STORE.listing() if "checkpoints" in n or n.endswith(".part")}


@given(st.lists(st.sampled_from(['{"a": 1}\n', "{}\n", "[", "\n", '"é"\n', "\x00\n", '{"b":'])))
def test_whole_lines_are_a_beginning_that_ends_with_a_whole_line(parts: list[str]) -> None:
    data = "".join(parts).encode()
    whole = whole_lines(data)
    assert data.startswith(whole)
    assert whole == b"" or whole.endswith(b"\n")
    cut, newline, _ = data[len(whole) :].partition(b"\n")
    line = cut if newline else whole.split(b"\n")[-2] if whole else b"{}"  # what was cut off, or else is the last
    try:
        valid = json.loads(line) is not None
    except ValueError:
        valid = False
    assert valid is not bool(newline)


def test_books_come_first_then_rows_then_journals(a: Machine) -> None:
    a.trial(0)
    a.write("s/study.yaml", "x")
    a.write("s/report.html", "x")
    a.write("t/rows.jsonl", "{}\n")
    assert changed(a.folder, a.index) == [
        "s/study.yaml",
        "s/rows.jsonl",
        "t/rows.jsonl",
        "s/journal.log",
        "s/report.html",
    ]
