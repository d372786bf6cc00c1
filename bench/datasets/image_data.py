"""A data set as a trial sees it: three splits, batches of pixels in [0, 1], and their normalisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from bench.config import UserError, unknown
from bench.datasets.draws import ORDER, Indices, permutation
from bench.datasets.raw import Split

Batch = tuple[Tensor, Tensor]
#: From the size of a batch to the positions in it that are read; None: all of them.
Pick = Callable[[int], Sequence[int]] | None


class Source(Protocol):
    """Where the pixels of the splits are: in memory, or in files."""

    def batches(
        self,
        split: Split,
        order: Indices,
        batch_size: int,
        device: torch.device,
        draw: tuple[int, int] | None,
        pick: Pick = None,
    ) -> Iterator[Batch]:
        """Batches of the split's examples in this order; augmented by (seed, epoch) if ``draw`` gives them.

        Of each, what ``pick`` picks, as it is in the whole batch; batches of which it picks nothing are left out.
        """
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageData:
    """A named set. ``mean`` and ``std``: per channel, of the training part, pixels in [0, 1].

    ``digest``: sixteen hexadecimal digits that name the raw data of all splits, whatever is made of it.
    """

    name: str
    digest: str
    classes: int
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sizes: dict[Split, int]
    source: Source

    def normalize(self, pixels: Tensor) -> Tensor:
        """(p - mean) / std per channel, for pixels (n, channels, h, w) in [0, 1]."""
        mean, std = (_constant(values, pixels.device, pixels.dtype) for values in (self.mean, self.std))
        return (pixels - mean) / std

    def steps(self, split: Split, batch_size: int) -> int:
        """How many whole batches the split has. Errors: UserError if it has none."""
        count = self._count(split)
        if batch_size < 1:
            raise UserError(f"batch_size = {batch_size} is out of range; it must be at least 1.")
        if count < batch_size:
            remedy = "lower batch_size or raise train_examples" if split == "train" else "lower batch_size"
            raise UserError(f"{self.name}: {split} has {count} images, fewer than batch_size = {batch_size}; {remedy}.")
        return count // batch_size

    def batches(
        self,
        split: Split,
        batch_size: int,
        *,
        device: torch.device,
        seed: int | None = None,
        epoch: int = 0,
        augment: bool = False,
        pick: Pick = None,
    ) -> Iterator[Batch]:
        """Pixels (n, channels, image_size, image_size), float32 in [0, 1], not normalised; labels (n,), int64.

        Without ``seed``: everything, in order. With it: shuffled (and, with ``augment``, augmented) as a function of
        (seed, epoch) alone, the incomplete last batch left out. ``pick``: a part of each batch, as it is in the whole.

        Errors: UserError for fewer examples than ``batch_size`` with a seed, and for ``augment`` without one.
        """
        if seed is None:
            if augment:
                raise UserError("augment has no effect on data read in order; give a seed, or leave augment out.")
            return self.source.batches(split, np.arange(self._count(split)), batch_size, device, None, pick)
        whole = self.steps(split, batch_size) * batch_size
        order = permutation(self.sizes[split], seed, epoch, ORDER)[:whole]
        return self.source.batches(split, order, batch_size, device, (seed, epoch) if augment else None, pick)

    def _count(self, split: Split) -> int:
        if split not in self.sizes:
            raise unknown("split", split, get_args(Split))
        return self.sizes[split]


def windows(count: int, batch_size: int, pick: Pick) -> Iterator[slice | Indices]:
    """Of ``count`` examples in a row, those of each batch; batches of which nothing is picked are left out."""
    for start in range(0, count, batch_size):
        stop = min(start + batch_size, count)
        if pick is None:
            yield slice(start, stop)
        elif len(picked := pick(stop - start)):
            yield start + np.asarray(picked)


@lru_cache(maxsize=16)
def _constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Per channel, as (1, c, 1, 1). Kept: to copy it anew would wait for all that the device still has to do."""
    # Evaluation may come first; a tensor of inference mode could not serve in a backward pass later.
    with torch.inference_mode(False):
        return torch.tensor(values, device=device, dtype=dtype).view(1, -1, 1, 1)
