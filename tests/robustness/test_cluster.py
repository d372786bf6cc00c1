"""A Ray cluster of several nodes that is joined: one is killed, a new one comes; and what `bench cluster` says."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import WorkerCrashedError

from bench import cluster
from bench.cli import main
from bench.cluster import Needs, Nodes
from bench.config import UserError
from bench.joining import OBJECT_STORE_BYTES, check_address, commands, own_address
from bench.place import Options, share_out

HERE = Path(__file__).parents[1]
PROGRAMS = Path(sys.executable).parent
#: The versions that this machine has.
OURS = {"bench": "B", "source": "S", "torch": "T", "ray": "R"}


# --- what there is room for


def node(name: str, cpus: float, gpus: float = 0.0, alive: bool = True) -> dict[str, Any]:
    resources = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
    return {"NodeID": name, "NodeManagerAddress": name, "Alive": alive, "Resources": resources}


class Nodewise:
    """Ray, as `Nodes` asks it: the answer of each node, or the exception in its place; without one, it has none yet."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.there: list[dict[str, Any]] = []
        self.answers: dict[str, Any] = {}
        self.clock = 0.0
        versions = {n: v for n, v in OURS.items() if n != "source"}
        for name, stand_in in {
            "ray.nodes": lambda: self.there,
            "ray.remote": lambda **options: lambda _: self._task(options["scheduling_strategy"]),
            "ray.get": self._get,
            "ray.wait": lambda asked, **_: (asked, []) if asked[0] in self.answers else ([], asked),
            "time.monotonic": lambda: self.clock,
            "bench.cluster.provenance": lambda _: {"versions": versions},
            "bench.cluster.source_digest": lambda: "S",
            "bench.cluster.NodeAffinitySchedulingStrategy": lambda name, **_: name,
        }.items():
            monkeypatch.setattr(name, stand_in)

    def _task(self, name: str) -> Any:
        def remote(marker: str | None) -> str:
            assert marker is None or Path(marker).exists()
            return name

        return type("Task", (), {"remote": staticmethod(remote)})

    def _get(self, name: str, **_: Any) -> Any:
        answer = self.answers.get(name, TimeoutError("no answer"))
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def nodewise(monkeypatch: pytest.MonkeyPatch) -> Nodewise:
    return Nodewise(monkeypatch)


LIKE = {"versions": OURS, "sees": True}


def test_room_is_counted_node_by_node_and_follows_them(nodewise: Nodewise, tmp_path: Path) -> None:
    nodewise.there = [node("head", 1), node("a", 7, gpus=1), node("b", 4, gpus=2), node("gone", 9, gpus=9, alive=False)]
    nodewise.answers = dict.fromkeys(("head", "a", "b"), LIKE)
    said: list[str] = []

    def made(**needs: Any) -> Nodes:
        nodes = Nodes(Needs(**{"concurrent": None, **needs}), tmp_path, said.append)
        nodes.check("h:1")
        return nodes

    assert made(cpus=1).room() == 12
    assert made(cpus=2).room() == 0 + 3 + 2
    assert made(cpus=1, gpus=0.3).room() == 0 + 3 + 4  # of b, cores are what is short: 6 would fit on its GPUs
    assert made(cpus=1, gpus=1 / 7).room() == 0 + 7 + 4
    assert made(cpus=2, concurrent=4).room() == 4
    nodes = made(cpus=1)
    assert said == []
    nodewise.there[1:2] = []
    assert nodes.room() == 12  # it does not look every time
    nodewise.clock += 60
    assert nodes.room() == 5
    nodewise.there.append(node("c", 2))
    for _ in range(2):  # it is asked, and is not waited for
        nodewise.clock += 3
        assert nodes.room() == 5
    nodewise.answers["c"] = LIKE
    nodewise.clock += 3
    assert nodes.room() == 7
    assert said == [
        "the cluster lost the node a: room for 5 trials; its trials go on elsewhere.",
        "the cluster has a new node, c: room for 7 trials.",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"versions": {**OURS, "source": "X"}, "sees": True}, r"node c has source X, here S: install the same"),
        ({"versions": OURS, "sees": False}, r"node c does not see .*name a --results"),
        (ModuleNotFoundError("No module named 'bench'"), r"node c cannot run trials \(No module.*install bench there"),
        (None, r"node c cannot run trials \(no answer\)"),
    ],
)
def test_a_node_that_comes_later_and_is_unlike_is_not_counted_and_ends_the_run(
    nodewise: Nodewise, tmp_path: Path, answer: Any, message: str
) -> None:
    nodewise.there, nodewise.answers = [node("a", 1)], {"a": LIKE}
    nodes = Nodes(Needs(concurrent=None, cpus=1), tmp_path, print)
    nodes.check("h:1")
    nodewise.there.append(node("c", 8))
    nodewise.clock += 3
    assert nodes.room() == 1
    if answer is not None:
        nodewise.answers["c"] = answer
    nodewise.clock += 130
    with pytest.raises(UserError, match=message):
        nodes.room()
    assert list(tmp_path.iterdir()) == []


