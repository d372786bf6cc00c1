"""The three maps of a linear layer and of a convolution. Nothing else in the code asks which of the two it is.

The vocabulary, here and everywhere (design, section 2):

======  =========================================  ====================  ==========================
symbol  meaning                                    shape, linear         shape, convolution
======  =========================================  ====================  ==========================
n       examples in the batch
x       layer input                                (n, *, in)            (n, in, h, w)
W       forward weight                             (out, in)             (out, in/groups, kh, kw)
B       feedback weight, stored in W's layout      as W                  as W
K       either of the two                          as W                  as W
z       W·x, without the bias                      (n, *, out)           (n, out, h', w')
delta   dJ/dz, arriving from above                 as z                  as z
======  =========================================  ====================  ==========================

``forward(x, K)`` is K·x. ``transpose(z, K, x)`` is Kᵀ·z, shaped like x (whose values are not read).
``kernel_grad(x, z, K)`` is the gradient of ⟨z, forward(x, K)⟩ with respect to K, summed over the batch
and over positions, shaped like K (whose values are not read). The map is bilinear: a factor may stand on
either side. ``backward`` does the work of a layer's backward pass in one call.

``forward_energy`` and ``transpose_energy`` say how much a map reads: the mean squared norm of its patches, which is
the trace of their second moments. They cost one elementwise pass and no convolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Maps(Protocol):
    """The maps of one layer type; what is fixed about the layer (stride, ...) is inside."""

    def forward(self, x: Tensor, K: Tensor, bias: Tensor | None = None) -> Tensor: ...

    def transpose(self, z: Tensor, K: Tensor, x: Tensor) -> Tensor: ...

    def kernel_grad(self, x: Tensor, z: Tensor, K: Tensor) -> Tensor: ...

    def backward(
        self, x: Tensor, delta: Tensor, K: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(transpose(delta, K), kernel_grad(x, delta), Σ delta), each where it is wanted."""
        ...

    def grouped(self, K: Tensor) -> Tensor:
        """K as (groups, outputs of a group, patch size): what each output makes of the patch that it reads."""
        ...

    def channelwise(self, bias: Tensor) -> Tensor:
        """The bias, shaped so that it broadcasts against z."""
        ...

    def channel_mean(self, x: Tensor) -> Tensor:
        """The mean of x over the batch and over positions, shaped so that it broadcasts against x; x's dtype."""
        ...

    def forward_energy(self, x: Tensor, K: Tensor) -> Tensor:
        """(1/n)·(1/groups)·Σ ‖p‖² over the patches p of x that ``forward`` reads: all examples, positions, groups.

        With C the sum over positions of the mean of p·pᵀ, this is trace(C), for several groups the mean of their
        traces. K's values are not read. A number (0-dim, float32 or wider) on x's device; nobody waits for it.
        """
        ...

    def transpose_energy(self, z: Tensor, K: Tensor, x: Tensor) -> Tensor:
        """(1/n)·(1/groups)·Σ ‖q‖² over the patches q of z that ``transpose`` reads, one for each position of x.

        As `forward_energy`; of x and K only the shapes count. Padding is no position of x.
        """
        ...

    def usable(self, shape: torch.Size, K: Tensor) -> Tensor:
        """Which entries of K some position of an input of this shape reaches: bool, broadcasts against K.

        The others (on a 1×1 image all taps of a padded 3×3 kernel but the middle one) see zeros alone: they do nothing.
        """
        ...


