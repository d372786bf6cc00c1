"""What a person sees, on a terminal and where there is none."""

from __future__ import annotations

import io
import sys

import pytest

from bench.terminal import Progress, console, duration, table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (61, "1:01"), (3599.6, "1:00:00"), (7325, "2:02:05")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_display_shows_its_lines_and_never_what_others_print() -> None:
    terminal = Terminal()
    with Progress(terminal) as progress:
        progress.show(lambda: "3/20 trials")
        progress.tick()
        print("Ray says something")
        print("and to stderr", file=sys.stderr)
        progress.say("a line for the user [not markup]")
    seen = terminal.getvalue()
    assert "3/20 trials" in seen
    assert "a line for the user [not markup]" in seen
    assert "Ray says" not in seen
    assert "and to stderr" not in seen


def test_it_is_quiet_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress.show(lambda: "3/20 trials")
        progress.tick()
        progress.say("a line")
    assert stream.getvalue() == "a line\n"


def test_a_table_is_whole_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    console(stream).print(table("title", ["a", "b", "c"], [["x" * 60, "y" * 60, "1"]], caption="note"))
    lines = stream.getvalue().splitlines()
    assert any("x" * 60 in line and "y" * 60 in line for line in lines)
    assert "\x1b" not in stream.getvalue()
