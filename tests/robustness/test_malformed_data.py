"""Data files with a fault in them: refused in one line that names the file, or read as what they say."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from bench.config import UserError
from bench.datasets import DATASETS, forget, load
from bench.datasets import idx as idx_module
from bench.datasets.cifar import CIFAR10, CIFAR100, Layout, parse_records, records_of
from bench.datasets.decode import decode, size_of
from dataset_files import (
    archive,
    cifar10_contents,
    cifar100_contents,
    cifar_records,
    idx_contents,
    write_files,
    write_folder,
)
from malformed import damaged, examples, files, mutated, refused_in_one_line

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(idx_module, "DEBIAN_FOLDER", tmp_path / "no-debian")
    forget()
    yield
    forget()


def load_all(name: str, folder: Path) -> None:
    """Every image of it; what is refused is refused in one line, and leaves the files as they were."""
    before = files(folder)
    forget()
    with refused_in_one_line():
        data = load(name, data_dir=folder)
        for split in data.sizes:
            for pixels, labels in data.batches(split, 64, device=CPU):
                assert pixels.isfinite().all()
                assert 0 <= int(labels.min()) <= int(labels.max()) < data.classes
    assert files(folder) == before


# --- IDX

FASHION = idx_contents(train=30, test=10, side=4)


@pytest.mark.parametrize("zipped", [False, True])
@examples(120)
@given(data=st.data())
def test_idx_files_with_damaged_bytes(zipped: bool, data: st.DataObject) -> None:
    names = sorted(FASHION)
    contents = {
        name + ".gz" * zipped: gzip.compress(FASHION[name], mtime=0) if zipped else FASHION[name] for name in names
    }
    bad = data.draw(st.sampled_from(sorted(contents)))
    contents[bad] = data.draw(damaged(contents[bad]))
    with tempfile.TemporaryDirectory() as folder:
        load_all("fashion-mnist", write_files(Path(folder), contents))


@pytest.mark.parametrize("what", ["folder", "circle", "nowhere", "name too long", "home of nobody", "file"])
def test_a_folder_of_data_that_is_none(what: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    (tmp_path / "circle").symlink_to("circle")
    place = {"name too long": "x" * 300, "home of nobody": "~nobody-has-this-name/data"}.get(what, what)
    for name in ("fashion-mnist", "cifar10", "cifar100", f"imagefolder:{place}"):
        folder = None if place.startswith("~") and ":" in name else tmp_path if ":" in name else Path(place)
        with pytest.raises(UserError) as caught:
            load(name, data_dir=folder if folder is None or place.startswith("~") else tmp_path / folder)
        assert str(caught.value).isprintable()


# --- CIFAR

RECORDS = [(CIFAR10, cifar_records(3, 10)), (CIFAR100, cifar_records(3, 20, 100))]


@pytest.mark.parametrize(("layout", "records"), RECORDS, ids=["cifar10", "cifar100"])
@examples(200)
@given(data=st.data())
def test_cifar_records_with_damaged_bytes(layout: Layout, records: bytes, data: st.DataObject) -> None:
    with refused_in_one_line():
        pixels, labels = parse_records(data.draw(damaged(records)), layout.label_ranges, "f")
        assert pixels.shape == (len(labels), 3, 32, 32)
        assert labels.max() < layout.label_ranges[-1]


def as_python(records: bytes, layout: Layout, *, python_2: bool = False) -> bytes:
    """A file of the version for Python, of these records; as published, Python 2 wrote it, in protocol 2."""
    width = len(layout.label_keys)
    rows = np.frombuffer(records, dtype=np.uint8).reshape(-1, 3072 + width)
    whole: dict[Any, Any] = {key: rows[:, i].tolist() for i, key in enumerate(layout.label_keys)}
    whole |= {b"data": np.ascontiguousarray(rows[:, width:]), b"batch_label": b"one of one"}
    if python_2:
        return python_2_pickle(whole)
    return pickle.dumps({key.decode(): value for key, value in whole.items()}, protocol=4)


def python_2_pickle(whole: dict[bytes, Any]) -> bytes:
    """By hand, opcode by opcode: protocol 2, text as SHORT_BINSTRING or BINSTRING, numpy under its old name."""

    def text(value: bytes) -> bytes:
        return (
            b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + len(value).to_bytes(4, "little") + value
        )

    def number(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    def item(value: Any) -> bytes:
        if isinstance(value, bytes):
            return text(value)
        if isinstance(value, list):
            return b"](" + b"".join(map(number, value)) + b"e"
        kind = b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R(" + number(3) + text(b"|") + b"NNN"
        kind += number(-1) + number(-1) + number(0) + b"tb"
        shape = number(value.shape[0]) + number(value.shape[1]) + b"\x86"
        array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"\x87R"
        return array + b"(" + number(1) + shape + kind + b"\x89" + text(value.tobytes()) + b"tb"

    return b"\x80\x02}(" + b"".join(text(key) + item(value) for key, value in whole.items()) + b"u."


VERSIONS = [
    ("cifar10", CIFAR10, cifar10_contents),
    ("cifar100", CIFAR100, cifar100_contents),
]


@pytest.mark.parametrize("python_2", [True, False])
@pytest.mark.parametrize(("name", "layout", "contents"), VERSIONS)
def test_both_versions_of_the_same_images_are_the_same_data(  # type: ignore[no-untyped-def]
    name, layout: Layout, contents, python_2: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = contents()
    python = {k.removesuffix(".bin"): as_python(v, layout, python_2=python_2) for k, v in binary.items()}
    packed = archive(
        {f"{layout.python_folder}/{k}": v for k, v in {"batches.meta": b"cos\nsystem\n", **python}.items()}
    )
    row = DATASETS[name]
    published = [f for f in row.files if "python" in f.name]
    sha = hashlib.sha256(packed).hexdigest()
    monkeypatch.setitem(DATASETS, name, replace(row, files=(row.files[0], replace(published[0], sha256=sha))))
    places = [
        write_files(tmp_path / "binary", binary),
        write_files(tmp_path / "loose", python),
        write_files(tmp_path / "unpacked" / layout.python_folder, python).parent,
        write_files(tmp_path / "archive", {published[0].name: packed}),
    ]
    found = [load(name, data_dir=place) for place in places]
    assert len({data.digest for data in found}) == 1
    batches = [next(data.batches("test", 20, device=CPU)) for data in found]
    assert all(torch.equal(pixels, batches[0][0]) and torch.equal(labels, batches[0][1]) for pixels, labels in batches)


class Harm:
    """What runs when it is unpickled by a reader that trusts it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("where", ["whole", "labels", "data", "further"])
