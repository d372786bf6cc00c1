"""A study's folder belongs to one process at a time, and its journal is whole when that process reads it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.config import UserError

#: What a folder under the results can be of, by the file that says so.
BOOKS = {
    "study.yaml": "a search",
    "robustness.yaml": "a measurement of robustness",
    "transfer.yaml": "a transfer",
    "matrix.yaml": "a matrix",
}


def check_kind(folder: Path, own: str) -> None:
    """UserError if the folder is of another kind than ``own``, a key of `BOOKS`."""
    for book, kind in BOOKS.items():
        if book != own and (folder / book).exists():
            raise UserError(f"{folder} holds {kind}; give this another --name.")


class BusyError(UserError):
    """Another process has the study."""


def claim(folder: Path) -> int:
    """Take ``folder`` (made if need be) for this process; returns the descriptor that holds it.

    The operating system lets go of it when this process ends, however it ends; ``os.close`` does so
    before. `BusyError` if another process has it; a UserError if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}); choose another --results folder.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.read(descriptor, 20).decode() or "unknown"
        os.close(descriptor)
        raise BusyError(
            f"the study in {folder} is being run by another process ({owner}); wait for it, end it, or "
            "use another --name."
        ) from error
    except OSError as error:
        os.close(descriptor)
        raise UserError(
            f"cannot lock {folder} ({error.strerror}); choose a --results folder on a local disk."
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """`claim` the folder within."""
    descriptor = claim(folder)
    try:
        yield
    finally:
        os.close(descriptor)


def mend(journal: Path, say: Callable[[str], None]) -> None:
    """Make a journal (one JSON value a line) that a killed process left readable again; `claim` its folder first.

    A last line that was not written to its end is cut off: what it was about did not happen. The lock
    that Optuna's process died with (a symbolic link, for which the next would wait 30 s) is removed. A
    UserError if any other line is damaged.
    """
    for remains in (journal.with_name(f"{journal.name}.lock"), *journal.parent.glob(f"{journal.name}.lock*.rename")):
        remains.unlink(missing_ok=True)
    if not journal.exists():
        return
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
