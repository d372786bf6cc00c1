"""Verdicts on curves whose truth is known: by hand, and by how often the interval holds it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from bench.config import UserError
from bench.robustness_summary import Point, summarize
from bench.robustness_words import (
    SEVERAL,
    curve_columns,
    curve_rows,
    draws_line,
    table_columns,
    table_rows,
    verdict_lines,
)

LEVELS = (0.1, 0.2, 0.4)
CHANCE = 0.1


def network(
    rule: str, seed: int, clean: float | None, *accuracies: float | None, site: str = "update", **more: Any
) -> list[Point]:
    """One curve; None is a run that failed."""
    return [
        Point(
            site=site, rule=rule, seed=seed, level=s, accuracy=a, **({"status": "failed"} if a is None else {}), **more
        )
        for s, a in zip((0.0, *LEVELS), (clean, *accuracies), strict=True)
    ]


def flat(rule: str, areas: Iterable[float], clean: float = 0.9, **more: Any) -> list[Point]:
    """One curve per seed with this area, the same at every level."""
    return [p for seed, a in enumerate(areas) for p in network(rule, seed, clean, a, a, a, **more)]


def summary(points: Iterable[Point], **more: Any) -> dict[str, Any]:
    found = summarize(points, chance=CHANCE, tested=10_000, **more)
    json.dumps(found, allow_nan=False)  # JSON-ready, always
    return found


def of(found: dict[str, Any], rule: str, site: int = 0) -> dict[str, Any]:
    return next(entry for entry in found["sites"][site]["rules"] if entry["rule"] == rule)


# --- numbers ---------------------------------------------------------------------------------------------


def test_one_curve_by_hand() -> None:
    """Two octaves, means 0.8 and 0.4; 0.5 of 0.8 above chance are left; 0.5 is crossed a third into the second."""
    found = of(summary(network("backprop", 7, 0.9, 0.9, 0.7, 0.1, se=0.01, draws=5)), "backprop")
    assert found["area"] == {"mean": pytest.approx(0.6), "sd": None, "n": 1, "low": None, "high": None}
    assert found["relative_area"]["mean"] == pytest.approx(0.5 / 0.8)
    assert found["half_level"]["mean"] == pytest.approx(0.2 * 2 ** (1 / 3))
    assert (found["half_level"]["low"], found["half_level"]["beyond"]) == (None, 0)
    assert [(at["level"], at["n"], at["acc"]["mean"], at["draws"]) for at in found["curve"]] == [
        (0.1, 1, 0.9, 5),
        (0.2, 1, 0.7, 5),
        (0.4, 1, 0.1, 5),
    ]
    assert (found["seeds"], found["verdict"], found["relative_area_versus"]) == ([7], None, None)


def test_differences_are_of_relative_areas_and_paired_by_seed() -> None:
    """0.66 and 0.71 against 0.50 and 0.54, each divided by the 0.8 above chance; t(1) = 12.7062."""
    points = flat("backprop", (0.50, 0.54, 0.30)) + flat("mirror", (0.66, 0.71))
    versus = of(summary(points), "mirror")["relative_area_versus"]
    assert (versus["n"], versus["mean"]) == (2, pytest.approx((0.16 + 0.17) / 2 / 0.8))
    assert versus["high"] - versus["mean"] == pytest.approx(12.7062 * (0.01 / 0.8 / 2**0.5) / 2**0.5, rel=1e-4)
    assert of(summary(points), "mirror")["area_versus"]["mean"] == pytest.approx(0.165)
    assert of(summary(points), "mirror")["curve"][1]["versus"]["mean"] == pytest.approx(0.165)
    assert of(summary(points), "mirror")["clean_versus"]["mean"] == 0


def test_the_standard_error_of_draws_is_pooled() -> None:
    points = network("backprop", 1, 0.9, 0.5, 0.5, 0.5, se=0.03) + network("backprop", 2, 0.9, 0.5, 0.5, 0.5, se=0.04)
    at = of(summary(points), "backprop")["curve"][0]
    assert at["draw_se"] == pytest.approx((0.0009 / 2 + 0.0016 / 2) ** 0.5)
    assert of(summary(flat("backprop", (0.5,))), "backprop")["curve"][0]["draw_se"] is None


def test_half_levels_are_averaged_as_logarithms() -> None:
    """0.1·√2 and 0.2·√2 (half an octave behind a level): the geometric mean is 0.2, n = 2, t(1) = 12.7062."""
    points = network("backprop", 1, 0.9, 0.9, 0.1, 0.1) + network("backprop", 2, 0.9, 0.9, 0.9, 0.1)
    found = of(summary(points), "backprop")["half_level"]
    assert (found["scale"], found["n"], found["mean"]) == ("log", 2, pytest.approx(0.2))
    assert math.log2(found["high"] / found["mean"]) == pytest.approx(12.7062 * 0.5**0.5 / 2**0.5, rel=1e-4)
    assert found["low"] * found["high"] == pytest.approx(0.2**2)


@pytest.mark.parametrize(("held", "median"), [(1, 0.2 * 2**0.5), (2, None)])
def test_a_censored_half_level_has_no_mean(held: int, median: float | None) -> None:
    """Of three networks, one or two still stand at the last level."""
    points = [p for s in range(3) for p in network("backprop", s, 0.9, 0.9, 0.9, 0.8 if s < held else 0.1)]
    found = of(summary(points), "backprop")["half_level"]
    assert (found["mean"], found["low"], found["high"], found["n"], found["beyond"]) == (None, None, None, 3, held)
    assert found["median"] == (None if median is None else pytest.approx(median))
    cell = table_rows(summary(points)["sites"][0])[0][4]
    assert cell == ("median 0.283 (1 of 3 beyond 0.4)" if held == 1 else "median > 0.4 (2 of 3 beyond 0.4)")


def test_seeds_at_chance_have_no_half_level_and_leave_the_others_no_interval() -> None:
    points = flat("backprop", (0.1, 0.1)) + network("backprop", 2, 0.101, 0.1, 0.1, 0.1)
    found = of(summary(points), "backprop")
    assert (found["half_level"]["n"], found["at_chance"], found["relative_area"]["n"]) == (2, 1, 2)
    assert (found["half_level"]["mean"], found["half_level"]["median"]) == (None, pytest.approx(0.05))
    assert table_rows(summary(points)["sites"][0])[0][4:6] == ("median 0.05", "3, 1 at chance")


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ((0.8, 0.1), "median > 0.336 (1 of 2 beyond 0.4)"),  # √(0.2·√2 · 0.4), not 0.4
        ((0.8, 0.8, 0.1, 0.1), "median > 0.336 (2 of 4 beyond 0.4)"),
        ((0.8, 0.8, 0.8, 0.1), "median > 0.4 (3 of 4 beyond 0.4)"),
        ((0.8, 0.1, 0.1, 0.1), "median 0.283 (1 of 4 beyond 0.4)"),
        ((0.8, 0.8), "> 0.4"),
    ],
)
def test_a_median_half_beyond_the_grid_is_above_what_is_known(last: tuple[float, ...], said: str) -> None:
    points = [p for seed, a in enumerate(last) for p in network("backprop", seed, 0.9, 0.9, 0.9, a)]
    assert table_rows(summary(points)["sites"][0])[0][4] == said


def test_under_attack_the_same_share_lost_is_the_same_relative_area() -> None:
    """0.5, 0.1 and 0 of a clean accuracy of 0.95 or 0.45."""
    points = [
        p for r, c in (("backprop", 0.95), ("sign", 0.45)) for p in network(r, 1, c, c / 2, c / 10, 0, site="pgd")
    ]
    found = summary(points, floor=0.0)
    for rule in ("backprop", "sign"):
        assert of(found, rule)["relative_area"]["mean"] == pytest.approx((0.3 + 0.05) / 2)
        assert of(found, rule)["half_level"]["mean"] == pytest.approx(0.1)
    assert found["sites"][0]["floor"] == 0
    assert summary(flat("sign", (0.5,)))["sites"][0]["floor"] == CHANCE


def test_the_draws_and_their_error_are_said() -> None:
    points = network("backprop", 1, 0.9, 0.5, 0.5, 0.5, se=0.003, draws=5)
    points += network("sign", 1, 0.9, 0.5, 0.5, 0.5, se=0.0042, draws=5)
    points += network("sign", 2, 0.9, None, None, None)  # not evaluated: of one draw, with no error
    for p in flat("sign", (0.5,)):
        points.append(Point(site="update", rule="sign", seed=3, level=p.level, accuracy=None, status="diverged"))
    (site,) = summary(points)["sites"]
    said = "averaged over 5 draws a network; their standard error is at most 0.42 points (root mean square over seeds)"
    assert draws_line(site) == said
    assert draws_line(summary(flat("sign", (0.5,)))["sites"][0]) is None
    mixed = summary(flat("sign", (0.5,), draws=5) + flat("backprop", (0.5,), draws=3))["sites"][0]
    assert draws_line(mixed) == "averaged over 3 to 5 draws a network"


# --- what is missing -------------------------------------------------------------------------------------


def test_a_diverged_run_stands_at_chance_and_is_counted() -> None:
    """Whatever accuracy it says, or none."""
    points = flat("backprop", (0.5,))
    for seed, said in enumerate((None, 0.7)):
        points += network("mirror", seed, 0.9, 0.9, 0.9, 0.9)[:3]
        points.append(Point(site="update", rule="mirror", seed=seed, level=0.4, accuracy=said, status="diverged"))
    found = of(summary(points), "mirror")
    assert (found["diverged"], found["failed"], found["incomplete"]) == (2, 0, 0)
    assert [at["diverged"] for at in found["curve"]] == [0, 0, 2]
    assert found["curve"][2]["acc"]["mean"] == CHANCE
    assert found["area"]["mean"] == pytest.approx((0.9 + 0.5) / 2)


def test_a_failed_run_leaves_its_seed_out_of_the_areas_and_is_counted() -> None:
    points = flat("backprop", (0.5, 0.5, 0.5)) + flat("mirror", (0.6, 0.6)) + network("mirror", 2, 0.9, 0.2, None, 0.2)
    found = of(summary(points), "mirror")
    assert (found["seeds"], found["failed"], found["incomplete"]) == ([0, 1, 2], 1, 1)
    assert (found["area"]["n"], found["area"]["mean"]) == (2, pytest.approx(0.6))
    assert [(at["n"], at["failed"]) for at in found["curve"]] == [(3, 0), (2, 1), (3, 0)]
    assert found["relative_area_versus"]["n"] == 2
    cells = table_rows(summary(points)["sites"][0])[1]
    assert cells[5] == "2, 1 failed"
    assert cells[6].endswith("(n 2)")


@pytest.mark.parametrize("level", [0.0, 0.2])
def test_a_missing_level_is_incomplete(level: float) -> None:
    """One seed of backprop was never measured there: no area of it, and no pair."""
    points = [p for p in flat("backprop", (0.5, 0.5)) if (p.seed, p.level) != (1, level)] + flat("mirror", (0.6, 0.6))
    found = of(summary(points), "backprop")
    assert (found["area"]["n"], found["incomplete"], found["failed"]) == (1, 1, 0)
    assert of(summary(points), "mirror")["relative_area_versus"]["n"] == 1


def test_a_rule_that_learned_nothing_is_not_robust() -> None:
    """Its noisy accuracy is its clean one; by plain ratio nothing is lost."""
    points = flat("backprop", (0.3, 0.31, 0.32)) + flat("null", (0.1, 0.103, 0.101), clean=0.101)
    found = of(summary(points), "null")
    assert (found["relative_area"], found["half_level"], found["at_chance"]) == (None, None, 3)
    assert (found["relative_area_versus"], found["verdict"]) == (None, None)
    assert found["area"]["n"] == 3
    assert verdict_lines(summary(points)) == [
        "update: null is not compared with backprop: 3 of 3 networks of null learned nothing (3 at chance)."
    ]
    assert table_rows(summary(points)["sites"][0])[1][3:] == ("–", "–", "3, 3 at chance", "–")


@pytest.mark.parametrize(("floor", "after"), [(None, CHANCE), (0.0, 0.0)])
def test_a_diverged_training_stands_at_chance_and_then_at_the_floor(floor: float | None, after: float) -> None:
    points = [
        Point(site="pgd", rule="sign", seed=1, level=level, accuracy=None, status="diverged")
        for level in (0.0, *LEVELS)
    ]
    found = of(summary(points, floor=floor), "sign")
    assert found["clean"]["mean"] == CHANCE
    assert [at["acc"]["mean"] for at in found["curve"]] == [after] * 3


@pytest.mark.parametrize("rule", ["sign", "backprop"])
def test_the_survivors_alone_get_no_verdict(rule: str) -> None:
    """Two of five learned nothing, of either side: which three are compared was decided by the outcome."""
    other = "backprop" if rule == "sign" else "sign"
    points = flat(other, (0.3, 0.31, 0.32, 0.3, 0.31)) + flat(rule, (0.69, 0.70, 0.71))
    points += [p for seed in (3, 4) for p in network(rule, seed, 0.1, 0.1, 0.1, 0.1)]
    found = summary(points)
    assert (of(found, "sign")["verdict"], of(found, "sign")["relative_area_versus"]) == (None, None)
    assert of(found, rule)["relative_area"]["n"] == 3
    (line,) = verdict_lines(found)
    assert line.startswith(
        f"update: sign is not compared with backprop: 2 of 5 networks of {rule} learned nothing "
        "(relative area 0.750 ± 0.031 over the 3 that learned)"
    )
    row = next(row for row in table_rows(found["sites"][0]) if row[0] == rule)
    assert (row[3], row[5], row[6]) == ("0.750 ± 0.031 (3 of 5 learned)", "5, 2 at chance", "–")


def test_the_clean_accuracies_of_a_sentence_are_of_the_pairs_it_is_on() -> None:
    """A third seed of the rule, of another clean accuracy, has no curve; a fourth has no partner."""
    points = flat("backprop", (0.5, 0.5, 0.5)) + flat("sign", (0.69, 0.7, 0.5))[:-1]
    points += network("sign", 3, 0.3, 0.2, 0.2, 0.2)
    assert "n = 2), from a clean accuracy of 90.0 % against 90.0 % (1 incomplete)" in verdict_lines(summary(points))[0]
    assert of(summary(points), "sign")["compared"]["seeds"] == [0, 1]


def test_a_site_counts_its_own_runs() -> None:
    points = flat("backprop", (0.5, 0.5)) + network("sign", 0, 0.9, 0.5, None, None)
    points.append(Point(site="update", rule="sign", seed=1, level=0.4, accuracy=None, status="diverged"))
    found = summary(points + flat("sign", (0.5,), site="input"))
    assert [site["counts"] for site in found["sites"]] == [
        {"runs": 13, "diverged": 1, "failed": 2},
        {"runs": 4, "diverged": 0, "failed": 0},
    ]


def test_what_counts_as_learned_depends_on_the_examples() -> None:
    points = flat("backprop", (0.12, 0.12), clean=0.12)
    assert of(summarize(points, chance=0.1, tested=10_000), "backprop")["at_chance"] == 0
    assert of(summarize(points, chance=0.1, tested=200), "backprop")["at_chance"] == 2


def test_one_level_has_no_area_and_no_points_no_sites() -> None:
    """What an interrupted measurement leaves can be summarised too."""
    points = [p for rule in ("backprop", "mirror") for p in flat(rule, (0.5, 0.6)) if p.level <= 0.1]
    found = summary(points)
    assert of(found, "mirror")["area"] is None
    assert of(found, "mirror")["curve"][0]["acc"]["mean"] == pytest.approx(0.55)
    assert verdict_lines(found) == [
        "update: mirror is not compared with backprop: one level alone has no area (2 incomplete)."
    ]
    clean = summary(p for p in points if p.level == 0)
    assert (clean["sites"][0]["levels"], len(table_rows(clean["sites"][0]))) == ([], 2)
    assert summary([])["sites"] == []


def test_a_point_that_stands_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"mirror, seed 0 stands twice at update 0\b"):
        summary(flat("mirror", (0.5,)) * 2)


@pytest.mark.parametrize("wrong", [{"accuracy": 97.0}, {"accuracy": math.nan}, {"level": -0.1}, {"level": math.inf}])
def test_a_point_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="is not"):
        Point(**{"site": "update", "rule": "mirror", "seed": 1, "level": 0.1, "accuracy": 0.5, **wrong})


def test_the_order_of_the_points_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    points = [
        p
        for rule in ("mirror", "backprop", "activation")
        for site in ("pgd", "input", "update")
        for p in flat(rule, rng.uniform(0.2, 0.8, 4), site=site)
    ]
    first = summary(points)
    random.Random(0).shuffle(points)
    assert summary(points) == first
    assert [site["site"] for site in first["sites"]] == ["update", "input", "pgd"]
    assert [entry["rule"] for entry in first["sites"][0]["rules"]] == ["backprop", "activation", "mirror"]


# --- what has no noise, and what is no robustness --------------------------------------------------------


def test_a_rule_without_noise_has_its_clean_accuracy_alone() -> None:
    points = flat("backprop", (0.5, 0.5)) + flat("mirror", (0.6, 0.61))
    points += [p for p in flat("sign", (0.9, 0.9)) if p.level == 0]
    found = summary(points, unaffected={"update": ["sign"]})
    sign = of(found, "sign")
    assert (sign["clean"]["mean"], sign["curve"], sign["incomplete"]) == (0.9, [], 0)
    assert {sign[name] for name in ("area", "relative_area", "half_level", "verdict")} == {None}
    (site,) = found["sites"]
    assert table_rows(site)[2] == ("sign", "90.00 ± 0.00", "no noise", "–", "–", "2", "–")
    assert [row[3] for row in curve_rows(site)] == ["90.00 ± 0.00", *["no noise"] * 3]
    assert verdict_lines(found)[1] == "update: sign has no noise here: not compared."
    assert summary(points + flat("sign", (0.9, 0.9))[1:4], unaffected={"update": ["sign"]}) == found
    assert of(summary(points), "sign")["incomplete"] == 2  # without the word, they are missing


def test_a_reference_without_noise_is_compared_with_nobody() -> None:
    points = flat("backprop", (0.5, 0.52, 0.5)) + flat("mirror", (0.7, 0.7, 0.71)) + flat("sign", (0.7, 0.7, 0.71))
    found = summary(points, unaffected={"update": {"backprop"}})
    assert {entry["verdict"] for entry in found["sites"][0]["rules"]} == {None}
    assert of(found, "mirror")["area"]["n"] == 3
    assert verdict_lines(found) == ["update: backprop has no noise here: not compared."]


def test_an_attack_through_b_gets_no_verdict_but_how_much_it_misses() -> None:
    """0.60, 0.61, 0.62 above the true gradient's: mean 61 points, half width 4.302653·1/√3 = 2.5."""
    points = [p for c in ("pgd", "pgd through B") for p in flat("backprop", (0.1, 0.11, 0.12), site=c)]
    points += flat("feedback", (0.1, 0.1, 0.1), site="pgd")
    points += flat("feedback", (0.70, 0.71, 0.72), site="pgd through B")
    found = summary(points, floor=0.0)
    entry = of(found, "feedback", site=1)
    assert found["sites"][1]["true_site"] == "pgd"
    assert (entry["verdict"], entry["relative_area_versus"], entry["area_versus"]) == (None, None, None)
    assert (entry["versus_true"]["n"], entry["versus_true"]["mean"]) == (3, pytest.approx(0.61))
    assert of(found, "feedback")["versus_true"] is None
    assert verdict_lines(found)[1:] == [
        "pgd through B: accuracy of feedback under this weaker attack is higher by 61.0 points [58.5, 63.5] than "
        "under the true gradient (area; n = 3): that much is masking, not robustness.",
        SEVERAL,
    ]
    alone = summary([p for p in points if p.site != "pgd"], floor=0.0)
    assert verdict_lines(alone) == ["pgd through B: feedback has no verdict: this gradient is not the network's own."]


