"""Pareto fronts against obvious implementations, and studies of one objective, the other, and both."""

from __future__ import annotations

import functools
import itertools
import math
import tempfile
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution

from bench.choices import OBJECTIVES, PATIENCE, SAMPLERS, SCHEDULERS, check_choices
from bench.config import StudyConfig, TrialConfig, TrialResult, UserError
from bench.front import Point, hypervolume, pareto_front, spread
from bench.proposals import Proposal, Ranked
from bench.study import Counts, Study

CHANCE = 0.1
TRIAL = TrialConfig(rule="activation")

# --- the pure functions ----------------------------------------------------------------------------------

SIDE = 9
grid_points = st.lists(st.tuples(st.integers(0, SIDE), st.integers(0, SIDE)), max_size=12)
corners = st.tuples(st.integers(0, 3), st.integers(0, 3))


def dominates(p: Point, q: Point) -> bool:
    return p[0] >= q[0] and p[1] >= q[1] and p != q


def cells(points: list[Point], reference: Point) -> int:
    """The unit squares between the reference and some point, counted one by one."""
    squares = itertools.product(range(SIDE), repeat=2)
    return sum(any(reference[0] <= i < p[0] and reference[1] <= j < p[1] for p in points) for i, j in squares)


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([], []),
        ([(0.5, 0.5)], [0]),
        ([(1, 3), (2, 2), (3, 1)], [2, 1, 0]),
        ([(3, 3), (1, 2), (2, 1), (3, 2)], [0]),  # one dominates all
        ([(1, 3), (2, 2), (1, 3), (2, 2)], [1, 0]),  # of equals, the earlier
        ([(2, 1), (2, 3), (2, 2)], [1]),  # ties in the first value
        ([(1, 2), (3, 2), (2, 2)], [1]),  # and in the second
        ([(-1, -3), (-2, -2)], [0, 1]),
    ],
)
def test_known_fronts(points: list[Point], front: list[int]) -> None:
    assert pareto_front(points) == front


@given(grid_points)
def test_the_front_is_what_nothing_dominates(points: list[Point]) -> None:
    best = [i for i, p in enumerate(points) if not any(dominates(q, p) for q in points) and points.index(p) == i]
    assert pareto_front(points) == sorted(best, key=lambda i: -points[i][0])


def test_nan_has_no_place_in_an_order() -> None:
    with pytest.raises(ValueError, match="NaN"):
        pareto_front([(0.5, 0.5), (math.nan, 0.1)])


def test_known_hypervolumes() -> None:
    assert hypervolume([], (0, 0)) == 0
    assert hypervolume([(3, 2)], (1, 1)) == 2
    assert hypervolume([(1, 3), (2, 2), (3, 1)], (0, 0)) == 3 + 2 + 1
    assert hypervolume([(5, 1), (1, 5)], (1, 1)) == 0  # no better than the reference in one value


@given(grid_points, corners)
def test_the_hypervolume_is_the_union_of_the_rectangles(points: list[Point], reference: Point) -> None:
    assert hypervolume(points, reference) == cells(points, reference)


def test_a_known_spread() -> None:
    front = [(9, 1), (8, 4), (5, 6), (1, 9), (0, 0)]  # products 9, 32, 30, 9, and one that is dominated
    assert spread(front, 1, (0, 0)) == [1]
    # Beside (8, 4): (9, 1) adds 1, (5, 6) adds 5·2, (1, 9) adds 1·5. After (5, 6), (1, 9) adds 1·3.
    assert spread(front, 2, (0, 0)) == [1, 2]
    assert spread(front, 3, (0, 0)) == [1, 2, 3]
    assert spread(front, 99, (0, 0)) == [0, 1, 2, 3]
    assert spread(front, 0, (0, 0)) == spread([], 3, (0, 0)) == []
    assert spread([(1, 2), (2, 1), (2, 1)], 1, (0, 0)) == [1]  # equal products: the better first value, the earlier


