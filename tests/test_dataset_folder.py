"""Image folders: small ones decoded once and kept, large ones through a DataLoader, and all that is refused."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from bench.config import UserError
from bench.datasets import DATASETS, ImageData, forget, load, stream
from bench.datasets.augment import random_box
from bench.datasets.decode import decode
from bench.datasets.draws import ORDER, permutation
from bench.datasets.raw import Request
from dataset_files import write_folder

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    forget()
    yield
    forget()


def fresh(root: Path, **arguments: object) -> ImageData:
    """Loaded anew, as another process would."""
    forget()
    return load(f"imagefolder:{root}", **arguments)  # type: ignore[arg-type]


def read(data: ImageData, split: str, **arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = list(data.batches(split, 4, device=CPU, **arguments))  # type: ignore[arg-type]
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def refused(words: str) -> pytest.RaisesExc[UserError]:
    """A UserError of one line that matches."""
    return pytest.RaisesExc(UserError, match=words, check=lambda error: "\n" not in str(error))


def test_small_images_are_their_pixels_in_order(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pets", {"train": 10, "test": 3})
    (root / "train" / "cat" / "notes.txt").write_text("passed over")
    (root / "train" / ".hidden").mkdir()
    data = fresh(root, val_fraction=0.25)
    assert (data.classes, data.channels, data.image_size) == (2, 3, 16)
    assert data.sizes == {"train": 15, "val": 5, "test": 6}
    pixels, labels = read(data, "test")
    paths = [root / "test" / name / f"{i:02}.png" for name in ("cat", "dog") for i in range(3)]
    expected = np.stack([np.asarray(Image.open(p).convert("RGB")) for p in paths]).transpose(0, 3, 1, 2) / np.float32(
        255
    )
    assert np.array_equal(pixels.numpy(), expected)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("parts", "sizes"),
    [
        ({"train": 10, "val": 4, "test": 3}, {"train": 20, "val": 8, "test": 6}),
        ({"train": 10, "val": 4}, {"train": 18, "val": 2, "test": 8}),
        ({"train": 10, "test": 3}, {"train": 18, "val": 2, "test": 6}),
    ],
)
def test_validation_is_never_the_test_data(tmp_path: Path, parts: dict[str, int], sizes: dict[str, int]) -> None:
    assert fresh(write_folder(tmp_path / "pets", parts)).sizes == sizes


def test_the_cache_spares_decoding_and_follows_every_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_folder(tmp_path / "pets", {"train": 5, "test": 2})
    before = fresh(root)
    (kept,) = (root / ".bench-cache").glob("*.npz")
    assert "decoding 14 images" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("bench.datasets.folder.decode", None)
        again = fresh(root)
    assert again.digest == before.digest
    assert torch.equal(read(again, "train")[0], read(before, "train")[0])
    path = root / "train" / "cat" / "00.png"
    os.utime(path, ns=(1, 1))
    (root / ".bench-cache" / ".images-16-killed.npz.part").write_text("half")
    assert fresh(root).digest == before.digest
    assert not kept.exists(), "the stale cache stays on the disk"
    Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(path)
    changed = fresh(root)
    assert changed.digest != before.digest
    (root / "train" / "dog" / "04.png").unlink()
    assert fresh(root).sizes["train"] + fresh(root).sizes["val"] == 9
    assert len(list((root / ".bench-cache").glob("*"))) == 2  # the lock, and the arrays of now


def test_processes_that_start_together_decode_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Threads stand for processes: the lock belongs to the opened file, not to the process."""
    row = DATASETS["imagefolder:PATH"]
    root = write_folder(tmp_path / "pets", {"train": 5, "test": 2})
    request = Request(
        name=f"imagefolder:{root}", data_dir=None, split_seed=0, val_fraction=0.1, train_examples=None, image_size=8
    )

    def slowly(path: str) -> Image.Image:
        time.sleep(0.02)
        return decode(path)

    monkeypatch.setattr("bench.datasets.folder.decode", slowly)
    with ThreadPoolExecutor(3) as pool:
        found = [f.result().digest for f in [pool.submit(row.read, row, request) for _ in range(3)]]
    assert len(set(found)) == 1
    assert capsys.readouterr().err.count("decoding") == 1


