"""Batch normalisation of a batch that several processes divide among them: by the statistics of the whole.

torch's SyncBatchNorm does that on GPUs only, and sums up squares; this one runs on either, and combines each process's
mean and variance (Chan et al. 1979, Stanford STAN-CS-79-773), so that no precision is lost where the mean is large.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from bench.config import UserError
from bench.group import Group

#: What can be divided among processes: those whose forward pass is known, exactly of these types.
_KNOWN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class GroupBatchNorm(_BatchNorm):
    """In training y = (x − m) / √(v + eps) · weight + bias, m and v over the batch of the whole group.

    Running statistics, and evaluation, as in the layer that it replaces; all processes have the same.
    """

    group: Group

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training or self.running_mean is None):
            return super().forward(input)
        values = round(input.numel() / input.shape[1] / self.group.share)  # for each channel, in all processes
        if values < 2:
            raise ValueError(
                f"batch normalisation needs more than one value for each channel, not {list(input.shape)}."
            )
        mean, variance = _moments(input.detach(), self.group)
        if self.training and self.running_mean is not None:
            self._follow(mean, variance * (values / (values - 1)))
        y: Tensor = _Normalize.apply(input, self.weight, self.bias, mean, variance, self.eps, self.group)  # type: ignore[no-untyped-call]
        return y

    def _check_input_dim(self, input: Tensor) -> None:
        """Nothing: whatever the layer that it replaces has taken."""

    @torch.no_grad()
    def _follow(self, mean: Tensor, unbiased: Tensor) -> None:
        """Move the running statistics; ``momentum`` None is the mean of all batches so far."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), factor)


class _Normalize(torch.autograd.Function):
    """The way there and back of a normalisation whose statistics are part of the graph, in all processes.

    With x̂ the normalised input, dx = weight / √(v + eps) · (dy − mean of dy − x̂ · mean of dy·x̂), the means over the
    whole group. The gradients of weight and bias are this process's share, to be added up as all others are.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, m: Tensor, v: Tensor, eps: float, group: Group
    ) -> Tensor:
        ctx.save_for_backward(x, weight, m, v)
        ctx.eps, ctx.group = eps, group
        return F.batch_norm(x, m, v, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, m, v = ctx.saved_tensors
        # torch's own kernel, which takes the statistics for constants; what follows is what that leaves out
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, m, v, None, None, False, ctx.eps, [True, True, True]
        )
        wanted = ctx.needs_input_grad
        if wanted[0]:
            count = x.numel() / x.shape[1]
            of_dy, of_both = ctx.group.mean(torch.stack([dbias, dweight]) / count)
            scale = (v + ctx.eps).rsqrt()
            gain = scale if weight is None else scale * weight
            slope = gain * of_both * scale
            shape = (1, -1, *[1] * (x.dim() - 2))
            dx = dx - (gain * of_dy - slope * m).view(shape).to(dx.dtype) - slope.view(shape).to(dx.dtype) * x
        return dx if wanted[0] else None, dweight if wanted[1] else None, dbias if wanted[2] else None, *[None] * 4


def _moments(x: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Mean and variance (with N) of each channel over the whole group's batch; float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
    shares = group.gather(mean.new_tensor(group.share)).view(-1, 1)
    means, variances = group.gather(torch.stack([mean, variance])).unbind(1)
    whole = (shares * means).sum(0)
    return whole, (shares * (variances + (means - whole).square())).sum(0)


def share_norms(model: nn.Module, group: Group) -> None:
    """Put a `GroupBatchNorm` into the place of every batch normalisation, with the same parameters and buffers.

    UserError for a layer that keeps statistics of the batch in a way that is not known here.
    """
    check_norms(model)
    made: dict[nn.Module, GroupBatchNorm] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if type(child) in _KNOWN:
                assert isinstance(child, _BatchNorm)
                parent._modules[name] = made.setdefault(child, _shared(child, group))


def check_norms(model: nn.Module) -> None:
    """UserError for a network with a layer whose statistics of the batch cannot be shared by several processes."""
    for name, module in model.named_modules():
        if type(module) in _KNOWN:
            continue
        if isinstance(module, _BatchNorm) or getattr(module, "running_mean", None) is not None:
            raise UserError(
                f"layer {name!r} is a {type(module).__name__}, whose statistics several workers cannot share here; "
                "leave out --workers-per-trial, or take another arch."
            )


def _shared(layer: _BatchNorm, group: Group) -> GroupBatchNorm:
    new = GroupBatchNorm.__new__(GroupBatchNorm)
    new.__dict__.update(layer.__dict__)
    new.__dict__.update(_parameters=dict(layer._parameters), _buffers=dict(layer._buffers))
    new.group = group
    return new
