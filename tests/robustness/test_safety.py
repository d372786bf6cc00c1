"""What a stranger's file could do, and who can reach a server: by the source, and by the sockets."""

from __future__ import annotations

import ast
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import engine
from bench.config import UserError
from bench.ui import serve
from engine_script import Script, task

HERE = Path(__file__).parents[1]
PACKAGE = HERE.parent / "bench"
SOURCES = sorted(PACKAGE.rglob("*.py"))

#: Calls that run what a file says, or what a shell makes of a text: nowhere.
RUNS = {
    *("eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler"),
    *(
        "dill.load",
        "cloudpickle.load",
        "cloudpickle.loads",
        "joblib.load",
        "shelve.open",
        "marshal.load",
        "marshal.loads",
    ),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "pandas.read_pickle", "pd.read_pickle", "torch.jit.load"),
    *("np.fromregex", "tar.extractall", "members.extractall", "shutil.unpack_archive", "tempfile.mktemp"),
}
#: Calls that are safe with this argument only.
ONLY_WITH = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "yaml.load": ("Loader", "_Loader"),
}
#: The modules that may import what unpickles: one reader, of a class that finds four names.
UNPICKLERS = {"pickle": {"datasets/pickles.py"}, "marshal": set(), "shelve": set(), "joblib": set(), "dill": set()}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call, by the name that stands there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def value_of(node: ast.Call, name: str) -> Any:
    found = next((keyword.value for keyword in node.keywords if keyword.arg == name), None)
    return found.value if isinstance(found, ast.Constant) else found.id if isinstance(found, ast.Name) else None


def dangers(tree: ast.AST, module: str) -> list[str]:
    """What of this source runs what others wrote."""
    found = []
    for name, node in calls(tree):
        if name in RUNS:
            found.append(name)
        if name in ONLY_WITH and value_of(node, ONLY_WITH[name][0]) != ONLY_WITH[name][1]:
            found.append(f"{name} without {ONLY_WITH[name][0]}")
        if any(keyword.arg == "shell" for keyword in node.keywords):
            found.append(f"{name} with a shell")
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        found += [f"import {name}" for name in names if module not in UNPICKLERS.get(name.split(".")[0], {module})]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_runs_what_others_wrote(path: Path) -> None:
    assert dangers(ast.parse(path.read_text()), str(path.relative_to(PACKAGE))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "import marshal",
    ],
)
def test_the_rule_would_see_it(source: str) -> None:
    assert dangers(ast.parse(source), "other.py")


def test_the_one_unpickler_finds_its_own_names_only() -> None:
    tree = ast.parse((PACKAGE / "datasets" / "pickles.py").read_text())
    (unpickler,) = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == "_Unpickler"]
    assert [ast.unparse(base) for base in unpickler.bases] == ["pickle._Unpickler"]
    assert "find_class" in {node.name for node in unpickler.body if isinstance(node, ast.FunctionDef)}
    used = {name for name, _ in calls(tree) if name.startswith("pickle.")}
    assert used == set()


# --- who can reach a server


def listening(pid: int) -> set[str]:
    """The addresses that a process and its children listen on."""
    import psutil  # Ray's own; it is found once Ray is imported

    found, process = set(), psutil.Process(pid)
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {c.laddr.ip for c in each.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    return found


SERVE = """
import sys
from pathlib import Path
from bench.cli import main

sys.exit(main(["ui", "--results", sys.argv[1], "--port", "0", *sys.argv[2:]]))
"""


@contextlib.contextmanager
def user_interface(results: Path, *options: str) -> Iterator[tuple[int, list[str]]]:
    """`bench ui`, when it is ready, and what it said by then."""
    command = [sys.executable, "-c", SERVE, str(results), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        said: list[str] = []
        try:
            while not said or said[-1] not in ("Ctrl-C ends it.\n", ""):
                said.append(process.stdout.readline())
            assert said[-1], f"it ended: {said}"
            yield process.pid, said
        finally:
            process.send_signal(signal.SIGINT)
            process.stdout.read()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of MLflow's, and a search's journal."""
    from optuna import create_study
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    folder = tmp_path_factory.mktemp("ui") / "results"
    (folder / "s").mkdir(parents=True)
    create_study(storage=JournalStorage(JournalFileBackend(str(folder / "s" / "journal.log"))), study_name="s")
    (folder / "mlflow.db").touch()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_servers_listen_where_they_were_told_and_say_what_that_means(results: Path, host: str) -> None:
    """MLflow's and Optuna's, together."""
    options = [] if host == "127.0.0.1" else ["--host", host]
    with user_interface(results, "--optuna", *options) as (pid, said):
        assert listening(pid) == {host}
    warnings = [line for line in said if line.startswith("Warning: ")]
    if host == "127.0.0.1":
        assert warnings == []
    else:
        (warning,) = warnings
        for words in (host, "password", "read, change and delete all runs"):
            assert words in warning


@pytest.fixture
def no_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*_: Any, **__: Any) -> Any:
        raise UserError("a server was started")

    monkeypatch.setattr(subprocess, "Popen", ended)


@pytest.mark.usefixtures("no_servers")
def test_the_warning_comes_before_the_server(tmp_path: Path) -> None:
    """Whoever reads it can still press Ctrl-C."""
    (tmp_path / "mlflow.db").touch()
    said: list[str] = []
    with pytest.raises(UserError, match="a server was started"):
        serve(tmp_path, host="0.0.0.0", port=0, say=said.append)
    assert said[-1].startswith("Warning: 0.0.0.0 is reachable from other machines")


@pytest.mark.usefixtures("no_servers")
@pytest.mark.parametrize("port", [-1, 65536, 10**9, 10**30])
def test_a_port_that_is_none_is_one_line(port: int, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    with pytest.raises(UserError, match="is no port; give one from 1 to 65535"):
        serve(tmp_path, port=port, say=print)


@pytest.mark.parametrize(
    "host", ["", "a..b", "é" * 70, "x" * 70 + ".y", "127.0.0.1:80", "http://x", "1.2.3.4.5", "\udcff"]
)
@pytest.mark.usefixtures("no_servers")
def test_a_host_that_is_none_is_one_line(host: str, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    with pytest.raises(UserError) as caught:
        serve(tmp_path, host=host, port=0, say=print)
    assert "a server was started" not in str(caught.value)


@pytest.mark.slow
def test_ray_of_our_own_is_reached_from_this_machine_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    found: set[str] = set()
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            found.update(listening(os.getpid()))
            time.sleep(0.2)

    watch = threading.Thread(target=look)
    watch.start()
    try:
        engine.run(
            Script([task("one", seconds=0.5)]),
            trial="fake_trials:act",
            concurrent=1,
            cpus_per_trial=1,
            log=tmp_path / "ray.log",
            say=print,
        )
    finally:
        over.set()
        watch.join()
    assert found, "Ray listens nowhere?"
    assert found <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
