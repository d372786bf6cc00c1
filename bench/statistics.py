"""Means with their spread and interval, and paired differences with a verdict that claims no more than these."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Literal

#: The share of intervals that hold the true value, if the values are independent and normal.
CONFIDENCE = 0.95

#: Differences that are equal but for rounding: accuracies of fewer than 10¹² examples differ by more, if they do.
ROUNDING = 1e-12

Verdict = Literal["better", "worse", "not distinguishable"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over ``n`` values: ``sd`` with n − 1 (None for n = 1), ``low`` and ``high`` the 95 % t interval."""

    mean: float
    sd: float | None
    n: int
    low: float | None
    high: float | None

    def to_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, standard deviation (n − 1) and two-sided 95 % interval, mean ± t(n − 1)·sd/√n (Student 1908).

    ValueError without values. The interval of one value is unknown, and None.
    """
    n = len(values)
    if not n:
        raise ValueError("no values to estimate from")
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean=mean, sd=None, n=1, low=None, high=None)
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = _t_quantile(n - 1) * sd / math.sqrt(n)
    return Estimate(mean=mean, sd=sd, n=n, low=mean - half, high=mean + half)


@lru_cache(maxsize=256)
def _t_quantile(degrees: int) -> float:
    from scipy import stats  # half a second, which only a table needs

    return float(stats.t.ppf(0.5 + CONFIDENCE / 2, degrees))


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """ours − theirs, over the seeds that both have; None without a common seed."""
    common = sorted(set(ours) & set(theirs))
    return estimate([ours[seed] - theirs[seed] for seed in common]) if common else None


def verdict(difference: Estimate) -> Verdict:
    """``better`` or ``worse`` only where the whole interval says so.

    Equal differences (accuracies are counts, so a few can be) have an interval of no width, which says nothing.
    """
    if difference.sd is None or difference.sd < ROUNDING:
        return "not distinguishable"
    if difference.low is not None and difference.low > 0:
        return "better"
    if difference.high is not None and difference.high < 0:
        return "worse"
    return "not distinguishable"
