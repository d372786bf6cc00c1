"""What a sampler is shown of a study with many trials, and that a proposal depends on nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from bench.choices import SAMPLERS
from bench.config import StudyConfig
from bench.proposals import fits, middle, propose, shown

SPACE = {"amp": FloatDistribution(0.0, 1.0), "null": FloatDistribution(0.0, 1.0)}


def trial(number: int, value: float, state: TrialState = TrialState.COMPLETE) -> FrozenTrial:
    params = {"amp": (number * 0.37) % 1, "null": (number * 0.73) % 1}
    done = {"value": value} if state == TrialState.COMPLETE else {}
    made = create_trial(state=state, params=params, distributions=SPACE, intermediate_values={1: value}, **done)
    made.number = number
    return made


def study(sampler: str) -> StudyConfig:
    return StudyConfig(
        name="s", rule="amp+null", arch="lenet", dataset="digits", trials=20, sampler=sampler, scheduler="none"
    )


def test_shown_are_the_newest_the_running_and_the_best() -> None:
    trials = [trial(i, value=(i * 7919) % 100 / 100) for i in range(100)]
    trials[3] = trial(3, 0.0, TrialState.RUNNING)
    trials[4] = trial(4, 0.99, TrialState.PRUNED)
    seen = shown(trials, 20)
    best = sorted((t for t in trials[:90] if t.state == TrialState.COMPLETE), key=lambda t: (-t.value, t.number))[:9]
    assert [t.number for t in seen] == sorted({3, *range(90, 100), *(t.number for t in best)})
    assert shown(trials, 100) == trials
    assert shown(trials, 0) == []
    assert len(shown(trials, 1)) == 1  # what is running is never left out
    assert shown([], 5) == []


def test_the_middle_is_on_the_scale_of_each_range_and_on_its_grid() -> None:
    ranges = {
        "log": FloatDistribution(1e-3, 1e-1, log=True),
        "linear": FloatDistribution(1.0, 4.0),
        "stepped": FloatDistribution(0.0, 1.0, step=0.2),
        "whole": IntDistribution(1, 100, log=True),
        "choice": CategoricalDistribution(["normal", "uniform"]),
    }
    found = middle(ranges)
    assert found == {"log": pytest.approx(1e-2), "linear": 2.5, "stepped": 0.4, "whole": 10, "choice": "normal"}
    assert fits(found, ranges, {})


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_the_first_trial_is_the_middle_unless_trials_are_given(sampler: str) -> None:
    config = study(sampler)
    assert propose(config, SPACE, {}, [], chance=0.1) == ({"amp": 0.5, "null": 0.5}, {})
    warm = config.replace(warm=({"amp": 0.25, "null": 1.0},), warm_from="other")
    assert propose(warm, SPACE, {}, [], chance=0.1)[0] == {"amp": 0.25, "null": 1.0}
    second = propose(config, SPACE, {}, [trial(0, 0.5)], chance=0.1)[0]
    assert second != {"amp": 0.5, "null": 0.5}


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_proposal_of_a_long_study_is_a_function_of_what_is_shown(sampler: str) -> None:
    sees = SAMPLERS[sampler].sees
    trials = [trial(i, value=(i * 7919) % 1000 / 1000) for i in range(sees + 30)]

    def proposed(past: list[FrozenTrial]) -> dict[str, Any]:
        return propose(study(sampler), SPACE, {}, past, chance=0.1)[0]

    hidden = {t.number for t in trials} - {t.number for t in shown(trials, sees)}
    changed = [trial(t.number, -1.0, TrialState.FAIL) if t.number in hidden else t for t in trials]
    assert hidden
    assert proposed(changed) == proposed(trials)
    assert set(proposed(trials)) == set(SPACE)
