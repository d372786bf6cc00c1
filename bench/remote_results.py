"""Results and checkpoints on an object store (s3://, gs://, …), through `pyarrow.fs`.

A command downloads the results into a folder of this machine and works there; a thread uploads what changed. Each
upload writes a mark of its own at the URI, and another one when all files are there. A mark that this machine does
not know is another machine's: nothing is merged, and nothing of theirs is overwritten. (Two machines that begin to
upload in the same moment may mix one file each before both notice.) What others than bench change there is not
noticed. Workers read and write checkpoints at the URI itself, so that they need no folder in common.

Options of a URI follow a question mark (s3://b/lab?endpoint_override=HOST:PORT&scheme=http). Credentials come from the
environment. pyarrow is imported when a URI is first opened.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import queue
import re
import secrets
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from bench.config import UserError, one_line
from bench.files import take, write_atomic

Say = Callable[[str], None]

#: Seconds between two uploads, and those that a run waits at its end for its last checkpoint to be written.
PERIOD, PATIENCE = 30.0, 30.0

_MARK, _STATE = ".bench-upload", ".remote.json"
#: What this machine keeps to itself of a results folder.
_LOCAL_FOLDERS = ("mlartifacts",)
_LOCAL_NAMES = {"lock", "ray.log", "checkpoints", "networks"}
_LOCAL_ENDS = (".tmp", ".new", ".part")

#: pyarrow's clients try for minutes, unless they are told otherwise when they are made.
_IMPATIENT: dict[str, dict[str, Any]] = {
    "s3": {"connect_timeout": 3.0, "request_timeout": 6.0, "allow_delayed_open": True},
    "gcs": {"retry_time_limit": timedelta(seconds=15)},
}
_SCHEMES = "s3://BUCKET/PATH, gs://…, abfs://…, hdfs://…, file:///PATH, or fsspec+PROTOCOL://…"
_FULL = r"no space|\berrno 2[78]\b|quota|read-only"
#: By what an error says: the remedy. With any other error, and where it is full, a later try may succeed.
_REMEDIES = {
    r"unrecognized filesystem|protocol not known|relative|missing bucket|invalid uri": f"write {_SCHEMES}",
    r"\binstall\b|no module named|libjvm|libhdfs": "install what it names, or use another store",
    r"no_?such_?bucket|bucket does not exist|bucket .*not found": "make the bucket first, or correct its name",
    _FULL: "make room there, or permit writing",
    r"access[_ ]?denied|forbidden|credential|signature|access_?key|unauth|permission|\b40[13]\b": (
        "set that store's credentials in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; "
        "GOOGLE_APPLICATION_CREDENTIALS), and permit them to read and write there"
    ),
}


class RemoteAwayError(UserError):
    """The store does not answer now, but may later."""


def is_uri(text: str) -> bool:
    """Whether this names a store (s3://…), and no path of this machine."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text) is not None


def log(line: str) -> None:
    """Write a line where a worker's output ends up: Ray's log, or the terminal."""
    with suppress(OSError):  # a terminal that has gone
        print(f"bench: {line}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class RemotePath:
    """A file or folder on a store. All errors are a UserError of one line; `RemoteAwayError` if it may work later."""

    uri: str

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> RemotePath:
        return self.extended(f"/{name}")

    def extended(self, suffix: str) -> RemotePath:
        """The path with this at its end; a URI's options stay behind it."""
        base, mark, options = self.uri.partition("?")
        return RemotePath(f"{base.rstrip('/')}{suffix}{mark}{options}")

    def files(self) -> dict[str, list[int]]:
        """Size and time (in ns) of all files in this folder, by their path in it."""
        from pyarrow import fs

        with self._opened() as (filesystem, path):
            filesystem.get_file_info(path)  # fsspec takes a folder that it cannot ask for one that is not there
            found = filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
            files = (info for info in found if info.type == fs.FileType.File)
            return {info.path[len(path) + 1 :]: [info.size, info.mtime_ns or 0] for info in files}

    def exists(self) -> bool:
        """Tell whether there is such a file."""
        from pyarrow import fs

        with self._opened() as (filesystem, path):
            return bool(filesystem.get_file_info(path).type == fs.FileType.File)

    def read(self) -> bytes | None:
        """The whole file; None if there is none."""
        if not self.exists():
            return None
        with self._opened() as (filesystem, path), filesystem.open_input_stream(path, compression=None) as file:
            return bytes(file.read())

    def write(self, data: Any) -> None:
        """Write bytes, or what has a buffer, whole or not at all."""
        with self._opened() as (filesystem, path):
            if filesystem.type_name in ("s3", "gcs"):  # there a file appears when it is complete
                with filesystem.open_output_stream(path, compression=None) as file:
                    file.write(data)
                return
            filesystem.create_dir(path.rpartition("/")[0], recursive=True)
            part = f"{path}.{secrets.token_hex(4)}.part"  # of this writer alone
            try:
                with filesystem.open_output_stream(part, compression=None) as file:
                    file.write(data)
                filesystem.move(part, path)
            except BaseException:
                with suppress(Exception):  # there is an error already
                    filesystem.delete_file(part)
                raise

    def delete(self) -> None:
        """Delete the file, and FILE.1, FILE.2, …; nothing if there is none."""
        from pyarrow import fs

        with self._opened() as (filesystem, path):
            found = filesystem.get_file_info(fs.FileSelector(path.rpartition("/")[0], allow_not_found=True))
            for info in found:
                if info.path == path or info.path.startswith(f"{path}."):
                    with suppress(FileNotFoundError):  # another process was faster
                        filesystem.delete_file(info.path)

    def check_writable(self) -> None:
        """Write a file in this folder and delete it; UserError if that fails."""
        (self / ".bench-probe").write(b"")
        (self / ".bench-probe").delete()

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, str]]:
        try:
            yield _filesystem(self.uri)
        except UserError:
            raise
        except Exception as error:  # each of the filesystems behind pyarrow has errors of its own
            whole = one_line(str(error)) or type(error).__name__
            said = whole[:200].rstrip(".")
            for pattern, remedy in _REMEDIES.items():
                if re.search(pattern, f"{type(error).__name__} {whole}", re.IGNORECASE):
                    kind = RemoteAwayError if pattern == _FULL else UserError
                    raise kind(f"{self.uri}: {said}: {remedy}.") from error
            message = f"{self.uri}: {said}: check its address and the network, and try again."
            raise RemoteAwayError(message) from error


