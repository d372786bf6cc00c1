"""CIFAR-10 and CIFAR-100 in the published binary version: plain bytes, nothing to unpickle.

A record is one or two label bytes, then 3 x 32 x 32 bytes: red, green, blue planes, row by row.
Source: Krizhevsky 2009, www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.config import UserError
from bench.datasets.draws import Indices
from bench.datasets.fetch import download, say, sha256_of, user_cache, writable_folder
from bench.datasets.raw import Arrays, DatasetRow, Pixels, Request, digest_arrays

_SHAPE = (3, 32, 32)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which files the archive has, and their records. ``label_ranges``: one per label byte; the last one counts."""

    folder: str
    train: tuple[str, ...]
    test: str
    label_ranges: tuple[int, ...]
    records: dict[str, int]


_BATCHES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
CIFAR10 = Layout(
    folder="cifar-10-batches-bin",
    train=_BATCHES,
    test="test_batch.bin",
    label_ranges=(10,),
    records=dict.fromkeys((*_BATCHES, "test_batch.bin"), 10_000),
)
CIFAR100 = Layout(
    folder="cifar-100-binary",
    train=("train.bin",),
    test="test.bin",
    label_ranges=(20, 100),
    records={"train.bin": 50_000, "test.bin": 10_000},
)


def read_cifar10(row: DatasetRow, request: Request) -> Arrays:
    return _read(row, request, CIFAR10)


def read_cifar100(row: DatasetRow, request: Request) -> Arrays:
    """With the 100 fine labels; the 20 coarse ones are only checked."""
    return _read(row, request, CIFAR100)


def parse_records(content: bytes, label_ranges: tuple[int, ...], where: str) -> tuple[Pixels, Indices]:
    """Images (n, 3, 32, 32) and labels (n,) of one binary file. Errors: UserError that names ``where``."""
    width = len(label_ranges)
    size = width + int(np.prod(_SHAPE))
    if not content or len(content) % size:
        raise UserError(f"{where}: {len(content)} bytes are not whole records of {size}; fetch it again.")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, size)
    for column, limit in enumerate(label_ranges):
        if (highest := records[:, column].max()) >= limit:
            raise UserError(f"{where}: label {highest} is out of range 0 ... {limit - 1}; fetch it again.")
    return records[:, width:].reshape(-1, *_SHAPE), records[:, width - 1].astype(np.int64)


def _read(row: DatasetRow, request: Request, layout: Layout) -> Arrays:
    contents, where = _contents(row, request.data_dir, layout)
    parsed = {}
    for name in (*layout.train, layout.test):
        parsed[name] = parse_records(contents[name], layout.label_ranges, f"{where}: {name}")
        if (n := len(parsed[name][1])) != layout.records[name]:
            say(f"{where}: {name} has {n} images, not the published {layout.records[name]}.")
    pixels = {"train": np.concatenate([parsed[name][0] for name in layout.train]), "test": parsed[layout.test][0]}
    labels = {"train": np.concatenate([parsed[name][1] for name in layout.train]), "test": parsed[layout.test][1]}
    digest = digest_arrays(pixels, labels)
    return Arrays(digest=digest, classes=layout.label_ranges[-1], pixels=pixels, labels=labels)


def _contents(row: DatasetRow, data_dir: Path | None, layout: Layout) -> tuple[dict[str, bytes], Path]:
    """The bytes of each file, and where they come from: loose files, else the archive, else a download."""
    if data_dir is None:
        archive = download(row.files[0], writable_folder([user_cache() / row.name]), row.advice)
        return _unpack(archive, row, layout), archive
    for folder in (data_dir, data_dir / layout.folder):
        if all((folder / name).is_file() for name in layout.records):
            return _loose(folder, layout), folder
    archive = data_dir / row.files[0].name
    if not archive.is_file():
        names = ", ".join(layout.records)
        raise UserError(f"{data_dir} has neither {archive.name} nor all of {names}. {row.advice}")
    return _unpack(archive, row, layout), archive


def _loose(folder: Path, layout: Layout) -> dict[str, bytes]:
    try:
        return {name: (folder / name).read_bytes() for name in layout.records}
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions.") from error


def _unpack(archive: Path, row: DatasetRow, layout: Layout) -> dict[str, bytes]:
    """The archive's files, in memory: nothing is extracted, and other members are passed over."""
    found: dict[str, bytes] = {}
    try:
        if (sha := sha256_of(archive)) != row.files[0].sha256:
            raise UserError(f"{archive}: sha256 {sha} is not that of the published archive; delete it. {row.advice}")
        with tarfile.open(archive, "r|gz") as members:
            for member in members:
                name = Path(member.name).name
                if name in layout.records and (stream := members.extractfile(member)):
                    found[name] = stream.read()
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{archive}: cannot be read ({error}); delete it. {row.advice}") from error
    if missing := [name for name in layout.records if name not in found]:
        raise UserError(f"{archive}: has no {', '.join(missing)}; delete it. {row.advice}")
    return found