@dataclass(frozen=True)
class LinearMaps:
    """K of shape (out, in); x of shape (n, *, in) with any number of dimensions between, or (in,)."""

    def forward(self, x: Tensor, K: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, K, bias)

    def transpose(self, z: Tensor, K: Tensor, x: Tensor) -> Tensor:  # noqa: ARG002  (a convolution needs x's shape)
        return z.matmul(K)

    def kernel_grad(self, x: Tensor, z: Tensor, K: Tensor) -> Tensor:  # noqa: ARG002
        return z.reshape(-1, z.shape[-1]).t().mm(x.reshape(-1, x.shape[-1]))

    def backward(
        self, x: Tensor, delta: Tensor, K: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return (
            self.transpose(delta, K, x) if wanted[0] else None,
            self.kernel_grad(x, delta, K) if wanted[1] else None,
            delta.reshape(-1, delta.shape[-1]).sum(0) if wanted[2] else None,
        )

    def grouped(self, K: Tensor) -> Tensor:
        return K[None]

    def channelwise(self, bias: Tensor) -> Tensor:
        return bias

    def channel_mean(self, x: Tensor) -> Tensor:
        return _mean(x, tuple(range(x.dim() - 1)))

    def forward_energy(self, x: Tensor, K: Tensor) -> Tensor:  # noqa: ARG002
        total: Tensor = torch.linalg.vector_norm(x, dtype=_wide(x)).square()
        return total / x.shape[0]

    def transpose_energy(self, z: Tensor, K: Tensor, x: Tensor) -> Tensor:  # noqa: ARG002
        return self.forward_energy(z, K)

    def usable(self, shape: torch.Size, K: Tensor) -> Tensor:  # noqa: ARG002
        return torch.ones((), dtype=torch.bool, device=K.device)


@dataclass(frozen=True)
class ConvMaps:
    """K of shape (out, in/groups, kh, kw). ``extra``: zeros added below and to the right ("same" with even kernels)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    extra: tuple[int, int] = (0, 0)

    def _widen(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, self.extra[1], 0, self.extra[0])) if any(self.extra) else x

    def forward(self, x: Tensor, K: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(self._widen(x), K, bias, self.stride, self.padding, self.dilation, self.groups)

    def transpose(self, z: Tensor, K: Tensor, x: Tensor) -> Tensor:
        back = self.backward(x, z, K, (True, False, False))[0]
        assert back is not None
        return back

    def kernel_grad(self, x: Tensor, z: Tensor, K: Tensor) -> Tensor:
        grad = self.backward(x, z, K, (False, True, False))[1]
        assert grad is not None
        return grad

    def backward(
        self, x: Tensor, delta: Tensor, K: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        # torch's own kernel, the one that autograd calls: with K = W it gives backprop's numbers bit for bit
        dx, dK, db = torch.ops.aten.convolution_backward(
            delta,
            self._widen(x),
            K,
            [K.shape[0]],
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0, 0],
            self.groups,
            wanted,
        )
        if wanted[0] and any(self.extra):
            dx = dx[..., : x.shape[-2], : x.shape[-1]]
        return dx if wanted[0] else None, dK if wanted[1] else None, db if wanted[2] else None

    def grouped(self, K: Tensor) -> Tensor:
        return K.reshape(self.groups, K.shape[0] // self.groups, -1)

    def channelwise(self, bias: Tensor) -> Tensor:
        return bias.view(-1, 1, 1)

    def channel_mean(self, x: Tensor) -> Tensor:
        return _mean(x, (0, 2, 3))

    def forward_energy(self, x: Tensor, K: Tensor) -> Tensor:
        (reads_h, _), (reads_w, _) = self._counts(x, K)
        return reads_h @ _pixel_energies(x) @ reads_w / (x.shape[0] * self.groups)

    def transpose_energy(self, z: Tensor, K: Tensor, x: Tensor) -> Tensor:
        (_, lands_h), (_, lands_w) = self._counts(x, K)
        return lands_h @ _pixel_energies(z) @ lands_w / (x.shape[0] * self.groups)

    def _counts(self, x: Tensor, K: Tensor) -> list[tuple[Tensor, Tensor]]:
        """`_count` for the height and for the width: how often a pixel is in a patch is the product of the two."""
        return [_count(*axis, dtype=_wide(x), device=x.device) for axis in self._axes(x.shape, K)]

    def usable(self, shape: torch.Size, K: Tensor) -> Tensor:
        rows, columns = (_windows(*axis)[1].any(0) for axis in self._axes(shape, K))
        return (rows[:, None] & columns).to(K.device)

    def _axes(self, shape: torch.Size, K: Tensor) -> Iterator[tuple[int, int, int, int, int, int]]:
        """What `_windows` asks for, of the height and of the width."""
        return zip(shape[-2:], K.shape[-2:], self.stride, self.padding, self.dilation, self.extra, strict=True)


@dataclass(frozen=True)
class PatchMaps(LinearMaps):
    """A linear layer for each group: x (n, groups, patch size), K as `Maps.grouped` has it, z (n, groups, outputs)."""

    def forward(self, x: Tensor, K: Tensor, bias: Tensor | None = None) -> Tensor:
        assert bias is None
        return torch.einsum("ngd,god->ngo", x, K)

    def transpose(self, z: Tensor, K: Tensor, x: Tensor) -> Tensor:  # noqa: ARG002
        return torch.einsum("ngo,god->ngd", z, K)

    def kernel_grad(self, x: Tensor, z: Tensor, K: Tensor) -> Tensor:  # noqa: ARG002
        return torch.einsum("ngo,ngd->god", z, x)


def _wide(x: Tensor) -> torch.dtype:
    """The dtype to add up in: float32, or x's own if that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def _mean(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.mean(dims, keepdim=True, dtype=_wide(x)).to(x.dtype)


def _pixel_energies(x: Tensor) -> Tensor:
    """Σ x² over examples and channels: (n, c, h, w) to (h, w)."""
    if x.is_cuda:  # one pass, no copy of x
        norms: Tensor = torch.linalg.vector_norm(x, dim=(0, 1), dtype=_wide(x))
        return norms.square()
    return x.square().sum((0, 1), dtype=_wide(x))  # the norm along outer dimensions takes a CPU ten times as long


@lru_cache(maxsize=1024)
def _count(
    size: int,
    taps: int,
    stride: int,
    padding: int,
    dilation: int,
    extra: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Along one axis of x: how many windows read each of its positions; how many taps of each window lie inside it."""
    at, inside = _windows(size, taps, stride, padding, dilation, extra)
    reads, lands = torch.bincount(at[inside], minlength=size), inside.sum(1)
    return reads.to(device, dtype), lands.to(device, dtype)


def _windows(size: int, taps: int, stride: int, padding: int, dilation: int, extra: int) -> tuple[Tensor, Tensor]:
    """Along one axis of x, for each window (rows) and tap (columns): its position, and whether that is inside x."""
    count = (size + 2 * padding + extra - dilation * (taps - 1) - 1) // stride + 1
    at = torch.arange(count)[:, None] * stride + torch.arange(taps) * dilation - padding
    return at, (at >= 0) & (at < size)
