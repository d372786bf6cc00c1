"""What a search maximises, and Optuna's ways to propose trials and to stop them: a row each."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.pruners import HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, RandomSampler, TPESampler

from bench.config import StudyConfig, UserError, unknown
from bench.learning.rules import ANY

#: No trial is stopped before this many others have come as far: of two or three, the best says nothing.
PATIENCE = 4
#: Successive halving: the best third goes on.
REDUCTION = 3


@dataclass(frozen=True, kw_only=True)
class Row:
    """A way to propose trials, ``make(seed, number of random ones)``, or to stop them, ``make(epochs)``.

    ``sees`` (of a sampler): how many trials it is shown at most: a proposal's cost does not grow with the study.
    ``several``: whether Optuna lets it be used where there is more than one objective. ``conditional`` (of a sampler):
    whether it learns from parameters that only some trials have.
    """

    name: str
    make: Callable[..., Any]
    summary: str
    source: str
    several: bool = False
    conditional: bool = False
    sees: int = 0


@dataclass(frozen=True, kw_only=True)
class ObjectiveRow:
    """What a search maximises: these metrics of a trial. Of a network that learned nothing each is at chance."""

    name: str
    metrics: tuple[str, ...]
    summary: str


#: The names are those of `bench.config.Objective`.
OBJECTIVES = {
    row.name: row
    for row in (
        ObjectiveRow(name="accuracy", metrics=("val_acc",), summary="validation accuracy, without noise"),
        ObjectiveRow(
            name="robustness", metrics=("val_area",), summary="the area under validation accuracy against noise"
        ),
        ObjectiveRow(
            name="both",
            metrics=("val_acc", "val_area"),
            summary="accuracy and robustness: the Pareto front, each as good as the other allows",
        ),
    )
}


#: The first and the last are what Optuna 5 does by default, and 4 does not. ``group``: parameters that some trials lack
#: have distributions of their own (without it, Optuna 4 complains of each). Where none is lacking there is one group,
#: and the proposals are the same as without.
_TPE = {"multivariate": True, "group": True, "constant_liar": True}


def _by_name(*rows: Row) -> dict[str, Row]:
    return {row.name: row for row in rows}


SAMPLERS = _by_name(
    Row(
        name="gp",
        make=lambda seed, startup: GPSampler(seed=seed, n_startup_trials=startup),
        summary="Gaussian process, expected improvement (of the hypervolume); best for a few dozen trials",
        source="Optuna's GPSampler; Ament et al. 2023, arXiv 2310.20708; Daulton et al. 2020, arXiv 2006.05078",
        several=True,
        sees=300,
    ),
    Row(
        name="tpe",
        make=lambda seed, startup: TPESampler(seed=seed, n_startup_trials=startup, **_TPE),
        summary="tree-structured Parzen estimator, multivariate",
        source="Optuna's TPESampler; Bergstra et al. 2011, Watanabe 2023, arXiv 2304.11127",
        several=True,
        conditional=True,
        sees=1000,
    ),
    Row(
        name="cmaes",
        make=lambda seed, startup: CmaEsSampler(seed=seed, n_startup_trials=startup),
        summary="covariance matrix adaptation; for hundreds of trials of continuous coefficients",
        source="Optuna's CmaEsSampler; Hansen 2016, arXiv 1604.00772",
        sees=1000,
    ),
    Row(
        name="random",
        make=lambda seed, startup: RandomSampler(seed=seed),  # noqa: ARG005
        summary="uniform in the search space (or in its logarithm)",
        source="Bergstra & Bengio 2012",
        several=True,
        conditional=True,
    ),
)


#: The learning rate warms up in the first epoch, and the validation accuracy after one or two is mostly noise: in a
#: search of 8 epochs on digits, five of ten trials were stopped at epoch 1 between 9 and 13 %, where chance is 10.
EARLIEST = 3


def first_rung(epochs: int) -> int:
    """The epoch of the first decision: 1/9 of the whole, with a second one at 1/3; 1/3 alone where 1/9 is too early."""
    ninth = math.ceil(epochs / REDUCTION**2)
    return ninth if ninth >= EARLIEST else math.ceil(epochs / REDUCTION)


SCHEDULERS = _by_name(
    Row(
        name="asha",
        make=lambda epochs: SuccessiveHalvingPruner(min_resource=first_rung(epochs), reduction_factor=REDUCTION),
        summary="asynchronous successive halving: after 1/9 and 1/3 of the epochs (few: 1/3) the best third goes on",
        source="Li et al. 2020, arXiv 1810.05934",
    ),
    Row(
        name="hyperband",
        make=lambda epochs: HyperbandPruner(
            min_resource=first_rung(epochs), max_resource=epochs, reduction_factor=REDUCTION
        ),
        summary="successive halving with first decisions at several epochs, in turn",
        source="Li et al. 2018, arXiv 1603.06560",
    ),
    Row(
        name="median",
        make=lambda epochs: MedianPruner(n_startup_trials=PATIENCE, n_warmup_steps=first_rung(epochs)),
        summary="stops what is worse than the median of the finished trials at the same epoch",
        source="Golovin et al. 2017, Google Vizier",
    ),
    Row(
        name="none",
        make=lambda epochs: NopPruner(),  # noqa: ARG005
        summary="every trial gets all its epochs",
        source="control",
        several=True,
    ),
)


def check_choices(config: StudyConfig) -> None:
    """UserError for a sampler or scheduler that is not in its registry, or cannot serve the study's objectives or rule.

    Optuna's GP and CMA-ES look at the parameters that every trial has, and would draw the others at random.
    """
    for what, name, rows in (("sampler", config.sampler, SAMPLERS), ("scheduler", config.scheduler, SCHEDULERS)):
        if name not in rows:
            raise unknown(what, name, rows)
        if len(OBJECTIVES[config.objective].metrics) > 1 and not rows[name].several:
            fit = " or ".join(row.name for row in rows.values() if row.several)
            raise UserError(
                f"objective {config.objective!r} is two at once, and the {what} {name!r} takes one only: "
                f"use --{what} {fit}."
            )
    if config.rule == ANY and not SAMPLERS[config.sampler].conditional:
        fit = " or ".join(row.name for row in SAMPLERS.values() if row.conditional)
        raise UserError(
            f"rule {ANY!r} has coefficients that only some trials have, and the sampler {config.sampler!r} learns "
            f"nothing about those: use --sampler {fit}."
        )


def make_sampler(name: str, seed: int, budget: int) -> BaseSampler:
    """A sampler made afresh, which draws a quarter of the budget, from 4 to 10 trials, at random first."""
    with warnings.catch_warnings():
        # Releases of Optuna before 5 call the GP, and multivariate TPE, experimental.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return SAMPLERS[name].make(seed, max(4, min(10, budget // 4)))