def test_a_node_that_comes_and_goes_while_it_is_asked_ends_nothing(nodewise: Nodewise, tmp_path: Path) -> None:
    nodewise.there, nodewise.answers = [node("a", 1)], {"a": LIKE}
    said: list[str] = []
    nodes = Nodes(Needs(concurrent=None, cpus=1), tmp_path, said.append)
    nodes.check("h:1")
    nodewise.there.append(node("c", 8))
    nodewise.answers["c"] = WorkerCrashedError()
    for _ in range(6):
        nodewise.clock += 3
        assert nodes.room() == 1
    assert said == ["the cluster's node c came, and cannot be asked what it has: it is not used until it answers."]
    nodewise.there.pop()
    nodewise.clock += 3
    assert nodes.room() == 1
    nodewise.there.append(node("d", 1))
    nodewise.clock += 3
    nodes.room()
    assert len(list(tmp_path.iterdir())) == 1
    nodes.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"versions": {**OURS, "bench": "0.0"}, "sees": True}, r"node a has bench 0.0, here B: install"),
        ({"versions": {**OURS, "source": "S2"}, "sees": True}, r"node a has source S2, here S: install"),
        ({"versions": OURS, "sees": False}, r"node a does not see .*name a --results"),
        (ModuleNotFoundError("No module named 'bench'"), r"node a cannot run trials \(No module.*install bench there"),
    ],
)
def test_nodes_with_other_code_or_another_file_system_are_refused(
    found: Any, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Look:
        def __init__(self, **_: Any) -> None: ...

        def __call__(self, function: Any) -> Any:  # noqa: ARG002
            return self

        def remote(self, marker: str) -> None:
            assert Path(marker).exists()

    def get(*_: Any, **__: Any) -> Any:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr("ray.nodes", lambda: [node("a", 2)])
    monkeypatch.setattr("ray.remote", Look)
    monkeypatch.setattr("ray.get", get)
    monkeypatch.setattr(cluster, "provenance", lambda _: {"versions": {n: v for n, v in OURS.items() if n != "source"}})
    monkeypatch.setattr(cluster, "source_digest", lambda: "S")
    monkeypatch.setattr(cluster, "NodeAffinitySchedulingStrategy", lambda *_, **__: None)
    with pytest.raises(UserError, match=message):
        Nodes(Needs(concurrent=None, cpus=1), tmp_path, print).check("h:1")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="no node has 3 CPU for a trial"):
        Nodes(Needs(concurrent=None, cpus=3), tmp_path, print).check("h:1")


