"""Random numbers as a pure function of whole numbers: no state, no global generator.

They are the raw output of NumPy's Philox generator, whose stream is frozen across NumPy versions (that of
``permutation`` or of torch's generators is not): a split is part of the protocol and must stay.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

#: The last word of each stream, so that no two uses share their bits.
VALIDATION, SUBSET, TEST, ORDER, SHIFTS, CROPS = range(6)


def bits(count: int, *words: int) -> npt.NDArray[np.uint64]:
    """``count`` random 64-bit words of the stream that these non-negative ``words`` name."""
    return np.asarray(np.random.Philox(np.random.SeedSequence(words)).random_raw(count))


def permutation(count: int, *words: int) -> Indices:
    """A permutation of 0 ... count - 1."""
    return np.argsort(bits(count, *words), kind="stable")


def uniforms(count: int, *words: int) -> npt.NDArray[np.float64]:
    """``count`` numbers in [0, 1), multiples of 2^-53."""
    return (bits(count, *words) >> np.uint64(11)).astype(np.float64) * 2.0**-53
