"""What a search costs beside its trials: a real one, of trials that do nothing, in a folder that goes away.

    PYTHONPATH=tests python tests/benchmarks/search_overhead.py TRIALS [SAMPLER]

One process for each number of trials: ``memory`` is the greatest resident set that it has had. It prints JSON. Seconds:
``start`` to the end of the first trial, ``overhead`` = (seconds - start) / trials, ``late`` of one trial over the last
tenth. MB: ``memory`` of the driver, ``rows``, ``journal``, ``mlflow`` on disk. ``left``: operations that MLflow had
not taken half a minute after the search, for `bench sync`.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.campaign import Campaign
from bench.config import TrialConfig, TrialResult
from bench.search import search
from bench.streams import quiet
from soak_driver import ready_for

#: Reports that each trial makes.
EPOCHS = 2


def nothing(config: TrialConfig, report: Callable[[int, Mapping[str, float]], None], **_: Any) -> TrialResult:
    """Report as a trial that trains would, and do nothing else."""
    history = []
    for epoch in range(1, config.epochs + 1):
        metrics = {"val_acc": 0.1 + 0.01 * epoch, "val_loss": 2.3, "train_loss": 2.3, "angle": 90.0, "seconds": 0.0}
        report(epoch, metrics)
        history.append({"epoch": float(epoch), **metrics})
    final = {"val_acc": history[-1]["val_acc"], "test_acc": 0.1, "train_seconds": 0.0}
    return TrialResult(config=config, status="finished", metrics=final, history=history, provenance={"classes": 10})


def measure(trials: int, sampler: str, results: Path) -> dict[str, Any]:
    """What such a search costs; SystemExit for one that did not come to its end."""
    began = time.perf_counter()
    ready = ready_for(trials, results, sampler=sampler, epochs=EPOCHS)
    ends: list[float] = []

    def watch(campaign: Campaign) -> Callable[[], None]:
        def tick() -> None:
            ends.extend([time.perf_counter()] * (campaign.filed("search") - len(ends)))

        return tick

    with quiet(ready.folder / "ray.log"):
        outcome, summary = search(ready, say=print, watch=watch, trial="search_overhead:nothing")
    if outcome != "done" or len(ends) < trials:
        sys.exit(f"the search was {outcome} after {len(ends)} of {trials} trials; measure it again.")
    seconds, start = time.perf_counter() - began, ends[0] - began
    late = ends[int(0.9 * trials) :]
    return {
        "trials": trials,
        "sampler": sampler,
        "seconds": seconds,
        "start": start,
        "overhead": (seconds - start) / trials,
        "late": (late[-1] - late[0]) / max(1, len(late) - 1),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**10 if sys.platform == "linux" else 2**20),
        "rows": (ready.folder / "rows.jsonl").stat().st_size / 2**20,
        "journal": (ready.folder / "journal.log").stat().st_size / 2**20,
        "mlflow": sum(path.stat().st_size for path in results.glob("mlflow.db*")) / 2**20,
        "left": summary["mlflow"]["lost"],
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="bench-overhead-") as folder:
        found = measure(int(sys.argv[1]), (sys.argv[2:] or ["random"])[0], Path(folder))
    print(json.dumps(found))
