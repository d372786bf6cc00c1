"""`bench ui`: the link, the server that it starts, and that nothing of it is left behind."""

from __future__ import annotations

import fcntl
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench import ui
from bench.config import TrialConfig, UserError
from bench.stores import embedded
from bench.tracking import Tracker
from bench.ui import runs_link, serve, ui_command


def decoded(link: str) -> tuple[str, dict[str, str]]:
    place, _, query = link.partition("?")
    return place, dict(urllib.parse.parse_qsl(query))


def test_the_link_shows_a_study_s_runs_best_first() -> None:
    place, query = decoded(runs_link("http://127.0.0.1:5000/", "7", "abc"))
    assert place == "http://127.0.0.1:5000/#/experiments/7/runs"
    assert query == {
        "searchFilter": "tags.`mlflow.parentRunId` = 'abc'",
        "orderByKey": "metrics.`val_acc`",
        "orderByAsc": "false",
        "compareRunsMode": "CHART",
        "workflowType": "machine_learning",
    }
    _, query = decoded(runs_link("http://127.0.0.1:5000", "7"))
    assert query["searchFilter"] == "tags.`bench.kind` != 'study'"


def test_a_link_is_one_word_for_the_shell_and_the_terminal() -> None:
    assert re.fullmatch(r"http://h:1/#/experiments/7/runs\?[\w.%=&-]+", runs_link("http://h:1", "7", "abc"))


def test_the_command_is_light_bound_to_loopback_and_hides_the_password(tmp_path: Path) -> None:
    command, environment = ui_command(tmp_path, 5001, tracking_uri="postgresql://me:secret@host/db")
    assert command[1:] == ["-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", "5001"]
    assert environment["MLFLOW_BACKEND_STORE_URI"] == "postgresql://me:secret@host/db"
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert ui_command(tmp_path, 1)[1]["MLFLOW_BACKEND_STORE_URI"] == embedded(tmp_path)[0]


