"""What amp, sparse and null see of a layer's activity: its scale (``scaling``) and its mean (``centered``).

``scaling``. The energies of these three are sums over units and positions, so that their gradients grow with a layer's
channels, with its image and with the square of its input: a coefficient has a dimension, and one that serves in one
layer makes B explode in the next. ``reference`` leaves it so, as the authors have it. ``normalized`` divides, in every
layer by itself, amp and sparse by `Maps.forward_energy` of x and null by `Maps.transpose_energy` of z. Coefficients are
then pure numbers, which neither the input's scale nor the size of the image changes. The divisor is the trace of the
Hessian in B of sparse for one output channel (of null for one input channel), at a coefficient of 1, and no eigenvalue
exceeds it: with sparse alone or null alone, learning rate · coefficient < 2 is stable in every layer, under Nesterov
momentum μ it is < (2 + 2μ) / (1 + 2μ). (In a layer with groups it is the mean of their traces, and a group above the
mean has less room.) `bench.learning.primitives.activity_gradient` does the division. It is per batch, as batch
normalisation is: the parts of an accumulated batch, and the uses of a layer in one pass, are each divided by their own
energy. So are the workers under torch's DistributedDataParallel; those of a `bench.group.Group` have one in common.

``centered``. Behind a ReLU, the mean of x over the batch and positions carries most of the energy: a single direction,
which sets the limit of stability while B hardly moves in all others. The terms then see x without it, and z follows.
The authors' ``_batch_center`` takes the mean over the batch alone, one for each pixel; ours goes over positions too.

Neither changes dx, dW, db, nor decay and self.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bench.config import Scaling, UserError, unknown
from bench.group import Group
from bench.learning.ops import Maps
from bench.learning.rules import Rule


@dataclass(frozen=True, kw_only=True)
class ScalingRow:
    """One way to see a layer's activity; the names are those of `bench.config.Scaling`."""

    name: Scaling
    summary: str
    source: str


SCALINGS: dict[str, ScalingRow] = {
    row.name: row
    for row in (
        ScalingRow(
            name="reference",
            summary="sums over units and positions: coefficients have a dimension",
            source="Kunin et al. 2020, arXiv 2003.01513",
        ),
        ScalingRow(
            name="normalized",
            summary="divided, layer by layer, by the energy of what the term reads: coefficients are pure numbers",
            source="ours; compare normalised LMS, Nagumo & Noda 1967, doi 10.1109/TAC.1967.1098599",
        ),
    )
}


def centered(
    maps: Maps, x: Tensor, z: Tensor | None, W: Tensor, group: Group | None = None
) -> tuple[Tensor, Tensor | None]:
    """x − m and W·(x − m), m the mean of each channel over the batch and over positions; z = W·x stays as it is.

    W·m is computed on one image, 1/n of a convolution. (What a border of zeros makes of m depends on the position,
    so that taking its own mean from z would be another thing.) z None: nobody needs it.
    """
    m = maps.channel_mean(x) if group is None else group.mean(maps.channel_mean(x))
    return x - m, None if z is None else z - maps.forward(m.expand(1, *x.shape[1:]), W.to(x.dtype))


def check_scaling(rule: Rule, scaling: Scaling, centered: bool) -> None:
    """A UserError if these settings have no effect in this rule, or if there is no such scaling."""
    if scaling not in SCALINGS:
        raise unknown("scaling", scaling, SCALINGS)
    given = ["scaling"] * (scaling != "reference") + ["centered"] * centered
    if given and not rule.sees_activity:
        raise UserError(
            f"{' and '.join(given)} {'have' if len(given) > 1 else 'has'} no effect in rule {rule.name!r}, whose "
            "feedback weights see no activity (amp, null, sparse do); remove it from the configuration."
        )
