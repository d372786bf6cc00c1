"""What amp, null and sparse see: the batch's activations, or noise (``input``); their scale and mean.

``input``. On activations these three see x and z of the batch. With C = E[x xᵀ] of a layer's input patches, mirror then
settles at B ∝ W·C, at an angle to W that no coefficient changes. On ``normal`` or ``uniform`` noise each layer sees
``samples`` patches of white noise of variance σ² = 1 instead, drawn anew in each step, and z = W·x of these. A patch is
what one output of the layer reads, in_channels / groups · kh · kw numbers, so that every tap counts alike, whatever the
stride, the padding or the size of the image. The energies are means over patches. Then E[∂amp/∂B] = −W and
E[∂sparse/∂B] = B in every layer of every network: coefficients have no dimension. One step's estimate of W is off by an
angle θ, tan²θ = (patch size + 1) / samples; what averages over T steps divides tan θ by √(2T).
Source: Akrout et al. 2019, arXiv 1904.05391 (noise drives each layer by itself); Kunin et al.'s code has it as
``input_distribution``. STDWI in rate form and PAL are the same rule.

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

``stabilize``: the authors' operations on what the three see, by name, in the order of `bench.config.Stabilizer`; off by
default. ``center_`` takes from each example its mean over all features, ``normalize_`` also divides by the norm that is
left, ``batch_center_`` takes from each feature its mean over the batch. ``input``: x, from which z = W·x and B·x come;
``backward_input``: x as B·x sees it; ``forward_output``: z and Bᵀ·z; ``backward_output``: B·x (and Wᵀ·B·x).
``reversed_null``: null is ½‖Wᵀ·B·x‖² / n in place of ½‖Bᵀ·W·x‖² / n (their ``reconstruction_reversal``; their
``reconstruction_amp`` is −⟨x, Bᵀ·z⟩ = −⟨B·x, z⟩, which is amp, and their ``use_sparse`` is the rule amp+null+sparse).
These gradients come from autograd on the energies, and cost accordingly.
Source: Kunin et al. 2020; their code, Neural-Alignment, Alignments/alignment.py.

None of them changes dx, dW, db, nor decay and self.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.config import FeedbackInput, Scaling, Stabilizer, UserError, unknown
from bench.group import Group
from bench.learning.ops import LinearMaps, Maps, PatchMaps
from bench.learning.primitives import activity_gradient
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


@dataclass(frozen=True, kw_only=True)
class Activity:
    """What amp, null and sparse see of a layer; the module's docstring says what each field means.

    Args:
        input: the batch's activations, or noise patches from a normal or a uniform distribution of variance 1.
        samples: noise patches for each layer and step.
        scaling, centered, stabilize: of activations.
        reversed_null: the other form of null.
    """

    input: FeedbackInput = "activations"
    samples: int = 64
    scaling: Scaling = "reference"
    centered: bool = False
    stabilize: tuple[Stabilizer, ...] = ()
    reversed_null: bool = False

    @property
    def is_noise(self) -> bool:
        """Whether it is noise, so that no gradient reads the batch."""
        return self.input != "activations"

    def check(self, rule: Rule) -> None:
        """Raise a UserError if a field has no effect in this rule or is not a known value."""
        if self.scaling not in SCALINGS:
            raise unknown("scaling", self.scaling, SCALINGS)
        fields = {name: name for name in ("scaling", "centered", "stabilize", "reversed_null")} | {
            "feedback_input": "input"
        }
        given = [name for name, field in fields.items() if getattr(self, field) != getattr(Activity, field)]
        if given and not rule.sees_activity:
            raise UserError(
                f"{' and '.join(given)} {'have' if len(given) > 1 else 'has'} no effect in rule {rule.name!r}, whose "
                "feedback weights see no activity (amp, null, sparse do); remove it from the configuration."
            )
        if self.reversed_null and "null" not in rule.primitives:
            raise UserError(f"reversed_null has no effect in rule {rule.name!r}, which has no null; remove it.")
        if self.has_own_energies and (self.scaling != "reference" or self.centered):
            raise UserError("stabilize and reversed_null do not go with scaling and centered; remove one of the two.")

    @property
    def has_own_energies(self) -> bool:
        """Whether the energies are not those of `bench.learning.primitives.PRIMITIVES`."""
        return bool(self.stabilize) or self.reversed_null

    def energy(self, maps: Maps, coefficients: Mapping[str, float], x: Tensor, W: Tensor, B: Tensor) -> Tensor:
        """Compute the sum of amp, null and sparse, each times its coefficient, over the batch x, not divided by n."""
        on = set(self.stabilize)
        x = _standardized(x, on, "input")
        seen = x - x.mean(0, keepdim=True) if "batch_center_backward_input" in on else x
        z, back = maps.forward(x, W), maps.forward(seen, B)
        null = coefficients.get("null", 0.0)
        reversed_, forward = None, None
        if null and self.reversed_null:
            reversed_ = _standardized(maps.transpose(back, W, x), on, "backward_output")
        elif null:
            forward = _standardized(maps.transpose(z, B, x), on, "forward_output")
        z, back = _standardized(z, on, "forward_output"), _standardized(back, on, "backward_output")
        total = 0.5 * coefficients.get("sparse", 0.0) * back.square().sum()
        total = total - coefficients.get("amp", 0.0) * (z * back).sum()
        reconstruction = reversed_ if forward is None else forward
        return total if reconstruction is None else total + 0.5 * null * reconstruction.square().sum()


def _standardized(t: Tensor, on: Collection[str], what: str) -> Tensor:
    """Apply those of the operations ``on`` whose names end in ``what``."""
    features = tuple(range(1, t.dim()))
    if {f"center_{what}", f"normalize_{what}"} & set(on):
        t = t - t.mean(features, keepdim=True)
    if f"normalize_{what}" in on:
        t = t / torch.linalg.vector_norm(t, dim=features, keepdim=True).clamp_min(1e-6)
    return t - t.mean(0, keepdim=True) if f"batch_center_{what}" in on else t


def noise_patches(
    activity: Activity, weights: Sequence[tuple[Maps, Tensor]], generator: torch.Generator
) -> list[Tensor]:
    """Draw the patches of one step for several layers.

    Drawn on the CPU, so that a seed means the same on every device, and at once for all layers.

    Args:
        activity: the distribution, and how many patches.
        weights: the maps and W of each layer.
        generator: of the CPU; it moves on.

    Returns:
        For each layer (samples, groups, patch size), in W's dtype, on its device.
    """
    shapes = [(activity.samples, *maps.grouped(W).shape[::2]) for maps, W in weights]
    flat = torch.empty(sum(map(math.prod, shapes)))
    if activity.input == "normal":
        flat.normal_(generator=generator)
    else:
        flat.uniform_(-math.sqrt(3.0), math.sqrt(3.0), generator=generator)
    parts = torch.split(flat.to(weights[0][1], non_blocking=True), [math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def energy_gradient(
    maps: Maps, activity: Activity, coefficients: Mapping[str, float], x: Tensor, W: Tensor, B: Tensor, n: float
) -> Tensor:
    """Compute the gradient of B from the activity's own energies, by autograd, as a mean over n examples."""
    with torch.enable_grad():
        B = B.detach().requires_grad_()
        energy = activity.energy(maps, coefficients, x, W.to(x.dtype), B)
        return torch.autograd.grad(energy, B)[0].div_(n)


