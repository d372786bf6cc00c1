"""The command line: one verb per stage. Whatever is heavy is imported inside the verb that needs it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import bench
from bench.config import StudyConfig, TrialConfig, UserError, check_range

if TYPE_CHECKING:
    from bench.campaign import Campaign, Ready

#: Exit statuses: bad input or a state that the user must mend; an interruption (128 + SIGINT); 128 + SIGPIPE.
BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. Errors of the user are one line on stderr, never a traceback."""
    try:
        given = _parser().parse_args(arguments)
        verb: Callable[[argparse.Namespace], int] = given.verb
        status = verb(given)
        sys.stdout.flush()
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return BAD_INPUT
    except BrokenPipeError:  # whoever read our output has left; nothing can be said any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return INTERRUPTED
    return status


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="bench", description=bench.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"bench {bench.__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for add in (_add_search, _add_train, _add_evaluate, _add_list, _add_ui, _add_doctor):
        add(verbs)
    return parser


def _verb(verbs: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=f"{summary}.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.set_defaults(verb=run)
    return made


def _add_results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="where results are kept")
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow server (else SQLite under the results)")


def _add_where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", metavar="PATH", help="where the data set's files are")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def _add_search(verbs: Any) -> None:
    default = {name: field.default for name, field in StudyConfig.__dataclass_fields__.items()}
    p = _verb(verbs, "search", _search, "search a rule's coefficients, then confirm the best beside its controls")
    p.add_argument("--rule", required=True, metavar="R", help="a name from `bench list rules`, or primitives as a+b")
    p.add_argument("--arch", default="resnet18", metavar="A", help="a name from `bench list networks`")
    p.add_argument("--dataset", default="digits", metavar="D", help="a name from `bench list datasets`")
    p.add_argument("--trials", type=int, default=default["trials"], metavar="N", help="configurations to try")
    p.add_argument("--epochs", type=int, default=default["epochs"], metavar="E", help="epochs of one whole trial")
    p.add_argument("--concurrent", type=int, metavar="K", help="trials at a time (else one per core, or GPU)")
    p.add_argument("--sampler", default=default["sampler"], help="see `bench list samplers`")
    p.add_argument("--scheduler", default=default["scheduler"], help="see `bench list schedulers`")
    p.add_argument("--confirm-seeds", type=int, default=default["confirm_seeds"], metavar="N", help="fresh seeds each")
    p.add_argument(
        "--confirm-top", type=int, default=default["confirm_top"], metavar="N", help="configurations to confirm"
    )
    p.add_argument("--seed", type=int, default=default["seed"], metavar="S", help="of the search and its trials")
    p.add_argument("--name", metavar="STUDY", help="of the study (else RULE-ARCH-DATASET)")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the training recipe")
    _add_where(p)
    _add_results(p)
    _add_json(p)


def _add_train(verbs: Any) -> None:
    p = _verb(verbs, "train", _train, "train one configuration")
    p.add_argument("--config", type=Path, metavar="YAML", help="a configuration, such as a study's best.yaml")
    p.add_argument("--rule", metavar="R", help="overrides the file's")
    p.add_argument("--arch", metavar="A", help="overrides the file's")
    p.add_argument("--dataset", metavar="D", help="overrides the file's")
    p.add_argument("--epochs", type=int, metavar="E", help="overrides the file's")
    p.add_argument("--seed", type=int, metavar="S", help="overrides the file's")
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any other key; coefficients.sparse=1e-3"
    )
    p.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="save the state here after each epoch, and go on from it"
    )
    p.add_argument("--read-test", action="store_true", help="report test accuracy too: once per configuration")
    _add_where(p)
    _add_results(p)
    _add_json(p)


def _add_evaluate(verbs: Any) -> None:
    p = _verb(verbs, "evaluate", _evaluate, "measure a trained network: accuracy, loss and angles")
    p.add_argument("checkpoint", type=Path, help="a file that `bench train --checkpoint` wrote")
    p.add_argument("--split", choices=("val", "test"), default="val", help="which examples")
    _add_where(p)
    _add_json(p)


