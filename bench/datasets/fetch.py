"""Files on disk: the user's cache, atomic writing, one process at a time, checksummed downloads."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import sys
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.config import UserError
from bench.files import locked, written_whole

_CHUNK = 1 << 20
_TIMEOUT = 30.0


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A published file. ``sha256`` is that of the file as kept; with ``gunzip``, of its uncompressed content."""

    name: str
    url: str
    sha256: str
    gunzip: bool = False


def say(message: str) -> None:
    """One line for the user, on stderr."""
    print(f"bench: {message}", file=sys.stderr, flush=True)


def user_cache() -> Path:
    """Where files that can be made again are kept: $XDG_CACHE_HOME/bench, by default ~/.cache/bench."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bench"


def existing_folder(path: Path, what: str) -> Path:
    """``path`` if it is a folder; UserError otherwise."""
    try:
        found = path.is_dir()
    except OSError as error:
        raise UserError(f"{what}: {path} cannot be looked at ({error.strerror}); check the path.") from error
    if not found:
        raise UserError(f"{what}: {path} is not a folder; check the path.")
    return path


def written_out(path: Path) -> Path:
    """``path`` with the home folder in place of ~ or ~NAME; UserError if there is none."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: there is no such home folder; write the path out.") from error


def writable_folder(candidates: Sequence[Path]) -> Path:
    """The first of these folders that can be made and written in; UserError with all reasons if none can."""
    reasons = []
    for folder in candidates:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as error:
            reasons.append(f"{folder} ({error.strerror})")
    raise UserError(f"cannot write in {' or '.join(reasons)}; point XDG_CACHE_HOME at a folder that can be written.")


def part_of(target: Path) -> Path:
    """The name of a file that is being written: fixed, for one writer at a time overwrites what a killed one left."""
    return target.with_name(f".{target.name}.part")


def sha256_of(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def download(remote: RemoteFile, folder: Path, advice: str) -> Path:
    """The file in ``folder``, fetched if it is not there yet; kept only if its checksum is right.

    Errors: UserError that ends with ``advice``.
    """
    target = folder / remote.name
    with locked(folder / ".lock"):
        if target.is_file():
            return target
        say(f"downloading {remote.url} to {target}")
        try:
            with written_whole(target, part_of(target)) as handle:
                found = _copy(remote, handle.write)
                if found != remote.sha256:
                    raise UserError(f"{remote.url}: sha256 is {found}, not the published {remote.sha256}. {advice}")
        except (OSError, http.client.HTTPException, EOFError, zlib.error) as error:
            raise UserError(f"cannot download {remote.url} ({error}). {advice}") from error
    return target


def _copy(remote: RemoteFile, write: Callable[[bytes], int]) -> str:
    """Stream the file's content to ``write``; its sha256."""
    sha = hashlib.sha256()
    with urllib.request.urlopen(remote.url, timeout=_TIMEOUT) as response:
        source = gzip.GzipFile(fileobj=response) if remote.gunzip else response
        while chunk := source.read(_CHUNK):
            sha.update(chunk)
            write(chunk)
    return sha.hexdigest()