@pytest.mark.parametrize(
    ("areas", "said"),
    [
        (
            (0.50, 0.51, 0.52),
            "this attack is lower by 19.0 points [16.5, 21.5] than under the true gradient "
            "(area; n = 3): the true gradient is masked, and not the strongest attack here.",
        ),
        ((0.60, 0.70, 0.83), "not distinguishable at this n."),
        ((0.7, 0.7, 0.7), "accuracy of feedback is the same as under the true gradient."),
        ((0.90,), "this attack is higher by 20.0 points than under the true gradient (area; n = 1): not disting"),
    ],
)
def test_what_is_not_masked_through_b_is_not_called_so(areas: tuple[float, ...], said: str) -> None:
    points = flat("feedback", [0.7] * len(areas), site="pgd") + flat("feedback", areas, site="pgd through B")
    assert said in verdict_lines(summary(points, floor=0.0))[-1]


def test_other_levels_are_not_compared_with_the_true_gradient() -> None:
    points = flat("feedback", (0.1, 0.2), site="pgd") + flat("feedback", (0.7, 0.8), site="pgd through B")
    cut = [p for p in points if p.site == "pgd" or p.level < 0.4]
    assert of(summary(points), "feedback", site=1)["versus_true"] is not None
    assert of(summary(cut), "feedback", site=1)["versus_true"] is None