def test_a_pickle_that_means_harm_is_refused_and_does_none(where: str, protocol: int, tmp_path: Path) -> None:
    harm = Harm(tmp_path / "harmed")
    good = {"labels": [1], "data": np.zeros((1, 3072), dtype=np.uint8)}
    rest = {key: value for key, value in good.items() if key != where}
    content = pickle.dumps(harm if where == "whole" else {where: harm, **rest}, protocol=protocol)
    with pytest.raises(UserError, match=r"^f: asks for (posix|os|nt)\.mkdir, which no CIFAR has"):
        records_of(content, CIFAR10, "f")
    assert not (tmp_path / "harmed").exists()
    pickle.loads(content)
    assert (tmp_path / "harmed").exists(), "it would have done none anyway"


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"\x80\x02cnumpy\ndtype\n}U\x05_name\x8c\x01xsb.",  # BUILD on the stand-in itself
        b"\x80\x02Pother\n.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x02]q\x00h\x00a.",
        b"\x80\x02]r\xff\xff\xff\x7f.",  # a memo of 32 GiB
        b"\x80\x05\x96\xff\xff\xff\xff\x07\x00\x00\x00.",  # an array of as much
        b"",
        b"\x80\x02c\\y\nx\n.",  # a backslash that escapes nothing, of which Python warns
        # keys: too deep for Python's stack, and of 2^64 and 3^64 values
        b"\x80\x02c_codecs\nencode\n}U\x01xK\x01sb.",  # BUILD on what is called
        pytest.param(b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.", id="deep"),
        pytest.param(b"\x80\x02})" + b"q\x00h\x00\x86" * 64 + b"K\x01s.", id="wide"),
        pytest.param(b"\x80\x02})" + b"q\x000(h\x00h\x00h\x00t" * 64 + b"K\x01s.", id="wider"),
    ],
)
def test_what_is_no_such_pickle_is_one_line(content: bytes) -> None:
    with pytest.raises(UserError, match=r"^f: "):
        records_of(content, CIFAR10, "f")


