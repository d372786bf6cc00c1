"""MLflow's user interface over our runs, started light: one worker, no job runner, no telemetry, loopback only.

MLflow itself is not imported: it runs as a process of its own, and is asked over HTTP.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.config import UserError
from bench.stores import alone, check_uri, embedded, shown

#: Seconds that the server gets to answer (it needs 3 to 7 on a free machine), and to end when it is told to.
_START, _STOP = 120.0, 5.0

#: What ends the server as Ctrl-C does: `kill`, and a terminal that is closed.
_ENDS = (signal.SIGTERM, signal.SIGHUP)

#: So many studies, the newest, get a link of their own.
_LINKS = 5


def runs_link(base: str, experiment_id: str, parent_run_id: str | None = None) -> str:
    """The page that shows runs side by side, charts open, best val_acc first.

    With ``parent_run_id`` those of that study; without it all runs, the nested ones too (an empty filter
    would hide them).
    """
    condition = "tags.`bench.kind` != 'study'"
    if parent_run_id is not None:
        condition = f"tags.`mlflow.parentRunId` = '{parent_run_id}'"
    query = {
        "searchFilter": condition,
        "orderByKey": "metrics.`val_acc`",
        "orderByAsc": "false",
        "compareRunsMode": "CHART",
        "workflowType": "machine_learning",
    }
    text = urllib.parse.urlencode(query, quote_via=urllib.parse.quote)
    return f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs?{text}"


def ui_command(
    results: Path, port: int, *, host: str = "127.0.0.1", tracking_uri: str | None = None
) -> tuple[list[str], dict[str, str]]:
    """The server's command line and its environment; the store's address is in the latter: it may hold a password."""
    uri, artifacts = embedded(results)
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", host, "--port", str(port)]
    environment = {
        "MLFLOW_BACKEND_STORE_URI": tracking_uri or uri,
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": artifacts.as_uri(),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    return command, environment


def serve(
    results: Path,
    *,
    tracking_uri: str | None = None,
    host: str = "127.0.0.1",
    port: int = 5000,
    open_browser: bool = False,
    optuna: bool = False,
    pages: Path = Path("dashboards"),
    say: Callable[[str], None] = print,
) -> None:
    """Show the runs until Ctrl-C (or SIGTERM, or the terminal is closed); no process is left then.

    A ``tracking_uri`` of a server is not served again: its link is said. A taken ``port`` gives way to a free one.
    ``optuna``: its dashboard over the journals, too, at a port of its own. ``pages``: where `bench report` wrote.
    Errors: UserError if there is nothing to show yet, or a server does not start.
    """
    if optuna and not any(results.glob("*/journal.log")):
        kept = "; of those in a storage: optuna-dashboard URL" if any(results.glob("*/storage.yaml")) else ""
        raise UserError(f"--optuna: no search has a journal in {results} yet; run `bench search` first{kept}.")
    _say_pages(results, pages, say)
    if tracking_uri is not None:
        check_uri(tracking_uri)
    if tracking_uri is not None and tracking_uri.startswith("http"):
        _show(tracking_uri, open_browser, say)
        if optuna:
            raise UserError("--optuna shows journals on this machine: leave --tracking-uri out.")
        return
    uri, _ = embedded(results)
    if tracking_uri is None and not Path(uri.removeprefix("sqlite:///")).exists():
        raise UserError(f"no runs in {results} yet: run `bench search` first, or give its folder with --results.")
    with alone(tracking_uri or uri):  # a search may be making the store just now
        port = _free_port(host, port, say)
    if not _is_loopback(host):
        say(
            f"Warning: {host} is reachable from other machines, and this server asks nobody for a password:"
            " whoever reaches it can read, change and delete all runs."
        )
    command, environment = ui_command(results, port, host=host, tracking_uri=tracking_uri)
    log = results / "mlflow-ui.log"
    base = f"http://{_address(host)}:{port}"
    with contextlib.ExitStack() as running:
        running.enter_context(_interruptible())
        server = running.enter_context(_server(command, environment, log))
        running.enter_context(contextlib.suppress(KeyboardInterrupt))
        say(f"MLflow's server is starting ({shown(tracking_uri or uri)}); its log: {log}")
        if optuna:
            _serve_journals(running, results, host, say)
        _wait("MLflow's server", server, f"{base}/health", log)
        _show(base, open_browser, say)
        say("Ctrl-C ends it.")
        server.wait()
        raise UserError(f"MLflow's server ended: {_last_line(log)} (see {log}).")


def _say_pages(results: Path, pages: Path, say: Callable[[str], None]) -> None:
    """Where the pages are: their index, or else those that the verbs left beside their rows."""
    index = pages / "index.html"
    beside = sorted(results.glob("*/report.html"))
    if index.exists():
        say(f"Pages, of the results that bench report was last given: {index.absolute().as_uri()}")
    if beside:
        few = ", ".join(page.absolute().as_uri() for page in beside[:_LINKS])
        more = f" and {len(beside) - _LINKS} more" if len(beside) > _LINKS else ""
        say(f"Pages beside their rows (bench report makes an index): {few}{more}")
    if not (beside or index.exists()):
        say("Pages: none yet; bench report makes them.")


def _serve_journals(running: contextlib.ExitStack, results: Path, host: str, say: Callable[[str], None]) -> None:
    """Optuna's dashboard, for as long as ``running``."""
    port, log = _free_port(host, 8080, say), results / "optuna-ui.log"
    command = [sys.executable, "-m", "bench.optuna_ui", str(results), host, str(port)]
    server = running.enter_context(_server(command, {}, log))
    base = f"http://{_address(host)}:{port}"
    _wait("Optuna's dashboard", server, f"{base}/", log)
    say(f"Optuna's dashboard, on the journals as they are now: {base}/dashboard/")


