"""Addresses of MLflow stores: what cannot work is refused at once, in one line, without its password."""

from __future__ import annotations

import http.server
import threading
from pathlib import Path

import pytest

from bench.config import UserError
from bench.stores import check_uri, shown
from bench.tracking import Tracker
from mlflow_book import free_port


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("ftp://host/x", "unknown scheme"),
        ("results/mlflow.db", "unknown scheme"),
        ("http://127.0.0.1:{port}", "no MLflow server answers"),
        ("http://", "no MLflow server answers"),
        ("postgresql://user:secret@127.0.0.1:{port}/x", "no database answers"),
        ("sqlite://", "names no file"),
        ("sqlite:///{tmp}/text", "no SQLite database"),
        ("sqlite:///{tmp}/text/mlflow.db", "in a folder you may write"),
    ],
)
def test_an_address_that_cannot_work_is_refused_in_one_line(tmp_path: Path, uri: str, said: str) -> None:
    (tmp_path / "text").write_text("this is plain text\n")
    uri = uri.format(port=free_port(), tmp=tmp_path)
    with pytest.raises(UserError, match=said) as caught:
        Tracker.open(uri=uri, artifacts=None, results=tmp_path, say=pytest.fail)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_another_server_is_not_taken_for_mlflow() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with pytest.raises(UserError, match="is not an MLflow server"):
            check_uri(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join()


def test_a_password_is_not_shown() -> None:
    assert shown("postgresql://me:secret@host/db") == "postgresql://***@host/db"
    assert shown("http://host:5000") == "http://host:5000"
