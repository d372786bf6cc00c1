"""Real processes that meet in torch.distributed, as Ray Train's do: what the tests of groups run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

from bench.group import Group

#: (group, folder) to something that torch.save takes; of a module, so that another process finds it.
Part = Callable[[Group, Path], Any]


def together(part: Part, size: int, folder: Path) -> list[Any]:
    """What each of ``size`` processes gave back."""
    folder.mkdir(parents=True, exist_ok=True)
    multiprocessing.spawn(_process, (size, part, folder), nprocs=size)
    return [torch.load(folder / f"of-{rank}", weights_only=True) for rank in range(size)]


def _process(rank: int, size: int, part: Part, folder: Path) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder / 'meet'}"
    distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=size)
    torch.save(part(Group(rank=rank, size=size), folder), folder / f"of-{rank}")
    distributed.barrier()
    distributed.destroy_process_group()
