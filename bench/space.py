"""A search space: what the trials of a study may differ in. `bench.space_files` reads it; a study keeps it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from bench.config import PRIMITIVE_NAMES, Strict, TrialConfig, UserError, unknown
from bench.learning.rules import parse_rule

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

#: The TrialConfig fields about how B and W are updated that a space may search, and the type of their values.
#: SGD moves B by lr · feedback_lr_factor · Σ coefficient · gradient: for a rule whose B learns from primitives
#: alone, the factor is the same search as scaling all coefficients. Only kolen-pollack gains by it.
#: ``feedback_lr`` is the rate of B's own optimizer; ``lr`` that of W, which any rule has.
UPDATE_FIELDS: dict[str, Callable[[float], float]] = {
    "feedback_lr_factor": float,
    "feedback_every": int,
    "feedback_warmup_epochs": float,
    "feedback_lr": float,
    "lr": float,
}
PARAMETERS = (*PRIMITIVE_NAMES, *UPDATE_FIELDS)
#: W's lr is searched from this share of the recipe's to that (`Space.with_lr`).
LR_SPAN = (0.01, 2.0)
#: What a rule is whose primitives are all off: B stays as it began.
NOTHING_ON = "feedback"

#: The forms of one parameter in a file.
SHAPES = "{min, max, scale, source}, {choices, source} or {value, source}"


@dataclass(frozen=True, kw_only=True)
class Entry(Strict):
    """One parameter of a space. ``source`` says where it comes from; it is prose, so two spaces that differ in it are
    equal, and `Space.to_dict` leaves it out."""

    source: str = field(default="", compare=False)

    def plain(self) -> dict[str, Any]:
        """The entry as JSON-ready values, without its source."""
        return {key: value for key, value in self.to_dict().items() if key != "source"}


@dataclass(frozen=True, kw_only=True)
class Range(Entry):
    """Every number in [min, max], uniformly on the scale; whole numbers where the parameter is one."""

    min: float
    max: float
    scale: Literal["log", "linear"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.min) and math.isfinite(self.max)):
            raise UserError(f"min = {self.min:g} and max = {self.max:g} must be finite numbers.")
        if self.min >= self.max:
            remedy = "swap them" if self.min > self.max else f"write {{value: {self.min:g}}} for a fixed value"
            raise UserError(f"min = {self.min:g} is not below max = {self.max:g}; {remedy}.")
        if self.scale == "log" and self.min <= 0:
            raise UserError(f"scale log needs min > 0, not {self.min:g}; raise min, or write scale: linear.")

    def values(self) -> tuple[float, ...]:
        """The lowest and the highest value."""
        return (self.min, self.max)


@dataclass(frozen=True, kw_only=True)
class Choices(Entry):
    """One of these numbers, in no order."""

    choices: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.choices)) < max(2, len(self.choices)):
            raise UserError(
                f"choices {list(self.choices)} must be two or more different numbers; or write {{value: x}}."
            )

    def values(self) -> tuple[float, ...]:
        """Every choice."""
        return self.choices


@dataclass(frozen=True, kw_only=True)
class Fixed(Entry):
    """The same number in every trial."""

    value: float

    def values(self) -> tuple[float, ...]:
        """The value."""
        return (self.value,)


Parameter = Range | Choices | Fixed


@dataclass(frozen=True)
class Space:
    """What the trials of a study may differ in. Empty: nothing, and one configuration is the whole search.

    ``optional``: the primitives that a trial may do without; whether one is on is a parameter of its own, its switch.
    ``settings``: the TrialConfig fields that go with it into the study's recipe, which keeps them: `to_dict` does not.
    """

    params: dict[str, Parameter] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for name, parameter in self.params.items():
            if name not in PARAMETERS:
                raise unknown("parameter", name, PARAMETERS)
            for value in parameter.values():
                _check_value(name, value)
        coefficients = [name for name in PRIMITIVE_NAMES if name in self.params]
        if wrong := [name for name in self.optional if name not in coefficients]:
            raise UserError(f"{wrong[0]} cannot be optional; only a primitive that has a coefficient here can.")
        object.__setattr__(self, "params", {name: self.params[name] for name in PARAMETERS if name in self.params})
        object.__setattr__(self, "optional", tuple(name for name in coefficients if name in self.optional))

    @property
    def searched(self) -> tuple[str, ...]:
        """The parameters that a sampler proposes: the switches, and all but the fixed ones (`conditions`)."""
        varied = (name for name, parameter in self.params.items() if not isinstance(parameter, Fixed))
        return (*map(_switch, self.optional), *varied)

    def with_lr(self, lr: float) -> Space:
        """This space, and W's learning rate: `LR_SPAN` around ``lr``, the recipe's."""
        low, high = (lr * share for share in LR_SPAN)
        source = f"from {LR_SPAN[0]:g} of the recipe's to {LR_SPAN[1]:g} of it"
        return replace(self, params={**self.params, "lr": Range(min=low, max=high, scale="log", source=source)})

    def check_changes(self, changes: Mapping[str, Any], name: str) -> None:
        """UserError for a field of the recipe (``--set``) that every trial would replace. ``name``: of this space."""
        for key in changes:
            if key in self.params:
                raise UserError(
                    f"--set {key} has no effect: the space {name!r} has ranges of it; leave it out, or name another "
                    "--space."
                )

    def conditions(self) -> dict[str, str]:
        """The searched parameters that only some trials have, and the switch that must be on for each."""
        return {name: _switch(name) for name in self.optional if name in self.searched}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Space:
        """The space that `to_dict` wrote (into StudyConfig.space)."""
        optional = [
            name for name, entry in values.items() if isinstance(entry, Mapping) and entry.get("optional") is True
        ]
        entries = {
            n: {k: v for k, v in e.items() if k != "optional"} if n in optional else e for n, e in values.items()
        }
        return cls(
            {name: parse_parameter(f"space.{name}", name, entry) for name, entry in entries.items()}, tuple(optional)
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: parameter names to {min, max, scale}, {choices} or {value}. Sources are left out.

        An optional one has {optional: true} as well.
        """
        return {
            name: {**parameter.plain(), **({"optional": True} if name in self.optional else {})}
            for name, parameter in self.params.items()
        }

    def distributions(self) -> dict[str, BaseDistribution]:
        """The searched parameters as Optuna's distributions, a switch before all that depends on it."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        found: dict[str, BaseDistribution] = {
            _switch(name): CategoricalDistribution([False, True]) for name in self.optional
        }
        for name, parameter in self.params.items():
            if isinstance(parameter, Choices):
                found[name] = CategoricalDistribution([_typed(name, choice) for choice in parameter.choices])
            elif isinstance(parameter, Range):
                kind = IntDistribution if UPDATE_FIELDS.get(name) is int else FloatDistribution
                low, high = _typed(name, parameter.min), _typed(name, parameter.max)
                found[name] = kind(low, high, log=parameter.scale == "log")
        return found

    def changes(self, params: Mapping[str, float]) -> dict[str, Any]:
        """The TrialConfig changes for these values of the searched parameters; the fixed ones are added.

        Coefficients are gathered under ``coefficients``. Where primitives are optional, the rule that those make which
        are on is among the changes; with none on only W's lr is. UserError unless each parameter that is searched,
        given the switches, has a value.
        """
        off = [name for name in self.optional if params.get(_switch(name)) is False]
        wanted = [name for name in self.searched if name not in off]
        unclear = [s for s in map(_switch, self.optional) if not isinstance(params.get(s), bool)]
        if set(params) != set(wanted) or unclear:
            raise UserError(
                f"this space searches {', '.join(wanted) or 'nothing'}, not {', '.join(params) or 'nothing'}; "
                f"give each of its parameters one value{' (a switch: true or false)' if self.optional else ''}."
            )
        present = [name for name in self.params if name not in off]
        values = {n: p.value if isinstance(p := self.params[n], Fixed) else params[n] for n in present}
        if not self.optional:
            return _changes(values)
        on = [name for name in PRIMITIVE_NAMES if name in present]
        if not on:
            return {"rule": NOTHING_ON, **{name: value for name, value in values.items() if name == "lr"}}
        return {"rule": parse_rule("+".join(on)).name, **_changes(values)}

    def corners(self) -> tuple[dict[str, float], ...]:
        """Values of the searched parameters at the ends: all at their first, all at their last, each other choice.

        All that is optional is on in these; then each of it alone, at its first value.
        """
        on = {_switch(name): True for name in self.optional}
        varied = [name for name in self.searched if name not in on]
        first = {**on, **{name: _typed(name, self.params[name].values()[0]) for name in varied}}
        last = {**on, **{name: _typed(name, self.params[name].values()[-1]) for name in varied}}
        between = [{**first, n: _typed(n, value)} for n in varied for value in self.params[n].values()[1:-1]]
        alone = []
        for one in self.optional:
            others = [name for name in self.optional if name != one]
            rest = {name: value for name, value in first.items() if name not in others}
            alone.append({**rest, **{_switch(name): False for name in others}})
        return (first, last, *between, *alone) if first else (first,)


def parse_parameter(where: str, name: str, entry: Any) -> Parameter:
    """One parameter, from its mapping. ``where`` it stands begins the error."""
    try:
        if not isinstance(entry, Mapping):
            raise UserError(f"expected {SHAPES}, not {entry!r}.")
        kind: type[Parameter] = Choices if "choices" in entry else Fixed if "value" in entry else Range
        return Space({name: kind.from_dict(entry)}).params[name]
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _check_value(name: str, value: float) -> None:
    """TrialConfig knows what it accepts: a rule's name and this one change are a whole configuration."""
    try:
        needs = {"feedback_optimizer": "sgd"} if name == "feedback_lr" else {}
        TrialConfig.from_dict({"rule": "backprop", **needs, **_changes({name: value})})
    except UserError as error:
        raise UserError(str(error).partition(": ")[2]) from error


def _changes(values: Mapping[str, float]) -> dict[str, Any]:
    coefficients = {name: float(values[name]) for name in PRIMITIVE_NAMES if name in values}
    rest = {name: _typed(name, value) for name, value in values.items() if name not in coefficients}
    return {"coefficients": coefficients, **rest} if coefficients else rest


def _typed(name: str, value: float) -> float:
    """A whole number where the parameter is one (1.5 stays as it is, for TrialConfig to refuse)."""
    whole = UPDATE_FIELDS.get(name) is int and float(value).is_integer()
    return int(value) if whole else value


def _switch(primitive: str) -> str:
    """The parameter that says whether an optional primitive is on."""
    return f"use_{primitive}"
