"""Whole files under faults, and YAML that comes back as it was written."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import files
from bench.config import UserError
from bench.files import parse_scalar, read_yaml, write_atomic, write_yaml

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False)
    | st.text()
    | st.sampled_from(["null", "on", "1e5", "12e3", "1e-5", "1.0", "0x1f", "2020-01-01", "<<", "~", "!x", "# no"])
)
KEYS = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1) | st.sampled_from(
    ["null", "1e5", "<<"]
)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(KEYS, v, max_size=3), max_leaves=8)


@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_yaml_comes_back_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, value: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    write_yaml(path, value)
    assert read_yaml(path) == value
    assert list(read_yaml(path)) == list(value)  # the order too


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("null: 1e-5", {"null": 1e-5}),
        ("a: 1e5\nb: 1.5E+3\nc: -.5e1", {"a": 1e5, "b": 1500.0, "c": -5.0}),
        ("on: off\n1: '1e-5'", {"on": False, "1": "1e-5"}),
        ("a: &x {b: 1}\nc: {<<: *x, d: 2}", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
    ],
)
def test_what_is_read(tmp_path: Path, text: str, value: dict[str, Any]) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert read_yaml(path) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"a: 1\nb: {c: 1, d: 2,\n c: 3}", "a.yaml:3: not valid YAML: the key 'c' stands twice; remove one."),
        (b"a: [1, 2", "a.yaml:1: not valid YAML"),
        (b"a: !!python/object/apply:os.system [ls]", "tags ('!') are not used here"),
        (b"? [1, 2]\n: 3", "a key must be text"),
        (b"", "is empty; expected a mapping"),
        (b"- 1", "holds a list; expected a mapping"),
        (b"a: 1\n---\nb: 2", "another document"),
        (b"a: \x01", "not valid YAML"),
        (b"a: \xff", "not text in UTF-8 (byte 3)"),
        (b"a: 2020-13-45", "not valid YAML"),
        (b"[" * 5000, "not valid YAML"),
    ],
)
def test_what_is_refused_in_one_line(tmp_path: Path, text: bytes, words: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(text)
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_what_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"^cannot read .*\.$"):
        read_yaml(tmp_path / name)


def test_write_makes_the_folder_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    for text in ("first", "second: å\n"):
        write_atomic(path, text)
        assert path.read_text(encoding="utf-8") == text
        assert list(path.parent.iterdir()) == [path]


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("number", ["0x" + "f" * 5000, "0b1" + "0" * 1024, "1" + "0" * 400])
def test_a_number_that_is_too_long_for_any_float_is_refused_in_one_line(tmp_path: Path, number: str) -> None:
    (tmp_path / "a.yaml").write_text(f"lr: [0.1, {number}]\n")
    with pytest.raises(UserError, match="more than 308 digits"):
        read_yaml(tmp_path / "a.yaml")
    with pytest.raises(UserError, match=r"^lr=.*: not a value"):
        parse_scalar("lr", number)


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_atomic(path, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("in the way")
    with pytest.raises(UserError, match=r"^cannot write .*a/b: .*choose another folder\.$"):
        write_atomic(tmp_path / "a" / "b", "text")


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    size = 200_000
    code = (
        "import itertools, sys; from pathlib import Path; from bench.files import write_atomic\n"
        f"for i in itertools.count(): write_atomic(Path(sys.argv[1]), str(i % 10) * {size})"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
    try:
        while not path.exists():
            assert writer.poll() is None
            time.sleep(0.01)
        for _ in range(50):
            text = path.read_text()
            assert len(text) == size
            assert len(set(text)) == 1
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    text = path.read_text()
    assert len(text) == size
    assert len(set(text)) == 1
