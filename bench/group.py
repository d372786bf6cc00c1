"""Several processes that train one network together: each one's part of a batch, and what is added up over all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, distributed

from bench.config import UserError


class PeerLostError(RuntimeError):
    """Another process of the group is gone, or does not answer: nothing is wrong here."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The ``rank``-th of ``size`` processes; ``share``: its examples, as a part of those of the batch.

    Everything goes through one operation of `torch.distributed`, the sum over all processes, which gives each of them
    the same bits. It is called by all of them, in the same order: what comes before it depends only on what they share.
    Sums are of each process's own part; a mean over its part counts ``share``.
    """

    rank: int
    size: int
    share: float = 1.0

    def over(self, batch: int) -> Group:
        """This process, when batches have so many examples. UserError for fewer than one for each process."""
        if batch < self.size:
            raise UserError(
                f"{self.size} workers cannot share a batch of {batch} examples (batch_size / accumulate); "
                "lower --workers-per-trial, or raise batch_size."
            )
        return replace(self, share=len(self.part(batch)) / batch)

    def part(self, count: int) -> range:
        """Which of ``count`` things are this process's: in turn, so that any first few are divided as the whole is."""
        return range(self.rank, count, self.size)

    def pick(self, count: int, pieces: int = 1) -> list[int]:
        """Which examples of a batch of ``count`` are this process's, if it is cut into ``pieces`` of one size first."""
        piece = count // pieces
        return [start + i for start in range(0, count, piece) for i in self.part(piece)]

    def sum(self, own: Tensor) -> Tensor:
        """Σ own over all processes, a new tensor."""
        return _reduce(own.detach().clone(memory_format=torch.contiguous_format))

    def mean(self, own: Tensor) -> Tensor:
        """The mean over the examples of all processes, from the one over those of this process."""
        return _reduce(own.detach() * self.share)

    def gather(self, own: Tensor) -> Tensor:
        """(size, ...): every process's."""
        rows = own.new_zeros((self.size, *own.shape))
        rows[self.rank] = own
        return _reduce(rows)

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Put Σ over all processes into each of these tensors: one message for each dtype among them."""
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault(tensor.dtype, []).append(tensor)
        for alike in kinds.values():
            _spread(_reduce(torch.cat([t.detach().reshape(-1) for t in alike])), alike)

    def check_equal(self, value: int, complaint: str) -> None:
        """UserError, in every process, if not all have the same number."""
        if len(set(self.gather(torch.tensor(value)).tolist())) > 1:
            raise UserError(complaint)


def _reduce(tensor: Tensor) -> Tensor:
    try:
        distributed.all_reduce(tensor)
    except RuntimeError as error:
        raise PeerLostError("the connection to another process is broken") from error
    return tensor


def _spread(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for tensor, values in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(values.view(tensor.shape))
