"""The kinds of search space that there are: one row each; what a rule does not see does not distinguish them.

To add one, add a row, and files in its folder (`bench.space_files`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.config import ACTIVITY_SETTINGS, OPTIMIZER_SETTINGS, TrialConfig, unknown
from bench.learning.rules import ANY, parse_rule

if TYPE_CHECKING:
    from bench.space import Space

#: The TrialConfig fields that a file may set for every trial.
SETTINGS = (*ACTIVITY_SETTINGS, *OPTIMIZER_SETTINGS)


@dataclass(frozen=True, kw_only=True)
class SpaceRow:
    """A kind of search space. ``settings``: the TrialConfig fields by which it differs from their defaults, in every
    trial; a file's own go before them. ``folder``: of its files, inside `space_folder`."""

    name: str
    summary: str
    source: str
    folder: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


_KUNIN = "Kunin et al. 2020, arXiv 2003.01513"

#: Of spaces that are the same for a rule, it has the first (`canonical_space`).
SPACES: dict[str, SpaceRow] = {
    row.name: row
    for row in (
        SpaceRow(
            name="default",
            summary="dimensionless: white noise in place of the activations, B by its own SGD after W",
            source="Akrout et al. 2019, arXiv 1904.05391 (noise, layer by layer); the form is ours",
            settings={"feedback_input": "normal", "feedback_optimizer": "sgd"},
        ),
        SpaceRow(
            name="reference",
            summary="the paper's own form: sums over the batch's activations, B by the optimizer of W",
            source=_KUNIN,
            folder="reference",
        ),
        SpaceRow(
            name="reference-centered",
            summary="reference, of activations without their channels' means",
            source=f"{_KUNIN}; their centering is of the batch alone",
            folder="reference",
            settings={"centered": True},
        ),
        SpaceRow(
            name="normalized",
            summary="reference, divided layer by layer by the energy of what a term reads",
            source="ours; compare normalised LMS, Nagumo & Noda 1967, doi 10.1109/TAC.1967.1098599",
            folder="reference",
            settings={"scaling": "normalized"},
        ),
        SpaceRow(
            name="normalized-centered",
            summary="normalized, of activations without their channels' means",
            source="ours, as normalized",
            folder="reference",
            settings={"scaling": "normalized", "centered": True},
        ),
        SpaceRow(
            name="adam",
            summary="activations without their channels' means, B by its own Adam: ratios of coefficients and one rate",
            source="Kunin et al. 2020 have an adaptive optimizer of B, too; the form is ours",
            folder="adam",
            settings={"feedback_optimizer": "adam", "centered": True},
        ),
    )
}
DEFAULT, REFERENCE = "default", "reference"


def space_row(name: str) -> SpaceRow:
    """UserError for a name that no space has."""
    if name not in SPACES:
        raise unknown("space", name, SPACES)
    return SPACES[name]


def idle_settings(rule: str) -> tuple[str, ...]:
    """The TrialConfig fields in `SETTINGS` that have no effect on this rule; on `ANY` all may have one."""
    if rule == ANY:
        return ()
    sees = parse_rule(rule).sees_activity
    return (*(() if sees else ACTIVITY_SETTINGS), *(() if moved_by_primitives(rule) else OPTIMIZER_SETTINGS))


def canonical_space(rule: str, space: str) -> str:
    """The first of `SPACES` that is the same for this rule: what two spaces differ in may have no effect on it."""
    row = space_row(space)
    if not moved_by_primitives(rule):
        return DEFAULT
    idle = idle_settings(rule)
    return next(r.name for r in SPACES.values() if r.folder == row.folder and live(r, idle) == live(row, idle))


def space_of(config: Mapping[str, Any]) -> str:
    """The name of the space that a run with this configuration is of, by the settings that distinguish the spaces.

    Fields that it lacks are at their defaults. Where no space has these settings: the settings themselves.
    """
    idle = idle_settings(config["rule"])
    telling = [name for name in TELLING if name not in idle]
    own = {name: config.get(name, getattr(TrialConfig, name)) for name in telling}
    changed = {name: value for name, value in own.items() if value != getattr(TrialConfig, name)}
    found = (row.name for row in SPACES.values() if live(row, idle) == changed)
    return next(found, ", ".join(f"{name} {value}" for name, value in changed.items()))


def space_changes(space: Space, rule: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """What a search in this space changes in the data set's recipe: the space's settings, and what the user changed.

    Of the latter, those that have no effect on the rule are left out.
    """
    idle = idle_settings(rule)
    return {**space.settings, **{name: value for name, value in changes.items() if name not in idle}}


def moved_by_primitives(rule: str) -> bool:
    """Whether B is moved by primitives alone, so that it can have an optimizer of its own."""
    return rule == ANY or (parse_rule(rule).learns and not parse_rule(rule).task_gradient)


def live(row: SpaceRow, idle: Collection[str]) -> dict[str, Any]:
    """The settings of a kind of space that have an effect."""
    return {name: value for name, value in row.settings.items() if name not in idle}


#: The fields by which a configuration tells its space.
TELLING = tuple(dict.fromkeys(name for row in SPACES.values() for name in row.settings))
