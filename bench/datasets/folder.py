"""`imagefolder:PATH`: PATH/train/<class>/*, with val/ and test/ beside it.

Small images (at most 64 pixels, 4 GiB in all) are decoded once, and kept as uint8 in one .npz file.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from bench.config import UserError, unknown
from bench.datasets.augment import centre_box
from bench.datasets.decode import decode, in_threads, resized, size_of
from bench.datasets.draws import Indices
from bench.datasets.fetch import existing_folder, part_of, say, user_cache, writable_folder, written_out
from bench.datasets.raw import MEMORY_LIMIT, Arrays, DatasetRow, Files, Pixels, Request
from bench.files import locked, written_whole

_PREFIX = "imagefolder:"
_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".pbm", ".tif", ".tiff"))
_SMALL = 64
_CHUNK = 256
#: What reading a damaged .npz raises.
_DAMAGE = (
    *(OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, SyntaxError, NotImplementedError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError),
)
#: Changes when the same files would give other arrays.
_CACHE_VERSION = 1


@dataclass(frozen=True)
class Image:
    """One file: path below the root, bytes, modification time in nanoseconds."""

    path: str
    size: int
    modified: int


@dataclass(frozen=True, eq=False)
class Listing:
    """What the folder holds: per part (train, test, perhaps val) the images, by class and name, and the labels."""

    root: Path
    classes: tuple[str, ...]
    images: dict[str, tuple[Image, ...]]
    labels: dict[str, Indices]

    def paths(self, part: str) -> list[str]:
        return [f"{self.root}/{image.path}" for image in self.images[part]]

    def everything(self) -> list[Image]:
        return [image for part in sorted(self.images) for image in self.images[part]]


def read_folder(row: DatasetRow, request: Request) -> Arrays | Files:
    """Arrays for small images, Files for others."""
    listing = scan(existing_folder(_root(row, request), request.name))
    size = request.image_size or _native_size(listing)
    bytes_needed = 3 * size**2 * len(listing.everything())
    if size <= _SMALL and bytes_needed <= MEMORY_LIMIT:
        return _cached(listing, size, native=request.image_size is None)
    if request.image_size is None:
        _check_all_native(listing, size)
    return Files(
        digest=_digest([(i.path, i.size) for i in listing.everything()]),
        classes=len(listing.classes),
        image_size=size,
        native=request.image_size is None,
        paths={part: listing.paths(part) for part in listing.images},
        labels=listing.labels,
    )


def _root(row: DatasetRow, request: Request) -> Path:
    text = request.name.removeprefix(_PREFIX)
    path = written_out(Path(text))
    if not text:
        raise UserError(f"{row.name}: the path is missing, e.g. imagefolder:images/pets.")
    if request.data_dir is not None and path.is_absolute():
        raise UserError(f"{request.name} has its own path, so data_dir has no effect; leave it out.")
    return (request.data_dir or Path()) / path


def scan(root: Path) -> Listing:
    """The images below ``root``. Files of other suffixes and hidden files are passed over.

    Where val/ and test/ exist they are used so. Where only one of them does, it is the test part (ImageNet publishes
    no labels of its test images; its val/ is what results are reported on), and validation is cut from train.
    Errors: UserError for a missing part, fewer than two classes, an empty or unknown class.
    """
    existing_folder(root / "train", "image folder")
    present = [part for part in ("val", "test") if (root / part).is_dir()]
    if not present:
        raise UserError(f"{root}: has train/, but neither val/ nor test/; add test/<class>/ with images held out.")
    folders = {"train": "train", "val": "val", "test": "test"}
    if len(present) == 1:
        folders = {"train": "train", "test": present[0]}
    try:
        classes = _subfolders(root / "train")
        if len(classes) < 2:
            raise UserError(f"{root / 'train'}: has {len(classes)} class folder(s); at least two are needed.")
        listed = {part: _scan_part(root, folder, classes) for part, folder in folders.items()}
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions.") from error
    images = {part: tuple(image for _, image in found) for part, found in listed.items()}
    labels = {part: np.array([label for label, _ in found], dtype=np.int64) for part, found in listed.items()}
    return Listing(root, classes, images, labels)


def _subfolders(folder: Path) -> tuple[str, ...]:
    with os.scandir(folder) as entries:
        return tuple(sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(".")))


def _scan_part(root: Path, folder: str, classes: tuple[str, ...]) -> list[tuple[int, Image]]:
    """(label, image) of every image of a part. A class may be absent from val/ and test/, but not from train/."""
    found = []
    for name in _subfolders(root / folder):
        if name not in classes:
            raise UserError(f"{root / folder / name}: {unknown('class', name, classes)}")
        images = _scan_class(root, f"{folder}/{name}")
        if not images:
            raise UserError(f"{root / folder / name}: has no image ({', '.join(sorted(_SUFFIXES))}); add or remove it.")
        found += [(classes.index(name), image) for image in images]
    if not found:
        raise UserError(f"{root / folder}: has no class folders; put the images in {folder}/<class>/.")
    return found


def _scan_class(root: Path, below: str) -> list[Image]:
    images = []
    with os.scandir(root / below) as entries:
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 - a million of them
            if suffix in _SUFFIXES and not entry.name.startswith(".") and entry.is_file():
                stat = entry.stat()
                images.append(Image(f"{below}/{entry.name}", stat.st_size, stat.st_mtime_ns))
    return sorted(images, key=lambda image: image.path)


def _native_size(listing: Listing) -> int:
    """The side of the first image, which must be square."""
    first = listing.paths("train")[0]
    width, height = size_of(first)
    if width != height:
        raise UserError(f"{first} is {width} x {height}, not square; give --set image_size=N.")
    return width


def _check_all_native(listing: Listing, size: int) -> None:
    def check(path: str) -> None:
        _check_size(path, size_of(path), size)

    in_threads(check, [path for part in listing.images for path in listing.paths(part)])


def _check_size(path: str, found: tuple[int, int], size: int) -> None:
    if found != (size, size):
        raise UserError(
            f"the images differ in size ({path} is {found[0]} x {found[1]}, others {size} x {size}); "
            "give --set image_size=N."
        )


def _cached(listing: Listing, size: int, *, native: bool) -> Arrays:
    """The decoded arrays, from the cache beside the images or the user's; decoded and kept if they are not there."""
    key = _digest([_CACHE_VERSION, size, native, [(i.path, i.size, i.modified) for i in listing.everything()]])
    name = f"images-{size}-{key}.npz"
    elsewhere = user_cache() / "imagefolder" / _digest(str(listing.root.resolve()))
    folders = (listing.root / ".bench-cache", elsewhere)
    present = [folder for folder in folders if (folder / name).is_file()]
    for folder in present:
        if (kept := _read_cache(folder / name, len(listing.classes))) is not None:
            return kept
    folder = writable_folder(folders)
    with locked(folder / ".lock"):
        made_meanwhile = folder not in present and (folder / name).is_file()
        if made_meanwhile and (kept := _read_cache(folder / name, len(listing.classes))) is not None:
            return kept
        say(f"decoding {len(listing.everything())} images of {listing.root} once, into {folder / name}")
        decoded = _decode_all(listing, size, native=native)
        _write_cache(folder / name, decoded)
    return decoded


