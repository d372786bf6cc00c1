"""The five primitives (design, section 3): energy and gradient, one row each.

Batch mean over examples, sum over units and positions; ½ on the quadratic ones. x, z and W are constants:
only B learns from a primitive, and nothing of it reaches another layer. The rows are the definition, and
what the tests compare with autograd; `activity_gradient` is how a layer computes them, at the cost floor.
"""

# ruff: noqa: ARG005  (every formula has the same arguments, and reads those that it needs)

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bench.group import Group
from bench.learning.ops import Maps

#: (maps, x, z, W, B) to a number (the energy) or to a tensor shaped like B (its gradient)
Formula = Callable[[Maps, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Primitive:
    """One primitive. ``kind``: local, what a synapse's two ends know suffices; non-local, it does not.

    ``sees``: the batch (its gradient needs x and z) or only the weights (elementwise, once per step).
    """

    name: str
    kind: Literal["local", "non-local"]
    sees: Literal["batch", "weights"]
    formula: str
    energy: Formula
    gradient: Formula


def _half_square(t: Tensor) -> Tensor:
    return 0.5 * t.square().sum()


_ROWS = (
    Primitive(
        name="decay",
        kind="local",
        sees="weights",
        formula="½‖B‖²",
        energy=lambda maps, x, z, W, B: _half_square(B),
        gradient=lambda maps, x, z, W, B: B,
    ),
    Primitive(
        name="amp",
        kind="local",
        sees="batch",
        formula="−⟨forward(x, B), z⟩ / n",
        energy=lambda maps, x, z, W, B: -(maps.forward(x, B) * z).sum() / x.shape[0],
        gradient=lambda maps, x, z, W, B: -maps.kernel_grad(x, z, B) / x.shape[0],
    ),
    Primitive(
        name="null",
        kind="local",
        sees="batch",
        formula="½‖transpose(z, B)‖² / n",
        energy=lambda maps, x, z, W, B: _half_square(maps.transpose(z, B, x)) / x.shape[0],
        gradient=lambda maps, x, z, W, B: maps.kernel_grad(maps.transpose(z, B, x), z, B) / x.shape[0],
    ),
    Primitive(
        name="sparse",
        kind="non-local",
        sees="batch",
        formula="½‖forward(x, B)‖² / n",
        energy=lambda maps, x, z, W, B: _half_square(maps.forward(x, B)) / x.shape[0],
        gradient=lambda maps, x, z, W, B: maps.kernel_grad(x, maps.forward(x, B), B) / x.shape[0],
    ),
    Primitive(
        name="self",
        kind="non-local",
        sees="weights",
        formula="−⟨B, W⟩",
        energy=lambda maps, x, z, W, B: -(B * W).sum(),
        gradient=lambda maps, x, z, W, B: -W,
    ),
)

PRIMITIVES: dict[str, Primitive] = {row.name: row for row in _ROWS}


def needs_z(coefficients: Mapping[str, float]) -> bool:
    """Whether the gradient of B under these coefficients reads z."""
    return bool(coefficients.get("amp") or coefficients.get("null"))


def sees_batch(coefficients: Mapping[str, float]) -> bool:
    """Whether any coefficient that is not zero belongs to a primitive that sees the batch."""
    return any(value for name, value in coefficients.items() if PRIMITIVES[name].sees == "batch")


def activity_gradient(
    maps: Maps,
    coefficients: Mapping[str, float],
    x: Tensor,
    z: Tensor | None,
    B: Tensor,
    *,
    normalized: bool = False,
    group: Group | None = None,
) -> Tensor:
    """The gradient of B from amp, sparse and null together, in as few maps as there can be.

    kernel_grad is bilinear, so amp rides along with whichever other primitive is there:
    sparse·kernel_grad(x, B·x) − amp·kernel_grad(x, z) = kernel_grad(x, sparse·B·x − amp·z), and
    null·kernel_grad(Bᵀ·z, z) − amp·kernel_grad(x, z) = kernel_grad(null·Bᵀ·z − amp·x, z).
    A coefficient of zero costs nothing. z may be None where `needs_z` says no.

    ``normalized``: amp and sparse are divided by maps.forward_energy(x), null by maps.transpose_energy(z)
    (`bench.learning.activity` says why). Where that is zero, so is the gradient.

    ``group``: x and z are this process's part of the batch; the sum of what its processes get is the gradient.
    """
    n = x.shape[0] if group is None else x.shape[0] / group.share
    amp, sparse, null = (coefficients.get(name, 0.0) / n for name in ("amp", "sparse", "null"))
    of_x = _positive(maps.forward_energy(x, B), group) if normalized and (amp or sparse) else None
    of_z = _positive(maps.transpose_energy(z, B, x), group) if normalized and null and z is not None else None
    total: Tensor | None = None
    if sparse:
        seen = maps.forward(x, B).mul_(sparse)
        if amp and z is not None:
            seen.sub_(z, alpha=amp)
        total, amp = _per(maps.kernel_grad(x, seen, B), of_x), 0.0
    if null and z is not None:
        back = maps.transpose(z, B, x).mul_(null)
        if amp and of_x is not None and of_z is not None:
            back.addcmul_(x, (of_z / of_x).to(x.dtype), value=-amp)  # the whole is divided by of_z
        elif amp:
            back.sub_(x, alpha=amp)
        grad = _per(maps.kernel_grad(back, z, B), of_z)
        total, amp = grad if total is None else total.add_(grad), 0.0
    if amp and z is not None:
        total = _per(maps.kernel_grad(x, z, B).mul_(-amp), of_x)
    assert total is not None, "called without a coefficient that sees the batch"
    return total


def _positive(energy: Tensor, group: Group | None) -> Tensor:
    """An energy to divide by, of the whole batch: nothing divided by nothing is to be nothing."""
    whole = energy if group is None else group.mean(energy)
    return whole.clamp_min(torch.finfo(energy.dtype).tiny)


def _per(grad: Tensor, energy: Tensor | None) -> Tensor:
    """The gradient for each unit of energy, if there is one to divide by; in the energy's precision."""
    return grad if energy is None else grad.to(energy.dtype).div_(energy)
