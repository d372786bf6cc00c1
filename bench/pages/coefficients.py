"""What the trials of a search came to, over their coefficients: parallel coordinates, slices, contours, importance.

Surfaces and importance are Optuna's, from a study made of the rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from bench.looks import GREY
from bench.pages.parts import SEQUENTIAL, Absent, Figure, Part, plot, slim
from bench.pages.trials import (
    MARKS,
    METRICS,
    Search,
    Trial,
    counts,
    drawn_note,
    edge_axis,
    marks,
    shown_of,
    thinned,
    trials_note,
)

if TYPE_CHECKING:
    from optuna import Study

#: Optuna's surface is a matrix of every x by every y, and the browser fills it: so many trials take it a second.
SURFACE_TRIALS = 100

#: Fewer finished trials have no best tenth to speak of, which is what PED-ANOVA compares with the rest.
IMPORTANCE_TRIALS = 10
#: And more, evenly by rank, would change nothing that can be seen, and take Optuna seconds.
IMPORTANCE_MOST = 500

#: Marks of one in the other are seen on any surface, in light and in dark (where `#000000` would be turned white).
_DARK, _LIGHT = "#111111", "#ffffff"


def coefficient_parts(search: Search, metric: str) -> list[Part]:
    """All figures over the coefficients, for one of the metrics that were maximised."""
    name = f"Parallel coordinates: {METRICS[metric]}"
    if not search.trials:
        return [Absent(title=name, reason="the search has no trial yet.")]
    if not search.params:
        return [Absent(title=name, reason=f"no coefficient of {search.rule} was searched: all trials have the same.")]
    slices = [_slice(search, metric, name) for name in search.params]
    surfaces = [_contour(search, metric, *sorted(pair)) for pair in combinations(search.params, 2)]
    return [_parallel(search, metric), *slices, *surfaces, _importance(search, metric)]


def _axis(search: Search, name: str) -> dict[str, Any]:
    """An axis of one parameter: logarithmic unless a value is 0."""
    values = search.values_of(name)
    if min(values) <= 0:
        return {"title": {"text": name, "standoff": 14}}
    decades = math.log10(max(values) / min(values))
    return {
        "title": {"text": f"{name}, log scale", "standoff": 14},
        "type": "log",
        "exponentformat": "power",
        **({"dtick": 1} if decades >= 2 else {"nticks": 6}),
    }


def _slice(search: Search, metric: str, name: str) -> Figure:
    trials = search.having(name)
    without = len(search.trials) - len(trials)
    lacking = f" {without} trials without {name} are not in it." if without else ""
    value = f"{METRICS[metric]}, %"
    return Figure(
        title=f"Slice: {METRICS[metric]} against {name}",
        note=trials_note(
            search, trials, f"Each mark is a trial; the other coefficients differ, too.{lacking}{drawn_note(trials)}"
        ),
        plot=plot(
            marks(search, trials, metric, lambda t: t.params[name]),
            xaxis=_axis(search, name),
            yaxis={"title": {"text": value}},
            yaxis2=edge_axis(),
            showlegend=True,
        ),
        columns=("uid", "status", name, value),
        rows=[(t.row["uid"], t.status, t.params[name], t.value(metric)) for t in trials],
        height=380,
    )


def _parallel(search: Search, metric: str) -> Figure:
    """Plotly's parallel coordinates: Optuna's have one trace per trial, and the stopped trials have none."""
    import plotly.graph_objects as go

    drawn = [trial for trials in shown_of(search.trials, metric).values() for trial in trials]
    values = [t.value(metric) for t in drawn]
    present = [value for value in values if value is not None]
    statuses = [status for status in MARKS if any(t.status == status for t in drawn)]
    dimensions = [_dimension(name, [t.params.get(name) for t in drawn]) for name in search.params]
    outcome = {"label": "outcome", "values": [statuses.index(t.status) for t in drawn]}
    outcome |= {"tickvals": list(range(len(statuses))), "ticktext": statuses, "range": [-0.1, len(statuses) - 0.9]}
    low, high = (min(present), max(present)) if present else (0.0, 1.0)
    line: dict[str, Any] = {"color": [low if value is None else value for value in values], "colorscale": SEQUENTIAL}
    margin = 0.2 * (high - low) or 1.0  # the ends of the scale are hard to see, one on white and one on black
    line |= {"cmin": low - margin, "cmax": high + margin}
    reached = _dimension("reached, %", values, log=False)
    trace = go.Parcoords(line=line, dimensions=[*dimensions, outcome, reached], labelangle=-20, labelside="bottom")
    said = (
        f"A line is a trial, coloured by its {METRICS[metric]} (yellow: high). Drag along an axis to see only the "
        "trials that pass there; a click on it shows all again. Coefficients are on log axes; 'none': it has none."
        f"{drawn_note(search.trials)}"
    )
    return Figure(
        title=f"Parallel coordinates: {METRICS[metric]}",
        note=trials_note(search, search.trials, said),
        plot=plot([trace], margin={"l": 60, "r": 50, "t": 30, "b": 70}),
        columns=("uid", "status", *search.params, f"{METRICS[metric]}, %"),
        rows=[
            (t.row["uid"], t.status, *(t.params.get(name) for name in search.params), t.value(metric))
            for t in search.trials
        ],
    )


def _dimension(label: str, values: Sequence[float | None], *, log: bool = True) -> dict[str, Any]:
    """An axis of the parallel coordinates; what is missing stands under a gap, at 'none'."""
    present = [value for value in values if value is not None]
    log = log and bool(present) and min(present) > 0
    placed = [None if v is None else math.log10(v) if log else v for v in values]
    known = [v for v in placed if v is not None] or [0.0]
    low, high = min(known), max(known)
    none = low - 0.15 * ((high - low) or 1.0)
    ticks = _log_ticks(low, high) if log else [low + (high - low) * i / 4 for i in range(5)]
    texts = [f"{10**tick if log else tick:.3g}" for tick in ticks]
    if None in placed:
        return {
            "label": label,
            "values": [none if v is None else v for v in placed],
            "tickvals": [none, *ticks],
            "ticktext": ["none", *texts],
        }
    return {"label": label, "values": placed, "tickvals": ticks, "ticktext": texts}


def _log_ticks(low: float, high: float) -> list[float]:
    """Both ends, and the powers of ten between them that have room."""
    room = (high - low) / 12
    between = [float(p) for p in range(math.ceil(low), math.floor(high) + 1) if low + room < p < high - room]
    return [low, *between[:: max(1, math.ceil(len(between) / 6))], *([high] if high > low else [])]


def _contour(search: Search, metric: str, x: str, y: str) -> Part:
    """Optuna's surface over two parameters, under marks of all statuses."""
    title = f"Contour: {METRICS[metric]} over {x} and {y}"
    both = search.having(x, y)
    ended = [t for t in both if t.complete(metric)]
    complete = thinned(ended, metric, SURFACE_TRIALS)
    points = [(t.params[x], t.params[y], t.value(metric)) for t in ended]
    different = [len(set(column)) for column in zip(*points, strict=True)]
    if min(different, default=0) < 2:
        counted = counts(both) if both else f"none has both {x} and {y}"
        return Absent(title=title, reason=f"too few trials that ended differ in {x}, {y} and value ({counted}).")
    rest = [
        thinned([t for t in both if t.status == s and not t.complete(metric)], metric, SURFACE_TRIALS) for s in MARKS
    ]
    drawn = [*complete, *(t for some in rest for t in some)]
    said = "Between the marks colours are interpolated (Optuna), from the finished and the diverged trials."
    if len(drawn) < len(both):
        said += f" Drawn are {len(drawn)} trials, {len(complete)} of them in the surface, chosen evenly by rank, of"
    return Figure(
        title=title,
        note=trials_note(search, both, said),
        plot=plot(
            [_surface(complete, metric, x, y), *_marks_on(drawn, metric, x, y)],
            xaxis=_axis(search, x),
            yaxis=_axis(search, y),
            margin={"t": 0},
            showlegend=True,
        ),
        columns=("uid", "status", x, y, f"{METRICS[metric]}, %"),
        rows=[(t.row["uid"], t.status, t.params[x], t.params[y], t.value(metric)) for t in both],
        height=500,
    )


