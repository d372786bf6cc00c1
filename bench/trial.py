"""One experiment, from its configuration to its result. No Ray, Optuna or MLflow in here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.checkpoint import load_weights, prepare_checkpoint, read_checkpoint, write_checkpoint
from bench.config import Status, TrialConfig, TrialResult, UserError, digest
from bench.datasets import ImageData, load
from bench.evaluators.accuracy import BATCH, accuracy
from bench.evaluators.alignment import error_alignment, weight_alignment
from bench.learning.convert import Conversion, convert
from bench.learning.learner import FeedbackLearner, parameter_groups
from bench.learning.rules import Rule, parse_rule
from bench.models import build, required_image_size, resolve_stem
from bench.provenance import provenance

#: (epoch, from 1; its metrics). It may raise to end the trial from outside.
Report = Callable[[int, Mapping[str, float]], None]

#: A mean training loss beyond this many times the loss of guessing is of no more use.
HOPELESS = 20.0
#: Steps between two looks at the loss within an epoch: each one waits for the device.
LOOK = 50
#: Examples in the batch by which the angles are measured.
ANGLE_EXAMPLES = 64


class Diverged(Exception):  # noqa: N818  (an outcome, not an error)
    """Training left the numbers that can be computed with; the message is the reason."""


@dataclass
class Trial:
    """What one run needs, made from its configuration; ``epoch`` epochs of it are done."""

    config: TrialConfig
    data: ImageData
    device: torch.device
    model: nn.Module
    optimizer: torch.optim.SGD
    learner: FeedbackLearner
    conversion: Conversion
    bf16: bool
    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    #: a fixed sample of the validation split, normalised, by which the angles are measured
    sample: tuple[Tensor, Tensor] | None = None

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()


def run_trial(
    config: TrialConfig,
    report: Report | None = None,
    *,
    data_dir: str | None = None,
    device: str = "auto",
    checkpoint: str | None = None,
    read_test: bool = False,
    threads: int | None = None,
) -> TrialResult:
    """Train and evaluate one network.

    With ``checkpoint`` (a file) the state is saved after each epoch, and a run that finds it goes on from
    there to the same result, bit for bit on a CPU. ``read_test``: the protocol reads the test split once,
    for a confirmed configuration. ``threads``: of torch on the CPU; None leaves torch's own.

    A run that diverges is a result: status ``diverged``, its reason, chance as accuracy. UserError for a
    configuration that cannot be run.
    """
    started = time.perf_counter()
    if threads:
        torch.set_num_threads(threads)
    trial = prepare(config, data_dir=data_dir, device=device)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None:
        resume(trial, path)
    status: Status = "finished"
    reason, tested = None, dict[str, float]()
    try:
        for known in trial.history:  # whoever listens may have missed the last of these
            _tell(report, known)
        while trial.epoch < config.epochs:
            epoch_started = time.perf_counter()
            learned = {**train_epoch(trial), "seconds": time.perf_counter() - epoch_started}
            learned |= {**measure(trial), "epoch_seconds": time.perf_counter() - epoch_started}
            trial.epoch += 1
            trial.history.append({"epoch": float(trial.epoch), **learned})
            if path is not None:
                save(trial, path)
            _tell(report, trial.history[-1])
        tested = score(trial, "test") if read_test else {}
    except Diverged as end:
        status, reason = "diverged", f"epoch {trial.epoch + 1}: {end}"
    metrics = _at_chance(trial, read_test) if status == "diverged" else {**_last(trial), **tested}
    metrics |= {"epochs_done": float(trial.epoch), "train_seconds": sum(e["seconds"] for e in trial.history)}
    return TrialResult(
        config=config,
        status=status,
        reason=reason,
        metrics=metrics,
        history=trial.history,
        provenance=_provenance(trial, time.perf_counter() - started),
    )


def _tell(report: Report | None, epoch: Mapping[str, float]) -> None:
    if report is not None:
        report(int(epoch["epoch"]), {name: value for name, value in epoch.items() if name != "epoch"})


def _last(trial: Trial) -> dict[str, float]:
    return {name: value for name, value in trial.history[-1].items() if name != "epoch"}


def _at_chance(trial: Trial, read_test: bool) -> dict[str, float]:
    """What a diverged run counts as: the accuracy of guessing, and nothing that it had before."""
    classes = trial.data.classes
    chance = {"acc": 1.0 / classes, "top5": min(5, classes) / classes}
    return {f"{split}_{k}": v for split in (("val", "test") if read_test else ("val",)) for k, v in chance.items()}


def _provenance(trial: Trial, seconds: float) -> dict[str, Any]:
    return {
        **provenance(str(trial.device)),
        "precision": "bf16" if trial.bf16 else "float32",
        "threads": torch.get_num_threads(),
        "dataset_digest": trial.data.digest,
        "examples": dict(trial.data.sizes),
        "asymmetric_layers": len(trial.conversion.swapped),
        "kept_layers": trial.conversion.kept if trial.conversion.swapped else {},
        "seconds": seconds,
    }


def prepare(config: TrialConfig, *, data_dir: str | None = None, device: str = "auto") -> Trial:
    """Everything that the run needs, from the seeds alone; UserError for what does not fit together."""
    rule = parse_rule(config.rule)
    coefficients = resolve_coefficients(config, rule)
    where = pick_device(device)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and where.type == "cuda")
    size = required_image_size(config.arch)
    if size is not None and config.image_size not in (None, size):
        raise UserError(f"arch {config.arch!r} takes images of {size} pixels; remove image_size or set it to {size}.")
    data = load(
        config.dataset,
        data_dir=None if data_dir is None else Path(data_dir),
        split_seed=config.split_seed,
        val_fraction=config.val_fraction,
        train_examples=config.train_examples,
        image_size=size or config.image_size,
    )
    data.steps("train", config.batch_size)
    stem = resolve_stem(config.stem, arch=config.arch, image_size=data.image_size)
    model = build(config.arch, classes=data.classes, channels=data.channels, stem=stem, seed=config.seed)
    conversion = convert(model, rule, coefficients, seed=config.seed + 2**31)  # not the stream that drew W
    model.to(where)
    if where.type == "cuda":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    groups = parameter_groups(
        model, lr=config.lr, weight_decay=config.weight_decay, feedback_lr_factor=config.feedback_lr_factor
    )
    for group in groups:
        group["full_lr"] = group["lr"]
    # fused: one pass over the weights instead of four, which at small batches is a sixth of a step on a CPU
    optimizer = torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=where.type in ("cpu", "cuda")
    )
    return Trial(config, data, where, model, optimizer, FeedbackLearner(model, optimizer), conversion, bf16)


def resolve_coefficients(config: TrialConfig, rule: Rule) -> dict[str, float]:
    """The rule's coefficients; UserError for settings that have no effect in it.

    ``kolen-pollack`` ties B's decay to W's: it is the recipe's weight decay, and another value is refused,
    as is a B that learns in other steps than W.
    """
    coefficients = dict(config.coefficients)
    alternates = config.feedback_every != 1 or config.feedback_warmup_epochs != 0
    if alternates and (not rule.learns or rule.task_gradient):
        raise UserError(
            f"feedback_every and feedback_warmup_epochs have no effect in rule {rule.name!r}: "
            f"{'B moves with W' if rule.task_gradient else 'its B does not learn'}; remove them."
        )
    if config.feedback_warmup_epochs >= config.epochs:
        raise UserError(
            f"with feedback_warmup_epochs = {config.feedback_warmup_epochs:g} of {config.epochs} epochs W would never "
            "learn; lower it."
        )
    if rule.task_gradient and coefficients.setdefault("decay", config.weight_decay) != config.weight_decay:
        raise UserError(
            f"rule {rule.name!r}: decay = {coefficients['decay']:g} must equal weight_decay = "
            f"{config.weight_decay:g}, because B needs the same decay as W; set weight_decay instead."
        )
    return coefficients


def pick_device(device: str) -> torch.device:
    """``auto`` is the GPU if there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        picked = torch.device(device)
        if picked.type not in ("cpu", "cuda"):
            raise RuntimeError("bench runs on cpu and cuda")
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"device {device!r} cannot be used here ({first}); use cpu, cuda or auto.") from error
    return picked


