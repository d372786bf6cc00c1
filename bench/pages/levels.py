"""The axis of noise levels: log2, and 0 one step of the grid before the first level, behind a break."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from bench.looks import GREY

#: Characters of an axis title in one line, and labelled levels on an axis, at most: what a phone has room for.
TITLE_WIDTH, LABELS = 42, 9


def place(level: float, levels: Sequence[float]) -> float:
    """Where a level of the site, or 0, stands on the axis, as in `bench.figures`."""
    if level > 0:
        return math.log2(level)
    return math.log2(levels[0]) - _step(levels)


def axis(site: Mapping[str, Any], *, beside: float = 0.0) -> dict[str, Any]:
    """Plotly's axis: a tick at every level, labels where there is room for them, the last one always.

    ``beside``: how far marks stand beside their level.
    """
    levels, title = site["levels"], f"{site['symbol']} ({site['unit']}), log scale"
    places = [place(level, levels) for level in (0.0, *levels)]
    room = (places[-1] - places[0]) / LABELS
    margin = beside + 0.5 * room
    return {
        "title": {"text": "<br>".join(textwrap.wrap(title, TITLE_WIDTH))},
        "tickvals": places,
        "ticktext": ["0", *_labels(levels, places, 0.999 * room)],
        "ticks": "outside",
        "range": [places[0] - margin, places[-1] + margin],
        "zeroline": False,
        "showgrid": False,
        "showline": True,
    }


def strokes(levels: Sequence[float]) -> list[dict[str, Any]]:
    """Plotly's shapes: two strokes through the axis at the break; what lies there is not to scale."""
    slant = (place(levels[-1], levels) - place(0.0, levels)) / 150
    stroke = {"type": "line", "yref": "paper", "y0": -0.025, "y1": 0.025, "line": {"color": GREY, "width": 1.5}}
    centres = (middle(levels) + side * slant for side in (-1, 1))
    return [{**stroke, "x0": centre - slant, "x1": centre + slant} for centre in centres]


def middle(levels: Sequence[float]) -> float:
    """The place of the break."""
    return (place(0.0, levels) + place(levels[0], levels)) / 2


def _step(levels: Sequence[float]) -> float:
    return math.log2(levels[-1] / levels[0]) / (len(levels) - 1) if len(levels) > 1 else 1.0


def _labels(levels: Sequence[float], places: Sequence[float], room: float) -> list[str]:
    """From the last level backwards; those too near to the label before them, or to that of 0, have none."""
    texts, after = [""] * len(levels), math.inf
    for i in reversed(range(len(levels))):
        if after - places[i + 1] >= room and places[i + 1] - places[0] >= room:
            texts[i], after = f"{levels[i]:.3g}", places[i + 1]
    return texts
