"""The rule `any`: which primitives are on is searched too, and a coefficient belongs to the trials that it is on in."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.samplers import TPESampler
from optuna.trial import TrialState, create_trial

from bench.choices import SAMPLERS, check_choices, make_sampler
from bench.config import ACTIVITY_PRIMITIVES, PRIMITIVE_NAMES, StudyConfig, TrialConfig, TrialResult, UserError
from bench.learning.rules import ANY, parse_rule, subsets
from bench.proposals import Proposal, propose
from bench.space import Choices, Fixed, Range, Space
from bench.space_files import load_space
from bench.spaces import SPACES
from bench.study import Study

CHANCE = 0.1
SPACE = load_space(ANY, "resnet18", space="normalized")
CONDITIONAL = sorted(name for name, row in SAMPLERS.items() if row.conditional)


def config(**changes: Any) -> StudyConfig:
    values = {"name": "s", "rule": ANY, "arch": "resnet18", "dataset": "digits", "trials": 60, "epochs": 3}
    return StudyConfig.from_dict({**values, "sampler": "tpe", "scheduler": "none", **changes})


def opened(folder: Path, space: Space = SPACE, **changes: Any) -> Study:
    conditions = space.conditions()
    return Study.open(folder, config(**changes), space.distributions(), say=print, chance=CHANCE, conditions=conditions)


def asked(study: Study) -> Proposal:
    proposal = study.ask()
    assert proposal is not None
    return proposal


def on(params: dict[str, Any]) -> set[str]:
    return {name for name in PRIMITIVE_NAMES if params[f"use_{name}"]}


def score(params: dict[str, Any]) -> float:
    """Best, 0.9, with amp and sparse alone, and as large as each other; every other primitive costs."""
    there = on(params)
    value = 0.4 + 0.2 * len(there & {"amp", "sparse"}) - 0.1 * len(there - {"amp", "sparse"})
    if {"amp", "sparse"} <= there:
        value += 0.1 - 0.1 * abs(math.log10(params["amp"] / params["sparse"]))
    return max(CHANCE, value)


def tell(study: Study, proposal: Proposal, status: Any = "finished") -> None:
    metrics = {"val_acc": score(proposal.params), "val_area": 1 - score(proposal.params)}
    study.tell(proposal.uid, TrialResult(config=TrialConfig(rule="amp"), status=status, metrics=metrics))


# --- the space -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(set(SPACES) - {"adam"}))
@pytest.mark.parametrize("arch", ["resnet18", "lenet"])
def test_it_is_the_primitives_own_spaces_each_optional(arch: str, kind: str) -> None:
    space = load_space(ANY, arch, space=kind)
    own = {name: load_space(name, arch, space=kind).params[name] for name in PRIMITIVE_NAMES}
    assert space.params == own
    assert space.optional == PRIMITIVE_NAMES
    assert space.conditions() == {name: f"use_{name}" for name in PRIMITIVE_NAMES}
    assert space.searched == (*space.conditions().values(), *PRIMITIVE_NAMES)
    assert list(space.distributions()) == list(space.searched)
    assert space.distributions()["use_amp"] == CategoricalDistribution([False, True])


def test_an_ordinary_space_has_no_conditions_and_is_written_as_ever() -> None:
    space = load_space("sparse", "resnet18", space="reference")
    assert space.conditions() == {}
    assert space.to_dict() == {"sparse": {"min": 1e-7, "max": 1e-2, "scale": "log"}}


def test_the_changes_are_the_rule_and_the_coefficients_that_are_on() -> None:
    off = {f"use_{name}": False for name in PRIMITIVE_NAMES}
    assert SPACE.changes(off) == {"rule": "feedback"}
    mirror = SPACE.changes({**off, "use_amp": True, "use_decay": True, "amp": 2.0, "decay": 0.5})
    assert mirror == {"rule": "mirror", "coefficients": {"decay": 0.5, "amp": 2.0}}
    assert SPACE.changes({**off, "use_null": True, "null": 3.0}) == {"rule": "null", "coefficients": {"null": 3.0}}


def test_what_is_not_optional_is_always_there() -> None:
    parts = {"decay": Fixed(value=0.5), "amp": Fixed(value=2), "feedback_every": Choices(choices=(1, 2))}
    space = Space({**parts, "sparse": Range(min=1, max=2, scale="linear")}, optional=("sparse", "amp"))
    assert space.optional == ("amp", "sparse")
    assert space.searched == ("use_amp", "use_sparse", "sparse", "feedback_every")
    assert space.conditions() == {"sparse": "use_sparse"}
    none = {"use_amp": False, "use_sparse": False, "feedback_every": 2}
    assert space.changes(none) == {"rule": "decay", "coefficients": {"decay": 0.5}, "feedback_every": 2}
    both = space.changes({"use_amp": True, "use_sparse": True, "sparse": 1.5, "feedback_every": 1})
    assert both["coefficients"] == {"decay": 0.5, "amp": 2.0, "sparse": 1.5}
    assert both["rule"] == "decay+amp+sparse"


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({}, "give each of its parameters one value"),
        ({"use_amp": True}, "searches use_amp, use_sparse, amp, sparse, not use_amp;"),
        ({"use_amp": True, "use_sparse": False}, "searches use_amp, use_sparse, amp, not use_amp, use_sparse;"),
        ({"use_amp": True, "use_sparse": False, "amp": 1, "sparse": 1}, "searches use_amp, use_sparse, amp, not"),
        ({"use_amp": False, "use_sparse": False, "amp": 1}, "searches use_amp, use_sparse, not"),
        ({"use_amp": 1, "use_sparse": False, "amp": 1}, "a switch: true or false"),
    ],
)
def test_parameters_that_do_not_fit_their_switches_are_refused(params: dict[str, Any], words: str) -> None:
    both = {name: SPACE.params[name] for name in ("amp", "sparse")}
    with pytest.raises(UserError) as raised:
        Space(both, optional=("amp", "sparse")).changes(params)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_it_survives_json_and_a_study() -> None:
    plain = json.loads(json.dumps(SPACE.to_dict()))
    assert Space.from_dict(StudyConfig.from_dict(config(space=plain).to_dict()).space) == SPACE
    assert Space.from_dict({**plain, "amp": {"value": 1.0}}).optional == ("decay", "null", "sparse", "self")
    with pytest.raises(UserError, match="unknown key of Range 'optional'"):
        Space.from_dict({"amp": {**plain["amp"], "optional": "yes"}})
    with pytest.raises(UserError, match="feedback_every cannot be optional"):
        Space.from_dict({"feedback_every": {"value": 1, "optional": True}})


def test_every_corner_is_a_configuration() -> None:
    corners = [SPACE.changes(params) for params in SPACE.corners()]
    assert [c["rule"] for c in corners] == ["decay+amp+null+sparse+self"] * 2 + list(PRIMITIVE_NAMES)
    assert corners[0]["coefficients"] == {name: SPACE.params[name].values()[0] for name in PRIMITIVE_NAMES}
    assert corners[1]["coefficients"] == {name: SPACE.params[name].values()[-1] for name in PRIMITIVE_NAMES}
    for changes in corners:
        assert TrialConfig.from_dict(changes).rule == parse_rule(changes["rule"]).name


def test_a_file_of_its_own_would_be_passed_over(tmp_path: Path) -> None:
    (tmp_path / "any.yaml").write_text("rule: any")
    with pytest.raises(UserError, match=r"any\.yaml would not be read.*remove it"):
        load_space(ANY, "resnet18", tmp_path)
    (tmp_path / "any.yaml").unlink()
    with pytest.raises(UserError, match=r"rule 'decay' has no search space: write .*decay\.yaml"):
        load_space(ANY, "resnet18", tmp_path)


# --- what is proposed ------------------------------------------------------------------------------------


def test_every_subset_can_be_proposed_and_the_empty_one_is_feedback_alignment() -> None:
    distributions, conditions = SPACE.distributions(), SPACE.conditions()
    found = [
        SPACE.changes(propose(config(seed=seed), distributions, conditions, [], chance=CHANCE)[0])
        for seed in range(250)
    ]
    assert {changes["rule"] for changes in found} == {rule.name for rule in subsets()} | {"feedback"}
    for changes in found:
        rule = parse_rule(changes["rule"])
        assert set(changes.get("coefficients", {})) == set(rule.primitives)


@pytest.mark.parametrize("sampler", CONDITIONAL)
def test_a_trial_keeps_the_coefficients_that_are_on_and_no_others(tmp_path: Path, sampler: str) -> None:
    with opened(tmp_path, sampler=sampler) as study:
        for number in range(20):
            proposal = asked(study)
            assert {name for name in proposal.params if name in PRIMITIVE_NAMES} == on(proposal.params)
            tell(study, proposal, ("finished", "diverged", "failed")[number % 3])
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "journal.log"))
    kept = optuna.load_study(study_name="s", storage=optuna.storages.JournalStorage(backend)).trials
    assert len({len(t.params) for t in kept}) > 2
    for trial in kept:
        assert trial.distributions == {name: SPACE.distributions()[name] for name in trial.params}


@pytest.mark.parametrize("sampler", CONDITIONAL)
@pytest.mark.parametrize("objective", ["accuracy", "both"])
def test_a_search_killed_with_trials_under_way_proposes_what_an_unharmed_one_does(
    tmp_path: Path, sampler: str, objective: str
) -> None:
    def search(folder: Path, killed: bool) -> list[dict[str, Any]]:
        settings = {"sampler": sampler, "objective": objective, "trials": 20, "epochs": 9}
        settings |= {"scheduler": "asha"} if objective == "accuracy" else {}
        done: list[dict[str, Any]] = []
        study = opened(folder, **settings)
        while study.counts().remaining:
            pair = [asked(study), asked(study)]
            if killed:
                study.close()
                study = opened(folder, **settings)
                assert [asked(study), asked(study)] == pair
            for proposal in pair[::-1]:
                stopped = study.report(proposal.uid, 3, score(proposal.params))
                tell(study, proposal, "stopped" if stopped else "diverged" if len(done) == 4 else "finished")
            done += [p.params for p in pair]
        assert (study.counts().stopped > 0) == (objective == "accuracy")
        study.close()
        return done

    assert search(tmp_path / "a", killed=False) == search(tmp_path / "b", killed=True)


@functools.cache
def searched(sampler: str, seed: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder, opened(Path(folder), sampler=sampler, seed=seed) as study:
        found = []
        while (proposal := study.ask()) is not None:
            tell(study, proposal)
            found.append(proposal.params)
        return found


def test_tpe_learns_which_primitives_and_how_much_of_them() -> None:
    def right(trials: list[dict[str, Any]]) -> int:
        return sum(on(params) == {"amp", "sparse"} for params in trials)

    seeds = range(2)
    tpe, chance = [searched("tpe", s) for s in seeds], [searched("random", s) for s in seeds]
    early, late = sum(right(t[:20]) for t in tpe), sum(right(t[-20:]) for t in tpe)
    assert late >= max(15, 2 * early)  # of 40; one of the 32 subsets is right
    assert sum(right(t[-20:]) for t in chance) <= 4
    assert sum(max(map(score, t)) for t in tpe) > sum(max(map(score, t)) for t in chance)
    mean = [sum(map(score, t[-20:])) / 20 for t in tpe]
    assert min(mean) > 0.6


def test_no_coefficient_is_left_to_independent_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without groups it would be, and releases of Optuna before 5 say so for each."""
    distributions, conditions = SPACE.distributions(), SPACE.conditions()
    trials = []
    for seed in range(20):
        params, _ = propose(config(seed=seed), distributions, conditions, [], chance=CHANCE)
        own = {name: distributions[name] for name in params}
        trials.append(create_trial(params=params, distributions=own, value=score(params)))
    assert set().union(*(t.params for t in trials)) == set(distributions)

    def independent(*_: Any) -> None:
        raise AssertionError("sampled independently")

    monkeypatch.setattr(TPESampler, "sample_independent", independent)
    found = [propose(config(seed=s), distributions, conditions, trials, chance=CHANCE)[0] for s in range(5)]
    assert any(on(params) for params in found)


