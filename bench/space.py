"""Search spaces: what a search may change, read from ``search_spaces/<rule>.yaml``.

A file has the keys ``rule``, ``source`` (where the ranges come from), ``space`` and, optionally, ``arch``::

    rule: symmetric
    source: Kunin et al. 2020
    space:
      decay: {min: 1e-3, max: 1, scale: log, source: why these bounds}
      self: {choices: [0.01, 0.1], source: why these choices}
      feedback_every: {value: 1, source: why it is fixed}
    arch:
      resnet50:            # replaces the entries that it names, for this network only
        decay: {min: 1e-4, max: 1e-1, scale: log, source: why it differs}

A parameter is a primitive of the rule (its coefficient) or one of `UPDATE_FIELDS`. Rules whose B does not
learn (backprop, feedback, sign, frozen) have no file: their space is empty, and a search of it is one run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bench.config import PRIMITIVE_NAMES, Strict, TrialConfig, UserError, unknown
from bench.files import read_yaml
from bench.learning.rules import RULES, Rule, parse_rule

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
    """What the trials of a study may differ in. Empty: nothing, and one configuration is the whole search."""

    params: dict[str, Parameter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, parameter in self.params.items():
            if name not in PARAMETERS:
                raise unknown("parameter", name, PARAMETERS)
            for value in parameter.values():
                _check_value(name, value)
        object.__setattr__(self, "params", {name: self.params[name] for name in PARAMETERS if name in self.params})

    @property
    def searched(self) -> tuple[str, ...]:
        """The parameters that a sampler proposes: all but the fixed ones."""
        return tuple(name for name, parameter in self.params.items() if not isinstance(parameter, Fixed))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Space:
        """The space that `to_dict` wrote (into StudyConfig.space)."""
        return cls({name: _parse(f"space.{name}", name, entry) for name, entry in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: parameter names to {min, max, scale}, {choices} or {value}. Sources are left out."""
        return {name: parameter.plain() for name, parameter in self.params.items()}

    def distributions(self) -> dict[str, BaseDistribution]:
        """The searched parameters as Optuna's distributions."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        found: dict[str, BaseDistribution] = {}
        for name in self.searched:
            parameter = self.params[name]
            if isinstance(parameter, Choices):
                found[name] = CategoricalDistribution([_typed(name, choice) for choice in parameter.choices])
            elif isinstance(parameter, Range):
                kind = IntDistribution if UPDATE_FIELDS.get(name) is int else FloatDistribution
                low, high = _typed(name, parameter.min), _typed(name, parameter.max)
                found[name] = kind(low, high, log=parameter.scale == "log")
        return found

    def changes(self, params: Mapping[str, float]) -> dict[str, Any]:
        """The TrialConfig changes for these values of the searched parameters; the fixed ones are added.

        Coefficients are gathered under ``coefficients``. UserError unless each searched parameter has a value.
        """
        if set(params) != set(self.searched):
            raise UserError(
                f"this space searches {', '.join(self.searched) or 'nothing'}, not {', '.join(params) or 'nothing'}; "
                "give each of its parameters one value."
            )
        fixed = {name: p.value for name, p in self.params.items() if isinstance(p, Fixed)}
        return _changes({**fixed, **params})

    def corners(self) -> tuple[dict[str, float], ...]:
        """Values of the searched parameters at the ends: all at their first, all at their last, each other choice."""
        first = {name: _typed(name, self.params[name].values()[0]) for name in self.searched}
        last = {name: _typed(name, self.params[name].values()[-1]) for name in self.searched}
        between = [
            {**first, name: _typed(name, value)} for name in self.searched for value in self.params[name].values()[1:-1]
        ]
        return (first, last, *between) if first else (first,)


def load_space(rule: str, arch: str, folder: Path | None = None) -> Space:
    """The search space of a rule on an architecture, from ``<folder>/<rule>.yaml``; the folder is the program's own.

    An unnamed subset of primitives without a file has the space that its primitives' files compose. UserError if the
    file is missing or wrong in any of its sections: one line that names file, place and remedy.
    """
    row = parse_rule(rule)
    folder = space_folder() if folder is None else folder
    if not folder.is_dir():
        raise UserError(f"there is no folder of search spaces at {folder}; name the folder that holds <rule>.yaml.")
    _refuse_other_spelling(row, folder)
    if (folder / f"{row.name}.yaml").exists():
        return _read(folder / f"{row.name}.yaml", row, arch)
    if not row.learns:
        return Space()
    if row.name in RULES:
        raise UserError(f"rule {row.name!r} has no search space: write {folder / row.name}.yaml.")
    return _compose(row, arch, folder)


def space_folder() -> Path:
    """``search_spaces``: inside the package when it was installed, beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "search_spaces"
    return installed if installed.is_dir() else package.parent / "search_spaces"


def space_names(folder: Path | None = None) -> tuple[str, ...]:
    """The rules that have a file of their own."""
    return tuple(sorted(path.stem for path in (folder or space_folder()).glob("*.yaml")))


def _compose(rule: Rule, arch: str, folder: Path) -> Space:
    """The union of the primitives' spaces."""
    params: dict[str, Parameter] = {}
    for primitive in rule.primitives:
        for name, parameter in load_space(primitive, arch, folder).params.items():
            if params.setdefault(name, parameter) != parameter:
                raise UserError(
                    f"the spaces of {' and '.join(rule.primitives)} differ in {name}; write {folder / rule.name}.yaml."
                )
    return Space(params)


def _refuse_other_spelling(rule: Rule, folder: Path) -> None:
    """A file 'sparse+decay.yaml' would never be read: the canonical order is another."""
    for path in folder.glob("*+*.yaml"):
        if path.stem != rule.name and set(path.stem.split("+")) == set(rule.primitives) and not rule.task_gradient:
            raise UserError(f"{path} is not the canonical name of its rule; rename it to {rule.name}.yaml.")


def _read(path: Path, rule: Rule, arch: str) -> Space:
    """One file, checked whole: every section, not only the one that is asked for."""
    document = read_yaml(path)
    for key in document:
        if key not in ("rule", "source", "space", "arch"):
            raise UserError(f"{path}: {unknown('key', key, ('rule', 'source', 'space', 'arch'))}")
    if document.get("rule") != rule.name:
        raise UserError(f"{path}: rule is {document.get('rule')!r}; write rule: {rule.name!r}, in quotes.")
    if not isinstance(document.get("source"), str):
        raise UserError(f"{path}: source is missing; say in one line where the ranges come from.")
    base = _section(path, "space", document.get("space"), rule)
    sections = document.get("arch", {})
    if not isinstance(sections, dict):
        raise UserError(f"{path}: arch must map names of networks to parameters, not {sections!r}.")
    spaces = {name: {**base, **_section(path, f"arch.{name}", s, rule)} for name, s in sections.items()}
    for params in (base, *spaces.values()):
        _check_complete(path, params, rule)
    return Space(spaces.get(arch, base))


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
