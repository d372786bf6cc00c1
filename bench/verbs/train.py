"""`bench train` and `bench evaluate`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.config import TrialConfig, UserError
from bench.verbs.common import add_json, add_results, add_where, parse_settings, verb, writable


def add_train(verbs: Any) -> None:
    p = verb(verbs, "train", _train, "train one configuration")
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
        "--checkpoint", metavar="FILE", help="save the state here (or at a URI) each epoch, and go on from it"
    )
    p.add_argument("--read-test", action="store_true", help="report test accuracy too: once per configuration")
    add_where(p)
    add_results(p)
    add_json(p)


def add_evaluate(verbs: Any) -> None:
    p = verb(verbs, "evaluate", _evaluate, "measure a trained network: accuracy, loss and angles")
    p.add_argument("checkpoint", help="what `bench train --checkpoint` wrote: a file, or a URI")
    p.add_argument("--split", choices=("val", "test"), default="val", help="which examples")
    add_where(p)
    add_json(p)


def _train(given: argparse.Namespace) -> int:
    from bench.train import train

    config = _train_config(given)
    summary = train(
        config,
        results=writable(given.results),
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
    from bench.place import Options, recipe_for

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
        dataset, arch = (merged.get(name, getattr(TrialConfig, name)) for name in ("dataset", "arch"))
        merged = recipe_for(dataset, arch, merged, Options(device=given.device), begun=_begun(given))
    config = TrialConfig.from_dict({**merged, "coefficients": coefficients})
    return config.replace(rule=parse_rule(config.rule).name)


def _begun(given: argparse.Namespace) -> dict[str, Any] | None:
    """The configuration of the run that ``--checkpoint`` goes on with; None if there is none."""
    from bench.checkpoint import checkpoint_file, previous

    state = previous(checkpoint_file(str(given.checkpoint)), "cpu") if given.checkpoint is not None else None
    found: dict[str, Any] | None = state and state["config"]
    return found


def _evaluate(given: argparse.Namespace) -> int:
    from bench.train import evaluate

    found = evaluate(given.checkpoint, split=given.split, data_dir=given.data_dir, device=given.device)
    if given.json:
        print(json.dumps(found))
        return 0
    print(_metrics_line(found["metrics"]))
    _print_layers(found["metrics"])
    return 0


#: Of each layer, as far as it was measured: metric, heading.
_OF_LAYERS = {"angle": "angle °", "floor_angle": "floor °", "dx_angle": "dx angle °", "norm_ratio": "‖B‖/‖W‖"}


def _print_layers(metrics: dict[str, float]) -> None:
    """The angles layer by layer, each beside its floor."""
    from bench.cells import NOTHING
    from bench.summary import FLOOR
    from bench.terminal import console, table

    shown = {name: head for name, head in _OF_LAYERS.items() if any(m.startswith(f"{name}/") for m in metrics)}
    layers = [m.removeprefix("angle/") for m in metrics if m.startswith("angle/")]
    rows = [
        (layer, *(f"{metrics[key]:.2f}" if (key := f"{name}/{layer}") in metrics else NOTHING for name in shown))
        for layer in layers
    ]
    if rows:
        floor = f"floor: {FLOOR}" if "floor_angle" in shown else None
        console(sys.stdout).print(table("", ("layer", *shown.values()), rows, texts=1, caption=floor))


def _metrics_line(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items() if "/" not in name)
