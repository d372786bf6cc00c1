"""The Ray cluster that trials run on: one of our own on this machine's loopback, or one that others started.

Of our own, one of Ray's CPUs is one trial, however many cores that has: Ray starts a process for each. In a cluster
that is joined, CPUs and GPUs are counted as its nodes offer them; nodes may go, and new ones are used as they come.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import processes
from bench.config import UserError
from bench.joining import OBJECT_STORE_BYTES, REMEDY, TOKEN_FILE, VARIABLES, check_address
from bench.provenance import provenance, source_digest

# Ray reads these when it is imported. Under `uv run` it would else ship the working directory to its
# workers; and on Linux it would listen on the address that other machines see, even if told 127.0.0.1.
os.environ.update(RAY_ENABLE_UV_RUN_RUNTIME_ENV="0", RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
# And this: a cluster that has a token is else asked for without it, even where the token lies in its place.
if any(map(os.environ.get, ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))) or TOKEN_FILE.expanduser().exists():
    os.environ.setdefault("RAY_AUTH_MODE", "token")

import ray
from ray.exceptions import NodeDiedError, TaskUnschedulableError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

#: Seconds between two looks at the nodes of a cluster that is joined.
_LOOK = 2.0
#: Seconds for each node to say what it has installed: it may have to start a process for it.
_ANSWER = 120.0
#: What must be the same everywhere, or rows of unlike code would stand in one study.
_SAME = ("bench", "source", "torch", "ray")

#: What Ray raises of a node that goes while it is asked: `ray.nodes` has it for some seconds more.
_GONE = (NodeDiedError, TaskUnschedulableError, WorkerCrashedError)

# Ray asks for a token, and would else write one to the home directory. It remembers the first it sees.
_TOKEN = secrets.token_hex(32)
_SET_BY_RAY = ("RAY_AUTH_MODE", "RAY_CLIENT_MODE", "PYTHONBREAKPOINT")

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What is asked of a cluster: trials at a time (None: as many as there is room for), and what each one takes.

    ``cpus`` are of each of the ``workers`` that train it, ``gpus`` of all of them.
    """

    concurrent: int | None
    cpus: float
    gpus: float = 0.0
    workers: int = 1

    def each(self, cpus: float) -> dict[str, float]:
        """Ray's resources of one worker."""
        share = floor(self.gpus / self.workers)
        return {"CPU": cpus, **({"GPU": share} if share else {})}

    def trial(self, cpus: float) -> dict[str, float]:
        """Ray's resources of a trial; one of several workers has next to nothing beside them, but not nothing."""
        return {"cpu": cpus, "gpu": floor(self.gpus)} if self.workers == 1 else {"cpu": 0, "memory": 1}

    @property
    def shares_gpus(self) -> bool:
        """Whether two workers may be on one GPU."""
        return 0 < self.gpus / self.workers <= 0.5

    def check(self) -> None:
        """UserError for what cannot be."""
        if self.concurrent is not None and self.concurrent < 1:
            raise UserError(f"concurrent must be at least 1, not {self.concurrent}.")
        if self.cpus <= 0:
            raise UserError(f"cpus_per_trial must be above 0, not {self.cpus}.")
        if self.gpus < 0:
            raise UserError(f"gpus_per_trial must not be negative, not {self.gpus}.")
        share = self.gpus / self.workers
        if share > 1 and share != int(share):
            raise UserError(f"a worker has a share of one GPU, or whole ones, not {share:g}; give --gpus-per-trial so.")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster in use. ``resources``: Ray's, of one trial. ``room``: how many trials there is place for now.
    ``members``: Ray's resources of each of the workers, where several train one network.

    ``kill``: end the processes of these actors at once, without asking.
    """

    folder: Path
    resources: dict[str, float]
    members: list[dict[str, float]]
    room: Callable[[], int]
    kill: Callable[[list[Any]], None]


def floor(share: float) -> float:
    """Ray counts in ten-thousandths: 7 of 0.1429 GPUs would be one too many."""
    return math.floor(share * 10_000) / 10_000


@contextmanager
def cluster(needs: Needs, address: str | None, *, shared: Path | None, say: Say, grace: float) -> Iterator[Cluster]:
    """One of our own, which ends with this block; with an ``address`` the one there, which stays.

    ``shared``: a folder that all nodes must see; None: there is none. Ray's own processes have ``grace`` seconds to go.
    UserError: what is needed is not there; no cluster answers; its nodes have other versions, or no such folder.
    """
    needs.check()
    if ray.is_initialized():
        raise UserError("Ray runs in this process already; call ray.shutdown() first.")
    if address is None:
        with _own(needs, grace) as made:
            yield made
    else:
        with _joined(needs, address, shared, say) as found:
            yield found


# --- our own


@contextmanager
def _own(needs: Needs, grace: float) -> Iterator[Cluster]:
    concurrent = needs.concurrent or 1
    variables = {
        **_of_workers(needs),
        **_of_tune(needs),
        **VARIABLES,
        # What can be imported here can be imported in the workers, from whatever folder this was started.
        "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path),  # noqa: PTH100 ("" is the current one)
        "RAY_AUTH_TOKEN": _TOKEN,
    }
    with processes.scratch_folder() as folder, processes.environment(variables, also=_SET_BY_RAY):
        spared = processes.own_children()
        try:
            ray.init(
                address="local",
                num_cpus=concurrent * needs.workers,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(folder),
            )
            check_gpus(concurrent, needs.gpus)
            yield Cluster(
                folder=folder,
                resources=needs.trial(1),
                members=[needs.each(1)] * needs.workers,
                room=lambda: concurrent,
                kill=lambda actors: processes.kill_titled("ray::"),  # noqa: ARG005
            )
        finally:
            started = processes.descendants(spared)
            ray.shutdown()
            processes.end(started, grace)


def check_gpus(concurrent: int, gpus: float) -> None:
    """UserError if Ray finds fewer GPUs than so many trials take."""
    found = ray.cluster_resources().get("GPU", 0)
    if concurrent * floor(gpus) > found:
        raise UserError(
            f"{concurrent} trials at a time with {gpus:g} GPU each need {concurrent * gpus:g} GPUs, and Ray finds "
            f"{found:g}; run fewer at a time, share a GPU (0.5 each), or use the CPU."
        )


def _of_workers(needs: Needs) -> dict[str, str]:
    """Variables for the processes that train."""
    return {
        "OMP_NUM_THREADS": str(max(1, int(needs.cpus))),
        # glibc gives each thread a heap of its own and keeps what was freed in it; each trial is a thread, and a worker
        # grew by some 150 MB with each resnet18 (with one heap it stays at what the largest trial needs)
        "MALLOC_ARENA_MAX": os.environ.get("MALLOC_ARENA_MAX", "1"),
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in options mean the same there as here
    }


def _of_tune(needs: Needs) -> dict[str, str]:
    """Variables for Tune in this process."""
    return {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_MAX_PENDING_TRIALS_PG": str(needs.concurrent or 100),
        "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # Tune's own snapshots, which nobody reads
    }


# --- one that others started


@contextmanager
def _joined(needs: Needs, address: str, shared: Path | None, say: Say) -> Iterator[Cluster]:
    variables = {**_of_workers(needs), **_of_tune(needs), **VARIABLES}
    with processes.scratch_folder() as folder, processes.environment(variables, also=_SET_BY_RAY):
        _connect(address, {**_of_workers(needs), "PYTHONPATH": os.pathsep.join(_added_paths())})
        try:
            nodes = Nodes(needs, shared, say)
            nodes.check(address)
            with closing(nodes):
                yield Cluster(
                    folder=folder,
                    resources=needs.trial(needs.cpus),
                    members=[needs.each(needs.cpus)] * needs.workers,
                    room=nodes.room,
                    kill=_kill,
                )
        finally:
            ray.shutdown()


def _kill(actors: list[Any]) -> None:
    for actor in actors:
        ray.kill(actor)


def _connect(address: str, variables: dict[str, str]) -> None:
    check_address(address)
    try:
        ray.init(
            address=address,
            runtime_env={"env_vars": variables},
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:  # Ray raises ConnectionError, RuntimeError, ValueError and kinds of its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--address {address}: no Ray cluster to join there ({reason}); {REMEDY}.") from error


def _added_paths() -> list[str]:
    """Where modules come from that no installation has: on other machines these paths are of use if they are shared."""
    installed = tuple(os.path.realpath(prefix) for prefix in (sys.prefix, sys.base_prefix))
    paths = [os.path.realpath(path) for path in sys.path]
    return [path for path in dict.fromkeys(paths) if not path.startswith(installed)]


def _look(marker: str | None) -> dict[str, Any]:
    """What a node has: versions, and whether it sees the file."""
    return {
        "versions": {**provenance("cpu")["versions"], "source": source_digest()},
        "sees": marker is None or Path(marker).exists(),
    }


@dataclass
class _Asked:
    """A node that has been asked what it has. ``marker``: the file that it is to see. ``answer``: Ray's, of `_look`."""

    where: str
    marker: Path | None
    since: float
    answer: Any

    def over(self) -> None:
        if self.marker is not None:
            self.marker.unlink(missing_ok=True)