def test_a_proposal_does_not_depend_on_the_order_of_sets() -> None:
    """Optuna groups parameters by sets of their names, whose order differs from process to process."""
    code = "import json; from tests.test_any import searched; print(json.dumps(searched('tpe', 0)[:25]))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == searched("tpe", 0)[:25]


def test_where_nothing_is_conditional_groups_change_nothing() -> None:
    """Or the studies of releases without them would go on otherwise than they began."""
    space = {
        "b": FloatDistribution(1e-4, 10.0, log=True),
        "a": FloatDistribution(0, 1),
        "fixed": FloatDistribution(1, 1),
    }
    space["c"] = CategoricalDistribution([1, 2, 4])
    states = [TrialState.COMPLETE] * 12 + [TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING]
    draw = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trials = []
    for number, state in enumerate(states):
        value = number % 7 / 7 if state in (TrialState.COMPLETE, TrialState.PRUNED) else None
        params = draw.ask(space).params
        trials.append(create_trial(state=state, value=value, params=params, distributions=space))

    def proposed(sampler: optuna.samplers.BaseSampler) -> dict[str, Any]:
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.add_trials(trials)
        return dict(study.ask(space).params)

    for seed in range(5):
        plain = TPESampler(seed=seed, n_startup_trials=10, multivariate=True, constant_liar=True)
        assert proposed(make_sampler("tpe", seed, 40)) == proposed(plain)


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - set(CONDITIONAL)))
def test_a_sampler_that_learns_nothing_about_conditions_is_refused(tmp_path: Path, sampler: str) -> None:
    with pytest.raises(UserError) as raised:
        opened(tmp_path / "s", sampler=sampler)
    assert f"the sampler '{sampler}' learns nothing about those: use --sampler tpe or random." in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "s").exists()
    check_choices(config(rule="activation", sampler=sampler))


