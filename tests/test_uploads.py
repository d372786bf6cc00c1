"""Uploads that nobody waits for: the last state of each object, in order, and a word for what was not taken."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from bench.objects import ObjectFile, Store
from bench.uploads import Uploads
from flaky_store import Flaky, away

STORE = Store("fsspec+flaky://lab/x")
FILE = ObjectFile("fsspec+flaky://lab/x/a.pt")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    Flaky.reset()
    yield
    Flaky.reset()


@pytest.fixture
def said() -> list[str]:
    return []


def held(goes_on: threading.Event) -> None:
    """Writes wait from now on."""
    Flaky.fault = staticmethod(lambda what, _: goes_on.wait(30) if what == "write" else None)


def test_of_states_that_wait_only_the_last_is_uploaded(said: list[str]) -> None:
    uploads, goes_on = Uploads(said.append), threading.Event()
    held(goes_on)
    for epoch in range(1, 6):
        uploads.put(FILE, f"epoch {epoch}", str(epoch).encode())
    assert not uploads.settle(ObjectFile(FILE.uri), 0.05)  # it waits, though not for ever, and drops what has not begun
    assert len(said) == 1
    assert "ends without waiting for it" in said[0]
    for epoch in range(6, 9):
        uploads.put(FILE, f"epoch {epoch}", str(epoch).encode())
    goes_on.set()
    assert uploads.settle(FILE)
    assert STORE.read("a.pt") == b"8"
    assert 1 <= sum(what == "move" for what, _ in Flaky.asked) <= 3


def test_what_is_not_taken_is_said_and_the_next_is_tried(said: list[str]) -> None:
    uploads = Uploads(said.append)
    Flaky.fault = staticmethod(away)
    uploads.put(FILE, "epoch 1 of this run", b"1")
    assert uploads.settle(FILE)
    assert len(said) == 1
    assert said[0].startswith("epoch 1 of this run is not saved: ")
    Flaky.fault = None
    uploads.put(FILE, "epoch 2 of this run", b"2")
    assert uploads.settle(FILE)
    assert STORE.read("a.pt") == b"2"
    assert len(said) == 1


def test_an_error_of_another_kind_is_said_and_the_next_is_tried(said: list[str]) -> None:
    def gone(what: str, path: str) -> None:
        raise FileNotFoundError(f"no folder\n{path} ({what})")

    uploads = Uploads(said.append)
    Flaky.fault = staticmethod(gone)
    uploads.put(FILE, "epoch 1 of this run", b"1")
    assert uploads.settle(FILE)
    assert len(said) == 1
    assert said[0].startswith("epoch 1 of this run is not saved: ")
    assert "\n" not in said[0]
    Flaky.fault = None
    uploads.put(FILE, "epoch 2 of this run", b"2")
    assert uploads.settle(FILE)
    assert STORE.read("a.pt") == b"2"


def test_nothing_is_waited_for_where_nothing_is_under_way(said: list[str]) -> None:
    uploads, goes_on = Uploads(said.append), threading.Event()
    held(goes_on)
    uploads.put(FILE, "epoch 1", b"1")
    assert uploads.settle(ObjectFile(f"{FILE.uri}.1"), 0.0)
    goes_on.set()
    assert uploads.settle(FILE)
    assert said == []
