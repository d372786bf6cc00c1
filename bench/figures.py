"""Figures: accuracy against noise, and the paired differences under it. The one place that imports matplotlib.

They are drawn through matplotlib's objects, without pyplot and its global state, from its own defaults whatever the
user's are; the same summary gives the same bytes.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.config import UserError
from bench.files import write_atomic
from bench.looks import BLACK, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Text that stands at the left edge of the axes, at a height in data, with an offset in points.
_AT_LEFT: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "bench",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
}


def robustness_figure(site: Mapping[str, Any], *, title: str, note: str, unit: str, path: Path) -> None:
    """Draw one site of `bench.robustness_summary.summarize`; ``.svg`` or ``.png``, by the suffix of ``path``.

    Above: accuracy (%), mean and 95 % interval over seeds, against the level on a log axis; the network without noise
    stands before the break. An open marker is a level at which a run diverged. A triangle on the axis is the level that
    halves the accuracy above the floor, where all seeds have one. A rule without noise at the site has its clean mark
    alone. Below, if there is anything to compare: the differences
    to the reference, paired by seed, with their intervals.

    ``unit`` is that of the level; ``note`` says what was measured (n, data, budget). UserError for another suffix,
    without levels, and where the file cannot be written.
    """
    if path.suffix not in (".svg", ".png"):
        raise UserError(f"cannot draw {path}: figures are .svg or .png; rename it.")
    if not site["levels"]:
        raise UserError(f"cannot draw {path}: {site['site']} was measured at no level; run it first.")
    with _matplotlib():
        from matplotlib.figure import Figure

        compared = [found for found in site["rules"] if any(at["versus"] for at in found["curve"])]
        heights = [3.2, 2.2] if compared else [3.2]
        figure = Figure(figsize=(6.8, sum(heights) + 0.8), layout="constrained")
        axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        _accuracies(axes[0], site)
        axes[0].set_title(title)
        if compared:
            _differences(axes[1], site, compared)
        for each in axes:
            _dress(each, site["levels"])
        axes[-1].set_xlabel(f"{site['symbol']} ({unit}), log scale" if unit else f"{site['symbol']}, log scale")
        figure.legend(handles=_legend(axes[0], site), loc="outside right upper", fontsize=8)
        figure.supxlabel(textwrap.fill(note, 125), x=0.01, ha="left", fontsize=7.5, color="#444444")
        _save(figure, path)


@contextmanager
def _matplotlib() -> Iterator[None]:
    """Matplotlib's own defaults and `_STYLE`, for as long as one figure takes."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def _save(figure: Figure, path: Path) -> None:
    """Without date and version, so that the same numbers are the same file."""
    buffer = io.BytesIO()
    if path.suffix == ".svg":
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        write_atomic(path, buffer.getvalue().decode())
        return
    figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}. Choose another folder.") from error


# --- the axis of levels: log2, and 0 one step of the grid before the first level -------------------------


def _step(levels: Sequence[float]) -> float:
    return math.log2(levels[-1] / levels[0]) / (len(levels) - 1) if len(levels) > 1 else 1.0


def _place(level: float, levels: Sequence[float]) -> float:
    """Where a level stands; linear between 0 and the first one, as in `bench.curves.half_level`."""
    if level >= levels[0]:
        return math.log2(level)
    return math.log2(levels[0]) - _step(levels) * (1 - level / levels[0])


def _dress(axes: Axes, levels: Sequence[float]) -> None:
    """Ticks at the measured levels, labels where there is room for them, a grid, and a break behind the 0."""
    places = [_place(level, levels) for level in (0.0, *levels)]
    room, labelled, last = (places[-1] - places[0]) / 12, {"0": places[0]}, places[0]
    for level, place in zip(levels, places[1:], strict=True):
        if place - last >= room:
            labelled[f"{level:g}"] = last = place
    axes.set_xticks(list(labelled.values()), list(labelled))
    axes.set_xticks(places, minor=True)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    middle, slant = (places[0] + places[1]) / 2, (places[-1] - places[0]) / 120
    for x in (middle - slant, middle + slant):
        axes.plot(
            [x - slant, x + slant],
            [-0.025, 0.025],
            color="black",
            linewidth=0.9,
            clip_on=False,
            transform=axes.get_xaxis_transform(),
        )


# --- the panels ------------------------------------------------------------------------------------------


