"""Operations on their way to a store that may be slow or away: one queue, one thread, in order, none lost.

An operation is a JSON-ready mapping. It is written to disk first (`bench.spool`), and delivered at least once: again
when its answer was lost, again when the run was killed before it had noted the answer. So what delivers it must be
idempotent; and an operation that an earlier run left comes marked ``"taken": True``, for by now another driver may
have gone on with what it is about.

What happens to an operation that is not taken: `UnreachableError` keeps it at the head of the queue and tries it
again, later and later; any other error is final, and puts it into ``rejected.jsonl`` with that error.
What is left at `close`, or when this process is killed, the next `Delivery` with the same folder and key sends first.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from bench.spool import REJECTED, Backlog, Spool

Operation = Mapping[str, Any]

#: Seconds to the first retry; each further one waits twice as long, up to the last value.
FIRST_WAIT, LAST_WAIT = 0.5, 30.0

#: Seconds of waiting at the end that need no word.
_PATIENCE = 2.0

#: So many refusals are said when they happen; all of them are counted at the end.
_SAID = 3


class UnreachableError(Exception):
    """The store cannot take the operation now, but may later."""


class Delivery:
    """The queue to one store. ``put`` never waits; ``say`` receives lines for the user, from the thread too.

    ``deliver`` runs in the thread only. ``name`` is what the user calls the store.
    """

    def __init__(
        self, deliver: Callable[[Operation], None], *, spool: Spool, name: str, say: Callable[[str], None]
    ) -> None:
        self.rejected = self._left = 0
        self._deliver = deliver
        self._spool = spool
        self._name = name
        self._say = say
        self._backlog = Backlog(spool, say)
        self._changed = threading.Condition()
        self._closing = self._stopped = self._full = False
        self._away_since: float | None = None
        if self._backlog:
            say(f"{name}: {len(self._backlog)} operations of an earlier run are delivered first.")
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)
        self._thread.start()

    def put(self, operation: Operation) -> None:
        """Queue one operation. It is written to disk before this returns, if that can be; no error if it cannot."""
        line, study = json.dumps(operation, allow_nan=False).encode(), operation.get("study")
        full: OSError | None = None
        with self._changed:
            if self._closing:
                raise RuntimeError(f"{self._name}: an operation after close")
            try:
                self._backlog.append(line, study)
            except OSError as error:
                full = error
            self._changed.notify_all()
        if full is not None and not self._full:
            self._full = True
            self._say(
                f"what goes to {self._name} cannot be kept in {self._spool.folder} ({full.strerror}): it is in memory "
                "alone until there is room; free or permit the place."
            )

    def flush(self, timeout: float) -> bool:
        """Wait until the queue is empty; False if it is not after so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._backlog, timeout)

    def drain(self, patience: float) -> bool:
        """Wait until the queue is empty; False once the store has not answered for so many seconds."""
        while not self.flush(0.2):
            since = self._away_since
            if since is not None and time.monotonic() - since > patience:
                return False
        return True

    def close(self, timeout: float) -> int:
        """Deliver what is queued for up to ``timeout`` seconds; how many operations are left on disk.

        Interrupted (Ctrl-C), it leaves them at once.
        """
        with self._changed:
            again, self._closing = self._closing, True
            self._changed.notify_all()
        if again:
            return self._left
        try:
            if not self.flush(min(timeout, _PATIENCE)) and timeout > _PATIENCE:
                self._say(f"{self._name}: {len(self._backlog)} operations are under way; {timeout:.0f} s at most.")
                self.flush(timeout - _PATIENCE)
        finally:
            self._stop()
        return self._left

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            self._left = len(self._backlog)  # the thread takes nothing from it any more
            kept, lost, failure = self._backlog.close()
        if kept:
            where = kept[0] if len(kept) == 1 else self._spool.folder
            self._say(
                f"{self._name} did not take {self._left - lost} operations; they are kept in {where}"
                " and bench sync delivers them, or the next run with the same store and folder."
            )
        if lost and failure is not None:
            self._say(
                f"{lost} operations for {self._name} could not be kept ({failure.strerror}): free or permit"
                f" {self._spool.folder}; bench sync then records from the rows what matters of them."
            )
        if self.rejected:
            self._say(f"{self._name} refused {self.rejected} operations; see {self._spool.folder / REJECTED}.")
        self._thread.join(1.0)  # it may be inside a request: a daemon, it does not hold the program up

    def _run(self) -> None:
        wait = FIRST_WAIT
        while True:
            try:
                if (head := self._head()) is None:
                    return
                self._deliver_line(*head)
            except (UnreachableError, OSError) as error:  # OSError: what is on disk cannot be read back
                self._pause(error, wait)
                wait = min(2 * wait, LAST_WAIT)
                continue
            wait = FIRST_WAIT
            self._advance()

    def _head(self) -> tuple[bytes, bool] | None:
        """The oldest operation, once there is one, and whether an earlier run left it; None when it is time to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._backlog)
            return None if self._stopped else self._backlog.head()

    def _deliver_line(self, line: bytes, taken: bool) -> None:
        try:
            operation = json.loads(line)
            self._deliver({**operation, "taken": True} if taken else operation)
        except UnreachableError:
            raise
        except Exception as error:  # noqa: BLE001 (filed and said; the search must not end with its record)
            self._reject(line, error)

    def _advance(self) -> None:
        with self._changed:
            if self._stopped:  # kept already; it will be delivered again, which changes nothing
                return
            self._backlog.advance()
            self._changed.notify_all()
        if self._away_since is not None:
            self._away_since = None
            self._say(f"{self._name} answers again.")

    def _pause(self, error: Exception, wait: float) -> None:
        if self._away_since is None:
            self._away_since = time.monotonic()
            self._say(f"{self._name} does not answer ({error}); nothing waits for it: all is kept, and retried.")
        with self._changed:
            was_closing = self._closing
            self._changed.wait_for(
                lambda: self._stopped or self._closing != was_closing, min(wait, FIRST_WAIT) if was_closing else wait
            )

    def _reject(self, line: bytes, error: Exception) -> None:
        self.rejected += 1
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        try:
            kept = f"it is kept in {self._spool.reject(line, error)}"
        except OSError as full:
            kept = f"and it cannot be kept: {full}"
        if self.rejected <= _SAID:
            self._say(f"{self._name} refused an operation ({reason}); {kept}.")
