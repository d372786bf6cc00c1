"""Augmentation: a shifted crop and a mirror for small images, a random crop resized for large ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.datasets.draws import CROPS, SHIFTS, Indices, bits, uniforms

#: left, top, right, bottom in pixels of the source, not rounded.
Box = tuple[float, float, float, float]

_AREA, _LOG_RATIO, _TRIES = (0.08, 1.0), (math.log(3 / 4), math.log(4 / 3)), 10


@dataclass(frozen=True, eq=False)
class Shifts:
    """One draw per image: rows and columns in 0 ... 2*margin (margin: no shift), and whether to mirror."""

    rows: Tensor
    columns: Tensor
    mirror: Tensor
    margin: int

    def of(self, window: slice | Indices) -> Shifts:
        return Shifts(self.rows[window], self.columns[window], self.mirror[window], self.margin)


def draw_shifts(count: int, image_size: int, flip: bool, seed: int, epoch: int, device: torch.device) -> Shifts:
    """The draws of one epoch, the same on every device; the margin is image_size // 8 (4 for 32 x 32)."""
    margin = image_size // 8
    words = bits(3 * count, seed, epoch, SHIFTS).reshape(3, count)
    span = np.uint64(2 * margin + 1)
    rows, columns = (torch.from_numpy((w % span).astype(np.int64)).to(device) for w in words[:2])
    mirror = torch.from_numpy((words[2] >> np.uint64(63)).astype(bool) & flip).to(device)
    return Shifts(rows, columns, mirror, margin)


def shift_and_mirror(images: Tensor, shifts: Shifts) -> Tensor:
    """Each image of (n, c, h, w) padded with zeros by the margin, cut at its row and column, perhaps mirrored.

    out[i, :, y, x] = padded[i, :, y + rows[i], x + columns[i]].
    """
    n, _, height, width = images.shape
    windows = F.pad(images, (shifts.margin,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    cut = windows[torch.arange(n, device=images.device), :, shifts.rows, shifts.columns]
    return torch.where(shifts.mirror[:, None, None, None], cut.flip(3), cut)


def centre_box(width: int, height: int, zoom: float) -> Box:
    """The centred square whose side is the shorter one divided by ``zoom``."""
    side = min(width, height) / zoom
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(width: int, height: int, *words: int) -> tuple[Box, bool]:
    """A random box of 8 to 100 % of the area and aspect ratio 3/4 to 4/3, and whether to mirror.

    Ten tries, then the largest centred box of an allowed ratio. Source: Szegedy et al. 2014, section 6.
    """
    u = uniforms(4 * _TRIES + 1, *words, CROPS)
    mirror = bool(u[-1] < 0.5)
    for area, ratio, across, down in u[:-1].reshape(_TRIES, 4):
        pixels = width * height * (_AREA[0] + area * (_AREA[1] - _AREA[0]))
        aspect = math.exp(_LOG_RATIO[0] + ratio * (_LOG_RATIO[1] - _LOG_RATIO[0]))
        w, h = math.sqrt(pixels * aspect), math.sqrt(pixels / aspect)
        if w <= width and h <= height:
            left, top = float(across) * (width - w), float(down) * (height - h)
            return (left, top, left + w, top + h), mirror
    w, h = min(width, height * math.exp(_LOG_RATIO[1])), min(height, width / math.exp(_LOG_RATIO[0]))
    left, top = (width - w) / 2, (height - h) / 2
    return (left, top, left + w, top + h), mirror
