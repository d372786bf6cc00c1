"""ImageNet-size sets: decoded anew for each epoch by the worker processes of a torch DataLoader."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.config import UserError
from bench.datasets.augment import centre_box, random_box
from bench.datasets.decode import ZOOM, decode, in_threads, resized
from bench.datasets.draws import Indices
from bench.datasets.image_data import Batch, Pick, windows
from bench.datasets.memory import as_pixels
from bench.datasets.raw import Files, Pixels, Split

_SHARED_MEMORY = Path("/dev/shm")
_PREFETCH, _MAX_WORKERS = 2, 16
#: How many training images, evenly spaced, give the mean and the standard deviation.
_SAMPLE = 1024


@dataclass(frozen=True)
class Task:
    """One image to decode. ``words``: (seed, epoch, number) of its augmentation."""

    path: str
    label: int
    words: tuple[int, int, int] | None


@dataclass(frozen=True)
class Decoder(Dataset[tuple[Pixels, int] | str]):
    """Indexed by a Task, so that the workers hold no lists and no state: the result cannot depend on them."""

    image_size: int
    native: bool

    def __getitem__(self, task: Task) -> tuple[Pixels, int] | str:
        """Pixels (h, h, 3) and the label; or, for a damaged file, the message (an exception would lose its form)."""
        try:
            return self.pixels(task), task.label
        except UserError as error:
            return str(error)

    def pixels(self, task: Task) -> Pixels:
        """The image, cropped and resized (at random for training with augmentation, else its centre)."""
        image = decode(task.path)
        if task.words is None:
            return resized(image, self.image_size, centre_box(*image.size, 1.0 if self.native else ZOOM))
        box, mirror = random_box(*image.size, *task.words)
        out = resized(image, self.image_size, box)
        return out[:, ::-1] if mirror else out


@dataclass(frozen=True)
class _Tasks:
    """The batches of one pass, made as they are needed: the list of a million tasks would be slow to make."""

    paths: list[str]
    labels: Indices
    order: Indices
    batch_size: int
    draw: tuple[int, int] | None
    pick: Pick

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[list[Task]]:
        for window in windows(len(self.order), self.batch_size, self.pick):
            yield [self._task(int(i)) for i in self.order[window]]

    def _task(self, i: int) -> Task:
        return Task(self.paths[i], int(self.labels[i]), None if self.draw is None else (*self.draw, i))


@dataclass(frozen=True, eq=False)
class StreamSource:
    """Paths and labels (n,) of each split."""

    paths: dict[Split, list[str]]
    labels: dict[Split, Indices]
    decoder: Decoder

    def batches(
        self,
        split: Split,
        order: Indices,
        batch_size: int,
        device: torch.device,
        draw: tuple[int, int] | None,
        pick: Pick = None,
    ) -> Iterator[Batch]:
        tasks = _Tasks(self.paths[split], self.labels[split], order, batch_size, draw, pick)
        for item in self._loader(tasks, pin=device.type == "cuda"):
            if isinstance(item, str):
                raise UserError(item)
            images, labels = (tensor.to(device, non_blocking=True) for tensor in item)
            yield as_pixels(images.permute(0, 3, 1, 2)), labels

    def _loader(self, tasks: _Tasks, *, pin: bool) -> DataLoader[tuple[Pixels, int] | str]:
        workers = _workers()
        _check_shared_memory(tasks.batch_size * 3 * self.decoder.image_size**2 * (workers * _PREFETCH + 1))
        # Not fork: this process has threads (Ray's, CUDA's), and a lock that one holds would stay held in the child.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        return DataLoader(
            self.decoder,
            batch_sampler=tasks,
            num_workers=workers,
            prefetch_factor=_PREFETCH,
            collate_fn=collate,
            pin_memory=pin,
            multiprocessing_context=context,
            generator=torch.Generator(),  # or it would draw from the global one
        )

    def sample(self) -> Tensor:
        """Some training images as evaluation would show them, (n, 3, h, h) uint8."""
        count = len(self.paths["train"])
        chosen = np.unique(np.linspace(0, count - 1, min(count, _SAMPLE)).astype(np.int64))
        tasks = [Task(self.paths["train"][i], 0, None) for i in chosen]
        return torch.from_numpy(np.stack(in_threads(self.decoder.pixels, tasks))).permute(0, 3, 1, 2)


def stream_source(raw: Files, members: dict[Split, tuple[str, Indices]]) -> StreamSource:
    """The splits of a set of files."""
    paths = {split: [raw.paths[part][i] for i in at] for split, (part, at) in members.items()}
    labels = {split: raw.labels[part][at] for split, (part, at) in members.items()}
    return StreamSource(paths, labels, Decoder(raw.image_size, raw.native))


def collate(items: list[tuple[Pixels, int] | str]) -> tuple[Tensor, Tensor] | str:
    """One batch, (n, h, h, 3) uint8 and (n,) int64; or the first message."""
    good = [item for item in items if not isinstance(item, str)]
    if len(good) < len(items):
        return next(item for item in items if isinstance(item, str))
    images = np.stack([pixels for pixels, _ in good])
    return torch.from_numpy(images), torch.tensor([label for _, label in good])


def _workers() -> int:
    """As many as torch may use threads: Ray sets that to the trial's share of the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(torch.get_num_threads(), cores, _MAX_WORKERS)


def _check_shared_memory(needed: int) -> None:
    """Batches come back through shared memory; where it is too small, the process would die of SIGBUS."""
    if not _SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if free < needed:
        raise UserError(
            f"loading images needs {needed >> 20} MiB in {_SHARED_MEMORY}, which has {free >> 20}; "
            "give the container more (--shm-size), or lower batch_size."
        )