def noise_gradient(
    maps: Maps, activity: Activity, coefficients: Mapping[str, float], patches: Tensor, W: Tensor, B: Tensor
) -> Tensor:
    """Compute the gradient of B from amp, null and sparse on noise patches, as means over the patches.

    Args:
        maps: of the layer; they say how its weight is divided into groups.
        activity: with noise as its input.
        coefficients: by primitive.
        patches: (samples, groups, patch size), as `noise_patches` draws them.
        W, B: of the layer.

    Returns:
        A tensor shaped like B.
    """
    W, weight = maps.grouped(W), maps.grouped(B)
    of: LinearMaps = PatchMaps()
    if len(W) == 1:  # one plain matrix product is several times faster than einsum on small layers
        of, patches, W, weight = LinearMaps(), patches[:, 0], W[0], weight[0]
    if activity.has_own_energies:
        return energy_gradient(of, activity, coefficients, patches, W, weight, len(patches)).reshape(B.shape)
    if coefficients.get("null"):
        return activity_gradient(of, coefficients, patches, of.forward(patches, W), weight).reshape(B.shape)
    # sparse·B·x − amp·W·x is one map
    both = weight * coefficients.get("sparse", 0.0) - W * coefficients.get("amp", 0.0)
    return of.kernel_grad(patches, of.forward(patches, both), B).div_(len(patches)).reshape(B.shape)
