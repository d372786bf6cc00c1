"""Small files in the published formats, for the tests of bench.datasets: nothing here is downloaded."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CIFAR10_FILES = ("data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin", "data_batch_4.bin", "data_batch_5.bin")


def idx(array: np.ndarray) -> bytes:
    """An IDX file of unsigned bytes."""
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def idx_contents(train: int = 100, test: int = 20, side: int = 16) -> dict[str, bytes]:
    """The four files of an MNIST or Fashion-MNIST of this size: classes in turn, random pixels."""
    rng = np.random.default_rng(0)
    contents = {}
    for prefix, n in (("train", train), ("t10k", test)):
        contents[f"{prefix}-images-idx3-ubyte"] = idx(rng.integers(0, 256, (n, side, side), dtype=np.uint8))
        contents[f"{prefix}-labels-idx1-ubyte"] = idx(np.arange(n, dtype=np.uint8) % 10)
    return contents


def write_idx(folder: Path, *, zipped: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in idx_contents().items():
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(content) if zipped else content)
    return folder


def cifar_records(n: int, *classes: int, seed: int = 0) -> bytes:
    """n records of one label byte per entry of ``classes`` (labels in turn) and 3072 random ones."""
    rng = np.random.default_rng(seed)
    labels = np.stack([np.arange(n) % limit for limit in classes], axis=1).astype(np.uint8)
    return np.concatenate([labels, rng.integers(0, 256, (n, 3072), dtype=np.uint8)], axis=1).tobytes()


def cifar10_contents() -> dict[str, bytes]:
    names = (*CIFAR10_FILES, "test_batch.bin")
    return {name: cifar_records(20, 10, seed=i) for i, name in enumerate(names)}


def cifar100_contents() -> dict[str, bytes]:
    return {"train.bin": cifar_records(400, 20, 100), "test.bin": cifar_records(100, 20, 100, seed=1)}


def write_files(folder: Path, contents: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def archive(contents: dict[str, bytes]) -> bytes:
    """A .tar.gz with these members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return gzip.compress(out.getvalue(), mtime=0)  # the same bytes at any time


def write_folder(
    root: Path, parts: dict[str, int], size: tuple[int, int] = (16, 16), classes: tuple[str, ...] = ("cat", "dog")
) -> Path:
    """PNG images (lossless) of random 4 x 4 blocks, ``parts[part]`` per class, named NN.png."""
    rng = np.random.default_rng(0)
    for part, n in parts.items():
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                blocks = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
                blocks.resize(size, Image.Resampling.BICUBIC).save(root / part / name / f"{i:02}.png")
    return root
