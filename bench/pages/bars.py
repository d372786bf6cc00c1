"""Bars with intervals, a group for every rule and space, one below the other: what a phone and a printer can show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.looks import BLACK, GREY, look
from bench.pages.parts import SHARES, Figure, plot, whiskers

#: Rows of a figure, in CSS pixels, and the characters of a label that stands in one line.
ROW, LABEL = 34, 22

#: Labels at a distance from the axis.
_BESIDE = {"showgrid": False, "zeroline": False, "ticks": "outside", "ticklen": 6, "tickcolor": "rgba(0,0,0,0)"}

Group = tuple[str, str, Sequence["Bar"]]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """``label``: from and to. ``estimate``: mean, low and high, as shares; or None, with ``mark`` in its place.

    ``said``: for who hovers over it. ``faded``: a run of it diverged.
    """

    label: tuple[str, str]
    estimate: Mapping[str, Any] | None
    said: str
    mark: str = ""
    faded: bool = False


def bars(
    groups: Sequence[Group],
    *,
    title: str,
    axis: str,
    note: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    span: tuple[float, float] | None = None,
) -> Figure:
    """A figure of (rule, space, bars): each rule in its colour, its groups told apart by their headings.

    ``axis``: its title. ``span``: its ends, where these are known.
    """
    labels = [label for group in groups for label in _labels(group)]
    starts = [sum(len(bars) + 1 for *_, bars in groups[:i]) for i in range(len(groups))]
    traces = [trace for group, start in zip(groups, starts, strict=True) for trace in _traces(group, start + 1)]
    zero = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": 0, "x1": 0, "line": {"color": BLACK, "width": 1}}
    places = list(range(len(labels)))
    across: dict[str, Any] = {"title": {"text": axis}, "zeroline": False, "side": "top", "range": span}
    return Figure(
        title=title,
        note=note,
        plot=plot(
            traces,
            xaxis={name: value for name, value in across.items() if value is not None},
            yaxis={"tickvals": places, "ticktext": labels, "range": [len(labels) - 0.4, -0.6], **_BESIDE},
            shapes=[zero],
            showlegend=False,
            bargap=0.35,
        ),
        unit=SHARES,
        columns=columns,
        rows=rows,
        height=90 + ROW * len(labels),
    )


def _labels(group: Group) -> list[str]:
    rule, space, found = group
    return [f"<b>{rule}, {space}</b>", *(_label(*bar.label) for bar in found)]


def _label(source: str, target: str) -> str:
    gap = " " if len(source) + len(target) + 3 <= LABEL else "<br>"
    return f"{source} →{gap}{target}"


def _traces(group: Group, start: int) -> Iterator[Any]:
    import plotly.graph_objects as go

    rule, space, found = group
    style, places = look(rule), {start + i: bar for i, bar in enumerate(found)}
    drawn = {place: bar.estimate for place, bar in places.items() if bar.estimate}
    known = any(estimate["low"] is not None for estimate in drawn.values())
    yield go.Bar(
        name=f"{rule}, {space}",
        orientation="h",
        y=list(drawn),
        x=[100 * estimate["mean"] for estimate in drawn.values()],
        marker={"color": style.color, "opacity": [0.4 if places[place].faded else 0.85 for place in drawn]},
        error_x=whiskers(list(drawn.values())) | {"color": BLACK, "visible": known},
        text=[_hover(rule, space, places[place]) for place in drawn],
        textposition="none",
        hovertemplate="%{text}<extra></extra>",
    )
    marks = {place: bar for place, bar in places.items() if not bar.estimate}
    yield go.Scatter(
        y=list(marks),
        x=[0.0] * len(marks),
        mode="markers+text",
        marker={"color": style.color, "symbol": "line-ns-open", "size": 10, "line": {"width": 2}},
        text=[f" {bar.mark}" for bar in marks.values()],
        textposition="middle right",
        textfont={"color": GREY},
        customdata=[_hover(rule, space, bar) for bar in marks.values()],
        hovertemplate="%{customdata}<extra></extra>",
    )


def _hover(rule: str, space: str, bar: Bar) -> str:
    source, target = bar.label
    return f"<b>{rule}, {space}</b><br>{source} → {target}<br>{bar.said}"
