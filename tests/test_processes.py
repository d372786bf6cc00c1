"""What a run borrows from the operating system comes back: streams, signals, folders, variables."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench import processes
from bench.config import UserError
from bench.streams import quiet


def test_quiet_catches_child_processes_and_gives_the_terminal_back(tmp_path: Path) -> None:
    code = """
import subprocess, sys
from pathlib import Path
from bench.streams import quiet
print("before")
with quiet(Path(sys.argv[1])) as (out, err):
    print("noise")
    subprocess.run(["sh", "-c", "echo child; echo moan >&2"])
    out.write("shown\\n")
    err.write("warned\\n")
    with quiet(Path(sys.argv[1])) as (inner, _):
        inner.write("inner\\n")
print("after")
"""
    log = tmp_path / "new" / "ray.log"
    done = subprocess.run([sys.executable, "-c", code, str(log)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("before\nshown\nafter\n", "warned\n")
    assert sorted(log.read_text().split()) == ["child", "inner", "moan", "noise"]


def test_quiet_says_that_a_log_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose a writable folder"), quiet(tmp_path):
        pass


def test_interrupts_come_once_and_handlers_come_back() -> None:
    seen: list[int] = []
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    mine = signal.getsignal(signal.SIGTERM)
    try:
        with processes.Interrupts() as interrupts:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as ray.init does
            interrupts.arm()
            assert not interrupts.raised
            signal.raise_signal(signal.SIGTERM)
            assert (interrupts.raised, seen) == (True, [])
            signal.raise_signal(signal.SIGTERM)
            assert seen == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_scratch_folder_is_removed_and_so_are_abandoned_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(f"/tmp/b{os.getpid()}")  # pytest's own folders have too long a path for a socket
    monkeypatch.setattr("tempfile.tempdir", str(root))
    root.mkdir()
    try:
        for name in ("bench-dead", "bench-newborn", "other"):
            (root / name).mkdir()
            (root / name / "owner").touch()
        for name in ("bench-dead", "other"):
            os.utime(root / name / "owner", (0, 0))
        (root / "bench-dead" / "session" / "logs").mkdir(parents=True)
        (root / "bench-dead" / "latest").symlink_to(root / "bench-dead" / "session")
        with processes.scratch_folder() as folder:
            os.utime(folder / "owner", (0, 0))
            assert {p.name for p in root.iterdir()} == {"bench-newborn", "other", folder.name}
            with processes.scratch_folder():
                assert folder.exists()  # its owner lives
        assert {p.name for p in root.iterdir()} == {"bench-newborn", "other"}
    finally:
        subprocess.run(["rm", "-r", str(root)], check=True)


def test_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_A", "1")
    with processes.environment({"BENCH_A": "2", "BENCH_B": "3"}):
        assert (os.environ["BENCH_A"], os.environ["BENCH_B"]) == ("2", "3")
    assert os.environ["BENCH_A"] == "1"
    assert "BENCH_B" not in os.environ
