"""The processes that carry out one study: one alone, or several together, that meet in its folder.

They need file locks there (`flock`) and nothing else. The operating system lets go of a lock when its process ends,
however it ends: so a lock says who lives, and what a dead driver had under way is free again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bench.config import UserError
from bench.journal import claim

#: Seconds to wait for another driver, which holds the gate while it thinks of a proposal.
PATIENCE = 5.0
#: The same where there is nothing else to do: at the beginning, and at the end.
LONG_PATIENCE = 60.0


class LaterError(Exception):
    """What was asked cannot be known now; ask again."""


class Alone:
    """The only driver that there may be. ``own``: the runs that it has under way; ``taken``: those of others."""

    shared = False
    others = 0
    taken: frozenset[str] = frozenset()

    def __init__(self, folder: Path) -> None:
        """`bench.journal.BusyError` if another process has the folder."""
        self.own: set[str] = set()
        self._lock = claim(folder)

    @contextmanager
    def gate(self, patience: float = PATIENCE) -> Iterator[None]:  # noqa: ARG002  (as of `Together`)
        """One at a time."""
        yield

    def leave(self) -> bool:
        """Whether this was the last."""
        return True

    def close(self) -> None:
        """Let others in."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


class Together:
    """One driver of several. ``own``: the runs that it has under way; ``taken``: those of the ``others`` that live.

    Each driver has a file, ``drivers/driver-*``, that it holds locked, and in it what it has under way. Whoever changes
    or reads these files holds the lock ``drivers/gate``. ``own`` may be changed at any time to give a run up, and
    within `gate` to take one; the file follows at the end of the next `gate`.
    """

    shared = True

    def __init__(self, folder: Path) -> None:
        """`bench.journal.BusyError` if a driver that must be alone has the folder."""
        self.own: set[str] = set()
        self.taken: frozenset[str] = frozenset()
        self.others = 0
        self._last = False
        self._place = folder / "drivers"
        self._depth, self._written, self._mine, self._gate = 0, "", -1, -1
        self._path = self._place / f"driver-{secrets.token_hex(4)}"
        self._lock = claim(folder, shared=True)
        try:
            self._place.mkdir(exist_ok=True)
            self._gate = os.open(self._place / "gate", os.O_RDWR | os.O_CREAT, 0o644)
            with patiently(self):
                self._mine = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
                fcntl.flock(self._mine, fcntl.LOCK_EX)
        except UserError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise UserError(f"cannot write to {self._place} ({error.strerror}); free or permit it.") from error

    @contextmanager
    def gate(self, patience: float = PATIENCE) -> Iterator[None]:
        """One driver at a time; may be nested. `LaterError` if another has not come out after so many seconds."""
        if self._depth == 0:
            self._enter(patience)
        self._depth += 1
        try:
            if self._depth == 1:
                self._look_around()
            yield
        finally:
            self._depth -= 1
            if self._depth == 0 and self._gate >= 0:
                try:
                    self._write()
                finally:
                    fcntl.flock(self._gate, fcntl.LOCK_UN)

    def _enter(self, patience: float) -> None:
        deadline = time.monotonic() + patience
        while not self._shut():  # not waited for by the system: no signal could end that
            if time.monotonic() > deadline:
                raise LaterError(f"another driver has held {self._place / 'gate'} for {patience:.0f} s")
            time.sleep(0.02)

    def _shut(self) -> bool:
        try:
            fcntl.flock(self._gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _look_around(self) -> None:
        try:
            living = [runs for path in self._place.glob("driver-*") if (runs := self._look(path)) is not None]
        except OSError as error:
            raise UserError(f"cannot read {self._place} ({error.strerror}); permit it.") from error
        self.others = len(living)
        self.taken = frozenset(uid for runs in living for uid in runs)

    def _look(self, path: Path) -> list[str] | None:
        """What another driver has under way; None if it is dead, or this one. A dead one's file goes away."""
        if path == self._path:
            return None
        try:
            file = path.open("r+b")
        except FileNotFoundError:  # it left just now
            return None
        with file:
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                return None
            try:
                runs: list[str] = json.loads(file.read() or b'{"runs": []}')["runs"]
            except ValueError as error:  # its disk is full: it lives, but will not for long
                raise LaterError(f"{path} is not whole") from error
            return runs

    def _write(self) -> None:
        text = json.dumps({"pid": os.getpid(), "runs": sorted(self.own)})
        if text == self._written or self._mine < 0:
            return
        try:
            data = text.encode().ljust(len(self._written))
            if os.pwrite(self._mine, data, 0) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._mine)
        except OSError as error:
            raise UserError(f"cannot write {self._path} ({error.strerror}); free or permit the place.") from error
        self._written = text

    def leave(self) -> bool:
        """Give up all runs; whether this was the last driver. Until `close`, then, no other can begin."""
        if self._mine < 0:  # it has left
            return self._last
        try:
            with self.gate(LONG_PATIENCE):
                self._forget()
                self._last = self.others == 0
                if self._last:
                    self._depth += 1  # the gate stays shut: what the last one does at the end, it does alone
        except LaterError:  # whoever holds the gate lives
            self._forget()
        return self._last

    def _forget(self) -> None:
        self.own.clear()
        if self._mine >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._mine)
            self._mine = -1

    def close(self) -> None:
        """Let go of everything."""
        self._forget()
        for descriptor in (self._gate, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._gate = self._lock = -1


Drivers = Alone | Together


@contextmanager
def patiently(drivers: Drivers) -> Iterator[None]:
    """The gate, for what cannot be done later; UserError if it stays shut."""
    try:
        with drivers.gate(LONG_PATIENCE):
            yield
    except LaterError as error:
        raise UserError(f"{error}; end it, or try again.") from error
