"""`bench compare`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bench.config import one_line
from bench.verbs.common import add_kept, verb

if TYPE_CHECKING:
    from bench.reading import Found, SearchRows

#: More characters than any table is wide.
WIDEST = 10_000


def add(verbs: Any) -> None:
    p = verb(verbs, "compare", _compare, "set what searches and confirmations found side by side")
    what = (
        "the name or the folder of a search or a confirmation, or a file of rows (.jsonl); differences are to the first"
    )
    p.add_argument("study", nargs="+", metavar="STUDY", help=what)
    add_kept(p, writes=False)
    how = p.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print JSON, for programs; accuracies are fractions of 1")
    how.add_argument("--csv", action="store_true", help="print CSV, in full precision; accuracies are fractions of 1")
    how.add_argument("--latex", action="store_true", help="print a tabular for a paper, with booktabs")


def _compare(given: argparse.Namespace) -> int:
    from bench.compare import compare
    from bench.compare_words import csv_text, latex
    from bench.reading import pick

    found = compare([side for study in pick(given.results, given.study) for side in _sides(study)])
    if given.json:
        print(json.dumps(found))
    elif given.csv:
        sys.stdout.write(csv_text(found))
    elif given.latex:
        sys.stdout.write(latex(found))
    else:
        print_comparison(found)
    return 0


def _sides(study: Found) -> list[SearchRows]:
    """A search; or the configurations of a confirmation."""
    from bench.reading import read_search

    if study.kind != "confirmation":
        return [read_search(study)]
    from bench.confirmation import read, sides  # it imports torch, which takes seconds

    return [side for side in sides(*read(study.folder)) if side.confirmed]


def print_comparison(found: dict[str, Any]) -> None:
    """The table, in two where it is too wide, and the notes."""
    from bench.compare_words import CAPTION, COLUMNS, TEXTS, table_rows
    from bench.terminal import console, table

    out = console(sys.stdout)
    title, rows = f"the first: {found['first']}", table_rows(found)
    whole = table(title, COLUMNS, rows, texts=TEXTS)
    needed = out.measure(whole, options=out.options.update(max_width=WIDEST)).maximum
    if needed <= out.width:
        out.print(whole)
    else:  # in two: what was run, and what came out
        out.print(table(title, COLUMNS[:TEXTS], [row[:TEXTS] for row in rows], texts=TEXTS))
        out.print(table("", *_results(COLUMNS, rows, TEXTS)))
    for line in (*CAPTION, *found["notes"]):
        out.print(one_line(line), markup=False)


def _results(
    columns: Sequence[str], rows: Sequence[Sequence[str]], texts: int
) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Study, rule, and the columns with numbers."""
    return [*columns[:2], *columns[texts:]], [[*row[:2], *row[texts:]] for row in rows]
