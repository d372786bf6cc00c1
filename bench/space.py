"""Search spaces: what a search may change, read from ``search_spaces/<rule>.yaml``.

A file has the keys ``rule``, ``source`` (where the ranges come from), ``space`` and, optionally, ``arch`` and
``scaling``::

    rule: symmetric
    source: Kunin et al. 2020
    space:
      decay: {min: 1e-3, max: 1, scale: log, source: why these bounds}
      self: {choices: [0.01, 0.1], source: why these choices}
      feedback_every: {value: 1, source: why it is fixed}
    arch:
      resnet50:            # replaces the entries that it names, for this network (at any width)
        decay: {min: 1e-4, max: 1e-1, scale: log, source: why it differs}
    scaling:
      normalized:          # replaces what it names where a trial's scaling is this one, for every network
        amp: {min: 0.1, max: 10, scale: log, source: why it differs}

A parameter is a primitive of the rule (its coefficient) or one of `UPDATE_FIELDS`. Rules whose B does not
learn (backprop, feedback, sign, frozen) have no file: their space is empty, and a search of it is one run.

A normalized coefficient is a number without a unit, with the same stable range in every layer: a ``scaling`` section
goes before an ``arch`` section that names the same parameter. It names at least each primitive of its rule that sees
activity (amp, null, sparse); a rule that has none of them has no such section, for scaling does not change it.

The space of the rule ``any`` has no file. It is composed of the five primitives' own, and each of them is optional:
a switch ``use_amp`` says whether amp is on, and its coefficient is a parameter of those trials only in which it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from bench.config import (
    ACTIVITY_PRIMITIVES,
    PRIMITIVE_NAMES,
    Scaling,
    Strict,
    TrialConfig,
    UserError,
    base_arch,
    unknown,
)
from bench.files import read_yaml
from bench.learning.rules import ANY, RULES, Rule, parse_rule

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

#: The TrialConfig fields about how B is updated that a space may search, and the type of their values.
#: SGD moves B by lr · feedback_lr_factor · Σ coefficient · gradient: for a rule whose B learns from primitives
#: alone, the factor is the same search as scaling all coefficients. Only kolen-pollack gains by it.
UPDATE_FIELDS: dict[str, Callable[[float], float]] = {
    "feedback_lr_factor": float,
    "feedback_every": int,
    "feedback_warmup_epochs": float,
}
PARAMETERS = (*PRIMITIVE_NAMES, *UPDATE_FIELDS)
#: The scalings that a file may have a section for; of the remaining one, reference, are the ranges in ``space``.
SECTIONS = tuple(name for name in get_args(Scaling) if name != TrialConfig.scaling)
#: What a rule is whose primitives are all off: B stays as it began.
NOTHING_ON = "feedback"

_SHAPES = "{min, max, scale, source}, {choices, source} or {value, source}"


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
    """

    params: dict[str, Parameter] = field(default_factory=dict)
    optional: tuple[str, ...] = ()

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
        return cls({name: _parse(f"space.{name}", name, entry) for name, entry in entries.items()}, tuple(optional))

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
        are on is among the changes; with none on nothing else is. UserError unless each parameter that is searched,
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
        return {"rule": parse_rule("+".join(on)).name, **_changes(values)} if on else {"rule": NOTHING_ON}

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


def load_space(rule: str, arch: str, folder: Path | None = None, *, scaling: str = TrialConfig.scaling) -> Space:
    """The search space of a rule on an architecture, from ``<folder>/<rule>.yaml``; the folder is the program's own.

    An unnamed subset of primitives without a file has the space that its primitives' files compose; so has the rule
    ``any``, with each of them optional. UserError if the file is missing or wrong in any of its sections, or has no
    ranges for this scaling: one line that names file, place and remedy.
    """
    if scaling not in get_args(Scaling):
        raise unknown("scaling", scaling, get_args(Scaling))
    folder = space_folder() if folder is None else folder
    if not folder.is_dir():
        raise UserError(f"there is no folder of search spaces at {folder}; name the folder that holds <rule>.yaml.")
    if rule == ANY:
        if (folder / f"{ANY}.yaml").exists():
            raise UserError(f"{folder / ANY}.yaml would not be read: rule {ANY!r} is its primitives' files; remove it.")
        remedy = "make them agree"
        return Space(_compose(PRIMITIVE_NAMES, arch, folder, scaling, remedy), optional=PRIMITIVE_NAMES)
    row = parse_rule(rule)
    _refuse_other_spelling(row, folder)
    if (folder / f"{row.name}.yaml").exists():
        return _read(folder / f"{row.name}.yaml", row, arch, scaling)
    if not row.learns:
        return Space()
    if row.name in RULES:
        raise UserError(f"rule {row.name!r} has no search space: write {folder / row.name}.yaml.")
    return Space(_compose(row.primitives, arch, folder, scaling, f"write {folder / row.name}.yaml"))


