"""`bench sync`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from bench.verbs.common import add_json, add_results, verb

if TYPE_CHECKING:
    from bench.sync import Report

#: The exit status where MLflow does not agree with the results.
DISAGREES = 1


def add(verbs: Any) -> None:
    p = verb(verbs, "sync", _sync, "record what MLflow lacks of the results, and end what killed runs left open")
    add_results(p)
    add_json(p)


def _sync(given: argparse.Namespace) -> int:
    from bench.stores import MLflowAwayError
    from bench.sync import sync

    try:
        report = sync(given.results, given.tracking_uri)
    except MLflowAwayError as error:
        print(f"bench: nothing was recorded, and nothing is lost: {error}", file=sys.stderr)
        return DISAGREES
    if given.json:
        print(json.dumps({**dataclasses.asdict(report), "agrees": report.agrees}))
    else:
        _print(report)
    return 0 if report.agrees else DISAGREES


def _print(report: Report) -> None:
    """A table of the studies, and a line for what it does not say."""
    from bench.terminal import console, table

    out = console(sys.stdout)
    words = {True: "yes", False: "no", None: ""}
    rows = [[s.study, words[s.agrees], s.note, str(s.recorded), str(s.ended)] for s in report.studies]
    if rows:
        columns = ["study", "agrees", "", "recorded", "ended"]
        out.print(table(f"MLflow at {report.store}", columns, rows, texts=3, caption="rows recorded, runs ended"))
    else:
        out.print(f"nothing here is for MLflow at {report.store}.", markup=False)
    if report.away:
        out.print(
            f"MLflow at {report.store} went away ({report.away}); nothing is lost: run bench sync again.", markup=False
        )
