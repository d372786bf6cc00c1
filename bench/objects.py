"""Files on an object store, by URI: whatever the filesystems of pyarrow reach, which are Ray's too.

s3://BUCKET/PATH, gs://, abfs://, hdfs://, file:///PATH, and with fsspec's packages fsspec+PROTOCOL://. Options follow a
question mark (s3://b/lab?endpoint_override=HOST:PORT&scheme=http). Credentials come from the environment, as every
tool of that store reads them; never from the URI, which others see. pyarrow is imported when a URI is first opened.
"""

from __future__ import annotations

import functools
import re
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from bench.config import UserError

T = TypeVar("T")

#: An object's size in bytes, and when it was written, in ns; None where the store does not say.
Version = tuple[int, int | None]

#: Seconds in which a store must answer when it is first asked: some of pyarrow's clients try again for a quarter hour.
PATIENCE = 15.0

#: Stores on which a new object appears when it is whole, and not before. Elsewhere it is written beside, and renamed.
_WHOLE_OR_NOT_THERE = ("s3", "gcs")
#: Stores without folders.
_FLAT = ("s3", "gcs")

#: A request is given up after so many seconds without a byte, and tried three times: by default 100 s in all, for which
#: a process cannot end either. A small object is one request: else three, and remains of those that are killed between.
_S3 = {"connect_timeout": 3.0, "request_timeout": 6.0, "allow_delayed_open": True}

_SCHEMES = "s3://BUCKET/PATH, gs://…, abfs://…, hdfs://…, file:///PATH, or fsspec+PROTOCOL://…"
#: What the words of the many clients mean, and whether a later try may end otherwise; the first that fits.
_MEANINGS: tuple[tuple[str, str, bool], ...] = (
    (r"unrecognized filesystem|protocol not known|relative|missing bucket|invalid uri", f"write {_SCHEMES}", False),
    (r"\binstall\b|no module named|libjvm|libhdfs", "install what it names, or use another store", False),
    (r"no_?such_?bucket|bucket does not exist|bucket .*not found", "make the bucket first, or correct its name", False),
    (r"no space|\berrno 2[78]\b|quota|read-only", "make room there, or have it permitted to write", True),
    (
        r"access[_ ]?denied|forbidden|credential|signature|invalid_?access_?key|unauthori[sz]ed|unauthenticated|"
        r"permission|\b40[13]\b",
        "set the credentials of that store in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
        "AWS_PROFILE; GOOGLE_APPLICATION_CREDENTIALS), and permit them to read and write there",
        False,
    ),
    (r"", "check its address and the network, and try again", True),
)


class ObjectsAwayError(UserError):
    """The store does not answer now, but may later."""


def is_uri(text: str) -> bool:
    """Whether this names a store (s3://…), and no path of this machine."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text) is not None


def child(uri: str, name: str) -> str:
    """The URI, or the path, of what lies under another one; a URI's options stay at the end."""
    base, mark, options = uri.partition("?") if is_uri(uri) else (uri, "", "")
    return f"{base.rstrip('/')}/{name}{mark}{options}"


@dataclass(frozen=True)
class Store:
    """A folder on a store. Names are relative to it, with / between; a missing one is a FileNotFoundError.

    Every other error is a UserError of one line: `ObjectsAwayError` if a later try may end otherwise.
    """

    uri: str

    def check(self) -> None:
        """UserError, within `PATIENCE` seconds, if it cannot be opened and listed."""
        if re.search(r"//[^/@]*:[^/@]*@", self.uri):
            raise UserError(
                "--results: a URI must hold no password, which others would see: set it in the environment."
            )
        within(self.uri, lambda: self.listing(deep=False))

    def listing(self, under: str = "", *, deep: bool = True) -> dict[str, Version]:
        """All files under this name (a folder; empty: all), by name."""
        from pyarrow import fs

        with self._translated():
            filesystem, root = _opened(self.uri)
            base = f"{root}/{under}".rstrip("/")
            filesystem.get_file_info(base)  # fsspec takes a folder that it cannot ask for one that is not there
            found = filesystem.get_file_info(fs.FileSelector(base, recursive=deep, allow_not_found=True))
            start = len(root) + 1
            return {f.path[start:]: (f.size, f.mtime_ns) for f in found if f.type == fs.FileType.File}

    def version(self, name: str) -> Version | None:
        """Size and time of a file; None if it is not there."""
        from pyarrow import fs

        with self._translated():
            filesystem, root = _opened(self.uri)
            info = filesystem.get_file_info(f"{root}/{name}")
            return (info.size, info.mtime_ns) if info.type == fs.FileType.File else None

    def read(self, name: str) -> bytes:
        """The whole of a file."""
        with self._translated(), self._confirmed(name):
            filesystem, root = _opened(self.uri)
            with filesystem.open_input_stream(f"{root}/{name}", compression=None) as file:
                whole: bytes = file.read()
                return whole

    def put(self, name: str, data: Any) -> None:
        """Write a file, whole or not at all. ``data``: bytes, or what has a buffer."""
        with self._translated():
            filesystem, root = _opened(self.uri)
            path = f"{root}/{name}"
            if filesystem.type_name not in _FLAT:
                filesystem.create_dir(path.rpartition("/")[0], recursive=True)
            whole = filesystem.type_name in _WHOLE_OR_NOT_THERE
            target = path if whole else f"{path}.{secrets.token_hex(4)}.part"
            try:
                with filesystem.open_output_stream(target, compression=None) as file:
                    file.write(data)
                if not whole:
                    filesystem.move(target, path)
            except Exception:
                if not whole:
                    with suppress(Exception):  # then it is swept, when the next run begins
                        filesystem.delete_file(target)
                raise

    def remove(self, name: str) -> None:
        """Remove a file; nothing if it is not there."""
        with suppress(FileNotFoundError), self._translated():
            filesystem, root = _opened(self.uri)
            filesystem.delete_file(f"{root}/{name}")

    @contextmanager
    def _confirmed(self, name: str) -> Iterator[None]:
        """What is said not to be there is asked for once more: fsspec says so of what it cannot ask for, too."""
        try:
            yield
        except FileNotFoundError as error:
            if self.version(name) is not None:
                raise ObjectsAwayError(f"{self.uri}: {name} cannot be read now; try again.") from error
            raise

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, UserError):
            raise
        except Exception as error:  # each of the filesystems behind pyarrow has errors of its own
            raise _translation(self.uri, error) from error