@functools.lru_cache(maxsize=64)
def _filesystem(uri: str) -> tuple[Any, str]:
    """The filesystem, and the path in it."""
    from pyarrow import fs

    if re.search(r"//[^/@]*:[^/@]*@", uri):
        raise UserError("--results: a URI must hold no password, which others would see: set it in the environment.")
    filesystem, path = fs.FileSystem.from_uri(uri)
    if options := _IMPATIENT.get(filesystem.type_name):  # which no URI can hold, but only the constructor takes
        make, (known,) = filesystem.__reduce__()
        filesystem = make({**known, **options})
    if not path.strip("/"):
        raise UserError(f"{uri}: it names no bucket or folder; write {_SCHEMES}.")
    return filesystem, path.rstrip("/")


# --- what workers write: nobody waits for it -------------------------------------------------------------

_jobs: queue.SimpleQueue[tuple[Callable[[], Any], str]] = queue.SimpleQueue()
_waiting: dict[RemotePath, Any] = {}


@functools.cache
def _start_worker() -> None:
    threading.Thread(target=_work, name="remote", daemon=True).start()  # daemon: the end of a process waits for none


def _work() -> None:
    while True:
        call, what = _jobs.get()
        try:
            call()
        except Exception as error:  # noqa: BLE001  (logged; the jobs after it must be done)
            log(f"{what}: {one_line(str(error) or type(error).__name__)}")


def in_background(call: Callable[[], Any], what: str) -> None:
    """Do this in a thread, after what was asked for before; if it fails, log ``what``, with the reason."""
    _start_worker()
    _jobs.put((call, what))


def write_later(path: RemotePath, data: Any, what: str) -> None:
    """Write the file in the background, in place of what still waits to be written there."""

    def write() -> None:
        if (newest := _waiting.pop(path, None)) is not None:
            path.write(newest)

    _waiting[path] = data
    in_background(write, f"{what} is not saved")


def settle() -> None:
    """Wait, but not for ever, for what is done in the background."""
    done = threading.Event()
    in_background(done.set, "")
    if not done.wait(PATIENCE):
        _waiting.clear()
        log(f"the object store takes longer than {PATIENCE:.0f} s: the last checkpoint may be missing there.")


