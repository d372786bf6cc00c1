"""Operations on their way to MLflow, in memory: one thread, in order, retried while nobody answers.

Rows on disk are the record. What is not delivered when the process ends is lost here, and `bench sync`, or the next
start of the same command, records it from the rows.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

Operation = Callable[[], None]

#: Seconds to the first retry; each further one waits twice as long, up to the last value.
FIRST_WAIT, LAST_WAIT = 0.5, 30.0

#: Seconds of waiting at the end that need no message.
_QUIET = 2.0


class UnreachableError(Exception):
    """The store cannot take the operation now, but may later."""


class MlflowQueue:
    """The queue to one store.

    An operation that raises `UnreachableError` stays first and is tried again, so it must be idempotent; one that
    raises anything else is dropped. The first of each is reported.

    Args:
        name: what the user calls the store.
        say: gets lines for the user, from the thread too.
    """

    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        self._name, self._say = name, say
        self._waiting: deque[Operation] = deque()
        self._changed = threading.Condition()
        self._closing = self._stopped = self._away = False
        self._refused = self._left = 0
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def put(self, operation: Operation) -> None:
        """Queue one operation; never waits for the store."""
        with self._changed:
            if self._closing:
                raise RuntimeError(f"{self._name}: an operation after close")
            self._waiting.append(operation)
            self._changed.notify_all()

    def flush(self, timeout: float) -> bool:
        """Wait until the queue is empty; False if it is not after so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, timeout)

    def close(self, timeout: float) -> int:
        """Deliver what is queued for up to ``timeout`` seconds, and return the number of operations that are lost.

        Interrupted (Ctrl-C), it gives them up at once.
        """
        with self._changed:
            again, self._closing = self._closing, True
            self._changed.notify_all()
        if again:
            return self._left
        try:
            if not self.flush(min(timeout, _QUIET)) and timeout > _QUIET:
                self._say(f"{self._name}: {len(self._waiting)} operations are under way; {timeout:.0f} s at most.")
                self.flush(timeout - _QUIET)
        finally:
            self._stop()
        return self._left

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._left = len(self._waiting)
            self._changed.notify_all()
        lost = [f"did not take {self._left} operations"] if self._left else []
        lost += [f"refused {self._refused}"] if self._refused else []
        if lost:
            self._say(f"{self._name} {' and '.join(lost)}; bench sync records from the rows what it lacks.")
        self._thread.join(1.0)  # it may be inside a request: a daemon, it does not hold the program up

    def _run(self) -> None:
        wait = FIRST_WAIT
        while (operation := self._first()) is not None:
            try:
                operation()
            except UnreachableError as error:
                self._pause(error, wait)
                wait = min(2 * wait, LAST_WAIT)
                continue
            except Exception as error:  # noqa: BLE001 (reported: a search must not end with its record)
                self._refuse(error)
            wait = FIRST_WAIT
            self._advance()

    def _first(self) -> Operation | None:
        """The oldest operation, once there is one; None when it is time to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._waiting)
            return None if self._stopped else self._waiting[0]

    def _advance(self) -> None:
        with self._changed:
            self._waiting.popleft()
            self._changed.notify_all()
        if self._away:
            self._away = False
            self._say(f"{self._name} answers again.")

    def _pause(self, error: Exception, wait: float) -> None:
        if not self._away:
            self._away = True
            self._say(f"{self._name} does not answer ({error}); nothing waits for it, and it is tried again.")
        with self._changed:
            closing = self._closing
            self._changed.wait_for(
                lambda: self._stopped or self._closing != closing, min(wait, FIRST_WAIT) if closing else wait
            )

    def _refuse(self, error: Exception) -> None:
        self._refused += 1
        if self._refused == 1:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._say(f"{self._name} refused an operation ({reason}).")
