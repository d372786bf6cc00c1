"""Operations on their way to a store that may be slow or away: one queue, one thread, in order, none lost.

An operation is a JSON-ready mapping. It is delivered at least once: again when its answer was lost, again
from the spool of a run that ended before the store came back. So what delivers it must be idempotent.

What happens to an operation that is not taken: `UnreachableError` keeps it at the head of the queue and tries it
again, later and later; any other error is final, and puts it into ``rejected.jsonl`` with that error.
What is left at `close` goes to a spool file, which the next `Delivery` with the same folder and key sends first.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from bench.config import UserError

Operation = Mapping[str, Any]

#: Seconds to the first retry; each further one waits twice as long, up to the last value.
FIRST_WAIT, LAST_WAIT = 0.5, 30.0

#: Seconds of waiting at the end that need no word.
_PATIENCE = 2.0

#: So many refusals are said when they happen; all of them are counted at the end.
_SAID = 3


class UnreachableError(Exception):
    """The store cannot take the operation now, but may later."""


class Spool:
    """Undelivered operations on disk: one file per run that left some, ``spool-<key>-<time>.jsonl``.

    A file is read by one process at a time (its lock says so) and goes away when all of it is delivered.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self.key = key
        self._taken: list[TextIO] = []

    def take(self) -> list[str]:
        """The operations of all files that no other process is delivering, oldest first."""
        lines = []
        for path in sorted(self.folder.glob(f"spool-{self.key}-*.jsonl")):
            file = path.open()
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            lines += file.read().splitlines()
            self._taken.append(file)
        return lines

    def keep(self, lines: Iterable[str]) -> Path | None:
        """Write these operations to a new file, in place of all that were taken."""
        path = None
        if text := "".join(f"{line}\n" for line in lines):
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"spool-{self.key}-{time.time_ns()}.jsonl"
            _write_whole(path, text)
        for file in self._taken:
            Path(file.name).unlink(missing_ok=True)
            file.close()
        self._taken.clear()
        return path

    def reject(self, line: str, error: Exception) -> Path:
        """File an operation that will never be taken, with the reason."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "rejected.jsonl"
        entry = {"error": f"{type(error).__name__}: {error}", "operation": json.loads(line)}
        with path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        return path


def _write_whole(path: Path, text: str) -> None:
    """The file with this text, or no such file: never a part of it."""
    beside = path.with_suffix(".new")
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)


class Delivery:
    """The queue to one store. ``put`` never waits; ``say`` receives lines for the user, from the thread too.

    ``deliver`` runs in the thread only. ``name`` is what the user calls the store.
    """

    def __init__(
        self, deliver: Callable[[Operation], None], *, spool: Spool, name: str, say: Callable[[str], None]
    ) -> None:
        self.rejected = 0
        self._deliver = deliver
        self._spool = spool
        self._name = name
        self._say = say
        self._queue = deque(spool.take())
        self._changed = threading.Condition()
        self._closing = self._stopped = self._away = False
        if self._queue:
            say(f"{name}: {len(self._queue)} operations of an earlier run are delivered first.")
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)
        self._thread.start()

    def put(self, operation: Operation) -> None:
        """Queue one operation. It is copied now: what the caller does to it later has no effect."""
        line = json.dumps(operation, allow_nan=False)
        with self._changed:
            if self._closing:
                raise RuntimeError(f"{self._name}: an operation after close")
            self._queue.append(line)
            self._changed.notify_all()

    def flush(self, timeout: float) -> bool:
        """Wait until the queue is empty; False if it is not after so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue, timeout)

    def close(self, timeout: float) -> int:
        """Deliver what is queued for up to ``timeout`` seconds and spool the rest; how many that is.

        Interrupted (Ctrl-C), it spools at once.
        """
        with self._changed:
            again, self._closing = self._closing, True
            self._changed.notify_all()
        if again:
            return len(self._queue)
        try:
            if not self.flush(min(timeout, _PATIENCE)):
                self._say(f"{self._name}: {len(self._queue)} operations are under way; {timeout:.0f} s at most.")
                self.flush(timeout - _PATIENCE)
        finally:
            self._stop()
        return len(self._queue)

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        left = list(self._queue)  # the thread takes nothing from it any more
        try:
            path = self._spool.keep(left)
        except OSError as error:
            raise UserError(f"{len(left)} operations for {self._name} are lost: {error}; free or permit it.") from error
        if path is not None:
            self._say(
                f"{self._name} did not take {len(left)} operations; they are kept in {path}"
                " and the next run with the same store and folder delivers them."
            )
        if self.rejected:
            self._say(f"{self._name} refused {self.rejected} operations; see {self._spool.folder / 'rejected.jsonl'}.")
        self._thread.join(1.0)  # it may be inside a request: a daemon, it does not hold the program up

    def _run(self) -> None:
        wait = FIRST_WAIT
        while (line := self._head()) is not None:
            try:
                self._deliver(json.loads(line))
            except UnreachableError as error:
                self._pause(error, wait)
                wait = min(2 * wait, LAST_WAIT)
                continue
            except Exception as error:  # noqa: BLE001 (filed and said; the search must not end with its record)
                self._reject(line, error)
            wait = FIRST_WAIT
            self._advance()

    def _head(self) -> str | None:
        """The oldest operation, once there is one; None when it is time to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._queue)
            return None if self._stopped else self._queue[0]

    def _advance(self) -> None:
        with self._changed:
            if self._stopped:  # spooled already; it will be delivered again, which changes nothing
                return
            self._queue.popleft()
            if not self._queue:
                self._spool.keep([])
            self._changed.notify_all()
        if self._away:
            self._away = False
            self._say(f"{self._name} answers again.")

    def _pause(self, error: UnreachableError, wait: float) -> None:
        if not self._away:
            self._away = True
            self._say(f"{self._name} does not answer ({error}); the run goes on, what it records is kept and retried.")
        with self._changed:
            was_closing = self._closing
            self._changed.wait_for(
                lambda: self._stopped or self._closing != was_closing, min(wait, FIRST_WAIT) if was_closing else wait
            )

    def _reject(self, line: str, error: Exception) -> None:
        self.rejected += 1
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        try:
            kept = f"it is kept in {self._spool.reject(line, error)}"
        except OSError as full:
            kept = f"and it cannot be kept: {full}"
        if self.rejected <= _SAID:
            self._say(f"{self._name} refused an operation ({reason}); {kept}.")