class Nodes:
    """The nodes of a cluster that was joined, as they come and go. A new one counts when it has answered."""

    def __init__(self, needs: Needs, shared: Path | None, say: Say) -> None:
        self._needs, self._shared, self._say = needs, shared, say
        self._known: dict[str, str] = {}  # those that are like this machine
        self._asked: dict[str, _Asked] = {}
        self._silent: set[str] = set()
        self._looked, self._room = -math.inf, 0

    def check(self, address: str) -> None:
        """UserError if no node has room for one trial, or if one of them has other code or another file system."""
        nodes = self._alive()
        self._known = {node["NodeID"]: node["NodeManagerAddress"] for node in nodes}
        if self.room() < 1:
            raise UserError(
                f"--address {address}: no node has {self._words()} for a trial; add one (see `bench cluster`), or ask "
                "for less."
            )
        asked: list[_Asked] = []
        try:
            asked += map(self._ask, nodes)
            for each in asked:
                self._judge(each, _ANSWER)
        finally:
            for each in asked:
                each.over()

    def room(self) -> int:
        """How many trials the nodes that are there have place for; of each node by itself, for a worker is on one.

        UserError for a node that came later and is unlike this machine: no trial could be kept off it.
        """
        if time.monotonic() - self._looked > _LOOK:
            alive = self._alive()
            self._forget({node["NodeID"] for node in alive})
            nodes = [node for node in alive if node["NodeID"] in self._known or self._has_answered(node)]
            self._room = sum(self._places(node["Resources"]) for node in nodes) // self._needs.workers
            self._looked = time.monotonic()
            self._tell({node["NodeID"]: node["NodeManagerAddress"] for node in nodes})
        return self._room if self._needs.concurrent is None else min(self._room, self._needs.concurrent)

    def close(self) -> None:
        """Wait for no answer any more."""
        self._forget(set())

    def _forget(self, alive: set[str]) -> None:
        for node in self._asked.keys() - alive:
            self._asked.pop(node).over()

    def _has_answered(self, node: dict[str, Any]) -> bool:
        """Whether a new node has said that it is like this machine: asked when it is first seen, and not waited for."""
        name = node["NodeID"]
        asked = self._asked.get(name)
        if asked is None:
            self._asked[name] = self._ask(node)
            return False
        ready, _ = ray.wait([asked.answer], timeout=0)
        if not ready and time.monotonic() - asked.since < _ANSWER:
            return False
        self._asked.pop(name)
        try:
            self._judge(asked, 0.0)
        except UserError as error:
            if not isinstance(error.__cause__, _GONE):
                raise
            if name not in self._silent:
                self._silent.add(name)
                self._say(f"{asked.where} came, and cannot be asked what it has: it is not used until it answers.")
            return False
        finally:
            asked.over()
        return True

    def _tell(self, now: dict[str, str]) -> None:
        """Say which came and which went."""
        for node, where in now.items():
            if node not in self._known:
                self._say(f"the cluster has a new node, {where}: room for {self._room} trials.")
        for node, where in self._known.items():
            if node not in now:
                self._say(
                    f"the cluster lost the node {where}: room for {self._room} trials; its trials go on elsewhere."
                )
        self._known = now

    def _alive(self) -> list[dict[str, Any]]:
        return [node for node in ray.nodes() if node["Alive"]]

    def _places(self, resources: dict[str, float]) -> int:
        places = resources.get("CPU", 0.0) / self._needs.cpus
        if share := floor(self._needs.gpus / self._needs.workers):
            places = min(places, resources.get("GPU", 0.0) / share)
        return int(places + 1e-9)

    def _ask(self, node: dict[str, Any]) -> _Asked:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        look = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(_look)
        marker = None if self._shared is None else self._shared / f".seen-{secrets.token_hex(8)}"
        if marker is not None:
            marker.touch()
        answer = look.remote(None if marker is None else str(marker))
        return _Asked(f"the cluster's node {node['NodeManagerAddress']}", marker, time.monotonic(), answer)

    def _judge(self, asked: _Asked, patience: float) -> None:
        """UserError unless it answers within so many seconds that it is like this machine."""
        try:
            found = ray.get(asked.answer, timeout=patience)
        except Exception as error:  # whatever happens there: a module that is missing, a node that goes
            reason = " ".join(str(error).split())[-200:]
            raise UserError(f"{asked.where} cannot run trials ({reason}); install bench there as here.") from error
        ours = {**provenance("cpu")["versions"], "source": source_digest()}
        unlike = [
            f"{n} {found['versions'].get(n)}, here {ours[n]}" for n in _SAME if found["versions"].get(n) != ours[n]
        ]
        if unlike:
            raise UserError(f"{asked.where} has {'; '.join(unlike)}: install the same on all nodes.")
        if not found["sees"]:
            raise UserError(
                f"{asked.where} does not see {self._shared}; name a --results folder on a file system that all nodes "
                "share."
            )

    def _words(self) -> str:
        cpus = f"{self._needs.cpus:g} CPU"
        return f"{cpus} and {self._needs.gpus:g} GPU" if self._needs.gpus else cpus
