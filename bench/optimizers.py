"""What moves the weights: SGD, AdamW or Muon, over the groups of `bench.learning.learner.parameter_groups`.

Torch's own kernels do the arithmetic. With ``feedback_optimizer = "shared"`` the feedback weights are a group of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.config import TrialConfig, UserError, WeightOptimizer

#: torch.optim.AdamW's own; beta1 is TrialConfig's ``momentum``.
BETA2 = 0.999
#: Newton-Schulz steps of Muon, as in arXiv 2606.11123 (feedback alignment) and KellerJordan/cifar10-airbench;
#: torch's default, for language models, is 5.
NS_STEPS = 3
#: torch.optim.Muon's defaults: the coefficients of the iteration, and what keeps its norm from 0.
NS_COEFFICIENTS, NS_EPS = (3.4445, -4.775, 2.0315), 1e-7

Groups = Sequence[dict[str, Any]]


def make_optimizer(config: TrialConfig, groups: Groups, device: torch.device) -> torch.optim.Optimizer:
    """The one optimizer that the configuration names, over these groups: their learning rates and weight decays.

    AdamW's and Muon's weight decay is decoupled (θ ← θ·(1 − lr·decay)); SGD's is part of the gradient.
    """
    return OPTIMIZERS[config.optimizer](config, groups, device.type in ("cpu", "cuda"))


# fused: one pass over the weights instead of four, which at small batches is a sixth of a step on a CPU
def _sgd(config: TrialConfig, groups: Groups, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused)


def _adamw(config: TrialConfig, groups: Groups, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, BETA2), fused=fused)


def _muon(config: TrialConfig, groups: Groups, fused: bool) -> torch.optim.Optimizer:
    return Muon(groups, momentum=config.momentum, nesterov=config.nesterov, fused=fused)


OPTIMIZERS: dict[WeightOptimizer, Callable[[TrialConfig, Groups, bool], torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "adamw": _adamw,
    "muon": _muon,
}


class Muon(torch.optim.Optimizer):
    """Muon on the groups of matrices and kernels, AdamW (torch's betas) on those of norms and biases.

    With m the momentum buffer and O = NS(u) the update u made orthogonal by `NS_STEPS` Newton-Schulz steps (bfloat16)::

        m ← μ·m + (1 − μ)·g;   u = μ·m + (1 − μ)·g (Nesterov; else m);   W ← (1 − lr·decay)·W − lr·0.2·√max(A, B)·O

    A kernel (out, in, h, w) is the matrix A × B of out × in·h·w. The factor 0.2·√max(A, B) gives the update the root
    mean square of AdamW's, so that one learning rate serves both (Liu et al. 2025, arXiv 2502.16982).

    ``groups``: each with its ``lr``, of parameters of two dimensions and more, or of fewer. UserError for a torch
    without Muon. Sources: Jordan 2024, kellerjordan.github.io/posts/muon; torch's Muon, whose function does this.
    """

    def __init__(self, groups: Groups, *, momentum: float, nesterov: bool, fused: bool = False) -> None:
        try:
            # private (torch 2.13): the public torch.optim.Muon does the same, but takes matrices only, no kernels
            from torch.optim._muon import muon
        except ImportError as error:
            raise UserError(f"optimizer 'muon' is not in torch {torch.__version__}; install 2.9 or later.") from error
        self._muon = muon
        small = [group for group in groups if any(p.dim() < 2 for p in group["params"])]
        self._adamw = torch.optim.AdamW(small, fused=fused) if small else None
        settings = {
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": NS_STEPS,
            "ns_coefficients": NS_COEFFICIENTS,
            "eps": NS_EPS,
            "adjust_lr_fn": "match_rms_adamw",
        }
        super().__init__([g if any(g is s for s in small) else {**settings, **g} for g in groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002  (torch's signature)
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            if "betas" not in group:
                self._step_matrices(group)
        if self._adamw is not None:  # its settings and state are in ours, of which load_state_dict makes others
            self._adamw.param_groups = [group for group in self.param_groups if "betas" in group]
            self._adamw.state = self.state
            self._adamw.step()

    def _step_matrices(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        self._muon(
            [_matrix(p) for p in params],
            [_matrix(laid_out_as(p, p.grad)) for p in params],
            [_matrix(self.state[p]["momentum_buffer"]) for p in params],
            **{name: group[name] for name in ("lr", "weight_decay", "momentum", "nesterov")},
            **{name: group[name] for name in ("ns_steps", "ns_coefficients", "eps", "adjust_lr_fn")},
            has_complex=False,
        )


def laid_out_as(p: Tensor, tensor: Tensor) -> Tensor:
    """``tensor`` in the memory format of ``p``: itself, or a copy."""
    return tensor if tensor.stride() == p.stride() else torch.empty_like(p).copy_(tensor)


def _matrix(tensor: Tensor) -> Tensor:
    """The tensor as a matrix of ``len(tensor)`` rows: a view, its columns in the order in which they lie in memory.

    Muon does not see the order of columns: NS(G·P) = NS(G)·P for a permutation P.
    """
    order = sorted(range(1, tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(0, *order).view(len(tensor), -1)


def make_feedback_optimizer(config: TrialConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Make B's own optimizer: SGD with heavy-ball momentum, or Adam (momentum is its beta1)."""
    assert config.feedback_lr is not None
    groups = [{**group, "lr": config.feedback_lr} for group in groups]
    if config.feedback_optimizer == "adam":
        return torch.optim.Adam(groups, betas=(config.feedback_momentum, 0.999), fused=True)
    return torch.optim.SGD(groups, momentum=config.feedback_momentum, fused=True)
