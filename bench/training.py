"""Training one network: everything that it needs, made from its configuration, and one epoch of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.batch_norm import check_norms, share_norms
from bench.config import OPTIMIZER_SETTINGS, Schedule, TrialConfig, UserError, digest
from bench.datasets import ImageData, load
from bench.group import Group
from bench.heap import keep_freed_memory
from bench.learning.activity import Activity
from bench.learning.convert import Conversion, convert
from bench.learning.learner import FeedbackLearner, parameter_groups
from bench.learning.rules import Rule, parse_rule
from bench.learning.switch import examples_seen
from bench.models import build, required_image_size, resolve_stem
from bench.noise import ADDED_UP, UpdateNoise
from bench.optimizers import make_feedback_optimizer, make_optimizer
from bench.stages import stage, waiting

#: A mean training loss beyond this many times the loss of guessing is of no more use.
HOPELESS = 20.0
#: Steps between two looks at the loss within an epoch: each one waits for the device.
LOOK = 50


class Diverged(Exception):  # noqa: N818  (an outcome, not an error)
    """Training left the numbers that can be computed with; the message is the reason."""


@dataclass
class Trial:
    """What one run needs, made from its configuration; ``epoch`` epochs of it are done.

    ``group``: of the processes that train it, if there are several; each has the same network.
    """

    config: TrialConfig
    data: ImageData
    device: torch.device
    model: nn.Module
    optimizer: torch.optim.Optimizer
    learner: FeedbackLearner
    conversion: Conversion
    bf16: bool
    #: B's own, if it has one
    feedback_optimizer: torch.optim.Optimizer | None = None
    #: after the steps of W's optimizer; after those of B's own
    noise: UpdateNoise | None = None
    feedback_noise: UpdateNoise | None = None
    group: Group | None = None
    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    #: by which code the epochs of a checkpoint were made, as `bench.provenance.code_of` has it
    made_by: list[dict[str, Any]] = field(default_factory=list)
    #: a fixed sample of the validation split, normalised, by which the angles are measured
    sample: tuple[Tensor, Tensor] | None = None

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """W's optimizer, and B's own if it has one."""
        return (self.optimizer,) if self.feedback_optimizer is None else (self.optimizer, self.feedback_optimizer)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()


def prepare(
    config: TrialConfig,
    *,
    data_dir: str | None = None,
    device: str = "auto",
    group: Group | None = None,
    data: ImageData | None = None,
) -> Trial:
    """Everything that the run needs, from the seeds alone; UserError for what does not fit together.

    ``data``: in place of the configuration's data set.
    """
    rule = parse_rule(config.rule)
    coefficients = resolve_coefficients(config, rule)
    where = pick_device(device)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and where.type == "cuda")
    size = required_image_size(config.arch)
    if size is not None and config.image_size not in (None, size):
        raise UserError(f"arch {config.arch!r} takes images of {size} pixels; remove image_size or set it to {size}.")
    data = data or load(
        config.dataset,
        data_dir=None if data_dir is None else Path(data_dir),
        split_seed=config.split_seed,
        val_fraction=config.val_fraction,
        train_examples=config.train_examples,
        image_size=size or config.image_size,
    )
    data.steps("train", config.batch_size)
    if group is not None:
        group = _shares(config, group)
    model = _network(config, data)
    conversion = convert(
        model,
        rule,
        coefficients,
        activity=activity_of(config),
        seed=config.seed + 2**31,  # not the stream that drew W
    )
    if group is not None:
        share_norms(model, group)
    _move(model, where)
    return _trial(config, data, where, model, conversion, bf16, group)


def _trial(
    config: TrialConfig,
    data: ImageData,
    where: torch.device,
    model: nn.Module,
    conversion: Conversion,
    bf16: bool,
    group: Group | None,
) -> Trial:
    """The network with what moves its weights, W and B, and the noise of their updates."""
    groups = parameter_groups(
        model, lr=config.lr, weight_decay=config.weight_decay, feedback_lr_factor=config.feedback_lr_factor
    )
    own = [each for each in groups if each["name"] == "feedback" and config.feedback_optimizer != "shared"]
    if own:
        groups = [each for each in groups if each["name"] != "feedback"]
    optimizer = make_optimizer(config, groups, where)
    feedback_optimizer = make_feedback_optimizer(config, own) if own else None
    learner = FeedbackLearner(
        model, optimizer, group, feedback_optimizer=feedback_optimizer, fraction=config.feedback_fraction
    )
    trial = Trial(config, data, where, model, optimizer, learner, conversion, bf16, feedback_optimizer, group=group)
    for settings in (each for known in trial.optimizers for each in known.param_groups):
        settings["full_lr"] = settings["lr"]
    if config.update_noise:
        noisy = partial(UpdateNoise, sigma=config.update_noise)
        if feedback_optimizer is None:
            trial.noise = noisy(optimizer, on=config.update_noise_on)
        else:
            trial.noise = noisy(optimizer) if config.update_noise_on != "feedback" else None
            trial.feedback_noise = noisy(feedback_optimizer) if config.update_noise_on != "forward" else None
    return trial


def activity_of(config: TrialConfig) -> Activity:
    """What amp, null and sparse see in this configuration."""
    return Activity(
        input=config.feedback_input,
        samples=config.feedback_samples,
        scaling=config.scaling,
        centered=config.centered,
        stabilize=config.stabilize,
        reversed_null=config.reversed_null,
    )


def _network(config: TrialConfig, data: ImageData) -> nn.Module:
    size = data.image_size
    stem = resolve_stem(config.stem, arch=config.arch, image_size=size)
    shape = {"classes": data.classes, "channels": data.channels, "image_size": size}
    return build(config.arch, **shape, stem=stem, seed=config.seed)


def _move(model: nn.Module, where: torch.device) -> None:
    """Onto the device, in the layout and with the memory that are fastest there.

    On a CPU channels_last is no rule: of two cores it took 0.8 to 1.2 of the time, by network, images and threads.
    """
    model.to(where)
    if where.type == "cuda":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    else:
        keep_freed_memory()


def check_together(trial: Trial, workers: int) -> None:
    """UserError if so many workers would not train this network as one does; ``trial`` is of no use afterwards."""
    config, data = trial.config, trial.data
    _shares(config, Group(rank=0, size=workers))
    check_norms(trial.model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        before = torch.get_rng_state()
        trial.model.train()(torch.zeros(2, data.channels, data.image_size, data.image_size))
        if not torch.equal(torch.get_rng_state(), before):
            raise UserError(
                f"arch {config.arch!r} draws random numbers as it trains (dropout or its like), and {workers} workers "
                "would draw others than one does; leave out --workers-per-trial, or take another arch."
            )


def _shares(config: TrialConfig, group: Group) -> Group:
    """The group, over a batch of this configuration; UserError if a process had no example of it, or none for B."""
    batch = config.batch_size // config.accumulate
    if together := [name for name in config.stabilize if name.startswith("batch_")]:
        raise UserError(f"{', '.join(together)} needs a whole batch in one process; leave out --workers-per-trial.")
    if (seen := examples_seen(config.feedback_fraction, batch)) < min(group.size, batch):
        raise UserError(
            f"with feedback_fraction = {config.feedback_fraction:g} B sees {seen} of a batch's {batch} examples, too "
            f"few for {group.size} workers; raise it, or lower --workers-per-trial."
        )
    return group.over(batch)


def resolve_coefficients(config: TrialConfig, rule: Rule) -> dict[str, float]:
    """The rule's coefficients; UserError for settings that have no effect in it.

    ``kolen-pollack`` ties B's decay to W's: it is the recipe's weight decay, and another value is refused,
    as is a B that learns in other steps than W.
    """
    coefficients = dict(config.coefficients)
    activity_of(config).check(rule)
    if rule.task_gradient and config.optimizer != "sgd":
        raise UserError(
            f"rule {rule.name!r} needs optimizer 'sgd', not {config.optimizer!r}: W and B draw together only if equal "
            "gradients make equal steps; set optimizer=sgd."
        )
    if config.feedback_optimizer != "shared" and (not rule.learns or rule.task_gradient):
        given = [name for name in OPTIMIZER_SETTINGS if getattr(config, name) != getattr(TrialConfig, name)]
        why = "B must make the steps of W, or W and B do not draw together" if rule.learns else "its B does not learn"
        raise UserError(f"{', '.join(given)}: rule {rule.name!r} has no optimizer of B's own: {why}; remove them.")
    if config.coefficient_schedules and rule.task_gradient:
        raise UserError(
            f"rule {rule.name!r}: coefficient_schedules would untie B from W, whose decay is constant; remove them."
        )
    if config.feedback_fraction != 1.0 and not rule.sees_activity:
        raise UserError(
            f"feedback_fraction has no effect in rule {rule.name!r}, whose feedback weights see no activity (amp, "
            "null, sparse do); remove it from the configuration."
        )
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
    """Return W's learning rate after ``progress`` epochs, as a share of the full one."""
    return _lr_factor(config, config.schedule, config.warmup_epochs, progress)


