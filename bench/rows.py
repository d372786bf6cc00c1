"""Result rows: one append-only JSON Lines file per study, and the table that is read from it.

A row is one run: uid, study, kind, status, reason, config, evaluation, metrics, history, provenance, test_read.
A row counts once its newline is on the disk; what a killed writer left behind the last newline never was one.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.config import Kind, TrialConfig, TrialResult, UserError, digest, is_text
from bench.disk import on_disk
from bench.shape import check_row, check_text

if TYPE_CHECKING:
    import pandas

Row = dict[str, Any]

#: The study under which `bench train` files single runs; they are no part of any search.
TRAININGS = "train"

#: The keys of a row, in their order in the file; in a table the nested ones become columns ``key.*``.
FIELDS = (
    "uid",
    "study",
    "kind",
    "status",
    "reason",
    "test_read",
    "config",
    "evaluation",
    "metrics",
    "history",
    "provenance",
)


def row(uid: str, study: str, kind: Kind, result: TrialResult) -> Row:
    """The row of a run; ``test_read`` says whether a test metric is among its results."""
    filed = {"uid": uid, "study": study, "kind": kind, **result.to_dict()}
    filed["test_read"] = any(name.startswith("test_") for name in result.metrics)
    return {name: filed[name] for name in FIELDS}


def result_of(row: Mapping[str, Any]) -> TrialResult:
    """The result that was filed as this row. Inverse of `row`; strict, as every configuration is."""
    return TrialResult.from_dict({name: row[name] for name in TrialResult.field_names() if name in row})


class RowFile:
    """The rows of one study, in the order in which they were appended.

    Reading changes nothing, so a report may read while a search writes. The first ``append`` after a crash
    cuts a torn last line (no newline, or no JSON), keeps it as ``<file>.torn`` and says so. Several
    processes may append: each append holds the file's lock. ``say`` receives one line for the user.
    """

    def __init__(self, path: Path, *, say: Callable[[str], None] = print) -> None:
        self.path = path
        self._say = say
        self._uids: set[str] = set()  # what the file held when it was last read, by an append:
        self._lines = 0  # so many lines,
        self._end = 0  # so many bytes
        self._known = False  # it has been there
        self._missing = [f for f in reversed(path.absolute().parents) if not f.exists()]

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one line, and return when it is on the disk.

        Errors: UserError for a row that `read` would refuse, a number that is not finite, a uid that is in
        the file already, and (a DiskError) a place that cannot be written, or is gone.
        """
        line = _line(row)
        with on_disk(self.path), self._open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._catch_up(file)
            if row["uid"] in self._uids:
                raise UserError(f"{self.path}: uid {row['uid']!r} is there already; a run is filed once.")
            self._write(file, line)

    def read(self) -> list[Row]:
        """All rows. A torn last line is left out and said; a corrupt one before it is a UserError."""
        with on_disk(self.path, "read"):
            self._known = self._known or self.path.exists()
            if not self._known:
                return []
            whole, torn = _split(self.path.read_bytes())
        if torn:
            self._say(f"{self.path}: the last line is torn ({len(torn)} bytes: a writer was killed there); left out.")
        return _parse(self.path, whole, set(), 1)

    def by_uid(self) -> dict[str, Row]:
        """All rows by their uid, in the order of the file."""
        return {row["uid"]: row for row in self.read()}

    def _open(self) -> io.FileIO:
        """The file, made with its folder if it never was there: one that has gone since took the study with it."""
        if not self._known:
            for folder in self._missing:
                folder.mkdir(exist_ok=True)
        made = 0 if self._known else os.O_CREAT
        file = io.FileIO(os.open(self.path, os.O_RDWR | os.O_APPEND | made, 0o666), "a+")
        self._known = True
        return file

    def _catch_up(self, file: io.FileIO) -> None:
        """Learn what others appended since, and cut what a killed writer left behind."""
        if os.fstat(file.fileno()).st_size < self._end:
            raise UserError(f"{self.path} became shorter while it was in use; restore it, then start again.")
        file.seek(self._end)
        whole, torn = _split(file.readall())
        self._lines += len(_parse(self.path, whole, self._uids, self._lines + 1))
        self._end += len(whole)
        if torn:
            kept = self.path.with_name(f"{self.path.name}.torn")
            with kept.open("ab") as beside:
                beside.write(torn + b"\n")
            os.ftruncate(file.fileno(), self._end)
            self._say(
                f"{self.path}: the last line was torn ({len(torn)} bytes, a killed writer); moved to {kept.name}."
            )

    def _write(self, file: io.FileIO, line: bytes) -> None:
        """The whole line or nothing of it."""
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), self._end)
            raise


