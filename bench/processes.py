"""What a run borrows from the operating system, and gives back: variables, signals, a folder, processes."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from bench.config import UserError
from bench.files import take

#: Ray names its sockets FOLDER/session_DATE_TIME_MICROSECONDS_PID/sockets/plasma_store: up to 66 characters
#: on top of the folder, and the path of a socket may have 103 (macOS; 107 on Linux).
LONGEST_FOLDER = 36

_PREFIX = "bench-"
_OWNER = "owner"


@contextmanager
def environment(variables: Mapping[str, str], also: Collection[str] = ()) -> Iterator[None]:
    """These environment variables, for this block and the processes started in it; ``also``: to be put back too."""
    before = {name: os.environ.get(name) for name in (*variables, *also)}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Interrupts:
    """SIGINT and SIGTERM as a flag: the first sets it, a second one does what it did before.

    ``with Interrupts() as interrupts:`` puts every handler back at the end, SIGUSR1's too (Ray Tune takes
    it). ``arm()`` takes SIGINT and SIGTERM again, from a library that has helped itself to them. Outside
    the main thread, where Python handles no signals, nothing is taken.
    """

    def __init__(self) -> None:
        self._raised = threading.Event()
        self._before: dict[signal.Signals, Any] = {}

    @property
    def raised(self) -> bool:
        return self._raised.is_set()

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
            self.arm()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # None: not installed from Python, so it cannot be put back from Python
                signal.signal(number, handler)

    def arm(self) -> None:
        if self._before and not self.raised:
            signal.signal(signal.SIGINT, self._handle)
            signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._raised.set()
        for other in (signal.SIGINT, signal.SIGTERM):
            signal.signal(other, self._before[other])


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder with a short path, removed at the end, and with it those that dead processes left.

    A folder's owner holds a lock on a file in it, so a folder without a lock has no owner any more. A
    UserError if every place for temporary files has too long a path.
    """
    root = _short_root()
    _remove_abandoned(root)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
    owner = os.open(folder / _OWNER, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        take(owner)
        yield folder
    finally:
        _remove(folder)
        os.close(owner)


def _short_root() -> Path:
    random_part = 8
    for root in (Path(tempfile.gettempdir()), Path("/tmp")):
        if len(os.fsencode(root / _PREFIX)) + random_part <= LONGEST_FOLDER and os.access(root, os.W_OK):
            return root
    raise UserError(
        f"the folder for temporary files, {tempfile.gettempdir()}, has too long a path for Ray's sockets; "
        "set TMPDIR to a writable folder with a shorter one."
    )


def _remove_abandoned(root: Path) -> None:
    newborn = time.time() - 60  # between its creation and its lock, a folder looks abandoned
    for owner in root.glob(f"{_PREFIX}*/{_OWNER}"):
        try:
            if owner.stat().st_mtime > newborn:
                continue
            descriptor = os.open(owner, os.O_RDWR)
        except OSError:  # another user's, or removed this moment: not ours to remove
            continue
        try:
            if take(descriptor):
                _remove(owner.parent)
        finally:
            os.close(descriptor)


def _remove(folder: Path) -> None:
    """Remove it; the owner's file last, by which the next run finds what a process in its last second still wrote."""
    with suppress(FileNotFoundError):  # another run, or whoever cleans up here, was faster
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _OWNER:
                path.unlink()
        if [path.name for path in folder.iterdir()] == [_OWNER]:
            shutil.rmtree(folder, ignore_errors=True)


def own_children() -> set[Any]:
    """The processes (psutil's) that this one started."""
    import psutil  # type: ignore[import-untyped]  # comes with Ray

    return set(psutil.Process().children())


def descendants(spared: Collection[Any]) -> list[Any]:
    """This process's children but for ``spared``, and all that come from them, parents first."""
    import psutil

    found = []
    for child in own_children() - set(spared):
        found.append(child)
        try:
            found.extend(child.children(recursive=True))
        except psutil.NoSuchProcess:
            continue
    return found


def kill_titled(start: str) -> None:
    """Kill those of this process's descendants whose command line starts so, and all that come from them."""
    import psutil

    doomed = []
    for process in descendants(()):
        try:
            if " ".join(process.cmdline()).startswith(start):
                doomed += [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
    end(doomed, grace=0)


def end(processes: Collection[Any], grace: float) -> int:
    """Wait ``grace`` seconds for these processes to go, then kill the rest; returns how many it killed."""
    import psutil

    _, alive = psutil.wait_procs(processes, timeout=grace)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=grace)
    return len(alive)
