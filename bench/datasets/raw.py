"""What a reader is asked for, and what it gives back: the raw data of a set, before it is split."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from bench.datasets.draws import Indices
from bench.datasets.fetch import RemoteFile

Split = Literal["train", "val", "test"]
Pixels = npt.NDArray[np.uint8]

#: More than this of uint8 pixels is not kept in memory (and on the device).
MEMORY_LIMIT = 4 * 2**30


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of `bench.datasets.load`."""

    name: str
    data_dir: Path | None
    split_seed: int
    val_fraction: float
    train_examples: int | None
    image_size: int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrays:
    """A set in memory. Parts: train, test, perhaps val; pixels (n, channels, h, h), labels (n,)."""

    digest: str
    classes: int
    pixels: Mapping[str, Pixels]
    labels: Mapping[str, Indices]


@dataclass(frozen=True, kw_only=True, eq=False)
class Files:
    """A set of image files, decoded whenever they are read. Parts as in Arrays.

    ``native``: all images have ``image_size`` already, and evaluation shows them as they are.
    """

    digest: str
    classes: int
    image_size: int
    native: bool
    paths: Mapping[str, list[str]]
    labels: Mapping[str, Indices]


@dataclass(frozen=True, kw_only=True)
class DatasetRow:
    """One data set, as data. ``flip``: a mirrored image is still of its class. ``advice``: how to get the files.

    ``classes``: how many; None where that depends on the files.
    """

    name: str
    summary: str
    source: str
    read: Callable[[DatasetRow, Request], Arrays | Files]
    flip: bool
    classes: int | None = None
    files: tuple[RemoteFile, ...] = ()
    advice: str = ""


def digest_arrays(pixels: Mapping[str, Pixels], labels: Mapping[str, Indices]) -> str:
    """Sixteen hexadecimal digits: sha256 over each part's name, shape, labels (int64) and pixels, parts by name."""
    sha = hashlib.sha256()
    for part in sorted(pixels):
        sha.update(f"{part}{pixels[part].shape}".encode())
        sha.update(np.ascontiguousarray(labels[part], dtype="<i8").data)
        sha.update(np.ascontiguousarray(pixels[part]).data)
    return sha.hexdigest()[:16]
