"""scikit-learn's digits: 1,797 real 8 x 8 images, part of the package."""

from __future__ import annotations

import numpy as np

from bench.config import UserError
from bench.datasets.draws import TEST
from bench.datasets.raw import Arrays, DatasetRow, Request, digest_arrays
from bench.datasets.splits import take

#: The set has no official test part: this cut is ours, and part of the protocol. It depends on no seed of a run.
_TEST_SEED, _TEST_FRACTION = 1797, 0.2


def read_digits(row: DatasetRow, request: Request) -> Arrays:
    """Sixteen grey levels, scaled to 0 ... 255; one fifth of each class is the test part."""
    from sklearn.datasets import load_digits

    if request.data_dir is not None:
        raise UserError(f"{row.name} is part of scikit-learn, so data_dir has no effect; leave it out.")
    bunch = load_digits()
    everything = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    classes = np.asarray(bunch.target, dtype=np.int64)
    test = take(classes, round(_TEST_FRACTION * len(classes)), _TEST_SEED, TEST)
    train = np.setdiff1d(np.arange(len(classes)), test, assume_unique=True)
    pixels = {"train": everything[train], "test": everything[test]}
    labels = {"train": classes[train], "test": classes[test]}
    return Arrays(digest=digest_arrays(pixels, labels), classes=10, pixels=pixels, labels=labels)
