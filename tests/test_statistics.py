"""Intervals against textbook numbers, and by how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.statistics import (
    Estimate,
    estimate,
    mean_by_seed,
    paired_difference,
    rank_correlation,
    share,
    verdict,
    versus,
)


def test_known_answer() -> None:
    """n = 3, mean 2, sd 1: t(2) = 4.302653 (any table), half width 4.302653 / √3."""
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.sd, found.n) == (2.0, 1.0, 3)
    assert found.high - found.mean == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)


def test_one_value_has_no_spread_and_none_is_an_error() -> None:
    assert estimate([0.5]) == Estimate(mean=0.5, sd=None, n=1, low=None, high=None)
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_the_interval_holds_the_truth_95_times_in_100() -> None:
    draws = np.random.default_rng(0).normal(3.0, 2.0, (4000, 5))
    held = sum((e := estimate(list(row))).low <= 3.0 <= e.high for row in draws) / 4000
    assert abs(held - 0.95) < 4 * (0.95 * 0.05 / 4000) ** 0.5


def test_differences_are_paired_by_seed() -> None:
    found = paired_difference({1: 0.9, 2: 0.8, 5: 0.1}, {1: 0.8, 2: 0.7, 3: 0.9})
    assert found.n == 2
    assert found.mean == pytest.approx(0.1)
    assert found.sd == pytest.approx(0.0, abs=1e-12)
    assert paired_difference({1: 0.9}, {2: 0.9}) is None


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.1, 0.3, "better"),
        (-0.3, -0.1, "worse"),
        (-0.1, 0.3, "not distinguishable"),
        (0.0, 0.0, "not distinguishable"),
    ],
)
def test_a_verdict_needs_the_whole_interval(low: float, high: float, said: str) -> None:
    assert verdict(Estimate(mean=(low + high) / 2, sd=0.1, n=3, low=low, high=high)) == said


def test_differences_that_happen_to_be_equal_decide_nothing() -> None:
    assert verdict(estimate([1 / 256] * 3)) == "not distinguishable"


def test_one_seed_decides_nothing() -> None:
    assert verdict(Estimate(mean=0.9, sd=None, n=1, low=None, high=None)) == "not distinguishable"


def test_equal_differences_that_rounding_tells_apart_say_nothing() -> None:
    difference = estimate([0.91 - 0.90, 0.11 - 0.10, 0.5 - 0.49])  # sd 8e-18, all on one side of zero
    assert difference.sd != 0
    assert verdict(difference) == "not distinguishable"


def test_a_mean_by_seed_is_over_the_seeds_that_all_have() -> None:
    assert mean_by_seed([{1: 0.1, 2: 0.2, 3: 0.9}, {2: 0.4, 1: 0.3}]) == pytest.approx({1: 0.2, 2: 0.3})
    assert mean_by_seed([]) == mean_by_seed([{1: 0.1}, {2: 0.1}]) == {}


def test_a_difference_has_its_verdict_beside_it() -> None:
    found = versus({1: 0.9, 2: 0.91, 3: 0.92}, {1: 0.5, 2: 0.5, 3: 0.5})
    assert found is not None
    assert (found["mean"], found["n"], found["verdict"]) == (pytest.approx(0.41), 3, "better")
    assert versus({}, {1: 0.5}) is None


# --- shares ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (0, 10, 0.0, 1 - 0.025**0.1),  # (1 − p)^10 = 0.025
        (10, 10, 0.025**0.1, 1.0),
        (2, 10, 0.0252, 0.5561),  # tables of exact binomial limits
        (1, 1, 0.025, 1.0),
    ],
)
def test_known_intervals_of_a_share(k: int, n: int, low: float, high: float) -> None:
    found = share(k, n)
    assert (found.share, found.count, found.of) == (k / n, k, n)
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@pytest.mark.parametrize("truth", [0.03, 0.3, 0.5, 0.9])
def test_the_interval_of_a_share_holds_the_truth_at_least_95_times_in_100(truth: float) -> None:
    n, held = 12, 0.0
    for k in range(n + 1):
        found = share(k, n)
        held += (found.low <= truth <= found.high) * math.comb(n, k) * truth**k * (1 - truth) ** (n - k)
    assert held >= 0.95


@pytest.mark.parametrize(("k", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_no_share_of_nothing(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="is not a share"):
        share(k, n)


# --- rank correlation ------------------------------------------------------------------------------------


def ranks(values: list[float]) -> list[float]:
    """Slow and obvious: as many as are less, and half of the others that are equal, from 1."""
    return [1 + sum(o < v for o in values) + (sum(o == v for o in values) - 1) / 2 for v in values]


def test_rho_by_hand_without_ties() -> None:
    """Σd² = 1 + 1 + 1 + 1 + 0 = 4; 1 − 6·4 / (5·24) = 0.8."""
    found = rank_correlation([1, 2, 3, 4, 5], [20, 10, 40, 30, 50])
    assert (found.rho, found.n) == (pytest.approx(0.8), 5)
    half = 1.959964 * math.sqrt((1 + 0.8**2 / 2) / 2)
    assert found.low == pytest.approx(math.tanh(math.atanh(0.8) - half), rel=1e-6)
    assert found.high == pytest.approx(math.tanh(math.atanh(0.8) + half), rel=1e-6)


def test_equal_values_share_the_mean_of_their_ranks() -> None:
    ours, theirs = [0.1, 0.1, 0.1, 0.5, 0.7, 0.7], [0.3, 0.1, 0.1, 0.2, 0.9, 0.1]
    expected = np.corrcoef(ranks(ours), ranks(theirs))[0, 1]
    assert rank_correlation(ours, theirs).rho == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ours", "theirs", "rho"),
    [
        ([1, 1, 1, 1, 1], [1, 2, 3, 4, 5], None),
        ([1, 2, 3, 4, 5], [0.1] * 5, None),
        ([1, 2], [1, 2], None),
        ([], [], None),
        ([1, 2, 3], [1, 3, 2], 0.5),  # n = 3 has no standard error
        ([1, 2, 3, 4, 5], [1, 4, 9, 16, 25], 1.0),
        ([1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1], -1.0),
    ],
)
def test_where_there_is_no_rho_or_no_interval(ours: list[float], theirs: list[float], rho: float | None) -> None:
    found = rank_correlation(ours, theirs)
    assert found.rho == (None if rho is None else pytest.approx(rho))
    assert (found.n, found.low, found.high) == (len(ours), None, None)


def test_the_interval_of_rho_holds_the_truth_about_95_times_in_100() -> None:
    """Of normal pairs with correlation r, Spearman's is 6/π·asin(r/2)."""
    rng, r = np.random.default_rng(1), 0.7
    truth, held, times = 6 / math.pi * math.asin(r / 2), 0, 600
    for _ in range(times):
        a, b = rng.normal(size=(2, 30))
        found = rank_correlation(list(a), list(r * a + math.sqrt(1 - r**2) * b))
        held += found.low <= truth <= found.high
    assert 0.92 < held / times < 0.98


def test_ranks_need_as_many_of_one_as_of_the_other() -> None:
    with pytest.raises(ValueError, match="3 values to rank, but 2"):
        rank_correlation([1, 2, 3], [1, 2])
