"""`bench speed`: the time of training steps, and of the stages of one trial."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from bench.config import check_range
from bench.verbs.common import add_json, add_results, verb


def add(verbs: Any) -> None:
    summary = "measure the time of training steps, or of the stages of a trial"
    parser = verbs.add_parser("speed", help=summary, description=f"{summary}.", allow_abbrev=False)
    kinds = parser.add_subparsers(title="what is measured", required=True, metavar="WHAT")
    steps = verb(
        kinds, "steps", _steps, "time a training step of every rule beside backprop's, with its floor and memory"
    )
    steps.add_argument("--rule", default="all", metavar="R[,R...]", help="rules beside backprop; all: every named one")
    steps.add_argument("--batch-size", type=int, default=128, metavar="N", help="examples in a step")
    steps.add_argument("--image-size", type=int, default=32, metavar="H", help="pixels a side; 224: as ImageNet's")
    steps.add_argument("--classes", type=int, default=10, metavar="C", help="that the network tells apart")
    steps.add_argument("--precision", default="auto", help="auto (bf16 on a GPU), float32, bf16")
    steps.add_argument("--rounds", type=int, default=11, metavar="N", help="in each, every rule takes a turn")
    trial = verb(kinds, "trial", _trial, "say where the seconds of one trial of a rule go, stage by stage")
    trial.add_argument("--rule", default="backprop", metavar="R", help="the rule of the trial")
    trial.add_argument("--dataset", default="digits", metavar="D", help="see `bench list datasets`")
    trial.add_argument("--epochs", type=int, default=2, metavar="E", help="of the trial")
    trial.add_argument("--data-dir", metavar="PATH", help="where the data set's files are")
    for p in (steps, trial):
        p.add_argument("--arch", default="resnet18", metavar="A", help="see `bench list networks`")
        p.add_argument("--fraction", type=float, default=1.0, metavar="F", help="share of a batch that B learns from")
        p.add_argument(
            "--samples", type=int, default=0, metavar="N", help="B learns from N noise patches (else the batch)"
        )
        p.add_argument("--threads", type=int, metavar="N", help="of torch on a CPU (else torch's own)")
        p.add_argument("--device", default="auto", help="auto, cpu, cuda")
        add_results(p)
        add_json(p)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(title: str, columns: list[str], rows: list[list[str]], caption: str) -> None:
    from bench import terminal

    terminal.console(sys.stdout).print(terminal.table(title, columns, rows, caption=caption, texts=1))


def _steps(given: argparse.Namespace) -> int:
    from bench.learning.rules import RULES, parse_rule
    from bench.models import check_arch
    from bench.speed import timed
    from bench.steps import Conditions

    check_arch(given.arch)
    check_range("--threads", "threads", given.threads, 1, 10**4)
    rules = list(RULES) if given.rule == "all" else [parse_rule(name).name for name in given.rule.split(",")]
    settings = {name: getattr(given, name) for name in Conditions.field_names() if name != "rules"}
    conditions = Conditions(rules=tuple(rules), **settings)
    found, where = timed(
        conditions,
        device=given.device,
        threads=given.threads,
        results=given.results,
        tracking_uri=given.tracking_uri,
        say=_say,
    )
    if given.json:
        steps = [dataclasses.asdict(each) for each in found]
        print(json.dumps({"conditions": conditions.to_dict(), "provenance": where, "steps": steps}))
        return 0
    columns = ["rule", "ms", "/ backprop", "quartiles", "floor", "/ floor", "MB", "/ backprop", "allowed"]
    rows = [
        [
            each.rule,
            f"{each.seconds * 1000:.1f}",
            f"{each.ratio:.3f}",
            f"{each.low:.3f} to {each.high:.3f}",
            f"{each.floor:.3f}",
            f"{each.over_floor:.3f}",
            f"{each.memory:.0f}",
            f"{each.memory_ratio:.3f}",
            f"{each.memory_allowed:.3f}",
        ]
        for each in found
    ]
    images = f"{given.batch_size} images of {given.image_size} pixels"
    shares = f", B from {given.fraction:g} of a batch" if given.fraction != 1 else ""
    shares += f", B from {given.samples} noise patches" if given.samples else ""
    caption = f"medians; {_machine(where)}{shares}. allowed: backprop's memory, and B with its optimizer state"
    _show(f"a training step of {given.arch}: {images}, {conditions.rounds} rounds", columns, rows, caption)
    return 0


def _trial(given: argparse.Namespace) -> int:
    from bench.learning.rules import parse_rule
    from bench.models import check_arch
    from bench.recipes import recipe_of
    from bench.speed import of_trial
    from bench.steps import still

    check_arch(given.arch)
    check_range("--threads", "threads", given.threads, 1, 10**4)
    check_range("--epochs", "epochs", given.epochs, 1, 10**9)
    rule = parse_rule(given.rule)
    budget = {"arch": given.arch, "dataset": given.dataset, "epochs": given.epochs}
    recipe = recipe_of(given.dataset, given.arch)
    config = still(rule, fraction=given.fraction, samples=given.samples, **recipe, **budget)
    found, where = of_trial(
        config,
        data_dir=given.data_dir,
        device=given.device,
        threads=given.threads,
        results=given.results,
        tracking_uri=given.tracking_uri,
        say=_say,
    )
    if given.json:
        stages = [dataclasses.asdict(each) for each in found]
        print(json.dumps({"config": config.to_dict(), "provenance": where, "stages": stages}))
        return 0
    rows = [[each.stage, f"{each.seconds:.2f}", f"{each.calls}", f"{each.share:.1%}"] for each in found]
    title = f"a trial of {rule.name} on {given.arch}, {given.dataset}: {config.epochs} epochs"
    _show(title, ["stage", "s", "times", "share"], rows, f"n = 1; {_machine(where)}")
    return 0


def _machine(where: dict[str, Any]) -> str:
    return f"{where['device_name']}, {where['threads']} threads, torch {where['versions']['torch']}"
