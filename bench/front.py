"""Pareto fronts of two quantities, both to be maximised: which points are on it, and which few stand for it."""

from __future__ import annotations

import math
from collections.abc import Sequence

Point = tuple[float, float]


def pareto_front(points: Sequence[Point]) -> list[int]:
    """The places in ``points`` of those that no other dominates, by their first value, best first.

    p dominates q if p is at least as good in both values, and better in one. Of equal points the earliest
    stands for all. ValueError for a point that has NaN.
    """
    if any(math.isnan(value) for point in points for value in point):
        raise ValueError("a point with NaN is neither better nor worse than any other; leave it out.")
    front: list[int] = []
    for place in sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1], i)):
        if not front or points[place][1] > points[front[-1]][1]:
            front.append(place)
    return front


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """The area of what some point dominates and ``reference`` is dominated by: ⋃ [r₁, p₁] × [r₂, p₂] over the points p.

    In the product of the two units. A point that is not better than the reference in both values adds
    nothing (Zitzler & Thiele 1998).
    """
    above = [p for p in points if p[0] > reference[0] and p[1] > reference[1]]
    strips = []
    below = reference[1]
    for first, second in (above[i] for i in pareto_front(above)):
        strips.append((first - reference[0]) * (second - below))
        below = second
    return math.fsum(strips)


def spread(points: Sequence[Point], n: int, reference: Point) -> list[int]:
    """The places of n points that stand for the Pareto front, or of all of it, by their first value, best first.

    Chosen one by one: the next is the one that adds most to the hypervolume above ``reference`` of those
    chosen before; of equals, the one better in the first value. So the first is the best compromise (the
    largest product of the two gains over the reference), and a larger n adds points and drops none. Their
    hypervolume is at least 1 − 1/e of that of the best n points (Nemhauser et al. 1978). The ends of the
    front have no privilege: one that wins almost nothing in one value and loses much in the other comes late.
    """
    front = pareto_front(points)
    left, chosen = list(front), list[int]()
    while left and len(chosen) < n:
        best = max(left, key=lambda i: hypervolume([points[j] for j in (*chosen, i)], reference))
        chosen.append(best)
        left.remove(best)
    return [i for i in front if i in chosen]
