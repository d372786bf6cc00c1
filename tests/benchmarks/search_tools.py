"""Three ways to search without end, with one trial function: python search_tools.py WAY FOLDER JSON.

``bench``; ``optuna``, a plain loop of study.optimize in one process; ``ray``, Ray Tune with its OptunaSearch and its
MLflowLoggerCallback, as its documentation shows them. Each has its own TPE, as it comes: Optuna's defaults, in bench
those of `bench.choices`. The seed that JSON has is the sampler's and the networks', all train on the CPU, nothing is
stopped early, MLflow is an SQLite file where there is one, and each has the whole machine. search_comparison.py runs
them one after another and reads what the trial function notes in FOLDER/ends.jsonl.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.config import StudyConfig, TrialConfig, TrialResult
from bench.place import Options
from bench.recipes import recipe_of
from bench.space_files import load_space
from bench.trial import run_trial

FOLDER = "BENCH_COMPARISON"


def trial(config: TrialConfig, report: Callable[[int, Mapping[str, float]], None], **options: Any) -> TrialResult:
    """`run_trial`; when its first step began, when it ended and how well is noted, whoever called it."""
    first: list[float] = []

    def noted(epoch: int, metrics: Mapping[str, float]) -> None:
        first.append(time.time() - metrics["epoch_seconds"])
        report(epoch, metrics)

    result = run_trial(config, noted, **{**options, "device": "cpu"})
    line = {"first": first[0] if first else None, "end": time.time(), "val_acc": result.metrics["val_acc"]}
    line["seed"] = config.seed
    with (Path(os.environ[FOLDER]) / "ends.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    return result


def fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """What all trials have in common, the seed of the networks too."""
    return {**recipe_of(given["dataset"], given["arch"]), **given}


def of_bench(given: Mapping[str, Any], folder: Path) -> None:
    from bench.search import check, search
    from bench.streams import quiet

    space = load_space(given["rule"], given["arch"])
    names = ("rule", "arch", "dataset", "epochs")
    config = StudyConfig(
        name="comparison",
        **{name: given[name] for name in names},
        trials=10**6,
        sampler="tpe",
        scheduler="none",
        seed=given["seed"],
        confirm_seeds=0,
        recipe={**recipe_of(given["dataset"], given["arch"]), **space.settings},
        space=space.to_dict(),
    )
    ready = check(config, space, Options(results=folder, device="cpu"))
    with quiet(ready.folder / "ray.log"):
        search(ready, say=lambda _: None, trial="search_tools:trial")


def of_optuna(given: Mapping[str, Any], folder: Path) -> None:
    import optuna

    space = load_space(given["rule"], given["arch"])
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=given["seed"]))

    def objective(asked: optuna.Trial) -> float:
        params = {name: asked._suggest(name, d) for name, d in space.distributions().items()}
        config = TrialConfig.from_dict({**fields(given), **space.settings, **space.changes(params)})
        checkpoint = str(folder / f"{asked.number}.pt")
        result = trial(config, lambda epoch, metrics: asked.report(metrics["val_acc"], epoch), checkpoint=checkpoint)
        return result.metrics["val_acc"]

    study.optimize(objective, n_trials=None)


def of_ray(given: Mapping[str, Any], folder: Path) -> None:
    import ray
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback
    from ray.tune.search.optuna import OptunaSearch

    space = load_space(given["rule"], given["arch"])
    ranges = {
        name: (tune.loguniform if d.log else tune.uniform)(d.low, d.high)  # type: ignore[attr-defined]
        for name, d in space.distributions().items()
    }

    def trainable(params: dict[str, float]) -> None:
        config = TrialConfig.from_dict({**fields(given), **space.settings, **space.changes(params)})
        trial(config, lambda _, metrics: tune.report(dict(metrics)), threads=1, checkpoint="trial.pt")

    import optuna

    search = OptunaSearch(metric="val_acc", mode="max", sampler=optuna.samplers.TPESampler(seed=given["seed"]))
    ray.init(address="local", _node_ip_address="127.0.0.1", include_dashboard=False)
    tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        param_space=ranges,
        tune_config=tune.TuneConfig(search_alg=search, metric="val_acc", mode="max", num_samples=10**6),
        run_config=tune.RunConfig(
            storage_path=str(folder / "ray"),
            callbacks=[
                MLflowLoggerCallback(tracking_uri=f"sqlite:///{folder}/mlflow.db", experiment_name="comparison")
            ],
            verbose=0,
        ),
    ).fit()


WAYS: dict[str, Callable[[Mapping[str, Any], Path], None]] = {"bench": of_bench, "optuna": of_optuna, "ray": of_ray}

if __name__ == "__main__":
    os.environ[FOLDER] = sys.argv[2]
    WAYS[sys.argv[1]](json.loads(sys.argv[3]), Path(sys.argv[2]))
