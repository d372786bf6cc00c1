"""`bench robustness`."""

from __future__ import annotations

import argparse
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
    is_benchmark,
    local_file,
    names,
    numbers,
    options_of,
    parse_settings,
    refuse_storage,
    sigmas,
    verb,
)

if TYPE_CHECKING:
    from bench.config import TrialConfig
    from bench.robustness import Ready

#: The networks of each rule, and their first seed: not one of those by which a search confirms its best.
SEEDS, FIRST_SEED = 5, 2000


def add(verbs: Any) -> None:
    p = verb(
        verbs, "robustness", _robustness, "measure how rules stand noise in training, and noise or attacks after it"
    )
    p.add_argument("--rule", default="", metavar="R[,R...]", help="rules; backprop is always beside them")
    p.add_argument("--arch", metavar="A", help="from `bench list networks` (else the --config's; else resnet18)")
    p.add_argument("--dataset", metavar="D", help="from `bench list datasets` (else the --config's; else digits)")
    p.add_argument("--site", metavar="S[,S...]", help="update, weight, activation, input (else all, if no --attack)")
    p.add_argument("--sigma", metavar="X,X...", help="levels of noise, of one site; or imagenet-c, cifar10-c")
    p.add_argument("--on", default="both", help="whose updates are noisy: both, forward, feedback")
    p.add_argument("--clip", action="store_true", help="cut noisy pixels to [0, 1], as the -C benchmarks do")
    p.add_argument("--draws", type=int, default=5, metavar="K", help="of evaluation noise, averaged")
    p.add_argument("--attack", metavar="T[,T...]", help="fgsm, pgd, square")
    p.add_argument("--epsilon", metavar="X,X...", help="levels of the attacks, in pixel values of [0, 1]")
    p.add_argument("--gradient", default="true", metavar="G[,G]", help="of an attack: true; feedback, through B")
    p.add_argument("--attacked", type=int, default=200, metavar="N", help="test examples under attack")
    p.add_argument("--queries", type=int, default=1000, metavar="N", help="of a black-box attack, each example")
    p.add_argument(
        "--first-seed", type=int, default=FIRST_SEED, metavar="S", help="the networks have the seeds S, S + 1, ..."
    )
    p.add_argument(
        "--seeds", type=int, default=SEEDS, metavar="N", help="networks of each rule, the same seeds for all"
    )
    p.add_argument("--config", action="append", default=[], type=Path, metavar="YAML", help="of a rule: a best.yaml")
    p.add_argument("--study", action="append", default=[], metavar="STUDY", help="take the best of this search")
    p.add_argument(
        "--checkpoint", action="append", default=[], type=local_file, metavar="FILE", help="a trained network, as it is"
    )
    p.add_argument("--epochs", type=int, metavar="E", help="of each training (else as in the search)")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the training recipe of all")
    p.add_argument("--keep-networks", action="store_true", help="leave the trained networks in the folder, from now on")
    p.add_argument("--name", metavar="STUDY", help="of the measurement (else robustness-ARCH-DATASET)")
    add_where(p)
    add_machines(p)
    add_results(p)
    add_json(p)


def _robustness(given: argparse.Namespace) -> int:
    from bench.config import study_name
    from bench.evaluators.adversarial import GRADIENTS
    from bench.models import check_arch
    from bench.place import default_levels
    from bench.recipes import check_recipe
    from bench.robustness import prepare_measurement
    from bench.robustness_plan import RobustnessConfig, rules_of

    refuse_storage(given, "a measurement")
    if given.arch is not None:
        check_arch(given.arch)
    changes = check_recipe(parse_settings(given.set)) | ({} if given.epochs is None else {"epochs": given.epochs})
    options, networks = options_of(given), _networks(given)
    levels = _levels(given)
    gradients: Any = tuple(names("gradient", given.gradient, GRADIENTS))
    rules = rules_of(
        names("rule", given.rule) if given.rule else [],
        arch=given.arch,
        dataset=given.dataset,
        changes=changes,
        files=[*given.config, *(_best(given.results, study) for study in given.study)],
        options=options,
        given=[config for config, _ in networks],
        begun=_begun(given),
    )
    first = next(iter(rules.values()))
    config = RobustnessConfig(
        name=check_name(given.name or study_name("robustness", first.arch, first.dataset)),
        rules={rule: each.to_dict() for rule, each in rules.items()},
        levels={site: named or default_levels(site, first, options) for site, named in levels.items()},
        seeds=len({each.seed for each, _ in networks}) or given.seeds,
        first_seed=given.first_seed,
        draws=given.draws,
        update_on=given.on,
        clip=given.clip or is_benchmark(given.sigma),
        gradients=gradients,
        attacked=given.attacked,
        queries=given.queries,
    )
    ready = prepare_measurement(config, options, networks)
    return _run(ready, given)


