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


#: By optimizer: the usual settings where nothing was measured.
_USUAL: dict[str, Recipe] = {
    "sgd": Recipe(
        source="He et al. 2016 for CIFAR (arXiv 1512.03385, section 4.2), with weight decay 5e-4 and a cosine",
        changes={},
    ),
    "adamw": Recipe(
        source="lr and betas: torch.optim.AdamW's; weight decay: Touvron et al. 2021, arXiv 2012.12877 (DeiT)",
        changes={"lr": 1e-3, "weight_decay": 0.05},
    ),
    "muon": Recipe(
        source="momentum 0.6, Nesterov: arXiv 2606.11123, for feedback alignment; lr, weight decay: KellerJordan/Muon",
        changes={"lr": 0.02, "momentum": 0.6, "weight_decay": 0.01},
    ),
}

#: By data set and optimizer.
RECIPES: dict[str, dict[str, Recipe]] = {
    "digits": {
        "sgd": Recipe(
            source="backprop's validation accuracy (README, 'The recipes'); on resnet20 0.1 and 0.2 were no worse",
            changes={"batch_size": 32, "lr": 0.02},
            archs={"resnet20": {"lr": 0.05}, "resnet56": {"lr": 0.05}},
        ),
        "adamw": Recipe(
            source="lr: chosen by backprop's validation accuracy on resnet20 (README, 'The recipes'); else as usual",
            changes={**_USUAL["adamw"].changes, "batch_size": 32, "lr": 3e-3},
        ),
        "muon": Recipe(
            source="lr: chosen by backprop's validation accuracy on resnet20 (README, 'The recipes'); else as usual",
            changes={**_USUAL["muon"].changes, "batch_size": 32},
        ),
    },
    "mnist": _USUAL,
    "fashion-mnist": _USUAL,
    "cifar10": _USUAL,
    "cifar100": _USUAL,
    "imagefolder": _USUAL,
}


def recipe_of(dataset: str, arch: str, optimizer: str = "sgd") -> dict[str, Any]:
    """The recipe's fields for a data set (``imagefolder:PATH`` too), a network and an optimizer.

    UserError for an unknown data set or optimizer. For new runs `bench.place.recipe_for` asks.
    """
    if not isinstance(dataset, str):
        raise UserError(f"dataset must be text, not {dataset!r}; see `bench list datasets`.")
    name = dataset.partition(":")[0]
    if name not in RECIPES:
        raise unknown("data set", name, [f"{n}:PATH" if n == "imagefolder" else n for n in RECIPES])
    if optimizer not in _USUAL:
        raise unknown("optimizer", str(optimizer), _USUAL)
    recipe = RECIPES[name][optimizer]
    return {**recipe.changes, **recipe.archs.get(base_arch(arch), {})}


def check_recipe(changes: dict[str, Any]) -> dict[str, Any]:
    """The fields that ``--set`` gave, if a recipe has them; UserError otherwise."""
    for name in changes:
        if name in NOT_RECIPE:
            option = "--space says it" if name in ("scaling", "centered") else "it is an option of its own, or searched"
            raise UserError(f"--set {name}: this is not part of the recipe; {option}.")
        if name not in RECIPE_FIELDS:
            raise unknown("key for --set", name, RECIPE_FIELDS)
    return changes
