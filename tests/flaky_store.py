"""A store in memory, as fsspec+flaky://PLACE, that can be away, and writes down what it is asked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from bench import lease, mirror


class Flaky(MemoryFileSystem):
    """``fault``: called with each operation and path; what it raises is the store's answer."""

    protocol = "flaky"
    cachable = False
    store: dict[str, Any] = {}  # noqa: RUF012  (fsspec's own way: one for all instances)
    pseudo_dirs = [""]  # noqa: RUF012
    fault: Callable[[str, str], None] | None = None
    asked: list[tuple[str, str]] = []  # noqa: RUF012
    _one_at_a_time = threading.RLock()

    @classmethod
    def reset(cls) -> None:
        cls.store, cls.pseudo_dirs, cls.fault, cls.asked = {}, [""], None, []

    def _ask(self, what: str, path: str) -> None:
        type(self).asked.append((what, path))
        if type(self).fault is not None:
            type(self).fault(what, path)

    def info(self, path: str, **options: Any) -> Any:
        self._ask("info", path)
        with self._one_at_a_time:
            return self._timed(super().info(path, **options))

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self._ask("ls", path)
        with self._one_at_a_time:
            found = super().ls(path, detail=detail, **options)
            return [self._timed(each) for each in found] if detail else found

    def find(self, path: str, maxdepth: int | None = None, withdirs: bool = False, **options: Any) -> Any:
        self._ask("list", path)
        with self._one_at_a_time:
            found = super().find(path, maxdepth=maxdepth, withdirs=withdirs, **options)
            return {name: self._timed(each) for name, each in found.items()} if options.get("detail") else found

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        self._ask("write" if "w" in mode else "read", path)
        with self._one_at_a_time:
            found = super().open(path, mode, **options)
            if isinstance(found, MemoryFile) and "r" in mode:  # a reader has the object as it was
                return fsspec.implementations.memory.BytesIO(found.getvalue())
            return found

    def mv(self, path1: str, path2: str, **options: Any) -> None:
        self._ask("move", path2)
        with self._one_at_a_time:
            super().mv(path1, path2, **options)
            self.store[self._strip_protocol(path2)].created = datetime.now(tz=UTC)

    def rm_file(self, path: str) -> None:
        self._ask("remove", path)
        with self._one_at_a_time:
            super().rm_file(path)

    def _timed(self, info: dict[str, Any]) -> dict[str, Any]:
        written = info.get("created")
        if written is None:
            return info
        return {**info, "mtime": written if isinstance(written, float) else written.timestamp()}


fsspec.register_implementation("flaky", Flaky, clobber=True)


def away(what: str, path: str) -> None:
    """A fault: nothing answers."""
    raise ConnectionError(f"connection refused ({what} {path})")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The store is empty, and nothing waits for it."""
    monkeypatch.setattr(mirror, "BEAT", 0.01)
    monkeypatch.setattr(mirror, "REST", 0.0)
    monkeypatch.setattr(lease, "SETTLE", 0.0)
    Flaky.reset()
    yield
    Flaky.reset()


@pytest.fixture
def on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Work on this machine from now on."""
    return lambda name: monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))


@pytest.fixture
def said() -> list[str]:
    return []
