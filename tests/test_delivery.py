"""The queue to a store that is slow, away or unwilling: in order, nothing lost, nothing said twice."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import delivery
from bench.config import UserError
from bench.delivery import Delivery, Operation, Spool, UnreachableError


class Fake:
    """A store that can be away, can refuse, and remembers what it took."""

    def __init__(self) -> None:
        self.taken: list[Any] = []
        self.away = threading.Event()
        self.tries = 0

    def deliver(self, operation: Operation) -> None:
        self.tries += 1
        if self.away.is_set():
            raise UnreachableError("connection refused")
        if operation.get("bad"):
            raise ValueError("no such thing\nand more lines")
        self.taken.append(operation["n"])


Open = Callable[[Fake], Delivery]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def open_delivery(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    monkeypatch.setattr(delivery, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(delivery, "LAST_WAIT", 0.05)
    opened: list[Delivery] = []

    def begin(store: Fake) -> Delivery:
        opened.append(Delivery(store.deliver, spool=Spool(tmp_path, "key"), name="the store", say=said.append))
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
    assert len(list(tmp_path.glob("spool-*"))) == 1
    store.away.clear()
    third = open_delivery(store)
    third.put({"n": 4})
    assert third.flush(10)
    assert store.taken == [0, 1, 2, 3, 4]
    assert not list(tmp_path.glob("spool-*"))


def test_the_spool_of_another_store_is_left_alone(open_delivery: Open, tmp_path: Path) -> None:
    other = Spool(tmp_path, "other").keep(['{"n": 99}'])
    store = Fake()
    assert open_delivery(store).flush(10)
    assert store.taken == []
    assert other is not None
    assert other.exists()


def test_a_spool_that_another_process_delivers_is_left_to_it(tmp_path: Path) -> None:
    Spool(tmp_path, "key").keep(['{"n": 1}'])
    code = "import sys; from pathlib import Path; from bench.delivery import Spool;"
    code += "s = Spool(Path(sys.argv[1]), 'key'); print(len(s.take()), flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "1\n"
        assert Spool(tmp_path, "key").take() == []
        other.kill()  # it did not deliver them: they are to be had again
    again = Spool(tmp_path, "key")
    assert again.take() == ['{"n": 1}']
    again.keep([])
    assert not list(tmp_path.iterdir())


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
    (kept,) = tmp_path.glob("spool-key-*.jsonl")
    assert kept.read_text() == '{"n": 7}\n'


def test_what_cannot_be_kept_is_an_error(said: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Fake()
    store.away.set()
    queue = Delivery(store.deliver, spool=Spool(tmp_path / "file", "key"), name="the store", say=said.append)
    queue.put({"n": 1})
    with pytest.raises(UserError, match="1 operations for the store are lost"):
        queue.close(0)


def test_an_operation_that_json_cannot_hold_is_refused_where_it_is_made(open_delivery: Open) -> None:
    queue = open_delivery(Fake())
    with pytest.raises(ValueError, match="not JSON compliant"):
        queue.put({"n": float("nan")})
    queue.close(1)
    with pytest.raises(RuntimeError, match="after close"):
        queue.put({"n": 1})
