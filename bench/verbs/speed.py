"""`bench speed`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.config import UserError, check_range, unknown
from bench.verbs.common import (
    Say,
    Watch,
    add_json,
    add_machines,
    add_results,
    add_where,
    carry_out,
    check_name,
    numbers,
    options_of,
    parse_settings,
    verb,
)

if TYPE_CHECKING:
    from bench.place import Options


#: Where none is named.
ARCH, DATASET = "resnet18", "digits"
#: Of a trial whose stages are timed, and of those of a search for a fixed time.
EPOCHS = 2


def add(verbs: Any) -> None:
    p = verb(verbs, "speed", _speed, "measure training steps beside backprop's; or, with --trials, a search's own cost")
    p.add_argument(
        "--arch", metavar="A", help="see `bench list networks` (else resnet18; of --fractions, that of the --config)"
    )
    p.add_argument("--rule", default="all", metavar="R[,R...]", help="rules beside backprop; all: every named one")
    p.add_argument("--batch-size", type=int, default=128, metavar="N", help="examples in a step")
    p.add_argument("--image-size", type=int, default=32, metavar="H", help="pixels a side; 224: as ImageNet's")
    p.add_argument("--classes", type=int, default=10, metavar="C", help="that the network tells apart")
    p.add_argument("--precision", default="auto", help="auto (bf16 on a GPU), float32, bf16")
    p.add_argument("--fraction", type=float, default=1.0, metavar="F", help="share of a batch that B learns from")
    p.add_argument("--samples", type=int, default=0, metavar="N", help="B learns from N noise patches (else the batch)")
    p.add_argument("--rounds", type=int, metavar="N", help="in each, every rule takes a turn (else 11; of searches 3)")
    p.add_argument("--threads", type=int, metavar="N", help="of torch on a CPU (else torch's own)")
    p.add_argument("--straightforward", action="store_true", help="also autograd on the energies, from the tests")
    p.add_argument("--trial", action="store_true", help="instead: where the seconds of one trial of a rule go")
    p.add_argument(
        "--dataset", metavar="D", help="of that trial; see `bench list datasets` (else digits; or that of the --config)"
    )
    p.add_argument("--epochs", type=int, metavar="E", help="of that trial (else 2), or of each training (else its own)")
    p.add_argument("--search", type=float, metavar="S", help="instead: search for S seconds, and as others would")
    p.add_argument(
        "--fractions", metavar="F[,F...]", help="instead: train with such shares of a batch for B, and whole"
    )
    p.add_argument("--seeds", type=int, default=5, metavar="N", help="of those trainings, paired")
    p.add_argument("--config", action="append", default=[], type=Path, metavar="YAML", help="of a rule: a best.yaml")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the training recipe")
    p.add_argument("--name", metavar="NAME", help="of the folder and of the study in MLflow")
    p.add_argument("--trials", metavar="N[,N...]", help="instead: searches of so many trials that do nothing")
    p.add_argument("--sampler", default="random", metavar="S", help="of those searches; see `bench list samplers`")
    add_json(p)
    add_results(p)
    add_where(p)
    add_machines(p)
    p.set_defaults(usual=vars(p.parse_args([])))


#: Title, columns, rows, caption.
Table = tuple[str, list[str], list[list[str]], str | None]

#: The options that not every measurement has a use for, and those that have.
_USES = {
    **dict.fromkeys(("batch_size", "image_size", "classes", "precision", "straightforward"), ("steps",)),
    **dict.fromkeys(("fraction", "samples", "threads"), ("steps", "trial")),
    **dict.fromkeys(("arch", "rule"), ("steps", "trial", "search", "fractions")),
    **dict.fromkeys(("dataset", "epochs"), ("trial", "search", "fractions")),
    **dict.fromkeys(("seeds", "config", "set", "name", "concurrent", "gpus_per_trial"), ("fractions",)),
    **dict.fromkeys(("workers_per_trial", "address"), ("fractions",)),
    "rounds": ("steps", "search"),
    "device": ("steps", "trial", "fractions"),
    "data_dir": ("trial", "fractions"),
    **dict.fromkeys(("results", "tracking_uri"), ("steps", "trial", "fractions")),
    "sampler": ("trials",),
    "storage": (),
}


def _speed(given: argparse.Namespace) -> int:
    instead = [name for name in ("trial", "search", "fractions", "trials") if getattr(given, name) not in (None, False)]
    if len(instead) > 1:
        raise UserError(f"--{' and --'.join(instead)} measure different things: give one of them.")
    mode = instead[0] if instead else "steps"
    if given.straightforward and (given.fraction != 1.0 or given.samples):
        raise UserError("--straightforward sees the whole batch: leave out --fraction and --samples, or it.")
    for name, modes in _USES.items():
        if mode not in modes and getattr(given, name) != given.usual[name]:
            where = "on the steps" if mode == "steps" else f"with --{mode}"
            raise UserError(f"--{name.replace('_', '-')} has no effect {where}: leave it out.")
    check_range("--threads", "threads", given.threads, 1, 10**4)
    check_range("--epochs", "epochs", given.epochs, 1, 10**9)
    if mode != "fractions":
        given.arch, given.dataset = given.arch or ARCH, given.dataset or DATASET
    runs = {"steps": _steps, "trial": _trial, "search": _search, "fractions": _fractions, "trials": _growth}
    return runs[mode](given)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(given: argparse.Namespace, known: Any, table: Callable[[], Table], texts: int = 1) -> int:
    """All that is known, as JSON; or a table of it, whose first ``texts`` columns are no numbers."""
    from bench import terminal

    if given.json:
        print(json.dumps(known))
        return 0
    title, columns, rows, caption = table()
    terminal.console(sys.stdout).print(terminal.table(title, columns, rows, caption=caption, texts=texts))
    return 0


def _steps(given: argparse.Namespace) -> int:
    from bench.learning.rules import RULES, parse_rule
    from bench.models import check_arch
    from bench.speed import timed
    from bench.steps import Conditions

    check_arch(given.arch)
    rules = list(RULES) if given.rule == "all" else [parse_rule(name).name for name in given.rule.split(",")]
    conditions = Conditions(
        arch=given.arch,
        rules=tuple(rules),
        batch_size=given.batch_size,
        image_size=given.image_size,
        classes=given.classes,
        precision=given.precision,
        fraction=given.fraction,
        samples=given.samples,
        rounds=11 if given.rounds is None else given.rounds,
    )
    found, where = timed(
        conditions,
        straightforward=given.straightforward,
        device=given.device,
        threads=given.threads,
        results=given.results,
        tracking_uri=given.tracking_uri,
        say=_say,
    )
    steps = [dataclasses.asdict(each) for each in found]

    def table() -> Table:
        columns = ["rule", "way", "ms", "/ backprop", "quartiles", "floor", "/ floor", "MB", "/ backprop", "allowed"]
        rows = [
            [
                each.rule,
                each.way,
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
        machine = f"{where['device_name']}, {where['threads']} threads, torch {where['versions']['torch']}"
        caption = f"medians; {machine}{shares}. allowed: backprop's memory, and B with its optimizer state"
        return f"a training step of {given.arch}: {images}, {conditions.rounds} rounds", columns, rows, caption

    return _show(given, {"conditions": conditions.to_dict(), "provenance": where, "steps": steps}, table, 2)


def _trial(given: argparse.Namespace) -> int:
    from bench.learning.rules import parse_rule
    from bench.models import check_arch
    from bench.recipes import recipe_of
    from bench.speed import of_trial
    from bench.steps import still

    check_arch(given.arch)
    rule = parse_rule("backprop" if given.rule == "all" else given.rule)
    recipe = recipe_of(given.dataset, given.arch)
    budget = {"arch": given.arch, "dataset": given.dataset, "epochs": EPOCHS if given.epochs is None else given.epochs}
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
    stages = [dataclasses.asdict(each) for each in found]

    def table() -> Table:
        rows = [[each.stage, f"{each.seconds:.2f}", f"{each.calls}", f"{each.share:.1%}"] for each in found]
        title = f"a trial of {rule.name} on {given.arch}, {given.dataset}: {config.epochs} epochs"
        caption = f"n = 1; {where['device_name']}, {where['threads']} threads, torch {where['versions']['torch']}"
        return title, ["stage", "s", "times", "share"], rows, caption

    return _show(given, {"config": config.to_dict(), "provenance": where, "stages": stages}, table)


def _search(given: argparse.Namespace) -> int:
    from bench.cells import spread_of
    from bench.learning.rules import parse_rule
    from bench.models import check_arch
    from bench.provenance import provenance
    from bench.rivalry import compared, over_rounds
    from bench.space_files import load_space

    check_arch(given.arch)
    check_range("--search", "seconds", given.search, 10, 10**6)
    rounds = 3 if given.rounds is None else given.rounds
    check_range("bench speed", "rounds", rounds, 1, 10**5)
    rule = "sparse" if given.rule == "all" else parse_rule(given.rule).name
    if not load_space(rule, given.arch).searched:
        raise UserError(f"rule {rule!r} has no coefficients to search for; name one that has, e.g. --rule sparse.")
    trial = {"rule": rule, "arch": given.arch, "dataset": given.dataset, "epochs": given.epochs or EPOCHS}
    found, where = compared(trial, given.search, rounds=rounds, say=_say), provenance("cpu")

    def table() -> Table:
        scales = {"first_step": 1, "trials": 1, "per_hour": 1, "best": 100, "idle": 100}
        known = over_rounds(found)
        rows = [[way, *(spread_of(of[name], scale) for name, scale in scales.items())] for way, of in known.items()]
        what = f"{rule} on {given.arch}, {given.dataset}, {trial['epochs']} epochs a trial"
        columns = ["by", "s to the first step", "trials", "an hour", "best val %", "idle cores %"]
        caption = (
            f"mean ± sd of n rounds; {where['cpu']}, {where['cores']:g} cores; each with its own TPE, another seed in "
            "each round, no scheduler; trials an hour: after the first step"
        )
        return f"{given.search:.0f} s of search: {what}", columns, rows, caption

    searches = [dataclasses.asdict(each) for each in found]
    return _show(given, {"trial": trial, "provenance": where, "searches": searches}, table)


def _fractions(given: argparse.Namespace) -> int:
    from bench.fractions import fractions, prepare_fractions
    from bench.recipes import check_recipe

    changes = check_recipe(parse_settings(given.set))
    if given.epochs is not None:
        changes = {**changes, "epochs": given.epochs}
    rules = [] if given.rule == "all" else given.rule.split(",")
    shares = numbers("--fractions", given.fractions)
    ready = prepare_fractions(
        given.name and check_name(given.name),
        rules,
        shares,
        seeds=given.seeds,
        arch=given.arch,
        dataset=given.dataset,
        changes=changes,
        files=given.config,
        options=options_of(given),
    )
    place = ready.place.options

    def work(say: Say, watch: Watch) -> tuple[str, dict[str, Any]]:
        return fractions(ready, say=say, watch=watch)

    return carry_out(given, ready.config.name, place, work, _show_fractions)


def _show_fractions(outcome: str, summary: dict[str, Any], options: Options) -> None:  # noqa: ARG001
    from bench.fractions_words import COLUMNS, rows_of, sentence
    from bench.terminal import console, table

    for rule, found in summary["rules"].items():
        title = f"{rule}: share of each batch that B sees"
        console(sys.stdout).print(table(title, COLUMNS, rows_of(found), caption=sentence(rule, found), texts=0))
    print(f"compare the runs: {summary['link']}")


def _growth(given: argparse.Namespace) -> int:
    from bench.choices import SAMPLERS
    from bench.growth import grown

    sizes = numbers("--trials", given.trials)
    for size in sizes:
        check_range("--trials", "trials", size, 10, 10**6)
        if size != int(size):
            raise UserError(
                f"--trials {given.trials}: write whole numbers with commas between, e.g. --trials 100,1000."
            )
    if given.sampler not in SAMPLERS:
        raise unknown("sampler", given.sampler, SAMPLERS)
    found = grown([int(size) for size in sizes], given.sampler, _say)

    def table() -> Table:
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
        return f"trials that do nothing, sampler {given.sampler}; seconds, n = 1", columns, rows, None

    return _show(given, [dataclasses.asdict(each) for each in found], table)