# --- the results of a command ----------------------------------------------------------------------------


def local_folder(uri: str) -> Path:
    """The folder in which this machine works with the results at this URI."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    try:
        cache = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    except RuntimeError as error:
        raise UserError(f"no folder to work in with {uri}: set XDG_CACHE_HOME or HOME.") from error
    plain = RemotePath(uri).extended("").uri
    return cache / "bench" / "results" / hashlib.sha256(plain.encode()).hexdigest()[:16]


@contextmanager
def working_folder(uri: str, *, writes: bool, say: Say = log) -> Iterator[RemoteResults]:
    """Download the results at this URI; if the command ``writes``, upload what changes until the end, and there.

    UserError before the command runs, if the store cannot be used, another command of this machine writes there, or
    both sides have something new; and after it, if not everything could be uploaded.
    """
    with ExitStack() as claim:
        alone = claim.enter_context(_locked(local_folder(uri) / ".remote.lock"))
        results = RemoteResults(uri, say)
        if alone:
            results.download()
        elif writes or not results._marks:  # none: it is being downloaded
            raise UserError(f"another bench on this machine works with {uri}; wait until it ends, or end it.")
        if not writes:  # beside a command that does, it reads what that one has in the folder
            claim.close()
            yield results
            return
        results.remote.check_writable()
        say(f"{uri}: this machine works in {results.folder}.")
        with results.uploading():
            yield results


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold this lock, which the end of a process releases; False if another process holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error.strerror}; set XDG_CACHE_HOME to a folder.") from error
    with file:
        yield take(file)


class RemoteResults:
    """Results at a URI and their ``folder`` on this machine; see `working_folder`. ``say``: a line to the user."""

    def __init__(self, uri: str, say: Say) -> None:
        self.remote, self.folder, self.say = RemotePath(uri), local_folder(uri), say
        #: The marks at the URI that are this machine's, or that it has downloaded: the last, and one being written.
        self._marks: list[str] = []
        #: Size and time of our files when both sides were alike; None while a download is under way.
        self._files: dict[str, list[int]] | None = {}
        self._failing = False
        with suppress(FileNotFoundError, ValueError, TypeError):  # else all files here count as changed
            self._marks, self._files = json.loads((self.folder / _STATE).read_bytes())

    def download(self) -> None:
        """Make the folder as new as the URI; UserError if both have something new."""
        mark = self._mark()
        if mark in self._marks:  # nothing is newer there; but caches are tidied, and files go
            self._fetch(
                {name: version for name, version in (self._files or {}).items() if not self._path(name).exists()}
            )
            return
        if any(self._changed()) or (mark == "" and self._marks):
            raise self._refusal(mark)
        self._save([], None)
        there = {name: version for name, version in self.remote.files().items() if _belongs(name)}
        self._fetch({name: version for name, version in there.items() if _signature(self._path(name)) != version})
        self._drop_rows_without_trial()
        self._save([mark], {name: found for name in there if (found := _signature(self._path(name)))})

    def _drop_rows_without_trial(self) -> None:
        """Drop the rows of trials that the journal does not know: an upload that broke off had sent the rows first."""
        for journal in self.folder.glob("*/journal.log"):
            path, known = journal.with_name("rows.jsonl"), journal.read_bytes()
            rows = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            kept = [row for row in rows if (uid := _trial_of(row)) is None or json.dumps(uid).encode() in known]
            if len(kept) < len(rows):
                self.say(
                    f"{journal.parent.name}: {len(rows) - len(kept)} trials were uploaded in part, and are run again."
                )
                write_atomic(path, b"".join(kept))

    def _fetch(self, versions: dict[str, list[int]]) -> None:
        """Download these files, and give them their times."""

        def fetch(name: str) -> None:
            if (data := (self.remote / name).read()) is not None:  # else it was removed just now
                write_atomic(self._path(name), data)
                os.utime(self._path(name), ns=(versions[name][1], versions[name][1]))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(fetch, versions))

    def _path(self, name: str) -> Path:
        return self.folder / name

    def upload(self) -> None:
        """Upload what changed; UserError, and nothing is uploaded, if another machine did so meanwhile."""
        # journals are read before rows and written after them: a trial that ended in a journal has its row there
        changed = {name: (signature, self._path(name).read_bytes()) for name, signature in self._changed()}
        if not changed:
            return
        before, own = self._check_mark(), _new_mark()
        files = dict(self._files or {})
        self._save([before, own], files)
        (self.remote / _MARK).write(own.encode())
        for name, (signature, data) in reversed(changed.items()):
            if (mark := self._mark()) != own:
                raise self._refusal(mark)
            (self.remote / name).write(data)
            files[name] = signature
        self._check_mark()
        done = _new_mark()  # who downloaded meanwhile has not all files, and sees by this that there is something newer
        self._save([own, done], files)
        (self.remote / _MARK).write(done.encode())
        self._save([done], files)

    @contextmanager
    def uploading(self) -> Iterator[None]:
        """Upload every `PERIOD` seconds within, and at the end, however it ends; UserError if that fails."""
        ended = threading.Event()

        def run() -> None:
            while not ended.wait(PERIOD):
                self._try_upload()

        thread = threading.Thread(target=run, name="uploads", daemon=True)
        thread.start()
        fail: Say = self.say  # an error of the run itself is the one to raise
        try:
            yield
            fail = _raise
        finally:
            ended.set()
            self._finish(thread, fail)

    def _finish(self, thread: threading.Thread, fail: Say) -> None:
        why = "interrupted"
        try:
            thread.join()
            settle()
            self.upload()
            why = ""
            self.say(f"results: {self.remote}")
        except Exception as error:  # noqa: BLE001  (in the line below)
            why = one_line(str(error) or type(error).__name__).rstrip(".")
        finally:
            if why:
                fail(f"not everything is uploaded to {self.remote} ({why}); all results are in {self.folder}.")

    def _try_upload(self) -> None:
        try:
            self.upload()
        except Exception as error:  # noqa: BLE001  (said once, and tried again: the run must not end with it)
            if not self._failing:
                said = one_line(str(error) or type(error).__name__)
                self.say(f"{said} The run goes on in {self.folder}, and uploads are tried again.")
            self._failing = True
        else:
            self._failing = False

    @contextmanager
    def heard_by(self, say: Say) -> Iterator[None]:
        """Report through ``say`` inside this context: a live display owns the terminal there."""
        before, self.say = self.say, say
        try:
            yield
        finally:
            self.say = before

    def _mark(self) -> str:
        return ((self.remote / _MARK).read() or b"").decode(errors="replace")

    def _check_mark(self) -> str:
        mark = self._mark()
        if mark not in self._marks:
            raise self._refusal(mark)
        return mark

    def _refusal(self, mark: str) -> UserError:
        who = f"was written by another machine ({mark.rpartition(' ')[0]})" if mark else "has lost its .bench-upload"
        return UserError(
            f"{self.remote} {who} since this one last saw it, and {self.folder} has results of its own; move that "
            "folder away to go on with the URI's, or keep it as --results FOLDER."
        )

    def _changed(self) -> Iterator[tuple[str, list[int]]]:
        """The name and signature of each file that is not at the URI as it is here; journals come first."""
        if self._files is None:
            return
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        for path in sorted(paths, key=lambda path: (path.name != "journal.log", path)):
            name, signature = path.relative_to(self.folder).as_posix(), _signature(path)
            if _belongs(name) and signature and signature != self._files.get(name):
                yield name, signature

    def _save(self, marks: list[str], files: dict[str, list[int]] | None) -> None:
        self._marks, self._files = marks, files
        write_atomic(self.folder / _STATE, json.dumps([marks, files]))


def _new_mark() -> str:
    return f"{platform.node()} {datetime.now(UTC):%F %T} UTC {secrets.token_hex(8)}"


def _trial_of(line: bytes) -> str | None:
    """The uid of a search's trial, if this line is one's row; whoever reads the rows refuses a damaged one."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row.get("uid") if isinstance(row, dict) and row.get("kind") == "search" else None


def _raise(line: str) -> None:
    raise UserError(line)


def _belongs(name: str) -> bool:
    """Whether this file of a results folder has its copy at the URI."""
    first, *rest = name.split("/")
    if not rest or first in _LOCAL_FOLDERS or any(part.startswith(".") for part in (first, *rest)):
        return False
    return not (set(rest) & _LOCAL_NAMES or name.endswith(_LOCAL_ENDS) or ".lock" in rest[-1])


def _signature(path: Path) -> list[int]:
    """Size and time of a file; empty if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return []
    return [found.st_size, found.st_mtime_ns]
