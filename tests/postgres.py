"""A PostgreSQL server of a test's own, on loopback, in a folder that goes away with it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlflow_book import free_port

PASSWORD = "not-to-be-shown"


def _tool(name: str) -> str | None:
    """Debian keeps the server's programs off the path."""
    found = shutil.which(name)
    return found or next(map(str, sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)), None)


def missing() -> str | None:
    """Why there can be no server here; None if there can."""
    if _tool("initdb") is None or _tool("pg_ctl") is None:
        return "no PostgreSQL server on this machine: `make postgresql` installs Debian's"
    if importlib.util.find_spec("psycopg") is None:
        return "the package psycopg is missing: pip install 'bench[postgresql]'"
    return None


class Server:
    """``url``: as --storage takes it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"postgresql://bench:{PASSWORD}@127.0.0.1:{self.port}/postgres"
        (folder / "password").write_text(PASSWORD)
        self._owner: dict[str, Any] = {}
        if os.geteuid() == 0:  # which PostgreSQL refuses to be
            user = next(u for u in pwd.getpwall() if u.pw_name in ("postgres", "nobody"))
            self._owner = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            for path in (folder, folder / "password"):
                os.chown(path, user.pw_uid, user.pw_gid)
        login = ("-U", "bench", "-A", "scram-sha-256", "--pwfile", str(folder / "password"))
        self._run("initdb", "-D", str(folder / "data"), *login)

    def _run(self, tool: str, *arguments: str) -> None:
        command = [str(_tool(tool)), *arguments]
        log = self.folder / "tools.log"
        with log.open("ab") as out:  # and no pipe: the server would hold it open
            done = subprocess.run(command, stdout=out, stderr=out, cwd=self.folder, check=False, **self._owner)
        assert done.returncode == 0, log.read_text()

    def start(self) -> None:
        options = f"-h 127.0.0.1 -p {self.port} -k ''"
        self._run(
            "pg_ctl", "-D", str(self.folder / "data"), "-l", str(self.folder / "log"), "-w", "-o", options, "start"
        )

    def stop(self, mode: str = "immediate") -> None:
        """``immediate``: as a crash; ``fast``: every connection is ended with a word."""
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", mode, "-w", "stop")


@contextlib.contextmanager
def server() -> Iterator[Server]:
    """A running one; the test is skipped where there can be none."""
    if reason := missing():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="bench-postgresql-") as folder:
        made = Server(Path(folder))
        made.start()
        try:
            yield made
        finally:
            with contextlib.suppress(AssertionError):  # stopped by the test
                made.stop()
