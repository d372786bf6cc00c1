"""How well the feedback path fits the forward path: angles, norm ratios, and the error that really arrives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.evaluators.accuracy import evaluation_mode
from bench.learning.activity import centered as without_mean
from bench.learning.layers import AsymmetricLayer, asymmetric_layers, exact_gradients


def angle(left: Tensor, right: Tensor) -> float:
    """The angle between two tensors, taken as vectors, in degrees: 0 parallel, 90 unrelated; NaN if one is zero.

    By atan2 of the half-angle (Kahan), which keeps its precision near 0 and 180 degrees.
    """
    a, b = left.detach().double().flatten(), right.detach().double().flatten()
    a, b = a / a.norm(), b / b.norm()
    return math.degrees(2.0 * math.atan2((a - b).norm().item(), (a + b).norm().item()))


def alignment(model: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, float]:
    """`error_alignment`, and `weight_alignment` over the weights that these inputs reach."""
    layers = asymmetric_layers(model)
    used: dict[str, Tensor] = {}
    with _each_input(layers, partial(_mark_used, layers, used)):
        errors = error_alignment(model, inputs, labels)
    return {**errors, **weight_alignment(model, used)}


def weight_alignment(model: nn.Module, used: Mapping[str, Tensor] | None = None) -> dict[str, float]:
    """Per layer ``angle/NAME`` between W and B (degrees) and ``norm_ratio/NAME`` = ‖B‖/‖W‖; ``angle``, their mean.

    The mean leaves out the layers that send no error down, the first of the network, whose B has no effect.
    ``used``: by layer, which weights count (`bench.learning.ops.Maps.usable`); all of a layer that is not in it.
    """
    result: dict[str, float] = {}
    for name, layer in asymmetric_layers(model).items():
        W, B = layer.weight, layer.feedback_weight()
        if used is not None and name in used:
            W, B = W.where(used[name], 0), B.where(used[name], 0)
        result[f"angle/{name}"] = angle(W, B)
        result[f"norm_ratio/{name}"] = (B.norm() / W.norm()).item()
    return {**_mean("angle", [result[f"angle/{name}"] for name in _sending(model)]), **result}


def error_alignment(model: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, float]:
    """Per layer ``dx_angle/NAME``, degrees between the dx it sends and the one backprop would have sent.

    Both come from the same forward pass, in evaluation mode, under cross-entropy: one backward pass through
    B, one through Wᵀ. Only what the layer itself sends counts, not what goes past it in a skip connection.
    Layers that send nothing (the first) or have no part in the loss are left out; of a layer that is used
    several times, the last use counts. The model is unchanged afterwards.
    """
    sent: dict[str, Tensor] = {}

    def watch(name: str, x: Tensor) -> Tensor | None:
        if not x.requires_grad:
            return None
        sent[name] = x.view_as(x)
        return sent[name]

    with _each_input(asymmetric_layers(model), watch), evaluation_mode(model), torch.enable_grad():
        loss = F.cross_entropy(model(inputs), labels)
        inputs_of = list(sent.values())
        through_b = torch.autograd.grad(loss, inputs_of, retain_graph=True, allow_unused=True) if sent else ()
        with exact_gradients(model):
            true = torch.autograd.grad(loss, inputs_of, allow_unused=True) if sent else ()
    pairs = {name: (a, b) for name, a, b in zip(sent, through_b, true, strict=True) if a is not None is not b}
    result = {f"dx_angle/{name}": angle(a, b) for name, (a, b) in pairs.items()}
    return {**_mean("dx_angle", list(result.values())), **result}


def floor_alignment(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, float]:
    """Per layer ``floor_angle/NAME``, degrees between W and the B at which amp against decay settles; their mean.

    That B is a multiple of E[kernel_grad(x, W·x)] = W·C, C the second moments of the patches of x, whatever the
    coefficients and rates: for isotropic W cos²θ = (tr C)² / (tr C² · n_in). x is as amp sees it: give batches as the
    training has them, of its size; the network is in training mode within, and unchanged afterwards. (In evaluation
    mode, on examples without augmentation, the floor of a resnet20 came out 0.7 to 1.7 degrees above the angle that
    it really ended at.) Of two or more batches, the odd and the even ones make independent estimates G₁ and G₂, and

        cosθ = ⟨W, ½(G₁ + G₂)⟩ / (‖W‖·√⟨G₁, G₂⟩)

    has no bias in either part, where the noise in one G would make ‖G‖, and so the angle, too large. Only for layers
    that send errors and whose B is moved by amp, with or without decay, and by nothing else; {} without any. It is for
    the caller to know that what amp sees are the plain activations.
    """
    layers = {name: layer for name, layer in _sending(model).items() if _settles_at_second_moments(layer)}
    if not layers:
        return {}
    used: dict[str, Tensor] = {}
    halves: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    examples = [0, 0]
    with _as_in_training(model), torch.no_grad(), _each_input(layers, partial(_mark_used, layers, used)):
        for index, inputs in enumerate(batches):
            examples[index % 2] += len(inputs)
            with _each_input(layers, partial(_add_pull, layers, halves[index % 2])):
                model(inputs)
    result = {}
    for name in (name for name in layers if all(name in half for half in halves)):
        W = layers[name].weight.where(used[name], 0).double()
        one, other = (half[name] / n for half, n in zip(halves, examples, strict=True))
        length = W.norm() * (one * other).sum().sqrt()  # NaN where there are too few examples to tell
        cosine = ((W * (one + other)).sum() / (2 * length)).item()
        result[f"floor_angle/{name}"] = math.degrees(math.acos(min(1.0, cosine)))
    return {**_mean("floor_angle", list(result.values())), **result}


@contextmanager
def _as_in_training(model: nn.Module) -> Iterator[None]:
    """Within, every module is in training mode; afterwards all modes and buffers (running statistics) as before."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.train()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for buffer, before in buffers:
            buffer.copy_(before)


