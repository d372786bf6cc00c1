"""How well the feedback path fits the forward path: angles, norm ratios, and the error that really arrives."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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

    The mean leaves out the first layer, whose B has no effect on anything.
    """
    result: dict[str, float] = {}
    for name, layer in _effective_layers(model).items():
        W, B = layer.weight, layer.feedback_weight()
        result[f"angle/{name}"] = angle(W, B)
        result[f"norm_ratio/{name}"] = (B.norm() / W.norm()).item()
    return _with_mean(result, "angle")


def error_alignment(model: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, float]:
    """Per layer ``dx_angle/NAME``, degrees between the dx it sends and the one backprop would have sent.

    Both come from the same forward pass, in evaluation mode, under cross-entropy: one backward pass through
    B, one through Wᵀ. Only what the layer itself sends counts, not what goes past it in a skip connection.
    The first layer, which sends nothing, is left out. The model is unchanged afterwards.
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
    training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            loss = F.cross_entropy(model(inputs), labels)
            through_b = torch.autograd.grad(loss, list(sent.values()), retain_graph=True) if sent else ()
            with exact_gradients(model):
                true = torch.autograd.grad(loss, list(sent.values())) if sent else ()
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    result = {f"dx_angle/{name}": angle(a, b) for name, a, b in zip(sent, through_b, true, strict=True)}
    return _with_mean(result, "dx_angle")


def _effective_layers(model: nn.Module) -> dict[str, AsymmetricLayer]:
    """All asymmetric layers but the first, which has nothing below it to send an error to."""
    return dict(list(asymmetric_layers(model).items())[1:])


def _with_mean(result: dict[str, float], name: str) -> dict[str, float]:
    values = [v for key, v in result.items() if key.startswith(f"{name}/") and math.isfinite(v)]
    return {name: sum(values) / len(values), **result} if values else result