def lr_factor(config: TrialConfig, progress: float) -> float:
    """The learning rate after ``progress`` epochs, as a share of the full one.

    Linear warm-up over ``warmup_epochs``; then cosine to 0 at the end, or times ``step_factor`` at each of
    ``step_epochs``, or constant.
    """
    if progress < config.warmup_epochs:
        return progress / config.warmup_epochs
    if config.schedule == "cosine":
        span = max(config.epochs - config.warmup_epochs, 1e-9)
        return 0.5 * (1.0 + math.cos(math.pi * min((progress - config.warmup_epochs) / span, 1.0)))
    if config.schedule == "step":
        return config.step_factor ** sum(progress >= e for e in config.step_epochs)
    return 1.0


def who_learns(config: TrialConfig, step: int, progress: float) -> tuple[bool, bool]:
    """(W, B): who learns in this step. The authors' delay (at first B alone), then their alternation."""
    if progress < config.feedback_warmup_epochs:
        return False, True
    if config.feedback_every == 1:
        return True, True
    alone = (step + 1) % config.feedback_every == 0
    return not alone, alone


def train_epoch(trial: Trial) -> dict[str, float]:
    """One pass over the training split. Diverged if the loss says so; the mean loss and the last rate otherwise.

    Dropout and its like draw from (seed, epoch) alone, as the batches do.
    """
    devices = [trial.device] if trial.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(digest([trial.config.seed, trial.epoch]), 16) % 2**63)
        return _train_epoch(trial)