@dataclass(frozen=True)
class ObjectFile:
    """One file on a store, as a path is one on this machine."""

    uri: str

    def __str__(self) -> str:
        return self.uri

    @property
    def name(self) -> str:
        return self.uri.partition("?")[0].rpartition("/")[2]

    @property
    def store(self) -> Store:
        """The folder that it lies in."""
        base, mark, options = self.uri.partition("?")
        return Store(f"{base.rpartition('/')[0]}{mark}{options}")

    def numbered(self, index: int) -> ObjectFile:
        """FILE.1, FILE.2, …"""
        base, mark, options = self.uri.partition("?")
        return ObjectFile(f"{base}.{index}{mark}{options}")

    def exists(self) -> bool:
        return self.store.version(self.name) is not None

    def try_out(self) -> None:
        """UserError if nothing can be written beside it."""
        self.store.put(f"{self.name}.probe", b"")
        self.store.remove(f"{self.name}.probe")


def within(uri: str, call: Callable[[], T], seconds: float = PATIENCE) -> T:
    """What the call gives; `ObjectsAwayError` if it has not ended after so many seconds."""
    ends: list[Callable[[], T]] = []

    def work() -> None:
        try:
            found = call()
        except BaseException as error:  # noqa: BLE001  (raised again, in the thread that waits)
            ends.append(functools.partial(_raise, error))
        else:
            ends.append(lambda: found)

    thread = threading.Thread(target=work, name="store", daemon=True)
    thread.start()
    thread.join(seconds)
    if not ends:
        raise ObjectsAwayError(f"{uri} does not answer within {seconds:.0f} s: check its address and the network.")
    return ends[0]()


def _raise(error: BaseException) -> Any:
    raise error


@functools.lru_cache(maxsize=64)
def _opened(uri: str) -> tuple[Any, str]:
    """The filesystem, and the path in it."""
    from pyarrow import fs

    filesystem, path = fs.FileSystem.from_uri(uri)
    if filesystem.type_name == "s3":
        filesystem = _impatient(filesystem)
    if not path.strip("/"):
        raise UserError(f"{uri}: it names no bucket or folder; write {_SCHEMES}.")
    return filesystem, path.rstrip("/")


def _impatient(s3: Any) -> Any:
    """The same with `_S3`, which no URI can hold and only its constructor takes: so made anew, as its copies are."""
    make, (options,) = s3.__reduce__()
    return make({**options, **_S3})


def _translation(uri: str, error: Exception) -> UserError:
    said = " ".join(str(error).split()) or type(error).__name__
    words = f"{type(error).__name__} {said}"
    _, remedy, away = next(m for m in _MEANINGS if re.search(m[0], words, re.IGNORECASE))
    short = said if len(said) <= 200 else f"{said[:200]}…"
    return (ObjectsAwayError if away else UserError)(f"{uri}: {short.rstrip('.')}: {remedy}.")


# --- what is not needed any more -------------------------------------------------------------------------

_discarded: deque[ObjectFile] = deque()


def discard(file: ObjectFile) -> None:
    """Remove it, and FILE.1, FILE.2, …, when `remove_discarded` is called next: whoever calls this must not wait."""
    _discarded.append(file)


def remove_discarded() -> None:
    """Remove what was discarded; what the store does not let go of now stays for the next time (`ObjectsAwayError`)."""
    while _discarded:
        file = _discarded[0]
        store = file.store
        for name in store.listing(deep=False):
            if name == file.name or name.startswith(f"{file.name}."):
                store.remove(name)
        _discarded.popleft()
