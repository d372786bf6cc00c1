"""The pickles in which CIFAR is published for Python. A pickle may call whatever it can name: these name four things.

Source: Python's documentation of pickle, "Restricting Globals".
"""

from __future__ import annotations

import io
import pickle
import pickletools
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from bench.config import UserError
from bench.datasets.raw import Pixels

#: The largest tuple says what an array is, in some ten values, of which one is a tuple.
_LARGEST_TUPLE = 1000


def _encode(text: str, _: str) -> bytes:
    """How Python 3 writes bytes for Python 2."""
    return text.encode("latin1")


_RECONSTRUCT = np.empty(0).__reduce__()[0]
_NAMES: dict[tuple[str, str], Any] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _RECONSTRUCT for core in ("core", "_core")},
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
}


def _small(load: Callable[[Any], None]) -> Callable[[Any], None]:
    """Whoever looks up a key reads all of it: of tuples of tuples, too many for the stack, or for anybody's time."""

    def load_tuple(unpickler: Any) -> None:
        load(unpickler)
        found = unpickler.stack[-1]
        deep = any(type(each) is tuple for inner in found if type(inner) is tuple for each in inner)
        if deep or len(found) > _LARGEST_TUPLE:
            raise ValueError("it has a larger tuple than it can need")

    return load_tuple


def _build(unpickler: Any) -> None:
    """Arrays and their types have a state; what the names stand for keeps its own."""
    if type(unpickler.stack[-2]) is not np.ndarray and not isinstance(unpickler.stack[-2], np.dtype):
        raise ValueError("it changes what is no array")
    _LOAD[pickle.BUILD[0]](unpickler)


_LOAD = pickle._Unpickler.dispatch


class _Unpickler(pickle._Unpickler):
    """Finds the names in `_NAMES`, and nothing else; makes small tuples only."""

    dispatch: ClassVar[dict[int, Any]] = {
        **_LOAD,
        **{code[0]: _small(_LOAD[code[0]]) for code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)},
        pickle.BUILD[0]: _build,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise UserError(f"asks for {module}.{name}, which no CIFAR has: it may be meant to do harm; delete it.")
        return _NAMES[module, name]


def read_pickle(content: bytes, where: str) -> dict[bytes, Any]:
    """The dictionary in a pickle of Python 2 or 3. UserError that names ``where``, for anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a backslash in a name, or of a type that numpy no longer has
            for opcode, place, _ in pickletools.genops(content):  # it raises for lengths beyond the file
                if "PUT" in opcode.name and not 0 <= int(place or 0) <= len(content):
                    raise ValueError("it asks for more memory than it can use")
            value = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except Exception as error:  # unpickling looks at nothing before it acts on it
        raise UserError(f"{where}: cannot be read ({type(error).__name__}); fetch it again.") from error
    if type(value) is not dict:
        raise UserError(f"{where}: holds no dictionary; fetch it again.")
    return {key.encode(errors="replace") if isinstance(key, str) else key: item for key, item in value.items()}


def array_of(value: Any, width: int, where: str) -> Pixels:
    """The array (n, ``width``) of unsigned bytes that a pickle holds. Errors: UserError that names ``where``."""
    if type(value) is not np.ndarray or value.dtype != np.uint8 or value.shape[1:] != (width,):
        raise UserError(f"{where}: has no array of bytes, {width} wide; fetch it again.")
    return value
