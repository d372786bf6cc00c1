"""A real MLflow server that tests kill and start again, and a proxy before it that is slow."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bench.config import UserError
from bench.stores import check_uri
from mlflow_book import free_port


class Server:
    """A real MLflow server on one port, that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._store = f"sqlite:///{folder}/mlflow.db"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(self.port)]
        extra = {"MLFLOW_BACKEND_STORE_URI": self._store, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--artifacts-destination", str(self._folder / "artifacts")],
                env={**os.environ, **extra},
                cwd=self._folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def group(self) -> int:
        """The process group of a server that runs."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # somebody else has killed it
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def ready(self) -> None:
        for _ in range(1800):
            try:
                check_uri(self.uri)
            except UserError:
                time.sleep(0.1)
            else:
                return
        pytest.fail((self._folder / "log").read_text())


class SlowProxy:
    """Passes connections on, and keeps every piece of an answer back for ``delay`` seconds. A context."""

    def __init__(self, port: int) -> None:
        self.delay = 0.0
        #: pieces of answers that have been passed on
        self.answered = 0
        self._target = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> SlowProxy:
        return self

    def __exit__(self, *_: object) -> None:
        for one in (self._listening, *self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._open += [near, far]
                threading.Thread(target=self._pass, args=(near, far, False), daemon=True).start()
                threading.Thread(target=self._pass, args=(far, near, True), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                if is_answer:
                    time.sleep(self.delay)
                    self.answered += 1
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)
