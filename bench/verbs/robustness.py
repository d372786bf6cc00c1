"""`bench robustness`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.config import UserError, check_range, unknown
from bench.verbs.common import (
    INTERRUPTED,
    add_json,
    add_results,
    add_where,
    check_name,
    numbers,
    parse_settings,
    verb,
    writable,
)

if TYPE_CHECKING:
    from bench.config import TrialConfig
    from bench.robustness import Ready, Robustness


def add(verbs: Any) -> None:
    p = verb(
        verbs, "robustness", _robustness, "measure how rules stand noise in training, and noise or attacks after it"
    )
    p.add_argument("--rule", default="", metavar="R[,R...]", help="rules; backprop is always beside them")
    p.add_argument("--arch", default="resnet18", metavar="A", help="a name from `bench list networks`")
    p.add_argument("--dataset", default="digits", metavar="D", help="a name from `bench list datasets`")
    p.add_argument("--site", metavar="S[,S...]", help="update, weight, activation, input (else all, if no --attack)")
    p.add_argument("--sigma", metavar="X,X...", help="levels of noise, of one site; or imagenet-c, cifar10-c (input)")
    p.add_argument("--on", default="both", help="whose updates are noisy: both, forward, feedback")
    p.add_argument("--clip", action="store_true", help="cut noisy pixels to [0, 1], as the -C benchmarks do")
    p.add_argument("--draws", type=int, default=5, metavar="K", help="of evaluation noise, averaged")
    p.add_argument("--attack", metavar="T[,T...]", help="fgsm, pgd, square")
    p.add_argument("--epsilon", metavar="X,X...", help="levels of the attacks, in pixel values of [0, 1]")
    p.add_argument("--gradient", default="true", metavar="G[,G]", help="of an attack: true; feedback, through B")
    p.add_argument("--attacked", type=int, default=200, metavar="N", help="test examples under attack")
    p.add_argument("--queries", type=int, default=1000, metavar="N", help="of a black-box attack, each example")
    p.add_argument("--seeds", type=int, default=5, metavar="N", help="networks of each rule, the same seeds for all")
    p.add_argument("--config", action="append", default=[], type=Path, metavar="YAML", help="of a rule: a best.yaml")
    p.add_argument("--study", action="append", default=[], metavar="STUDY", help="take the best of this search")
    p.add_argument(
        "--checkpoint", action="append", default=[], type=Path, metavar="FILE", help="a trained network, as it is"
    )
    p.add_argument("--epochs", type=int, metavar="E", help="of each training (else as in the search)")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the training recipe of all")
    p.add_argument("--concurrent", type=int, metavar="K", help="runs at a time (else one per core, or GPU)")
    p.add_argument("--keep-networks", action="store_true", help="leave the trained networks in the folder")
    p.add_argument("--name", metavar="STUDY", help="of the measurement (else robustness-ARCH-DATASET)")
    add_where(p)
    add_results(p)
    add_json(p)


def _robustness(given: argparse.Namespace) -> int:
    from bench.config import study_name
    from bench.models import check_arch
    from bench.place import Options
    from bench.recipes import check_recipe
    from bench.robustness import prepare_measurement
    from bench.robustness_plan import RobustnessConfig, rules_of

    check_range("--concurrent", "concurrent", given.concurrent, 1)
    check_arch(given.arch)
    changes = check_recipe(parse_settings(given.set)) | ({"epochs": given.epochs} if given.epochs else {})
    networks = _networks(given)
    rules = rules_of(
        [name for name in given.rule.split(",") if name],
        arch=given.arch,
        dataset=given.dataset,
        changes=changes,
        files=[*given.config, *(given.results / study / "best.yaml" for study in given.study)],
        results=given.results,
        given=[config for config, _ in networks],
    )
    config = RobustnessConfig(
        name=check_name(given.name or study_name("robustness", given.arch, given.dataset)),
        rules={rule: each.to_dict() for rule, each in rules.items()},
        levels=_levels(given),
        seeds=given.seeds,
        draws=given.draws,
        update_on=given.on,
        clip=given.clip,
        gradients=tuple(given.gradient.split(",")),
        attacked=given.attacked,
        queries=given.queries,
    )
    options = Options(
        results=given.results,
        data_dir=given.data_dir,
        device=given.device,
        concurrent=given.concurrent,
        tracking_uri=given.tracking_uri,
    )
    ready = prepare_measurement(config, options, networks)
    writable(given.results)
    return _run(ready, json_wanted=given.json, keep_networks=given.keep_networks)


def _networks(given: argparse.Namespace) -> list[tuple[TrialConfig, Path]]:
    """The trained networks that were named: their configurations, and their files."""
    if not given.checkpoint:
        return []
    from bench.checkpoint import read_checkpoint
    from bench.config import TrialConfig

    if given.config or given.study or given.epochs or given.set:
        raise UserError("--checkpoint brings its configuration: leave out --config, --study, --epochs and --set.")
    found: dict[tuple[str, int], tuple[TrialConfig, Path]] = {}
    for path in given.checkpoint:
        state = read_checkpoint(path)
        config = TrialConfig.from_dict(state["config"])
        if state["epoch"] < config.epochs:
            raise UserError(
                f"{path} is trained for {state['epoch']} of its {config.epochs} epochs; finish it with "
                f"`bench train … --checkpoint {path}`."
            )
        if (config.rule, config.seed) in found:
            raise UserError(f"{path}: a network of rule {config.rule!r} and seed {config.seed} is given twice.")
        found[config.rule, config.seed] = config, path
    return list(found.values())


def _levels(given: argparse.Namespace) -> dict[str, tuple[float, ...]]:
    """The grid of each site and attack: its own, or the one that was named."""
    from bench.evaluators.adversarial import ATTACKS
    from bench.noise import CORRUPTION_SEVERITIES, SITES
    from bench.robustness_plan import default_levels

    attacks = _names(given.attack, ATTACKS, "attack")
    sites = _names(given.site, SITES, "site") or ([] if attacks else list(SITES))
    if given.checkpoint and "update" in sites:
        if given.site:
            raise UserError("site update is noise in training: it cannot be measured of a --checkpoint.")
        sites.remove("update")
    levels = default_levels([*sites, *attacks])
    if given.sigma:
        if len(sites) != 1:
            raise UserError("--sigma is in the unit of one site: name it, with --site.")
        named = {name.lower().replace("-10", "10"): severities for name, severities in CORRUPTION_SEVERITIES.items()}
        if given.sigma in named and sites != ["input"]:
            raise UserError(f"--sigma {given.sigma} belongs to --site input.")
        levels[sites[0]] = named.get(given.sigma) or numbers("--sigma", given.sigma)
    if given.epsilon:
        if not attacks:
            raise UserError("--epsilon is of attacks: name one, with --attack.")
        levels |= dict.fromkeys(attacks, numbers("--epsilon", given.epsilon))
    return levels


def _names(text: str | None, known: Any, what: str) -> list[str]:
    names = [name for name in (text or "").split(",") if name]
    for name in names:
        if name not in known:
            raise unknown(what, name, known)
    return list(dict.fromkeys(names))


def _run(ready: Ready, *, json_wanted: bool, keep_networks: bool) -> int:
    from bench.present import print_robustness, study_link
    from bench.robustness import measure
    from bench.streams import quiet
    from bench.terminal import Progress

    log = ready.folder / "ray.log"
    bars: list[Progress] = []

    def say(line: str) -> None:
        bars[0].say(line)

    def watch(source: Robustness) -> Callable[[], None]:
        say(f"{ready.config.name}: {source.outlook()}; Ray's log: {log}")
        bars[0].show(source.render)
        return bars[0].tick

    with quiet(log) as (_, err), Progress(err) as bar:
        bars.append(bar)
        outcome, summary = measure(ready, say=say, watch=watch, keep_networks=keep_networks)
    summary["link"] = study_link(summary["mlflow"], ready.place.options)
    if json_wanted:
        print(json.dumps({"outcome": outcome, **summary}))
    else:
        print_robustness(outcome, summary, ready.place.options)
    return INTERRUPTED if outcome == "interrupted" else 0
