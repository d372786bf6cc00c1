"""Accuracy and loss of a network on one split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.group import Group

#: Examples in one evaluation batch: large, because nothing is kept for a backward pass.
BATCH = 512


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within, every module is in evaluation mode; afterwards in the mode that it was in, after an exception too."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def accuracy(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    normalize: Callable[[Tensor], Tensor],
    group: Group | None = None,
) -> dict[str, float]:
    """``acc`` and ``top5`` (fractions of 1) and ``loss`` (mean cross-entropy, nats), without a gradient.

    ``batches`` yields (pixels, labels). The model is in evaluation mode within, and afterwards as it was, module by
    module. With fewer than five classes top5 counts all of them. One synchronisation with the device, at the end.
    ``group``: the batches are this process's part, perhaps none; what comes out is of all.
    """
    sums: Tensor | None = None
    count = 0
    with evaluation_mode(model), torch.inference_mode():
        for pixels, labels in batches:
            logits = model(normalize(pixels)).float()
            right, index = logits.gather(1, labels[:, None]), torch.arange(logits.shape[1], device=logits.device)
            # of equal logits the first wins, as in argmax: ties, which bfloat16 makes often, are not all right
            ranks = ((logits > right) | ((logits == right) & (index < labels[:, None]))).sum(1)
            # NaN compares false with everything, which would make every answer right
            ranks = torch.where(logits.isfinite().all(1), ranks, logits.shape[1])
            loss = F.cross_entropy(logits, labels, reduction="sum")
            part = torch.stack([(ranks < 1).sum().double(), (ranks < 5).sum().double(), loss.double()])
            sums = part if sums is None else sums + part
            count += len(labels)
    if group is not None:
        sums, count = _of_all(sums, count, next(model.parameters()).device, group)
    if sums is None or not count:
        raise ValueError("no examples to evaluate")
    acc, top5, loss_mean = (sums / count).tolist()
    return {"acc": acc, "top5": top5, "loss": loss_mean}


def _of_all(sums: Tensor | None, count: int, device: torch.device, group: Group) -> tuple[Tensor, int]:
    own = torch.zeros(4, dtype=torch.float64, device=device)
    if sums is not None:
        own[:3], own[3] = sums, count
    whole = group.sum(own)
    return whole[:3], round(whole[3].item())