@pytest.mark.parametrize(("square", "masked"), [((0.50, 0.51, 0.52), True), ((0.5, 0.8, 0.71), False), ((0.9,), False)])
def test_a_stronger_attack_without_a_gradient_unmasks_pgd(square: tuple[float, ...], masked: bool) -> None:
    """Of any rule, the reference too."""
    points = flat("backprop", (0.70, 0.70, 0.70), site="pgd") + flat("backprop", square, site="square")
    lines = verdict_lines(summary(points, floor=0.0))
    warning = (
        "square: accuracy of backprop is lower by 19.0 points [16.5, 21.5] than under pgd (area; n = 3): "
        "square, which needs no gradient, does more than pgd: pgd is masked there."
    )
    assert lines == ([warning] if masked else [])


# --- verdicts --------------------------------------------------------------------------------------------


def experiments(n: int, difference: float, noise: float, seeds: int = 5) -> list[str]:
    """Verdicts of n experiments whose paired difference is known; seeds share more than they differ by."""
    rng = np.random.default_rng(3)
    verdicts = []
    for _ in range(n):
        shared = rng.normal(0.5, 0.1, seeds).clip(0.2, 0.7)
        points = flat("backprop", shared) + flat("mirror", shared + 0.8 * rng.normal(difference, noise, seeds))
        verdicts.append(of(summarize(points, chance=CHANCE, tested=10_000), "mirror")["verdict"])
    return verdicts


