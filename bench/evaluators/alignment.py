"""How well the feedback path fits the forward path: angles, norm ratios, and the error that really arrives."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.evaluators.accuracy import evaluation_mode
from bench.learning.layers import AsymmetricLayer, asymmetric_layers, exact_gradients


def angle(left: Tensor, right: Tensor) -> float:
    """The angle between two tensors, taken as vectors, in degrees: 0 parallel, 90 unrelated; NaN if one is zero.

    By atan2 of the half-angle (Kahan), which keeps its precision near 0 and 180 degrees.
    """
    a, b = left.detach().double().flatten(), right.detach().double().flatten()
    a, b = a / a.norm(), b / b.norm()
    return math.degrees(2.0 * math.atan2((a - b).norm().item(), (a + b).norm().item()))


def weight_alignment(model: nn.Module) -> dict[str, float]:
    """Per layer ``angle/NAME`` between W and B (degrees) and ``norm_ratio/NAME`` = ‖B‖/‖W‖; ``angle``, their mean.

    The mean leaves out the layers that send no error down, the first of the network, whose B has no effect.
    """
    result: dict[str, float] = {}
    layers = asymmetric_layers(model)
    for name, layer in layers.items():
        W, B = layer.weight, layer.feedback_weight()
        result[f"angle/{name}"] = angle(W, B)
        result[f"norm_ratio/{name}"] = (B.norm() / W.norm()).item()
    sending = [name for i, (name, layer) in enumerate(layers.items()) if _sends(layer, first=i == 0)]
    return {**_mean("angle", [result[f"angle/{name}"] for name in sending]), **result}


def error_alignment(model: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, float]:
    """Per layer ``dx_angle/NAME``, degrees between the dx it sends and the one backprop would have sent.

    Both come from the same forward pass, in evaluation mode, under cross-entropy: one backward pass through
    B, one through Wᵀ. Only what the layer itself sends counts, not what goes past it in a skip connection.
    Layers that send nothing (the first) or have no part in the loss are left out; of a layer that is used
    several times, the last use counts. The model is unchanged afterwards.
    """
    sent: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor] | None]:
        def hook(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
            if not args[0].requires_grad:
                return None
            sent[name] = args[0].view_as(args[0])
            return (sent[name],)

        return hook

    layers = asymmetric_layers(model)
    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with evaluation_mode(model), torch.enable_grad():
            loss = F.cross_entropy(model(inputs), labels)
            inputs_of = list(sent.values())
            through_b = torch.autograd.grad(loss, inputs_of, retain_graph=True, allow_unused=True) if sent else ()
            with exact_gradients(model):
                true = torch.autograd.grad(loss, inputs_of, allow_unused=True) if sent else ()
    finally:
        for hook in hooks:
            hook.remove()
    pairs = {name: (a, b) for name, a, b in zip(sent, through_b, true, strict=True) if a is not None is not b}
    result = {f"dx_angle/{name}": angle(a, b) for name, (a, b) in pairs.items()}
    return {**_mean("dx_angle", list(result.values())), **result}


def _sends(layer: AsymmetricLayer, *, first: bool) -> bool:
    """Whether the layer sends an error down; as long as no backward pass has told, all but the first do."""
    return not first if layer.state.sends is None else layer.state.sends


def _mean(name: str, values: list[float]) -> dict[str, float]:
    finite = [v for v in values if math.isfinite(v)]
    return {name: sum(finite) / len(finite)} if finite else {}
