"""A working copy of results on a store, as commands have it: machines in turn, kills, outages, leases."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from bench import lease
from bench.config import UserError
from bench.lease import Lease, TakenError
from bench.mirror import copy_of, working_copy
from bench.objects import Store
from flaky_store import Flaky, away, on, quick, said

__all__ = ["on", "quick", "said"]  # fixtures

URI = "fsspec+flaky://lab/x"
STORE = Store(URI)
ROW = '{"uid": "s-c1", "kind": "confirm"}\n'


def until(true: Callable[[], Any], seconds: float = 20.0) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "it does not come about"
        time.sleep(0.005)


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a") as file:
        file.write(text)


def there(name: str) -> str:
    return STORE.read(name).decode() if STORE.version(name) else ""


# --- one machine after the other -------------------------------------------------------------------------


def test_what_changes_is_uploaded_while_work_goes_on(on: Callable[[str], None], said: list[str]) -> None:
    on("a")
    with working_copy(URI, "writes", say=said.append) as copy:
        write(copy.folder, "s/rows.jsonl", ROW)
        until(lambda: there("s/rows.jsonl") == ROW)
        write(copy.folder, "s/rows.jsonl", ROW.replace("c1", "c2"))
        until(lambda: there("s/rows.jsonl") == ROW + ROW.replace("c1", "c2"))
        write(copy.folder, "s/best.yaml", "at the end")
    assert there("s/best.yaml") == "at the end"
    assert set(STORE.listing()) == {"s/rows.jsonl", "s/best.yaml"}  # and no lease
    assert said == [f"{URI}: its working copy is {copy_of(URI)}.", f"results: {URI}"]
    on("b")
    with working_copy(URI, "reads", say=said.append) as copy:
        assert (copy.folder / "s" / "best.yaml").read_text() == "at the end"
        assert "b/bench/results" in str(copy.folder)
    assert len(said) == 2


def test_an_outage_holds_nothing_up_and_is_said_once(on: Callable[[str], None], said: list[str]) -> None:
    on("a")
    with working_copy(URI, "writes", say=said.append) as copy:
        Flaky.fault = staticmethod(away)
        Flaky.asked.clear()
        write(copy.folder, "s/rows.jsonl", ROW)
        until(lambda: len(Flaky.asked) > 5)
        assert len(said) == 2
        assert "connection refused" in said[1]
        assert "The run goes on, and what it finds is uploaded later." in said[1]
        Flaky.fault = None
        until(lambda: there("s/rows.jsonl") == ROW)
        until(lambda: len(said) == 3)
    assert said[2:] == [f"{URI} takes what is uploaded again.", f"results: {URI}"]


def test_what_was_not_uploaded_is_said_and_goes_on_with_the_next_start(
    on: Callable[[str], None], said: list[str]
) -> None:
    on("a")
    with working_copy(URI, "writes", say=said.append) as copy:
        Flaky.fault = staticmethod(away)
        write(copy.folder, "s/rows.jsonl", ROW)
        write(copy.folder, "s/study.yaml", "x")
    assert said[-1].startswith(f"2 files are not uploaded to {URI} yet, and kept in {copy.folder}; the same command")
    assert "\n" not in said[-1]
    Flaky.fault = None
    with working_copy(URI, "writes", say=said.append):
        pass
    assert there("s/rows.jsonl") == ROW
    assert said[-1] == f"results: {URI}"


def test_a_start_while_the_store_is_away_is_refused_and_leaves_nothing(
    on: Callable[[str], None], said: list[str]
) -> None:
    on("a")
    Flaky.fault = staticmethod(away)
    with pytest.raises(UserError, match="connection refused") as raised, working_copy(URI, "writes", say=said.append):
        pass
    assert "\n" not in str(raised.value)
    assert said == []
    assert not copy_of(URI).exists()


def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(
    on: Callable[[str], None], said: list[str]
) -> None:
    def read_only(what: str, _: str) -> None:
        if what == "write":
            raise PermissionError("Access Denied")

    on("a")
    Flaky.fault = staticmethod(read_only)
    with pytest.raises(UserError, match="set the credentials"), working_copy(URI, "writes", say=said.append):
        pass
    with working_copy(URI, "reads", say=said.append):  # that is enough for a report
        pass
    assert said == []


def test_where_no_copy_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="XDG_CACHE_HOME"), working_copy(URI, "writes"):
        pass


def test_one_place_has_one_copy(on: Callable[[str], None]) -> None:
    on("a")
    assert copy_of("s3://b/lab") == copy_of("s3://b/lab/") != copy_of("s3://b/lab2")
    assert copy_of("s3://b/lab?scheme=http") == copy_of("s3://b/lab/?scheme=http") != copy_of("s3://b/lab")


# --- two machines at once --------------------------------------------------------------------------------


def test_a_second_machine_is_refused_until_the_lease_lapses(
    on: Callable[[str], None], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on("a")
    Lease(STORE, "of a machine that was killed").take()
    with pytest.raises(TakenError, match="in use by bench on another machine") as raised, working_copy(URI, "writes"):
        pass
    assert "\n" not in str(raised.value)
    with working_copy(URI, "reads"):  # a report disturbs nobody
        pass
    monkeypatch.setattr(lease, "STALE", 0.0)
    with working_copy(URI, "writes", say=said.append):
        pass
    assert said[-1] == f"results: {URI}"


def test_who_was_killed_goes_on_at_once(on: Callable[[str], None], said: list[str]) -> None:
    on("a")
    with working_copy(URI, "writes", say=said.append) as copy:
        owner = (copy.folder / ".mirror" / "owner").read_text()
    Lease(STORE, owner).take()  # and never released
    with working_copy(URI, "writes", say=said.append):
        pass


def test_of_two_that_take_a_lease_at_once_the_overwritten_one_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Lease(STORE, "a"), Lease(STORE, "b")

    def between(_: float) -> None:
        monkeypatch.setattr(time, "sleep", lambda _: None)
        STORE.put(lease.NAME, json.dumps({"owner": "b", "host": "b"}).encode())

    monkeypatch.setattr(time, "sleep", between)
    with pytest.raises(TakenError):
        first.take()
    second.take()
    second.release()
    assert lease.NAME not in STORE.listing()


@pytest.mark.parametrize("over", [True, False], ids=["and is gone", "and is there"])
def test_a_machine_that_lost_its_lease_uploads_nothing_more(
    on: Callable[[str], None], said: list[str], monkeypatch: pytest.MonkeyPatch, over: bool
) -> None:
    """It stood still for longer than a lease lasts, and another one went on from what it had uploaded."""
    on("a")
    with working_copy(URI, "writes", say=said.append) as copy:
        write(copy.folder, "s/rows.jsonl", ROW)
        until(lambda: there("s/rows.jsonl") == ROW)
        STORE.put(lease.NAME, json.dumps({"owner": "another", "host": "b"}).encode())
        if over:
            STORE.remove(lease.NAME)
        monkeypatch.setattr(lease, "RENEWED", 0.0)
        until(lambda: len(said) == 2)
        write(copy.folder, "s/rows.jsonl", ROW.replace("c1", "c2"))
    assert "was taken over by" in said[1]
    assert "not uploaded" in said[-1]
    assert there("s/rows.jsonl") == ROW
    assert (lease.NAME in STORE.listing()) is not over


# --- several processes of one machine --------------------------------------------------------------------


def test_the_first_process_uploads_for_all_and_the_next_inherits(on: Callable[[str], None]) -> None:
    on("a")
    first_said: list[str] = []
    second_said: list[str] = []
    with ExitStack() as second:
        with working_copy(URI, "writes", say=first_said.append):
            copy = second.enter_context(working_copy(URI, "writes", say=second_said.append))
            assert "another bench on this machine has it open, too" in second_said[0]
            write(copy.folder, "s/rows.jsonl", ROW)
            until(lambda: there("s/rows.jsonl") == ROW)
            with working_copy(URI, "reads") as reader:
                assert (reader.folder / "s" / "rows.jsonl").read_text() == ROW
        assert lease.NAME in STORE.listing()  # it is the second's now
        write(copy.folder, "s/rows.jsonl", ROW.replace("c1", "c2"))
        until(lambda: there("s/rows.jsonl").count("\n") == 2)
    assert lease.NAME not in STORE.listing()
    assert [first_said[-1], second_said[-1]] == [f"results: {URI}"] * 2


# --- killed ----------------------------------------------------------------------------------------------

WRITER = """
import json, sys, time
from bench import lease, mirror
mirror.BEAT, mirror.REST, lease.SETTLE = 0.005, 0.0, 0.0
def append(name, line):
    with (folder / name).open("a") as file:
        file.write(json.dumps(line) + "\\n")
