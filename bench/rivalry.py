"""A search for a fixed time, by bench and by what else there is, with one trial function: tests/rivals.py runs them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench
from bench.config import Strict, UserError
from bench.provenance import usable_cores
from bench.statistics import estimate

#: bench; study.optimize in one process; Ray Tune with its own OptunaSearch and MLflowLoggerCallback.
WAYS = ("bench", "optuna", "ray")
#: What is measured of each.
NUMBERS = ("first_step", "trials", "per_hour", "best", "idle")
#: Seconds that a way has to end after its time.
GRACE = 60.0


@dataclass(frozen=True, kw_only=True)
class Search(Strict):
    """One way to search, for so many ``seconds`` from the command on.

    ``first_step``: until the first training step began. ``trials``: that ended in time; ``per_hour``: of them, from the
    first step on. ``best``: their greatest validation accuracy, None without a trial. ``idle``: the share of the
    machine's cores that was idle since the first trial ended (None where the system does not tell); whatever else runs
    there counts as busy.
    """

    way: str
    seconds: float
    first_step: float | None
    trials: int
    per_hour: float
    best: float | None
    idle: float | None


def compared(trial: Mapping[str, Any], seconds: float, *, rounds: int, say: Callable[[str], None]) -> list[Search]:
    """Every way, one after the other, in each round. ``trial``: rule, arch, dataset, epochs. UserError if one fails.

    The seed of the sampler and of the networks is the round's number. The order is drawn anew for each round: nobody
    always follows the same other one.
    """
    script = Path(bench.__file__).parents[1] / "tests" / "rivals.py"
    if not script.exists():
        raise UserError("--search compares with programs in the tests, which are not installed: run it in a checkout.")
    found = []
    order = random.Random(0)
    for number in range(rounds):
        for way in order.sample(WAYS, len(WAYS)):
            say(f"round {number + 1} of {rounds}: {way}, {seconds:.0f} s …")
            with tempfile.TemporaryDirectory(prefix="bench-rival-", ignore_cleanup_errors=True) as folder:
                found.append(_run(script, way, {**trial, "seed": number}, seconds, Path(folder)))
    return sorted(found, key=lambda search: WAYS.index(search.way))


def over_rounds(found: Sequence[Search]) -> dict[str, dict[str, dict[str, float | int | None] | None]]:
    """For every way, each of its numbers over its rounds, as `bench.statistics.estimate` has it; None: it has none."""
    ways = {way: [search for search in found if search.way == way] for way in WAYS}
    return {way: {name: _estimate(searches, name) for name in NUMBERS} for way, searches in ways.items()}


def _estimate(searches: Sequence[Search], name: str) -> dict[str, float | int | None] | None:
    known = [float(value) for search in searches if (value := getattr(search, name)) is not None]
    return estimate(known).to_dict() if known else None


def _run(script: Path, way: str, trial: Mapping[str, Any], seconds: float, folder: Path) -> Search:
    command = [sys.executable, str(script), way, str(folder), json.dumps(dict(trial))]
    paths = os.pathsep.join([str(script.parents[1]), str(script.parent), os.environ.get("PYTHONPATH", "")])
    log = folder / "log"
    began = time.time()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=out,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": paths.rstrip(os.pathsep)},
            start_new_session=True,
        )
        try:
            lasted, idle = _watch(process, folder / "ends.jsonl", began + seconds)
        finally:
            _end(process)
    if not lasted:
        words = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
        raise UserError(f"{way} ended before its time: {words[-1]}")
    return _search(way, seconds, began, folder / "ends.jsonl", idle)


def _watch(process: subprocess.Popen[bytes], ends: Path, deadline: float) -> tuple[bool, float | None]:
    """Whether it went on until its time was over; and the idle share of the cores since the first trial ended."""
    start: tuple[float, float] | None = None
    while time.time() < deadline:
        if process.poll() is not None:
            return False, None
        if start is None and ends.exists():
            start = _core_seconds()
        time.sleep(0.05)
    end = _core_seconds()
    if start is None or end is None:
        return True, None
    passed = end[1] - start[1]
    return True, (end[0] - start[0]) / passed if passed > 0 else None


def _core_seconds(stat: Path = Path("/proc/stat")) -> tuple[float, float] | None:
    """What all cores have been idle since the machine was started, and in all; in the kernel's own unit.

    None where the system does not tell, and where only a part of its cores is ours.
    """
    if not stat.exists() or usable_cores() < (os.cpu_count() or 1):
        return None
    times = [float(word) for word in stat.read_text().splitlines()[0].split()[1:9]]  # guests are in user and nice
    return times[3] + times[4], sum(times)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _search(way: str, seconds: float, began: float, ends: Path, idle: float | None) -> Search:
    lines = [json.loads(line) for line in ends.read_text().splitlines()] if ends.exists() else []
    firsts = [line["first"] for line in lines if line["first"] is not None]
    first = min(firsts) - began if firsts else None
    in_time = [line for line in lines if line["end"] <= began + seconds]
    best = max((line["val_acc"] for line in in_time), default=None)
    per_hour = 0.0 if first is None else len(in_time) / (seconds - first) * 3600
    return Search(
        way=way,
        seconds=seconds,
        first_step=first,
        trials=len(in_time),
        per_hour=per_hour,
        best=best,
        idle=idle,
    )
