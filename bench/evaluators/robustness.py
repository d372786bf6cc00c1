"""Accuracy under Gaussian noise in a trained network: how far it falls, and how sure the mean over the draws is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from bench.config import check_range
from bench.evaluators.accuracy import accuracy
from bench.noise import Normalize, evaluation_noise, seed_of


@dataclass(frozen=True, kw_only=True)
class NoisyAccuracy:
    """Accuracies (fractions of 1) of one network at one level, one per draw, and their ``mean``.

    ``se``: the standard error of the mean over draws, sd (with n − 1) / √draws; None for a single draw. Without
    noise one pass says all: one draw and se = 0. It says nothing of other networks: those are other seeds.
    """

    mean: float
    se: float | None
    draws: int
    values: tuple[float, ...]


def noisy_accuracy(
    model: nn.Module,
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    normalize: Normalize,
    *,
    site: str,
    level: float,
    draws: int,
    seed: int,
    clip: bool = False,
) -> NoisyAccuracy:
    """The accuracy under noise of this level σ at this site, in ``draws`` passes over the split.

    ``batches()`` yields the split anew, (pixels in [0, 1], labels), in the same batches each time. Level 0 is
    `accuracy`, bit for bit, in one pass. Draw k is seeded from (seed, site, k) alone, not from the level, the rule
    or the training: common random numbers, so that differences between levels, and between networks of one
    architecture, are paired draw by draw. An answer that is not finite is wrong. The model is unchanged afterwards,
    modes and hooks too, and no global random state is read or moved.

    UserError for draws below 1 and what `evaluation_noise` refuses (``update`` is noise in training); ValueError
    for no examples.
    """
    check_range("noise", "draws", draws, 1)
    values = []
    for k in range(draws if level != 0 else 1):
        drawn = seed_of(seed, site, k)
        with evaluation_noise(model, normalize, site=site, level=level, seed=drawn, clip=clip) as noisy:
            values.append(accuracy(noisy[0], batches(), noisy[1])["acc"])
    n = len(values)
    spread = None if n == 1 else statistics.stdev(values) / math.sqrt(n)
    return NoisyAccuracy(mean=math.fsum(values) / n, se=0.0 if level == 0 else spread, draws=n, values=tuple(values))
