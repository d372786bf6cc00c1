"""A results folder and its copy on a store: what belongs there, which of two is the newer, and what changed.

Rows and journals only ever grow, so the longer of two that begin alike is the newer, whatever any clock says; two that
do not begin alike are of two runs that went on from one state, and nobody can say which is wanted: a UserError. A
study's folder is as old as its rows and its journal are. Of other files the one that changed since they were last alike
counts, and if both did, ours.

Uploaded are, in this order, books, rows, journals (as they were before the rows were read), and the rest: so that on
the store there is no trial of which the journal knows the end, and the rows do not have it. The reverse can be, between
two uploads: rows whose trial the journal there does not know. Who only reads has them; who is to go on leaves them out,
for the trials would get their numbers again. Either way they are no state to rest on: the next start looks again.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from bench.config import UserError
from bench.disk import on_disk
from bench.lease import TakenError
from bench.objects import Store, Version
from bench.stores import embedded, key

#: reads: what is there is brought down. writes: and what changes is uploaded. shows: the pages are wanted, too.
Use = Literal["reads", "shows", "writes"]

#: The folder, beside the studies, that the mirror itself needs.
OWN = ".mirror"

ROWS, JOURNAL = "rows.jsonl", "journal.log"
_GROW = (ROWS, JOURNAL)
#: What a machine keeps to itself of a study, whatever that is called: locks, logs, what workers put on the store.
_LOCAL_NAMES = ("lock", "drivers", "ray.log", "checkpoints", "networks")
#: And beside the studies: the artifacts of MLflow's embedded store, and what is on its way to that one.
_LOCAL_BEGINS = ("mlartifacts/", f"spool/spool-{key(embedded(Path('/'))[0], Path('/'))}-")
_LOCAL_ENDS = (".lock", ".tmp", ".new", ".part")
#: What is drawn again from rows.
_PAGES = (".html", ".svg")
#: What is done with here is removed there.
_COMES_AND_GOES = "spool/"

_AT_A_TIME = 8


def belongs(name: str) -> bool:
    """Whether this file of a results folder has its copy on the store; files beside the studies' folders have none."""
    parts = PurePosixPath(name).parts
    if len(parts) < 2 or name.startswith(_LOCAL_BEGINS) or any(part.startswith(".") for part in parts):
        return False
    if any(part in _LOCAL_NAMES for part in parts[1:]):
        return False
    return not name.endswith(_LOCAL_ENDS) and ".lock." not in parts[-1]


def grows(name: str) -> bool:
    """Whether this file is only ever appended to."""
    return name.rpartition("/")[2] in _GROW


def files(folder: Path) -> Iterator[tuple[str, Path]]:
    """What belongs on the store of this results folder, by its name there."""
    for here, folders, names in os.walk(folder):
        within = Path(here) != folder
        folders[:] = [f for f in folders if not f.startswith(".") and not (within and f in _LOCAL_NAMES)]
        for path in (Path(here) / name for name in names):
            name = path.relative_to(folder).as_posix()
            if belongs(name):
                yield name, path


class Index:
    """What both sides were like when they were last alike, by name: ``there`` a Version, ``here`` size and time."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / OWN / "index.json"
        self._known: dict[str, dict[str, Any]] = {}
        with contextlib.suppress(FileNotFoundError, ValueError):  # lost or torn: everything is compared again
            self._known = json.loads(self._path.read_bytes())

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._known))

    def is_there(self, name: str, version: Version) -> bool:
        """Whether the store has what it had; a store that tells no times must be looked at."""
        return version[1] is not None and self._known.get(name, {}).get("there") == list(version)

    def may_be_there(self, name: str, version: Version) -> bool:
        """`is_there`, but by size alone where the store tells no times."""
        size, written = self._known.get(name, {}).get("there") or (None, None)
        return size == version[0] and written == version[1]

    def is_here(self, name: str, path: Path) -> bool:
        """Whether our file is what it was."""
        now = signature(path)
        return bool(now) and self._known.get(name, {}).get("here") == now

    def is_half(self, name: str) -> bool:
        """Whether the rows that the store had, and ours come from, were ahead of their journal."""
        return bool(self._known.get(name, {}).get("half"))

    def note(self, name: str, there: Version | None, here: list[int], *, half: bool = False) -> None:
        self._known[name] = {"there": list(there) if there else None, "here": here} | ({"half": True} if half else {})

    def forget(self, name: str) -> None:
        self._known.pop(name, None)

    def save(self) -> None:
        _write(self._path, json.dumps(self._known).encode())


def signature(path: Path) -> list[int]:
    """What changes when a file does; empty if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return []
    return [found.st_size, found.st_mtime_ns]