def _show(base: str, open_browser: bool, say: Callable[[str], None]) -> None:
    """Say the links: all runs, and the newest studies' own."""
    experiment = _ask(base, "experiments/get-by-name?experiment_name=bench")
    if experiment is None:
        say(f"No runs of bench at {shown(base)} yet.")
        return
    number = experiment["experiment"]["experiment_id"]
    newest = {
        "experiment_ids": [number],
        "filter": "tags.`bench.kind` = 'study'",
        "order_by": ["attributes.start_time DESC"],
        "max_results": _LINKS,
    }
    found = _ask(base, "runs/search", newest) or {}
    for run in reversed(found.get("runs", [])):
        say(f"{run['info']['run_name']}: {runs_link(shown(base), number, run['info']['run_id'])}")
    every = runs_link(base, number)
    say(f"All runs side by side: {shown(every)}")
    if open_browser:
        webbrowser.open(every)


def _ask(base: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The server's answer to a request; None if it knows no such thing."""
    request = urllib.request.Request(
        f"{base.rstrip('/')}/api/2.0/mlflow/{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            found: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 404:
            return None
        raise UserError(f"MLflow at {shown(base)} refused a request (HTTP {error.code}); see its log.") from error
    return found


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _address(host: str) -> str:
    """How this machine's browser reaches a server that listens on ``host``."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _free_port(host: str, wanted: int, say: Callable[[str], None]) -> int:
    """``wanted`` if it can be had, else one that the system chooses (said); 0 leaves it to the system."""
    for port in (wanted, 0):
        try:
            family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
                free = int(probe.getsockname()[1])
        except socket.gaierror as error:
            raise UserError(f"host {host!r} is unknown ({error.strerror}); use 127.0.0.1.") from error
        except OSError as error:
            if port == 0:
                raise UserError(f"cannot listen on {host!r}: {error.strerror}; use 127.0.0.1.") from error
            continue
        if wanted not in (free, 0):
            say(f"Port {wanted} is taken; using {free}.")
        return free
    raise AssertionError("unreachable: the second try returns or raises")


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Within the block these signals raise KeyboardInterrupt."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = {name: signal.signal(name, interrupt) for name in _ENDS}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


@contextlib.contextmanager
def _server(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The process, in a group of its own; when the block ends, none of the group is left."""
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield server
    finally:
        _end_group(server)


def _end_group(server: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then SIGKILL, until no process of the group is left; a second Ctrl-C does not cut this short."""
    deaf = {name: signal.signal(name, signal.SIG_IGN) for name in (signal.SIGINT, *_ENDS)}
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _STOP
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
            while time.monotonic() < deadline:
                server.poll()
                os.killpg(server.pid, 0)
                time.sleep(0.05)
    server.wait()
    for name, handler in deaf.items():
        signal.signal(name, handler)


def _wait(name: str, server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Return when the server answers; UserError with its last words if it ends, or never does."""
    deadline = time.monotonic() + _START
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise UserError(f"{name} did not start: {_last_line(log)} (see {log}).")
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(0.1)
    raise UserError(f"{name} does not answer after {_START:.0f} s; see {log}.")


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no reason given"