def _train_epoch(trial: Trial) -> dict[str, float]:
    config, model, optimizer = trial.config, trial.model, trial.optimizer
    steps = trial.data.steps("train", config.batch_size)
    model.train()
    total = torch.zeros((), device=trial.device)
    for index, (pixels, labels) in enumerate(_training_batches(trial)):
        progress = trial.epoch + index / steps
        weights_learn, trial.learner.on = who_learns(config, trial.epoch * steps + index, progress)
        factor = lr_factor(config, trial.epoch + (index + 0.5) / steps)  # neither the first nor the last step is 0
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * factor
        optimizer.zero_grad(set_to_none=True)
        for part, answers in zip(pixels.chunk(config.accumulate), labels.chunk(config.accumulate), strict=True):
            with trial.autocast():
                logits = model(part)
            loss = F.cross_entropy(logits.float(), answers, label_smoothing=config.label_smoothing) / config.accumulate
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        if not weights_learn:
            _only_feedback(optimizer)
        optimizer.step()
        if index % LOOK == LOOK - 1 or index == steps - 1:
            _check(total.item() / (index + 1), trial)
    return {"train_loss": total.item() / steps, "lr": config.lr * factor}


def _training_batches(trial: Trial) -> Iterator[tuple[Tensor, Tensor]]:
    config, data = trial.config, trial.data
    layout = torch.channels_last if trial.device.type == "cuda" else torch.contiguous_format
    for pixels, labels in data.batches(
        "train",
        config.batch_size,
        device=trial.device,
        seed=config.seed,
        epoch=trial.epoch,
        augment=config.augment,
    ):
        yield data.normalize(pixels).contiguous(memory_format=layout), labels


def _only_feedback(optimizer: torch.optim.Optimizer) -> None:
    """Leave the forward parameters where they are in the coming step; B's gradient is set at the step itself."""
    for group in optimizer.param_groups:
        if group["name"] != "feedback":
            for p in group["params"]:
                p.grad = None


def _check(mean_loss: float, trial: Trial) -> None:
    limit = HOPELESS * math.log(trial.data.classes)
    if not math.isfinite(mean_loss):
        raise Diverged(f"the training loss is {mean_loss}")
    if mean_loss > limit:
        raise Diverged(f"the training loss {mean_loss:.3g} is over {HOPELESS:g} times that of guessing")


def measure(trial: Trial) -> dict[str, float]:
    """What is known after an epoch: validation, and the angles. Diverged if a weight is not finite."""
    sizes = torch._foreach_norm([p.detach() for p in trial.model.parameters()])
    if not bool(torch.stack([s.float() for s in sizes]).isfinite().all()):
        raise Diverged("a weight is not finite")
    metrics = score(trial, "val")
    if not trial.conversion.swapped:
        return {**metrics, "angle": 0.0} if trial.config.measure_alignment else metrics
    if trial.config.measure_alignment:
        metrics |= alignment(trial)
    return {k: v for k, v in metrics.items() if math.isfinite(v)}


def alignment(trial: Trial) -> dict[str, float]:
    """The angles, by a fixed random sample of the validation split."""
    if trial.sample is None:
        count = min(ANGLE_EXAMPLES, trial.data.sizes["val"])
        drawn = trial.data.batches("val", count, device=trial.device, seed=trial.config.split_seed)
        pixels, labels = next(drawn)
        trial.sample = trial.data.normalize(pixels), labels
    return {**error_alignment(trial.model, *trial.sample), **weight_alignment(trial.model)}


def score(trial: Trial, split: str) -> dict[str, float]:
    """``SPLIT_acc``, ``SPLIT_top5`` and ``SPLIT_loss``; Diverged if the loss is not finite."""
    batches = trial.data.batches("val" if split == "val" else "test", BATCH, device=trial.device)
    with trial.autocast():
        found = accuracy(trial.model, batches, trial.data.normalize)
    if not math.isfinite(found["loss"]):
        raise Diverged(f"the {split} loss is {found['loss']}")
    return {f"{split}_{name}": value for name, value in found.items()}


def save(trial: Trial, path: Path) -> None:
    """Keep the state after an epoch."""
    write_checkpoint(
        path,
        config=trial.config,
        epoch=trial.epoch,
        history=trial.history,
        model=trial.model,
        optimizer=trial.optimizer,
    )


def resume(trial: Trial, path: Path) -> None:
    """Go on from the checkpoint, if there is one. Everything random depends on (seed, epoch): no other state is needed.

    UserError for a checkpoint of another configuration, a damaged one, and a place that cannot be written.
    """
    prepare_checkpoint(path)
    if not path.exists():
        return
    state = read_checkpoint(path, trial.device)
    if state["config"] != trial.config.to_dict():
        raise UserError(f"{path} belongs to another configuration; remove it, or name another file.")
    load_weights(path, trial.model, state["model"])
    trial.optimizer.load_state_dict(state["optimizer"])
    trial.epoch, trial.history = state["epoch"], state["history"]
