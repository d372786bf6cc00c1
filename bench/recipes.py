"""The training recipes: those of backprop, per data set, on which every rule is compared (design, section 5).

A recipe is a set of TrialConfig fields. ``--set key=value`` overrides it, and is then recorded with the study.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bench.config import TrialConfig, UserError, base_arch, unknown

#: What the command line and the study say elsewhere; a recipe cannot set these.
NOT_RECIPE = (
    "rule",
    "arch",
    "dataset",
    "seed",
    "epochs",
    "coefficients",
    "feedback_lr_factor",
    "feedback_every",
    "feedback_warmup_epochs",
    "scaling",
    "centered",
    "noise_site",
    "noise_levels",
    "noise_draws",
)
RECIPE_FIELDS = tuple(name for name in TrialConfig.field_names() if name not in NOT_RECIPE)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """``changes`` to TrialConfig's defaults, ``archs`` where a network has its own (at any width), and their source."""

    source: str
    changes: dict[str, Any] = field(default_factory=dict)
    archs: dict[str, dict[str, Any]] = field(default_factory=dict)


_DEFAULT = Recipe(
    source="He et al. 2016 for CIFAR (arXiv 1512.03385, section 4.2), with weight decay 5e-4 and a cosine",
    changes={},
)

RECIPES: dict[str, Recipe] = {
    "digits": Recipe(
        source="chosen by backprop's validation accuracy on resnet18 and resnet50 (README, 'The recipes')",
        changes={"batch_size": 32, "lr": 0.02},
    ),
    "mnist": _DEFAULT,
    "fashion-mnist": _DEFAULT,
    "cifar10": _DEFAULT,
    "cifar100": _DEFAULT,
    "imagefolder": _DEFAULT,
}


def recipe_of(dataset: str, arch: str) -> dict[str, Any]:
    """The recipe's fields for a data set (``imagefolder:PATH`` too) and a network; UserError for an unknown set."""
    if not isinstance(dataset, str):
        raise UserError(f"dataset must be text, not {dataset!r}; see `bench list datasets`.")
    name = dataset.partition(":")[0]
    if name not in RECIPES:
        raise unknown("data set", name, [f"{n}:PATH" if n == "imagefolder" else n for n in RECIPES])
    return {**RECIPES[name].changes, **RECIPES[name].archs.get(base_arch(arch), {})}


def check_recipe(changes: dict[str, Any]) -> dict[str, Any]:
    """The fields that ``--set`` gave, if a recipe has them; UserError otherwise."""
    for name in changes:
        if name in NOT_RECIPE:
            option = "--space says it" if name in ("scaling", "centered") else "it is an option of its own, or searched"
            raise UserError(f"--set {name}: this is not part of the recipe; {option}.")
        if name not in RECIPE_FIELDS:
            raise unknown("key for --set", name, RECIPE_FIELDS)
    return changes
