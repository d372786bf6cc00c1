"""What to try next: the given trials of a warm start, or the middle of the space, and then what a sampler proposes.

A proposal is a function of the study's configuration and of those trials alone: the sampler is made afresh for the
trial's number, and sees a copy of the study in memory.
"""

from __future__ import annotations

import heapq
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from bench.choices import OBJECTIVES, SAMPLERS, make_sampler
from bench.config import StudyConfig, UserError

Distributions = Mapping[str, BaseDistribution]
#: Parameters that only some trials have, each with the switch (a parameter too) that must be true for it.
Conditions = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A trial to run."""

    uid: str
    number: int
    params: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Ranked(Proposal):
    """A trial that had its full budget, and what it reached in the study's objectives."""

    values: tuple[float, ...]

    @property
    def value(self) -> float:
        """In the first of them."""
        return self.values[0]


def propose(
    config: StudyConfig,
    distributions: Distributions,
    conditions: Conditions,
    trials: Sequence[FrozenTrial],
    *,
    chance: float,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters for the next trial, and what the sampler wants kept with it (CMA-ES: its state).

    Trial i of a warm start is ``config.warm[i]``; without one, the first trial is the `middle`, but for a space with
    switches. The sampler sees what `as_completed` makes of stopped trials (with two objectives there are none), and of
    many trials those that are `shown`. A parameter whose switch is off is no parameter of the trial: the switches are
    proposed first.
    """
    number = len(trials)
    if number < len(config.warm):
        return _settled(config.warm[number], distributions), {}
    if number == 0 and not conditions:
        return _settled(middle(distributions), distributions), {}
    seed = random.Random(f"{config.seed}:{number}").randrange(2**31)
    sampler = make_sampler(config.sampler, seed, budget(config, distributions))
    several = len(OBJECTIVES[config.objective].metrics)
    copy = optuna.create_study(directions=["maximize"] * several, sampler=sampler)
    seen = shown(trials, SAMPLERS[config.sampler].sees)
    copy.add_trials(seen if several > 1 else as_completed(seen, chance))
    trial = copy.ask({name: d for name, d in distributions.items() if name not in conditions})
    for name, switch in conditions.items():
        if trial.params[switch]:
            _suggest(trial, name, distributions[name])
    state = copy.get_trials(deepcopy=False)[len(seen)].system_attrs
    return dict(trial.params), {key: value for key, value in state.items() if key.startswith("cma:")}


def middle(distributions: Distributions) -> dict[str, Any]:
    """Compute the middle of the space: of each range, on its scale (log: √(low·high)); of choices the first.

    Whoever sets the bounds expects the best there, and a small search has nothing better to begin with.
    """
    return {name: _middle(distribution) for name, distribution in distributions.items()}


def _middle(distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]
    assert isinstance(distribution, FloatDistribution | IntDistribution), distribution
    low, high, step = distribution.low, distribution.high, distribution.step
    value = math.sqrt(low * high) if distribution.log else (low + high) / 2
    if step is not None:
        value = low + step * math.floor((value - low) / step)
    return min(max(value, low), high)  # rounding alone leads out


def shown(trials: Sequence[FrozenTrial], most: int) -> list[FrozenTrial]:
    """Of the trials at most so many, in their order: the newest half, all that are running, and the best of the rest.

    With two objectives the best are those with the greatest sum.
    """
    if len(trials) <= most or not most:
        return list(trials[:most])
    recent = {t.number for t in trials[len(trials) - most // 2 :]}
    recent |= {t.number for t in trials if t.state == TrialState.RUNNING}
    valued = [t for t in trials if t.state == TrialState.COMPLETE and t.number not in recent]
    best = heapq.nsmallest(max(0, most - len(recent)), valued, key=lambda t: (-sum(t.values), t.number))
    kept = recent | {t.number for t in best}
    return [t for t in trials if t.number in kept]


def budget(config: StudyConfig, distributions: Distributions) -> int:
    """How many trials there are to be; where there is nothing to choose, one says all."""
    return config.trials if distributions else 1


def fits(params: Mapping[str, Any], distributions: Distributions, conditions: Conditions) -> bool:
    """Whether these are the parameters of a trial of this space: the right ones, each with a value in its range."""
    return _misfit(params, distributions, conditions) is None


def check_warm(config: StudyConfig, distributions: Distributions, conditions: Conditions) -> None:
    """UserError for warm trials that lie outside the space, or that are more than the budget."""
    most = budget(config, distributions)
    if len(config.warm) > most:
        raise UserError(
            f"study {config.name!r}: {len(config.warm)} warm trials are more than its {most} trials; "
            "raise --trials, or give fewer."
        )
    for number, params in enumerate(config.warm):
        if wrong := _misfit(params, distributions, conditions):
            raise UserError(
                f"study {config.name!r}: warm trial {number} does not fit its space: {wrong}; leave it out."
            )


def _misfit(params: Mapping[str, Any], distributions: Distributions, conditions: Conditions) -> str | None:
    """What is wrong with the parameters; None if nothing is."""
    wanted = [name for name in distributions if name not in conditions or params.get(conditions[name]) is True]
    if set(params) != set(wanted):
        return f"it has {', '.join(params) or 'no parameters'}, and not {', '.join(wanted) or 'none'}"
    outside = [name for name in wanted if not _holds(distributions[name], params[name])]
    return f"{outside[0]} = {params[outside[0]]!r} is not in {_range(distributions[outside[0]])}" if outside else None


def _holds(distribution: BaseDistribution, value: Any) -> bool:
    """Optuna takes true for 1, and '1' too."""
    if isinstance(distribution, CategoricalDistribution):
        if isinstance(value, bool) != isinstance(distribution.choices[0], bool):
            return False
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        create_trial(state=TrialState.RUNNING, params={"it": value}, distributions={"it": distribution})
    except ValueError:
        return False
    return True


def _range(distribution: BaseDistribution) -> str:
    if isinstance(distribution, CategoricalDistribution):
        return f"[{', '.join(map(repr, distribution.choices))}]"
    return f"[{distribution.low:g}, {distribution.high:g}]"


def _settled(params: Mapping[str, Any], distributions: Distributions) -> dict[str, Any]:
    """The values as they will be read from the journal: 1 for a range of floats is 1.0."""
    return {n: d.to_external_repr(d.to_internal_repr(params[n])) for n, d in distributions.items() if n in params}


def _suggest(trial: Trial, name: str, distribution: BaseDistribution) -> None:
    """One parameter more, for a trial that was asked for without it."""
    if isinstance(distribution, CategoricalDistribution):
        trial.suggest_categorical(name, distribution.choices)
    elif isinstance(distribution, IntDistribution):
        trial.suggest_int(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)
    else:
        assert isinstance(distribution, FloatDistribution), distribution
        trial.suggest_float(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


def as_completed(trials: Sequence[FrozenTrial], chance: float) -> list[FrozenTrial]:
    """The trials, with an estimate in place of the result that a stopped one was not allowed to have.

    Optuna's GP and CMA-ES look at complete trials only: of a search that stops the hopeless ones they would
    see nothing but successes, and propose the same failures for ever. The estimate: what the trial had
    reached above chance by its last epoch e grows as that of the trials that went on did (the median
    factor), but not beyond the best of them. Chance remains chance.
    """
    whole = [t for t in trials if t.state == TrialState.COMPLETE and not is_diverged(t)]
    return [_estimated(t, whole, chance) if t.state == TrialState.PRUNED else t for t in trials]


def _estimated(trial: FrozenTrial, whole: Sequence[FrozenTrial], chance: float) -> FrozenTrial:
    epoch = trial.last_step
    if epoch is None:
        return trial
    then_and_now = [(t.intermediate_values.get(epoch, chance) - chance, t.value - chance) for t in whole]
    factors = [now / then for then, now in then_and_now if then > 0]
    above = max(0.0, trial.intermediate_values[epoch] - chance)
    if factors:
        above = min(above * statistics.median(factors), max(now for _, now in then_and_now))
    return create_trial(
        state=TrialState.COMPLETE,
        value=chance + above,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs=trial.user_attrs,
        system_attrs=trial.system_attrs,
        intermediate_values=trial.intermediate_values,
    )


def is_diverged(trial: FrozenTrial) -> bool:
    """Whether it ended early, at chance."""
    return bool(trial.state == TrialState.COMPLETE) and trial.user_attrs.get("status") == "diverged"
