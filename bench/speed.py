"""`bench speed` of training steps and of a trial's stages: measured, and recorded in MLflow."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.config import Strict, TrialConfig, TrialResult, digest
from bench.learning.rules import parse_rule
from bench.provenance import provenance
from bench.stages import listening
from bench.steps import Conditions, Step, measure, ours
from bench.stores import check_uri, embedded
from bench.tracking import Tracker
from bench.training import pick_device
from bench.trial import run_trial

#: The study in MLflow under which measurements of speed stand.
STUDY = "speed"
#: How bench does a step; `tests/benchmarks` has other ways.
OURS = "bench"


def timed(
    conditions: Conditions,
    *,
    device: str,
    threads: int | None,
    results: Path,
    tracking_uri: str | None,
    say: Callable[[str], None],
) -> tuple[list[Step], dict[str, Any]]:
    """The steps under these conditions, and where they were measured; recorded."""
    if threads:
        torch.set_num_threads(threads)
    if tracking_uri:  # before minutes are spent on what could not be recorded
        check_uri(tracking_uri)
    found = measure(conditions, {OURS: ours}, device=device, say=say)
    where = _here(device)
    runs = {
        f"{STUDY}-{conditions.arch}-{step.rule}-{step.way}": (
            conditions.config(parse_rule(step.rule)),
            {n: float(v) for n, v in dataclasses.asdict(step).items() if not isinstance(v, str)},
            {"bench.rule": step.rule, "bench.way": step.way},
        )
        for step in found
    }
    _record(runs, where, results, tracking_uri, say)
    return found, where


@dataclass(frozen=True, kw_only=True)
class Share(Strict):
    """One stage of a trial: its seconds, how often it came, and its part of the whole."""

    stage: str
    seconds: float
    calls: int
    share: float


def of_trial(
    config: TrialConfig,
    *,
    data_dir: str | None,
    device: str,
    threads: int | None,
    results: Path,
    tracking_uri: str | None,
    say: Callable[[str], None],
) -> tuple[list[Share], dict[str, Any]]:
    """Where one trial's seconds go, the longest stage first, and where it ran; recorded. "rest": what is in no stage.

    A checkpoint is kept, as ever.
    """
    if tracking_uri:  # before minutes are spent on what could not be recorded
        check_uri(tracking_uri)
    with tempfile.TemporaryDirectory(prefix="bench-speed-") as folder, listening() as clock:
        began = time.perf_counter()
        run_trial(config, data_dir=data_dir, device=device, threads=threads, checkpoint=str(Path(folder) / "trial.pt"))
        whole = time.perf_counter() - began
    seconds = {**clock.seconds, "rest": whole - sum(clock.seconds.values())}
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    found = [Share(stage=n, seconds=s, calls=clock.calls.get(n, 1), share=s / whole) for n, s in ordered]
    where = _here(device)
    metrics = {f"{name}/{each.stage}": getattr(each, name) for each in found for name in ("seconds", "calls", "share")}
    tags = {"bench.rule": config.rule, "bench.way": "a trial's stages"}
    _record({f"{STUDY}-{config.arch}-{config.rule}-trial": (config, metrics, tags)}, where, results, tracking_uri, say)
    return found, where


def _here(device: str) -> dict[str, Any]:
    return {**provenance(str(pick_device(device))), "threads": torch.get_num_threads()}


def _record(
    runs: Mapping[str, tuple[TrialConfig, Mapping[str, float], Mapping[str, str]]],
    where: dict[str, Any],
    results: Path,
    tracking_uri: str | None,
    say: Callable[[str], None],
) -> None:
    """By name, what was timed, its numbers and its tags; each time they are new runs."""
    uri, artifacts = (tracking_uri, None) if tracking_uri else embedded(results)
    this = digest([sorted(runs), time.time_ns()])[:8]
    with Tracker.open(uri=uri, artifacts=artifacts, results=results, say=say) as tracker:
        tracker.study(STUDY, config={}, identity="bench speed")
        for name, (config, metrics, tags) in runs.items():
            tracker.start(f"{name}-{this}", "speed", config, tags)
            result = TrialResult(config=config, status="finished", metrics=dict(metrics), provenance=where)
            tracker.finish(f"{name}-{this}", result)
        if tracker.close():  # there are no rows of it
            say("MLflow has not all of this measurement; measure again when it answers.")
