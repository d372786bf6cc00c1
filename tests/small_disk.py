"""A disk of a few megabytes that tests fill, make read-only and take away. It takes the right to mount one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PAGE = 4096


class SmallDisk:
    """A file system in memory, at ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self, spare: int = 0) -> None:
        """Take all the room there is, but for so many pages."""
        with (self.path / "filler").open("ab", buffering=0) as file:
            try:
                while file.write(bytes(PAGE)) == PAGE:
                    pass
            except OSError:
                file.truncate(max(0, file.tell() - spare * PAGE))

    def free(self) -> None:
        """Give it back."""
        (self.path / "filler").unlink()

    @contextmanager
    def read_only(self, folder: Path) -> Iterator[None]:
        """Within, nothing in this folder can be written, made or removed, by root either."""
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
            yield
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[SmallDisk]:
    """A new one, gone afterwards; the test is skipped where none can be mounted."""
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", path], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no small disk can be mounted ({done.stderr.strip()}): run as root, or in `unshare -rm`")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)