def feedback_lr_factor(config: TrialConfig, progress: float) -> float:
    """Return the learning rate of B's own optimizer after ``progress`` epochs, as a share of ``feedback_lr``."""
    return _lr_factor(config, config.feedback_schedule, config.feedback_lr_warmup_epochs, progress)


def _lr_factor(config: TrialConfig, schedule: Schedule, warmup: float, progress: float) -> float:
    """Linear warm-up; then cosine to 0 at the end, or times ``step_factor`` at each of ``step_epochs``, or constant."""
    if progress < warmup:
        return progress / warmup
    if schedule == "cosine":
        span = max(config.epochs - warmup, 1e-9)
        return 0.5 * (1.0 + math.cos(math.pi * min((progress - warmup) / span, 1.0)))
    if schedule == "step":
        return config.step_factor ** sum(progress >= e for e in config.step_epochs)
    return 1.0


def coefficients_at(config: TrialConfig, progress: float) -> dict[str, float]:
    """Return the coefficients after ``progress`` epochs, by primitive."""
    schedules = config.coefficient_schedules or {}
    return {
        name: schedules[name].value(c, progress, config.epochs) if name in schedules else c
        for name, c in config.coefficients.items()
    }


def update_levels(config: TrialConfig, steps: int) -> tuple[float, ...]:
    """Levels σ of update noise that span "no effect" to "nothing left" for this recipe, of ``steps`` an epoch.

    What σ does depends on the recipe: over a training the noise adds up, in a weight that nothing else moves, to
    N(0, σ²·v), v ← v·(1 − η·λ/(1 − μ))² + η² over all steps (η the learning rate, λ the weight decay, which goes
    through SGD's momentum μ, and not through AdamW's or Muon's: there without 1 − μ). The levels are those at which
    σ·√v is one of `bench.noise.ADDED_UP`, rounded to two digits.
    """
    v, gain = 0.0, 1 / (1 - config.momentum) if config.optimizer == "sgd" else 1.0
    for step in range(config.epochs * steps):
        lr = config.lr * lr_factor(config, (step + 0.5) / steps)
        v = v * max(0.0, 1 - lr * config.weight_decay * gain) ** 2 + lr**2
    return tuple(float(f"{size / math.sqrt(v):.2g}") for size in ADDED_UP)


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

    Dropout and its like draw from (seed, epoch) alone, as the batches do; so does the noise in updates.
    """
    devices = [trial.device] if trial.device.type == "cuda" else []
    for noise in (trial.noise, trial.feedback_noise):
        if noise is not None:
            noise.seed(int(digest(["update noise", trial.config.seed, trial.epoch]), 16) % 2**63)
    trial.learner.seed(int(digest(["noise patches", trial.config.seed, trial.epoch]), 16) % 2**63)
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(digest([trial.config.seed, trial.epoch]), 16) % 2**63)
        return _train_epoch(trial)


def _train_epoch(trial: Trial) -> dict[str, float]:
    config, model, group = trial.config, trial.model, trial.group
    steps = trial.data.steps("train", config.batch_size)
    model.train()
    total = torch.zeros((), device=trial.device)
    for index, (pixels, labels) in enumerate(waiting("data", _training_batches(trial))):
        progress = trial.epoch + index / steps
        weights_learn, trial.learner.on = who_learns(config, trial.epoch * steps + index, progress)
        middle = trial.epoch + (index + 0.5) / steps  # neither the first nor the last step is 0
        factors = (lr_factor(config, middle), feedback_lr_factor(config, middle))
        for optimizer, factor in zip(trial.optimizers, factors, strict=False):
            for settings in optimizer.param_groups:
                settings["lr"] = settings["full_lr"] * factor
        if config.coefficient_schedules:
            trial.learner.set_coefficients(coefficients_at(config, progress))
        total += train_step(trial, pixels, labels, weights_learn=weights_learn)
        if index % LOOK == LOOK - 1 or index == steps - 1:
            with stage("loss"):
                whole = (total if group is None else group.sum(total)).item()
            _check(whole / (index + 1), trial)
    return {"train_loss": whole / steps, "lr": config.lr * factors[0]}


def train_step(trial: Trial, pixels: Tensor, labels: Tensor, *, weights_learn: bool = True) -> Tensor:
    """One step by a normalised batch (of a group: this process's part), at the learning rates that are set.

    The mean loss, on the device: nothing here waits for it. ``weights_learn`` false: B alone is moved.
    """
    config, model, optimizer, group = trial.config, trial.model, trial.optimizer, trial.group
    total = torch.zeros((), device=trial.device)
    optimizer.zero_grad(set_to_none=True)
    for part, answers in zip(pixels.chunk(config.accumulate), labels.chunk(config.accumulate), strict=True):
        with stage("forward"):
            with trial.autocast():
                logits = model(part)
            loss = F.cross_entropy(logits.float(), answers, label_smoothing=config.label_smoothing) / config.accumulate
            if group is not None:
                loss = loss * group.share
        with stage("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    with stage("update"):
        if group is not None and weights_learn:
            group.add_up(p.grad for p in model.parameters() if p.grad is not None)
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        if not weights_learn:
            _only_feedback(optimizer)
        optimizer.step()
        if trial.noise is not None:
            trial.noise.add()
        trial.learner.step()
        if trial.feedback_noise is not None:
            trial.feedback_noise.add()
    return total


def _training_batches(trial: Trial) -> Iterator[tuple[Tensor, Tensor]]:
    config, data, group = trial.config, trial.data, trial.group
    layout = torch.channels_last if trial.device.type == "cuda" else torch.contiguous_format
    for pixels, labels in data.batches(
        "train",
        config.batch_size,
        device=trial.device,
        seed=config.seed,
        epoch=trial.epoch,
        augment=config.augment,
        pick=None if group is None else partial(group.pick, pieces=config.accumulate),
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
