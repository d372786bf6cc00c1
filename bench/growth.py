"""What a search costs beside its trials, and how that grows: a real one, of trials that do nothing.

Ray, Optuna, rows, MLflow and pages are as ever, in a process of its own for each size, and in a folder that goes away.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.campaign import Campaign, Ready
from bench.config import Strict, StudyConfig, TrialConfig, TrialResult, UserError
from bench.place import Options
from bench.recipes import recipe_of
from bench.search import check, search
from bench.space_files import load_space
from bench.streams import quiet

#: Epochs of a trial that does nothing: so many reports are made of it.
EPOCHS = 2
#: The share of the trials after which the cost of one more is measured.
LATE = 0.9


@dataclass(frozen=True, kw_only=True)
class Growth(Strict):
    """A search of so many trials. Seconds; ``late``: of one trial, over the last tenth of them. Memory and disk in MB.

    ``overhead``: (seconds − start) / trials, where ``start`` is the time from the command to the first finished trial.
    ``memory``: the driver's greatest resident set. ``disk``: rows, journal and MLflow's database. ``left``: operations
    that MLflow had not taken half a minute after the search, which `bench sync` records from the rows.
    """

    trials: int
    sampler: str
    seconds: float
    start: float
    overhead: float
    late: float
    memory: float
    disk: float
    rows: float
    journal: float
    mlflow: float
    left: int


def nothing(config: TrialConfig, report: Callable[[int, Mapping[str, float]], None], **_: Any) -> TrialResult:
    """A trial function that reports as one that trains would, and does nothing else."""
    history = []
    for epoch in range(1, config.epochs + 1):
        metrics = {"val_acc": 0.1 + 0.01 * epoch, "val_loss": 2.3, "train_loss": 2.3, "angle": 90.0, "seconds": 0.0}
        report(epoch, metrics)
        history.append({"epoch": float(epoch), **metrics})
    final = {"val_acc": history[-1]["val_acc"], "test_acc": 0.1, "train_seconds": 0.0}
    return TrialResult(config=config, status="finished", metrics=final, history=history, provenance={"classes": 10})


def measure(trials: int, sampler: str) -> Growth:
    """One search of so many trials, in a process of its own; UserError if it fails."""
    with tempfile.TemporaryDirectory(prefix="bench-growth-") as folder:
        command = [sys.executable, "-m", "bench.growth", str(trials), sampler, folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(
                f"the search of {trials} trials failed: {(done.stderr.strip() or 'no word').splitlines()[-1]}"
            )
        return Growth.from_dict(json.loads(done.stdout.splitlines()[-1]))


def grown(sizes: Iterable[int], sampler: str, say: Callable[[str], None]) -> list[Growth]:
    """A measurement for each number of trials."""
    found = []
    for trials in sizes:
        say(f"a search of {trials} trials that do nothing, sampler {sampler} …")
        found.append(measure(trials, sampler))
    return found


def ready_for(trials: int, results: Path, *, sampler: str = "random", epochs: int = EPOCHS) -> Ready:
    """A search of sparse on lenet, named growth, with nothing that stops its trials."""
    space = load_space("sparse", "lenet")
    config = StudyConfig(
        name="growth",
        rule="sparse",
        arch="lenet",
        dataset="digits",
        trials=trials,
        epochs=epochs,
        sampler=sampler,
        scheduler="none",
        confirm_seeds=1,
        recipe={**recipe_of("digits", "lenet"), **space.settings},
        space=space.to_dict(),
    )
    return check(config, space, Options(results=results))


def searched(trials: int, sampler: str, results: Path) -> dict[str, Any]:
    """What such a search costs, in this process; SystemExit with a line for one that did not come to its end."""
    began = time.perf_counter()
    ready = ready_for(trials, results, sampler=sampler)
    ends: list[float] = []

    def watch(campaign: Campaign) -> Callable[[], None]:
        def tick() -> None:
            while len(ends) < campaign.filed("search"):
                ends.append(time.perf_counter())

        return tick

    with quiet(ready.folder / "ray.log"):
        outcome, summary = search(ready, say=print, watch=watch, trial="bench.growth:nothing")
    if outcome != "done" or len(ends) < trials:
        sys.exit(f"the search was {outcome} after {len(ends)} of {trials} trials; measure it again.")
    seconds = time.perf_counter() - began
    start = ends[0] - began
    late = ends[int(LATE * len(ends)) :]
    sizes = {
        name: _megabytes(ready.folder / file) for name, file in (("rows", "rows.jsonl"), ("journal", "journal.log"))
    }
    sizes["mlflow"] = sum(_megabytes(path) for path in results.glob("mlflow.db*"))
    return {
        "trials": trials,
        "sampler": sampler,
        "seconds": seconds,
        "start": start,
        "overhead": (seconds - start) / trials,
        "late": (late[-1] - late[0]) / max(1, len(late) - 1),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        / 1024
        * (1 if sys.platform == "linux" else 2**-10),
        "disk": sum(sizes.values()),
        "left": summary["mlflow"]["lost"],
        **sizes,
    }


def _megabytes(path: Path) -> float:
    return path.stat().st_size / 2**20


if __name__ == "__main__":
    print(json.dumps(searched(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))))