def _line(row: Mapping[str, Any]) -> bytes:
    """The row as a line of the file; UserError for one that `read` would refuse, and the whole file with it."""
    if set(row) != set(FIELDS):
        raise UserError(
            f"a row has the keys {', '.join(FIELDS)}; wrong or missing: {', '.join(set(row) ^ set(FIELDS))}."
        )
    try:
        text = json.dumps(row, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        bad = [name for name, value in flatten(row) if isinstance(value, float) and not math.isfinite(value)]
        raise UserError(
            f"row {row['uid']}: {', '.join(bad)} is not finite; leave it out and give the reason."
        ) from error
    try:
        check_row(json.loads(text))  # as it is read: a tuple is a list then
        if not is_text(text):
            raise UserError("it has half of a character.")
    except UserError as error:
        raise UserError(f"row {row['uid']!r} is not filed, for it could not be read again: {error}") from error
    return text.encode() + b"\n"


def _split(data: bytes) -> tuple[bytes, bytes]:
    """The whole lines, and the torn last one (empty if there is none)."""
    end = data.rfind(b"\n") + 1
    if end == len(data) and end:
        last = data.rfind(b"\n", 0, end - 1) + 1
        if _load(data[last:]) is None:
            end = last
    return data[:end], data[end:]


def _load(line: bytes) -> Row | None:
    """The row on this line; None if it holds none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and "uid" in value else None


def _parse(path: Path, data: bytes, uids: set[str], first: int) -> list[Row]:
    """The rows of whole lines, the first of which has this number; their uids are added to ``uids``."""
    rows = []
    for number, line in enumerate(data.split(b"\n")[:-1], first):
        found = _load(line)
        if found is None:
            raise UserError(f"{path}, line {number}: not a result row. Repair or remove that line.")
        try:
            check_row(found)
            check_text(line)
        except UserError as error:
            raise UserError(f"{path}, line {number}: not a result row: {error} Repair or remove that line.") from error
        if found["uid"] in uids:
            raise UserError(f"{path}, line {number}: uid {found['uid']!r} a second time; remove one of the two.")
        uids.add(found["uid"])
        found.setdefault("evaluation", {})
        rows.append(found)
    return rows


def last_attempts(rows: Iterable[Row]) -> list[Row]:
    """Of the attempts at one run (uid, uid.2, uid.3, ...) the last."""
    by_uid = {row["uid"]: row for row in rows}
    return [row for uid, row in by_uid.items() if _next_attempt(uid, by_uid) not in by_uid]


def _next_attempt(uid: str, known: Mapping[str, Row]) -> str:
    tried = re.fullmatch(r"(.+)\.(\d+)", uid)
    return f"{tried[1]}.{int(tried[2]) + 1}" if tried and tried[1] in known else f"{uid}.2"


def attempts(base: str, known: Collection[str]) -> list[str]:
    """The names under which a run was tried (uid, uid.2, ...), and that of the next attempt."""
    names = [base]
    while names[-1] in known:
        names.append(f"{base}.{len(names) + 1}")
    return names


@dataclass(frozen=True, kw_only=True)
class Data:
    """What runs were measured on. ``key``: device and data, as in `bench.place.Place`; ``chance``: of guessing."""

    key: str
    examples: Mapping[str, int]
    chance: float


def control_uid(config: TrialConfig, key: str) -> str:
    """The name of a control's run, in every search beside which it stands; ``key`` as in `bench.place.Place`."""
    return f"control-{config.rule}-{digest([config.identity(), key])}"


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of nested mappings and lists of mappings."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flatten(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(v, Mapping) for v in value):
        for index, inner in enumerate(value):
            yield from flatten(inner, f"{name}.{index}")
    else:
        yield name, tuple(value) if isinstance(value, list) else value


def table(rows: Iterable[Mapping[str, Any]]) -> pandas.DataFrame:
    """One line per run; nested keys become columns ``config.lr``, ``metrics.val_acc``; history is left out.

    A key that a run lacks is missing (NaN or None) in its line; lists become tuples, so that groupby works.
    """
    import pandas as pd

    kept = [name for name in FIELDS if name != "history"]
    lines = [dict(flatten({name: row[name] for name in kept if name in row})) for row in rows]
    flat = [name for name in kept if name not in ("config", "evaluation", "metrics", "provenance")]
    nested = sorted({name for line in lines for name in line} - set(flat), key=lambda n: kept.index(n.split(".")[0]))
    return pd.DataFrame(lines, columns=[*flat, *nested])