def _read_cache(path: Path, classes: int) -> Arrays | None:
    """The arrays that were kept; None, and a line for the user, if the file is damaged."""
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as stored:
            pixels = {k.removeprefix("pixels-"): stored[k] for k in stored.files if k.startswith("pixels-")}
            labels = {part: stored[f"labels-{part}"] for part in pixels}
            kept = Arrays(digest=str(stored["digest"]), classes=classes, pixels=pixels, labels=labels)
            _check_arrays(kept)
            return kept
    except _DAMAGE as error:
        say(f"{path} is damaged ({error}): decoding the images again.")
        return None


def _check_arrays(kept: Arrays) -> None:
    """ValueError for arrays that no image folder gives."""
    for part, pixels in kept.pixels.items():
        labels = kept.labels[part]
        if pixels.dtype != np.uint8 or pixels.shape[1:2] != (3,) or pixels.ndim != 4:
            raise ValueError(f"its {part} holds no images")
        if (
            labels.dtype != np.int64
            or labels.shape != pixels.shape[:1]
            or not np.isin(labels, range(kept.classes)).all()
        ):
            raise ValueError(f"its {part} has other labels")


def _write_cache(target: Path, decoded: Arrays) -> None:
    pixels = {f"pixels-{part}": array for part, array in decoded.pixels.items()}
    labels = {f"labels-{part}": array for part, array in decoded.labels.items()}
    try:
        with written_whole(target, part_of(target)) as handle:
            np.savez(handle, digest=np.array(decoded.digest), **pixels, **labels)  # type: ignore[arg-type]
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); make room there.") from error
    # The same size with another key: of files that have changed since; or the part that a killed process left.
    same_size = target.name.rsplit("-", 1)[0]
    for pattern in (f"{same_size}-*.npz", f".{same_size}-*.npz.part"):
        for stale in target.parent.glob(pattern):
            if stale != target:
                stale.unlink(missing_ok=True)


def _decode_all(listing: Listing, size: int, *, native: bool) -> Arrays:
    """All parts as (n, 3, size, size). The digest is over labels and native pixels, whatever ``size`` is."""
    pixels, sha = {}, hashlib.sha256()
    for part in sorted(listing.images):
        paths = listing.paths(part)
        pixels[part] = np.empty((len(paths), 3, size, size), dtype=np.uint8)
        starts = range(0, len(paths), _CHUNK)
        digests = in_threads(partial(_decode_chunk, paths, pixels[part], native=native), starts)
        sha.update(f"{part}{len(paths)}".encode())
        sha.update(listing.labels[part].astype("<i8").data)
        sha.update(b"".join(digests))
    return Arrays(digest=sha.hexdigest()[:16], classes=len(listing.classes), pixels=pixels, labels=dict(listing.labels))


def _decode_chunk(paths: list[str], out: Pixels, start: int, *, native: bool) -> bytes:
    """Fill out[start : start + 256]; the sha256 of each image's native size and pixels."""
    digests, size = [], out.shape[2]
    for i, path in enumerate(paths[start : start + _CHUNK], start):
        image = decode(path)
        if native:
            _check_size(path, image.size, size)
        digests.append(hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest())
        out[i] = resized(image, size, centre_box(*image.size, 1.0)).transpose(2, 0, 1)
    return b"".join(digests)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
