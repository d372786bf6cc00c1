"""One run of a measurement of robustness, in a worker: a training, or one evaluation of a trained network."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.checkpoint import checkpoint_file, load_weights, read_checkpoint
from bench.config import TrialConfig, TrialResult, UserError
from bench.evaluators.accuracy import BATCH
from bench.evaluators.adversarial import ATTACKS, adversarial_accuracy
from bench.evaluators.robustness import noisy_accuracy
from bench.group import Group
from bench.training import Trial, prepare
from bench.trial import Report, provenance_of, run_trial


def run_probe(
    config: TrialConfig,
    report: Report | None = None,
    *,
    network: str | None = None,
    evaluation: Mapping[str, Any] | None = None,
    group: Group | None = None,
    **options: Any,
) -> TrialResult:
    """Train (``evaluation`` is None: `run_trial` with ``options``), or evaluate the network kept in this checkpoint.

    A network that is not there, or not to its last epoch, is trained first; but a user's own, of which ``evaluation``
    has the digest as ``file``, is measured as it is: UserError if it changed. The result of an evaluation has
    ``test_acc`` (the mean over draws; of an attack: over the attacked examples), ``test_acc_se`` (its standard error
    over draws) and how many draws or examples it is from. ``group``: its processes train together; the first of them
    evaluates, and the others' result is empty.
    """
    if evaluation is None or network is None:
        return run_trial(config, report, **options, group=group)
    started = time.perf_counter()
    where = {name: options[name] for name in ("data_dir", "device") if name in options}
    path = checkpoint_file(network)
    if "file" in evaluation:
        if not isinstance(path, Path) or not path.exists() or digest_of(path) != evaluation["file"]:
            raise UserError(f"{path} was changed or removed after the measurement began; restore it, or start again.")
    elif not path.exists() or read_checkpoint(path)["epoch"] < config.epochs:
        trained = run_trial(config, report, **{**options, "checkpoint": network}, group=group)
        if trained.status == "diverged":
            return TrialResult(
                config=config,
                status="diverged",
                reason=trained.reason,
                metrics={"test_acc": trained.metrics["val_acc"]},  # chance
                evaluation=dict(evaluation),
                provenance=trained.provenance,
            )
    if group is not None and group.rank > 0:
        return TrialResult(config=config, status="finished")
    if threads := options.get("threads"):
        torch.set_num_threads(threads)
    trial = prepare(config, **where, group=group)
    weights = read_checkpoint(path, trial.device)["model"]
    load_weights(path, trial.model, weights)
    with trial.autocast():
        metrics = _attacked(trial, evaluation) if evaluation["site"] in ATTACKS else _noisy(trial, evaluation)
    return TrialResult(
        config=config,
        status="finished",
        metrics=metrics,
        evaluation=dict(evaluation),
        provenance={**provenance_of(trial, time.perf_counter() - started), "network": digest_of_weights(weights)},
    )


def digest_of_weights(weights: Mapping[str, Tensor]) -> str:
    """Sixteen digits that tell this network from another, bit for bit: a training on a GPU may not repeat."""
    whole = hashlib.sha256()
    for name, value in weights.items():
        whole.update(name.encode())
        whole.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:16]


def digest_of(path: Path) -> str:
    """Sixteen digits that tell this file's content from another's."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _noisy(trial: Trial, evaluation: Mapping[str, Any]) -> dict[str, float]:
    def batches() -> Iterable[tuple[Tensor, Tensor]]:
        return trial.data.batches("test", BATCH, device=trial.device)

    found = noisy_accuracy(
        trial.model,
        batches,
        trial.data.normalize,
        site=evaluation["site"],
        level=evaluation["level"],
        draws=evaluation["draws"],
        seed=trial.config.seed,
        clip=evaluation.get("clip", False),
    )
    spread = {} if found.se is None else {"test_acc_se": found.se}
    return {"test_acc": found.mean, **spread, "draws": float(found.draws)}


def _attacked(trial: Trial, evaluation: Mapping[str, Any]) -> dict[str, float]:
    """On the same examples for every rule and level: a sample of the test split by the split's own seed."""
    count = min(evaluation["attacked"], trial.data.sizes["test"])
    pixels, labels = next(
        iter(trial.data.batches("test", count, device=trial.device, seed=trial.config.split_seed, epoch=0))
    )
    more = {"queries": evaluation["queries"]} if "queries" in evaluation else {}
    found = adversarial_accuracy(
        trial.model,
        pixels,
        labels,
        trial.data.normalize,
        attack=evaluation["site"],
        level=evaluation["level"],
        gradient=evaluation["gradient"],
        seed=trial.config.seed,
        **more,
    )
    settings = {f"attack/{name}": float(value) for name, value in found.settings.items()}
    return {"test_acc": found.accuracy, "examples": float(found.n), **settings}