with mirror.working_copy(sys.argv[1], "writes") as copy:
    folder = copy.folder / "s"
    folder.mkdir(exist_ok=True)
    rows = folder / "rows.jsonl"
    begin = rows.read_text().count("\\n") if rows.exists() else 0
    for number in range(begin, 10**6):
        uid = f"s-{number:04d}"
        append("journal.log", {"ask": uid})
        time.sleep(0.002)
        append("rows.jsonl", {"uid": uid, "kind": "search"})
        append("journal.log", {"tell": uid})
        print(number, flush=True)
"""


def killed_writer(uri: str, home: Path, trials: int) -> None:
    """A process that makes so many trials and is then killed, wherever it is."""
    command = [sys.executable, "-c", WRITER, uri]
    environment = {**os.environ, "XDG_CACHE_HOME": str(home)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as made:
        assert made.stdout is not None
        for _ in range(trials):
            assert made.stdout.readline(), made.stderr.read() if made.stderr else ""
        made.send_signal(signal.SIGKILL)


def test_killed_at_any_moment_both_machines_have_a_state_to_go_on_from(
    tmp_path: Path, on: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four kills: the machine that was killed has lost nothing, another has the row of what is over."""
    uri = f"file://{tmp_path}/store"
    monkeypatch.setattr(lease, "STALE", 0.0)
    made = 0
    for kill in range(4):
        killed_writer(uri, tmp_path / "a", 20 + 7 * kill)
        rows = (tmp_path / "a").glob("bench/results/*/s/rows.jsonl")
        uids = [json.loads(line)["uid"] for path in rows for line in path.read_text().splitlines()]
        assert uids == [f"s-{n:04d}" for n in range(len(uids))]
        assert len(uids) >= made + 20
        made = len(uids)
        on(f"other-{kill}")
        with working_copy(uri, "reads") as copy:
            journal = [json.loads(line) for line in (copy.folder / "s" / "journal.log").read_text().splitlines()]
            known = {json.loads(line)["uid"] for line in (copy.folder / "s" / "rows.jsonl").read_text().splitlines()}
        assert {e["tell"] for e in journal if "tell" in e} <= known
        assert len(known) > made / 2  # a beat is short against the run
    on("a")
    with working_copy(uri, "writes"):
        pass
    on("b")
    with working_copy(uri, "reads") as copy:
        assert len((copy.folder / "s" / "rows.jsonl").read_text().splitlines()) == made


def test_the_mirror_speaks_where_it_is_told_to(on: Callable[[str], None], said: list[str]) -> None:
    on("a")
    elsewhere: list[str] = []
    with working_copy(URI, "writes", say=said.append) as copy:
        with copy.heard_by(elsewhere.append):
            Flaky.fault = staticmethod(away)
            write(copy.folder, "s/rows.jsonl", ROW)
            until(lambda: elsewhere)
        Flaky.fault = None
    assert "uploaded later" in elsewhere[0]
    assert said[-1] == f"results: {URI}"
