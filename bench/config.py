"""What a run is: frozen, strict configurations, and the result that a run leaves.

Every default of the program stands here, once. ``from_dict`` refuses unknown keys and wrong types with
one line that names the remedy; ``to_dict`` gives JSON-ready values, and the two are inverse.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

#: The five primitives of Kunin et al. 2020, in the canonical order (design: decay, amp, null, sparse, self).
PRIMITIVE_NAMES = ("decay", "amp", "null", "sparse", "self")

#: Those whose gradient reads a layer's activity.
ACTIVITY_PRIMITIVES = ("amp", "null", "sparse")
#: The TrialConfig fields that say what these see; without effect on a rule that has none of them.
ACTIVITY_SETTINGS = (
    "scaling",
    "centered",
    "feedback_fraction",
    "feedback_input",
    "feedback_samples",
    "stabilize",
    "reversed_null",
)
#: The TrialConfig fields of B's own optimizer; without effect on a rule whose B is not moved by primitives alone.
OPTIMIZER_SETTINGS = (
    "feedback_optimizer",
    "feedback_lr",
    "feedback_momentum",
    "feedback_schedule",
    "feedback_lr_warmup_epochs",
)

Status = Literal["finished", "stopped", "diverged", "failed"]
Kind = Literal["search", "confirm", "control", "train", "robustness", "transfer", "speed"]
#: What amp, sparse and null are divided by in each layer: nothing (the authors'), or the energy of what they read.
Scaling = Literal["reference", "normalized"]
#: What amp, null and sparse see: the batch's activations, or noise patches, drawn for each layer and step.
FeedbackInput = Literal["activations", "normal", "uniform"]
#: What moves B: the optimizer of W (shared), or one of its own.
FeedbackOptimizer = Literal["shared", "sgd", "adam"]
#: What moves W.
WeightOptimizer = Literal["sgd", "adamw", "muon"]
#: The course of a learning rate after its warm-up.
Schedule = Literal["cosine", "step", "constant"]
#: The authors' operations on what amp, sparse and null see (`bench.learning.activity`), in the order in which they act.
Stabilizer = Literal[
    "center_input",
    "normalize_input",
    "batch_center_backward_input",
    "center_forward_output",
    "normalize_forward_output",
    "batch_center_forward_output",
    "center_backward_output",
    "normalize_backward_output",
]
#: Where Gaussian noise goes (design, section 5): into training (update), or into a trained network.
Site = Literal["update", "weight", "activation", "input"]
#: What a search maximises: clean accuracy, the area under accuracy against the noise, or both (a Pareto front).
Objective = Literal["accuracy", "robustness", "both"]


class UserError(ValueError):
    """Bad input: one clear line that names the remedy. The command line prints it and exits with status 2."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """``text`` with escapes for what does not print (a value in it may be somebody else's), and no endless middle."""
    text = text if len(text) <= 4_000 else f"{text[:3_000]} … {text[-1_000:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def unknown(what: str, given: str, valid: Iterable[str]) -> UserError:
    """The error for a name that is not in a list: the list, and the nearest name in it."""
    names = sorted(valid)
    near = difflib.get_close_matches(given, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {what} {given!r}.{hint} Valid: {', '.join(names)}.")


@functools.cache
def _model(cls: type[Strict]) -> Any:
    """The pydantic model of a class's fields, made when it is first needed: `bench --help` imports no pydantic."""
    return fields_model(cls.__name__, {name: (kind, ...) for name, kind in typing.get_type_hints(cls).items()})


def fields_model(name: str, fields: Mapping[str, tuple[Any, Any]], narrower: Mapping[type, Any] = {}) -> Any:
    """A pydantic model of fields, each (type, default): nothing is cast, but a list passes for a tuple, as in JSON.

    ``narrower``: by type, what its values must be wherever it stands.
    """
    import pydantic

    def lenient(kind: Any) -> Any:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin in (typing.Union, types.UnionType):
            return typing.Union[tuple(map(lenient, arguments))]  # noqa: UP007  (made of a list)
        if origin in (tuple, list, dict):
            return Annotated[origin[tuple(map(lenient, arguments))], pydantic.Strict(strict=False)]
        if isinstance(kind, type) and issubclass(kind, Strict):
            read = lambda value: value if isinstance(value, kind) else kind.from_dict(value)  # noqa: E731
            return Annotated[Any, pydantic.PlainValidator(read)]
        return leaves.get(kind, kind) if isinstance(kind, type) else kind

    # a text with a bound is checked for halves of characters
    leaves = {str: Annotated[str, pydantic.Field(min_length=0)], **narrower}
    config = pydantic.ConfigDict(strict=True, arbitrary_types_allowed=True)
    typed: dict[str, Any] = {key: (lenient(kind), default) for key, (kind, default) in fields.items()}
    return pydantic.create_model(name, __config__=config, **typed)


def validate(owner: str, model: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as the model has them; UserError for the first that is wrong. ``owner`` begins its line."""
    from pydantic import ValidationError

    try:
        found = model.model_validate(values)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
    else:
        return dict(vars(found))
    if isinstance(cause := wrong.get("ctx", {}).get("error"), UserError):
        raise cause
    place = owner + ".".join(map(str, wrong["loc"]))
    if wrong["type"] == "missing":
        raise UserError(f"{place} is missing.")
    must = wrong["msg"].partition(" should ")[2] or f"be another value ({wrong['msg']})"
    given = repr(wrong["input"])
    raise UserError(f"{place} must {must}, not {given if len(given) <= 200 else given[:200] + '…'}.")


def is_text(value: str) -> bool:
    """Whether it can be written as UTF-8; a file's name, or JSON, may hold halves of characters."""
    return re.search("[\ud800-\udfff]", value) is None


class Strict:
    """Mixed into a frozen dataclass: strict ``from_dict``, JSON-ready ``to_dict``, ``replace``, ``digest``."""

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in dataclasses.fields(cls))  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration with these values; a missing key takes its default, an unknown one is refused."""
        if not isinstance(values, Mapping):
            raise UserError(f"{cls.__name__}: expected a mapping of keys to values, not {values!r}.")
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        names = {f.name for f in fields}
        for key in values:
            if key not in names:
                raise unknown(f"key of {cls.__name__}", str(key), names)
        free = {f.name for f in fields if (f.default, f.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)}
        if missing := [f.name for f in fields if f.name not in free and f.name not in values]:
            raise UserError(f"{cls.__name__}: missing {', '.join(missing)}.")
        return cls(**values)

    def __post_init__(self) -> None:
        """Give every field its declared type, so that equal configurations have one digest; UserError otherwise."""
        for name, value in validate(f"{type(self).__name__}: ", _model(type(self)), vars(self)).items():  # type: ignore[arg-type]
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, numbers and strings; ``from_dict`` of it is equal to this."""
        plain: dict[str, Any] = json.loads(json.dumps(vars(self), default=vars))
        return plain

    def replace(self, **changes: Any) -> Self:
        """A checked copy with these fields changed."""
        return type(self).from_dict({**self.to_dict(), **changes})

    def identity(self) -> dict[str, Any]:
        """The fields that differ from their defaults: a field that is new leaves the names of old runs as they are.

        (And a default may never change: runs that differ would have one name.)
        """
        plain = self.to_dict()
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {f.name: plain[f.name] for f in fields if getattr(self, f.name) != f.default}

    def digest(self) -> str:
        """Sixteen hexadecimal digits that name this configuration."""
        return digest(self.identity())


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits (sha256) of a JSON-ready value; independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def check_range(
    owner: str, name: str, value: float | None, low: float, high: float = math.inf, *, open_low: bool = False
) -> None:
    """Refuse a number outside [low, high] (or (low, high]), NaN included; None passes."""
    if value is None:
        return
    inside = (low < value if open_low else low <= value) and value <= high
    if not inside or not math.isfinite(value):
        bracket = "(" if open_low else "["
        raise UserError(f"{owner}: {name} = {value} is out of range; it must lie in {bracket}{low:g}, {high:g}].")


def check_levels(owner: str, levels: Sequence[float]) -> None:
    """Refuse levels of noise (or of an attack) that do not rise from above 0; two at least make an area."""
    for level in levels:
        check_range(owner, "noise level", level, 0, open_low=True)
    if len(levels) < 2 or list(levels) != sorted(set(levels)):
        raise UserError(
            f"{owner}: noise levels {list(levels)} must be two or more, above 0 and rising, e.g. 0.1,0.2,0.4; "
            "0, the network without noise, is always measured."
        )


@dataclass(frozen=True, kw_only=True)
class CoefficientSchedule(Strict):
    """When a coefficient is on, and how it changes (the authors' ``build_alignment_coefficient_schedule``).

    ``start`` and ``stop`` are fractions of the training; outside of them the coefficient is 0. ``course``: with t the
    epochs since the start, ``linear`` adds rate·t to the coefficient (never below 0), ``exponential`` multiplies it
    by exp(rate·t).
    """

    start: float = 0.0
    stop: float = 1.0
    course: Literal["constant", "linear", "exponential"] = "constant"
    rate: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        who = "coefficient schedule"
        check_range(who, "start", self.start, 0, 1)
        check_range(who, "stop", self.stop, 0, 1)
        check_range(who, "rate", self.rate, -(10**6), 10**6)
        if self.start >= self.stop:
            raise UserError(f"{who}: start = {self.start:g} must be below stop = {self.stop:g}.")
        if (self.course == "constant") != (self.rate == 0):
            raise UserError(f"{who}: course 'linear' or 'exponential' and a rate other than 0 go together.")

    def value(self, coefficient: float, epoch: float, epochs: int) -> float:
        """The coefficient after ``epoch`` of ``epochs`` epochs."""
        start = self.start * epochs
        if not start <= epoch <= self.stop * epochs:
            return 0.0
        if self.course == "linear":
            return max(0.0, coefficient + self.rate * (epoch - start))
        return coefficient * math.exp(self.rate * (epoch - start))


@dataclass(frozen=True, kw_only=True)
class TrialConfig(Strict):
    """One training run, whole: with the code, the data and the device it determines the result.

    ``coefficients`` are named by their primitive. ``lr`` is the rate at ``batch_size`` (not rescaled).
    ``feedback_every = k``: k = 1, B and W both learn in every step; k > 1 is the authors' alternation:
    every k-th step trains B alone, the k - 1 steps between train W alone (their ``alternate_step_freq``
    is k - 1). ``feedback_warmup_epochs`` is their ``delay_epochs``: at first B learns alone.
    ``feedback_fraction``: the share of each batch's examples that B's primitives see.
    """

    rule: str
    arch: str = "resnet18"
    dataset: str = "digits"
    seed: int = 0

    # B: the rule's coefficients, and how B is updated
    coefficients: dict[str, float] = field(default_factory=dict)
    feedback_lr_factor: float = 1.0
    feedback_every: int = 1
    feedback_warmup_epochs: float = 0.0
    # what amp, null and sparse make of a layer's activity: divided by its energy; without its mean
    scaling: Scaling = "reference"
    centered: bool = False
    feedback_fraction: float = 1.0
    # what these three see: the batch's activations, or noise patches, so many for each layer and step
    feedback_input: FeedbackInput = "activations"
    feedback_samples: int = 64
    # the authors' operations on activity; null of Wᵀ·B·x in place of Bᵀ·W·x
    stabilize: tuple[Stabilizer, ...] = ()
    reversed_null: bool = False
    # by primitive: when its coefficient is on, and how it changes; absent: constant
    coefficient_schedules: dict[str, CoefficientSchedule] | None = None
    # B's own optimizer: its rate, momentum (adam: beta1), warm-up and schedule; shared: W's optimizer moves B, too
    feedback_optimizer: FeedbackOptimizer = "shared"
    feedback_lr: float | None = None
    feedback_momentum: float = 0.9
    feedback_schedule: Schedule = "constant"
    feedback_lr_warmup_epochs: float = 0.0

    # the network
    stem: Literal["auto", "small", "imagenet"] = "auto"
    image_size: int | None = None

    # the recipe: SGD with (Nesterov) momentum, AdamW (momentum is its beta1) or Muon
    optimizer: WeightOptimizer = "sgd"
    epochs: int = 10
    batch_size: int = 128
    accumulate: int = 1
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: Schedule = "cosine"
    warmup_epochs: float = 1.0
    step_epochs: tuple[float, ...] = ()
    step_factor: float = 0.1
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    precision: Literal["auto", "float32", "bf16"] = "auto"

    # Gaussian noise in training, after each optimizer step: theta += lr · N(0, update_noise²), on these parameters
    update_noise: float = 0.0
    update_noise_on: Literal["both", "forward", "feedback"] = "both"

    # the data
    augment: bool = True
    split_seed: int = 0
    val_fraction: float = 0.1
    train_examples: int | None = None

    # what is measured after each epoch, beside accuracy and loss: angles cost one more backward pass
    measure_alignment: bool = True
    # the area under validation accuracy against these noise levels at this site, averaged over the draws
    noise_site: Site | None = None
    noise_levels: tuple[float, ...] = ()
    noise_draws: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        who = "configuration"
        for name in self.coefficients:
            if name not in PRIMITIVE_NAMES:
                raise unknown("coefficient", name, PRIMITIVE_NAMES)
        ordered = {p: float(self.coefficients[p]) for p in PRIMITIVE_NAMES if p in self.coefficients}
        object.__setattr__(self, "coefficients", ordered)
        for name, value in ordered.items():
            check_range(who, f"coefficients.{name}", value, 0)
        check_range(who, "seed", self.seed, 0, 2**31 - 1)
        check_range(who, "split_seed", self.split_seed, 0, 2**31 - 1)
        for name, low in (("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("feedback_every", 1)):
            check_range(who, name, getattr(self, name), low, 10**9)
        check_range(who, "image_size", self.image_size, 1, 4096)
        check_range(who, "train_examples", self.train_examples, 1)
        check_range(who, "feedback_fraction", self.feedback_fraction, 0, 1, open_low=True)
        for name in ("lr", "step_factor", "clip_norm"):
            check_range(who, name, getattr(self, name), 0, open_low=True)
        for name in ("weight_decay", "feedback_lr_factor", "warmup_epochs", "feedback_warmup_epochs"):
            check_range(who, name, getattr(self, name), 0)
        check_range(who, "momentum", self.momentum, 0, 0.9999)
        self._check_feedback(who)
        check_range(who, "label_smoothing", self.label_smoothing, 0, 0.9999)
        check_range(who, "val_fraction", self.val_fraction, 0.001, 0.9)
        for epoch in self.step_epochs:
            check_range(who, "step_epochs", epoch, 0)
        if list(self.step_epochs) != sorted(set(self.step_epochs)):
            raise UserError(f"configuration: step_epochs {list(self.step_epochs)} must rise; write e.g. [30, 60, 80].")
        self._check_noise(who)
        if self.warmup_epochs > self.epochs:
            raise UserError(
                f"configuration: warmup_epochs = {self.warmup_epochs:g} is more than epochs = {self.epochs}; lower it."
            )
        stepped = "step" in (self.schedule, self.feedback_schedule)
        if not stepped and self.step_factor != type(self).step_factor:
            raise UserError(f"configuration: step_factor has no effect with schedule {self.schedule!r}; remove it.")
        if self.nesterov and self.momentum == 0 and self.optimizer != "adamw":
            raise UserError("configuration: nesterov needs momentum > 0; set nesterov=false or momentum=0.9.")
        if self.optimizer == "adamw" and self.nesterov != type(self).nesterov:
            raise UserError("configuration: nesterov has no effect with optimizer 'adamw'; remove it.")
        if stepped and not self.step_epochs:
            raise UserError("configuration: schedule 'step' needs step_epochs, e.g. step_epochs=[30,60,80].")
        if not stepped and self.step_epochs:
            raise UserError(f"configuration: step_epochs has no effect with schedule {self.schedule!r}; remove it.")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"configuration: batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}."
            )

    def _check_feedback(self, who: str) -> None:
        """What B sees and what moves it; what depends on the rule is refused where the rule is known."""
        check_range(who, "feedback_samples", self.feedback_samples, 1, 10**6)
        check_range(who, "feedback_momentum", self.feedback_momentum, 0, 0.9999)
        check_range(who, "feedback_lr", self.feedback_lr, 0, open_low=True)
        check_range(who, "feedback_lr_warmup_epochs", self.feedback_lr_warmup_epochs, 0, self.epochs)
        if len(set(self.stabilize)) < len(self.stabilize):
            raise UserError(f"configuration: stabilize {list(self.stabilize)} names an operation twice; name it once.")
        ordered = [name for name in typing.get_args(Stabilizer) if name in self.stabilize]
        object.__setattr__(self, "stabilize", tuple(ordered))
        if self.feedback_input == "activations":
            if self.feedback_samples != type(self).feedback_samples:
                raise UserError(
                    "configuration: feedback_samples has no effect with feedback_input 'activations'; remove it, or "
                    "set feedback_input=normal."
                )
        else:
            given = [n for n in ("scaling", "centered", "feedback_fraction", "stabilize") if self._changed(n)]
            if given:
                raise UserError(
                    f"configuration: {', '.join(given)} has no effect with feedback_input {self.feedback_input!r}, "
                    "which is white noise, not activity; remove it, or set feedback_input=activations."
                )
        if self.feedback_optimizer == "shared":
            given = [n for n in OPTIMIZER_SETTINGS if n != "feedback_optimizer" and self._changed(n)]
            if given:
                raise UserError(
                    f"configuration: {', '.join(given)} has no effect with feedback_optimizer 'shared', where W's "
                    "optimizer moves B; remove it, or set feedback_optimizer=sgd."
                )
        else:
            if self.feedback_lr is None:
                raise UserError(
                    f"configuration: feedback_optimizer {self.feedback_optimizer!r} needs feedback_lr; "
                    "set e.g. feedback_lr=0.02."
                )
            if self._changed("feedback_lr_factor"):
                raise UserError(
                    "configuration: feedback_lr_factor has no effect with an optimizer of B's own; set feedback_lr."
                )
        object.__setattr__(self, "coefficient_schedules", self.coefficient_schedules or None)
        for name in self.coefficient_schedules or ():
            if name not in self.coefficients:
                raise UserError(f"configuration: coefficient_schedules.{name} belongs to no coefficient; remove it.")

    def _changed(self, name: str) -> bool:
        """Whether a field differs from its default."""
        return bool(getattr(self, name) != getattr(type(self), name))

    def _check_noise(self, who: str) -> None:
        check_range(who, "update_noise", self.update_noise, 0)
        check_range(who, "noise_draws", self.noise_draws, 1, 10_000)
        if not self.update_noise and self.update_noise_on != type(self).update_noise_on:
            raise UserError("configuration: update_noise_on has no effect without update_noise; remove it.")
        if self.noise_site is None:
            if self.noise_levels or self.noise_draws != type(self).noise_draws:
                raise UserError("configuration: noise_levels and noise_draws have no effect without noise_site.")
            return
        check_levels(who, self.noise_levels)
        if self.noise_site == "update" and (self.update_noise or self.noise_draws != 1):
            raise UserError(
                "configuration: noise_site 'update' trains a network at each of noise_levels, once: remove "
                "update_noise and noise_draws."
            )


@dataclass(frozen=True, kw_only=True)
class StudyConfig(Strict):
    """One search: everything that must not change when the study goes on (``trials`` alone may grow).

    ``recipe`` holds the TrialConfig fields that are the same in every trial; ``space`` is the resolved
    search space, as `bench.space_files` reads it from YAML.
    """

    name: str
    rule: str
    arch: str
    dataset: str
    trials: int = 20
    epochs: int = 10
    seed: int = 0
    sampler: str = "gp"
    scheduler: str = "asha"
    confirm_top: int = 1
    confirm_seeds: int = 3
    objective: Objective = "accuracy"
    # a warm start: the first trials, from the best of that study, in its order
    warm_from: str | None = None
    warm: tuple[dict[str, Any], ...] = ()
    recipe: dict[str, Any] = field(default_factory=dict)
    space: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("study", "trials", self.trials, 1, 10**6)
        check_range("study", "epochs", self.epochs, 1, 10**6)
        check_range("study", "confirm_seeds", self.confirm_seeds, 0, 1000)
        check_range("study", "confirm_top", self.confirm_top, 1, 1000)
        check_range("study", "seed", self.seed, 0, 2**31 - 1)
        if bool(self.warm) != (self.warm_from is not None):
            raise UserError("study: warm and warm_from go together: trials, and the study that they are from.")


def base_arch(arch: str) -> str:
    """The network's name without its width: resnet18 of resnet18@0.25."""
    return arch.partition("@")[0]


def study_name(rule: str, arch: str, dataset: str, *, space: str = "default") -> str:
    """The default name: what the study is about, in characters that every file system takes.

    ``space``: that of the search, in `bench.spaces.SPACES`. A width's ``@`` becomes ``x``, not the dash that all else
    becomes: mlp:512-2 and mlp:512@2 are two networks.
    """
    kind, _, path = dataset.partition(":")
    data = f"{kind}-{PurePath(path).name}" if path else kind
    how = "" if space == "default" else f"-{space}"
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", f"{rule}-{arch}".replace("@", "x") + f"-{data}{how}").strip("-.")


@dataclass(frozen=True, kw_only=True)
class TrialResult(Strict):
    """What one run leaves: its row, before it is filed.

    ``history`` has one mapping of metric names to numbers per finished epoch (``epoch`` among them, from
    1); ``metrics`` the final ones: val_acc, val_top5, val_loss, train_loss, angle (mean over layers, in
    degrees), ..., and test_* if test was read. Accuracies are fractions of 1. A diverged run has chance
    accuracy as val_acc (and test_acc, if it was asked for), and its reason.

    ``evaluation``: what was done to the trained network before it was scored (site, level, draws, ...); empty
    for a training run.
    """

    config: TrialConfig
    status: Status
    reason: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