def test_without_a_difference_19_of_20_experiments_say_so() -> None:
    verdicts = experiments(2000, 0.0, 0.02)
    assert abs(verdicts.count("not distinguishable") / 2000 - 0.95) < 0.015
    assert verdicts.count("more robust") == pytest.approx(50, abs=25)


@pytest.mark.parametrize(("difference", "said"), [(0.06, "more robust"), (-0.06, "less robust")])
def test_a_known_difference_is_found(difference: float, said: str) -> None:
    """Three times the noise of a pair, and half of the spread between seeds: found because seeds are paired."""
    verdicts = experiments(50, difference, 0.02)
    assert verdicts.count(said) >= 45


@pytest.mark.parametrize(
    "make", [lambda: flat("mirror", (0.9,)), lambda: flat("mirror", (0.9, 0.3)), lambda: flat("mirror", (0.75, 0.75))]
)
def test_what_the_interval_does_not_allow_is_not_said(make: Callable[[], list[Point]]) -> None:
    """One seed; two that disagree; two equal differences, whose interval has no width."""
    found = summary(flat("backprop", (0.5, 0.5)) + make())
    assert of(found, "mirror")["verdict"] == "not distinguishable"
    assert "mirror is not distinguishable from backprop at this n (relative area +" in verdict_lines(found)[0]