def _begun(given: argparse.Namespace) -> dict[str, Any] | None:
    """The configuration of the reference in the measurement that goes on; None if there is none."""
    from bench.config import TrialConfig, study_name
    from bench.files import read_yaml

    arch, dataset = given.arch or TrialConfig.arch, given.dataset or TrialConfig.dataset
    path = given.results / (given.name or study_name("robustness", arch, dataset)) / "robustness.yaml"
    config = read_yaml(path).get("config") if path.exists() else None
    rules = config.get("rules") if isinstance(config, dict) else None  # a damaged one is said where it is gone on with
    reference = next(iter(rules.values()), None) if isinstance(rules, dict) else None
    return reference if isinstance(reference, dict) else None


def _networks(given: argparse.Namespace) -> list[tuple[TrialConfig, Path]]:
    """The trained networks that were named: their configurations, and their files."""
    if not given.checkpoint:
        return []
    from bench.checkpoint import read_checkpoint
    from bench.config import TrialConfig
    from bench.learning.rules import parse_rule

    if given.config or given.study or given.epochs is not None or given.set:
        raise UserError("--checkpoint brings its configuration: leave out --config, --study, --epochs and --set.")
    if given.seeds != SEEDS or given.first_seed != FIRST_SEED:
        raise UserError("--checkpoint brings its seed, which all rules then have: leave out --seeds and --first-seed.")
    found: dict[tuple[str, int], tuple[TrialConfig, Path]] = {}
    for path in given.checkpoint:
        state = read_checkpoint(path)
        config = TrialConfig.from_dict(state["config"])
        config = config.replace(rule=parse_rule(config.rule).name)
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
    """The grid that was named of each site and attack to be measured; empty: its own."""
    from bench.evaluators.adversarial import ATTACKS
    from bench.noise import SITES

    attacks = [] if given.attack is None else names("attack", given.attack, ATTACKS)
    all_sites = [] if attacks else list(SITES)
    sites = all_sites if given.site is None else names("site", given.site, SITES)
    if given.keep_networks and {*sites, *attacks} == {"update"}:
        raise UserError("--keep-networks has no effect with site update alone: no network is measured after training.")
    if given.checkpoint and "update" in sites:
        if given.site is not None:
            raise UserError("site update is noise in training: it cannot be measured of a --checkpoint.")
        sites.remove("update")
    levels: dict[str, tuple[float, ...]] = dict.fromkeys([*sites, *attacks], ())
    if given.sigma is not None:
        if len(sites) != 1:
            raise UserError("--sigma is in the unit of one site: name it, with --site.")
        levels[sites[0]] = sigmas(given.sigma, sites[0])
    if given.epsilon is not None:
        if not attacks:
            raise UserError("--epsilon is of attacks: name one, with --attack.")
        levels |= dict.fromkeys(attacks, numbers("--epsilon", given.epsilon))
    return levels


def _best(results: Path, study: str) -> Path:
    """The configuration that a search found."""
    path = results / study / "best.yaml"
    if not path.exists():
        raise UserError(f"--study {study}: there is no {path}; name a finished `bench search`, or give --config.")
    return path


def _run(ready: Ready, given: argparse.Namespace) -> int:
    from bench.present import print_robustness
    from bench.robustness import measure

    keep = given.keep_networks
    return carry_out(
        given,
        ready.config.name,
        ready.place.options,
        lambda say, watch: measure(ready, say=say, watch=watch, keep_networks=keep),
        print_robustness,
    )
