"""The pickles in which CIFAR is published for Python, read without doing what they say.

A pickle is a program, and may call whatever it can name. This reader looks through it first: it may say only what
makes dictionaries, lists, numbers, text and arrays. It knows four names, which make an array of bytes, and puts its own
stand-ins in their place, so that not even numpy acts on what a file says; any other name is refused.
Source: Python's documentation of pickle, "Restricting Globals", and of pickletools; numpy's ndarray.__reduce__.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import warnings
from typing import Any, NoReturn

import numpy as np

from bench.config import UserError
from bench.datasets.raw import Pixels

#: What unpickling raises on damaged bytes: it looks at nothing before it acts on it.
_DAMAGE = (
    *(pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, ImportError),
    *(MemoryError, OverflowError, RecursionError),
)


#: What CIFAR's pickles are made of, whichever Python wrote them; by pickletools' names.
_OPCODES = {
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "NONE", "NEWTRUE", "NEWFALSE"),
    *("EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "LIST", "APPEND", "APPENDS"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "INT", "BININT", "BININT1", "BININT2"),
    *("LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
    *("GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
}


#: CIFAR's largest tuple says what an array is, in some ten values.
_LARGEST_TUPLE = 1000


def read_pickle(content: bytes, where: str) -> dict[bytes, Any]:
    """The dictionary in a pickle of Python 2 or 3: numbers, lists, text as bytes, arrays as `array_of` takes them.

    Errors: UserError that names ``where``, for anything else; nothing of it has been run then.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a backslash in a name
            _look_through(content)
        value = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except _DAMAGE as error:
        raise UserError(f"{where}: cannot be read ({type(error).__name__}); fetch it again.") from error
    if type(value) is not dict:
        raise UserError(f"{where}: holds no dictionary; fetch it again.")
    return {key.encode(errors="replace") if isinstance(key, str) else key: item for key, item in value.items()}


def _look_through(content: bytes) -> None:
    """UserError for an instruction that CIFAR has no need of; ValueError for lengths and places beyond the file."""
    sizes = _Sizes()
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name not in _OPCODES:
            raise UserError(f"does {opcode.name}, which no CIFAR does: it may be meant to do harm; delete it.")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= int(argument or 0) <= len(content):
            raise ValueError("it asks for more memory than it can use")  # of gigabytes, in six bytes
        sizes.follow(opcode, argument)


class _Sizes:
    """What lies on a pickle's stack, each by its size: of a tuple how many values it holds, tuples in it written out.

    Whatever reads a key reads all of it: of tuples of tuples, too many for Python's stack, or for anybody's time.
    """

    def __init__(self) -> None:
        self._stack: list[int | None] = []  # None: a mark
        self._memo: dict[int, int | None] = {}

    def follow(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """As an instruction changes it. ValueError for a tuple that is too large; IndexError, KeyError for nonsense."""
        if opcode.name.endswith("PUT") or opcode.name == "MEMOIZE":
            self._memo[len(self._memo) if argument is None else int(argument)] = self._stack[-1]
        elif opcode.name.endswith("GET"):
            self._stack.append(self._memo[int(argument)])
        elif opcode.name == "MARK":
            self._stack.append(None)
        else:
            taken = self._take(opcode.stack_before)
            size = 1 + sum(each or 0 for each in taken) if "TUPLE" in opcode.name else 1
            if size > _LARGEST_TUPLE:
                raise ValueError("it has a larger tuple than it can need")
            self._stack += [size] * len(opcode.stack_after)

    def _take(self, before: list[pickletools.StackObject]) -> list[int | None]:
        taken = []
        if pickletools.markobject in before:
            before = before[: before.index(pickletools.markobject)]
            while (top := self._stack.pop()) is not None:
                taken.append(top)
        return taken + [self._stack.pop() for _ in before]


def array_of(value: Any, width: int, where: str) -> Pixels:
    """The array (n, ``width``) of unsigned bytes that a pickle holds. Errors: UserError that names ``where``."""
    wrong = UserError(f"{where}: has no array of bytes, {width} wide; fetch it again.")
    if not isinstance(value, _Array) or not isinstance(value.state, tuple) or len(value.state) != 5:
        raise wrong
    _, shape, kind, in_columns, data = value.state
    whole = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
    if not (whole and isinstance(kind, _Kind) and kind.name in (b"u1", "u1") and isinstance(data, bytes)):
        raise wrong
    if len(shape) != 2 or shape[1] != width or math.prod(shape) != len(data):
        raise wrong
    return np.frombuffer(data, dtype=np.uint8).reshape(shape, order="F" if in_columns else "C")


class _Stand:
    """Stands for something of numpy's while a pickle is read. It has no attributes that a pickle could set."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Array(_Stand):
    """An array: the version of its form, shape, type, whether by columns, and bytes."""

    __slots__ = ()


class _Kind(_Stand):
    """A type of numbers: "u1" is unsigned bytes."""

    __slots__ = ("name",)

    def __init__(self, name: Any) -> None:
        super().__init__()
        self.name = name


class _Name:
    """What a pickle can name and call."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *arguments: Any) -> Any:
        if self._name == "encode" and len(arguments) == 2 and isinstance(arguments[0], str):
            return arguments[0].encode("latin1")  # how Python 3 writes bytes for Python 2
        if self._name == "dtype" and arguments:
            return _Kind(arguments[0])
        if self._name == "_reconstruct":
            return _Array()
        raise ValueError(f"{self._name} is not called so")

    def __setstate__(self, _: Any) -> NoReturn:
        raise ValueError(f"{self._name} has no state")


_NAMES = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): "_reconstruct" for core in ("core", "_core")},
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
}


class _Unpickler(pickle.Unpickler):
    """Finds the names in `_NAMES`, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise UserError(f"asks for {module}.{name}, which no CIFAR has: it may be meant to do harm; delete it.")
        return _Name(_NAMES[module, name])
