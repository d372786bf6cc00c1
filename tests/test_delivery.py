"""The queue to a store that is slow, away or unwilling: in order, nothing lost, nothing said twice."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import delivery
from bench import spool as spool_module
from bench.delivery import Delivery, Operation, UnreachableError
from bench.spool import LIMIT, Spool, survey


class Fake:
    """A store that can be away, can refuse, and remembers what it took."""

    def __init__(self) -> None:
        self.taken: list[Any] = []
        self.away = threading.Event()
        self.tries = 0
        self.marked: list[Any] = []

    def deliver(self, operation: Operation) -> None:
        self.tries += 1
        if self.away.is_set():
            raise UnreachableError("connection refused")
        if operation.get("bad"):
            raise ValueError("no such thing\nand more lines")
        self.taken.append(operation["n"])
        if operation.get("taken"):
            self.marked.append(operation["n"])


Open = Callable[[Fake], Delivery]


def spool(folder: Path, key: str = "key") -> Spool:
    return Spool(folder, key, "http://***@host")


def leave(folder: Path, lines: Iterable[str], key: str = "key") -> Path:
    """A spool file that a run left."""
    file = spool(folder, key).create("a study")
    for line in lines:
        file.append(line.encode())
    file.close()
    return file.path


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def open_delivery(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    monkeypatch.setattr(delivery, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(delivery, "LAST_WAIT", 0.05)
    opened: list[Delivery] = []

    def begin(store: Fake) -> Delivery:
        opened.append(Delivery(store.deliver, spool=spool(tmp_path), name="the store", say=said.append))
        return opened[-1]

    yield begin
    for one in opened:
        one.close(0)


def test_operations_arrive_in_order(open_delivery: Open) -> None:
    store = Fake()
    queue = open_delivery(store)
    for n in range(200):
        queue.put({"n": n})
    assert queue.flush(10)
    assert store.taken == list(range(200))
    assert queue.close(1) == 0


def test_an_operation_is_what_it_was_when_it_was_put(open_delivery: Open) -> None:
    store = Fake()
    store.away.set()
    queue = open_delivery(store)
    operation = {"n": [1]}
    queue.put(operation)
    operation["n"].append(2)
    store.away.clear()
    assert queue.flush(10)
    assert store.taken == [[1]]


def test_an_outage_is_said_once_and_ends_with_nothing_lost(open_delivery: Open, said: list[str]) -> None:
    store = Fake()
    queue = open_delivery(store)
    store.away.set()
    for n in range(5):
        queue.put({"n": n})
    assert not queue.flush(0.2)
    assert store.tries > 2
    store.away.clear()
    assert queue.flush(10)
    assert queue.close(1) == 0
    assert store.taken == [0, 1, 2, 3, 4]
    assert len(said) == 2
    assert "does not answer (connection refused)" in said[0]
    assert said[1] == "the store answers again."


def test_what_is_left_at_close_is_the_next_ones_first(open_delivery: Open, said: list[str], tmp_path: Path) -> None:
    store = Fake()
    store.away.set()
    first = open_delivery(store)
    for n in range(3):
        first.put({"n": n})
    assert first.close(0.1) == 3
    (kept,) = tmp_path.glob("spool-key-*.jsonl")
    assert "did not take 3 operations" in said[-1]
    assert str(kept) in said[-1]
    second = open_delivery(store)  # still away: they stay, in one file
    second.put({"n": 3})
    assert second.close(0.1) == 4
    assert [left.operations for left in survey(tmp_path)] == [3, 1]
    store.away.clear()
    third = open_delivery(store)
    third.put({"n": 4})
    assert third.flush(10)
    assert store.taken == [0, 1, 2, 3, 4]
    assert store.marked == [0, 1, 2, 3]
    third.close(1)
    assert not list(tmp_path.iterdir())


def test_the_spool_of_another_store_is_left_alone(open_delivery: Open, tmp_path: Path) -> None:
    other = leave(tmp_path, ['{"n": 99}'], "other")
    store = Fake()
    assert open_delivery(store).flush(10)
    assert store.taken == []
    assert other.exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from bench.delivery import Delivery, UnreachableError
from bench.spool import Spool

taken = []
def deliver(operation):
    if len(taken) == int(sys.argv[2]):
        raise UnreachableError("refused")
    taken.append(operation)

queue = Delivery(deliver, spool=Spool(Path(sys.argv[1]), "key", "http://host"), name="the store", say=lambda line: None)
for n in range(5000):
    queue.put({"n": n, "study": "a study"})
while len(taken) < int(sys.argv[2]):
    pass
print("put", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("before", [0, 1700])
def test_what_a_killed_driver_had_queued_is_the_next_ones_first(
    open_delivery: Open, tmp_path: Path, before: int
) -> None:
    """``before``: operations delivered before the store went away, of which at most the last one comes again."""
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(before)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "put\n"
        assert spool(tmp_path).take(pytest.fail) == [], "it is being delivered by a living process"
        assert [left.held for left in survey(tmp_path)] == [True]
        driver.kill()
    (left,) = survey(tmp_path)
    assert (left.held, left.key, left.study, left.store) == (False, "key", "a study", "http://host")
    store = Fake()
    again = open_delivery(store)
    assert again.flush(30)
    assert store.taken[-1] == 4999
    assert store.taken == store.marked == list(range(store.taken[0], 5000))
    assert before - 1 <= store.taken[0] <= before
    assert left.operations == len(store.taken)
    again.close(1)
    assert not list(tmp_path.iterdir())


def test_an_outage_is_as_long_as_the_disk_is_large_not_the_memory(open_delivery: Open, tmp_path: Path) -> None:
    store, size = Fake(), 2000
    queue = open_delivery(store)
    store.away.set()
    tracemalloc.start()
    for n in range(20 * LIMIT):
        queue.put({"n": n, "text": "x" * size})
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 2 * LIMIT * size
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 20 * LIMIT * size
    store.away.clear()
    assert queue.flush(30)
    assert store.taken == list(range(20 * LIMIT))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 200


def test_more_runs_left_something_than_are_taken_at_once(
    open_delivery: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "FILES", 3)
    for n in range(8):
        leave(tmp_path, [f'{{"n": {n}}}'])
    store = Fake()
    store.away.set()
    queue = open_delivery(store)
    queue.put({"n": 8})
    store.away.clear()
    assert queue.flush(10)
    assert store.taken == list(range(9))


@pytest.mark.parametrize("tail", [b'{"n": 2', b'{"n": 2}', b"\0" * 4096])
def test_a_line_that_was_not_written_to_its_end_is_cut_and_said(
    open_delivery: Open, said: list[str], tmp_path: Path, tail: bytes
) -> None:
    path = leave(tmp_path, ['{"n": 0}', '{"n": 1}'])
    with path.open("ab") as file:
        file.write(tail)
    store = Fake()
    assert open_delivery(store).flush(10)
    assert store.taken == [0, 1]
    assert said[0] == f"{path}: cut off its last line, which was not written to its end ({len(tail)} bytes)."


@pytest.mark.parametrize("damaged", ['{"n": ', "[1, 2]", "3", "null", "\0\0\0", '{"m": 1}', "é\udcff"])
def test_a_damaged_line_is_filed_and_the_rest_goes_on(open_delivery: Open, tmp_path: Path, damaged: str) -> None:
    path = leave(tmp_path, ['{"n": 0}', "?", '{"n": 2}'])
    path.write_bytes(path.read_bytes().replace(b"?", damaged.encode(errors="surrogateescape")))
    store = Fake()
    queue = open_delivery(store)
    assert queue.flush(10)
    assert store.taken == [0, 2]
    assert queue.rejected == 1
    (entry,) = (json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines())
    assert entry["error"]


@pytest.mark.parametrize("first", [b"", b"\n", b"{}\n", b"\0\0\0\n", b'{"delivered": "x"}\n', b'{"delivered": 3}\n'])
def test_a_file_whose_first_line_says_nothing_is_delivered_whole(
    open_delivery: Open, tmp_path: Path, first: bytes
) -> None:
    path = leave(tmp_path, ['{"n": 0}', '{"n": 1}'])
    path.write_bytes(first + path.read_bytes().partition(b"\n")[2])
    store = Fake()
    assert open_delivery(store).flush(10)
    assert store.taken == [0, 1]


def test_a_refused_operation_is_filed_and_said_and_the_rest_goes_on(
    open_delivery: Open, said: list[str], tmp_path: Path
) -> None:
    store = Fake()
    queue = open_delivery(store)
    for n in range(6):
        queue.put({"n": n, "bad": n < 5})
    assert queue.close(10) == 0
    assert store.taken == [5]
    entries = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [e["operation"]["n"] for e in entries] == [0, 1, 2, 3, 4]
    assert entries[0]["error"].startswith("ValueError: no such thing")
    assert "refused an operation (no such thing); it is kept in" in said[0]
    assert "refused 5 operations" in said[-1]
    assert len(said) == 4, "three refusals, then the count"


def test_ctrl_c_while_it_closes_still_spools(
    open_delivery: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Fake()
    store.away.set()
    queue = open_delivery(store)
    queue.put({"n": 7})

    def interrupted(timeout: float) -> bool:
        raise KeyboardInterrupt(timeout)

    monkeypatch.setattr(queue, "flush", interrupted)
    with pytest.raises(KeyboardInterrupt):
        queue.close(30)
    (kept,) = survey(tmp_path)
    assert (kept.operations, kept.held) == (1, False)
    assert kept.path.read_text().endswith('\n{"n": 7}\n')


def test_without_a_place_to_keep_it_all_is_delivered_from_memory(said: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Fake()
    store.away.set()
    queue = Delivery(store.deliver, spool=spool(tmp_path / "file"), name="the store", say=said.append)
    for n in range(3):
        queue.put({"n": n})
    full = [line for line in said if "cannot be kept" in line]
    assert len(full) == 1
    assert str(tmp_path / "file") in full[0]
    (tmp_path / "file").unlink()  # there is a place again: what is in memory goes there, in order
    queue.put({"n": 3})
    assert [left.operations for left in survey(tmp_path / "file")] == [4]
    store.away.clear()
    assert queue.flush(10)
    assert queue.close(1) == 0
    assert store.taken == [0, 1, 2, 3]


FULL = """
import resource, sys
from pathlib import Path
from bench.delivery import Delivery, UnreachableError
from bench.spool import Spool, survey

