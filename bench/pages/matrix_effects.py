"""Figures of what primitives and pairs of them do, on one network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.cells import difference, interval
from bench.looks import look
from bench.pages.matrix_points import ESTIMATE, NEUTRAL, Matrix, percent, seeds
from bench.pages.parts import DIVERGING, POINTS, Absent, Figure, Part, plot, whiskers

# --- primitives -----------------------------------------------------------------------------------------------------

EFFECT_DATA = (*ESTIMATE, "verdict", "contexts", "contexts expected", "smallest", "on", "largest", "on")


def _numbers(found: Mapping[str, Any], value: Mapping[str, Any] | None) -> list[Any]:
    """`EFFECT_DATA` of an effect, in percentage points."""
    if value is None:
        return [*[None] * len(ESTIMATE), None, 0, found["contexts_expected"], *[None] * 4]
    ends = [cell for end in ("smallest", "largest") for cell in (100 * value[end]["value"], value[end]["context"])]
    numbers = [percent(value, name) for name in ESTIMATE]
    return [*numbers, value["verdict"], value["contexts"], found["contexts_expected"], *ends]


def _said(name: str, found: Mapping[str, Any], value: Mapping[str, Any]) -> str:
    """An effect, in full."""
    ends = (f"{end} {100 * value[end]['value']:+.2f} on {value[end]['context']}" for end in ("smallest", "largest"))
    return "<br>".join(
        [
            f"<b>{name}</b>: {difference(value)}",
            f"percentage points on test, [95 %]; {value['contexts']} of {found['contexts_expected']} contexts",
            *ends,
        ]
    )


def effects(matrix: Matrix) -> list[Part]:
    title = f"What each primitive adds on {matrix.arch}"
    effects = matrix.found["effects"]
    known = [e for e in effects if e["test_acc"]]
    if not known:
        reason = f"no subset is measured both with a primitive and without it. {matrix.where}"
        return [Absent(title=title, reason=reason)]
    drawn = plot(
        [_reach(known), _means(known)],
        xaxis={"title": {"text": "with it − without it, percentage points"}, "range": _span(known), "zerolinewidth": 2},
        yaxis={
            "tickvals": list(range(len(known))),
            "ticktext": [f"{e['primitive']}<br>{_contexts(e)}" for e in known],
            "range": [len(known) - 0.5, -0.5],
            "showgrid": False,
            "zeroline": False,
        },
        showlegend=False,
    )
    unknown = ", ".join(e["primitive"] for e in effects if not e["test_acc"])
    note = (
        f"Mean over the contexts (subsets that it is added to; the empty one is feedback), then 95 % interval over "
        f"{seeds([e['test_acc'] for e in known])}. Grey: from the smallest to the largest of its contexts. "
        f"{f'No context has both sides for {unknown}. ' if unknown else ''}{matrix.counts} {matrix.where}"
    )
    rows = [[e["primitive"], e["kind"], *_numbers(e, e["test_acc"])] for e in effects]
    height = 120 + 52 * len(known)
    columns = ("primitive", "kind", *EFFECT_DATA)
    return [Figure(title=title, note=note, plot=drawn, columns=columns, rows=rows, unit=POINTS, height=height)]


def _contexts(found: Mapping[str, Any]) -> str:
    number, expected = found["test_acc"]["contexts"], found["contexts_expected"]
    return f"{number} contexts" if number == expected else f"{number} of {expected}"


def _means(known: Sequence[Mapping[str, Any]]) -> Any:
    import plotly.graph_objects as go

    values = [e["test_acc"] for e in known]
    looks = [look(e["primitive"]) for e in known]
    return go.Scatter(
        x=[100 * value["mean"] for value in values],
        y=list(range(len(known))),
        mode="markers",
        error_x={**whiskers(values), "color": NEUTRAL, "thickness": 2},
        marker={"color": [one.color for one in looks], "symbol": [one.symbol for one in looks], "size": 12},
        hovertext=[_said(e["primitive"], e, e["test_acc"]) for e in known],
        hoverinfo="text",
    )


def _span(known: Sequence[Mapping[str, Any]]) -> list[float]:
    """Of the axis: 0, all intervals and all contexts."""
    values = [0.0]
    for value in (e["test_acc"] for e in known):
        values += [value["smallest"]["value"], value["largest"]["value"]]
        values += [end for end in (value["low"], value["high"]) if end is not None]
    low, high = 100 * min(values), 100 * max(values)
    margin = 0.04 * (high - low) or 1.0
    return [low - margin, high + margin]


def _reach(known: Sequence[Mapping[str, Any]]) -> Any:
    """From the smallest to the largest context, a faint line each."""
    import plotly.graph_objects as go

    x: list[float | None] = []
    y: list[int | None] = []
    for place, e in enumerate(known):
        x += [100 * e["test_acc"]["smallest"]["value"], 100 * e["test_acc"]["largest"]["value"], None]
        y += [place, place, None]
    return go.Scatter(x=x, y=y, mode="lines", line={"color": NEUTRAL, "width": 9}, opacity=0.3, hoverinfo="skip")


# --- pairs ----------------------------------------------------------------------------------------------------------


def interaction(matrix: Matrix) -> list[Part]:
    title = f"Interaction of each pair on {matrix.arch}"
    meaning = "What adding both does beyond the sum of adding each"
    return _pairs(matrix, "interaction", title, meaning)


def both(matrix: Matrix) -> list[Part]:
    if not matrix.found["interactions"]:  # `interaction` says so
        return []
    title = f"What adding both of a pair does on {matrix.arch}"
    return _pairs(matrix, "both", title, "Accuracy with both − with neither")


def _pairs(matrix: Matrix, name: str, title: str, meaning: str) -> list[Part]:
    """A heat map; a pair stands once, below the diagonal."""
    pairs = matrix.found["interactions"]
    known = {tuple(pair["primitives"]): pair for pair in pairs if pair[name]["test_acc"]}
    if not known:
        some = f"no context is measured on all sides, for any of {len(pairs)} pairs"
        reason = some if pairs else "one primitive is no pair"
        return [Absent(title=title, reason=f"{reason}. {matrix.where}")]
    note = (
        f"{meaning}: percentage points of test accuracy, mean over the contexts (subsets without either), [95 %] over "
        f"{seeds([pair[name]['test_acc'] for pair in known.values()])}; bold where the interval leaves 0 out. "
        f"{len(known)} of {len(pairs)} pairs have contexts. {matrix.counts} {matrix.where}"
    )
    rows = [[" + ".join(pair["primitives"]), *_numbers(pair, pair[name]["test_acc"])] for pair in pairs]
    primitives = matrix.found["primitives"]
    drawn = _heat_map(primitives, {pair: (found, found[name]["test_acc"]) for pair, found in known.items()})
    height = 150 + 66 * (len(primitives) - 1)
    return [
        Figure(
            title=title, note=note, plot=drawn, columns=("pair", *EFFECT_DATA), rows=rows, unit=POINTS, height=height
        )
    ]


def _heat_map(primitives: Sequence[str], known: Mapping[tuple[Any, ...], tuple[Any, Any]]) -> dict[str, Any]:
    import plotly.graph_objects as go

    across, down = primitives[:-1], primitives[1:]
    cells = [[known.get((p, q)) for p in across] for q in down]
    most = max(abs(100 * value["mean"]) for _, value in known.values()) or 1.0
    heat = go.Heatmap(
        x=list(across),
        y=list(down),
        z=[[100 * cell[1]["mean"] if cell else None for cell in line] for line in cells],
        zmin=-most,
        zmax=most,
        colorscale=DIVERGING,
        text=[[_cell(cell[1]) if cell else "" for cell in line] for line in cells],
        texttemplate="%{text}",
        hovertext=[[_said(" + ".join(c[0]["primitives"]), *c) if c else "" for c in line] for line in cells],
        hoverinfo="text",
        hoverongaps=False,
        xgap=3,
        ygap=3,
        colorbar={
            "orientation": "h",
            "y": 0,
            "yanchor": "top",
            "ypad": 34,  # below the names of the columns
            "thickness": 10,
            "title": {"text": "percentage points", "side": "bottom"},
        },
    )
    axis = {"showgrid": False, "zeroline": False, "ticks": ""}
    return plot([heat], xaxis=axis, yaxis={**axis, "autorange": "reversed"})


def _cell(value: Mapping[str, Any]) -> str:
    mean, _, ends = interval(value, digits=1).partition(" ")
    shown = mean if value["verdict"] == "not distinguishable" else f"<b>{mean}</b>"
    return f"{shown}<br>{ends.replace(', ', ',<br>')}" if ends else shown  # three lines: a phone's cells are narrow
