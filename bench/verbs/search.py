"""`bench search`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

from bench.config import Objective, StudyConfig, TrialConfig, UserError, study_name, unknown
from bench.verbs.common import (
    Say,
    Watch,
    add_json,
    add_machines,
    add_results,
    add_space,
    add_where,
    carry_out,
    check_name,
    options_of,
    parse_settings,
    sigmas,
    verb,
)

if TYPE_CHECKING:
    from bench.campaign import Ready

OBJECTIVE_NAMES = get_args(Objective)


def add(verbs: Any) -> None:
    default = {name: field.default for name, field in StudyConfig.__dataclass_fields__.items()}
    p = verb(verbs, "search", _search, "search a rule's coefficients, then confirm the best beside its controls")
    p.add_argument("--rule", required=True, metavar="R", help="from `bench list rules`; primitives as a+b; any: which")
    p.add_argument("--arch", default="resnet18", metavar="A", help="a name from `bench list networks`")
    p.add_argument("--dataset", default="digits", metavar="D", help="a name from `bench list datasets`")
    p.add_argument("--trials", type=int, default=default["trials"], metavar="N", help="configurations to try")
    p.add_argument("--epochs", type=int, default=default["epochs"], metavar="E", help="epochs of one whole trial")
    p.add_argument("--objective", default=default["objective"], metavar="O", help="accuracy, robustness, or both")
    p.add_argument("--site", metavar="S", help="of the noise for robustness: update, weight, activation, input")
    p.add_argument("--sigma", metavar="X,X...", help="levels of that noise (else the site's own)")
    p.add_argument("--draws", type=int, default=1, metavar="K", help="of that noise, averaged")
    p.add_argument("--sampler", help=f"see `bench list samplers` (else {default['sampler']}; for --rule any: tpe)")
    p.add_argument("--scheduler", help=f"see `bench list schedulers` (else {default['scheduler']}; for both: none)")
    p.add_argument("--confirm-seeds", type=int, default=default["confirm_seeds"], metavar="N", help="fresh seeds each")
    p.add_argument("--confirm-top", type=int, metavar="N", help="configurations to confirm (else 1; of a front: 5)")
    p.add_argument("--seed", type=int, default=default["seed"], metavar="S", help="of the search and its trials")
    p.add_argument("--warm-from", metavar="STUDY", help="try the best configurations of that search first")
    p.add_argument("--name", metavar="STUDY", help="of the study (else RULE-ARCH-DATASET)")
    add_space(p)
    p.add_argument("--tune-lr", action="store_true", help="search W's learning rate, too (else as in the recipe)")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the training recipe")
    add_where(p)
    add_machines(p)
    add_results(p)
    add_json(p)


def _search(given: argparse.Namespace) -> int:
    from bench.learning.rules import ANY, parse_rule
    from bench.models import check_arch
    from bench.place import recipe_for
    from bench.plans import find_study
    from bench.recipes import check_recipe
    from bench.search import check
    from bench.space_files import load_space
    from bench.spaces import canonical_space, idle_settings, space_changes
    from bench.warm import warm_trials

    rule = ANY if given.rule == ANY else parse_rule(given.rule).name
    changes = check_recipe(parse_settings(given.set))
    check_arch(given.arch)
    if without := [key for key in changes if key in idle_settings(rule)]:
        raise UserError(f"--set {', '.join(without)}: without effect on rule {rule!r}: remove it.")
    if (same := canonical_space(rule, given.space)) != given.space:
        raise UserError(f"--space {given.space}: for rule {rule!r} it is the same as {same}; use --space {same}.")
    space = load_space(rule, given.arch, space=given.space)
    space.check_changes(changes, given.space)
    both = given.objective == "both"
    cold = study_name(rule, given.arch, given.dataset, space=given.space) + ("-lr" if given.tune_lr else "")
    cold += "" if given.objective == "accuracy" else f"-{given.objective}-{given.site}"
    name = check_name(given.name or (f"{cold}-warm" if given.warm_from else cold))
    options, known = options_of(given), find_study(given.results, name)
    begun = None if known is None else known.recipe
    recipe = recipe_for(given.dataset, given.arch, space_changes(space, rule, changes), options, begun=begun)
    recipe |= _noise(given, recipe)
    if given.tune_lr:
        space = space.with_lr(recipe.get("lr", TrialConfig.lr))
    config = StudyConfig(
        name=name,
        rule=rule,
        arch=given.arch,
        dataset=given.dataset,
        trials=given.trials,
        epochs=given.epochs,
        seed=given.seed,
        sampler=given.sampler or ("tpe" if rule == ANY else StudyConfig.sampler),
        scheduler=given.scheduler or ("none" if both else StudyConfig.scheduler),
        objective=given.objective,
        confirm_top=given.confirm_top if given.confirm_top is not None else (5 if both else StudyConfig.confirm_top),
        confirm_seeds=given.confirm_seeds,
        recipe=recipe,
        space=space.to_dict(),
    )
    if given.warm_from:
        if name == cold:
            raise UserError(f"--name {name}: that is the name of the cold search; give the warm one another.")
        warm = warm_trials(given.results, given.warm_from, config, space)
        config = config.replace(warm_from=given.warm_from, warm=warm)
    ready = check(config, space, options)
    return _run_search(given, ready, cold=cold)


def _run_search(given: argparse.Namespace, ready: Ready, *, cold: str) -> int:
    """``cold``: the name of the search that a warm one is compared with."""
    from bench.learning.rules import ANY
    from bench.matrix import beside
    from bench.present import print_search
    from bench.search import search
    from bench.warm import saved

    def work(say: Say, watch: Watch) -> tuple[str, dict[str, Any]]:
        outcome, summary = search(ready, say=say, watch=watch)
        summary["warm"] = saved(given.results, ready.config, cold) if given.warm_from else None
        summary["matrix"] = None
        if ready.config.rule == ANY:
            try:
                summary["matrix"] = beside(ready, given.space)
            except UserError as error:  # of the matrix: the search itself is done
                say(f"bench: {error}")
        return outcome, summary

    return carry_out(given, ready.config.name, ready.place.options, work, print_search)


def _noise(given: argparse.Namespace, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a trial that measures its robustness; none in a search for accuracy alone."""
    from bench.noise import SITES
    from bench.place import default_levels
    from bench.spaces import SETTINGS

    if given.objective not in OBJECTIVE_NAMES:
        raise unknown("objective", given.objective, OBJECTIVE_NAMES)
    if given.objective == "accuracy":
        if given.site or given.sigma is not None or given.draws != 1:
            raise UserError(
                "--site, --sigma and --draws have no effect on accuracy; use --objective robustness or both."
            )
        return {}
    if given.site not in SITES:
        if given.site:
            raise unknown("site", given.site, SITES)
        raise UserError(f"--objective {given.objective} needs the --site of the noise: {', '.join(SITES)}.")
    if given.site == "update" and given.draws != 1:
        raise UserError("--draws has no effect on --site update, which is noise in training: leave it out.")
    if given.sigma is not None:
        levels = sigmas(given.sigma, given.site)
    else:
        what = {"rule": "backprop", "arch": given.arch, "dataset": given.dataset, "epochs": given.epochs}
        plain = {name: value for name, value in recipe.items() if name not in SETTINGS}
        levels = default_levels(given.site, TrialConfig.from_dict({**plain, **what}), options_of(given))
    return {"noise_site": given.site, "noise_levels": list(levels), "noise_draws": given.draws}
