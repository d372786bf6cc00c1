"""Drivers of one study: real locks, real processes, killed ones among them."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench import drivers
from bench.config import UserError
from bench.drivers import Alone, LaterError, Together
from bench.journal import BusyError


def look(one: Together) -> tuple[int, frozenset[str]]:
    with one.gate():
        return one.others, one.taken


def take(one: Together, *uids: str) -> None:
    with one.gate():
        one.own |= set(uids)


def test_each_sees_what_the_others_have(tmp_path: Path) -> None:
    a, b = Together(tmp_path), Together(tmp_path)
    assert look(a) == (1, frozenset())
    take(a, "s-0000", "s-0001")
    take(b, "s-0002")
    assert look(b) == (1, {"s-0000", "s-0001"})
    assert look(a) == (1, {"s-0002"})
    a.own.discard("s-0000")  # given up; it is known when the gate was next gone through
    assert look(a) == (1, {"s-0002"})
    assert look(b) == (1, {"s-0001"})
    a.close()
    assert look(b) == (0, frozenset())
    b.close()
    assert [path.name for path in (tmp_path / "drivers").iterdir()] == ["gate"]


def test_who_is_alone_has_no_company_and_who_has_is_not_alone(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    with pytest.raises(BusyError, match="being run by another process"):
        Together(tmp_path)
    alone.close()
    a, b = Together(tmp_path), Together(tmp_path)
    for one in (a, b):
        with pytest.raises(BusyError, match=r"another process .with --storage.; wait for it"):
            Alone(tmp_path)
        one.close()
    Alone(tmp_path).close()


def test_the_gate_lets_one_in_at_a_time(tmp_path: Path) -> None:
    a, b = Together(tmp_path), Together(tmp_path)
    with a.gate(), a.gate(), pytest.raises(LaterError, match="another driver has held"), b.gate(0.05):
        pass
    with b.gate(0.05):
        pass
    a.close()
    b.close()


def test_what_the_last_does_at_the_end_it_does_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drivers, "LONG_PATIENCE", 0.05)
    a, b = Together(tmp_path), Together(tmp_path)
    take(a, "s-0000")
    assert a.leave() is False
    assert look(b) == (0, frozenset())
    assert b.leave() is True
    with pytest.raises(UserError, match="another driver has held"):
        Together(tmp_path)
    b.close()
    c = Together(tmp_path)
    assert c.leave() is True
    a.close()
    c.close()


@contextmanager
def process(folder: Path, *uids: str) -> Iterator[subprocess.Popen[str]]:
    """A driver that has these under way, and does nothing."""
    code = (
        "import sys, pathlib, time\n"
        "from bench.drivers import Together\n"
        "one = Together(pathlib.Path(sys.argv[1]))\n"
        "with one.gate():\n    one.own |= set(sys.argv[2:])\n"
        "print('ready', flush=True)\ntime.sleep(600)\n"
    )
    made = subprocess.Popen([sys.executable, "-c", code, str(folder), *uids], stdout=subprocess.PIPE, text=True)
    assert made.stdout is not None
    try:
        assert made.stdout.readline() == "ready\n"
        yield made
    finally:
        made.kill()
        made.wait()
        made.stdout.close()


def test_a_killed_process_is_no_driver_any_more_and_a_stopped_one_is(tmp_path: Path) -> None:
    a = Together(tmp_path)
    with process(tmp_path, "s-0000") as one, process(tmp_path, "s-0001") as two:
        two.send_signal(signal.SIGSTOP)
        assert look(a) == (2, {"s-0000", "s-0001"})
        one.kill()
        one.wait()
        assert look(a) == (1, {"s-0001"})
    assert look(a) == (0, frozenset())
    a.close()
    assert [path.name for path in (tmp_path / "drivers").iterdir()] == ["gate"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "drivers").touch()
    with pytest.raises(UserError, match=r"cannot write to .*drivers"):
        Together(tmp_path)
    Alone(tmp_path).close()  # and nothing holds it