def test_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("bench.place.usable_cores", lambda: 16.0)

    def shares(**options: Any) -> tuple[Any, ...]:
        share = share_out(Options(**options), "cuda")
        return share.concurrent, share.threads, share.gpus

    assert shares() == (2, 8, 1.0)
    assert shares(gpus_per_trial=0.5) == (4, 4, 0.5)
    assert shares(gpus_per_trial=0.3) == (6, 2, 0.3)
    assert shares(gpus_per_trial=0.25, concurrent=3) == (3, 5, 0.25)
    assert shares(concurrent=8) == (8, 2, 0.25)
    assert shares(address="h:1") == (None, 1, 1.0)
    assert shares(address="h:1", gpus_per_trial=0.5, concurrent=9) == (9, 1, 0.5)
    with pytest.raises(UserError, match=r"--gpus-per-trial 0.5 has no effect on cpu"):
        share_out(Options(gpus_per_trial=0.5), "cpu")


@pytest.mark.parametrize(("gpus", "workers", "shared"), [(0, 1, False), (0.5, 1, True), (0.6, 1, False), (1, 2, True)])
def test_gpus_that_two_workers_may_be_on(gpus: float, workers: int, shared: bool) -> None:
    needs = Needs(concurrent=1, cpus=1, gpus=gpus, workers=workers)
    needs.check()
    assert needs.shares_gpus == shared


@pytest.mark.parametrize(("gpus", "workers"), [(1.5, 1), (2.5, 1), (3, 2)])
def test_shares_that_ray_has_not_are_refused(gpus: float, workers: int) -> None:
    with pytest.raises(UserError, match=r"a share of one GPU, or whole ones, not [12]\.5"):
        Needs(concurrent=1, cpus=1, gpus=gpus, workers=workers).check()
    Needs(concurrent=1, cpus=1, gpus=2 * workers, workers=workers).check()


# --- what is said


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:no", "127.0.0.1:99999", "127.0.0.1:", ":::", "a b:1"])
def test_addresses_that_cannot_be_are_refused(address: str) -> None:
    with pytest.raises(UserError, match=r"nobody answers there .* write HOST:PORT; `bench cluster` says"):
        check_address(address)


def test_search_at_an_address_where_nobody_is_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        line = ["search", "--rule", "decay", "--arch", "lenet", "--address", address, "--results", str(tmp_path / "r")]
        assert main(line) == 2
    assert capsys.readouterr().err.startswith(f"bench: --address {address}: nobody answers there")
    assert not (tmp_path / "r").exists()


def test_bench_cluster_prints_what_its_json_has(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = ["cluster", "--host", "10.0.0.5", "--port", "7000", "--results", str(tmp_path)]
    assert main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("address") == "10.0.0.5:7000"
    assert main(line) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in found.values())
    assert "can run any program as you" in printed
    assert f"--results={tmp_path}" in found["search"]
    assert "a folder that all machines see, or a store that all of them reach" in " ".join(printed.split())
    uri = "s3://bucket/lab?endpoint_override=h:1&scheme=http"
    assert main([*line[:5], "--results", uri, "--json"]) == 0
    assert f"--results={uri}" in shlex.split(json.loads(capsys.readouterr().out)["search"])
    assert main([*line[:3], "--port", "0"]) == 2


def test_own_address_is_one() -> None:
    socket.inet_aton(own_address())


# --- for real


