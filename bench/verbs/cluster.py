"""`bench cluster`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.config import check_range
from bench.verbs.common import add_json, folder, verb


def add(verbs: Any) -> None:
    p = verb(verbs, "cluster", _cluster, "say how to start a Ray cluster of several machines, for --address")
    p.add_argument("--host", metavar="IP", help="address of this machine as the others see it (else as found)")
    p.add_argument("--port", type=int, default=6379, metavar="P", help="of the cluster's head")
    p.add_argument(
        "--results",
        type=folder,
        default=Path("results"),
        metavar="DIR",
        help="a folder that all machines see, or the URI of a store that all of them reach",
    )
    add_json(p)


def _cluster(given: argparse.Namespace) -> int:
    from bench.joining import EXPOSED, commands, explained, own_address

    check_range("--port", "port", given.port, 1, 65535)
    host = given.host or own_address()
    found = commands(host, given.port, given.results)
    if given.json:
        print(json.dumps({"address": f"{host}:{given.port}", **found}))
        return 0
    for number, (why, command) in enumerate(explained(found), 1):
        print(f"{number}. {why}:\n\n   {command}\n")
    print(EXPOSED)
    return 0
