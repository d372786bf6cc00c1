"""What a person sees, on a terminal and where there is none."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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


def _terminal() -> tuple[int, int]:
    return pty.openpty()


def _pipe() -> tuple[int, int]:
    return os.pipe()


@pytest.mark.parametrize("made", [_terminal, _pipe])
def test_a_terminal_that_goes_away_ends_the_display_and_not_the_work(
    made: Callable[[], tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.terminal.REFRESH", 0.0)
    theirs, ours = made()
    otherwise = io.StringIO()
    stream = os.fdopen(ours, "w", buffering=1)
    with Progress(stream, otherwise) as progress:
        progress.show(lambda: "3/20 trials")
        progress.tick()
        progress.say("before")
        os.close(theirs)
        for _ in range(3):
            progress.tick()
            progress.say("after")
    assert otherwise.getvalue() == "after\n" * 3
    with pytest.raises(OSError, match=r"Errno (5|32)"):  # it was gone in earnest
        stream.close()


def test_what_is_shown_may_fail_and_that_is_no_terminal_that_went_away() -> None:
    def render() -> str:
        raise OSError("a disk's")

    with Progress(Terminal()) as progress:
        progress.show(render)
        with pytest.raises(OSError, match="a disk's"):
            progress.tick()


def test_the_work_goes_on_in_the_log_when_the_terminal_goes_away(tmp_path: Path) -> None:
    """A whole process: its stderr is a terminal that closes while it works, its stdout a file."""
    script = """
import sys, pathlib
from bench.verbs.common import follow
class Source:
    name = "s"
    def outlook(self): return "much to do"
    def render(self): return "3/20 trials"
def work(say, watch):
    tick = watch(Source())
    tick()
    print("ready", file=open(sys.argv[2], "w"), flush=True)
    sys.stdin.readline()
    import time
    time.sleep(0.3)
    tick()
    say("a line that nobody sees")
    return "done"
print(follow(pathlib.Path(sys.argv[1]), work))
"""
    theirs, ours = pty.openpty()
    log, ready = tmp_path / "ray.log", tmp_path / "ready"
    os.mkfifo(ready)
    command = [sys.executable, "-c", script, str(log), str(ready)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=ours, text=True)
    os.close(ours)
    ready.read_text()
    os.close(theirs)
    out, _ = process.communicate("go on\n", timeout=30)
    assert (process.returncode, out) == (0, "done\n")
    assert log.read_text() == "a line that nobody sees\n"


def test_a_table_is_whole_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    console(stream).print(table("title", ["a", "b", "c"], [["x" * 60, "y" * 60, "1"]], caption="note"))
    lines = stream.getvalue().splitlines()
    assert any("x" * 60 in line and "y" * 60 in line for line in lines)
    assert "\x1b" not in stream.getvalue()
