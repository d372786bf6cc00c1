"""The straightforward way to train with feedback weights: autograd on the energies, added to the loss.

Slow and plain on purpose: what `bench.learning` computes by hand is compared with it, in numbers (test_obvious.py) and
in time (tests/benchmarks/step_autograd.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.config import TrialConfig
from bench.datasets import ImageData
from bench.learning.layers import AsymmetricLayer, asymmetric_layers
from bench.learning.primitives import PRIMITIVES
from bench.learning.rules import parse_rule
from bench.steps import Contestant, kept_by
from bench.training import Trial, prepare, resolve_coefficients


class Obvious:
    """A network whose B is a parameter like any other; ``trial``: of a fixed B, and an optimizer that moves it."""

    def __init__(self, config: TrialConfig, data: ImageData | None, device: str) -> None:
        self.rule = parse_rule(config.rule)
        if not self.rule.learns:
            self.trial: Trial = prepare(config, data=data, device=device)
            self.coefficients: dict[str, float] = {}
            return
        self.coefficients = resolve_coefficients(config, self.rule)
        fixed = config.replace(rule="feedback", coefficients={}, feedback_fraction=1.0)
        self.trial = prepare(fixed, data=data, device=device)
        self.layers = list(asymmetric_layers(self.trial.model).values())
        self.seen: list[tuple[AsymmetricLayer, Tensor, Tensor]] = []
        own = [B for layer in self.layers if (B := layer.feedback) is not None]
        for B in own:
            B.requires_grad_()
        self.trial.optimizer.add_param_group({"name": "feedback", "params": own, "lr": config.lr, "weight_decay": 0.0})
        for layer in self.layers:
            layer.register_forward_hook(self._see)

    def _see(self, layer: nn.Module, given: tuple[Any, ...], out: Tensor) -> None:
        assert isinstance(layer, AsymmetricLayer)
        if given[0].requires_grad:  # the first layer's B has no effect
            z = out.detach() if layer.bias is None else out.detach() - layer.maps.channelwise(layer.bias.detach())
            self.seen.append((layer, given[0].detach(), z))

    def energy(self) -> Tensor:
        """Of all that the last pass went through."""
        parts = [
            c * PRIMITIVES[name].energy(layer.maps, x, z, layer.weight.detach(), layer.feedback)
            for layer, x, z in self.seen
            for name, c in self.coefficients.items()
            if layer.feedback is not None
        ]
        self.seen.clear()
        return torch.stack(parts).sum()

    def step(self, x: Tensor, labels: Tensor) -> None:
        optimizer = self.trial.optimizer
        optimizer.zero_grad(set_to_none=True)
        with self.trial.autocast():
            logits = self.trial.model(x)
            loss = F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, labels)
            if self.coefficients:
                loss = loss + self.energy()
        loss.backward()  # type: ignore[no-untyped-call]
        if self.rule.task_gradient:
            for layer in self.layers:
                if layer.feedback is not None and layer.feedback.grad is not None and layer.weight.grad is not None:
                    layer.feedback.grad += layer.weight.grad
        optimizer.step()


def contestant(config: TrialConfig, data: ImageData, x: Tensor, labels: Tensor) -> Contestant:
    """One step of it, as `bench.steps` times it."""
    obvious = Obvious(config, data, str(x.device))
    return lambda: obvious.step(x, labels), kept_by(obvious.trial)