@given(grid_points, corners, st.integers(1, 4))
def test_the_spread_grows_and_is_nearly_the_best_choice(points: list[Point], reference: Point, n: int) -> None:
    def area(places: Any) -> float:
        return hypervolume([points[i] for i in places], reference)

    front, chosen = pareto_front(points), spread(points, n, reference)
    assert len(chosen) == min(n, len(front))
    assert chosen == [i for i in front if i in chosen]
    assert set(chosen) <= set(spread(points, n + 1, reference))
    best = max(area(places) for places in itertools.combinations(front, len(chosen)))
    assert area(chosen) >= (1 - 1 / math.e) * best
    assert n > 1 or area(chosen) == best


# --- a study of two objectives ---------------------------------------------------------------------------

SPACE = {"x": FloatDistribution(-2.0, 3.0), "y": FloatDistribution(1e-3, 1.0, log=True)}
#: The area above chance of the front of `values`, x from 0 to 1: ∫ 0.4x·(0.8 − 0.2(1 − x)²) dx + 0.6·0.8.
WHOLE = 0.4 * (0.4 - 0.2 / 12) + 0.48


def values(params: dict[str, Any]) -> Point:
    """Accuracy is best at x = 0, robustness at x = 1, and both want log10(y) = −1.5."""
    x, lost = params["x"], 0.02 * abs(math.log10(params["y"]) + 1.5)
    return 0.9 - 0.2 * x**2 - lost, 0.9 - 0.2 * (x - 1) ** 2 - lost


def config(**changes: Any) -> StudyConfig:
    settings = {"name": "s", "rule": "activation", "arch": "lenet", "dataset": "digits", "trials": 16, "epochs": 3}
    return StudyConfig.from_dict({**settings, "objective": "both", "sampler": "random", "scheduler": "none", **changes})


def opened(folder: Path, **changes: Any) -> Study:
    return Study.open(folder, config(**changes), SPACE, say=print, chance=CHANCE)


def asked(study: Study) -> Proposal:
    proposal = study.ask()
    assert proposal is not None
    return proposal


def result(point: Point, status: Any = "finished") -> TrialResult:
    return TrialResult(config=TRIAL, status=status, metrics={"val_acc": point[0], "val_area": point[1]})


@functools.cache
def searched(sampler: str, seed: int) -> list[Ranked]:
    with tempfile.TemporaryDirectory() as folder, opened(Path(folder), sampler=sampler, seed=seed) as study:
        while (proposal := study.ask()) is not None:
            study.tell(proposal.uid, result(values(proposal.params)))
        return study.best(99)


@pytest.mark.parametrize(("sampler", "tolerance"), [("gp", 0.1), ("tpe", 0.3), ("random", 0.3)])
def test_the_found_front_is_the_known_one(sampler: str, tolerance: float) -> None:
    found = searched(sampler, 0)
    assert all(-tolerance <= r.params["x"] <= 1 + tolerance for r in found)
    assert [r.values for r in found] == [pytest.approx(values(r.params)) for r in found]
    assert [r.value for r in found] == sorted((r.values[0] for r in found), reverse=True)
    assert [r.values[1] for r in found] == sorted(r.values[1] for r in found)


def test_gp_comes_nearer_to_the_whole_front_than_chance_does() -> None:
    def short(sampler: str) -> float:
        areas = [hypervolume([(r.values[0], r.values[1]) for r in searched(sampler, s)], (CHANCE,) * 2) for s in (0, 1)]
        assert all(0 < area < WHOLE for area in areas)
        return sum(WHOLE - area for area in areas)

    assert short("gp") < short("random") / 4