def test_without_runs_there_is_nothing_to_show(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `bench search` first"):
        serve(tmp_path)


FAKE = """
import http.server, json, sys

class Fake(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({"experiment": {"experiment_id": "7"}})
    def do_POST(self):
        self.answer({"runs": [{"info": {"run_id": r, "run_name": n}} for r, n in (("2", "new"), ("1", "old"))]})
        self.server.answered = True
    def answer(self, value):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())
    def log_message(self, *_):
        pass

server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Fake)
server.answered = False
print("a fake server", flush=True)
while not server.answered or sys.argv[2:]:
    server.handle_request()
server.server_close()
print("the last word", flush=True)
"""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results folder with a store, and in place of MLflow a small server that ends after the last question."""

    def command(_results: Path, port: int, **_: object) -> tuple[list[str], dict[str, str]]:
        return [sys.executable, "-c", FAKE, str(port)], {}

    monkeypatch.setattr(ui, "ui_command", command)
    (tmp_path / "mlflow.db").write_bytes(b"SQLite format 3\0")
    return tmp_path


def test_links_are_said_and_opened_and_a_server_that_ends_is_an_error(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    with pytest.raises(UserError, match="server ended: the last word"):
        serve(store, port=0, open_browser=True, say=said.append)
    links = [line.partition(": ") for line in said if "/#/" in line]
    assert [name for name, _, _ in links] == ["old", "new", "All runs side by side"]
    assert decoded(links[1][2])[1]["searchFilter"] == "tags.`mlflow.parentRunId` = '2'"
    assert opened == [links[2][2]]
    assert not [line for line in said if "Warning" in line]


def test_a_host_beyond_loopback_is_warned_of(store: Path) -> None:
    said: list[str] = []
    with pytest.raises(UserError, match="server ended"):
        serve(store, host="0.0.0.0", port=0, say=said.append)
    assert said[0].startswith("Pages: none yet")
    assert "asks nobody for a password" in said[1]
    assert "http://127.0.0.1:" in said[-2]


def test_a_server_elsewhere_is_not_started_again(tmp_path: Path) -> None:
    port = ui._free_port("127.0.0.1", 0, print)
    said: list[str] = []
    with ui._server([sys.executable, "-c", FAKE, str(port)], {}, tmp_path / "log") as server:
        ui._wait("it", server, f"http://127.0.0.1:{port}/health", tmp_path / "log")
        serve(tmp_path, tracking_uri=f"http://127.0.0.1:{port}", say=said.append)
    assert [line.partition(":")[0] for line in said] == ["Pages", "old", "new", "All runs side by side"]


def test_a_server_that_does_not_start_gives_its_last_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('first'); print('the reason'); exit(3)"]
    with (
        pytest.raises(UserError, match="it did not start: the reason"),
        ui._server(command, {}, tmp_path / "log") as server,
    ):
        ui._wait("it", server, "http://127.0.0.1:9", tmp_path / "log")


def test_a_taken_port_gives_way_to_a_free_one() -> None:
    said: list[str] = []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        wanted = taken.getsockname()[1]
        port = ui._free_port("127.0.0.1", wanted, said.append)
    assert port != wanted
    assert said == [f"Port {wanted} is taken; using {port}."]


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_a_host_that_is_not_ours_is_one_clear_line(host: str) -> None:
    with pytest.raises(UserError, match=r"use 127\.0\.0\.1"):
        ui._free_port(host, 0, print)


STUBBORN = """
import fcntl, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
held = open(sys.argv[1])
fcntl.flock(held, fcntl.LOCK_SH)
if sys.argv[2] == "parent":
    subprocess.Popen([sys.executable, "-c", sys.argv[3], sys.argv[1], "child"])
else:
    print("ready", flush=True)
time.sleep(600)
"""


def test_no_process_of_the_group_outlives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parent and child ignore SIGTERM, and hold a lock on a file for as long as they live."""
    monkeypatch.setattr(ui, "_STOP", 0.3)
    log, held = tmp_path / "log", tmp_path / "held"
    held.write_text("")
    with (
        held.open() as file,
        ui._server([sys.executable, "-c", STUBBORN, str(held), "parent", STUBBORN], {}, log) as it,
    ):
        while "ready" not in log.read_text():
            assert it.poll() is None
            time.sleep(0.02)
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with held.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


SERVE = """
import sys
from pathlib import Path
from bench.ui import serve

serve(Path(sys.argv[1]), port=int(sys.argv[2]), say=lambda line: print(line, flush=True))
print("ended", flush=True)
"""


FAKED = """
import sys
from bench import ui

fake = sys.argv.pop()
ui.ui_command = lambda results, port, **_: ([sys.executable, "-c", fake, str(port), "stay"], {})
"""


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """The process; if the test fails in between, it is interrupted, and not waited for in vain."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_ends_cleanly(store: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", FAKED + SERVE, str(store), "0", FAKE]
    with started(command) as process:
        assert process.stdout is not None
        said = read_until_ready(process)
        process.send_signal(number)
        assert process.wait(30) == 0
        assert process.stdout.read() == "ended\n"
    place = urllib.parse.urlsplit(said[-2].split(": ")[1])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((place.hostname, place.port), timeout=5)


def read_until_ready(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    said: list[str] = []
    while not said or said[-1] not in ("Ctrl-C ends it.\n", ""):
        said.append(process.stdout.readline())
    return said


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
def test_the_real_server_answers_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    uri, artifacts = embedded(tmp_path)
    with Tracker.open(uri=uri, artifacts=artifacts, results=tmp_path) as tracker:
        tracker.study("seen", config={})
        tracker.start("seen-0000", "search", TrialConfig(rule="backprop"))
        assert tracker.flush(60)
    port = ui._free_port("127.0.0.1", 0, print)
    command = [sys.executable, "-c", SERVE, str(tmp_path), str(port)]
    with started(command) as process:
        assert process.stdout is not None
        said = read_until_ready(process)
        assert f"http://127.0.0.1:{port}/#/experiments/" in said[-2]
        assert said[2].startswith("seen: http://127.0.0.1:")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as page:
            assert b"MLflow" in page.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert process.stdout.read() == "ended\n"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