@pytest.mark.parametrize("protocol", range(5))
def test_cifar_written_anew_is_read_whichever_the_protocol(protocol: int) -> None:
    """Up to protocol 2, Python 3 has a tuple for each name in bytes."""
    names = [f"leptodactylus_{n}.png".encode() for n in range(3000)]
    pixels = np.arange(3000 * 3072, dtype=np.uint32).astype(np.uint8).reshape(3000, 3072)
    value = {b"labels": [n % 10 for n in range(3000)], b"data": pixels, b"filenames": names}
    records = records_of(pickle.dumps(value, protocol), CIFAR10, "f")
    images, labels = parse_records(records, CIFAR10.label_ranges, "f")
    assert labels.tolist() == value[b"labels"]
    assert np.array_equal(images.reshape(pixels.shape), pixels)


PICKLES = [as_python(RECORDS[0][1], CIFAR10, python_2=python_2) for python_2 in (False, True)]


@examples(200)
@given(data=st.data())
def test_pickles_with_damaged_bytes_are_refused_or_records(data: st.DataObject) -> None:
    content = data.draw(damaged(data.draw(st.sampled_from(PICKLES))))
    with refused_in_one_line():
        parse_records(records_of(content, CIFAR10, "f"), CIFAR10.label_ranges, "f")


@examples(200)
@given(
    mutated({"labels": [1, 2], "data": [0], "batch_label": "x"}), st.sampled_from([None, (2, 3072), (2, 3), (6144,)])
)
@example({"labels": [True, 1]}, (2, 3072))
@example({"labels": [256, 1]}, (2, 3072))
def test_pickles_of_another_thing_are_refused_or_records(value: Any, shape: tuple[int, ...] | None) -> None:
    if isinstance(value, dict) and shape is not None:
        value = {**value, "data": np.zeros(shape, dtype=np.uint8 if len(shape) > 1 else np.float64)}
    with refused_in_one_line():
        parse_records(records_of(pickle.dumps(value), CIFAR10, "f"), CIFAR10.label_ranges, "f")


def _small(layout: Layout) -> dict[str, bytes]:
    return {
        name: cifar_records(10 if "100" not in layout.folder else 100, *layout.label_ranges) for name in layout.records
    }


@examples(60)
@given(data=st.data())
def test_a_cifar_archive_with_damaged_bytes(data: st.DataObject) -> None:
    python = data.draw(st.booleans())
    contents = _small(CIFAR10)
    if python:
        contents = {k.removesuffix(".bin"): as_python(v, CIFAR10) for k, v in contents.items()}
    packed = data.draw(damaged(archive(contents)))
    row, sha = DATASETS["cifar10"], hashlib.sha256(packed).hexdigest()
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setitem(DATASETS, "cifar10", replace(row, files=tuple(replace(f, sha256=sha) for f in row.files)))
        load_all("cifar10", write_files(Path(folder), {row.files[python].name: packed}))


# --- images


def picture(form: str, mode: str = "RGB", **options: Any) -> bytes:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).convert(mode)
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of some hundred bytes that says it has so many pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


