"""What a person sees: tables, and one live line per phase of a search. Quiet where there is no terminal."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console as Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bench.config import one_line

#: Seconds between two drawings of the live display.
REFRESH = 0.25


def console(stream: TextIO) -> Console:
    """A console that draws on this stream; as wide as its text where it is not a terminal."""
    return _console(Console, stream)


class _Display(Console):
    def on_broken_pipe(self) -> None:
        """An OSError as any other: rich would end the program."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def _console(kind: type[Console], stream: TextIO) -> Console:
    return kind(file=stream, highlight=False, soft_wrap=not stream.isatty(), width=None if stream.isatty() else 240)


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str | None = None, texts: int = 2
) -> Table:
    """A plain table; the first ``texts`` columns left, the numbers right."""
    head, below = title and _plain(title, "bold"), caption and _plain(caption, "table.caption")
    made = Table(title=head, caption=below, title_justify="left", caption_justify="left")
    for i, name in enumerate(columns):
        made.add_column(name, justify="left" if i < texts else "right", overflow="fold")
    for row in rows:
        made.add_row(*map(_plain, row))
    return made


def _plain(text: str, style: str = "") -> Text:
    """As it stands: a name from a copied file is no markup, and no command to the terminal."""
    return Text("\n".join(map(one_line, text.split("\n"))), style=style)


def duration(seconds: float) -> str:
    """12 s, 3:05, 2:10:00."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """A live display of what the function given to ``show`` returns, a few times a second and only on a terminal.

    As a context. ``tick`` is cheap to call; ``say`` prints a line above the display. A terminal that goes away, or a
    pipe whose reader does, ends the display and not the work; what is said then goes to ``otherwise``, if there is one.
    """

    def __init__(self, stream: TextIO, otherwise: TextIO | None = None) -> None:
        self.console = _console(_Display, stream)
        self._otherwise = otherwise
        self._render: Callable[[], str] = str
        self._last = 0.0
        # rich would else take sys.stdout and sys.stderr, and show what others print there: it belongs in the log
        self._live = Live(
            Text(),
            console=self.console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._on, self._gone = stream.isatty(), False

    def __enter__(self) -> Self:
        if self._on:
            self._try(self._live.start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._on:
            self._try(self._live.stop)

    def show(self, render: Callable[[], str]) -> None:
        self._render = render

    def tick(self) -> None:
        now = time.monotonic()
        if self._on and now - self._last >= REFRESH:
            self._last = now
            shown = Text(self._render())  # whose own errors are no terminal's
            self._try(lambda: self._live.update(shown, refresh=True))

    def say(self, line: str) -> None:
        line = one_line(line)
        if (self._gone or not self._try(lambda: self.console.print(line, markup=False))) and self._otherwise:
            print(line, file=self._otherwise, flush=True)

    def _try(self, draw: Callable[[], object]) -> bool:
        """False if the terminal is gone."""
        try:
            draw()
        except OSError:
            self._on, self._gone = False, True
        return not self._gone
