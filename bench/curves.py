"""One network's accuracy against the level of noise (or of an attack), in a few numbers.

A curve is the clean accuracy (level 0) and the accuracies at rising levels sigma_1 < … < sigma_m, all above 0.
Accuracies are shares in [0, 1], chance is 1 / classes, and ``tested`` is the number of examples behind each accuracy.

``floor`` is the accuracy of a network that has lost everything: chance under noise (None means that), 0 under an
attack, which does not stop at guessing. Whether a network has learned anything is asked of its clean accuracy, against
chance, in either case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from bench.config import check_levels


def area(levels: Sequence[float], accuracies: Sequence[float]) -> float:
    """The mean accuracy over the grid: ∫ accuracy d(log sigma) / log(sigma_m / sigma_1), by the trapezoid rule.

    Grids of noise span decades. On the axis of log sigma every octave counts alike; on that of sigma the last octave
    alone, where most networks are at chance, would be half of the area. It lies between the least and the greatest
    accuracy, and depends on the grid: compare areas of the same levels only.

    UserError unless there are two levels or more, above 0 and rising; ValueError unless each has its accuracy.
    """
    _check(levels, accuracies)
    logs = [math.log(level) for level in levels]
    steps = zip(pairwise(logs), pairwise(accuracies), strict=True)
    mean = math.fsum((x1 - x0) * (y0 + y1) / 2 for (x0, x1), (y0, y1) in steps) / (logs[-1] - logs[0])
    return min(max(mean, min(accuracies)), max(accuracies))  # rounding alone leads out: 1 everywhere is 1, not more


def above_chance(chance: float, tested: int) -> float:
    """The accuracy above which a network has learned something: chance + 2·√(chance·(1 − chance) / tested).

    Two standard deviations of the accuracy of a guesser (binomial); one guesser in about 44 gets there.
    """
    return chance + 2 * math.sqrt(chance * (1 - chance) / tested)


def relative_area(area: float, clean: float, chance: float, tested: int, *, floor: float | None = None) -> float | None:
    """(area − floor) / (clean − floor): 1 where the noise did nothing, 0 where it left nothing.

    Both are taken above the floor, for that is what a network has to lose: of an accuracy of 20 % with ten classes,
    noise cannot take more than half, and such a network would look robust. An attack can take all of it. Above 1 where
    noise helps, and below 0 by luck.

    None where the clean accuracy is at chance (`above_chance`): there is nothing to lose, which is not robustness.
    """
    floor = chance if floor is None else floor
    return (area - floor) / (clean - floor) if clean > above_chance(chance, tested) else None


def half_level(
    levels: Sequence[float],
    accuracies: Sequence[float],
    clean: float,
    chance: float,
    tested: int,
    *,
    floor: float | None = None,
) -> float | None:
    """The first level at which half of the accuracy above the floor is gone, in the unit of the levels.

    Accuracy is taken as linear in log sigma between two levels, and as linear in sigma between 0 and sigma_1, where
    there is no logarithm. math.inf where the curve does not fall that low within the grid (the true one lies beyond
    it: a censored value); None where the clean accuracy is at chance. Errors as in `area`.
    """
    _check(levels, accuracies)
    if clean <= above_chance(chance, tested):
        return None
    floor = chance if floor is None else floor
    half = floor + (clean - floor) / 2
    i = next((i for i, accuracy in enumerate(accuracies) if accuracy <= half), None)
    if i is None:
        return math.inf
    before = accuracies[i - 1] if i else clean
    share = (before - half) / (before - accuracies[i])
    if i == 0:
        return levels[0] * share
    return levels[i - 1] * math.pow(levels[i] / levels[i - 1], share)


def _check(levels: Sequence[float], accuracies: Sequence[float]) -> None:
    check_levels("curve", levels)
    if len(levels) != len(accuracies):
        raise ValueError(f"{len(levels)} levels, but {len(accuracies)} accuracies")
