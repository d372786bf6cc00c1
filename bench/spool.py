"""Operations on disk, on their way to a store: written before they are delivered, kept when their run is killed.

A file per run, ``spool-<key>-<time>.jsonl``: a first line, which says what store and study it is of and how far it
is delivered, and an operation a line. Whoever appends to a file, or delivers it, holds its lock. One without a lock
was left by a run that ended before its store had taken everything.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

Say = Callable[[str], None]

#: So many operations of a file are in memory at most; so many files are taken over at a time.
LIMIT, FILES = 1000, 100

#: What a store refused for good, each with its reason.
REJECTED = "rejected.jsonl"

#: Characters of the number, in the first line, of bytes that are delivered.
_DIGITS = 15


@dataclass(frozen=True, kw_only=True)
class Left:
    """A spool file as it lies there. ``key`` names its store; ``store`` and ``study``: None if it does not say.

    ``held``: a living run has it. ``operations``: those that are not delivered.
    """

    path: Path
    key: str
    store: str | None
    study: str | None
    operations: int
    held: bool


def survey(folder: Path) -> list[Left]:
    """All spool files, oldest first; none is changed, or taken."""
    found = (_look(path) for path in sorted(folder.glob("spool-*-*.jsonl")))
    return [left for left in found if left is not None]


def _look(path: Path) -> Left | None:
    """None if it went away meanwhile, or is another user's."""
    try:
        with path.open("rb") as file:
            held = not _locked(file.fileno(), fcntl.LOCK_SH)
            head, _, begin = _head(file.fileno())
            file.seek(begin)
            operations = sum(line.endswith(b"\n") for line in file)
    except (FileNotFoundError, PermissionError):
        return None
    key = path.name.removeprefix("spool-").rpartition("-")[0]
    return Left(path=path, key=key, store=head.get("store"), study=head.get("study"), operations=operations, held=held)


def _locked(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Whether the lock could be had; it is held from then on."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _head(descriptor: int) -> tuple[dict[str, Any], int, int]:
    """What the first line says, where it ends, and where the first operation begins that is not delivered.

    Of a file without such a line everything is to be delivered; of one that was cut in the middle of a line, too.
    """
    start = os.pread(descriptor, 2**16, 0)
    line, newline, _ = start.partition(b"\n")
    try:
        head = json.loads(line)
    except (ValueError, RecursionError):
        head = None
    if not (newline and isinstance(head, dict) and isinstance(head.get("delivered"), int)):
        return {}, 0, 0
    if not all(isinstance(head.get(name), str | None) for name in ("store", "study")):
        return {}, 0, 0
    first, begin = len(line) + 1, head["delivered"]
    whole = first <= begin <= os.fstat(descriptor).st_size and os.pread(descriptor, 1, begin - 1) == b"\n"
    return head, first, begin if whole else first


class SpoolFile:
    """One file, locked by us until `close`: operations are appended at its end and delivered from its head."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        #: operations that are not delivered
        self.left = 0
        self._descriptor = descriptor
        head, self._first, self._done = _head(descriptor)
        self._marked = bool(head)
        self._read = self._end = self._done  # up to where it is in memory, and where it ends
        self._loaded: deque[bytes] = deque()

    @classmethod
    def create(cls, path: Path, about: dict[str, Any]) -> Self | None:
        """A new file; None if another process has helped itself to the name, which it may for a moment."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            if not (_locked(descriptor) and _is_there(path, descriptor)):
                os.close(descriptor)
                return None
            empty = json.dumps({**about, "delivered": 0})[:-2]
            text = f"{empty}{len(empty) + _DIGITS + 2:>{_DIGITS}}}}\n"
            _write(descriptor, text.encode(), 0)
        except OSError:
            path.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        return cls(path, descriptor)

    @classmethod
    def take(cls, path: Path, say: Say) -> Self | None:
        """The file of a run that is gone; None if it is not, or another process has taken it."""
        descriptor = os.open(path, os.O_RDWR)
        if not (_locked(descriptor) and _is_there(path, descriptor)):
            os.close(descriptor)
            return None
        file = cls(path, descriptor)
        file._count(say)
        return file

    def _count(self, say: Say) -> None:
        """Learn what there is; cut off a last line that was not written to its end: a killed writer's."""
        with self._reader(self._done) as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    say(f"{self.path}: cut off its last line, which was not written to its end ({len(line)} bytes).")
                    os.ftruncate(self._descriptor, self._end)
                    return
                self._end += len(line)
                self.left += 1

    @contextlib.contextmanager
    def _reader(self, begin: int) -> Iterator[Iterator[bytes]]:
        with open(self._descriptor, "rb", closefd=False) as file:
            file.seek(begin)
            yield file

    def append(self, line: bytes) -> None:
        """The whole line, or nothing of it: OSError."""
        _write(self._descriptor, line + b"\n", self._end)
        if self._read == self._end and len(self._loaded) < LIMIT:
            self._loaded.append(line)
            self._read += len(line) + 1
        self._end += len(line) + 1
        self.left += 1

    def head(self) -> bytes:
        """The oldest operation, of which there must be one; OSError if it cannot be read back."""
        if not self._loaded:
            with self._reader(self._read) as lines:
                self._loaded.extend(line.removesuffix(b"\n") for line in itertools.islice(lines, LIMIT))
            self._read += sum(len(line) + 1 for line in self._loaded)
            if not self._loaded:
                raise OSError(errno.EIO, f"{self.path} became shorter while it was in use")
        return self._loaded[0]

    def advance(self) -> None:
        """The oldest operation is delivered."""
        self._done += len(self._loaded.popleft()) + 1
        self.left -= 1
        with contextlib.suppress(OSError):  # then they are delivered once more, which changes nothing
            if self.left == 0:
                os.ftruncate(self._descriptor, self._first)
                self._done = self._read = self._end = self._first
            if self._marked:
                os.pwrite(self._descriptor, f"{self._done:>{_DIGITS}}".encode(), self._first - _DIGITS - 2)

    def close(self) -> bool:
        """Let go of the file, and remove it if it is delivered; False if what is left of it is not there any more."""
        try:
            there = _is_there(self.path, self._descriptor)
            if there and self.left == 0:
                self.path.unlink(missing_ok=True)
            elif there:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
        return there or self.left == 0


def _write(descriptor: int, text: bytes, place: int) -> None:
    """All of it, or nothing and an OSError."""
    if os.pwrite(descriptor, text, place) < len(text):
        os.ftruncate(descriptor, place)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _is_there(path: Path, descriptor: int) -> bool:
    """Whether the path still leads to the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except (FileNotFoundError, NotADirectoryError):
        return False


class Spool:
    """The files of one store in a folder. ``key`` is part of their names; ``store`` is what the user calls it."""

    def __init__(self, folder: Path, key: str, store: str) -> None:
        self.folder = folder
        self._key = key
        self._store = store

    def take(self, say: Say) -> list[SpoolFile]:
        """Files that no living run has, oldest first: not more than `FILES`. Ours until they are closed."""
        taken: list[SpoolFile] = []
        for path in sorted(self.folder.glob(f"spool-{self._key}-*.jsonl")):
            if len(taken) == FILES:
                break
            try:
                file = SpoolFile.take(path, say)
            except FileNotFoundError:  # delivered meanwhile, by somebody else
                continue
            except OSError as error:
                say(f"{path} cannot be delivered: {error.strerror}; permit it, then run bench sync.")
                continue
            if file is not None:
                taken.append(file)
        return taken

    def create(self, study: str | None) -> SpoolFile:
        """A new file, for operations of this study; OSError if there can be none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"store": self._store, "study": study}
        while True:
            file = SpoolFile.create(self.folder / f"spool-{self._key}-{time.time_ns()}.jsonl", about)
            if file is not None:
                return file

    def reject(self, line: bytes, error: Exception) -> Path:
        """File an operation that will never be taken, with the reason."""
        try:
            operation = json.loads(line)
        except (ValueError, RecursionError):
            operation = line.decode(errors="replace")
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / REJECTED
        entry = {"error": f"{type(error).__name__}: {error}", "operation": operation}
        with path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        return path


