"""What a page is made of: figures with their numbers, tables, and sentences. All of it is data; `render` writes it.

Every figure carries what it was drawn from (``columns``, ``rows``: the CSV that a reader may take away) and a ``note``
that says n, spread, data set, budget, and how the test set was used. What cannot be drawn is an `Absent`, with the
reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from bench.looks import look

#: The ends of the colour scale for quantities with a zero in the middle, and the scale for those without: both are
#: read by the colour-blind (Crameri et al. 2020, doi 10.1038/s41467-020-19160-7; Nunez et al. 2018).
DIVERGING, SEQUENTIAL = "PuOr", "Cividis"

#: Units of the numbers behind a figure, whatever its axes are in.
SHARES, POINTS = "share of 1", "percentage points"

#: Digits that a plotted number keeps: more cannot be seen, and makes the page larger. CSV has all of them.
PLOTTED_DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class Link:
    """A cell of a table that leads to another page."""

    text: str
    href: str


Cell: TypeAlias = str | Link


@dataclass(frozen=True, kw_only=True)
class Figure:
    """``plot``: Plotly's JSON, ``data`` and ``layout``. ``rows``: what it shows, in full precision, for the CSV.

    ``unit``: of the accuracies among them, where their columns do not say it; the CSV has it as a column.
    ``height``: in CSS pixels.
    """

    title: str
    note: str
    plot: Mapping[str, Any]
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    unit: str = ""
    height: int = 420


@dataclass(frozen=True, kw_only=True)
class Table:
    """``texts``: so many columns, from the first, hold words; the others hold numbers, and are set right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()
    texts: int = 2


@dataclass(frozen=True, kw_only=True)
class Absent:
    """What would stand here, and why it does not."""

    title: str
    reason: str


Part: TypeAlias = Figure | Table | Absent


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, sentences, and parts."""

    title: str
    lines: Sequence[str] = ()
    parts: Sequence[Part] = ()


@dataclass(frozen=True, kw_only=True)
class Page:
    """``facts``: what stands at the top, by name: data set, budget, counts. ``lines``: what it comes to."""

    title: str
    kind: str
    facts: Mapping[str, str]
    sections: Sequence[Section]
    lines: Sequence[str] = field(default_factory=tuple)


# --- plots: Plotly's JSON from plain lists; colours and fonts of the frame are the page's --------------------------


def plot(traces: Iterable[Any], **layout: Any) -> dict[str, Any]:
    """Traces of `plotly.graph_objects` (which checks them) and a layout, as plain data with rounded numbers."""
    import plotly.graph_objects as go

    figure = go.Figure(data=list(traces), layout=layout).to_plotly_json()
    figure["layout"].pop("template", None)  # the page has its own, for light and for dark
    data: dict[str, Any] = slim(figure)
    return data


def slim(value: Any) -> Any:
    """Plain lists and rounded numbers of what Plotly made; a number that is none becomes None."""
    if isinstance(value, Mapping):
        return {str(key): slim(inner) for key, inner in value.items()}
    if isinstance(value, str) or value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return _rounded(value)
    if hasattr(value, "tolist"):  # of numpy
        return slim(value.tolist())
    if isinstance(value, Iterable):
        return [slim(inner) for inner in value]
    raise TypeError(f"{value!r} is nothing that a page can hold")


def _rounded(value: float) -> float | None:
    return float(f"{value:.{PLOTTED_DIGITS}g}") if math.isfinite(value) else None


def rule_style(rule: str, *, size: int = 8) -> dict[str, Any]:
    """Keywords of a `plotly.graph_objects.Scatter`: this rule's colour, marker and dashes."""
    style = look(rule)
    return {
        "name": rule,
        "legendgroup": rule,
        "line": {"color": style.color, "dash": style.line, "width": 2},
        "marker": {"color": style.color, "symbol": style.symbol, "size": size, "line": {"color": style.color}},
    }


def band(x: Sequence[float], low: Sequence[float], high: Sequence[float], rule: str) -> Any:
    """The area between two curves, in the rule's colour; it belongs to the rule's entry in the legend."""
    import plotly.graph_objects as go

    red, green, blue = (int(look(rule).color[i : i + 2], 16) for i in (1, 3, 5))
    return go.Scatter(
        x=[*x, *reversed(x)],
        y=[*high, *reversed(low)],
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},0.18)",
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        legendgroup=rule,
        showlegend=False,
    )


def whiskers(estimates: Sequence[Mapping[str, Any]], scale: float = 100) -> dict[str, Any]:
    """Plotly's error bars: the 95 % intervals of estimates; none where there is none (n = 1)."""
    up = [None if e["high"] is None else scale * (e["high"] - e["mean"]) for e in estimates]
    down = [None if e["low"] is None else scale * (e["mean"] - e["low"]) for e in estimates]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1.2, "width": 4}
