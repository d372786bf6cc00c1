"""How long a training step takes under each rule, beside backprop's on the same network; and what memory it needs.

All take turns in one process: a round is one turn of each, and a ratio is of two turns of one round, so that what slows
the machine down slows both. The pixels are noise, and what makes batches is left out: it is the same for every rule.
"""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

from bench.arithmetic import Layer, floor, layers_of
from bench.config import Strict, TrialConfig, UserError, check_range
from bench.datasets import ImageData
from bench.datasets.memory import MemorySource
from bench.learning.layers import asymmetric_layers
from bench.learning.rules import Rule, parse_rule
from bench.learning.switch import examples_seen
from bench.streams import quiet
from bench.training import Trial, pick_device, prepare, train_step

#: The rule that the others stand beside.
REFERENCE = "backprop"
#: Steps of everybody before the first that is timed.
WARM = 2
#: Seconds of a turn, at least: so many steps that neither the clock nor a GPU's launch counts.
TURN = 0.2
#: A learning rate, and coefficients, that leave the weights where they are: B is to stay finite in any network.
_STILL = {"lr": 1e-8, "warmup_epochs": 0.0, "schedule": "constant"}
_COEFFICIENT = 1e-3

#: From a configuration and data to one step of it, and the tensors that it keeps.
Contestant = tuple[Callable[[], None], Iterable[Tensor]]
Way = Callable[[TrialConfig, ImageData, Tensor, Tensor], Contestant]


@dataclass(frozen=True, kw_only=True)
class Conditions(Strict):
    """Under which steps are timed.

    ``fraction``: the share of a batch that B learns from, where its rule sees it. ``samples``: it learns from so many
    noise patches instead; 0: from the batch.
    """

    arch: str = "resnet18"
    rules: tuple[str, ...]
    batch_size: int = 128
    image_size: int = 32
    classes: int = 10
    precision: str = "auto"
    fraction: float = 1.0
    samples: int = 0
    rounds: int = 11

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (("batch_size", 1), ("image_size", 1), ("classes", 2), ("rounds", 4)):
            check_range("bench speed", name, getattr(self, name), low, 10**5)
        check_range("bench speed", "fraction", self.fraction, 0, 1, open_low=True)
        check_range("bench speed", "samples", self.samples, 0, 10**6)
        if self.samples and self.fraction != 1.0:
            raise UserError("--samples and --fraction: B learns from noise or from a share of the batch; give one.")

    def config(self, rule: Rule) -> TrialConfig:
        return still(
            rule,
            fraction=self.fraction,
            samples=self.samples,
            arch=self.arch,
            dataset="noise",
            batch_size=self.batch_size,
            image_size=self.image_size,
            precision=self.precision,
            augment=False,
        )


def still(rule: Rule, *, fraction: float = 1.0, samples: int = 0, **fields: Any) -> TrialConfig:
    """A run of the rule in which nothing gets far: times do not depend on the numbers, as long as they are finite."""
    primitives = () if rule.task_gradient else rule.primitives
    noise = {"feedback_input": "normal", "feedback_samples": samples}
    seen: dict[str, Any] = (noise if samples else {"feedback_fraction": fraction}) if rule.sees_activity else {}
    coefficients = dict.fromkeys(primitives, _COEFFICIENT)
    return TrialConfig.from_dict({**fields, **_STILL, **seen, "rule": rule.name, "coefficients": coefficients})


@dataclass(frozen=True, kw_only=True)
class Step(Strict):
    """One rule's step, done one way. Seconds; MB of 2^20 bytes.

    ``ratio``: the median over the rounds of its time by backprop's, between the quartiles ``low`` and ``high``.
    ``floor``: see `bench.arithmetic.floor`; ``over_floor``: ratio / floor. ``memory``: the most that a step holds, with
    weights, gradients and the optimizer's state; ``memory_allowed``: backprop's, and the feedback weights with theirs.
    """

    rule: str
    way: str
    rounds: int
    seconds: float
    ratio: float
    low: float
    high: float
    floor: float
    over_floor: float
    memory: float
    memory_ratio: float
    memory_allowed: float


def measure(
    conditions: Conditions,
    ways: Mapping[str, Way],
    *,
    device: str,
    say: Callable[[str], None],
) -> list[Step]:
    """A `Step` for every rule and way, backprop's first (of the first way)."""
    where = pick_device(device)
    rules = [parse_rule(name) for name in dict.fromkeys((REFERENCE, *conditions.rules))]
    with _one_line(conditions):
        data = noise(conditions)
        x, labels = _batch(data, conditions.batch_size, where)
        looked = {rule.name: _look(conditions.config(rule), data, x) for rule in rules}
    plain, _ = looked[REFERENCE]
    share = examples_seen(conditions.fraction, conditions.batch_size) / conditions.batch_size
    floors = {rule.name: floor(looked[rule.name][0], plain, rule, share, conditions.samples) for rule in rules}
    kept = {rule.name: looked[rule.name][1] * (2 if rule.learns else 1) for rule in rules}
    if where.type == "cuda":  # the first backward pass of a process takes workspaces that stay: nobody's
        _ready(lambda: ours(conditions.config(rules[0]), data, x, labels), where)
    stands: dict[tuple[str, str], tuple[Callable[[], None], float]] = {}
    for rule in rules:
        config = conditions.config(rule)
        for way, make in ways.items():
            if stands and not rule.learns and way != next(iter(ways)):
                continue  # without energies there is one way only
            say(f"{rule.name}, {way}: memory …")
            stands[rule.name, way] = _ready(lambda c=config, m=make: m(c, data, x, labels), where)  # type: ignore[misc]
    say(f"{conditions.rounds} rounds of {len(stands)} …")
    times = race({key: step for key, (step, _) in stands.items()}, conditions.rounds, where)
    first = next(iter(stands))
    return [
        _step(key, conditions.rounds, times[key], times[first], floors[key[0]], memory, stands[first][1], kept[key[0]])
        for key, (_, memory) in stands.items()
    ]