@contextmanager
def started(*groups: subprocess.Popen[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in groups:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.faults
def test_node_that_is_killed_and_a_new_one(tmp_path: Path) -> None:
    """Its trial goes on from its last epoch, elsewhere; the new one is used; each trial is completed once."""
    script = f"""
import sys, subprocess
from ray.cluster_utils import Cluster
small = {{"object_store_memory": {OBJECT_STORE_BYTES}}}
cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 0, "include_dashboard": False, **small}})
nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
driver = subprocess.Popen(
    [sys.executable, {str(HERE / "engine_driver.py")!r}, {str(tmp_path)!r}, "6", "1.0", cluster.address],
    stdout=subprocess.PIPE, text=True)
for line in driver.stdout:
    print(line, end="", flush=True)
    if line.startswith("reported s-0000 2") and nodes:
        for node in nodes:  # one of them had it
            cluster.remove_node(node, allow_graceful=False)
        nodes = []
        cluster.add_node(num_cpus=2, **small)
        print("killed", flush=True)
print("exit", driver.wait(), flush=True)
cluster.shutdown()
"""
    variables = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PYTHONPATH": os.pathsep.join((str(HERE.parent), str(HERE))),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=variables, start_new_session=True
    )
    with started(process):
        assert process.stdout is not None
        with process.stdout:
            lines = [line.strip() for line in process.stdout]
    assert lines[-2:] == ["done", "exit 0"]
    completed = Counter(line for line in lines if line.startswith("completed"))
    assert completed == {f"completed s-{i:04d} finished": 1 for i in range(6)}
    reports = Counter(line for line in lines if line.startswith("reported"))
    assert set(reports.values()) == {1}  # every epoch is saved before it is reported: none is trained twice
    assert lines.index("killed") < lines.index("reported s-0000 3")
    assert any(line.startswith("s-0000: lost its worker process") for line in lines)
    assert any(line.startswith("the cluster has a new node") for line in lines)
    later = lines[lines.index("killed") :]
    assert len({line.split()[1] for line in later if line.startswith("started")}) >= 3


@pytest.mark.faults
def test_cluster_started_as_bench_says_is_searched_on_interrupted_and_left_alone(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = tmp_path / "results"
    found = commands("127.0.0.1", port, results)
    variables = {
        # what importing bench.cluster sets here is for Ray in this process, and no user's shell has it
        **{name: value for name, value in os.environ.items() if name != "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"},
        "HOME": str(tmp_path),
        "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(HERE.parent),
    }

    def shell(command: str, **more: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(command, shell=True, env=variables, text=True, start_new_session=True, **more)

    subprocess.run(found["token"], shell=True, env=variables, check=True, capture_output=True)
    head = shell(f"{found['head']} --block > {tmp_path / 'head.log'} 2>&1")
    with started(head):
        _wait_for(tmp_path / "head.log")
        another = shell(f"{found['node']} --block > {tmp_path / 'node.log'} 2>&1")
        with started(another):
            search = f"{shlex.quote(sys.executable)} -m bench.cli {found['search'].removeprefix('bench ')}"
            small = f"{search} --arch lenet --set train_examples=200 --epochs 1 --confirm-seeds 1"
            first = subprocess.run(
                f"{small} --trials 3 --json", shell=True, env=variables, capture_output=True, text=True, check=False
            )
            assert first.returncode == 0, first.stderr
            assert json.loads(first.stdout)["trials"]["finished"] == 3
            long = shell(f"exec {search} --arch lenet --epochs 200 --trials 50 --name long", stderr=subprocess.PIPE)
            with started(long):
                rows = results / "long" / "checkpoints"
                deadline = time.monotonic() + 180
                while not (rows.is_dir() and list(rows.iterdir())):
                    assert time.monotonic() < deadline
                    time.sleep(0.2)
                assert _workers(head, another)
                os.killpg(long.pid, signal.SIGINT)
                assert long.wait(60) == 130
                assert long.stderr is not None
                long.stderr.close()
            assert _workers(head, another) == []
            assert (head.poll(), another.poll()) == (None, None), (tmp_path / "node.log").read_text()


def _workers(*nodes: subprocess.Popen[Any]) -> list[str]:
    """The titles of these nodes' processes that train."""
    import psutil

    titles = []
    for node in nodes:
        for process in psutil.Process(node.pid).children(recursive=True):
            try:
                titles.append(" ".join(process.cmdline()))
            except psutil.NoSuchProcess:
                continue
    return [title for title in titles if title.startswith("ray::") and "Trainable" in title]


def _wait_for(log: Path) -> None:
    deadline = time.monotonic() + 120
    while not (log.exists() and "Ray runtime started" in log.read_text()):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
