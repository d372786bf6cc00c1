"""The time and memory of a training step by autograd on the energies (tests/obvious.py), beside bench's own.

    PYTHONPATH=tests python tests/benchmarks/step_autograd.py RULE[,RULE...] [ARCH] [BATCH_SIZE]

It prints one line of JSON for each rule and way, as `bench speed steps --json` has them.
"""

from __future__ import annotations

import dataclasses
import json
import sys

from bench.steps import Conditions, measure, ours
from obvious import contestant


def main(rules: str, arch: str = "resnet18", batch_size: str = "64") -> None:
    conditions = Conditions(rules=tuple(rules.split(",")), arch=arch, batch_size=int(batch_size))
    ways = {"bench": ours, "straightforward": contestant}
    for step in measure(conditions, ways, device="auto", say=lambda line: print(line, file=sys.stderr)):
        print(json.dumps(dataclasses.asdict(step)))


if __name__ == "__main__":
    main(*sys.argv[1:])
