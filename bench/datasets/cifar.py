"""CIFAR-10 and CIFAR-100 in two of the published versions: the binary one, which is downloaded, and that for Python.

A record is one or two label bytes, then 3 x 32 x 32 bytes: red, green, blue planes, row by row. The version for Python
has the same in pickles, which are not run (`bench.datasets.pickles`), and becomes records first.
Source: Krizhevsky 2009, www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.config import UserError
from bench.datasets.draws import Indices
from bench.datasets.fetch import RemoteFile, download, say, sha256_of, user_cache, writable_folder
from bench.datasets.pickles import array_of, read_pickle
from bench.datasets.raw import Arrays, DatasetRow, Pixels, Request, digest_arrays

_SHAPE = (3, 32, 32)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which files the archive has, and their records. ``label_ranges``: one per label byte; the last one counts.

    ``python_folder``, ``label_keys``: of the version for Python, whose files have the same names without ``.bin``.
    """

    folder: str
    train: tuple[str, ...]
    test: str
    label_ranges: tuple[int, ...]
    records: dict[str, int]
    python_folder: str
    label_keys: tuple[bytes, ...]

    def names(self, *, python: bool) -> dict[str, str]:
        """The files of a version, each with the name of the binary one that it is."""
        return {name.removesuffix(".bin") if python else name: name for name in self.records}


_BATCHES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
CIFAR10 = Layout(
    folder="cifar-10-batches-bin",
    train=_BATCHES,
    test="test_batch.bin",
    label_ranges=(10,),
    records=dict.fromkeys((*_BATCHES, "test_batch.bin"), 10_000),
    python_folder="cifar-10-batches-py",
    label_keys=(b"labels",),
)
CIFAR100 = Layout(
    folder="cifar-100-binary",
    train=("train.bin",),
    test="test.bin",
    label_ranges=(20, 100),
    records={"train.bin": 50_000, "test.bin": 10_000},
    python_folder="cifar-100-python",
    label_keys=(b"coarse_labels", b"fine_labels"),
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


def records_of(content: bytes, layout: Layout, where: str) -> bytes:
    """A file of the version for Python, as the binary one has it. Errors: UserError that names ``where``."""
    found = read_pickle(content, where)
    pixels = array_of(found.get(b"data"), int(np.prod(_SHAPE)), where)
    columns = [_labels(found.get(key), len(pixels), f"{where}: {key.decode()}") for key in layout.label_keys]
    return np.concatenate([np.stack(columns, axis=1), pixels], axis=1).tobytes()


def _labels(values: Any, count: int, where: str) -> Pixels:
    """As bytes; whether they are classes is seen in the records."""
    if type(values) is not list or not all(type(value) is int and 0 <= value < 256 for value in values):
        raise UserError(f"{where}: not a list of labels; fetch it again.")
    if len(values) != count:
        raise UserError(f"{where}: {len(values)} labels for {count} images; fetch it again.")
    return np.array(values, dtype=np.uint8)


def _contents(row: DatasetRow, data_dir: Path | None, layout: Layout) -> tuple[dict[str, bytes], Path]:
    """The records of each file, and where they come from: loose files, else an archive, else a download."""
    if data_dir is None:
        archive = download(row.files[0], writable_folder([user_cache() / row.name]), row.advice)
        return _unpack(archive, row.files[0], row, layout), archive
    for python, below in ((False, layout.folder), (True, layout.python_folder)):
        names = layout.names(python=python)
        for folder in (data_dir, data_dir / below):
            if all((folder / name).is_file() for name in names):
                return _records(_loose(folder, names), folder, layout, python=python), folder
    for remote in row.files:
        if (data_dir / remote.name).is_file():
            return _unpack(data_dir / remote.name, remote, row, layout), data_dir / remote.name
    archives, files = (" nor ".join(f.name for f in row.files), ", ".join(layout.records))
    raise UserError(f"{data_dir} has neither {archives} nor all of {files}. {row.advice}")


def _records(contents: Mapping[str, bytes], where: Path, layout: Layout, *, python: bool) -> dict[str, bytes]:
    """By the name of the binary file."""
    names = layout.names(python=python)
    if not python:
        return dict(contents)
    return {names[name]: records_of(content, layout, f"{where}: {name}") for name, content in contents.items()}


def _loose(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    try:
        return {name: (folder / name).read_bytes() for name in names}
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions.") from error


def _unpack(archive: Path, remote: RemoteFile, row: DatasetRow, layout: Layout) -> dict[str, bytes]:
    """The archive's files, in memory: nothing is extracted, and other members are passed over."""
    python = "python" in remote.name
    names = layout.names(python=python)
    found: dict[str, bytes] = {}
    try:
        if (sha := sha256_of(archive)) != remote.sha256:
            raise UserError(f"{archive}: sha256 {sha} is not that of the published archive; delete it. {row.advice}")
        with tarfile.open(archive, "r:gz") as members:
            for member in members:
                name = Path(member.name).name
                if name in names and (stream := members.extractfile(member)):
                    found[name] = stream.read()
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{archive}: cannot be read ({error}); delete it. {row.advice}") from error
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{archive}: has no {', '.join(missing)}; delete it. {row.advice}")
    return _records(found, archive, layout, python=python)
