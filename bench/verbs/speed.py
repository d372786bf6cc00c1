"""`bench speed`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from bench.config import UserError, check_range, unknown
from bench.verbs.common import add_json, numbers, verb


def add(verbs: Any) -> None:
    p = verb(verbs, "speed", _speed, "measure what a search costs beside its trials, and how that grows")
    p.add_argument(
        "--trials", default="100,1000", metavar="N[,N...]", help="searches of so many trials that do nothing"
    )
    p.add_argument("--sampler", default="random", metavar="S", help="see `bench list samplers`")
    add_json(p)


def _speed(given: argparse.Namespace) -> int:
    from bench.choices import SAMPLERS
    from bench.growth import grown
    from bench.terminal import console, table

    sizes = numbers("--trials", given.trials)
    for size in sizes:
        check_range("--trials", "trials", size, 10, 10**6)
        if size != int(size):
            raise UserError(
                f"--trials {given.trials}: write whole numbers with commas between, e.g. --trials 100,1000."
            )
    if given.sampler not in SAMPLERS:
        raise unknown("sampler", given.sampler, SAMPLERS)
    found = grown([int(size) for size in sizes], given.sampler, lambda line: print(line, file=sys.stderr, flush=True))
    if given.json:
        print(json.dumps([dataclasses.asdict(each) for each in found]))
        return 0
    columns = [
        "trials",
        "seconds",
        "to the first",
        "overhead a trial",
        "of the last",
        "driver MB",
        "disk MB",
        "for bench sync",
    ]
    rows = [
        [
            f"{each.trials}",
            f"{each.seconds:.0f}",
            f"{each.start:.1f}",
            f"{each.overhead:.3f}",
            f"{each.late:.3f}",
            f"{each.memory:.0f}",
            f"{each.disk:.1f} (rows {each.rows:.1f}, journal {each.journal:.1f}, MLflow {each.mlflow:.1f})",
            f"{each.left}",
        ]
        for each in found
    ]
    console(sys.stdout).print(
        table(f"trials that do nothing, sampler {given.sampler}; seconds", columns, rows, texts=0)
    )
    return 0