def _add_list(verbs: Any) -> None:
    p = _verb(verbs, "list", _list, "show rules, primitives, networks, data sets, spaces, samplers, schedulers")
    p.add_argument("what", nargs="?", default="all", help="one of these, or all")
    _add_json(p)


def _add_ui(verbs: Any) -> None:
    p = _verb(verbs, "ui", _ui, "open MLflow's user interface on the results")
    p.add_argument("--host", default="127.0.0.1", help="another than loopback exposes all runs, without a password")
    p.add_argument("--port", type=int, default=5000, help="the next free one, if it is taken")
    _add_results(p)


def _add_doctor(verbs: Any) -> None:
    p = _verb(verbs, "doctor", _doctor, "say what this machine has, and what would go wrong on it")
    p.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="where results are kept")
    _add_json(p)


# --- the verbs


def _search(given: argparse.Namespace) -> int:
    from bench.campaign import Options
    from bench.learning.rules import parse_rule
    from bench.models import check_arch
    from bench.recipes import check_recipe, recipe_of
    from bench.search import check, study_name
    from bench.space import load_space

    check_range("--concurrent", "concurrent", given.concurrent, 1)
    rule = parse_rule(given.rule).name
    changes = check_recipe(parse_settings(given.set))
    recipe = {**recipe_of(given.dataset, given.arch), **changes}
    check_arch(given.arch)
    space = load_space(rule, given.arch)
    config = StudyConfig(
        name=_check_name(given.name or study_name(rule, given.arch, given.dataset)),
        rule=rule,
        arch=given.arch,
        dataset=given.dataset,
        trials=given.trials,
        epochs=given.epochs,
        seed=given.seed,
        sampler=given.sampler,
        scheduler=given.scheduler,
        confirm_top=given.confirm_top,
        confirm_seeds=given.confirm_seeds,
        recipe=recipe,
        space=space.to_dict(),
    )
    options = Options(
        results=given.results,
        data_dir=given.data_dir,
        device=given.device,
        concurrent=given.concurrent,
        tracking_uri=given.tracking_uri,
    )
    ready = check(config, space, options)
    _writable(given.results)
    return _run_search(ready, json_wanted=given.json)


def _run_search(ready: Ready, *, json_wanted: bool) -> int:
    from bench.present import print_search, study_link
    from bench.search import search
    from bench.streams import quiet
    from bench.terminal import Progress

    config, log = ready.config, ready.folder / "ray.log"
    bars: list[Progress] = []

    def say(line: str) -> None:
        bars[0].say(line)

    def watch(campaign: Campaign) -> Callable[[], None]:
        say(f"{config.name}: {config.trials} trials of {config.epochs} epochs; Ray's log: {log}")
        bars[0].show(campaign.render)
        return bars[0].tick

    with quiet(log) as (_, err), Progress(err) as bar:
        bars.append(bar)
        outcome, summary = search(ready, say=say, watch=watch)
    summary["link"] = study_link(summary["mlflow"], ready.options)
    if json_wanted:
        print(json.dumps({"outcome": outcome, **summary}))
    else:
        print_search(outcome, summary, ready.options)
    return INTERRUPTED if outcome == "interrupted" else 0


def _train(given: argparse.Namespace) -> int:
    from bench.train import train

    config = _train_config(given)
    summary = train(
        config,
        results=_writable(given.results),
        tracking_uri=given.tracking_uri,
        checkpoint=given.checkpoint,
        data_dir=given.data_dir,
        device=given.device,
        read_test=given.read_test,
        say=lambda line: print(line, file=sys.stderr),
    )
    print(json.dumps(summary) if given.json else _metrics_line(summary["metrics"]))
    return 0


