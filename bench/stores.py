"""Where MLflow keeps its runs: the embedded store, and a quick check of an address that a user gave.

Nothing of MLflow is imported here.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from bench.config import UserError
from bench.files import locked

_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql")

_PORTS = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306, "mssql": 1433}

#: What an Optuna storage can be.
_DATABASES = ("postgresql", "mysql", "mariadb", "mssql", "sqlite")


class MLflowAwayError(UserError):
    """The address may be right, but nobody answers there now."""


def embedded(results: Path) -> tuple[str, Path]:
    """The default store under a results folder: its uri, and the folder for artifacts."""
    return f"sqlite:///{results.resolve() / 'mlflow.db'}", results.resolve() / "mlartifacts"


def shown(uri: str) -> str:
    """The uri without its password, for the user's eyes."""
    if uri.startswith("sqlite"):
        return uri
    without = re.sub(r"//[^?\s]*@", "//***@", uri)
    return re.sub(r"(?i)\b(password|passwd|pwd)=[^&]*", r"\1=***", without)


def check_uri(uri: str) -> None:
    """Refuse, within seconds, a tracking uri that cannot work: UserError, one line with the remedy.

    `MLflowAwayError`, if it may work later.
    """
    scheme = uri.partition("://")[0].partition("+")[0]
    if "://" not in uri or scheme not in _SCHEMES:
        raise UserError(
            f"tracking uri {shown(uri)!r}: unknown scheme; use http://HOST:PORT for a server,"
            f" sqlite:///PATH for a file, or {', '.join(_SCHEMES[3:])}."
        )
    if scheme == "sqlite":
        _check_file(uri, "tracking uri")
    elif scheme.startswith("http"):
        _check_server(uri)
    else:
        _check_port(uri, "--tracking-uri")


def check_storage(url: str) -> None:
    """Refuse, within seconds, an Optuna storage that cannot work: UserError, one line with the remedy."""
    scheme = url.partition("://")[0].partition("+")[0]
    if "://" not in url or scheme not in _DATABASES:
        raise UserError(
            f"--storage {shown(url)}: not a database that Optuna knows; use {', '.join(_DATABASES[:-1])}"
            "://USER:PASSWORD@HOST/DATABASE, or sqlite:///PATH."
        )
    if scheme == "sqlite":
        _check_file(url, "--storage")
    else:
        _check_port(url, "--storage")


def _check_file(uri: str, what: str) -> None:
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or not path.name or path.name == ":memory:":
        raise UserError(f"{what} {uri!r} names no file; write sqlite:///relative/path.db or sqlite:////absolute.db.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            head = _head(path) if path.exists() else b""
    except OSError as error:
        raise UserError(f"{what} {uri!r}: {error.strerror}; give a file in a folder you may write.") from error
    if head and head != b"SQLite format 3\0":
        raise UserError(f"{what} {uri!r}: the file is no SQLite database; move it away or give another.")


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


def _check_server(uri: str) -> None:
    remedy = "start one there with `mlflow server`, correct --tracking-uri, or leave it out for the embedded store"
    try:
        with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=5) as answer:
            healthy = answer.status == 200
    except urllib.error.HTTPError as error:
        error.close()
        healthy = error.code in (401, 403)  # it asks who we are: somebody is there
        if error.code in (500, 502, 503, 504):  # it, or what stands before it, is in trouble
            raise MLflowAwayError(f"MLflow at {shown(uri)} cannot answer now (HTTP {error.code}); {remedy}.") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise MLflowAwayError(f"no MLflow server answers at {shown(uri)} ({reason}); {remedy}.") from error
    if not healthy:
        raise UserError(f"what answers at {shown(uri)} is not an MLflow server; {remedy}.")


def _check_port(uri: str, option: str) -> None:
    try:
        place = urllib.parse.urlsplit(uri)
        if not place.hostname:  # a socket on this machine
            return
        port = place.port or _PORTS[place.scheme.partition("+")[0]]
        socket.create_connection((place.hostname, port), timeout=5).close()
    except (OSError, ValueError) as error:
        raise MLflowAwayError(
            f"no database answers at {shown(uri)} ({error}); start it or correct {option}."
        ) from error


@contextlib.contextmanager
def alone(uri: str) -> Iterator[None]:
    """Hold a lock beside an SQLite store: two processes that create or migrate one at once both fail."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    with locked(Path(f"{uri.removeprefix('sqlite:///')}.lock")):
        yield