def test_another_reference_and_none() -> None:
    points = flat("backprop", (0.5, 0.52, 0.5)) + flat("mirror", (0.7, 0.7, 0.71))
    found = summary(points, reference="mirror")
    assert [entry["rule"] for entry in found["sites"][0]["rules"]] == ["mirror", "backprop"]
    assert of(found, "backprop")["verdict"] == "less robust"
    alone = summary(points, reference="symmetric")
    assert {entry["verdict"] for entry in alone["sites"][0]["rules"]} == {None}
    assert verdict_lines(alone)[0].endswith("compared with symmetric: symmetric was not measured here.")


# --- words -----------------------------------------------------------------------------------------------


def test_the_sentence_of_a_fair_win() -> None:
    """Differences 0.19, 0.20, 0.21 of 0.8: mean 0.25, sd 0.0125, half width 4.302653·0.0125/√3 = 0.031."""
    points = flat("backprop", (0.5, 0.5, 0.5)) + flat("mirror", (0.69, 0.70, 0.71))
    assert verdict_lines(summary(points)) == [
        "update: mirror is more robust than backprop (relative area +0.250 [+0.219, +0.281], n = 3), "
        "from a clean accuracy of 90.0 % against 90.0 %."
    ]


def test_the_sentence_warns_of_a_winner_that_had_less_to_lose() -> None:
    """Clean 0.9 and 0.3: of 0.8 half is lost, of 0.2 a quarter; what is left is 0.5 against 0.25."""
    points = flat("backprop", (0.5, 0.5, 0.5))
    for seed, wobble in enumerate((-0.003, 0.0, 0.003)):
        points += network("mirror", seed, 0.3 + wobble, *[0.25 + wobble] * 3)
    (line,) = verdict_lines(summary(points))
    assert line.startswith("update: mirror is more robust than backprop (relative area +0.250 [")
    assert line.endswith(
        "from a clean accuracy of 30.0 % against 90.0 %; its clean accuracy is lower by 60.0 points, "
        "and its mean accuracy under noise is lower by 25.0 points."
    )


