"""The study against known answers, kills at any moment, and a second driver."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from bench.choices import PATIENCE, SAMPLERS, SCHEDULERS, first_rung
from bench.config import StudyConfig, TrialConfig, TrialResult, UserError
from bench.proposals import Proposal, as_completed
from bench.study import Counts, Study

CHANCE = 0.1
SPACE = {"sparse": FloatDistribution(1e-4, 10.0, log=True), "amp": FloatDistribution(0.0, 1.0)}
TRIAL = TrialConfig(rule="activation")

Open = Callable[..., Study]


def config(**changes: Any) -> StudyConfig:
    values = {"name": "s", "rule": "activation", "arch": "lenet", "dataset": "digits", "trials": 12, "epochs": 9}
    return StudyConfig.from_dict({**values, "sampler": "random", **changes})


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def open_study(tmp_path: Path, said: list[str]) -> Open:
    def opened(distributions: Any = SPACE, **changes: Any) -> Study:
        return Study.open(tmp_path / "s", config(**changes), distributions, say=said.append, chance=CHANCE)

    return opened


def result(status: Any = "finished", value: float = 0.5, reason: str | None = None) -> TrialResult:
    return TrialResult(config=TRIAL, status=status, reason=reason, metrics={"val_acc": value})


def asked(study: Study) -> Proposal:
    proposal = study.ask()
    assert proposal is not None
    return proposal


def finish(study: Study, value: float) -> Proposal:
    """One trial with a straight learning curve up to ``value``."""
    proposal = asked(study)
    for epoch in range(1, study.config.epochs + 1):
        study.report(proposal.uid, epoch, value * epoch / study.config.epochs)
    study.tell(proposal.uid, result(value=value))
    return proposal


def score(params: dict[str, Any]) -> float:
    """Best, 0.9, at sparse = 0.1 and amp = 0.3."""
    return 0.9 - 0.1 * abs(math.log10(params["sparse"]) + 1) - 0.5 * abs(params["amp"] - 0.3)


def test_every_status_is_told_as_what_it_is(open_study: Open, tmp_path: Path) -> None:
    with open_study() as study:
        uids = [asked(study).uid for _ in range(5)]
        assert uids == ["s-0000", "s-0001", "s-0002", "s-0003", "s-0004"]
        study.report(uids[1], 1, 0.3)
        study.tell(uids[0], result(value=0.7))
        study.tell(uids[1], result("stopped", 0.3))
        study.tell(uids[2], result("diverged", CHANCE, "loss is nan"))
        study.tell(uids[3], result("failed", reason="ValueError: no"))
        assert study.counts() == Counts(finished=1, stopped=1, diverged=1, failed=1, running=1, remaining=7)
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "s" / "journal.log"))
    )
    trials = optuna.load_study(study_name="s", storage=storage).trials
    assert [t.state.name for t in trials] == ["COMPLETE", "PRUNED", "COMPLETE", "FAIL", "RUNNING"]
    assert [t.value for t in trials] == [0.7, 0.3, CHANCE, None, None]
    assert trials[2].user_attrs == {"uid": "s-0002", "status": "diverged", "reason": "loss is nan"}
    assert trials[3].user_attrs["reason"] == "ValueError: no"
    assert trials[1].intermediate_values == {1: 0.3}


def test_budget_counts_what_failed_and_may_grow(open_study: Open) -> None:
    with open_study(trials=3) as study:
        finish(study, 0.5)
        study.tell(asked(study).uid, result("failed", reason="bug"))
        last = asked(study)
        assert study.ask() is None
        study.tell(last.uid, result())
        assert study.ask() is None
    with open_study(trials=4) as study:
        assert study.counts().remaining == 1
        assert asked(study).uid == "s-0003"
        assert study.ask() is None


def test_empty_space_needs_one_trial(open_study: Open) -> None:
    with open_study({}) as study:
        assert asked(study).params == {}
        assert study.ask() is None
        study.tell("s-0000", result(value=0.4))
        assert [(r.uid, r.params, r.value) for r in study.best(3)] == [("s-0000", {}, 0.4)]


def test_best_leaves_out_the_diverged_and_the_stopped_and_breaks_ties_by_number(open_study: Open) -> None:
    with open_study() as study:
        for value in (0.05, 0.6, 0.6, 0.3):
            study.tell(asked(study).uid, result(value=value))
        study.tell(asked(study).uid, result("diverged"))
        stopped = asked(study).uid
        study.report(stopped, 3, 0.99)
        study.tell(stopped, result("stopped"))
        assert [r.number for r in study.best(2)] == [1, 2]
        assert [r.value for r in study.best(9)] == [0.6, 0.6, 0.3, 0.05]


def test_interrupted_trials_are_handed_out_again_once_as_they_stand(open_study: Open, said: list[str]) -> None:
    with open_study() as study:
        finish(study, 0.5)
        left = [asked(study), asked(study)]
        study.report(left[0].uid, 1, 0.2)
    with open_study() as study:
        assert said == ["s: 2 interrupted trials go on."]
        assert study.counts().running == 2
        assert [asked(study), asked(study)] == left
        assert asked(study).uid == "s-0003"
        assert study.report(left[0].uid, 1, 0.7) is False  # reported before: the first value stands
        study.report(left[0].uid, 2, 0.3)
        study.tell(left[0].uid, result("stopped"))
        stopped = next(t for t in study._known if t.number == left[0].number)
        assert stopped.intermediate_values == {1: 0.2, 2: 0.3}


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
@pytest.mark.parametrize("scheduler", ["asha"])
def test_resumed_search_proposes_what_an_uninterrupted_one_does(tmp_path: Path, sampler: str, scheduler: str) -> None:
    def search(folder: Path, restart_every: int) -> list[dict[str, Any]]:
        done: list[dict[str, Any]] = []
        settings = config(sampler=sampler, scheduler=scheduler)
        while len(done) < settings.trials:
            with Study.open(folder, settings, SPACE, say=print, chance=CHANCE) as study:
                for _ in range(min(restart_every, settings.trials - len(done))):
                    proposal = asked(study)
                    run_to_its_end(study, proposal, score(proposal.params))
                    done.append(proposal.params)
        return done

    whole, pieces = search(tmp_path / "a", 99), search(tmp_path / "b", 3)
    assert whole == pieces
    assert len({json.dumps(p) for p in whole}) == len(whole)


def run_to_its_end(study: Study, proposal: Proposal, value: float) -> str:
    for epoch in range(1, study.config.epochs + 1):
        if study.report(proposal.uid, epoch, value * epoch / study.config.epochs):
            study.tell(proposal.uid, result("stopped"))
            return "stopped"
    study.tell(proposal.uid, result(value=value))
    return "finished"


@pytest.mark.parametrize("sampler", ["gp", "tpe", "cmaes"])
def test_samplers_come_nearer_to_the_best_than_chance_does(tmp_path: Path, sampler: str) -> None:
    def best(name: str, seed: int) -> float:
        settings = config(name=name, sampler=name, trials=24, seed=seed)
        with Study.open(tmp_path / f"{name}{seed}", settings, SPACE, say=print, chance=CHANCE) as study:
            while (proposal := study.ask()) is not None:
                run_to_its_end(study, proposal, score(proposal.params))
            return study.best(1)[0].value

    seeds = range(3)
    assert sum(best(sampler, s) for s in seeds) > sum(best("random", s) for s in seeds)


def test_categories_and_fixed_values_pass_through_every_sampler(tmp_path: Path) -> None:
    space = {
        "lr": FloatDistribution(1e-3, 1.0, log=True),
        "every": CategoricalDistribution([1, 2, 4]),
        "fixed": FloatDistribution(0.5, 0.5),
    }
    for sampler in SAMPLERS:
        settings = config(sampler=sampler, trials=10, scheduler="none")
        with Study.open(tmp_path / sampler, settings, space, say=print, chance=CHANCE) as study:
            for value in range(10):
                params = finish(study, value / 10).params
                assert params["every"] in (1, 2, 4)
                assert params["fixed"] == 0.5


def test_asha_stops_the_worse_two_thirds_but_not_before_there_is_company(open_study: Open) -> None:
    with open_study(scheduler="asha", epochs=9) as study:
        proposals = [asked(study) for _ in range(PATIENCE + 3)]
        values = [0.1 * (7 - i) for i in range(len(proposals))]  # each worse than the one before
        assert not any(study.report(p.uid, 1, v) for p, v in zip(proposals, values, strict=True))  # too early
        verdicts = [study.report(p.uid, 3, v) for p, v in zip(proposals, values, strict=True)]
        assert verdicts == [False] * PATIENCE + [True] * 3
        best = asked(study)
        assert study.report(best.uid, 3, 0.9) is False
        assert study.report(best.uid, 4, 0.0) is False  # between two rungs nobody is judged
        assert study.report(proposals[-1].uid, 4, 0.9) is True  # a verdict stands, also after a restart


@pytest.mark.parametrize(("epochs", "rung"), [(1, 1), (3, 1), (8, 3), (10, 4), (18, 6), (27, 3), (90, 10)])
def test_the_first_decision_is_never_in_the_warm_up(epochs: int, rung: int) -> None:
    assert first_rung(epochs) == rung


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_schedulers_spare_the_last_epoch_and_none_stops_nothing(open_study: Open, scheduler: str) -> None:
    with open_study(scheduler=scheduler, epochs=9, trials=40) as study:
        outcomes = []
        for number in range(20):
            proposal = asked(study)
            outcomes.append(run_to_its_end(study, proposal, 0.9 if number < 10 else 0.01 * (20 - number)))
        assert outcomes[:PATIENCE] == ["finished"] * PATIENCE
        late = asked(study)
        assert study.report(late.uid, 9, 0.0) is False
        assert ("stopped" in outcomes) == (scheduler != "none")


def test_rungs_survive_a_restart(open_study: Open) -> None:
    with open_study() as study:
        for _ in range(6):
            assert study.report(asked(study).uid, 3, 0.8) is False
    with open_study() as study:
        for _ in range(6):
            study.ask()
        assert study.report(asked(study).uid, 3, 0.2) is True


def test_one_epoch_is_never_stopped(open_study: Open) -> None:
    with open_study(epochs=1) as study:
        for value in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
            assert study.report(asked(study).uid, 1, value) is False


def test_stopped_trials_are_shown_to_the_sampler_with_an_estimate(open_study: Open) -> None:
    with open_study(scheduler="none") as study:
        for value in (0.9, 0.6, 0.3):  # at epoch 3 a third of that: 0.2, 0.1 and 0.0 above chance
            finish(study, value)
        for reached in (0.2, 0.8, 0.05):
            uid = asked(study).uid
            study.report(uid, 3, reached)
            study.tell(uid, result("stopped"))
        study.tell(asked(study).uid, result("diverged"))
        shown = as_completed(study._known, CHANCE)
    assert [t.state.name for t in shown] == ["COMPLETE"] * 7
    # What the first two had above chance grew by 4 and by 5, so 0.1 is estimated to become 0.45.
    assert [t.value for t in shown] == pytest.approx([0.9, 0.6, 0.3, CHANCE + 0.45, 0.9, CHANCE, CHANCE])


def test_nan_is_refused(open_study: Open) -> None:
    with open_study() as study:
        uid = asked(study).uid
        with pytest.raises(ValueError, match="a diverged trial ends"):
            study.report(uid, 1, math.nan)


def test_torn_last_line_is_cut_off(open_study: Open, tmp_path: Path, said: list[str]) -> None:
    with open_study() as study:
        finish(study, 0.5)
        asked(study)
    journal = tmp_path / "s" / "journal.log"
    whole = journal.read_bytes()
    for cut in (1, 20, len(whole.splitlines()[-1])):  # the kill came while the last line was being written
        journal.write_bytes(whole[:-cut])
        with open_study() as study:
            assert study.counts() == Counts(finished=1, stopped=0, diverged=0, failed=0, running=0, remaining=11)
            assert asked(study).uid == "s-0001"
    assert sum("cut off its last line" in line for line in said) == 3


def test_damage_elsewhere_is_an_error_that_says_where(open_study: Open, tmp_path: Path) -> None:
    with open_study() as study:
        finish(study, 0.5)
    journal = tmp_path / "s" / "journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2][:10] + b"\n"
    journal.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=r"journal.log: line 3 is damaged"):
        open_study()
    assert journal.read_bytes() == b"".join(lines)


def test_dead_drivers_lock_costs_nothing(open_study: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_study() as study:
        finish(study, 0.5)
    journal = tmp_path / "s" / "journal.log"
    journal.with_name("journal.log.lock").symlink_to(journal)

    def sleep(_: float) -> None:
        raise AssertionError("Optuna waits for the lock")

    monkeypatch.setattr("time.sleep", sleep)
    with open_study() as study:
        assert asked(study).uid == "s-0001"


def test_second_driver_is_refused_until_the_first_is_gone(open_study: Open) -> None:
    study = open_study()
    with pytest.raises(UserError, match=f"study 's' in .* is being run by another process .{os.getpid()} on "):
        open_study()
    study.close()
    open_study().close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 10}, "epochs was 9, is now 10"),
        ({"recipe": {"lr": 0.5}}, "recipe was {}, is now {'lr': 0.5}"),
        ({"sampler": "tpe"}, "sampler was random, is now tpe"),
        ({"name": "other"}, "holds the study 's', not 'other'"),
        ({"sampler": "grid"}, "unknown sampler 'grid'"),
        ({"scheduler": "ashes"}, "Did you mean 'asha'"),
    ],
)
def test_other_settings_are_refused(open_study: Open, changes: dict[str, Any], words: str) -> None:
    open_study().close()
    with pytest.raises(UserError) as raised:
        open_study(**changes)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    open_study(confirm_seeds=5).close()  # this may change; and nothing holds the folder any more


def test_other_ranges_are_refused(open_study: Open) -> None:
    open_study().close()
    with pytest.raises(UserError, match="distributions was"):
        open_study({**SPACE, "amp": FloatDistribution(0.0, 2.0)})


def test_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to"):
        Study.open(tmp_path / "file" / "s", config(), SPACE, say=print, chance=CHANCE)


def test_optuna_is_told_nothing_twice(open_study: Open) -> None:
    with open_study() as study:
        uid = finish(study, 0.5).uid
        with pytest.raises(optuna.exceptions.OptunaError):
            study.tell(uid, result())
        assert dataclasses.asdict(study.counts())["finished"] == 1


def test_optuna_comes_with_the_study_alone() -> None:
    code = "import sys, bench.journal, bench.director, bench.worker; print({'optuna', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
