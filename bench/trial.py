"""One experiment, from its configuration to its result. No Ray, Optuna or MLflow in here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from bench.checkpoint import (
    File,
    checkpoint_file,
    load_optimizer,
    load_weights,
    previous,
    settle_checkpoint,
    write_checkpoint,
)
from bench.config import Status, TrialConfig, TrialResult, UserError
from bench.curves import area
from bench.evaluators.accuracy import BATCH, accuracy
from bench.evaluators.alignment import alignment as alignment_of
from bench.evaluators.alignment import floor_alignment
from bench.evaluators.robustness import noisy_accuracy
from bench.group import Group
from bench.provenance import code_of, older_code, provenance
from bench.stages import stage
from bench.training import Diverged, Trial, prepare, train_epoch

#: (epoch, from 1; its metrics). It may raise to end the trial from outside.
Report = Callable[[int, Mapping[str, float]], None]

#: Examples in the batch by which the angles are measured, and in those by which their floor is (its sd then: 0.1°).
ANGLE_EXAMPLES, FLOOR_EXAMPLES = 64, 256


def run_trial(
    config: TrialConfig,
    report: Report | None = None,
    *,
    data_dir: str | None = None,
    device: str = "auto",
    checkpoint: str | None = None,
    read_test: bool = False,
    threads: int | None = None,
    group: Group | None = None,
) -> TrialResult:
    """Train and evaluate one network; with ``noise_site = "update"`` one for each level of noise, in step.

    With ``checkpoint`` (a file, or its URI; of further networks FILE.1, FILE.2, ...) the state is saved after each
    epoch, and a run that finds it goes on from there to the same result, bit for bit on a CPU; the other code that
    epochs were made by, if any, is ``resumed_from`` in the provenance. ``read_test``: the protocol reads the test split
    once, for a confirmed configuration. ``threads``: of torch on the CPU; None leaves torch's own.

    ``group``: this is one of several processes that train the networks together, all called alike and with the same
    checkpoint, which the first of them writes; each reports, and returns, the same.

    A run that diverges is a result: status ``diverged``, its reason, chance as accuracy. UserError for a
    configuration that cannot be run.
    """
    started = time.perf_counter()
    if threads:
        torch.set_num_threads(threads)
    with stage("prepare"):
        lanes = _lanes(config, data_dir, device, checkpoint, group)
    status: Status = "finished"
    reason, tested, history = None, dict[str, float](), list[dict[str, float]]()
    try:
        for epoch in range(1, config.epochs + 1):  # those of a checkpoint too: whoever listens may have missed them
            for lane in lanes:
                lane.advance(epoch, first=lane is lanes[0])
            history.append(_epoch_of(lanes, config, epoch))
            _tell(report, history[-1])
        tested = _test(lanes, config) if read_test else {}
    except Diverged as end:
        status, reason = "diverged", f"epoch {min(lanes[0].trial.epoch + 1, config.epochs)}: {end}"
    finally:
        for lane in lanes:
            if lane.path is not None:
                settle_checkpoint(lane.path)
    trial = lanes[0].trial
    metrics = _at_chance(trial, config, read_test) if status == "diverged" else {**_but_epoch(history[-1]), **tested}
    metrics |= {
        "epochs_done": float(trial.epoch),
        "train_seconds": sum(e["seconds"] for lane in lanes for e in lane.trial.history),
    }
    return TrialResult(
        config=config,
        status=status,
        reason=reason,
        metrics=metrics,
        history=history,
        provenance={**provenance_of(trial, time.perf_counter() - started), **_resumed_from(lanes)},
    )


@dataclass
class _Lane:
    """One network of a run. All but the first may diverge: they then count at chance."""

    trial: Trial
    path: File | None
    lost: bool = False

    def advance(self, epoch: int, *, first: bool) -> None:
        """Train until so many epochs are done."""
        trial = self.trial
        while trial.epoch < epoch and not self.lost:
            try:
                _learn(trial)
            except Diverged:
                if first:
                    raise
                self.lost = True
            else:
                if self.path is not None and (trial.group is None or trial.group.rank == 0):
                    with stage("checkpoint"):
                        save(trial, self.path)

    def accuracy(self, epoch: int) -> float:
        """On the validation split, after this epoch."""
        return _chance(self.trial) if self.lost else self.trial.history[epoch - 1]["val_acc"]

    def test_accuracy(self) -> float:
        """On the test split; a loss there that is not finite is a divergence, as on any split."""
        if not self.lost:
            try:
                return score(self.trial, "test")["test_acc"]
            except Diverged:
                self.lost = True
        return _chance(self.trial)

    def seconds(self, epoch: int) -> float:
        return sum(e["seconds"] for e in self.trial.history[epoch - 1 : epoch])


def _lanes(
    config: TrialConfig, data_dir: str | None, device: str, checkpoint: str | None, group: Group | None
) -> list[_Lane]:
    """The networks of a run: one; where the area under update noise is measured, also one for each level of it.

    The first has the run's own configuration, by which its checkpoint is known. Of the others nobody reads the angles.
    """
    configs = [config]
    if config.noise_site == "update":
        plain = config.replace(noise_site=None, noise_levels=[], measure_alignment=False)
        configs += [plain.replace(update_noise=level) for level in config.noise_levels]
    lanes = []
    for index, each in enumerate(configs):
        trial = prepare(each, data_dir=data_dir, device=device, group=group)
        path = None if checkpoint is None else checkpoint_file(checkpoint, index)
        if path is not None:
            resume(trial, path)
        if group is not None:
            group.check_equal(trial.epoch, f"not all workers see the same {path}; --results must be on all nodes.")
        lanes.append(_Lane(trial, path))
    return lanes


def _resumed_from(lanes: list[_Lane]) -> dict[str, Any]:
    """The other code by which epochs of these networks were made, if any was."""
    older = older_code(code for lane in lanes for code in lane.trial.made_by)
    return {"resumed_from": older} if older else {}


def _learn(trial: Trial) -> None:
    """One epoch: its training, and what is measured after it."""
    started = time.perf_counter()
    learned = {**train_epoch(trial), "seconds": time.perf_counter() - started}
    learned |= {**measure(trial), "epoch_seconds": time.perf_counter() - started}
    trial.epoch += 1
    trial.history.append({"epoch": float(trial.epoch), **learned})


def _epoch_of(lanes: list[_Lane], config: TrialConfig, epoch: int) -> dict[str, float]:
    """What is known after an epoch: of the first network, and of the noise that the others train in."""
    found = dict(lanes[0].trial.history[epoch - 1])
    if len(lanes) > 1:
        found |= _area("val", config, [lane.accuracy(epoch) for lane in lanes[1:]])
        found["seconds"] = sum(lane.seconds(epoch) for lane in lanes)
    return found


def _test(lanes: list[_Lane], config: TrialConfig) -> dict[str, float]:
    """The test split, read once by each network."""
    found = score(lanes[0].trial, "test")
    if _evaluates_noise(config):
        found |= noise_area(lanes[0].trial, "test")
    if len(lanes) > 1:
        found |= _area("test", config, [lane.test_accuracy() for lane in lanes[1:]])
    return found


def _evaluates_noise(config: TrialConfig) -> bool:
    """Whether noise is put into the trained network: not that in updates, which is other networks' training."""
    return config.noise_site not in (None, "update")


