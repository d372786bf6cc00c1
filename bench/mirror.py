"""Results on an object store: work goes on in a copy on this machine, and what changes there is uploaded.

A command brings down what the store has, works as ever, and a thread uploads each file soon after it changed, whole or
not at all. Nothing waits for the store but the start; what it did not take stays here, and the next start, or a later
try, uploads it. After a kill, this machine's copy is the newer one, and counts; another machine has what was uploaded.

Several processes of one machine share its copy. The first of them that holds the lock uploads for all.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Self

from bench.config import UserError
from bench.copies import OWN, Index, Use, bring, changed, send, sweep
from bench.lease import Lease, TakenError
from bench.objects import Store, remove_discarded
from bench.uploads import tell

Say = Callable[[str], None]

#: Seconds between two looks at what changed.
BEAT = 3.0

#: So many times as long as it took, there is no further upload: ever longer files are then uploaded ever more rarely,
#: and all uploads together grow with the time, not with its square.
REST = 10.0

#: Seconds without any file uploaded after which the end waits no longer.
PATIENCE = 30.0


def copy_of(uri: str) -> Path:
    """The folder of this machine's working copy; UserError if there is no place for one."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    try:
        cache = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    except RuntimeError as error:
        raise UserError(f"no folder for a working copy of {uri}: set XDG_CACHE_HOME or HOME.") from error
    return cache / "bench" / "results" / hashlib.sha256(_plain(uri).encode()).hexdigest()[:16]


def _plain(uri: str) -> str:
    """Without a / at the end of its path: s3://b/lab and s3://b/lab/ are one place."""
    base, mark, options = uri.partition("?")
    return f"{base.rstrip('/')}{mark}{options}"


@contextmanager
def working_copy(uri: str, use: Use, *, say: Say = tell) -> Iterator[Mirror]:
    """This machine's copy of the results at this URI; while it is open, what changes in it is uploaded.

    UserError, within seconds and before anything is written there, for a store that cannot be used, one that another
    machine writes, and a copy that went another way.
    """
    store, folder = Store(_plain(uri)), copy_of(uri)
    store.check()
    with Mirror(store, folder, use, say=say) as mirror:
        yield mirror


class Mirror:
    """A working copy that is open; see `working_copy`. ``folder``: its results folder. ``say``: a line to the user."""

    def __init__(self, store: Store, folder: Path, use: Use, *, say: Say) -> None:
        self.folder = folder
        self._store, self._use, self.say = store, use, say
        self._lease = Lease(store, _owner(folder))
        self._index = Index(folder)
        self._uploads = False  # whether this process has the lock
        self._away = ""  # why the last look failed
        self._lost = ""  # why nothing is uploaded any more
        self._stack = ExitStack()
        self._closing, self._ended = threading.Event(), threading.Event()
        self._last = self._rests_until = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def __enter__(self) -> Self:
        with ExitStack() as starting, self._file("gate") as gate:
            fcntl.flock(gate, fcntl.LOCK_EX)  # whoever has it brings the copy up to date: not to be used before
            self._lock = starting.enter_context(self._file("lock"))
            self._users = starting.enter_context(self._file("users"))
            self._uploads = _taken(self._lock)
            if self._uploads:
                self._begin()
            fcntl.flock(self._users, fcntl.LOCK_SH)
            self._stack = starting.pop_all()
        if self._use == "writes":
            shared = "" if self._uploads else "; another bench on this machine has it open, too, and uploads for both"
            self.say(f"{self._store.uri}: its working copy is {self.folder}{shared}.")
            self._thread.start()
        elif self._uploads:
            fcntl.flock(self._lock, fcntl.LOCK_UN)
        return self

    def __exit__(self, *_: object) -> None:
        with self._stack:
            if self._use == "writes":
                self._end()

    @contextmanager
    def heard_by(self, say: Say) -> Iterator[None]:
        """Say what is to be said through ``say`` within: the terminal is another's meanwhile."""
        before, self.say = self.say, say
        try:
            yield
        finally:
            self.say = before

    def _file(self, name: str) -> IO[bytes]:
        try:
            return (self.folder / OWN / name).open("ab")
        except OSError as error:
            raise _no_place(self.folder, error) from error

    def _begin(self) -> None:
        """Take the lease, bring down what is newer there, and clean up."""
        writes = self._use == "writes"
        if writes:
            self._lease.take()
        try:
            bring(self._store, self.folder, self._index, use=self._use, say=self.say)
            if writes:
                sweep(self._store)
        except BaseException:
            if writes:
                self._lease.release()
            raise

    # --- while it is open

    def _run(self) -> None:
        while not self._ended.is_set():
            last = self._closing.is_set()
            self._look(last)
            if last:
                self._ended.set()
            self._closing.wait(BEAT)

    def _look(self, last: bool) -> None:
        """Upload what changed, if that is this process's part, and time for it."""
        try:
            if self._lost or not self._inherits():
                return
            self._lease.renew()
            if last or time.monotonic() >= self._rests_until:
                self._upload()
        except TakenError as error:
            self._lost = str(error)
            self.say(f"{error} The run goes on in {self.folder}.")
        except Exception as error:  # noqa: BLE001  (said, and tried again: results must not end with their copy)
            if not self._away:
                self.say(f"{error} The run goes on, and what it finds is uploaded later.")
            self._away = str(error) or type(error).__name__
        else:
            if self._away:
                self.say(f"{self._store.uri} takes what is uploaded again.")
            self._away = ""

    def _upload(self) -> None:
        started = time.monotonic()
        try:
            send(self._store, self.folder, self._index, self._before_each)
            remove_discarded()
        finally:
            self._rests_until = time.monotonic() + REST * (time.monotonic() - started)

    def _before_each(self) -> None:
        self._lease.renew()
        self._last = time.monotonic()

    def _inherits(self) -> bool:
        """Whether this process uploads: it did, or the one that did is gone."""
        if not self._uploads and _taken(self._lock):
            self._index = Index(self.folder)
            self._uploads = True
        return self._uploads

    # --- its end

    def _end(self) -> None:
        """Upload the rest, let go of the lease, and say where the results are."""
        self._last = time.monotonic()
        self._closing.set()
        try:
            while not self._ended.wait(0.1) and time.monotonic() - self._last < PATIENCE:
                pass
            if self._ended.is_set() and self._uploads and not self._others():
                with contextlib.suppress(UserError):  # it lapses
                    self._lease.release()
        finally:
            self.say(self._where())

    def _others(self) -> bool:
        """Whether other processes have the copy open: they go on with lock and lease."""
        try:
            fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False

    def _where(self) -> str:
        if not self._uploads:
            return f"results: {self._store.uri} (another bench on this machine uploads them)"
        left = len(changed(self.folder, self._index))
        if not left and self._ended.is_set():
            return f"results: {self._store.uri}"
        why = self._lost or self._away or f"it took none for {PATIENCE:.0f} s"
        what = "1 file is" if left == 1 else f"{left} files are"
        again = "" if self._lost else "; the same command goes on with that"
        return f"{what} not uploaded to {self._store.uri} yet, and kept in {self.folder}{again} ({why.rstrip('.')})."


def _taken(lock: IO[bytes]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _owner(folder: Path) -> str:
    """The id of this machine's copy, made with it."""
    path = folder / OWN / "owner"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            if not (known := file.read().strip()):
                known = uuid.uuid4().hex
                file.write(known)
            return known
    except OSError as error:
        raise _no_place(folder, error) from error


def _no_place(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot write the working copy {folder}: {error.strerror}; set XDG_CACHE_HOME to a folder.")
