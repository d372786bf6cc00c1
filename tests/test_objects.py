"""Files on a store: whole or not there, an absent one told from an unreachable one, and errors of one line."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import objects
from bench.config import UserError
from bench.objects import ObjectFile, ObjectsAwayError, Store, child, discard, is_uri, remove_discarded, within
from flaky_store import Flaky, away


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    Flaky.reset()
    yield
    Flaky.reset()


@pytest.fixture(params=["file", "flaky"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path}/lab" if request.param == "file" else "fsspec+flaky://lab/x")


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("s3://b/lab", True),
        ("s3:/b", True),  # what is left of a URI that went through a Path: to be refused, not to be made a folder
        ("fsspec+memory://x", True),
        ("file:///x", True),
        ("results", False),
        ("/data/s3", False),
        ("../a:b/c", False),
        ("c:/x", False),
    ],
)
def test_a_uri_is_told_from_a_path(text: str, uri: bool) -> None:
    assert is_uri(text) is uri


def test_options_of_a_uri_stay_at_its_end() -> None:
    assert child("s3://b/lab?scheme=http", "s/x.pt") == "s3://b/lab/s/x.pt?scheme=http"
    assert child("s3://b/lab/", "s") == "s3://b/lab/s"
    assert child("results/what?", "s") == "results/what?/s"
    file = ObjectFile("s3://b/lab/s/x.pt?scheme=http")
    assert (file.name, file.store.uri) == ("x.pt", "s3://b/lab/s?scheme=http")
    assert file.numbered(2).uri == "s3://b/lab/s/x.pt.2?scheme=http"


def test_what_is_put_is_listed_read_replaced_and_removed(store: Store) -> None:
    assert store.listing() == {}
    store.put("s/rows.jsonl", b"one\n")
    store.put("s/deep/x", b"")
    first = store.version("s/rows.jsonl")
    time.sleep(0.02)
    store.put("s/rows.jsonl", memoryview(b"two\n"))
    assert store.read("s/rows.jsonl") == b"two\n"
    assert store.version("s/rows.jsonl") != first
    assert {n: v[0] for n, v in store.listing().items()} == {"s/rows.jsonl": 4, "s/deep/x": 0}
    assert set(store.listing("s", deep=False)) == {"s/rows.jsonl"}
    store.remove("s/rows.jsonl")
    store.remove("s/rows.jsonl")
    assert store.version("s/rows.jsonl") is None
    with pytest.raises(FileNotFoundError):
        store.read("s/rows.jsonl")


def test_a_put_that_fails_leaves_the_old_content(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("fsspec+flaky://lab/x")
    store.put("a", b"old")

    def broken(what: str, _: str) -> None:
        if what == "move":
            raise ConnectionResetError("reset")

    monkeypatch.setattr(Flaky, "fault", staticmethod(broken))
    with pytest.raises(ObjectsAwayError, match="reset"):
        store.put("a", b"new")
    assert store.read("a") == b"old"


def test_a_put_for_which_there_is_no_room_leaves_nothing(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/lab")
    store.put("s/a", b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        with pytest.raises(ObjectsAwayError, match="make room there") as raised:
            store.put("s/a", bytes(2**20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(raised.value)
    assert [path.name for path in (tmp_path / "lab" / "s").iterdir()] == ["a"]
    assert store.read("s/a") == b"old"


def test_what_cannot_be_asked_for_is_not_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("fsspec+flaky://lab/x")
    store.put("a", b"1")
    monkeypatch.setattr(Flaky, "fault", staticmethod(away))
    calls: list[Any] = [store.listing, lambda: store.read("a"), lambda: store.version("a"), lambda: store.put("a", b"")]
    for call in calls:
        with pytest.raises(ObjectsAwayError, match="connection refused") as raised:
            call()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("nosuch://x/y", "write s3://BUCKET/PATH"),
        ("s3:/lab", "write s3://BUCKET/PATH"),
        ("s3://", "names no bucket"),
        ("file:///", "names no bucket"),
        ("fsspec+nosuch://x", "write s3://BUCKET/PATH"),
        ("s3://key:secret@lab/x", "set it in the environment"),
    ],
)
def test_a_uri_that_cannot_work_is_refused_in_one_line(uri: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        Store(uri).check()
    assert not isinstance(raised.value, ObjectsAwayError)
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)


def test_a_store_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(Flaky, "fault", staticmethod(lambda *_: goes_on.wait(30)))
    monkeypatch.setattr(objects, "PATIENCE", 0.2)
    with pytest.raises(ObjectsAwayError, match="does not answer within"):
        within("fsspec+flaky://lab/x", Store("fsspec+flaky://lab/x").listing, objects.PATIENCE)
    goes_on.set()


def test_what_is_discarded_goes_with_its_numbered_files_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("fsspec+flaky://lab/x")
    for name in ("s-1.pt", "s-1.pt.1", "s-1.pt.12.ab.part", "s-1.ptx", "s-10.pt"):
        store.put(name, b"1")
    discard(ObjectFile("fsspec+flaky://lab/x/s-1.pt"))
    monkeypatch.setattr(Flaky, "fault", staticmethod(away))
    with pytest.raises(ObjectsAwayError):
        remove_discarded()
    monkeypatch.setattr(Flaky, "fault", None)
    remove_discarded()
    assert set(store.listing()) == {"s-1.ptx", "s-10.pt"}
    Flaky.asked.clear()
    remove_discarded()
    assert Flaky.asked == []