@pytest.mark.parametrize("sampler", [s.name for s in SAMPLERS.values() if s.several])
def test_a_search_killed_with_trials_under_way_proposes_what_an_unharmed_one_does(tmp_path: Path, sampler: str) -> None:
    def search(folder: Path, killed: bool) -> list[dict[str, Any]]:
        done: list[dict[str, Any]] = []
        study = opened(folder, sampler=sampler, trials=8)
        while study.counts().remaining:
            pair = [asked(study), asked(study)]
            if killed:
                study.close()
                study = opened(folder, sampler=sampler, trials=8)
                assert [asked(study), asked(study)] == pair
            study.tell(pair[1].uid, result(values(pair[1].params), "diverged" if len(done) == 2 else "finished"))
            study.tell(pair[0].uid, result(values(pair[0].params)))
            done += [p.params for p in pair]
        study.close()
        return done

    assert search(tmp_path / "a", killed=False) == search(tmp_path / "b", killed=True)


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_trials_without_values_do_not_confuse_the_sampler(tmp_path: Path, sampler: str) -> None:
    with opened(tmp_path, sampler=sampler) as study:
        for status in ("finished", "diverged", "diverged", "stopped", "failed", "diverged", "diverged"):
            proposal = asked(study)
            study.tell(proposal.uid, result((CHANCE, CHANCE), status))  # and the others are all alike
        assert -2.0 <= asked(study).params["x"] <= 3.0
        assert study.counts() == Counts(finished=1, stopped=1, diverged=4, failed=1, running=1, remaining=8)


def test_the_best_are_the_front_without_the_diverged_and_of_equals_the_earlier(tmp_path: Path) -> None:
    with opened(tmp_path) as study:
        for point in ((0.3, 0.9), (0.7, 0.7), (0.6, 0.6), (0.7, 0.7), (0.9, 0.2)):
            study.tell(asked(study).uid, result(point))
        study.tell(asked(study).uid, result((0.99, 0.99), "diverged"))
        assert [(r.number, r.values) for r in study.best(9)] == [(4, (0.9, 0.2)), (1, (0.7, 0.7)), (0, (0.3, 0.9))]
        assert [r.number for r in study.best(1)] == [1]
        assert [r.number for r in study.best(2)] == [1, 0]  # adds 0.2·0.2 above chance; trial 4 adds 0.2·0.1
        assert study.best(1)[0].value == 0.7
        assert {t.number for t in study._study.best_trials} == {0, 1, 3, 4}  # Optuna's front has both of the equals


def test_a_diverged_trial_is_at_chance_in_both(tmp_path: Path) -> None:
    with opened(tmp_path) as study:
        study.tell(asked(study).uid, result((0.8, 0.8), "diverged"))
        assert study.best(1) == []
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "journal.log"))
    kept = optuna.load_study(study_name="s", storage=optuna.storages.JournalStorage(backend))
    assert [d.name for d in kept.directions] == ["MAXIMIZE", "MAXIMIZE"]
    assert kept.trials[0].values == [CHANCE, CHANCE]
    assert kept.trials[0].user_attrs["status"] == "diverged"


def test_reports_of_two_objectives_stop_nothing_and_leave_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as study:
        uids = [asked(study).uid for _ in range(12)]
        before = (tmp_path / "journal.log").read_bytes()
        assert not any(study.report(uid, epoch, 0.9 / (n + 1)) for n, uid in enumerate(uids) for epoch in (1, 2, 3))
        assert (tmp_path / "journal.log").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampler": "cmaes"}, "the sampler 'cmaes' takes one only: use --sampler gp or tpe or random."),
        *(({"scheduler": name}, "use --scheduler none.") for name in SCHEDULERS if name != "none"),
    ],
)
def test_what_takes_one_objective_is_refused_for_two(tmp_path: Path, changes: dict[str, str], words: str) -> None:
    with pytest.raises(UserError) as raised:
        opened(tmp_path / "s", **changes)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "s").exists()
    check_choices(config(objective="robustness", **changes))


def test_optuna_itself_refuses_what_is_refused() -> None:
    """If a release of it learns to, `several` can be set."""
    both = optuna.create_study(directions=["maximize"] * 2, sampler=SAMPLERS["cmaes"].make(0, 1))
    both.add_trial(optuna.trial.create_trial(params={"x": 0.0}, distributions={"x": SPACE["x"]}, values=[0.5, 0.5]))
    with pytest.raises(ValueError, match="multi-objective"):
        both.ask({"x": SPACE["x"]})
    both.sampler = SAMPLERS["random"].make(0, 1)
    with pytest.raises(NotImplementedError, match="multi-objective"):
        both.ask().should_prune()


