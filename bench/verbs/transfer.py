"""`bench transfer`."""

from __future__ import annotations

import argparse
from typing import Any

from bench.config import UserError, study_name
from bench.verbs.common import (
    add_budget,
    add_json,
    add_machines,
    add_results,
    add_space,
    add_where,
    budget_of,
    carry_out,
    check_name,
    names,
    options_of,
    parse_settings,
    verb,
)


def add(verbs: Any) -> None:
    p = verb(verbs, "transfer", _transfer, "carry coefficients from one network to others, and say what that costs")
    p.add_argument("--rule", required=True, metavar="R[,R...]", help="rules whose feedback weights learn")
    p.add_argument("--from", dest="source", default="resnet18", metavar="A", help="the network that is searched")
    p.add_argument("--to", required=True, metavar="A[,A...]", help="the networks that its configurations run on")
    p.add_argument("--dataset", default="digits", metavar="D", help="a name from `bench list datasets`")
    p.add_argument("--configs", type=int, default=4, metavar="K", help="carried over beside the best, spread out")
    p.add_argument("--both", action="store_true", help="the other direction, too")
    p.add_argument("--name", metavar="NAME", help="of the transfer (else transfer-FROM-to-TO-DATASET)")
    add_space(p, several=True)
    add_budget(p)
    add_where(p)
    add_machines(p)
    add_results(p)
    add_json(p)


def _transfer(given: argparse.Namespace) -> int:
    from bench.learning.rules import parse_rule
    from bench.models import check_arch
    from bench.present_plans import print_transfer
    from bench.recipes import check_recipe
    from bench.spaces import SPACES
    from bench.transfer import TransferConfig, prepare_transfer, transfer

    rules = [parse_rule(name) for name in names("rule", given.rule)]
    for rule in rules:
        if not rule.learns:
            raise UserError(
                f"--rule {rule.name}: it has no coefficients to carry over; name rules whose feedback weights learn "
                "(backprop stands beside them in any case)."
            )
    targets = names("to", given.to)
    for arch in (given.source, *targets):
        check_arch(arch)
    if given.source in targets:
        raise UserError(f"--to {given.source}: that is where the configurations come from; name another network.")
    name = study_name(f"transfer-{given.source}-to", "-".join(targets), given.dataset)
    config = TransferConfig(
        name=check_name(given.name or name),
        rules=tuple(dict.fromkeys(rule.name for rule in rules)),
        source=given.source,
        targets=tuple(targets),
        dataset=given.dataset,
        spaces=tuple(SPACES if given.space == "all" else names("space", given.space, SPACES)),
        configs=given.configs,
        both=given.both,
    )
    changes = check_recipe(parse_settings(given.set))
    prepared = prepare_transfer(config, given=budget_of(given), changes=changes, options=options_of(given))
    return carry_out(
        given,
        config.name,
        prepared.place.options,
        lambda say, watch: transfer(prepared, say=say, watch=watch),
        print_transfer,
    )