@pytest.mark.parametrize("sampler", ["gp", "cmaes"])
def test_optuna_itself_draws_what_is_conditional_at_random(sampler: str) -> None:
    """If a release of it learns to do better, `conditional` can be set."""
    x = FloatDistribution(0, 1)
    switch = CategoricalDistribution([False, True])

    def proposed(good: float) -> float:
        study = optuna.create_study(direction="maximize", sampler=SAMPLERS[sampler].make(0, 1))
        for value in (0.1, 0.3, 0.5, 0.7, 0.9):
            params = {"use_x": True, "y": value, "x": value}
            distributions = {"use_x": switch, "y": x, "x": x}
            study.add_trial(create_trial(params=params, distributions=distributions, value=-abs(value - good)))
        off = {"use_x": False, "y": 0.5}
        study.add_trial(create_trial(params=off, distributions={"use_x": switch, "y": x}, value=-1))
        return float(study.ask({"use_x": switch, "y": x}).suggest_float("x", 0, 1))

    assert proposed(0.1) == proposed(0.9)


def test_a_study_goes_on_with_its_own_conditions_only(tmp_path: Path) -> None:
    opened(tmp_path).close()
    with pytest.raises(UserError, match=r"conditions was .*'amp': 'use_amp'.*, is now \{\}"):
        Study.open(tmp_path, config(), SPACE.distributions(), say=print, chance=CHANCE)
    opened(tmp_path).close()


def test_a_study_of_a_release_without_conditions_has_none(tmp_path: Path) -> None:
    Study.open(tmp_path, config(), SPACE.distributions(), say=print, chance=CHANCE).close()
    journal = tmp_path / "journal.log"
    whole = journal.read_text()
    journal.write_text(whole.replace(',"conditions":{}', ""))
    assert journal.read_text() != whole
    with pytest.raises(UserError, match=r"conditions was \{\}, is now"):
        opened(tmp_path)
    Study.open(tmp_path, config(), SPACE.distributions(), say=print, chance=CHANCE).close()


def test_only_the_activity_primitives_have_other_ranges_when_normalized() -> None:
    reference = load_space(ANY, "resnet18", space="reference")
    differ = [name for name in PRIMITIVE_NAMES if reference.params[name] != SPACE.params[name]]
    assert differ == list(ACTIVITY_PRIMITIVES)
