"""Small layers that between them use all that a layer may be: one more row is one more problem in every test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Problem:
    name: str
    layer: Callable[[], nn.Linear | nn.Conv2d]
    input_shape: tuple[int, ...]

    def make(self) -> tuple[nn.Linear | nn.Conv2d, Tensor]:
        """The layer and an input, in float64, from a fixed seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return self.layer().double(), torch.randn(self.input_shape, dtype=torch.float64)


PROBLEMS = [
    Problem("linear", lambda: nn.Linear(5, 3), (4, 5)),
    Problem("linear_no_bias", lambda: nn.Linear(5, 3, bias=False), (4, 5)),
    Problem("linear_sequence", lambda: nn.Linear(5, 3), (4, 6, 5)),
    Problem("linear_grid", lambda: nn.Linear(5, 3), (2, 3, 2, 5)),
    Problem("conv", lambda: nn.Conv2d(3, 4, 3), (2, 3, 7, 6)),
    Problem("conv_no_bias", lambda: nn.Conv2d(3, 4, 3, padding=1, bias=False), (2, 3, 6, 5)),
    Problem("conv_stride", lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 8, 7)),
    Problem("conv_stride_uneven", lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 3), padding=(0, 1)), (2, 3, 8, 8)),
    Problem("conv_1x1_stride", lambda: nn.Conv2d(3, 4, 1, stride=2, bias=False), (2, 3, 6, 7)),
    Problem("conv_dilation", lambda: nn.Conv2d(3, 4, 3, dilation=2, padding=2), (2, 3, 8, 8)),
    Problem("conv_same", lambda: nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 6, 5)),
    Problem("conv_same_even", lambda: nn.Conv2d(3, 4, (4, 2), padding="same"), (2, 3, 6, 5)),
    Problem("conv_same_even_dilated", lambda: nn.Conv2d(3, 4, (2, 4), padding="same", dilation=(3, 1)), (2, 3, 7, 6)),
    Problem("conv_valid", lambda: nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 6, 6)),
    Problem("conv_groups", lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 6, 6)),
    Problem("conv_depthwise", lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4, stride=2), (2, 4, 7, 7)),
]
