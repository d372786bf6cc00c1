"""Search spaces: what a search may change, read from ``search_spaces/<rule>.yaml``.

There are several for each rule (`SPACES`): the default one, in which the rule learns; the paper's own, in the folder
``reference``; and others. A file has the keys ``rule``, ``source`` (where the ranges come from), ``space`` and,
optionally, ``settings``, ``arch`` and ``scaling``::

    rule: symmetric
    source: Kunin et al. 2020
    settings: {feedback_momentum: 0.5}   # fields that are the same in every trial: part of the study's recipe
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
learn (backprop, feedback, sign, frozen) have no file: their space is empty, and a search of it is one run. They, and
kolen-pollack, have the default space alone; what else distinguishes the spaces has no effect on them.

A normalized coefficient is a number without a unit, with the same stable range in every layer: a ``scaling`` section
goes before an ``arch`` section that names the same parameter. It names at least each primitive of its rule that sees
activity (amp, null, sparse); a rule that has none of them has no such section, for scaling does not change it.

The default spaces are dimensionless. B has its own SGD of constant rate, and amp, null and sparse see white noise of
variance σ² = 1, so that a coefficient means the same in every layer of every network: with momentum μ,

    B* = (amp · σ² / decay) · W,    time constant = (1 − μ) / (feedback_lr · decay) steps.

One coefficient is fixed at 1, the others are ratios to it, and ``feedback_lr`` is the speed. The files of the single
primitives, of which all other subsets are composed, fix ``feedback_lr`` in place of a coefficient: each coefficient is
then the speed of its own term, and their ratios are the state of rest.

The space of the rule ``any`` has no file. It is composed of the five primitives' own, and each of them is optional:
a switch ``use_amp`` says whether amp is on, and its coefficient is a parameter of those trials only in which it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from bench.config import ACTIVITY_PRIMITIVES, PRIMITIVE_NAMES, Scaling, TrialConfig, UserError, base_arch, unknown
from bench.files import read_yaml
from bench.learning.rules import ANY, RULES, Rule, parse_rule
from bench.space import PARAMETERS, SHAPES, UPDATE_FIELDS, Parameter, Space, parse_parameter
from bench.spaces import DEFAULT, SETTINGS, SPACES, SpaceRow, canonical_space, idle_settings, live, space_row

#: The scalings that a file may have a section for; of the remaining one, reference, are the ranges in ``space``.
SECTIONS = tuple(name for name in get_args(Scaling) if name != TrialConfig.scaling)


def load_space(rule: str, arch: str, folder: Path | None = None, *, space: str = DEFAULT) -> Space:
    """The search space of a rule on an architecture, from ``<rule>.yaml``; the folder is the program's own.

    ``space``: a name in `SPACES`. An unnamed subset of primitives without a file has the space that its primitives'
    files compose; so has the rule ``any``, with each of them optional. UserError if the file is missing or wrong in any
    of its sections, or has no ranges for this scaling: one line that names file, place and remedy.
    """
    row = space_row(space)
    folder = space_folder() if folder is None else folder
    if not folder.is_dir():
        raise UserError(f"there is no folder of search spaces at {folder}; name the folder that holds <rule>.yaml.")
    if rule == ANY:
        if (path := folder / row.folder / f"{ANY}.yaml").exists():
            raise UserError(f"{path} would not be read: rule {ANY!r} is its primitives' files; remove it.")
        return replace(_compose(PRIMITIVE_NAMES, arch, folder, row, "make them agree"), optional=PRIMITIVE_NAMES)
    found = parse_rule(rule)
    row = SPACES[canonical_space(found.name, space)]
    files = folder / row.folder
    _refuse_other_spelling(found, files)
    if (path := files / f"{found.name}.yaml").exists():
        return _read(path, found, arch, row)
    if not found.learns:
        return Space()
    if found.name in RULES:
        raise UserError(f"rule {found.name!r} has no search space: write {path}.")
    return _compose(found.primitives, arch, folder, row, f"write {path}")


def space_folder() -> Path:
    """``search_spaces``: inside the package when it was installed, beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "search_spaces"
    return installed if installed.is_dir() else package.parent / "search_spaces"


def space_names(space: str = DEFAULT) -> tuple[str, ...]:
    """The rules that have a file of their own in this space."""
    return tuple(sorted(path.stem for path in (space_folder() / space_row(space).folder).glob("*.yaml")))