folder, size = Path(sys.argv[1]), 4096
def deliver(operation):
    raise UnreachableError("refused")

queue = Delivery(deliver, spool=Spool(folder, "key", "http://host"), name="the store", say=print)
resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
for n in range(100):
    queue.put({"n": n, "text": "x" * 100})
(file,) = folder.iterdir()
assert size - 150 < file.stat().st_size <= size and file.read_bytes().endswith(b"}\\n"), "whole lines"
if sys.argv[2] == "room":
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(queue.close(0))
"""


@pytest.mark.parametrize("again", ["room", "none"])
def test_a_disk_that_is_full_cuts_no_line_and_ends_nothing(open_delivery: Open, tmp_path: Path, again: str) -> None:
    """A file that may not grow: the last write is short, and the next ones are refused."""
    command = [sys.executable, "-c", FULL, str(tmp_path), again]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "100"
    assert sum("in memory alone until there is room" in line for line in lines) == 1
    (left,) = survey(tmp_path)
    lost = 100 - left.operations
    assert (lost == 0) is (again == "room")
    assert [line for line in lines if line.startswith(f"{lost} operations for the store could not be kept")] or not lost
    store = Fake()
    assert open_delivery(store).flush(10)
    assert store.taken == list(range(left.operations))


def test_what_nothing_keeps_is_counted_at_the_end_and_no_error(said: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Fake()
    store.away.set()
    queue = Delivery(store.deliver, spool=spool(tmp_path / "file"), name="the store", say=said.append)
    queue.put({"n": 1})
    assert queue.close(0) == 1
    assert said[-1].startswith("1 operations for the store could not be kept (")
    assert "bench sync" in said[-1]


def test_a_results_folder_that_vanished_is_said_at_the_end(said: list[str], tmp_path: Path) -> None:
    store = Fake()
    store.away.set()
    queue = Delivery(store.deliver, spool=spool(tmp_path / "gone"), name="the store", say=said.append)
    queue.put({"n": 1})
    shutil.rmtree(tmp_path / "gone")
    queue.put({"n": 2})
    assert queue.close(0) == 2
    assert said[-1].startswith("2 operations for the store could not be kept (")
    assert "was removed" in said[-1]


def test_an_operation_that_json_cannot_hold_is_refused_where_it_is_made(open_delivery: Open) -> None:
    queue = open_delivery(Fake())
    with pytest.raises(ValueError, match="not JSON compliant"):
        queue.put({"n": float("nan")})
    queue.close(1)
    with pytest.raises(RuntimeError, match="after close"):
        queue.put({"n": 1})