PICTURES = {
    "rgb.png": picture("PNG"),
    "rgba.png": picture("PNG", "RGBA"),
    "p.png": picture("PNG", "P"),
    "1.png": picture("PNG", "1"),
    "la.png": picture("PNG", "LA"),
    "i.tif": picture("TIFF", "I"),
    "grey.jpg": picture("JPEG", "L"),
    "rgb.jpg": picture("JPEG"),
    "cmyk.jpg": picture("JPEG", "CMYK"),
    "progressive.jpg": picture("JPEG", progressive=True),
    "p.gif": picture("GIF", "P"),
    "rgb.bmp": picture("BMP"),
    "rgb.ppm": picture("PPM"),
    "rgb.tif": picture("TIFF"),
    "f.tif": picture("TIFF", "F"),
    "lzw.tif": picture("TIFF", compression="tiff_lzw"),
    "rgb.webp": picture("WEBP"),
    "exif.jpg": picture("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\0\1\3\0\1\0\0\0\xff\xff\0\0"),
}


def decoded(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        with refused_in_one_line():
            size_of(str(path))
        with refused_in_one_line():
            image = decode(str(path))
            assert image.mode == "RGB"


@examples(500)
@given(data=st.data())
def test_images_with_damaged_bytes_are_refused_or_decoded(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(PICTURES)))
    decoded(name, data.draw(damaged(PICTURES[name])))


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_images_whole_and_under_another_name(name: str) -> None:
    decoded(name, PICTURES[name])
    decoded("another.jpg", PICTURES[name])


@pytest.mark.parametrize(
    "size", [(0, 0), (0, 5), (3_000, 3_000), (14_000, 14_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)]
)
def test_an_image_that_says_it_is_huge_or_nothing_is_refused_before_it_is_made(
    size: tuple[int, int], tmp_path: Path
) -> None:
    (tmp_path / "bomb.png").write_bytes(bomb(*size))
    with pytest.raises(UserError, match=r"bomb\.png"):
        decode(str(tmp_path / "bomb.png"))


@examples(40)
@given(data=st.data())
def test_a_folder_of_images_with_a_damaged_one(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as made:
        root = write_folder(Path(made) / "images", {"train": 4, "test": 1})
        bad = data.draw(st.sampled_from(sorted(root.rglob("*.png"))))
        fault = data.draw(st.sampled_from(("bytes", "empty", "folder", "circle", "gone", "another")))
        content = data.draw(damaged(bad.read_bytes())) if fault == "bytes" else b""
        bad.unlink()
        if fault == "folder":
            bad.mkdir()
        elif fault == "circle":
            bad.symlink_to(bad.name)
        elif fault != "gone":
            bad.write_bytes(data.draw(st.sampled_from(sorted(PICTURES.values()))) if fault == "another" else content)
        forget()
        with refused_in_one_line():
            load(f"imagefolder:{root}")
        kept = [p for p in (root / ".bench-cache").rglob("*") if p.suffix != ".npz" and p.name != ".lock"]
        assert kept == [], "something half written is left"


@examples(60)
@given(data=st.data())
def test_kept_arrays_with_damaged_bytes_are_made_again(kept_images: Path, data: st.DataObject) -> None:
    """The arrays beside the images may have come with them."""
    (kept,) = (kept_images / ".bench-cache").glob("*.npz")
    whole = kept.read_bytes()
    good = load(f"imagefolder:{kept_images}").digest
    forget()
    try:
        kept.write_bytes(data.draw(damaged(whole)))
        with refused_in_one_line():
            read = load(f"imagefolder:{kept_images}")
            assert read.digest == good
            for split in read.sizes:
                list(read.batches(split, 4, device=CPU))
    finally:
        kept.write_bytes(whole)
        forget()


@pytest.fixture
def kept_images(tmp_path: Path) -> Path:
    root = write_folder(tmp_path / "images", {"train": 4, "test": 1})
    load(f"imagefolder:{root}")
    forget()
    return root
