"""Keeps what other programs print off the terminal, at the level of file descriptors."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from bench.config import UserError


@contextmanager
def quiet(log: Path) -> Iterator[tuple[TextIO, TextIO]]:
    """Send file descriptors 1 and 2 to the end of ``log``; yields text streams on the real ones.

    Child processes inherit the redirection (Ray's C++ processes print too), and so does everything that
    is printed to ``sys.stdout`` and ``sys.stderr`` here. Whoever wants to reach the terminal meanwhile
    writes to the two streams. May be nested: the inner one then yields the outer one's log.
    A UserError if the log cannot be written; when its disk is full later, what is printed is lost, and no more.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise UserError(f"cannot write the log {log} ({error.strerror}); choose a writable folder.") from error
    _flush()
    with _duplicate(1) as out, _duplicate(2) as err:
        try:
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            os.close(sink)
            with redirect_stdout(_lossy(1)), redirect_stderr(_lossy(2)):
                yield out, err
        finally:
            _flush_or_drop()
            _flush_or_leave(out)
            _flush_or_leave(err)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)


def _duplicate(descriptor: int) -> TextIO:
    # A duplicate is not inherited by child processes: none of them can hold the terminal open.
    return os.fdopen(os.dup(descriptor), "w", encoding="utf-8", errors="replace", buffering=1)


class _Lossy(io.FileIO):
    """A print to a log whose disk is full must not end the library that prints."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return memoryview(data).nbytes


def _lossy(descriptor: int) -> TextIO:
    raw = _Lossy(descriptor, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding="utf-8", errors="replace", line_buffering=True, write_through=True
    )


def _flush_or_drop() -> None:
    """What others still hold for the log, and it does not take, must not come out on the terminal instead."""
    try:
        _flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        _flush()


def _flush_or_leave(stream: TextIO) -> None:
    """What a terminal that has gone does not take is lost; and whatever else would come there."""
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()