def _surface(trials: Sequence[Trial], metric: str, x: str, y: str) -> Any:
    """The contour trace of Optuna's plot, in this program's colours."""
    from optuna.visualization import plot_contour

    drawn = plot_contour(_study(trials, (x, y), metric), params=[x, y])
    surface = next(trace for trace in drawn.data if trace.type == "contour")
    bar = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "thickness": 12, "len": 0.7}
    bar["title"] = {"text": f"{METRICS[metric]}, %", "side": "top"}
    return surface.update(z=slim(surface.z), colorscale=SEQUENTIAL, reversescale=False, colorbar=bar, hoverinfo="skip")


def _marks_on(trials: Sequence[Trial], metric: str, x: str, y: str) -> Iterator[Any]:
    """The trials on a surface of any colour: dark with a light edge, or hollow where they have no final value."""
    import plotly.graph_objects as go

    for status, mark in MARKS.items():
        shown = [t for t in trials if t.status == status]
        hollow = mark.symbol.endswith("-open")
        fill, edge = (_LIGHT, GREY) if hollow else (_DARK, _LIGHT)
        style = {
            "symbol": mark.symbol.removesuffix("-open"),
            "size": 9,
            "color": fill,
            "line": {"color": edge, "width": 1.5},
        }
        values = [t.value(metric) for t in shown]
        if shown:
            yield go.Scatter(
                x=[t.params[x] for t in shown],
                y=[t.params[y] for t in shown],
                text=[
                    f"{t.text}<br>" + ("no value" if v is None else f"{v:.2f} %")
                    for t, v in zip(shown, values, strict=True)
                ],
                mode="markers",
                marker=style,
                name=f"{mark.words} ({len(shown)})",
                hovertemplate="%{text}<extra></extra>",
            )


