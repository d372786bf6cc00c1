"""Files that are whole or not there, and YAML that means what it says."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import IO, Any

import yaml

from bench.config import UserError, is_text

#: A number with an exponent, as YAML 1.2 has it. PyYAML follows 1.1, for which 1e-5 and 1.0e5 are text.
_EXPONENT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+\.?[0-9]*)[eE][-+]?[0-9]+$")

#: More values than any file here has, aliases counted as often as they stand: a few lines of them can mean billions.
_MOST_VALUES = 1_000_000

#: A whole number of more fits no float; and one of thousands of digits, as 0xfff… may have, Python does not write.
_MOST_BITS = 1024


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but a key is text as it is written, once; 1e-5 is a number; no tags, and no dates."""

    def fetch_tag(self) -> None:
        raise yaml.scanner.ScannerError(problem="tags ('!') are not used here", problem_mark=self.get_mark())

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(problem="a key must be text", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} stands twice; remove one", problem_mark=key.start_mark
                )
            seen.add(key.value)
        if any(key.tag.endswith(":merge") and isinstance(value, yaml.SequenceNode) for key, value in node.value):
            raise yaml.constructor.ConstructorError(problem="'<<' takes one alias", problem_mark=node.start_mark)
        self.flatten_mapping(node)
        # A primitive is named null: as a key, YAML would read it as "no value".
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}

    def construct_yaml_timestamp(self, node: yaml.Node) -> Any:
        raise yaml.constructor.ConstructorError(
            problem="a date is no value here; quote it", problem_mark=node.start_mark
        )


_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.construct_yaml_timestamp)


class _Dumper(yaml.SafeDumper):
    """The counterpart of `_Loader`: quotes the text that it would read as a number."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002  (PyYAML's signature)
        return True


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789."))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in this YAML file. UserError if it cannot be read, is not YAML or is not a mapping.

    Safe (plain values only), and stricter than YAML: keys are text, and none stands twice.
    """
    try:
        value = _load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8 (byte {error.start}); save it as UTF-8.") from error
    except yaml.MarkedYAMLError as error:
        where = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{where}: not valid YAML: {_one_line(error.problem)}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {_one_line(error)}.") from error
    if not isinstance(value, dict):
        found = "is empty" if value is None else f"holds a {type(value).__name__}"
        raise UserError(f"{path}: {found}; expected a mapping, lines of 'key: value'.")
    return value


def _load(text: str) -> Any:
    value = yaml.load(text, Loader=_Loader)
    if _count(value, {}) > _MOST_VALUES:
        raise ValueError("its aliases ('*') make it too large; write it out")
    return value


def _count(value: Any, known: dict[int, int]) -> int:
    """How many values there are in it, aliases written out; ValueError for one that holds itself, or is no text."""
    if isinstance(value, str) and not is_text(value):
        raise ValueError("half of a character ('\\ud800' to '\\udfff') stands alone")
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise ValueError("a whole number has more than 308 digits")
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = -1
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(v, known) for v in inner)
    if known[id(value)] < 0:
        raise ValueError("an alias ('*') stands in what it names; write it out")
    return known[id(value)]


def write_yaml(path: Path, value: dict[str, Any]) -> None:
    """Write plain values as YAML, whole or not at all; `read_yaml` gives them back. Keys keep their order."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    write_atomic(path, text)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file by `written_whole`, and its folder if it is missing. UserError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path, path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")) as file:
            file.write(content if isinstance(content, bytes) else content.encode())
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}. Free space there, or choose another folder."
        ) from error


@contextlib.contextmanager
def written_whole(path: Path, temporary: Path) -> Iterator[IO[bytes]]:
    """A file that takes the name ``path`` when the block ends well: a reader, or a crash, sees the old one or this.

    ``temporary``: its name until then, in the same folder; nothing of it is left if the block fails.
    """
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # on a disk that takes no change
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the others wait. The lock goes with its process, however that ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def take(file: int | IO[Any], *, shared: bool = False) -> bool:
    """Lock an open file until it is closed, without waiting; False if another process has it."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_taken(path: Path) -> bool:
    """Whether a living process holds the lock of a file: not of one that is missing, or of another user's."""
    try:
        with path.open("r+b") as file:
            return not take(file)
    except (FileNotFoundError, PermissionError):
        return False


def _sync_folder(folder: Path) -> None:
    """Make the rename itself last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _one_line(problem: object) -> str:
    return " ".join(str(problem).split())


def parse_scalar(key: str, text: str) -> Any:
    """One value as YAML has it (1e-3, true, [30, 60], text), as it stands after ``KEY=`` on the command line."""
    try:
        return _load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{key}={text}: not a value that YAML knows; quote it if it is text.") from error
