"""`bench confirm`."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.config import UserError
from bench.verbs.common import (
    add_json,
    add_machines,
    add_results,
    add_where,
    carry_out,
    check_name,
    options_of,
    refuse_storage,
    verb,
)
from bench.verbs.compare import print_comparison

if TYPE_CHECKING:
    from bench.place import Options


def add(verbs: Any) -> None:
    p = verb(verbs, "confirm", _confirm, "train named configurations with the same fresh seeds, and compare them")
    what = "a name, and the file of a configuration, such as a search's best.yaml; differences are to the first"
    p.add_argument("config", nargs="+", metavar="NAME=YAML", help=what)
    p.add_argument("--seeds", type=int, default=5, metavar="N", help="trainings of each configuration")
    p.add_argument("--name", metavar="NAME", help="of the folder and the study (else confirm-ARCH-DATASET)")
    add_where(p)
    add_machines(p)
    add_results(p)
    add_json(p)


def _confirm(given: argparse.Namespace) -> int:
    from bench.config import TrialConfig, study_name
    from bench.confirmation import ConfirmationConfig, confirm, prepare
    from bench.files import read_yaml
    from bench.learning.rules import parse_rule

    refuse_storage(given, "a confirmation")
    configs: dict[str, TrialConfig] = {}
    for word in given.config:
        name, _, file = word.partition("=")
        if not file or check_name(name) in configs:
            raise UserError(f"{word}: write NAME=FILE, each name once, e.g. tuned=results/STUDY/best.yaml.")
        config = TrialConfig.from_dict(read_yaml(Path(file)))
        configs[name] = config.replace(rule=parse_rule(config.rule).name)
    first = next(iter(configs.values()))
    whole = ConfirmationConfig(
        name=check_name(given.name or study_name("confirm", first.arch, first.dataset)),
        configs={name: trial.to_dict() for name, trial in configs.items()},
        seeds=given.seeds,
    )
    place = prepare(whole, options_of(given))
    work = partial(confirm, whole, place)
    return carry_out(given, whole.name, place.options, lambda say, watch: work(say=say, watch=watch), _show)


def _show(outcome: str, summary: dict[str, Any], options: Options) -> None:
    from bench.present import print_link
    from bench.terminal import console

    if outcome == "interrupted":
        print("interrupted: the same command goes on from here. What is known by now:")
    if summary["studies"]:
        print_comparison(summary)
    print_link(console(sys.stdout), summary, options)