def test_objectives_are_those_of_the_configuration() -> None:
    for name, row in OBJECTIVES.items():
        assert config(objective=name).objective == row.name
        assert row.metrics
        assert row.summary
    with pytest.raises(UserError, match="objective must be 'accuracy', 'robustness' or 'both'"):
        config(objective="speed")


# --- one objective or the other --------------------------------------------------------------------------


def test_robustness_is_searched_stopped_and_ranked_by_the_area(tmp_path: Path) -> None:
    with opened(tmp_path, objective="robustness", scheduler="asha", epochs=9) as study:
        for number in range(PATIENCE + 1):
            uid = asked(study).uid
            assert study.report(uid, 3, 0.1 * (9 - number)) is (number == PATIENCE)
            study.tell(uid, result((0.1 * number, 0.1 * (9 - number))))
        study.tell(asked(study).uid, result((0.99, 0.99), "diverged"))
        assert [(r.number, r.values, r.value) for r in study.best(2)] == [(0, (0.9,), 0.9), (1, (0.8,), 0.8)]
        assert study._known[-1].values == [CHANCE]


@pytest.mark.parametrize(
    ("objective", "metrics", "missing"),
    [
        ("accuracy", {"val_area": 0.5}, "val_acc"),
        ("robustness", {"val_acc": 0.5}, "val_area"),
        ("robustness", {"val_area": math.nan}, "val_area"),
        ("both", {"val_acc": 0.5}, "val_area"),
        ("both", {}, "val_acc and val_area"),
    ],
)
def test_a_finished_trial_without_its_metric_is_an_error_and_leaves_nothing(
    tmp_path: Path, objective: str, metrics: dict[str, float], missing: str
) -> None:
    with opened(tmp_path, objective=objective) as study:
        uid = asked(study).uid
        before = (tmp_path / "journal.log").read_bytes()
        with pytest.raises(ValueError, match=f"s-0000 finished without a finite {missing}, which the objective"):
            study.tell(uid, TrialResult(config=TRIAL, status="finished", metrics=metrics))
        assert (tmp_path / "journal.log").read_bytes() == before


@pytest.mark.parametrize("begun", list(OBJECTIVES))
@pytest.mark.parametrize("goes_on", list(OBJECTIVES))
def test_a_study_goes_on_with_its_own_objective_only(tmp_path: Path, begun: str, goes_on: str) -> None:
    opened(tmp_path, objective=begun).close()
    if begun == goes_on:
        opened(tmp_path, objective=goes_on).close()
        return
    with pytest.raises(UserError, match=f"other settings .objective was {begun}, is now {goes_on}.; use those"):
        opened(tmp_path, objective=goes_on)
    # Killed after its first line, a journal knows how many objectives there are, and not which.
    journal = tmp_path / "journal.log"
    journal.write_bytes(journal.read_bytes().splitlines(keepends=True)[0])
    if "both" in (begun, goes_on):
        with pytest.raises(UserError, match=f"objective was .*{begun}.*, is now {goes_on}"):
            opened(tmp_path, objective=goes_on)
    else:
        opened(tmp_path, objective=goes_on).close()


def test_a_study_of_a_release_without_objectives_is_one_of_accuracy(tmp_path: Path) -> None:
    with opened(tmp_path, objective="accuracy") as study:
        study.tell(asked(study).uid, result((0.5, 0.4)))
    journal = tmp_path / "journal.log"
    whole = journal.read_text()
    journal.write_text(whole.replace('"objective":"accuracy",', ""))
    assert journal.read_text() != whole
    for objective in ("robustness", "both"):
        with pytest.raises(UserError, match=f"objective was accuracy, is now {objective}"):
            opened(tmp_path, objective=objective)
    with opened(tmp_path, objective="accuracy") as study:
        assert study.best(1)[0].values == (0.5,)
        assert asked(study).number == 1
