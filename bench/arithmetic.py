"""The arithmetic of a training step: what a rule's formulas cost as they stand, beside backprop on the same network.

Counted are the multiplications of convolutions and linear layers, layer by layer as a forward pass meets them. What is
elementwise counts nothing, nor does a weight that is in neither kind of layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from bench.learning.layers import AsymmetricLayer
from bench.learning.rules import RULES, Rule


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One use of a layer in a pass. ``products``: multiplications of one of its maps, for the whole batch; ``weights``:
    the size of its W, the multiplications of one of its maps for one noise patch.

    ``sends``: its input needs a gradient. ``learns``: its W does. ``feeds``: it has a B of its own.
    """

    name: str
    products: int
    weights: int
    sends: bool
    learns: bool
    feeds: bool

    @property
    def maps(self) -> int:
        """forward, transpose and kernel_grad, as far as a step of the task needs them."""
        return 1 + self.sends + self.learns


def layers_of(model: nn.Module, x: Tensor) -> list[Layer]:
    """The layers that a training pass of x (n, channels, h, w) meets; the model is left as it was."""
    found: list[Layer] = []
    hooks = [
        module.register_forward_hook(partial(_note, found, name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)
    ]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    training = model.training
    try:
        model.train()(x)
    finally:
        for hook in hooks:
            hook.remove()
        model.load_state_dict(state)  # norms have counted the pass
        model.train(training)
    return found


def _note(found: list[Layer], name: str, module: Any, given: tuple[Tensor, ...], out: Tensor) -> None:
    per_output = module.weight[0].numel()  # inputs that one output is the weighted sum of
    found.append(
        Layer(
            name=name,
            products=out.numel() * per_output,
            weights=module.weight.numel(),
            sends=given[0].requires_grad,
            learns=module.weight.requires_grad,
            feeds=isinstance(module, AsymmetricLayer),
        )
    )


def products(layers: Sequence[Layer], rule: Rule, fraction: float = 1.0, samples: int = 0) -> float:
    """The multiplications of one training step.

    B learns from this share of each batch's examples, or from so many noise patches. Of a layer that sends nothing down
    B has no effect, and does not learn.
    """
    task = sum(layer.products * layer.maps for layer in layers)
    fed = [layer for layer in layers if layer.feeds and layer.sends]
    if samples:
        return task + samples * rule.noise_maps * sum(layer.weights for layer in fed)
    return task + fraction * rule.maps * sum(layer.products for layer in fed)


def floor(
    layers: Sequence[Layer], backprop: Sequence[Layer], rule: Rule, fraction: float = 1.0, samples: int = 0
) -> float:
    """A step's multiplications in those of backprop: ``layers`` of the rule's network, ``backprop`` of a plain one."""
    return products(layers, rule, fraction, samples) / products(backprop, RULES["backprop"])