def _area(split: str, config: TrialConfig, accuracies: list[float]) -> dict[str, float]:
    """``SPLIT_area``, and ``SPLIT_acc/SITE/LEVEL`` at each level."""
    at = {f"{split}_acc/{config.noise_site}/{n:g}": a for n, a in zip(config.noise_levels, accuracies, strict=True)}
    return {f"{split}_area": area(config.noise_levels, accuracies), **at}


def noise_area(trial: Trial, split: str) -> dict[str, float]:
    """The area under accuracy against the noise that the configuration names, at an evaluation site."""
    config, data, site = trial.config, trial.data, trial.config.noise_site
    assert site is not None

    def batches() -> Iterable[tuple[Tensor, Tensor]]:
        return data.batches("val" if split == "val" else "test", BATCH, device=trial.device)

    def at(level: float) -> float:
        return noisy_accuracy(
            trial.model,
            batches,
            data.normalize,
            site=site,
            level=level,
            draws=config.noise_draws,
            seed=config.seed,
        ).mean

    with trial.autocast(), stage("noise"):
        accuracies = _divided(at, config.noise_levels, trial)
    return _area(split, config, accuracies)


def _divided(measure: Callable[[float], float], levels: Sequence[float], trial: Trial) -> list[float]:
    """What is measured at each level; a group's processes take turns, because noise is drawn for whole batches."""
    group = trial.group
    if group is None:
        return [measure(level) for level in levels]
    mine = range(len(levels))[group.rank :: group.size]
    own = [measure(level) if i in mine else 0.0 for i, level in enumerate(levels)]
    found: list[float] = group.sum(torch.tensor(own, dtype=torch.float64)).tolist()
    return found


def _chance(trial: Trial) -> float:
    return 1.0 / trial.data.classes


def _tell(report: Report | None, epoch: Mapping[str, float]) -> None:
    if report is not None:
        report(int(epoch["epoch"]), _but_epoch(epoch))


def _but_epoch(epoch: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in epoch.items() if name != "epoch"}


def _at_chance(trial: Trial, config: TrialConfig, read_test: bool) -> dict[str, float]:
    """What a diverged run counts as: the accuracy of guessing, and nothing that it had before."""
    chance = {"acc": _chance(trial), "top5": min(5, trial.data.classes) / trial.data.classes}
    if config.noise_site is not None:
        chance["area"] = chance["acc"]
    return {f"{split}_{k}": v for split in (("val", "test") if read_test else ("val",)) for k, v in chance.items()}