# --- down ------------------------------------------------------------------------------------------------


def bring(store: Store, folder: Path, index: Index, *, use: Use, say: Callable[[str], None]) -> None:
    """Make the folder as new as the store.

    UserError, and nothing of that study changed, where both sides went on from one state, and where rows, a journal or
    a book that were uploaded from here are not there any more.
    """
    there = {n: v for n, v in store.listing().items() if belongs(n) and (use == "shows" or not n.endswith(_PAGES))}
    _check_none_is_gone(store, folder, index, there)
    unknown = _unknown(folder, index, there)
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        found = dict(zip(unknown, pool.map(store.read, unknown), strict=True))
    for study in dict.fromkeys(name.partition("/")[0] for name in unknown):
        own = {name: data for name, data in found.items() if name.startswith(f"{study}/")}
        known = _without_strangers(study, own)
        half = [name for name in own if known[name] != own[name]]
        newer = _newer(store, folder, study, known if index.is_half(f"{study}/{ROWS}") else own, index)
        again = [n for n in own if newer == "equal" and (n in half or index.is_half(n))]
        names = [n for n in own if n in again or _is_wanted(n, folder / n, index, newer)]
        wanted = {name: (known if use == "writes" else own)[name] for name in names}
        if use == "writes" and wanted.keys() & half:
            lost = sum(own[name].count(b"\n") - known[name].count(b"\n") for name in half)
            say(f"{study}: {lost} trials were uploaded in part only, and are run again.")
        for name, data in wanted.items():
            _write(folder / name, data)
            index.note(name, there[name], signature(folder / name), half=name in half)
        for name in own.keys() - wanted.keys():  # as it is there we know it; ours is to be uploaded, if it differs
            here = [] if own[name] != (folder / name).read_bytes() else signature(folder / name)
            index.note(name, there[name], here, half=name in half)
    index.save()


def _unknown(folder: Path, index: Index, there: Mapping[str, Version]) -> list[str]:
    """What is to be read: what is not settled; and of a study both rows and journal, or neither."""
    new = {name for name, version in there.items() if not _is_settled(name, version, folder / name, index)}
    grown = {name.partition("/")[0] for name in new if grows(name)}
    return [name for name in there if name in new or (grows(name) and name.partition("/")[0] in grown)]


def _is_settled(name: str, version: Version, path: Path, index: Index) -> bool:
    """Whether there is nothing to compare: the store has what it had, and we what goes on from that."""
    if index.is_half(name) or not index.is_there(name, version):
        return False
    return index.is_here(name, path) if grows(name) else path.exists()


def _check_none_is_gone(store: Store, folder: Path, index: Index, there: Mapping[str, Version]) -> None:
    for name in index:
        if name in there or name.endswith(_PAGES) or not belongs(name):
            continue
        if (grows(name) or name.endswith(".yaml")) and (folder / name).exists():
            raise UserError(
                f"{store.uri} no longer has {name}, which was uploaded from here; restore it there, or move "
                f"{folder / name.partition('/')[0]} away."
            )
        index.forget(name)


def _newer(
    store: Store, folder: Path, study: str, own: Mapping[str, bytes], index: Index
) -> Literal["here", "there", "equal"]:
    """Which side of a study is ahead, by the files that only grow; half of an upload, as it came, says nothing."""
    asked = [n for n in own if grows(n) and not (index.is_half(n) and index.is_here(n, folder / n))]
    sides = {_ahead(folder / name, own[name]) for name in asked} - {"equal"}
    if len(sides) > 1 or "fork" in sides:
        raise UserError(
            f"{study} went on both in {store.uri} and in {folder / study}, from one state to two: move the latter away "
            "to go on with the former, or give this another --name."
        )
    return sides.pop() if sides else "equal"  # type: ignore[return-value]


def _ahead(path: Path, data: bytes) -> Literal["here", "there", "equal", "fork"]:
    here, there = whole_lines(path.read_bytes()) if path.exists() else b"", whole_lines(data)
    if here == there:
        return "equal"
    return "here" if here.startswith(there) else "there" if there.startswith(here) else "fork"


def whole_lines(data: bytes) -> bytes:
    """Without a last line that is not written to its end, or is no JSON: its writer may be at it, or was killed."""
    end = data.rfind(b"\n") + 1
    last = data.rfind(b"\n", 0, max(0, end - 1)) + 1
    try:
        json.loads(data[last:end] or b"{}")
    except ValueError:
        end = last
    return data[:end]