def _look(config: TrialConfig, data: ImageData, x: Tensor) -> tuple[list[Layer], float]:
    """The layers that a pass through this network meets, and the MB of its feedback weights; the network is let go."""
    model = prepare(config, data=data, device=str(x.device)).model
    return layers_of(model, x), _megabytes(_feedback(model))


@contextmanager
def _one_line(conditions: Conditions) -> Iterator[None]:
    """What torch says of images that are too small for a network, or too many for the memory."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, ValueError) as error:
        images = f"{conditions.batch_size} images of {conditions.image_size} pixels"
        said = str(error).strip().splitlines() or ["no reason given"]
        raise UserError(f"{conditions.arch} cannot be trained on {images} ({said[0]}); take others.") from error


def _step(
    key: tuple[str, str],
    rounds: int,
    own: Sequence[float],
    backprop: Sequence[float],
    least: float,
    memory: float,
    plain: float,
    kept: float,
) -> Step:
    ratios = [a / b for a, b in zip(own, backprop, strict=True)]
    low, ratio, high = quantiles(ratios, n=4, method="inclusive")
    return Step(
        rule=key[0],
        way=key[1],
        rounds=rounds,
        seconds=quantiles(own, n=2, method="inclusive")[0],
        ratio=ratio,
        low=low,
        high=high,
        floor=least,
        over_floor=ratio / least,
        memory=memory,
        memory_ratio=memory / plain,
        memory_allowed=(plain + kept) / plain,
    )


def race(contestants: Mapping[Any, Callable[[], None]], rounds: int, device: torch.device) -> dict[Any, list[float]]:
    """Seconds of each contestant's step in each round. The order is drawn anew for each: nobody always follows the same
    other one, whose freed memory and heat it would inherit."""
    keys = list(contestants)
    times: dict[Any, list[float]] = {key: [] for key in keys}
    steps = 1 + int(TURN / max(1e-6, min(_seconds(contestants[key], 1, device) for key in keys)))
    order = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for key in order.sample(keys, len(keys)):
                times[key].append(_seconds(contestants[key], steps, device))
    finally:
        gc.enable()
    return times


def _seconds(step: Callable[[], None], count: int, device: torch.device) -> float:
    """Of one step, the mean of so many without a pause."""
    _wait(device)
    started = time.perf_counter()
    for _ in range(count):
        step()
    _wait(device)
    return (time.perf_counter() - started) / count


def ours(config: TrialConfig, data: ImageData, x: Tensor, labels: Tensor) -> Contestant:
    """The step that every trial takes."""
    trial = prepare(config, data=data, device=str(x.device))
    return lambda: _done(train_step(trial, x, labels)), kept_by(trial)


def kept_by(trial: Trial) -> Iterable[Tensor]:
    """What a step finds: parameters and buffers, the optimizer's state. (Gradients are each step's own.)"""
    yield from trial.model.parameters()
    yield from trial.model.buffers()
    for optimizer in trial.optimizers:
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def _done(loss: Tensor) -> None:
    """Nothing waits for the loss within a step."""


def _feedback(model: torch.nn.Module) -> list[Tensor]:
    return [layer.feedback for layer in asymmetric_layers(model).values() if layer.feedback is not None]


def _ready(make: Callable[[], Contestant], device: torch.device) -> tuple[Callable[[], None], float]:
    """A contestant that has warmed up, and the most memory that one of its steps holds."""
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    step, kept = make()
    for _ in range(WARM):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return step, (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return step, _megabytes(list(kept)) + _profiled_peak(step)


def _profiled_peak(step: Callable[[], None]) -> float:
    """The most MB that a step holds beyond what it finds, by the CPU allocator's own record (not oneDNN's scratch)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        quiet(Path(os.devnull)),  # the profiler greets on stderr
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
    ):
        step()
    record = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in record if e.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most / 2**20


def _megabytes(tensors: Iterable[Tensor]) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def noise(conditions: Conditions) -> ImageData:
    """A data set of one batch of noise, of the size that is asked for."""
    n, size = conditions.batch_size, conditions.image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (n, 3, size, size), generator=generator).to(torch.uint8)
    labels = torch.arange(n) % conditions.classes
    return ImageData(
        name="noise",
        digest="noise",
        classes=conditions.classes,
        channels=3,
        image_size=size,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        sizes={"train": n, "val": n, "test": n},
        source=MemorySource(
            pixels={"train": pixels, "val": pixels, "test": pixels},
            labels={"train": labels, "val": labels, "test": labels},
            flip=False,
        ),
    )


def _batch(data: ImageData, size: int, device: torch.device) -> Any:
    pixels, labels = next(data.batches("val", size, device=device))
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return data.normalize(pixels).contiguous(memory_format=layout), labels