def provenance_of(trial: Trial, seconds: float) -> dict[str, Any]:
    """Where and on what this result came about; ``seconds`` of wall clock."""
    return {
        **provenance(str(trial.device)),
        "precision": "bf16" if trial.bf16 else "float32",
        "threads": torch.get_num_threads(),
        **({} if trial.group is None else {"workers": trial.group.size}),
        "dataset_digest": trial.data.digest,
        "examples": dict(trial.data.sizes),
        "classes": trial.data.classes,
        "asymmetric_layers": len(trial.conversion.swapped),
        "kept_layers": trial.conversion.kept if trial.conversion.swapped else {},
        "seconds": seconds,
    }


def measure(trial: Trial) -> dict[str, float]:
    """What is known after an epoch: validation, and the angles. Diverged if a weight is not finite."""
    _check_weights(trial.model)
    metrics = score(trial, "val")
    if _evaluates_noise(trial.config):
        metrics |= noise_area(trial, "val")
    if not trial.conversion.swapped:
        return {**metrics, "angle": 0.0, "dx_angle": 0.0} if trial.config.measure_alignment else metrics
    if trial.config.measure_alignment:
        metrics |= alignment(trial, floor=trial.epoch + 1 == trial.config.epochs)
    return {k: v for k, v in metrics.items() if math.isfinite(v)}


def _check_weights(model: nn.Module) -> None:
    """Diverged if a parameter is not finite, W or B: the loss need not show what the last step did, nor what B is."""
    named = {name: p.detach() for name, p in model.named_parameters()}
    sizes = torch.stack([size.float() for size in torch._foreach_norm(list(named.values()))])  # one wait for the device
    if not bool(sizes.isfinite().all()):
        name = list(named)[int(sizes.isfinite().logical_not().nonzero()[0])]
        what = "too large to compute with" if bool(named[name].isfinite().all()) else "not finite"
        raise Diverged(f"the {'feedback weight' if name.endswith('feedback') else 'weight'} {name} is {what}")


def alignment(trial: Trial, *, floor: bool) -> dict[str, float]:
    """The angles, by a fixed random sample of the validation split; with ``floor`` also what they cannot go below."""
    if trial.sample is None:
        count = min(ANGLE_EXAMPLES, trial.data.sizes["val"])
        drawn = trial.data.batches("val", count, device=trial.device, seed=trial.config.split_seed)
        pixels, labels = next(drawn)
        trial.sample = trial.data.normalize(pixels), labels
    with stage("angles"):
        return {**alignment_of(trial.model, *trial.sample), **(_floor(trial) if floor else {})}


def _floor(trial: Trial) -> dict[str, float]:
    """`floor_alignment` where amp sees the plain activations, by batches such as a further epoch would have."""
    config, data = trial.config, trial.data
    if config.feedback_input != "activations" or config.stabilize:
        return {}
    size = config.batch_size // config.accumulate
    batches = data.batches(
        "train", size, device=trial.device, seed=config.seed, epoch=config.epochs, augment=config.augment
    )
    several = islice(batches, max(2, FLOOR_EXAMPLES // size))
    with torch.random.fork_rng([trial.device] if trial.device.type == "cuda" else []):
        torch.manual_seed(config.seed)  # dropout draws
        return floor_alignment(trial.model, (data.normalize(pixels) for pixels, _ in several))


def score(trial: Trial, split: str) -> dict[str, float]:
    """``SPLIT_acc``, ``SPLIT_top5`` and ``SPLIT_loss``; Diverged if the loss is not finite."""
    group = trial.group
    pick = None if group is None else group.pick
    batches = trial.data.batches("val" if split == "val" else "test", BATCH, device=trial.device, pick=pick)
    with trial.autocast(), stage("evaluation"):
        found = accuracy(trial.model, batches, trial.data.normalize, group)
    if not math.isfinite(found["loss"]):
        raise Diverged(f"the {split} loss is {found['loss']}")
    return {f"{split}_{name}": value for name, value in found.items()}


def save(trial: Trial, path: File) -> None:
    """Keep the state after an epoch."""
    write_checkpoint(
        path,
        config=trial.config,
        epoch=trial.epoch,
        history=trial.history,
        model=trial.model,
        optimizer=trial.optimizer,
        feedback_optimizer=trial.feedback_optimizer,
        code=[*older_code(trial.made_by), code_of(provenance("cpu"))],
    )


def resume(trial: Trial, path: File) -> None:
    """Go on from the checkpoint, if there is one. Everything random depends on (seed, epoch): no other state is needed.

    UserError for a checkpoint of another configuration, a damaged one, and a place that cannot be written.
    """
    state = previous(path, trial.device)
    if state is None:
        return
    if TrialConfig.from_dict(state["config"]) != trial.config:  # one from before a field was new has its default
        raise UserError(f"{path} belongs to another configuration; remove it, or name another file.")
    load_weights(path, trial.model, state["model"])
    load_optimizer(path, trial.optimizer, state["optimizer"])
    if trial.feedback_optimizer is not None:
        load_optimizer(path, trial.feedback_optimizer, state["feedback_optimizer"])
    trial.epoch, trial.history, trial.made_by = state["epoch"], state["history"], state["code"]