def _is_wanted(name: str, path: Path, index: Index, newer: str) -> bool:
    """Whether the store's takes the place of ours."""
    if not path.exists():
        return True
    if grows(name) or newer != "equal":
        return newer == "there"
    return index.is_here(name, path)


def _without_strangers(study: str, own: Mapping[str, bytes]) -> dict[str, bytes]:
    """Without the rows of trials that the journal, read with them, does not know."""
    rows, journal = own.get(f"{study}/{ROWS}"), own.get(f"{study}/{JOURNAL}")
    if rows is None or journal is None:
        return dict(own)
    return {**own, f"{study}/{ROWS}": b"".join(line for line in rows.splitlines(True) if _is_known(line, journal))}


def _is_known(line: bytes, journal: bytes) -> bool:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # whoever reads the rows refuses it, with its number
        return True
    return not isinstance(row, dict) or row.get("kind") != "search" or json.dumps(row.get("uid")).encode() in journal


def _write(path: Path, data: bytes) -> None:
    """The whole file or none of it; DiskError if the disk does not take it."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with on_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


# --- up --------------------------------------------------------------------------------------------------


def changed(folder: Path, index: Index) -> list[str]:
    """The names of what is not on the store as it is here, in the order in which it is to be uploaded."""
    return sorted((n for n, path in files(folder) if index.is_half(n) or not index.is_here(n, path)), key=_rank)


def _rank(name: str) -> tuple[int, str]:
    last = name.rpartition("/")[2]
    return (0 if last.endswith(".yaml") else 1 if last == ROWS else 2 if last == JOURNAL else 3, name)


def send(store: Store, folder: Path, index: Index, before_each: Callable[[], None]) -> int:
    """Upload what changed, one file after the other; how many that were. ``before_each`` may raise to end it.

    UserError where the store refuses a file; what is before it is uploaded then. `TakenError` rather than losing rows
    that another machine wrote.
    """
    names = changed(folder, index)
    journals = {name: _taken(folder / name) for name in names if _rank(name)[0] == 2}  # before any rows are read
    beside = {f"{name.removesuffix(JOURNAL)}{ROWS}" for name in journals}  # may have changed just now
    new = {name for name in beside if (folder / name).exists() and not index.is_here(name, folder / name)}
    names = sorted({*names, *new}, key=_rank)
    try:
        for name in names:
            before_each()
            here, data = journals.get(name) or _taken(folder / name)
            if data is not None:
                if grows(name):
                    _check_goes_on(store, name, data, index)
                if index.is_half(name):  # who was at it may have uploaded its journal since
                    _check_goes_on(store, *_journal_beside(folder, name), index)
                store.put(name, data)
                index.note(name, store.version(name), here)
        for name in _done_with(folder, index):
            store.remove(name)
            index.forget(name)
    finally:
        if names:
            index.save()
    return len(names)


def _check_goes_on(store: Store, name: str, data: bytes, index: Index) -> None:
    """`TakenError` if what is there is not what we know of, and not what ours goes on from: it would be lost."""
    version = store.version(name)
    if version is None or index.may_be_there(name, version) or data.startswith(whole_lines(store.read(name))):
        return
    raise TakenError(f"{store.uri}: another machine wrote {name} meanwhile; nothing more is uploaded from here.")


def _taken(path: Path) -> tuple[list[int], bytes | None]:
    """What a file is now; no content, if it has gone meanwhile. The signature first: what is written later counts."""
    here = signature(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return here, None
    return here, whole_lines(data) if path.name in _GROW else data


def _journal_beside(folder: Path, rows: str) -> tuple[str, bytes]:
    name = f"{rows.removesuffix(ROWS)}{JOURNAL}"
    return name, _taken(folder / name)[1] or b""


def _done_with(folder: Path, index: Index) -> Iterable[str]:
    return [n for n in index if n.startswith(_COMES_AND_GOES) and not (folder / n).exists()]


def sweep(store: Store) -> None:
    """Remove what killed runs left there: halves of files, and the checkpoints of runs that have their row."""
    names = store.listing()
    read = functools.lru_cache(maxsize=None)(store.read)
    for name in names:
        study, _, rest = name.partition("/checkpoints/")
        rows = [f"{folder}/{ROWS}" for folder in (study, "controls") if f"{folder}/{ROWS}" in names]
        uid = b'"uid": ' + json.dumps(rest.partition(".pt")[0]).encode()
        if name.endswith(".part") or (rest and any(uid in read(each) for each in rows)):
            store.remove(name)