def space_folder() -> Path:
    """``search_spaces``: inside the package when it was installed, beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "search_spaces"
    return installed if installed.is_dir() else package.parent / "search_spaces"


def space_names(folder: Path | None = None) -> tuple[str, ...]:
    """The rules that have a file of their own."""
    return tuple(sorted(path.stem for path in (folder or space_folder()).glob("*.yaml")))


def _compose(primitives: tuple[str, ...], arch: str, folder: Path, scaling: str, remedy: str) -> dict[str, Parameter]:
    """The union of the primitives' spaces."""
    params: dict[str, Parameter] = {}
    for primitive in primitives:
        for name, parameter in load_space(primitive, arch, folder, scaling=scaling).params.items():
            if params.setdefault(name, parameter) != parameter:
                raise UserError(f"the spaces of {' and '.join(primitives)} differ in {name}; {remedy}.")
    return params


def _refuse_other_spelling(rule: Rule, folder: Path) -> None:
    """A file 'sparse+decay.yaml' would never be read: the canonical order is another."""
    for path in folder.glob("*+*.yaml"):
        if path.stem != rule.name and set(path.stem.split("+")) == set(rule.primitives) and not rule.task_gradient:
            raise UserError(f"{path} is not the canonical name of its rule; rename it to {rule.name}.yaml.")


def _read(path: Path, rule: Rule, arch: str, scaling: str) -> Space:
    """One file, checked whole: every section, not only the one that is asked for."""
    document = read_yaml(path)
    for key in document:
        if key not in (keys := ("rule", "source", "space", "arch", "scaling")):
            raise UserError(f"{path}: {unknown('key', key, keys)}")
    if document.get("rule") != rule.name:
        raise UserError(f"{path}: rule is {document.get('rule')!r}; write rule: {rule.name!r}, in quotes.")
    if not isinstance(document.get("source"), str):
        raise UserError(f"{path}: source is missing; say in one line where the ranges come from.")
    base = _section(path, "space", document.get("space"), rule)
    nets = _sections(path, "arch", "networks", document, rule)
    scalings = _sections(path, "scaling", "scalings", document, rule)
    for name, section in scalings.items():
        _check_scaling(path, name, section, rule)
    for params in (base, *({**base, **section} for section in (*nets.values(), *scalings.values()))):
        _check_complete(path, params, rule)
    if scaling in SECTIONS and scaling not in scalings and rule.sees_activity:
        raise UserError(f"{path}: there are no ranges for scaling {scaling!r}; add a section scaling.{scaling}.")
    return Space({**base, **nets.get(arch, nets.get(base_arch(arch), {})), **scalings.get(scaling, {})})


def _sections(
    path: Path, key: str, of: str, document: Mapping[str, Any], rule: Rule
) -> dict[str, dict[str, Parameter]]:
    """The sections by name of one key."""
    sections = document.get(key, {})
    if not isinstance(sections, dict):
        raise UserError(f"{path}: {key} must map names of {of} to parameters, not {sections!r}.")
    return {name: _section(path, f"{key}.{name}", section, rule) for name, section in sections.items()}


def _check_scaling(path: Path, name: str, section: Mapping[str, Parameter], rule: Rule) -> None:
    """Ranges that were made for one scaling would be wrong by orders of magnitude for another."""
    if name not in SECTIONS:
        raise UserError(f"{path}: {unknown('scaling', str(name), SECTIONS)}")
    if not rule.sees_activity:
        raise UserError(f"{path}: scaling.{name} has no effect on rule {rule.name!r}; remove it.")
    if missing := [p for p in rule.primitives if p in ACTIVITY_PRIMITIVES and p not in section]:
        raise UserError(f"{path}: scaling.{name} lacks {', '.join(missing)}; add {_SHAPES}.")


def _section(path: Path, where: str, section: Any, rule: Rule) -> dict[str, Parameter]:
    """The parameters of one section; each must be one that this rule has, with a source and legal values."""
    if not isinstance(section, dict):
        raise UserError(f"{path}: {where} must map parameters to {_SHAPES}, not {section!r}.")
    primitives = () if rule.task_gradient or not rule.learns else rule.primitives
    allowed = (*primitives, *UPDATE_FIELDS) if rule.learns else ()
    params: dict[str, Parameter] = {}
    for name, entry in section.items():
        if name in PARAMETERS and name not in allowed:
            raise UserError(f"{path}: {where}.{name} has no effect on rule {rule.name!r}; remove it.")
        params[name] = _parse(f"{path}: {where}.{name}", name, entry)
        if not params[name].source.strip():
            raise UserError(f"{path}: {where}.{name} needs a source: one line on where it comes from.")
    return params


def _check_complete(path: Path, params: Mapping[str, Parameter], rule: Rule) -> None:
    """Every primitive of the rule has a coefficient; kolen-pollack's is the recipe's weight decay."""
    needed = rule.primitives if rule.learns and not rule.task_gradient else ()
    if missing := [name for name in needed if name not in params]:
        raise UserError(f"{path}: space lacks {', '.join(missing)}; add {_SHAPES}.")


def _parse(where: str, name: str, entry: Any) -> Parameter:
    """One parameter, from its mapping. ``where`` it stands begins the error."""
    try:
        if not isinstance(entry, Mapping):
            raise UserError(f"expected {_SHAPES}, not {entry!r}.")
        kind: type[Parameter] = Choices if "choices" in entry else Fixed if "value" in entry else Range
        return Space({name: kind.from_dict(entry)}).params[name]
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _check_value(name: str, value: float) -> None:
    """TrialConfig knows what it accepts: a rule's name and this one change are a whole configuration."""
    try:
        TrialConfig.from_dict({"rule": "backprop", **_changes({name: value})})
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
