"""A search for a fixed time by bench, by a plain Optuna loop and by stock Ray Tune (search_tools.py), in rounds.

    python tests/benchmarks/search_comparison.py SECONDS [--rounds 3] [--rule sparse] [--arch resnet20] [--epochs 4]

It prints JSON: of each way and number its mean, standard deviation, n and 95 % interval over the rounds, and every
search. ``first_step``: seconds until the first training step began. ``trials``: that ended in time; ``per_hour``: of
them, from the first step on. ``best``: their greatest validation accuracy. ``idle``: the share of the machine's cores
that was idle since the first trial ended (None where the system does not tell); whatever else runs there is
busy, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from search_tools import WAYS

from bench.provenance import provenance, usable_cores
from bench.statistics import estimate

NUMBERS = ("first_step", "trials", "per_hour", "best", "idle")
#: Seconds that a way has to end after its time.
GRACE = 60.0

Found = dict[str, Any]


def compare(trial: Mapping[str, Any], seconds: float, rounds: int) -> list[Found]:
    """Every way in each round, which is also the seed; in an order drawn anew: nobody always follows the same one."""
    found, order = [], random.Random(0)
    for number in range(rounds):
        for way in order.sample(list(WAYS), len(WAYS)):
            print(f"round {number + 1} of {rounds}: {way}, {seconds:.0f} s …", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix="bench-comparison-", ignore_cleanup_errors=True) as folder:
                found.append(_run(way, {**trial, "seed": number}, seconds, Path(folder)))
    return found


def over_rounds(found: list[Found]) -> dict[str, Found]:
    """Each number of each way over its rounds; None: it has none."""
    known = {
        way: {name: [each[name] for each in found if each["way"] == way and each[name] is not None] for name in NUMBERS}
        for way in WAYS
    }
    return {
        way: {name: estimate(values).to_dict() if values else None for name, values in numbers.items()}
        for way, numbers in known.items()
    }


def _run(way: str, trial: Mapping[str, Any], seconds: float, folder: Path) -> Found:
    script = Path(__file__).with_name("search_tools.py")
    command = [sys.executable, str(script), way, str(folder), json.dumps(dict(trial))]
    log, began = folder / "log", time.time()
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=folder, start_new_session=True)
        try:
            lasted, idle = _watch(process, folder / "ends.jsonl", began + seconds)
        finally:
            _end(process)
    if not lasted:
        sys.exit(f"{way} ended before its time: {log.read_text(errors='replace')}")
    return _count(way, seconds, began, folder / "ends.jsonl", idle)


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


def _count(way: str, seconds: float, began: float, ends: Path, idle: float | None) -> Found:
    lines = [json.loads(line) for line in ends.read_text().splitlines()] if ends.exists() else []
    firsts = [line["first"] for line in lines if line["first"] is not None]
    first = min(firsts) - began if firsts else None
    in_time = [line for line in lines if line["end"] <= began + seconds]
    return {
        "way": way,
        "seconds": seconds,
        "first_step": first,
        "trials": len(in_time),
        "per_hour": 0.0 if first is None else len(in_time) / (seconds - first) * 3600,
        "best": max((line["val_acc"] for line in in_time), default=None),
        "idle": idle,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--rounds", type=int, default=3)
    for name, default in (("rule", "sparse"), ("arch", "resnet20"), ("dataset", "digits")):
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--epochs", type=int, default=4)
    given = vars(parser.parse_args())
    seconds, rounds = given.pop("seconds"), given.pop("rounds")
    found = compare(given, seconds, rounds)
    print(json.dumps({"trial": given, "provenance": provenance("cpu"), "ways": over_rounds(found), "searches": found}))