def _train_config(given: argparse.Namespace) -> TrialConfig:
    """Flag over file over the data set's recipe over default."""
    from bench.files import read_yaml
    from bench.learning.rules import parse_rule
    from bench.recipes import recipe_of

    values: dict[str, Any] = read_yaml(given.config) if given.config else {}
    settings = parse_settings(given.set)
    coefficients = values.pop("coefficients", {})
    if not isinstance(coefficients, dict) or "coefficients" in settings:
        raise UserError("coefficients are set one by one: --set coefficients.sparse=1e-3, or a mapping in the file.")
    for key in [k for k in settings if k.startswith("coefficients.")]:
        coefficients[key.removeprefix("coefficients.")] = settings.pop(key)
    flags = {
        n: getattr(given, n) for n in ("rule", "arch", "dataset", "epochs", "seed") if getattr(given, n) is not None
    }
    merged = {**values, **settings, **flags}
    if "rule" not in merged:
        raise UserError("bench train needs --rule, or --config with a rule in it.")
    if not given.config:
        merged = {**recipe_of(merged.get("dataset", "digits"), merged.get("arch", "resnet18")), **merged}
    config = TrialConfig.from_dict({**merged, "coefficients": coefficients})
    return config.replace(rule=parse_rule(config.rule).name)


def _evaluate(given: argparse.Namespace) -> int:
    from bench.train import evaluate

    found = evaluate(given.checkpoint, split=given.split, data_dir=given.data_dir, device=given.device)
    print(json.dumps(found) if given.json else _metrics_line(found["metrics"]))
    return 0


def _metrics_line(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items() if "/" not in name)


def _list(given: argparse.Namespace) -> int:
    from bench.listing import LISTS, listing
    from bench.terminal import console, table

    if given.what not in (*LISTS, "all"):
        from bench.config import unknown

        raise unknown("list", given.what, (*LISTS, "all"))
    names = list(LISTS) if given.what == "all" else [given.what]
    found = {name: listing(name) for name in names}
    if given.json:
        print(json.dumps(found))
        return 0
    out = console(sys.stdout)
    for name, rows in found.items():
        out.print(table(name, list(rows[0]), [list(row.values()) for row in rows], texts=len(rows[0])))
    return 0


def _ui(given: argparse.Namespace) -> int:
    from bench.ui import serve

    serve(
        given.results,
        tracking_uri=given.tracking_uri,
        host=given.host,
        port=given.port,
        say=lambda line: print(line, flush=True),
    )
    return 0


def _doctor(given: argparse.Namespace) -> int:
    import dataclasses

    from bench.doctor import diagnose
    from bench.terminal import console, table

    checks = [dataclasses.asdict(check) for check in diagnose(given.results)]
    if given.json:
        print(json.dumps(checks))
    else:
        rows = [[c["status"], c["name"], c["detail"], c["remedy"] or ""] for c in checks]
        console(sys.stdout).print(table("this machine", ["", "check", "found", "remedy"], rows, texts=4))
    return 1 if any(check["status"] == "fail" for check in checks) else 0


# --- helpers


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` pairs, values as YAML scalars or lists; a key given twice is refused."""
    from bench.files import parse_scalar

    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set {setting!r}: write KEY=VALUE, e.g. --set lr=0.05.")
        if key.strip() in found:
            raise UserError(f"--set {key.strip()} is given twice; give it once.")
        found[key.strip()] = parse_scalar(key.strip(), value)
    return found


def _check_name(name: str) -> str:
    import re

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", name) or name in (
        "controls",
        "published",
        "spool",
        "train",
    ):
        raise UserError(f"--name {name!r}: use letters, digits and . _ + - (and not a folder that bench itself keeps).")
    return name


def _writable(results: Path) -> Path:
    """The results folder, if files can be made in it; UserError otherwise."""
    import tempfile

    try:
        results.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=results):
            return results
    except OSError as error:
        raise UserError(
            f"--results {results}: {error.strerror or error}; choose a folder that can be written."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