def test_a_damaged_cache_is_made_again_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_folder(tmp_path / "pets", {"train": 5, "test": 2})
    before = read(fresh(root), "test")[0]
    (kept,) = (root / ".bench-cache").glob("*.npz")
    whole = kept.read_bytes()
    middle = len(whole) // 2
    for damaged in (b"", whole[:middle], whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]):
        kept.write_bytes(damaged)
        assert torch.equal(read(fresh(root), "test")[0], before)
        assert capsys.readouterr().err.count("is damaged") == 1
        assert kept.read_bytes() == whole


def test_a_folder_that_cannot_be_written_keeps_its_cache_with_the_user(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pets", {"train": 5, "test": 2})
    (root / ".bench-cache").write_text("a file where the folder should be")
    before = fresh(root).digest
    assert len(list((tmp_path / "xdg" / "bench" / "imagefolder").glob("*/images-16-*.npz"))) == 1
    assert fresh(root).digest == before


def test_small_images_resized(tmp_path: Path) -> None:
    """Shorter side scaled, then the centre; one digest, however large; each size has a cache of its own."""
    root = write_folder(tmp_path / "pets", {"train": 5, "test": 2}, size=(24, 16))
    small, large = fresh(root, image_size=8), fresh(root, image_size=32)
    assert small.digest == large.digest
    assert (small.image_size, large.image_size) == (8, 32)
    path = root / "test" / "cat" / "00.png"
    expected = Image.open(path).convert("RGB").resize((12, 8), Image.Resampling.BILINEAR).crop((2, 0, 10, 8))
    found = (read(small, "test")[0][0].permute(1, 2, 0) * 255).round().numpy()
    assert np.array_equal(found, np.asarray(expected))
    assert len(list((root / ".bench-cache").glob("*.npz"))) == 2


def test_relative_paths_start_at_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folder(tmp_path / "pets", {"train": 5, "test": 2})
    monkeypatch.chdir(tmp_path)
    assert load("imagefolder:pets").digest == load("imagefolder:pets", data_dir=tmp_path).digest
    with refused("has its own path"):
        load(f"imagefolder:{root}", data_dir=tmp_path)


def test_images_that_are_not_rgb(tmp_path: Path) -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey = Image.fromarray(pixels)
    for mode in ("L", "LA", "RGBA", "CMYK", "P"):
        path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
        grey.convert(mode).save(path)
        assert np.array_equal(np.asarray(decode(str(path)))[:, :, 1], pixels), mode
    clear = grey.convert("P")
    clear.info["transparency"] = bytes(range(256))
    clear.save(tmp_path / "clear.png")
    assert np.asarray(decode(str(tmp_path / "clear.png"))).shape == (16, 16, 3)
    Image.fromarray(pixels.astype(np.uint16)).save(tmp_path / "deep.png")
    with refused("more than 8 bits"):
        decode(str(tmp_path / "deep.png"))


def spoil(root: Path, fault: str) -> dict[str, object]:
    """Do this to a good folder; the arguments to load it with."""
    path = root / "train" / "cat" / "03.png"
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif fault == "empty":
        path.write_bytes(b"")
    elif fault == "text":
        path.write_text("hello")
    elif fault == "other size":
        Image.new("RGB", (16, 20)).save(path)
    elif fault == "not square":
        Image.new("RGB", (16, 20)).save(root / "train" / "cat" / "00.png")
    elif fault == "empty class":
        (root / "train" / "eel").mkdir()
    elif fault == "unknown class":
        (root / "test" / "dog").rename(root / "test" / "dogs")
    elif fault == "flat test":
        for name in ("cat", "dog"):
            for image in (root / "test" / name).iterdir():
                image.rename(root / "test" / f"{name}{image.name}")
            (root / "test" / name).rmdir()
    elif fault == "no test":
        (root / "test").rename(root / "holdout")
    elif fault == "no train":
        (root / "train").rename(root / "training")
    elif fault == "one class":
        for part in ("train", "test"):
            (root / part / "dog").rename(root / f"dog-{part}")
    elif fault == "large and cut":
        path.write_bytes(path.read_bytes()[:-40])
        return {"image_size": 72}
    return {}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("cut", r"cat/03\.png: cannot be decoded"),
        ("empty", r"cat/03\.png: cannot be decoded"),
        ("text", r"cat/03\.png: cannot be decoded"),
        ("other size", r"cat/03\.png is 16 x 20, others 16 x 16.*--set image_size=N"),
        ("not square", r"cat/00\.png is 16 x 20, not square.*--set image_size=N"),
        ("empty class", r"eel: has no image"),
        ("unknown class", r"unknown class 'dogs'.* Did you mean 'dog'"),
        ("flat test", r"has no class folders; put the images in test/<class>/"),
        ("no test", r"neither val/ nor test/"),
        ("no train", r"train is not a folder"),
        ("one class", r"at least two are needed"),
        ("large and cut", r"cat/03\.png: cannot be decoded"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_in_one_line(tmp_path: Path, fault: str, words: str) -> None:
    root = write_folder(tmp_path / "pets", {"train": 5, "test": 2})
    arguments = spoil(root, fault)
    with refused(words):
        fresh(root, **arguments)
    assert not list(root.glob(".bench-cache/*.npz"))
    assert not list(root.glob(".bench-cache/.*.part"))


# Large images: a DataLoader with processes of its own.


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "photos", {"train": 8, "val": 3}, size=(100, 80))


def test_large_images_for_evaluation_are_their_centre(photos: Path) -> None:
    data = fresh(photos, image_size=70)
    assert (data.sizes, data.image_size) == ({"train": 14, "val": 2, "test": 6}, 70)
    pixels, labels = read(data, "test")
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    for k, path in enumerate(sorted((photos / "val").glob("*/*.png"))):
        # Shorter side to 70 * 256 / 224 = 80, as it is already: then the central 70 x 70.
        expected = Image.open(path).convert("RGB").crop((15, 5, 85, 75))
        assert np.array_equal((pixels[k].permute(1, 2, 0) * 255).round().numpy(), np.asarray(expected))
    with refused("not square"):
        fresh(photos)


def test_large_images_do_not_depend_on_the_workers(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = fresh(photos, image_size=66)
    state = torch.get_rng_state()
    one = read(data, "train", seed=3, epoch=1, augment=True)
    monkeypatch.setattr(stream, "_workers", lambda: 2)
    two = read(data, "train", seed=3, epoch=1, augment=True)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    paths = data.source.paths["train"]  # type: ignore[attr-defined]
    for found, i in zip(two[0], permutation(len(paths), 3, 1, ORDER), strict=False):
        box, mirror = random_box(100, 80, 3, 1, int(i))
        expected = Image.open(paths[i]).convert("RGB").resize((66, 66), Image.Resampling.BILINEAR, box=box)
        expected = ImageOps.mirror(expected) if mirror else expected
        assert np.array_equal((found.permute(1, 2, 0) * 255).round().numpy(), np.asarray(expected))
    other = read(data, "train", seed=3, epoch=2, augment=True)
    assert not torch.equal(two[0], other[0])
    plain = read(data, "train", seed=3, epoch=1)
    assert torch.equal(plain[1], two[1])
    assert plain[0].shape == two[0].shape == (12, 3, 66, 66)
    assert not torch.equal(plain[0], two[0])
    digest = data.digest
    (photos / "val" / "cat" / "02.png").unlink()
    assert fresh(photos, image_size=66).digest != digest


def test_large_native_images_are_shown_as_they_are(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "squares", {"train": 4, "test": 2}, size=(72, 72))
    data = fresh(root, val_fraction=0.25)
    expected = np.asarray(Image.open(root / "test" / "cat" / "00.png").convert("RGB"))
    assert np.array_equal((read(data, "test")[0][0].permute(1, 2, 0) * 255).round().numpy(), expected)
    Image.new("RGB", (72, 73)).save(root / "test" / "dog" / "01.png")
    with refused(r"01\.png is 72 x 73, others 72 x 72"):
        fresh(root)


def test_a_large_image_damaged_since_is_named_by_the_worker(photos: Path) -> None:
    data = fresh(photos, image_size=66)
    path = photos / "val" / "dog" / "01.png"
    path.write_bytes(path.read_bytes()[:100])
    with refused(re.escape(f"{path}: cannot be decoded")):
        read(data, "test")


def test_too_little_shared_memory_is_said_before_the_bus_error(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = fresh(photos, image_size=66)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with refused("--shm-size"):
        read(data, "test")