class Backlog:
    """First in, first out: what runs that are gone left, then our own. It lies on disk, and has `LIMIT` in memory.

    Not for two threads at once.
    """

    def __init__(self, spool: Spool, say: Say) -> None:
        self._spool = spool
        self._say = say
        self._taken = deque(spool.take(say))
        self._own: SpoolFile | None = None
        self._study: str | None = None
        self._unwritten: deque[bytes] = deque()  # what the disk has not taken; younger than all that it has

    def __len__(self) -> int:
        own = 0 if self._own is None else self._own.left
        return sum(file.left for file in self._taken) + own + len(self._unwritten)

    def append(self, line: bytes, study: str | None) -> None:
        """Add a line, of this study. OSError if it cannot be written: then it is in memory alone."""
        self._study = study
        self._unwritten.append(line)
        self._write()

    def _write(self) -> None:
        if self._unwritten and self._own is None:
            self._own = self._spool.create(self._study)
        while self._unwritten and self._own is not None:
            self._own.append(self._unwritten[0])
            self._unwritten.popleft()

    def head(self) -> tuple[bytes, bool]:
        """The oldest line, of which there must be one, and whether it is of an earlier run; OSError as it is read."""
        while self._taken:
            if self._taken[0].left:
                return self._taken[0].head(), True
            self._next_taken()
        if self._own is not None and self._own.left:
            return self._own.head(), False
        return self._unwritten[0], False

    def advance(self) -> None:
        """The oldest line is delivered."""
        if self._taken:
            self._taken[0].advance()
            if not self._taken[0].left:
                self._next_taken()
        elif self._own is not None and self._own.left:
            self._own.advance()
        else:
            self._unwritten.popleft()

    def _next_taken(self) -> None:
        with contextlib.suppress(OSError):  # that an empty file cannot be removed does no harm
            self._taken.popleft().close()
        if not self._taken:
            self._taken.extend(self._spool.take(self._say))

    def close(self) -> tuple[list[Path], int, OSError | None]:
        """Let go of the files: those that keep something, how many lines nothing keeps, and why."""
        failure, lost = None, 0
        try:
            self._write()  # there may be room again
        except OSError as error:
            failure, lost = error, len(self._unwritten)
        kept = []
        for file in (*self._taken, *(() if self._own is None else (self._own,))):
            try:
                there = file.close()
            except OSError as error:
                there, failure = True, error
            if not there:
                lost, failure = lost + file.left, FileNotFoundError(errno.ENOENT, f"{file.path} was removed")
            elif file.left:
                kept.append(file.path)
        return kept, lost, failure
