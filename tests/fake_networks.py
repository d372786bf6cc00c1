"""A measurement of robustness whose workers pretend: a network is a file that holds the number of its epochs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.config import TrialConfig, TrialResult
from bench.engine import Task
from bench.place import Options, Place, Share
from bench.robustness import Ready, Robustness
from bench.robustness_plan import Plan, RobustnessConfig
from bench.rows import RowFile

EPOCHS = 2
CHANCE = 0.1
LEVELS = {"update": (0.1, 0.3), "weight": (0.1, 0.2), "fgsm": (0.01, 0.02)}


class Silent:
    """A tracker that writes down what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **_: self.calls.append((name, *given))

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def link(self) -> dict[str, None]:
        return {"experiment_id": None}

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [given for called, *given in self.calls if called == name]


def ready(
    folder: Path,
    *names: str,
    levels: Mapping[str, tuple[float, ...]] = LEVELS,
    given: list[tuple[TrialConfig, Path]] | None = None,
    **changes: Any,
) -> Ready:
    rules = {r: TrialConfig(rule=r, arch="lenet", epochs=EPOCHS).to_dict() for r in ("backprop", *names)}
    config = RobustnessConfig(name="m", rules=rules, levels=dict(levels), **{"seeds": 2, **changes})
    place = Place(
        options=Options(results=folder),
        share=Share(concurrent=2, threads=1, gpus=0.0),
        dataset=("digits", "0"),
        examples={"train": 8, "val": 1, "test": 360},
        chance=CHANCE,
        key="cpu 0",
        uri="",
        artifacts=None,
    )
    return Ready(config=config, plan=Plan(config, key="cpu 0", folder=folder / "m", given=given or []), place=place)


def source(folder: Path, *names: str, **changes: Any) -> Robustness:
    made = ready(folder, *names, **changes)
    return Robustness(made, Silent(), RowFile(made.folder / "rows.jsonl"))  # type: ignore[arg-type]


def file_of(task: Task) -> Path | None:
    """The network that a task makes or needs; None for noise in training."""
    path = Path(task.options.get("network") or task.options["checkpoint"])
    return path if path.parent.name == "networks" else None


def trains(task: Task) -> bool:
    path = file_of(task)
    return path is not None and (not path.exists() or path.read_text() != str(EPOCHS))


def begin(task: Task) -> None:
    """Half of the way: whoever trains has written its first epoch."""
    if (path := file_of(task)) and trains(task):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")


def accuracy(task: Task) -> float:
    level = task.options.get("evaluation", {}).get("level", task.config.update_noise)
    return 0.9 - level


def end(task: Task, status: str = "finished") -> TrialResult:
    evaluation = task.options.get("evaluation", {})
    if (path := file_of(task)) and status == "finished":
        path.write_text(str(EPOCHS))
    if status == "failed":  # such a result comes from whoever watches the worker, who knows no evaluation
        return TrialResult(config=task.config, status="failed", reason="a bug")
    value = CHANCE if status == "diverged" else accuracy(task)
    metrics = {"test_acc": value} | ({} if evaluation else {"val_acc": value})
    here = {"here": 1}
    return TrialResult(config=task.config, status=status, metrics=metrics, evaluation=evaluation, provenance=here)


def finish(made: Robustness, task: Task, status: str = "finished") -> None:
    made.started(task.uid)
    begin(task)
    made.completed(task.uid, end(task, status))


def drain(made: Robustness, status: Callable[[Task], str] = lambda _: "finished") -> list[Task]:
    """Run everything, one after the other."""
    done = []
    while isinstance(task := made.next(), Task):
        finish(made, task, status(task))
        done.append(task)
    assert task is None
    assert made.complete
    return done


def kinds(tasks: list[Task]) -> Counter[str]:
    def kind(task: Task) -> str:
        return task.options["evaluation"]["site"] if "evaluation" in task.options else "training"

    return Counter(map(kind, tasks))


def curves(made: Robustness) -> dict[tuple[str, str], list[tuple[float, float | None, int, int]]]:
    """(site, rule): (level, mean accuracy, diverged, failed) at every level but the clean one."""
    return {
        (site["site"], rule["rule"]): [
            (at["level"], at["acc"] and at["acc"]["mean"], at["diverged"], at["failed"]) for at in rule["curve"]
        ]
        for site in made.summary()["sites"]
        for rule in site["rules"]
    }
