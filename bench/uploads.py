"""Uploads that nobody waits for: one thread of this process, and of several states of one object only the last."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from bench.config import one_line
from bench.objects import PATIENCE, ObjectFile


def tell(line: str) -> None:
    """Say it where a worker's words end up: in Ray's log, or on the terminal of `bench train`."""
    with suppress(OSError):  # a terminal that has gone, and nobody hears it
        print(f"bench: {line}", file=sys.stderr, flush=True)


class Uploads:
    """``say`` gets a line for each state that a store did not take; it is not tried again: the next one will be."""

    def __init__(self, say: Callable[[str], None] = tell) -> None:
        self._say = say
        self._waiting: dict[ObjectFile, tuple[str, Any]] = {}
        self._under_way: ObjectFile | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def put(self, file: ObjectFile, what: str, data: Any) -> None:
        """Upload this content soon, in place of what waits for the same object; ``what`` it is, to the user."""
        with self._changed:
            self._waiting[file] = what, data
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def settle(self, file: ObjectFile, seconds: float = PATIENCE) -> bool:
        """Wait until it is uploaded or refused; False, and what has not begun yet is dropped, after so many seconds."""
        with self._changed:
            if self._changed.wait_for(lambda: file not in self._waiting and self._under_way != file, seconds):
                return True
            self._waiting.pop(file, None)
        self._say(f"{file} takes longer than {seconds:.0f} s; its run ends without waiting for it.")
        return False

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                file = self._under_way = next(iter(self._waiting))
                what, data = self._waiting.pop(file)
            try:
                file.store.put(file.name, data)
            except Exception as error:  # noqa: BLE001  (said: what comes after must be uploaded, whatever this met)
                self._say(f"{what} is not saved: {one_line(str(error) or type(error).__name__)}")
            finally:
                with self._changed:
                    self._under_way = None
                    self._changed.notify_all()


UPLOADS = Uploads()
