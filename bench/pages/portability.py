"""The heat maps of a transfer: for every rule and space, what a move from each network to each other costs."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.cells import NOTHING
from bench.pages.parts import DIVERGING, SHARES, Figure, Part, Section, Table, plot
from bench.pages.transfer_notes import ENDS, TEST, ends, losses, note, pairs_of, said, seeds
from bench.transfer_summary import portability
from bench.transfer_words import MATRIX_CAPTION, matrices, matrix_columns, matrix_rows

#: The cells that have no regret: light on either page, since their text is dark.
_PLAIN = "#cccccc"


def portability_section(summary: Mapping[str, Any]) -> Section:
    """A heat map and its table for every rule and space, all on one scale of colours."""
    found = [pair["regret"]["test_acc"] for pair in summary["pairs"]]
    span = max((abs(100 * regret["mean"]) for regret in found if regret), default=0.0) or 1.0
    parts: list[Part] = []
    for rule, space in matrices(summary):
        parts.append(_heat_map(summary, rule, space, span))
        parts.append(
            Table(
                title=f"{rule}, {space}, in numbers",
                columns=matrix_columns(summary, rule, space),
                rows=matrix_rows(summary, rule, space),
                notes=MATRIX_CAPTION,
                texts=1,
            )
        )
    return Section(title="Portability", lines=["All heat maps have the same range of colours."], parts=parts)


def _heat_map(summary: Mapping[str, Any], rule: str, space: str, span: float) -> Figure:
    """Regrets in colours from −span to span, and what has no regret in grey."""
    found, pairs = portability(summary, rule, space), pairs_of(summary, rule, space)
    archs = found["archs"]
    estimates = [*found["native"].values(), *(pair["regret"]["test_acc"] for pair in pairs)]
    bar = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "thickness": 10}
    bar["title"] = {"text": "regret, points", "side": "top"}
    plain = {"colorscale": [[0, _PLAIN], [1, _PLAIN]], "zmin": -1, "zmax": 1, "showscale": False}
    shaded = {"colorscale": DIVERGING, "zmin": -span, "zmid": 0, "zmax": span, "colorbar": bar}
    return Figure(
        title=f"Portability of {rule}, {space}",
        note=f"{note(summary)}; {seeds(estimates)}; {TEST}; {losses(pairs)}. Diagonal: test accuracy of the network's "
        "own best; elsewhere: regret, points; empty: not part of this transfer.",
        plot=plot(
            [_cells(found, pairs, plain, grey=True), _cells(found, pairs, shaded, grey=False)],
            xaxis=_archs_axis("used on", archs),
            yaxis=_archs_axis("found on", archs) | {"autorange": "reversed"},
        ),
        unit=SHARES,
        columns=("from", "to", "what", *ENDS, "same"),
        rows=[_matrix_row(found, source, target) for source in archs for target in archs],
        height=180 + 75 * len(archs),
    )


def _cells(found: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]], scale: Mapping[str, Any], grey: bool) -> Any:
    """The grey cells, or the others: Plotly writes a cell's text where it has no colour too, so each has its own."""
    import plotly.graph_objects as go

    archs = found["archs"]
    mine = [[grey is _is_plain(found, source, target) for target in archs] for source in archs]

    def table(value: Callable[[str, str], Any], nothing: Any) -> list[list[Any]]:
        return [
            [value(source, target) if own else nothing for target, own in zip(archs, row, strict=True)]
            for source, row in zip(archs, mine, strict=True)
        ]

    return go.Heatmap(
        **scale,
        x=archs,
        y=archs,
        z=table(lambda source, target: 0.0 if grey else _shade(found, source, target), None),
        text=table(lambda source, target: _cell(found, source, target), ""),
        customdata=table(lambda source, target: _hover(found, pairs, source, target), ""),
        texttemplate="%{text}",
        hovertemplate="%{customdata}<extra></extra>",
        xgap=3,
        ygap=3,
    )


def _archs_axis(title: str, archs: Sequence[str]) -> dict[str, Any]:
    """Long names stand in several lines: a phone has no room for them."""
    lines = [textwrap.wrap(arch.replace("_", "_ "), 14) for arch in archs]
    names = ["<br>".join(line.replace("_ ", "_") for line in each) for each in lines]
    ticks = {"tickvals": archs, "ticktext": names}
    return {"title": {"text": title, "standoff": 24}, "type": "category", "showgrid": False, **ticks}


def _regret(found: Mapping[str, Any], source: str, target: str) -> Any:
    return found["regret"][source].get(target)


def _shade(found: Mapping[str, Any], source: str, target: str) -> float | None:
    value = None if source == target else _regret(found, source, target)
    return value and 100 * value["mean"]


def _is_plain(found: Mapping[str, Any], source: str, target: str) -> bool:
    """Whether this is the diagonal, or a pair without a regret. Pairs that were not wanted stay empty."""
    return source == target or (target in found["regret"][source] and _regret(found, source, target) is None)


def _cell(found: Mapping[str, Any], source: str, target: str) -> str:
    """What stands in a cell, in few characters: a phone has room for no more."""
    if source == target:
        own = found["native"][source]
        return NOTHING if own is None else f"{100 * own['mean']:.1f} %{_span(own, '.1f')}"
    value = _regret(found, source, target)
    if value is None:
        return "none" if target in found["regret"][source] else ""
    if (source, target) in found["same"]:
        return "0<br>same choice"
    return f"{100 * value['mean']:+.1f}{_span(value, '+.1f')}"


def _span(value: Mapping[str, Any], digits: str) -> str:
    return "" if value["low"] is None else f"<br>[{100 * value['low']:{digits}}, {100 * value['high']:{digits}}]"


def _hover(found: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]], source: str, target: str) -> str:
    if source == target:
        own = found["native"][source]
        text = f"test {_cell(found, source, source)}" if own else "not confirmed"
        return f"<b>{source}</b>, its own best<br>{text}"
    pair = next((p for p in pairs if (p["source"], p["target"]) == (source, target)), None)
    text = "not part of this transfer" if pair is None else said(pair)
    return f"<b>{source} → {target}</b><br>{text}"


def _matrix_row(found: Mapping[str, Any], source: str, target: str) -> tuple[Any, ...]:
    if source == target:
        return (source, target, "own best, test accuracy", *ends(found["native"][source]), None)
    same = (source, target) in found["same"]
    return (source, target, "regret on test", *ends(_regret(found, source, target)), same)