def _importance(search: Search, metric: str) -> Part:
    """Which parameters set the best tenth apart (PED-ANOVA, Watanabe et al. 2023, arXiv 2304.10255)."""
    from optuna.visualization import plot_param_importances

    title = f"Parameter importance: {METRICS[metric]}"
    complete = [t for t in search.trials if t.complete(metric)]
    if reason := _no_importance(search, complete, metric):
        return Absent(title=title, reason=reason)
    used = thinned(complete, metric, IMPORTANCE_MOST)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Optuna: experimental in releases before 5, and ties at the quantile
        drawn = plot_param_importances(_study(used, search.params, metric, switches=True), evaluator=_evaluator())
    if not drawn.data or not any(drawn.data[0].x):
        return Absent(title=title, reason="Optuna finds no difference between the best tenth and the others.")
    bars = drawn.data[0].update(marker={"color": search.color}, hovertemplate="%{y}: %{x:.4f}<extra></extra>")
    said = (
        "How far the best tenth of the trials differ from all in one parameter by itself (PED-ANOVA by Optuna; "
        f"shares of 1). From {len(used)} of the {len(complete)} trials that finished or diverged, evenly by rank, of"
    )
    return Figure(
        title=title,
        note=trials_note(search, search.trials, said),
        plot=plot([bars], xaxis={"title": {"text": "importance"}, "range": [0, 1.12]}, showlegend=False),
        columns=("parameter", "importance"),
        rows=[(name, share) for name, share in zip(bars.y, bars.x, strict=True)][::-1],
        height=140 + 36 * len(bars.y),
    )


def _no_importance(search: Search, complete: Sequence[Trial], metric: str) -> str | None:
    """Why an importance would mean nothing."""
    finished = sum(t.status == "finished" for t in complete)
    if len(search.params) < 2:
        return f"{search.params[0]} is the only coefficient that was searched: all of the importance is its own."
    if finished < IMPORTANCE_TRIALS:
        return (
            f"{finished} of {len(search.trials)} trials finished; of fewer than {IMPORTANCE_TRIALS} it means nothing."
        )
    if len({t.value(metric) for t in complete}) < 2:
        return "all trials came to the same value."
    return None


# --- Optuna --------------------------------------------------------------------------------------------------------


def _evaluator() -> Any:
    from optuna.importance import PedAnovaImportanceEvaluator

    return PedAnovaImportanceEvaluator()


def _study(trials: Sequence[Trial], names: Sequence[str], metric: str, *, switches: bool = False) -> Study:
    """A study in memory that has these trials as complete ones, and these of their parameters.

    ``switches``: whether a parameter that only some have gets a second one, ``use_…``, which says who has it.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it announces every study that is made
    spread = {name: [t.params[name] for t in trials if name in t.params] for name in names}
    known: dict[str, Any] = {name: _distribution(values) for name, values in spread.items() if values}
    optional = [name for name in known if switches and len(spread[name]) < len(trials)]
    known |= {f"use_{name}": optuna.distributions.CategoricalDistribution([False, True]) for name in optional}
    study = optuna.create_study(direction="maximize")
    for trial in trials:
        params: dict[str, Any] = {name: trial.params[name] for name in names if name in trial.params}
        params |= {f"use_{name}": name in params for name in optional}
        mine = {name: known[name] for name in params}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=mine, value=trial.value(metric)))
    return study


def _distribution(values: Sequence[float]) -> Any:
    """The range that was tried; on a log scale unless it has a 0."""
    from optuna.distributions import FloatDistribution

    return FloatDistribution(min(values), max(values), log=min(values) > 0)
