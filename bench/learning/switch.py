"""What layers are told about learning: whether B collects its gradient now, and from how much of a batch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bench.group import Group


class Switch:
    """Whether layers collect B's gradient now. Owned by a `FeedbackLearner`, shared by its layers.

    ``release`` undoes that learner's hooks, when another one takes its layers over. ``group``: the processes among
    which each batch is divided. ``fraction``: the share of each batch's examples that B learns from.
    """

    def __init__(self, release: Callable[[], None], group: Group | None = None, fraction: float = 1.0) -> None:
        self.on = True
        self.release = release
        self.group = group
        self.fraction = fraction

    def seen(self, x: Tensor) -> tuple[Tensor, Group | None]:
        """The first examples of x (n, ...), as many as B learns from (a view); and the processes that share those."""
        if self.fraction == 1.0:
            return x, self.group
        if self.group is None:
            return x[: examples_seen(self.fraction, len(x))], None
        first = examples_seen(self.fraction, round(len(x) / self.group.share))
        return x[: len(self.group.part(first))], self.group.over(first)


def examples_seen(fraction: float, batch: int) -> int:
    """How many of a batch's examples this share is: the nearest whole number, but one at least."""
    return max(1, round(fraction * batch))
