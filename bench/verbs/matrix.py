"""`bench matrix`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from bench.config import PRIMITIVE_NAMES, UserError, study_name
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
    p = verb(verbs, "matrix", _matrix, "search every subset of the primitives, with equal budgets, beside controls")
    p.add_argument("--arch", default="resnet18", metavar="A[,A...]", help="names from `bench list networks`")
    p.add_argument("--dataset", default="digits", metavar="D", help="a name from `bench list datasets`")
    p.add_argument("--primitives", default=",".join(PRIMITIVE_NAMES), metavar="P[,P...]", help="subsets of these")
    p.add_argument("--any", action="store_true", help="also one search over all subsets at once, of the same budget")
    p.add_argument("--only", metavar="R[,R...]", help="run these rules alone now; the table is of all that is known")
    p.add_argument("--dry-run", action="store_true", help="say what would run, and how long; write nothing")
    p.add_argument("--name", metavar="NAME", help="of the matrix (else matrix-ARCH-DATASET)")
    add_space(p)
    add_budget(p)
    add_where(p)
    add_machines(p)
    add_results(p)
    add_json(p)


def _matrix(given: argparse.Namespace) -> int:
    from bench.campaign import CONTROLS
    from bench.learning.rules import ANY, parse_rule, subsets
    from bench.matrix import BESIDE, MatrixConfig, matrix, outlook, prepare_matrix
    from bench.models import check_arch
    from bench.present_plans import print_matrix, print_outlook
    from bench.recipes import check_recipe
    from bench.spaces import space_row

    archs = names("arch", given.arch)
    for arch in archs:
        check_arch(arch)
    primitives = names("primitives", given.primitives, PRIMITIVE_NAMES)
    only = names("only", given.only) if given.only is not None else []
    only = [name if name == ANY else parse_rule(name).name for name in only]
    rules = [rule.name for rule in subsets(primitives)]
    for name in only:
        if name in CONTROLS:
            raise UserError(f"--only {name}: it runs beside every search; name a search.")
        if name == ANY and not given.any:
            raise UserError("--only any: that search is part of the matrix with --any; add it.")
        if name not in (*rules, *BESIDE, ANY):
            raise UserError(f"--only {name}: not in this matrix; it has subsets of {', '.join(primitives)}.")
    name = study_name("matrix", "-".join(archs), given.dataset, space=space_row(given.space).name)
    config = MatrixConfig(
        name=check_name(given.name or name),
        archs=tuple(archs),
        dataset=given.dataset,
        primitives=tuple(primitives),
        space=given.space,
        any=given.any,
    )
    changes = check_recipe(parse_settings(given.set))
    prepared = prepare_matrix(config, only=only, given=budget_of(given), changes=changes, options=options_of(given))
    if given.dry_run:
        lines = outlook(prepared)
        if given.json:
            json.dump(lines, sys.stdout)
        else:
            print_outlook(lines, prepared.place.share.concurrent or 1)
        return 0
    return carry_out(
        given,
        config.name,
        prepared.place.options,
        lambda say, watch: matrix(prepared, say=say, watch=watch),
        print_matrix,
    )
