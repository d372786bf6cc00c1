"""What the command line prints of a transfer, of a matrix, and of what a search says beside them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from bench import matrix_words, transfer_words
from bench.place import Options
from bench.present import print_link
from bench.terminal import Console, console, duration, table


def print_transfer(outcome: str, summary: Mapping[str, Any], options: Options) -> None:
    """What a transfer found: a matrix for each rule, the table of pairs, the ranking, the link to its runs."""
    out = console(sys.stdout)
    _begin(out, outcome, summary)
    head = f"{summary['dataset']}, searches of {summary['trials']} trials × {summary['epochs']} epochs"
    words = transfer_words
    for rule, space in words.matrices(summary):
        rows, columns = words.matrix_rows(summary, rule, space), words.matrix_columns(summary, rule, space)
        out.print(table(f"portability of {rule}, {space}: {head}", columns, rows, texts=1))
    if summary["pairs"]:
        out.print(*words.MATRIX_CAPTION, markup=False)
        caption = "\n".join(words.PAIRS_CAPTION)
        out.print(table(head, words.PAIR_COLUMNS, words.pair_rows(summary), caption=caption, texts=3))
        caption = "\n".join(words.RANKING_CAPTION)
        out.print(table("by portability", words.RANKING_COLUMNS, words.ranking_rows(summary), caption=caption, texts=3))
    _end(out, summary, options)


def print_matrix(outcome: str, summary: Mapping[str, Any], options: Options) -> None:
    """What a matrix found: for each network the ranking, effects and verdicts; the link to its runs."""
    out = console(sys.stdout)
    _begin(out, outcome, summary)
    words = matrix_words
    for arch, found in summary["archs"].items():
        head = f"{arch}, {summary['dataset']}, {summary['space']}: {found['trials']} trials × {found['epochs']} epochs"
        caption = "\n".join(words.table_caption(found))
        out.print(table(head, words.TABLE_COLUMNS, words.table_rows(found), caption=caption))
        caption = "\n".join(words.EFFECT_CAPTION)
        out.print(table(f"what each does: {arch}", words.EFFECT_COLUMNS, words.effect_rows(found), caption=caption))
        if found["interactions"]:
            rows = words.interaction_rows(found)
            out.print(table(f"what each pair does: {arch}", words.INTERACTION_COLUMNS, rows, texts=1))
        out.print(table(f"local or not: {arch}", words.LOCALITY_COLUMNS, words.locality_rows(found), texts=1))
        for line in words.verdict_lines(found):
            out.print(line, markup=False)
    _end(out, summary, options)


def print_outlook(lines: Sequence[Mapping[str, Any]], concurrent: int) -> None:
    """What a matrix would run: a line for each search, and the time of it all."""
    out = console(sys.stdout)
    rows = [
        (
            line["study"],
            f"{line['known']}/{line['trials']}",
            str(line["runs"]),
            duration(line["seconds"]) if line["runs"] else "–",
        )
        for line in lines
    ]
    caption = "one after the other, at most (what diverges or is stopped ends sooner), without evaluation and controls"
    out.print(
        table("what would run", ("search", "trials known", "runs left", "training"), rows, caption=caption, texts=1)
    )
    runs, seconds = sum(line["runs"] for line in lines), sum(line["seconds"] for line in lines)
    out.print(f"{runs} runs; about {duration(seconds / concurrent)} with {concurrent} at a time", markup=False)


def _begin(out: Console, outcome: str, summary: Mapping[str, Any]) -> None:
    if outcome == "interrupted":
        out.print("interrupted: the same command goes on from here. What is known by now:", markup=False)
    elif not summary["complete"]:
        out.print("what was asked for is done, and not all of the whole is known yet:", markup=False)
    elif outcome == "known":
        out.print(f"{summary['study']} is finished; this is its result.", markup=False)
    for name in summary["busy"]:
        out.print(f"left out, because another process has it: {name}", markup=False)


def _end(out: Console, summary: Mapping[str, Any], options: Options) -> None:
    out.print(f"summary: {summary['folder']}/summary.json", markup=False)
    print_link(out, summary, options)
