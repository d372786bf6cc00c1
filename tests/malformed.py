"""Malformed things close to valid ones, for the property tests: bytes, JSON values and lines with one or two faults.

`make test` tries some hundred of each; BENCH_TIMES=10 (`make test-faults`) ten times as many.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from bench.cli import main
from bench.config import UserError

TIMES = int(os.environ.get("BENCH_TIMES", "1"))

#: What stands in place of a word: empty, long, of another kind, in other letters, or a command to somebody else.
ODD_TEXTS = (
    *(
        "",
        " ",
        "0",
        "-1",
        "1e999",
        "nan",
        "null",
        "None",
        "true",
        "[",
        "{}",
        "a,b",
        ",",
        "=",
        "%s",
        "{x}",
        "..",
        "~x/y",
    ),
    *(
        "a\nb",
        "a\rb",
        "\ttab",
        "é",
        "名前",
        "\u202eevil",
        "\x1b[31mred",
        "\x07",
        "a" * 300,
        "9" * 5000,
        "-",
        "--",
        "'\"",
    ),
    *("<script>alert(1)</script>", "=1+1", "../../etc/passwd", "/dev/null/x", "\ufeff", "\ud800", "nan,nan", "1,,2"),
)
ODD_NUMBERS = (-1, 0, 1, 2**31, 2**63, 10**400, -0.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"))


def nested(depth: int) -> Any:
    """A list in a list in a list ..."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


ODD_VALUES = (
    *ODD_NUMBERS,
    *ODD_TEXTS,
    None,
    True,
    False,
    [],
    {},
    [None],
    {"": 1},
    [1, "a"],
    {"a": {"b": []}},
    nested(50),
)


def examples(count: int) -> Any:
    """Hypothesis' settings for so many examples, or a multiple of it."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=count * TIMES, suppress_health_check=checks)


# --- bytes


def _cut(draw: Any, data: bytes) -> bytes:
    return data[: draw(st.integers(0, len(data)))]


def _flip(draw: Any, data: bytes) -> bytes:
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        if found:
            found[draw(st.integers(0, len(found) - 1))] ^= draw(st.integers(1, 255))
    return bytes(found)


def _insert(draw: Any, data: bytes) -> bytes:
    at = draw(st.integers(0, len(data)))
    odd = (b"\0", b"\xff\xfe", b"\n", b"\r\n", b"\xef\xbb\xbf", b"{", b'"', b"9" * 400, b"\xed\xa0\x80", b"\x1b[2J")
    return data[:at] + draw(st.sampled_from(odd) | st.binary(min_size=1, max_size=8)) + data[at:]


def _drop(draw: Any, data: bytes) -> bytes:
    start = draw(st.integers(0, len(data)))
    return data[:start] + data[start + draw(st.integers(1, 40)) :]


def _double(draw: Any, data: bytes) -> bytes:
    lines = data.splitlines(keepends=True) or [b""]
    at = draw(st.integers(0, len(lines) - 1))
    return b"".join([*lines[: at + 1], *lines[at:]])


def _whole(draw: Any, data: bytes) -> bytes:
    odd = (b"", b"\n", b"\0" * 64, b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n"), data[::-1], b"[" * 100_000)
    return draw(st.sampled_from(odd))


@st.composite
def damaged(draw: Any, data: bytes) -> bytes:
    """The bytes with one fault, or two."""
    for fault in draw(
        st.lists(st.sampled_from((_cut, _flip, _insert, _drop, _double, _whole)), min_size=1, max_size=2)
    ):
        data = fault(draw, data)
    return data


# --- values


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from _places(each, (*at, key))


def _put(value: Any, at: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    if not at:
        return change(value)
    if isinstance(value, dict):
        return {key: _put(each, at[1:], change) if key == at[0] else each for key, each in value.items()}
    return [_put(each, at[1:], change) if key == at[0] else each for key, each in enumerate(value)]


def _without(value: Any, key: Any) -> Any:
    if isinstance(value, dict):
        return {k: v for k, v in value.items() if k != key}
    return [v for i, v in enumerate(value) if i != key]


def _replaced(inner: Any, key: Any, odd: Any) -> Any:
    if isinstance(inner, dict):
        return {**inner, key: odd}
    return [odd if place == key else each for place, each in enumerate(inner)]


def _renamed(inner: Any, key: Any, name: str) -> Any:
    return {name if k == key else k: v for k, v in inner.items()} if isinstance(inner, dict) else inner[::-1]


def _added(inner: Any, name: str, odd: Any) -> Any:
    return {**inner, name: odd} if isinstance(inner, dict) else [*inner, odd]


@st.composite
def mutated(draw: Any, value: Any) -> Any:
    """A JSON value with one fault, or two: something replaced, left out, renamed, or added."""
    for _ in range(draw(st.integers(1, 2))):
        *above, key = draw(st.sampled_from([place for place in _places(value) if place] or [(None,)]))
        name, odd = draw(st.sampled_from(ODD_TEXTS)), draw(st.sampled_from(ODD_VALUES))
        if key is None:  # a fault before has left nothing
            return odd
        fault = draw(st.sampled_from(("replace", "replace", "leave out", "rename", "add")))
        changes: dict[str, Callable[[Any], Any]] = {
            "replace": partial(_replaced, key=key, odd=odd),
            "leave out": partial(_without, key=key),
            "rename": partial(_renamed, key=key, name=name),
            "add": partial(_added, name=name, odd=odd),
        }
        value = _put(value, tuple(above), changes[fault])
    return value


# --- what must come of it


@contextlib.contextmanager
def refused_in_one_line() -> Iterator[None]:
    """Whatever is wrong is a UserError of one line; anything else passes through, and fails the test."""
    said = []
    try:
        yield
    except UserError as error:
        said.append(str(error))
    for text in said:
        assert text.isprintable(), f"more than one printable line: {text!r}"
        assert text


def files(folder: Path) -> dict[str, bytes]:
    """All files below a folder, and what is in them."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run(arguments: list[str]) -> tuple[int, str, str]:
    """A command as the shell has it: its exit status, stdout and stderr; both take UTF-8 only, as a terminal's do."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=e) for e in ("strict", "backslashreplace"))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(arguments)
        except SystemExit as end:  # of --help and --version
            status = -1 if end.code else 0
    for stream in (out, err):
        stream.flush()
    return status, *(s.buffer.getvalue().decode("utf-8") for s in (out, err))  # type: ignore[attr-defined]


def said_in_one_line(status: int, err: str) -> None:
    """A refused command has said why, in its last line."""
    assert status in (0, 1, 2), f"status {status}: {err}"
    if status == 2:
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        assert err.startswith("bench: ")
