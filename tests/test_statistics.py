"""Intervals against textbook numbers, and by how often they hold the truth."""

from __future__ import annotations

import numpy as np
import pytest

from bench.statistics import Estimate, estimate, paired_difference, verdict


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
