"""The driver of a search, as a script to be killed: python storage_driver.py RESULTS URL TRIALS SECONDS_PER_EPOCH.

What `bench search --storage` does, without Ray, training and MLflow. Prints one line per event.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench import search
from bench.campaign import Campaign, Ready
from bench.config import StudyConfig, TrialResult
from bench.director import Task
from bench.pages.parts import Page
from bench.place import Options, Place, Share
from bench.space_files import load_space
from rehearsal import Silent

EPOCHS, CONCURRENT = 3, 2


def main() -> None:
    results, url, trials, seconds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    space = load_space("sparse", "resnet18", space="reference")
    place = Place(
        options=Options(results=results, storage=url),
        share=Share(concurrent=CONCURRENT, threads=1, gpus=0.0),
        dataset=("digits", "0"),
        examples={"train": 8, "val": 1, "test": 2},
        chance=0.1,
        key="cpu 0",
        uri="",
        artifacts=None,
    )
    config = StudyConfig(
        name="s",
        rule="sparse",
        arch="resnet18",
        dataset="digits",
        trials=trials,
        epochs=EPOCHS,
        sampler="random",
        confirm_seeds=2,
        space=space.to_dict(),
    )
    tracker = Silent()

    class Opener(ExitStack):
        def __enter__(self) -> Any:
            return tracker

    search.Tracker.open = lambda **_: Opener()  # type: ignore[assignment, method-assign]
    search.search_page = lambda *_: Page(title="a search", kind="", facts={}, sections=())
    with search.opened(Ready(config=config, space=space, place=place), say=say) as it:
        play(it.campaign, seconds)
        summary = it.finish("done")
    say(f"complete {summary['complete']}")
    say(f"ended {next(arguments[0] for name, arguments in tracker.calls if name == 'close')}")


def say(line: str) -> None:
    print(line, flush=True)


def play(campaign: Campaign, seconds: float) -> None:
    """`bench.engine.run`, with checkpoints that hold the number of epochs done."""
    under_way: list[tuple[Task, int]] = []
    while True:
        task = campaign.next() if len(under_way) < CONCURRENT else None
        while isinstance(task, Task):
            path = Path(task.options["checkpoint"])
            done = int(path.read_text()) if path.exists() else 0
            campaign.started(task.uid)
            say(f"started {task.uid} after {done}")
            under_way.append((task, done))
            task = campaign.next() if len(under_way) < CONCURRENT else None
        if task is None and not under_way:
            return
        time.sleep(seconds)
        under_way = [(task, done + 1) for task, done in under_way if not _over(campaign, task, done + 1)]


def _over(campaign: Campaign, task: Task, epoch: int) -> bool:
    """One epoch: whether it was the last."""
    accuracy = min(0.9, 0.2 + 0.1 * task.config.coefficients.get("sparse", 1.0)) * min(epoch, EPOCHS) / EPOCHS
    stopped = False
    if epoch <= EPOCHS:
        path = Path(task.options["checkpoint"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(epoch))
        stopped = campaign.reported(task.uid, epoch, {"val_acc": accuracy})
    if epoch < EPOCHS and not stopped:
        return False
    metrics = {"val_acc": accuracy, "test_acc": accuracy}
    status: Any = "stopped" if stopped else "finished"
    campaign.completed(
        task.uid, TrialResult(config=task.config, status=status, metrics=metrics, provenance={"here": 1})
    )
    say(f"completed {task.uid}")
    return True


if __name__ == "__main__":
    main()
