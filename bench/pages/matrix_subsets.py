"""Figures of a matrix with a place for every subset: what is in it, how well it does, and what it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from bench.looks import look
from bench.pages.matrix_points import (
    ESTIMATE,
    NEUTRAL,
    STATUS,
    Line,
    Matrix,
    accuracy_range,
    chance_line,
    hover,
    kind_of,
    level,
    percent,
    points,
    seeds,
)
from bench.pages.parts import Absent, Figure, Part, plot
from bench.summary import REFERENCE

# --- subsets: what is in them, and how well they do -----------------------------------------------------------------


def subsets(matrix: Matrix) -> list[Part]:
    title, columns = f"Every subset on {matrix.arch}: what is in it, and how well it does", matrix.columns
    if not columns:
        return [Absent(title=title, reason=matrix.nothing)]
    primitives, left, right = matrix.found["primitives"], -0.7, len(columns) - 0.3
    levels = [trace for line in matrix.lines for trace in level(line, left, right)]
    named = [(i, line["name"]) for i, line in enumerate(columns) if "+" not in line["name"]]
    drawn = plot(
        [*levels, chance_line(matrix, left, right), *points(columns, range(len(columns))), *_dots(matrix, columns)],
        xaxis={
            "anchor": "y2",
            "range": [left, right],
            "tickvals": [place for place, _ in named],
            "ticktext": [name for _, name in named],
            "tickangle": -90,
            "tickfont": {"size": 10},
            "showgrid": False,
            "zeroline": False,
        },
        yaxis={
            "domain": [0.36, 1],
            "range": accuracy_range(matrix, [*columns, *matrix.lines]),
            "title": {"text": "test %"},
        },
        yaxis2={
            "domain": [0, 0.32],
            "range": [len(primitives) - 0.4, -0.6],
            "tickvals": list(range(len(primitives))),
            "ticktext": list(primitives),
            "showgrid": False,
            "zeroline": False,
        },
        legend={"orientation": "h", "x": 0, "y": 1.03, "yanchor": "bottom"},
    )
    note = (
        f"Above: test accuracy, mean and 95 % interval (cut at 0 and 100 %), {_many(columns)}, the best on validation "
        f"at the left; open where a confirmed run diverged. Lines and bands: {matrix.controls}. Below: what is in it. "
        f"{matrix.counts} {matrix.where}"
    )
    return [Figure(title=title, note=note, plot=drawn, height=640, **_subset_data(matrix))]


def _many(lines: Sequence[Line]) -> str:
    return seeds([line["test_acc"] for line in lines])


def _dots(matrix: Matrix, columns: Sequence[Line]) -> list[Any]:
    """A dot for every primitive of every column, filled where it is in; a line joins the filled ones."""
    import plotly.graph_objects as go

    primitives, kinds = matrix.found["primitives"], matrix.found["kinds"]
    cells = [(i, k, p in line["primitives"]) for i, line in enumerate(columns) for k, p in enumerate(primitives)]
    joined: list[tuple[int | None, int | None]] = []
    for i, line in enumerate(columns):
        rows = [k for k, p in enumerate(primitives) if p in line["primitives"]]
        joined += [(i, min(rows)), (i, max(rows)), (None, None)] if rows else []
    lines = go.Scatter(
        x=[x for x, _ in joined],
        y=[y for _, y in joined],
        yaxis="y2",
        mode="lines",
        line={"color": NEUTRAL, "width": 2},
        hoverinfo="skip",
        showlegend=False,
    )
    found = [lines]
    for filled in (False, True):
        at = [(i, k) for i, k, has in cells if has is filled]
        symbols = ["circle" if kinds[primitives[k]] == "local" else "square" for _, k in at]
        dots = go.Scatter(
            x=[i for i, _ in at],
            y=[k for _, k in at],
            yaxis="y2",
            mode="markers",
            marker={"symbol": symbols, "size": 8, "color": [look(primitives[k]).color for _, k in at]}
            if filled
            else {"symbol": symbols, "size": 5, "color": NEUTRAL, "opacity": 0.35},
            hovertext=[hover(columns[i]) for i, _ in at] if filled else None,
            hoverinfo="text" if filled else "skip",
            showlegend=False,
        )
        found.append(dots)
    return found


def _subset_data(matrix: Matrix) -> dict[str, Any]:
    """Every line of the table, those that are drawn as lines too."""
    primitives = matrix.found["primitives"]
    against = ("mean", "low", "high")
    columns = ["place", "rule", "kind", *primitives]
    columns += [f"{split} {name}" for split in ("test", "val") for name in ESTIMATE]
    columns += [*(f"test − {REFERENCE} {name}" for name in against), "verdict", "cost floor"]
    columns += [*(f"trials {status}" for status in STATUS), "runs diverged", "runs failed"]
    rows = []
    for place, line in enumerate(matrix.found["table"], 1):
        versus = line[f"test_acc_versus_{REFERENCE}"]
        row = [place, line["name"], kind_of(line), *(int(p in line["primitives"]) for p in primitives)]
        row += [percent(line[split], name) for split in ("test_acc", "val_acc") for name in ESTIMATE]
        row += [*(percent(versus, name) for name in against), versus and versus["verdict"], line["cost_floor"]]
        rows.append([*row, *(line["trials"][status] for status in STATUS), line["diverged"], line["failed"]])
    return {"columns": columns, "rows": rows}


# --- cost -----------------------------------------------------------------------------------------------------------


def cost(matrix: Matrix) -> list[Part]:
    """The cost floor of a step against accuracy."""
    title, columns = f"Cost floor against accuracy on {matrix.arch}", matrix.columns
    if not columns:
        return [Absent(title=title, reason=matrix.nothing)]
    x = _side_by_side(columns)
    left, right = min(x) - 0.08, max(x) + 0.08
    reference = [line for line in matrix.lines if line["name"] == REFERENCE]
    levels = [trace for line in reference for trace in level(line, left, right)]
    floors = sorted({line["cost_floor"] for line in columns})
    drawn = plot(
        [*levels, chance_line(matrix, left, right), *_cheapest(matrix, x), *points(columns, x)],
        xaxis={
            "range": [left, right],
            "tickvals": floors,
            "ticktext": [f"{floor:.2f}" for floor in floors],
            "title": {"text": f"cost floor of a step, {REFERENCE} = 1"},
            "showgrid": False,
        },
        yaxis={"range": accuracy_range(matrix, [*columns, *reference]), "title": {"text": "test %"}},
        legend={"orientation": "h", "x": 0, "y": 1.03, "yanchor": "bottom"},
    )
    note = (
        f"Mean and 95 % interval (cut at 0 and 100 %), {_many(columns)}. Points of the same cost stand side by side, "
        f"around its tick, the best on validation at the left; open where a confirmed run diverged. "
        f"Ring: {_ring(matrix)}. {matrix.counts} {matrix.where}"
    )
    return [Figure(title=title, note=note, plot=drawn, height=480, **_cost_data(matrix))]


def _side_by_side(lines: Sequence[Line], width: float = 0.3) -> list[float]:
    """The cost floors, those that are equal set apart, in their order and around the true value."""
    many, seen, found = Counter(line["cost_floor"] for line in lines), Counter[float](), []
    for line in lines:
        floor = line["cost_floor"]
        step = min(0.03, width / many[floor])
        found.append(floor + step * (seen[floor] - (many[floor] - 1) / 2))
        seen[floor] += 1
    return found


def _ring(matrix: Matrix) -> str:
    found = matrix.found["cheapest"]
    if found is None:
        return f"none, for no subset learned something and has an interval that allows {REFERENCE}'s accuracy"
    return f"the cheapest subset that is not worse than {REFERENCE}, {found['rule']} ({found['versus']['verdict']})"


def _cheapest(matrix: Matrix, x: Sequence[float]) -> list[Any]:
    import plotly.graph_objects as go

    found = matrix.found["cheapest"]
    places = [i for i, line in enumerate(matrix.columns) if found and line["name"] == found["rule"]]
    return [
        go.Scatter(
            x=[x[i]],
            y=[100 * matrix.columns[i]["test_acc"]["mean"]],
            mode="markers",
            name=f"cheapest not worse: {found['rule']}",
            marker={"symbol": "circle-open", "size": 20, "color": "#000000", "line": {"width": 2}},
            hoverinfo="skip",
        )
        for i in places
        if not matrix.columns[i]["control"]
    ]


def _cost_data(matrix: Matrix) -> dict[str, Any]:
    found = matrix.found["cheapest"]
    rows = [
        [
            line["name"],
            kind_of(line),
            line["cost_floor"],
            *(percent(line["test_acc"], name) for name in ESTIMATE),
            int(not line["control"] and found is not None and line["name"] == found["rule"]),
        ]
        for line in matrix.found["table"]
    ]
    return {"columns": ["rule", "kind", "cost floor", *(f"test {name}" for name in ESTIMATE), "cheapest"], "rows": rows}
