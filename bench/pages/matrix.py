"""The page of a matrix: which subsets of the primitives are worth anything, one section for each network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench import matrix_words as words
from bench.looks import look
from bench.pages.matrix_effects import both, effects, interaction
from bench.pages.matrix_points import NEUTRAL, STATUS, Matrix, kind_of
from bench.pages.matrix_subsets import cost, subsets
from bench.pages.parts import Absent, Figure, Page, Part, Section, Table, plot, whiskers

NO_BREAK = "\u00a0"


def matrix_page(summary: Mapping[str, Any]) -> Page:
    """The page of what `bench matrix` found.

    ``summary``: ``study``, ``dataset``, ``space``, ``trials``, ``epochs``, ``complete``, and ``archs``:
    `bench.matrix_summary.summarize_matrix` by network.
    """
    matrices = [Matrix(arch=a, dataset=summary["dataset"], found=found) for a, found in summary["archs"].items()]
    state = "complete" if summary["complete"] else "not complete: what is said holds for what is here"
    return Page(
        title=f"Subsets of the primitives on {summary['dataset']}",
        kind="matrix",
        facts={
            "study": summary["study"],
            "data set": summary["dataset"],
            "networks": ", ".join(summary["archs"]),
            "budget": f"{summary['trials']} trials × {summary['epochs']} epochs a subset",
            "search space": summary["space"],
            "subsets": "; ".join(f"{_measured(m)} on {m.arch}" for m in matrices),
            "state": state,
            "test set": "read once per confirmed run",
        },
        sections=[_section(matrix) for matrix in matrices],
    )


def _measured(matrix: Matrix) -> str:
    subsets = matrix.found["subsets"]
    return f"{subsets['measured']} of {subsets['expected']}"


def _section(matrix: Matrix) -> Section:
    whole: Sequence[Callable[[Matrix], list[Part]]] = (
        subsets,
        _ranking,
        effects,
        _effect_table,
        interaction,
        both,
        _pair_table,
        cost,
        _sides,
        _diverged,
    )
    drawn = whole if matrix.found["table"] else (subsets,)  # nothing is there: one reason is enough
    parts = [part for draw in drawn for part in draw(matrix)]
    return Section(title=matrix.arch, lines=words.verdict_lines(matrix.found), parts=[*parts, *_left_out(matrix)])


def _ranking(matrix: Matrix) -> list[Part]:
    title, found = f"Subsets and controls on {matrix.arch}", matrix.found
    notes = words.table_caption({**found, "left_out": []})  # these have a table of their own
    rows = words.table_rows(found)
    return [Table(title=title, columns=words.TABLE_COLUMNS, rows=rows, notes=[*notes, matrix.where], texts=3)]


def _effect_table(matrix: Matrix) -> list[Part]:
    title, rows = f"Primitives on {matrix.arch}", words.effect_rows(matrix.found)
    return [Table(title=title, columns=words.EFFECT_COLUMNS, rows=rows, notes=words.EFFECT_CAPTION)]


def _pair_table(matrix: Matrix) -> list[Part]:
    rows = [(pair.replace(" ", NO_BREAK), *cells) for pair, *cells in words.interaction_rows(matrix.found)]
    if not rows:
        return []
    title = f"Pairs on {matrix.arch}"
    return [Table(title=title, columns=words.INTERACTION_COLUMNS, rows=rows, notes=words.EFFECT_CAPTION, texts=1)]


def _sides(matrix: Matrix) -> list[Part]:
    columns, rows = ("side", *words.LOCALITY_COLUMNS[1:]), words.locality_rows(matrix.found)
    note = "best: by validation, of as many subsets as there are on its side; ± is the standard deviation over seeds"
    return [Table(title=f"Local and non-local on {matrix.arch}", columns=columns, rows=rows, notes=(note,), texts=1)]


def _left_out(matrix: Matrix) -> list[Part]:
    rows = [(left["rule"], left["reason"]) for left in matrix.found["left_out"]]
    notes = ("they have no accuracy, and count in no mean, effect or comparison",)
    title = f"Left out on {matrix.arch}"
    return [Table(title=title, columns=("rule", "reason"), rows=rows, notes=notes)] if rows else []


# --- what diverges --------------------------------------------------------------------------------------------------


def _diverged(matrix: Matrix) -> list[Part]:
    title = f"Trials that diverged on {matrix.arch}"
    searched = [line for line in matrix.found["table"] if line["lost"]]
    lost = sorted((line for line in searched if line["lost"]["count"]), key=lambda line: -line["lost"]["share"])
    of, failed = (sum(numbers) for numbers in ((line["lost"]["of"] for line in searched), _failed(searched)))
    if not lost:
        reason = f"none: of {of} trials in {len(searched)} searches 0 diverged; {failed} more failed and do not count."
        return [Absent(title=title, reason=f"{reason} {matrix.where}")]
    rest = len(searched) - len(lost)
    note = (
        f"Share of the trials of a search, with its exact 95 % interval. Of {of} trials "
        f"{sum(line['lost']['count'] for line in lost)} diverged; {failed} more failed and do not count. Searches in "
        f"which none diverged, not drawn: {rest}. A sampler that learns proposes less of what diverged: this is of the "
        f"search, not of the space. {matrix.where}"
    )
    rows = [
        [line["name"], kind_of(line), *(line["lost"][name] for name in ("count", "of")), *_ends(line), *_statuses(line)]
        for line in searched
    ]
    columns = ("rule", "kind", "diverged", "of", "share %", "low %", "high %", *(f"trials {s}" for s in STATUS))
    height = 110 + 22 * len(lost)
    return [Figure(title=title, note=note, plot=_bars(lost), columns=columns, rows=rows, height=height)]


def _failed(lines: Sequence[Mapping[str, Any]]) -> list[int]:
    return [line["trials"]["failed"] for line in lines]


def _ends(line: Mapping[str, Any]) -> list[float]:
    return [100 * line["lost"][name] for name in ("share", "low", "high")]


def _statuses(line: Mapping[str, Any]) -> list[int]:
    return [line["trials"][status] for status in STATUS]


def _bars(lost: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    import plotly.graph_objects as go

    bars = go.Bar(
        x=[_ends(line)[0] for line in lost],
        y=list(range(len(lost))),
        orientation="h",
        marker={"color": [look(line["name"]).color for line in lost]},
        error_x={**whiskers([{**line["lost"], "mean": line["lost"]["share"]} for line in lost]), "color": NEUTRAL},
        hovertext=[
            f"<b>{line['name']}</b>: {line['lost']['count']} of {line['lost']['of']} trials diverged<br>"
            f"{share:.1f} % [{low:.1f}, {high:.1f}]<br>"
            + ", ".join(f"{number} {status}" for status, number in line["trials"].items())
            for line in lost
            for share, low, high in [_ends(line)]
        ],
        hoverinfo="text",
    )
    return plot(
        [bars],
        xaxis={"title": {"text": "diverged trials, %"}, "range": [0, 100]},
        yaxis={
            "tickvals": list(range(len(lost))),
            "ticktext": [f"{line['name']}  {line['lost']['count']}/{line['lost']['of']}" for line in lost],
            "range": [len(lost) - 0.5, -0.5],
            "tickfont": {"size": 10},
            "showgrid": False,
            "zeroline": False,
        },
        showlegend=False,
        bargap=0.35,
    )