def test_tables_have_a_cell_for_every_heading() -> None:
    points = flat("backprop", (0.5, 0.52, 0.54)) + flat("amp+null", (0.3, 0.9, 0.6), clean=0.95)
    (site,) = summary(points, symbols={"update": "ε"})["sites"]
    assert table_columns(site) == ("rule", "clean %", "area %", "relative area", "ε½", "n", table_columns(site)[-1])
    assert [len(row) for row in table_rows(site)] == [len(table_columns(site))] * 2
    backprop, other = table_rows(site)
    assert backprop[1:4] == ("90.00 ± 0.00", "52.00 ± 4.97", "0.525 ± 0.062")  # 4.302653·0.02/√3 = 0.0497
    assert (backprop[-1], other[-1].split("] ")[1]) == ("–", "not distinguishable")
    assert curve_columns(site) == ("ε", "backprop", "amp+null")
    assert [row[0] for row in curve_rows(site)] == ["0", "0.1", "0.2", "0.4"]
    assert curve_rows(site)[1][1] == "52.00 ± 4.97"


def test_the_curves_count_what_diverged_and_failed() -> None:
    points = flat("mirror", (0.5, 0.6)) + network("mirror", 2, 0.9, 0.9, 0.9, None)
    points += [p for p in network("mirror", 3, 0.9, 0.9, 0.9, 0.9) if p.level < 0.4]
    points.append(Point(site="update", rule="mirror", seed=3, level=0.4, accuracy=None, status="diverged"))
    (site,) = summary(points)["sites"]
    assert curve_rows(site)[3][1] == "40.00 ± 65.72, 1 diverged, 1 failed"  # of 0.5, 0.6, 0.1


