"""Means, shares and rank correlations with their interval, and paired differences with a verdict.

None of them claims more than its interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any, Literal

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


def versus(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[str, Any] | None:
    """The paired difference and its verdict, JSON-ready; None without a common seed."""
    difference = paired_difference(ours, theirs)
    return None if difference is None else {**difference.to_dict(), "verdict": verdict(difference)}


def mean_by_seed(several: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """The mean over them all at each seed that all of them have: another set at every seed would be another mean."""
    seeds = sorted(set.intersection(*map(set, several))) if several else []
    return {seed: math.fsum(values[seed] for values in several) / len(several) for seed in seeds}


@dataclass(frozen=True, kw_only=True)
class Share:
    """``count`` of ``of``, and the exact 95 % interval of the share, if the cases are independent."""

    share: float
    count: int
    of: int
    low: float
    high: float

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


def share(k: int, n: int) -> Share:
    """k / n with its two-sided 95 % interval (Clopper & Pearson 1934, doi 10.1093/biomet/26.4.404).

    It holds the truth in 95 of 100 cases or more, whatever n is. ValueError unless 0 <= k <= n and n >= 1.
    """
    if not 0 <= k <= n or not n:
        raise ValueError(f"{k} of {n} is not a share")
    from scipy import stats

    tail = (1 - CONFIDENCE) / 2
    low = float(stats.beta.ppf(tail, k, n - k + 1)) if k else 0.0
    high = float(stats.beta.ppf(1 - tail, k + 1, n - k)) if k < n else 1.0
    return Share(share=k / n, count=k, of=n, low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class RankCorrelation:
    """Spearman's rho over ``n`` pairs and its 95 % interval; None where there is none."""

    rho: float | None
    n: int
    low: float | None
    high: float | None

    def to_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


def rank_correlation(ours: Sequence[float], theirs: Sequence[float]) -> RankCorrelation:
    """Spearman's rho: the correlation of the ranks, where equal values share the mean of their ranks.

    None for n < 3, and where one side is constant: there is no order to agree with. The interval is
    tanh(artanh(rho) ± 1.96·√((1 + rho²/2) / (n − 3))) (Fisher's z with the standard error of Bonett & Wright 2000,
    doi 10.1007/BF02294183), and None for n < 4 and for |rho| = 1, where artanh has no value. ValueError unless there
    are as many of one as of the other.
    """
    n = len(ours)
    if n != len(theirs):
        raise ValueError(f"{n} values to rank, but {len(theirs)} to compare them with")
    if n < 3 or len(set(ours)) == 1 or len(set(theirs)) == 1:
        return RankCorrelation(rho=None, n=n, low=None, high=None)
    from scipy import stats

    rho = float(stats.spearmanr(ours, theirs).statistic)
    if 1 - abs(rho) < ROUNDING:
        return RankCorrelation(rho=math.copysign(1.0, rho), n=n, low=None, high=None)
    if n < 4:
        return RankCorrelation(rho=rho, n=n, low=None, high=None)
    half = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    z = math.atanh(rho)
    return RankCorrelation(rho=rho, n=n, low=math.tanh(z - half), high=math.tanh(z + half))
