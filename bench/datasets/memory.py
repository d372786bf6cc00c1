"""Small sets: uint8 on the device, moved there once, augmented there in batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.config import UserError
from bench.datasets.augment import draw_shifts, shift_and_mirror
from bench.datasets.draws import Indices
from bench.datasets.image_data import Batch, Pick, windows
from bench.datasets.raw import MEMORY_LIMIT, Arrays, Split

_CHUNK = 1024


@dataclass(frozen=True, eq=False)
class MemorySource:
    """Pixels (n, c, h, h), uint8, and labels (n,), int64, of each split."""

    pixels: dict[Split, Tensor]
    labels: dict[Split, Tensor]
    flip: bool
    _resident: dict[tuple[Split, torch.device], Batch] = field(default_factory=dict)

    def batches(
        self,
        split: Split,
        order: Indices,
        batch_size: int,
        device: torch.device,
        draw: tuple[int, int] | None,
        pick: Pick = None,
    ) -> Iterator[Batch]:
        images, labels = self._on(split, device)
        index = torch.from_numpy(order).to(images.device)
        shifts = None if draw is None else draw_shifts(len(order), images.shape[2], self.flip, *draw, images.device)
        for window in windows(len(order), batch_size, pick):
            batch = images[index[window]]
            if shifts is not None:
                batch = shift_and_mirror(batch, shifts.of(window))
            yield as_pixels(batch), labels[index[window]]

    def _on(self, split: Split, device: torch.device) -> Batch:
        # A tensor's device has its index: a bare "cuda" is the current one, and nothing is moved there twice.
        key = (split, torch.empty(0, device=device).device)
        if key not in self._resident:
            self._resident[key] = (self.pixels[split].to(device), self.labels[split].to(device))
        return self._resident[key]


def as_pixels(images: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1], contiguous."""
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def memory_source(
    raw: Arrays, members: dict[Split, tuple[str, Indices]], image_size: int | None, flip: bool, name: str
) -> MemorySource:
    """The splits of a set in memory, resized once. Errors: UserError for more than 4 GiB."""
    _, channels, native, _ = raw.pixels["train"].shape
    size = image_size or native
    count = sum(len(positions) for _, positions in members.values())
    largest = int((MEMORY_LIMIT / (count * channels)) ** 0.5)
    if size > largest:
        raise UserError(
            f"{name}: {count} images of {size} x {size} do not fit in {MEMORY_LIMIT >> 30} GiB; "
            f"give image_size at most {largest}."
        )
    pixels = {s: resize(torch.from_numpy(raw.pixels[part][at]), size) for s, (part, at) in members.items()}
    labels = {s: torch.from_numpy(raw.labels[part][at]) for s, (part, at) in members.items()}
    return MemorySource(pixels, labels, flip)


def resize(images: Tensor, size: int) -> Tensor:
    """(n, c, h, h) uint8 to (n, c, size, size) uint8: bilinear, antialiased, rounded."""
    if images.shape[-1] == size:
        return images
    out = images.new_empty((*images.shape[:2], size, size))
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK].to(torch.float32)
        scaled = F.interpolate(chunk, (size, size), mode="bilinear", antialias=True)
        out[start : start + _CHUNK] = scaled.round_().clamp_(0, 255).to(torch.uint8)
    return out


def mean_and_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per channel of (n, c, h, w) uint8, as pixels in [0, 1]: exact sums, from a histogram.

    A channel that never varies has std 1, so that normalisation leaves it at 0.
    """
    levels = np.arange(256) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        histogram = torch.bincount(images[:, channel].flatten(), minlength=256).numpy()
        mean = float(histogram @ levels / histogram.sum())
        variance = float(histogram @ (levels - mean) ** 2 / histogram.sum())
        means.append(mean)
        stds.append(variance**0.5 if np.count_nonzero(histogram) > 1 else 1.0)
    return tuple(means), tuple(stds)
