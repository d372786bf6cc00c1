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
"""

from __future__ import annotations

from dataclasses import dataclass
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

    def channelwise(self, bias: Tensor) -> Tensor:
        """The bias, shaped so that it broadcasts against z."""
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

    def channelwise(self, bias: Tensor) -> Tensor:
        return bias


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

    def channelwise(self, bias: Tensor) -> Tensor:
        return bias.view(-1, 1, 1)
