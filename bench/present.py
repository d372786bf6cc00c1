"""What the command line prints of a search."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.learning.rules import ANY
from bench.matrix_words import any_lines
from bench.place import Options
from bench.robustness_words import (
    curve_columns,
    curve_rows,
    draws_line,
    note,
    table_columns,
    table_rows,
    title,
    verdict_lines,
)
from bench.summary import columns as search_columns
from bench.summary import floor_words
from bench.summary import table_rows as search_rows
from bench.terminal import Console, console, table
from bench.ui import runs_link


def print_search(outcome: str, summary: Mapping[str, Any], options: Options) -> None:
    """What a search found, on stdout: counts, the table with its controls, where it lies, the link to its runs."""
    out = console(sys.stdout)
    counts = ", ".join(f"{n} {name}" for name, n in summary["trials"].items())
    head = (
        f"{summary['study']}: {summary['rule']} on {summary['arch']}, {summary['dataset']} ({summary['epochs']} epochs)"
    )
    if outcome == "known":
        out.print(
            f"{summary['study']} is finished; this is its result. A larger --trials goes on with it.", markup=False
        )
    if outcome == "interrupted":
        out.print("interrupted: the same command goes on from here.", markup=False)
    out.print(f"trials: {counts}", markup=False)
    if not summary["confirmed"]:
        out.print(_why_nothing(outcome, summary), markup=False)
    rows = search_rows(summary)
    if rows:
        note = "mean ± standard deviation over n fresh seeds; test is read once per seed; intervals are paired, 95 % t"
        if floor := floor_words(summary):
            note += f"; {floor}"
        if summary["objective"] == "both":
            note += "; ● on the front of the validation means: what differs by less than ± may trade places"
        out.print(table(head, search_columns(summary), rows, caption=note))
    if summary["warm"]:
        _print_warm(out, summary["warm"])
    for line in any_lines(summary["matrix"]):
        out.print(line, markup=False)
    if summary["rule"] == ANY and summary["matrix"] is None:
        out.print(f"there is no matrix of {summary['arch']} to compare it with: bench matrix runs one", markup=False)
    if len(summary["code"]) > 1:
        made = ", ".join(f"{code['runs']} with {_code_words(code)}" for code in summary["code"])
        out.print(f"not all runs were made by the same code: {made}", markup=False)
    best = Path(summary["folder"]) / "best.yaml"
    if best.exists():
        what = "best compromise of the front" if summary["objective"] == "both" else "best configuration"
        out.print(f"{what}: {best}", markup=False)
    print_link(out, summary, options)


def _code_words(code: Mapping[str, Any]) -> str:
    """Enough to tell it from others."""
    revision = str(code["git_revision"] or "no checkout")
    short = revision[:8] + ("-dirty" if revision.endswith("-dirty") else "")
    return f"bench {code['bench']} ({short}, source {code['source']}, torch {code['torch']}, optuna {code['optuna']})"


def print_robustness(outcome: str, summary: Mapping[str, Any], options: Options) -> None:
    """What a measurement found, on stdout: two tables a site, the verdicts, where it lies, the link to its runs."""
    out = console(sys.stdout)
    if outcome == "known":
        out.print(f"{summary['study']} is finished; this is its result.", markup=False)
    if outcome == "interrupted":
        out.print("interrupted: the same command goes on from here. What is known by now:", markup=False)
    counts = ", ".join(f"{n} {name}" for name, n in summary["runs"].items())
    out.print(f"runs: {counts}", markup=False)
    for site in summary["sites"]:
        head = title(site["site"], summary)
        unit = "; ".join(filter(None, (f"{site['symbol']}: {site['unit']}", draws_line(site))))
        out.print(table(head, curve_columns(site), curve_rows(site), texts=1, caption=unit))
        out.print(table("", table_columns(site), table_rows(site), caption=note(summary, site)))
    for line in verdict_lines(summary) if summary["complete"] else ():
        out.print(line, markup=False)
    if summary["runs"]["failed"]:
        log = Path(summary["folder"]) / "ray.log"
        out.print(f"the same command tries what failed again; why it failed is in {log}", markup=False)
    out.print(f"figures: {summary['folder']}", markup=False)
    print_link(out, summary, options)


def _print_warm(out: Console, warm: Mapping[str, Any]) -> None:
    """What the warm start saved."""
    if warm["reason"]:
        out.print(f"warm start: nothing to compare it with ({warm['reason']})", markup=False)
        return
    out.print(
        f"warm start: {warm['level']:.2%} was reached at trial {warm['warm']}, and at trial {warm['cold']} in "
        f"{warm['study']} (cold, the same budget): {warm['saved']} trials saved. In the end warm had "
        f"{warm['warm_best']:.2%}, cold {warm['cold_best']:.2%} (validation, one search each)",
        markup=False,
    )


def print_link(out: Console, summary: Mapping[str, Any], options: Options) -> None:
    """Where the runs can be compared."""
    where = f" --results {options.shown}" if options.shown != "results" else ""
    if summary["link"] and options.tracking_uri and options.tracking_uri.startswith("http"):
        out.print(f"compare the runs: {summary['link']}", markup=False)
    elif summary["link"]:
        out.print(f"compare the runs: bench ui{where}, and then {summary['link']}", markup=False)


def _why_nothing(outcome: str, summary: Mapping[str, Any]) -> str:
    if outcome == "interrupted":
        return "nothing is confirmed yet."
    if summary["trials"]["finished"]:
        return "nothing was confirmed: --confirm-seeds is 0."
    return "nothing could be confirmed: no trial finished. Lower the coefficients' ranges, or the learning rate."


def study_link(mlflow: Mapping[str, Any], options: Options) -> str | None:
    """The page of this study's runs: on the server that was named, or where `bench ui` will show them."""
    if mlflow["experiment_id"] is None:  # the store could not be reached
        return None
    uri = options.tracking_uri or ""
    base = uri if uri.startswith("http") else "http://127.0.0.1:5000"
    return runs_link(base, mlflow["experiment_id"], mlflow["parent_run_id"])
