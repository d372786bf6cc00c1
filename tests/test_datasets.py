"""The data sets: one contract for every row, the splits, and augmentation against a loop over images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.config import UserError
from bench.datasets import DATASETS, ImageData, forget, load
from bench.datasets.augment import Shifts, draw_shifts, random_box, shift_and_mirror
from bench.datasets.draws import ORDER, permutation
from bench.datasets.memory import mean_and_std, resize
from bench.datasets.raw import Request
from bench.datasets.splits import cut, shares, take
from dataset_files import cifar10_contents, cifar100_contents, write_files, write_folder, write_idx

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    forget()
    yield
    forget()


def prepared(row: str, tmp_path: Path) -> tuple[str, Path | None]:
    """The name and the data_dir with which this row loads, from files written here."""
    if row == "digits":
        return row, None
    if row in ("mnist", "fashion-mnist"):
        return row, write_idx(tmp_path / row)
    if row == "cifar10":
        return row, write_files(tmp_path / row, cifar10_contents())
    if row == "cifar100":
        return row, write_files(tmp_path / row, cifar100_contents())
    assert row == "imagefolder:PATH", f"say here how to make small files for {row}"
    return f"imagefolder:{write_folder(tmp_path / 'pets', {'train': 20, 'test': 5})}", None


@pytest.fixture(params=DATASETS)
def any_set(request: pytest.FixtureRequest, tmp_path: Path) -> ImageData:
    name, folder = prepared(request.param, tmp_path)
    return load(name, data_dir=folder, val_fraction=0.2)


def everything(data: ImageData, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = list(data.batches(split, 7, device=CPU))  # type: ignore[arg-type]
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def test_every_set_keeps_the_contract(any_set: ImageData) -> None:
    data = any_set
    assert set(data.sizes) == {"train", "val", "test"}
    assert len(data.digest) == 16
    assert set(data.digest) <= set("0123456789abcdef")
    for split, size in data.sizes.items():
        x, y = everything(data, split)
        assert x.shape == (size, data.channels, data.image_size, data.image_size)
        assert (x.dtype, y.dtype, y.shape) == (torch.float32, torch.int64, (size,))
        assert 0 <= x.min() < x.max() <= 1
        assert 0 <= y.min() < y.max() < data.classes
    normal = data.normalize(everything(data, "train")[0])
    assert torch.allclose(normal.mean((0, 2, 3)), torch.zeros(data.channels), atol=1e-4)
    assert torch.allclose(normal.std((0, 2, 3), correction=0), torch.ones(data.channels), atol=1e-4)


def test_every_set_shuffles_by_seed_and_epoch_alone(any_set: ImageData) -> None:
    def epoch(seed: int, number: int, augment: bool = True) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(any_set.batches("train", 8, device=CPU, seed=seed, epoch=number, augment=augment))

    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index] # noqa: NPY002
    first = epoch(3, 5)
    epoch(4, 1)
    again = epoch(3, 5)
    assert len(first) == any_set.steps("train", 8) == any_set.sizes["train"] // 8
    assert all(torch.equal(a, b) and torch.equal(p, q) for (a, p), (b, q) in zip(first, again, strict=True))
    for other in (epoch(3, 6), epoch(2, 5)):
        assert not torch.equal(torch.cat([y for _, y in first]), torch.cat([y for _, y in other]))
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()  # type: ignore[index] # noqa: NPY002


def test_shuffled_without_augmentation_is_the_set_in_another_order(any_set: ImageData) -> None:
    x, y = everything(any_set, "train")
    order = permutation(len(y), 9, 2, ORDER)[: len(y) // 8 * 8]
    pairs = list(any_set.batches("train", 8, device=CPU, seed=9, epoch=2))
    assert torch.equal(torch.cat([p for p, _ in pairs]), x[order])
    assert torch.equal(torch.cat([q for _, q in pairs]), y[order])


def test_the_digits_are_what_scikit_learn_gives() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    data = load("digits")
    assert data.sizes == {"train": 1294, "val": 144, "test": 359}
    mine = sorted(
        (*(p * 16).round().flatten().tolist(), int(q))
        for s in data.sizes
        for p, q in zip(*everything(data, s), strict=True)
    )
    theirs = sorted(
        (*image.flatten().tolist(), int(label)) for image, label in zip(bunch.images, bunch.target, strict=True)
    )
    assert mine == theirs
    # The protocol: this cut and this digest are part of every published number.
    assert data.digest == "d31533ed64196bef"


def test_the_test_split_depends_on_no_seed_and_validation_does() -> None:
    a, b = load("digits", split_seed=0), load("digits", split_seed=1)
    assert torch.equal(everything(a, "test")[0], everything(b, "test")[0])
    assert not torch.equal(everything(a, "val")[0], everything(b, "val")[0])
    assert a.digest == b.digest == load("digits", train_examples=50, image_size=16).digest


@given(
    counts=st.lists(st.integers(0, 40), min_size=2, max_size=6).filter(lambda c: sum(c) >= 4),
    fraction=st.floats(0.1, 0.9),
    seed=st.integers(0, 2**31 - 1),
)
def test_splits_are_disjoint_exhaustive_and_stratified(counts: list[int], fraction: float, seed: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    total = round(fraction * len(labels))
    request = Request(
        name="x", data_dir=None, split_seed=seed, val_fraction=fraction, train_examples=None, image_size=None
    )
    if not 0 < total < len(labels):
        with pytest.raises(UserError, match="change val_fraction"):
            cut({"train": labels, "test": labels}, request)
        return
    members = cut({"train": labels, "test": labels}, request)
    train, val = members["train"][1], members["val"][1]
    assert sorted([*train, *val]) == list(range(len(labels)))
    assert len(val) == total
    share = total / len(labels)
    assert all(abs(np.sum(labels[val] == c) - share * n) < 1 for c, n in enumerate(counts))
    fewer = cut({"train": labels, "test": labels}, replace(request, train_examples=len(train) // 2 or 1))
    assert set(fewer["train"][1]) < set(train) or len(train) == 1
    assert np.array_equal(fewer["val"][1], val)


def test_a_split_stays_what_it_is() -> None:
    """A known answer: were it to change with a version of NumPy, results would no longer compare."""
    assert take(np.arange(12) % 3, 6, 5, 0).tolist() == [2, 3, 4, 6, 10, 11]
    assert permutation(8, 1, 2, 3).tolist() == [1, 2, 4, 6, 5, 0, 7, 3]
    assert shares(np.array([5, 3, 2]), 4).tolist() == [2, 1, 1]


def test_train_examples_limits_training_only() -> None:
    whole, part = load("digits"), load("digits", train_examples=100)
    assert part.sizes == {**whole.sizes, "train": 100}
    assert torch.equal(everything(whole, "val")[0], everything(part, "val")[0])
    assert set(torch.bincount(everything(part, "train")[1]).tolist()) <= {9, 10, 11}


def shifted_slowly(image: torch.Tensor, down: int, right: int, mirror: bool) -> torch.Tensor:
    """One image, pixel by pixel: out[y, x] = image[y + down, x + right], 0 outside, then perhaps mirrored."""
    out = torch.zeros_like(image)
    _, height, width = image.shape
    for y in range(height):
        for x in range(width):
            source = (y + down, x + right)
            if 0 <= source[0] < height and 0 <= source[1] < width:
                out[:, y, (width - 1 - x) if mirror else x] = image[:, source[0], source[1]]
    return out


def test_shift_and_mirror_is_the_loop_over_images() -> None:
    images = torch.randint(0, 256, (50, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rng = np.random.default_rng(0)
    rows, columns = (torch.from_numpy(rng.integers(0, 5, 50)) for _ in range(2))
    mirror = torch.from_numpy(rng.random(50) < 0.5)
    fast = shift_and_mirror(images, Shifts(rows, columns, mirror, 2))
    slow = [
        shifted_slowly(i, int(r) - 2, int(c) - 2, bool(m))
        for i, r, c, m in zip(images, rows, columns, mirror, strict=True)
    ]
    assert torch.equal(fast, torch.stack(slow))


@pytest.mark.parametrize(
    ("row", "margin", "flips"),
    [("digits", 1, False), ("mnist", 2, False), ("fashion-mnist", 2, True), ("cifar10", 4, True)],
)
def test_augmented_batches_are_the_drawn_shifts_of_each_image(
    row: str, margin: int, flips: bool, tmp_path: Path
) -> None:
    name, folder = prepared(row, tmp_path)
    data = load(name, data_dir=folder)
    x, y = everything(data, "train")
    order = permutation(len(y), 7, 3, ORDER)[: len(y) // 16 * 16]
    draws = draw_shifts(len(order), data.image_size, flips, 7, 3, CPU)
    assert draws.margin == margin
    assert {int(draws.rows.min()), int(draws.columns.max())} == {0, 2 * margin}
    assert bool(draws.mirror.any()) == flips
    assert not draws.mirror.all()
    pairs = list(data.batches("train", 16, device=CPU, seed=7, epoch=3, augment=True))
    pixels, labels = torch.cat([p for p, _ in pairs]), torch.cat([q for _, q in pairs])
    assert torch.equal(labels, y[order])
    for k, i in enumerate(order):
        rows, columns = int(draws.rows[k]) - margin, int(draws.columns[k]) - margin
        assert torch.equal(pixels[k], shifted_slowly(x[i], rows, columns, bool(draws.mirror[k])))


@given(width=st.integers(1, 2000), height=st.integers(1, 2000), word=st.integers(0, 10**6))
def test_random_boxes_lie_inside_and_have_the_drawn_area_and_ratio(width: int, height: int, word: int) -> None:
    (left, top, right, bottom), _ = random_box(width, height, 0, 0, word)
    slack = 1e-6 * (width + height)
    assert -slack <= left < right <= width + slack
    assert -slack <= top < bottom <= height + slack
    assert 3 / 4 - slack <= (right - left) / (bottom - top) <= 4 / 3 + slack


def test_random_boxes_vary_as_they_should() -> None:
    boxes = [random_box(100, 100, 0, 0, k) for k in range(400)]
    areas = np.array([(b[2] - b[0]) * (b[3] - b[1]) / 1e4 for b, _ in boxes])
    assert areas.min() > 0.0799
    assert areas.max() > 0.9
    assert 0.4 < areas.mean() < 0.55
    assert 150 < sum(mirror for _, mirror in boxes) < 250


def test_resize_keeps_flat_images_and_fine_lines() -> None:
    flat = torch.full((3, 1, 8, 8), 77, dtype=torch.uint8)
    assert torch.equal(resize(flat, 32), torch.full((3, 1, 32, 32), 77, dtype=torch.uint8))
    line = torch.tensor([0, 0, 0, 200, 0, 0, 0, 0], dtype=torch.uint8).expand(1, 1, 8, 8)
    # Antialiased: without, the two samples lie beside the line and miss it.
    assert resize(line, 2).min() > 0
    data = load("digits", image_size=12)
    assert data.image_size == 12
    assert next(iter(data.batches("val", 4, device=CPU)))[0].shape == (4, 1, 12, 12)


def test_mean_and_std_of_known_pixels() -> None:
    images = torch.tensor([[0, 255], [51, 102]], dtype=torch.uint8).view(2, 2, 1, 1).expand(2, 2, 3, 3)
    mean, std = mean_and_std(images)
    assert mean == pytest.approx((0.1, 0.7))
    assert std == pytest.approx((0.1, 0.3))
    assert mean_and_std(torch.zeros(2, 1, 3, 3, dtype=torch.uint8)) == ((0.0,), (1.0,))


def test_evaluation_first_does_not_spoil_a_backward_pass() -> None:
    data = load("digits")
    with torch.inference_mode():
        data.normalize(next(data.batches("train", 4, device=CPU))[0])
    pixels = next(data.batches("train", 4, device=CPU))[0].requires_grad_()
    data.normalize(pixels).sum().backward()
    assert pixels.grad is not None
    assert torch.allclose(pixels.grad, torch.full_like(pixels, 1 / data.std[0]))


def test_a_set_is_kept_in_the_process_and_can_be_forgotten() -> None:
    first = load("digits")
    assert load("digits") is first
    assert load("digits", split_seed=1) is not first
    forget()
    assert load("digits") is not first


def test_the_split_moves_to_a_device_once() -> None:
    data = load("digits")
    meta = torch.device("meta")
    pairs = list(data.batches("train", 100, device=meta, seed=0, augment=True))
    assert {p.device for p, _ in pairs} == {q.device for _, q in pairs} == {meta}
    list(data.batches("train", 50, device=meta))
    assert len(data.source._resident) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "digitz"}, "Did you mean 'digits'"),
        ({"name": "imagefolder"}, "imagefolder:PATH"),
        ({"name": "imagefolder:PATH"}, "not a folder"),
        ({"name": "imagefolder:"}, "path is missing"),
        ({"name": "digits", "data_dir": Path("/nowhere/at/all")}, "not a folder"),
        ({"name": "digits", "data_dir": Path("/")}, "no effect"),
        ({"name": "digits", "val_fraction": 0.0001}, "change val_fraction"),
        ({"name": "digits", "val_fraction": 2}, "out of range"),
        ({"name": "digits", "train_examples": 5000}, "lower train_examples"),
        ({"name": "digits", "image_size": 4000}, "image_size at most 1545"),
        ({"name": "digits", "split_seed": -1}, "out of range"),
    ],
)
def test_bad_arguments_get_one_line_with_the_remedy(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_bad_batches_are_refused_at_once() -> None:
    data = load("digits", train_examples=20)
    with pytest.raises(UserError, match="lower batch_size or raise train_examples"):
        data.batches("train", 21, device=CPU, seed=0)
    with pytest.raises(UserError, match="give a seed"):
        data.batches("train", 5, device=CPU, augment=True)
    with pytest.raises(UserError, match="unknown split 'dev'"):
        data.batches("dev", 5, device=CPU)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at least 1"):
        data.steps("train", 0)
    assert data.steps("train", 20) == 1
