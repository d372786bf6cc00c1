"""How a Ray cluster is started that several machines, and several commands, share; in words and as commands."""

from __future__ import annotations

import shlex
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.config import UserError
from bench.provenance import usable_cores

#: Nothing goes through Ray's object store but its own small change; 75 MiB is the least that Ray takes.
OBJECT_STORE_BYTES = 80 * 2**20
#: Where Ray looks for the token of a cluster.
TOKEN_FILE = Path("~/.ray/auth_token")
#: What Ray's own processes are to have in their environment, in a cluster of any kind.
VARIABLES = {
    # a node that is slow to answer on a busy machine is not dead; 5 missed answers ended a search of hours
    "RAY_health_check_failure_threshold": "100",
    "RAY_worker_niceness": "0",  # 15 by default: beside anything else that runs, it would stand still
    "RAY_USAGE_STATS_ENABLED": "0",
}

EXPOSED = (
    "Ray's ports are open to the network of that address. Whoever reaches them with the token can run any program as "
    "you: keep to a private network."
)


#: What to do where there is no cluster.
REMEDY = f"`bench cluster` says how to start one, and that this machine needs its token, {TOKEN_FILE}"


def check_address(address: str) -> None:
    """UserError if nobody answers at HOST:PORT; "auto" (a cluster that runs on this machine) is Ray's to find."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:  # Ray itself tries for most of a minute
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"--address {address}: nobody answers there ({error}); write HOST:PORT; {REMEDY}.") from error


def own_address() -> str:
    """The address of this machine that others see; 127.0.0.1 where there is no network. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # of a block for documentation, RFC 5737: only the route is looked up
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def commands(host: str, port: int, results: Path | str) -> dict[str, str]:
    """What to type: ``token``, ``head`` (on this machine), ``node`` (on each other), ``search``, and ``stop``.

    ``results``: a folder, or the URI of a store.
    """
    cores = max(1, int(usable_cores()))
    settings = [f"{name}={value}" for name, value in {"RAY_AUTH_MODE": "token", **VARIABLES}.items()]
    store = f"--object-store-memory={OBJECT_STORE_BYTES}"
    head = ["ray", "start", "--head", f"--node-ip-address={host}", f"--port={port}", f"--num-cpus={cores}", store]
    node = ["ray", "start", f"--address={host}:{port}"]
    kept = results.absolute() if isinstance(results, Path) else results
    return {
        "token": "ray get-auth-token --generate",
        "head": _line([*settings, *head, "--include-dashboard=false"]),
        "node": f"{_line([*settings, *node])} --num-cpus=$(nproc) {store}",
        "search": _line(["bench", "search", f"--address={host}:{port}", f"--results={kept}", "--rule=sparse"]),
        "stop": "ray stop",
    }


def explained(found: dict[str, str]) -> list[tuple[str, str]]:
    """Each command with what it is for."""
    return [
        (f"once, on this machine; then copy {TOKEN_FILE} to the same place on the others", found["token"]),
        ("on this machine, which has the cluster's head", found["head"]),
        ("on each other machine, with the same bench, torch and Ray; Ray finds its GPUs", found["node"]),
        (
            "anywhere in the cluster, as often as you like; --results is to be a folder that all machines see, "
            "or a store that all of them reach, and data sets are to be where they are here",
            found["search"],
        ),
        ("on each machine, at the end", found["stop"]),
    ]


def _line(words: Sequence[Any]) -> str:
    return shlex.join(str(word) for word in words)
