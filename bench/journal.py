"""A study's folder belongs to one process at a time, and its journal is whole when that process reads it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bench.config import UserError
from bench.disk import on_disk
from bench.kinds import KINDS


def check_kind(folder: Path, own: str) -> None:
    """UserError if the folder is of another kind than ``own``, the name of a book."""
    for kind in KINDS.values():
        if kind.manifest != own and (folder / kind.manifest).exists():
            raise UserError(f"{folder} holds {kind.what}; give this another --name.")


class BusyError(UserError):
    """Another process has the study."""


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Take ``folder`` (made if need be) for this process, until the context is left or the process ends.

    Raises:
        BusyError: another process has it.
        UserError: it cannot be written or locked.
    """
    lock = FileLock(folder / "lock", blocking=False, fallback_to_soft=False, thread_local=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        owner = (folder / "lock").read_text() or "unknown"
        raise BusyError(
            f"study {folder.name!r} in {folder.parent} is being run by another process ({owner}); wait for it, or end "
            "it."
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}, or lock it ({error.strerror}); choose another --results folder, on a disk that "
            "has locks."
        ) from error
    try:
        with on_disk(folder / "lock"):
            (folder / "lock").write_text(f"{os.getpid()} on {platform.node()}")
        yield
    finally:
        lock.release()


def mend(journal: Path, say: Callable[[str], None]) -> None:
    """Make a journal (one JSON value a line) that a killed process left readable again; `claim` its folder first.

    A last line that was not written to its end is cut off: what it was about did not happen. The lock
    that Optuna's process died with (a symbolic link, for which the next would wait 30 s) is removed. A
    UserError if any other line is damaged.
    """
    with on_disk(journal):
        remains = (journal.with_name(f"{journal.name}.lock"), *journal.parent.glob(f"{journal.name}.lock*.rename"))
        for path in remains:
            path.unlink(missing_ok=True)
        if journal.exists():
            _cut(journal, say)


def _cut(journal: Path, say: Callable[[str], None]) -> None:
    whole, lines = 0, journal.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if _is_whole(line):
            whole += len(line)
        elif number == len(lines):
            say(f"{journal}: cut off its last line, which was not written to its end ({len(line)} bytes).")
            os.truncate(journal, whole)
        else:
            raise UserError(
                f"{journal}: line {number} is damaged; restore the file, or begin again under another --name."
            )


def _is_whole(line: bytes) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


class WholeLines:
    """Around Optuna's backend of a journal in a file: what is appended is written whole, or not at all.

    Optuna's own leaves a part of a line where the disk is full, and begins a new file where the journal is gone.
    Errors: DiskError, whatever it was.
    """

    def __init__(self, journal: Path, backend: Callable[[str], Any]) -> None:
        self._journal = journal
        with on_disk(journal):
            self._backend = backend(str(journal))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with on_disk(self._journal):
            size = self._journal.stat().st_size
            try:
                self._backend.append_logs(logs)
            except Exception:
                os.truncate(self._journal, size)
                raise

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        with on_disk(self._journal, "read"):
            yield from self._backend.read_logs(log_number_from)