def _accuracies(axes: Axes, site: Mapping[str, Any]) -> None:
    levels = site["levels"]
    zero = _place(0.0, levels)
    axes.axhline(100 * site["chance"], color="#444444", linewidth=1, linestyle=":", gid="chance")
    axes.annotate("chance", (0, 100 * site["chance"]), (3, 2), fontsize=7.5, **_AT_LEFT)
    for found in site["rules"]:
        rule, style = found["rule"], look(found["rule"])
        if found["unaffected"]:
            if found["clean"]:
                _clean(axes, zero, found, None)
            continue
        at = [level for level in found["curve"] if level["acc"]]
        places, means, low, high = _percent((_place(each["level"], levels), each["acc"]) for each in at)
        axes.fill_between(places, low, high, color=style.color, alpha=0.16, linewidth=0, gid=f"band {rule}")
        marks: dict[str, Any] = {"color": style.color, "marker": style.marker}
        axes.plot(places, means, **marks, linestyle=style.dash, label=rule, gid=f"mean {rule}")
        if open_ := [(x, y) for x, y, each in zip(places, means, at, strict=True) if each["diverged"]]:
            xs, ys = zip(*open_, strict=True)
            axes.plot(xs, ys, **marks, linestyle="none", markerfacecolor="white", gid=f"diverged {rule}")
        if found["clean"]:
            _clean(axes, zero, found, (places[:1], means[:1]))
        half = found["half_level"] and found["half_level"]["mean"]
        if half:
            axes.plot(
                [_place(half, levels)],
                [0.0],
                color=style.color,
                marker="^",
                markersize=7,
                clip_on=False,
                transform=axes.get_xaxis_transform(),
                gid=f"half {rule}",
            )
    axes.set_ylim(0, 103)
    axes.set_ylabel("accuracy, %")


def _legend(axes: Axes, site: Mapping[str, Any]) -> list[Any]:
    """The rules, then the marks that this figure has."""
    from matplotlib.lines import Line2D

    handles, _ = axes.get_legend_handles_labels()
    marks: dict[str, Any] = {"color": "#666666", "linestyle": "none"}
    if any(found["half_level"] and found["half_level"]["mean"] for found in site["rules"]):
        handles.append(Line2D([], [], marker="^", markersize=7, label=f"{site['symbol']}½", **marks))
    if any(level["diverged"] for found in site["rules"] for level in found["curve"]):
        handles.append(Line2D([], [], marker="o", markerfacecolor="white", label="a run diverged", **marks))
    return handles


def _clean(axes: Axes, zero: float, found: Mapping[str, Any], first: tuple[list[float], list[float]] | None) -> None:
    """Accuracy without noise, and a thin line over the break to the first level; None where noise does not get to."""
    style = look(found["rule"])
    _, [mean], [low], [high] = _percent([(zero, found["clean"])])
    if first:
        axes.plot([zero, *first[0]], [mean, *first[1]], color=style.color, linewidth=0.8, linestyle=":")
    drawn = axes.errorbar(
        [zero], [mean], [[mean - low], [high - mean]], color=style.color, marker=style.marker, linewidth=1
    )
    drawn[0].set_gid(f"clean {found['rule']}")
    if first is None:  # no curve stands for it in the legend
        drawn[0].set_label(f"{found['rule']}, no noise")


def _differences(axes: Axes, site: Mapping[str, Any], compared: Sequence[Mapping[str, Any]]) -> None:
    """One mark and interval per rule and level, side by side."""
    levels = site["levels"]
    places = [_place(level, levels) for level in (0.0, *levels)]
    gap = 0.6 * min(b - a for a, b in pairwise(places)) / len(compared)
    axes.axhline(0, color=BLACK, linewidth=0.9, gid="zero")
    for i, found in enumerate(compared):
        rule, style = found["rule"], look(found["rule"])
        versus = [found["clean_versus"], *(each["versus"] for each in found["curve"])]
        at = [(x + (i - (len(compared) - 1) / 2) * gap, v) for x, v in zip(places, versus, strict=True) if v]
        xs, means, low, high = _percent(at)
        down, up = ([b - a for a, b in zip(*pair, strict=True)] for pair in ((low, means), (means, high)))
        drawn = axes.errorbar(
            xs, means, [down, up], color=style.color, marker=style.marker, markersize=4, linestyle="none", linewidth=1.1
        )
        drawn[0].set_gid(f"difference {rule}")
        drawn[2][0].set_gid(f"interval {rule}")
    axes.set_ylabel(f"rule − {site['reference']}, points")


def _percent(
    points: Iterable[tuple[float, Mapping[str, Any]]],
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Places, means and both ends of the intervals, × 100. An unknown interval (n = 1) has no width."""
    points = list(points)
    means = [100 * e["mean"] for _, e in points]
    ends = [
        [m if e[side] is None else 100 * e[side] for m, (_, e) in zip(means, points, strict=True)]
        for side in ("low", "high")
    ]
    return [x for x, _ in points], means, ends[0], ends[1]
