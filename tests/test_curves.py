"""Areas and half levels of curves that can be integrated, and crossed, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import trapezoid

from bench.config import UserError
from bench.curves import above_chance, area, half_level, relative_area

OCTAVES = (0.1, 0.2, 0.4, 0.8)
TESTED = 10_000


def test_the_area_by_hand() -> None:
    """Three octaves with means 0.9, 0.6, 0.2."""
    assert area(OCTAVES, (1.0, 0.8, 0.4, 0.0)) == pytest.approx((0.9 + 0.6 + 0.2) / 3)


def test_every_octave_counts_alike() -> None:
    """A step from 1 to 0 in the middle of the grid, on the log axis, halves the area. On a plain axis it does not."""
    levels = (0.01, 0.1, 0.1 + 1e-12, 1.0)
    assert area(levels, (1, 1, 0, 0)) == pytest.approx(0.5)
    assert trapezoid((1, 1, 0, 0), levels) / (1.0 - 0.01) == pytest.approx(0.0909, abs=1e-4)


def test_a_line_in_log_sigma_has_the_area_of_its_middle_on_any_grid() -> None:
    for levels in ((0.01, 1.0), (0.01, 0.02, 0.5, 1.0)):
        assert area(levels, [0.5 - 0.2 * math.log10(s) for s in levels]) == pytest.approx(0.7)


@given(
    st.lists(st.floats(1e-3, 10), min_size=2, max_size=9, unique=True),
    st.lists(st.floats(0, 1), min_size=9, max_size=9),
    st.floats(0.1, 100),
)
def test_the_area_is_a_mean_and_knows_no_unit(levels: list[float], accuracies: list[float], unit: float) -> None:
    levels = [1e-3 * 1.1 ** round(math.log(s / 1e-3, 1.1)) for s in levels]  # not closer than floats can tell
    levels = sorted(set(levels))
    if len(levels) < 2:
        return
    accuracies = accuracies[: len(levels)]
    found = area(levels, accuracies)
    assert found == pytest.approx(
        trapezoid(accuracies, np.log(levels)) / np.log(levels[-1] / levels[0]), rel=1e-9, abs=1e-12
    )
    assert min(accuracies) <= found <= max(accuracies)
    assert area([s * unit for s in levels], accuracies) == pytest.approx(found, abs=1e-9)


@pytest.mark.parametrize("levels", [(0.01, 0.02, 0.2), (0.01, 0.02, 0.04, 0.08, 0.16, 0.32), (0.03, 0.1, 0.3)])
@pytest.mark.parametrize("accuracy", [1.0, 0.1, 0.7])
def test_the_area_of_what_is_the_same_everywhere_is_just_that(levels: tuple[float, ...], accuracy: float) -> None:
    """1.0000000000000002 is no share of 1, and no row may have it."""
    assert area(levels, [accuracy] * len(levels)) == accuracy


@pytest.mark.parametrize("levels", [(), (0.1,), (0.0, 0.1), (0.2, 0.1), (0.1, 0.1), (0.1, math.inf)])
@pytest.mark.parametrize("measure", [area, lambda s, a: half_level(s, a, 0.9, 0.1, TESTED)])
def test_a_grid_that_has_no_width_is_refused(measure: object, levels: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match=r"two or more, above 0 and rising|out of range"):
        measure(levels, [0.5] * len(levels))


def test_each_level_has_its_accuracy() -> None:
    with pytest.raises(ValueError, match="2 levels, but 3 accuracies"):
        area((0.1, 0.2), (0.9, 0.8, 0.7))


def test_the_threshold_is_two_deviations_of_a_guesser() -> None:
    assert above_chance(0.1, 900) == pytest.approx(0.1 + 2 * 0.01)
    guesses = np.random.default_rng(0).binomial(900, 0.1, 40_000) / 900
    assert 0.015 < (guesses > above_chance(0.1, 900)).mean() < 0.035


@pytest.mark.parametrize(
    ("area_", "clean", "expected"),
    [(0.9, 0.9, 1.0), (0.1, 0.9, 0.0), (0.5, 0.9, 0.5), (0.92, 0.9, 1.025), (0.05, 0.9, -0.0625)],
)
def test_the_relative_area_by_hand(area_: float, clean: float, expected: float) -> None:
    assert relative_area(area_, clean, 0.1, TESTED) == pytest.approx(expected)


@pytest.mark.parametrize(("tested", "learned"), [(10_000, True), (900, False)])
def test_a_network_at_chance_has_nothing_to_lose(tested: int, learned: bool) -> None:
    """An accuracy of 11 % in ten classes is 3.3 deviations above chance with 10 000 examples, and 1 with 900."""
    assert (relative_area(0.11, 0.11, 0.1, tested) is not None) == learned
    assert (half_level(OCTAVES, (0.11, 0.1, 0.1, 0.1), 0.11, 0.1, tested) is not None) == learned


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ((0.9, 0.9, 0.1, 0.1), 0.2 * 2**0.5),  # half of an octave
        ((0.9, 0.7, 0.3, 0.1), 0.2 * 2**0.5),
        ((0.9, 0.8, 0.4, 0.1), 0.2 * 2**0.75),
        ((0.9, 0.5, 0.1, 0.1), 0.2),  # on a level
        ((0.9, 0.9, 0.9, 0.5), 0.8),  # on the last
        ((0.1, 0.1, 0.1, 0.1), 0.05),  # before the first: linear from 0 to 0.1
        ((0.5, 0.5, 0.1, 0.1), 0.1),
        ((0.9, 0.3, 0.9, 0.1), 0.1 * 2 ** (2 / 3)),  # the first of two crossings
        ((0.9, 0.8, 0.7, 0.51), math.inf),  # not within the grid
    ],
)
def test_the_half_level_by_hand(accuracies: tuple[float, ...], expected: float) -> None:
    """Clean 0.9, chance 0.1: half is 0.5, not 0.45."""
    assert half_level(OCTAVES, accuracies, 0.9, 0.1, TESTED) == pytest.approx(expected)


@pytest.mark.parametrize("clean", [0.95, 0.45])
def test_an_attack_takes_all_and_not_only_what_is_above_chance(clean: float) -> None:
    """Of any clean accuracy the same shares are left: the same relative area and half level, above 0."""
    levels = (0.1, 0.2, 0.4, 0.8, 1.6)
    accuracies = [clean * share for share in (1, 0.5, 0.1, 0, 0)]
    found = relative_area(area(levels, accuracies), clean, 0.1, 200, floor=0.0)
    assert found == pytest.approx((0.75 + 0.3 + 0.05 + 0) / 4)
    assert half_level(levels, accuracies, clean, 0.1, 200, floor=0.0) == pytest.approx(0.2)


def test_what_was_learned_is_asked_against_chance_under_attack_too() -> None:
    assert relative_area(0.05, 0.1, 0.1, TESTED, floor=0.0) is None
    assert half_level(OCTAVES, (0.1, 0, 0, 0), 0.1, 0.1, TESTED, floor=0.0) is None