def _settles_at_second_moments(layer: AsymmetricLayer) -> bool:
    """Whether nothing but amp, and decay, moves B."""
    state = layer.state
    moving = {name for name, value in state.coefficients.items() if value}
    plain = not state.activity.is_noise and not state.activity.has_own_energies
    return plain and state.rule.learns and not state.rule.task_gradient and {"amp"} <= moving <= {"amp", "decay"}


def _add_pull(layers: Mapping[str, AsymmetricLayer], sums: dict[str, Tensor], name: str, x: Tensor) -> None:
    """Add kernel_grad(x, W·x) of a batch, what amp pulls B to; the uses of a layer add up, as they do in training."""
    layer = layers[name]
    W = layer.weight
    z = layer.maps.forward(x, W)
    if layer.state.activity.centered:
        x, centred_z = without_mean(layer.maps, x, z, W)
        z = z if centred_z is None else centred_z
    pull = layer.maps.kernel_grad(x, z, W).double()
    sums[name] = sums[name] + pull if name in sums else pull


def _mark_used(layers: Mapping[str, AsymmetricLayer], used: dict[str, Tensor], name: str, x: Tensor) -> None:
    """Add the weights of a layer that this input reaches."""
    reached = layers[name].maps.usable(x.shape, layers[name].weight)
    used[name] = used[name] | reached if name in used else reached


@contextmanager
def _each_input(layers: Mapping[str, AsymmetricLayer], see: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Within, ``see`` gets the name and the input of each layer as it is used; a tensor from it takes that one's place.

    An input without a batch dimension comes as it is.
    """

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor] | None]:
        def hook(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
            seen = see(name, args[0])
            return None if seen is None else (seen,)

        return hook

    hooks = [layer.register_forward_pre_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _sending(model: nn.Module) -> dict[str, AsymmetricLayer]:
    """The layers that send an error down; as long as no backward pass has told, all but the first do."""
    layers = asymmetric_layers(model)
    return {
        name: layer
        for index, (name, layer) in enumerate(layers.items())
        if (index > 0 if layer.state.sends is None else layer.state.sends)
    }


def _mean(name: str, values: list[float]) -> dict[str, float]:
    finite = [v for v in values if math.isfinite(v)]
    return {name: sum(finite) / len(finite)} if finite else {}