def test_a_lower_mean_accuracy_is_said_whatever_the_clean_one() -> None:
    """One point less is left, and of it a share greater by 0.05: what that makes of the clean accuracies varies."""
    points, wobble = [], (-0.001, 0.0, 0.001)
    for seed, (left, share) in enumerate([(0.7, 0.9), (0.08, 0.1), (0.4, 0.5)]):
        points += network("backprop", seed, 0.1 + left / share, *[0.1 + left] * 3)
        ours = left - 0.01 + wobble[seed]
        points += network("sign", seed, 0.1 + ours / (share + 0.05 + wobble[seed]), *[0.1 + ours] * 3)
    (line,) = verdict_lines(summary(points))
    assert "sign is more robust than backprop" in line
    assert "its clean accuracy" not in line
    assert line.endswith("; its mean accuracy under noise is lower by 1.0 points.")


def test_two_verdicts_are_each_by_itself() -> None:
    points = flat("backprop", (0.5, 0.5, 0.5)) + flat("mirror", (0.69, 0.70, 0.71))
    assert len(verdict_lines(summary(points))) == 1
    lines = verdict_lines(summary(points + flat("sign", (0.4, 0.5, 0.6))))
    assert (len(lines), lines[-1]) == (3, SEVERAL)
    nothing = flat("sign", (0.1, 0.1, 0.1), clean=0.1)
    assert SEVERAL not in verdict_lines(summary(points + nothing))
