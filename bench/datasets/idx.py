"""MNIST and Fashion-MNIST, and the IDX format in which they are published."""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from pathlib import Path

import numpy as np

from bench.config import UserError
from bench.datasets.draws import Indices
from bench.datasets.fetch import RemoteFile, download, say, user_cache, writable_folder
from bench.datasets.raw import MEMORY_LIMIT, Arrays, DatasetRow, Pixels, Request, digest_arrays

#: Where Debian's package dataset-fashion-mnist puts its files.
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

#: Images and labels, of training and of test.
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

_CLASSES = 10


def parse_idx(content: bytes, dimensions: int, where: str) -> Pixels:
    """The array in an IDX file of unsigned bytes with this number of dimensions.

    Format: 0, 0, 8 (unsigned byte), dimensions; each size as big-endian uint32; the data, last index fastest.
    Source: yann.lecun.com/exdb/mnist. Errors: UserError that names ``where``.
    """
    header = 4 + 4 * dimensions
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) < header:
        raise UserError(f"{where}: not an IDX file of bytes with {dimensions} dimension(s); fetch it again.")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    expected = header + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        size = " x ".join(map(str, shape))
        raise UserError(f"{where}: {len(content)} bytes, but {size} needs {expected}; fetch it again.")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def parse_pair(images: bytes, labels: bytes, where: tuple[str, str]) -> tuple[Pixels, Indices]:
    """Images (n, 1, h, h) and labels (n,) of the two IDX files of a part."""
    pixels, classes = parse_idx(images, 3, where[0]), parse_idx(labels, 1, where[1])
    n, height, width = pixels.shape
    if n == 0 or height == 0 or height != width:
        raise UserError(f"{where[0]}: {n} images of {height} x {width}; expected square images, and some.")
    if len(classes) != n:
        raise UserError(f"{where[1]}: {len(classes)} labels for {n} images; fetch both files again.")
    if classes.max() >= _CLASSES:
        raise UserError(f"{where[1]}: label {classes.max()} is out of range 0 ... {_CLASSES - 1}; fetch it again.")
    return pixels[:, None], classes.astype(np.int64)


def read_mnist(row: DatasetRow, request: Request) -> Arrays:
    """The set from ``data_dir`` (torchvision's and npm's folders, too) or the user's cache, downloaded if need be."""
    return _read(row, request.data_dir, below=("MNIST/raw", "data"))


def read_fashion_mnist(row: DatasetRow, request: Request) -> Arrays:
    """The set from ``data_dir`` (torchvision's, too), Debian's package or the user's cache, downloaded if need be."""
    return _read(row, request.data_dir, below=("FashionMNIST/raw",), installed=(DEBIAN_FOLDER,))


def _read(row: DatasetRow, data_dir: Path | None, below: tuple[str, ...], installed: tuple[Path, ...] = ()) -> Arrays:
    """The set from ``data_dir`` or one of the folders ``below`` it; without, from where it is ``installed``."""
    cache = user_cache() / row.name
    folders = (data_dir, *(data_dir / name for name in below)) if data_dir else (*installed, cache)
    contents = {}
    for remote in row.files:
        path = _locate(remote, folders)
        if path is None and data_dir:
            also = " or ".join(below)
            raise UserError(f"{data_dir} has no {remote.name} (plain or .gz), nor in its {also}. {row.advice}")
        contents[remote.name] = _content(remote, path or download(remote, writable_folder([cache]), row.advice))
    pixels, labels = {}, {}
    for part, where in (("train", IDX_FILES[:2]), ("test", IDX_FILES[2:])):
        (path_x, x), (path_y, y) = contents[where[0]], contents[where[1]]
        pixels[part], labels[part] = parse_pair(x, y, (str(path_x), str(path_y)))
    if len({p.shape[2] for p in pixels.values()}) != 1:
        raise UserError(f"{row.name}: training and test images differ in size; fetch the files again.")
    return Arrays(digest=digest_arrays(pixels, labels), classes=_CLASSES, pixels=pixels, labels=labels)


def _content(remote: RemoteFile, path: Path) -> tuple[Path, bytes]:
    """Where the file is, and its uncompressed content."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(MEMORY_LIMIT)  # a small .gz can hold more than any machine
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); fetch it again.") from error
    if hashlib.sha256(content).hexdigest() != remote.sha256:
        # Data of one's own in this format is legitimate, and its digest is recorded; but never unnoticed.
        say(f"{path} is not the published {remote.name}: its sha256 differs.")
    return path, content


def _locate(remote: RemoteFile, folders: tuple[Path, ...]) -> Path | None:
    candidates = (folder / name for folder in folders for name in (remote.name, f"{remote.name}.gz"))
    return next((path for path in candidates if path.is_file()), None)