def _compose(primitives: tuple[str, ...], arch: str, folder: Path, row: SpaceRow, remedy: str) -> Space:
    """The union of the primitives' spaces."""
    params: dict[str, Parameter] = {}
    settings: dict[str, Any] = {}
    for primitive in primitives:
        part = load_space(primitive, arch, folder, space=row.name)
        for ours, theirs in ((params, part.params), (settings, part.settings)):
            for name, value in theirs.items():
                if ours.setdefault(name, value) != value:
                    raise UserError(f"the spaces of {' and '.join(primitives)} differ in {name}; {remedy}.")
    return Space(params, settings=settings)


def _refuse_other_spelling(rule: Rule, folder: Path) -> None:
    """A file 'sparse+decay.yaml' would never be read: the canonical order is another."""
    for path in folder.glob("*+*.yaml"):
        if path.stem != rule.name and set(path.stem.split("+")) == set(rule.primitives) and not rule.task_gradient:
            raise UserError(f"{path} is not the canonical name of its rule; rename it to {rule.name}.yaml.")


def _read(path: Path, rule: Rule, arch: str, row: SpaceRow) -> Space:
    """One file, checked whole: every section, not only the one that is asked for."""
    document = read_yaml(path)
    for key in document:
        if key not in (keys := ("rule", "source", "settings", "space", "arch", "scaling")):
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
    own = _settings(path, document.get("settings", {}), rule)
    settings = {**live(row, idle_settings(rule.name)), **own}
    for params in (base, *nets.values(), *scalings.values()):
        if both := [name for name in own if name in params]:
            raise UserError(f"{path}: settings.{both[0]} has no effect, for it has ranges here; remove one of the two.")
    scaling = settings.get("scaling", TrialConfig.scaling)
    if scaling in SECTIONS and scaling not in scalings:
        raise UserError(f"{path}: there are no ranges for scaling {scaling!r}; add a section scaling.{scaling}.")
    space = Space(
        {**base, **nets.get(arch, nets.get(base_arch(arch), {})), **scalings.get(scaling, {})}, settings=settings
    )
    try:
        for corner in space.corners():
            TrialConfig.from_dict({"rule": rule.name, **settings, **space.changes(corner)})
    except UserError as error:
        raise UserError(f"{path}: {str(error).partition(': ')[2]}") from error
    return space


def _settings(path: Path, section: Any, rule: Rule) -> dict[str, Any]:
    """What a file sets for every trial."""
    if not isinstance(section, dict):
        raise UserError(f"{path}: settings must map fields to values, not {section!r}.")
    for name in section:
        if name not in SETTINGS:
            raise UserError(f"{path}: settings: {unknown('field', str(name), SETTINGS)}")
        if name in idle_settings(rule.name):
            raise UserError(f"{path}: settings.{name} has no effect on rule {rule.name!r}; remove it.")
    return section


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
        raise UserError(f"{path}: scaling.{name} lacks {', '.join(missing)}; add {SHAPES}.")


def _section(path: Path, where: str, section: Any, rule: Rule) -> dict[str, Parameter]:
    """The parameters of one section; each must be one that this rule has, with a source and legal values."""
    if not isinstance(section, dict):
        raise UserError(f"{path}: {where} must map parameters to {SHAPES}, not {section!r}.")
    primitives = () if rule.task_gradient or not rule.learns else rule.primitives
    fields = [name for name in UPDATE_FIELDS if name == "lr" or (rule.learns and name not in idle_settings(rule.name))]
    allowed = (*primitives, *fields)
    params: dict[str, Parameter] = {}
    for name, entry in section.items():
        if name in PARAMETERS and name not in allowed:
            raise UserError(f"{path}: {where}.{name} has no effect on rule {rule.name!r}; remove it.")
        params[name] = parse_parameter(f"{path}: {where}.{name}", name, entry)
        if not params[name].source.strip():
            raise UserError(f"{path}: {where}.{name} needs a source: one line on where it comes from.")
    return params


def _check_complete(path: Path, params: Mapping[str, Parameter], rule: Rule) -> None:
    """Every primitive of the rule has a coefficient; kolen-pollack's is the recipe's weight decay."""
    needed = rule.primitives if rule.learns and not rule.task_gradient else ()
    if missing := [name for name in needed if name not in params]:
        raise UserError(f"{path}: space lacks {', '.join(missing)}; add {SHAPES}.")
