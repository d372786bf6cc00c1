"""What was trained again with fresh seeds: table, accuracies with their seeds, front, and how B came to W."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.cells import spread_of
from bench.looks import GREY, look
from bench.pages.parts import SEQUENTIAL, Absent, Figure, Part, Table, band, plot, rule_style, whiskers
from bench.pages.trials import METRICS, described, tally
from bench.rows import Row
from bench.statistics import Estimate, estimate
from bench.summary import FLOOR, REFERENCE, columns, floor_words, table_rows

#: Configurations of one rule have its colour, and these dashes in turn.
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One configuration over its seeds: its name on this page, what the summary says of it, and its runs."""

    label: str
    found: Mapping[str, Any]
    rows: Sequence[Row]
    control: bool

    @property
    def rule(self) -> str:
        return str(self.found["rule"])


def configurations(
    summary: Mapping[str, Any], confirmed: Sequence[Row], controls: Sequence[Row]
) -> list[Configuration]:
    """Those of the summary, in its order, with their runs; those that share a rule are numbered."""
    named: list[tuple[str, Mapping[str, Any], Sequence[Row], bool]] = [
        (found["rule"], found, confirmed, False) for found in summary["confirmed"]
    ]
    named += [(f"{found['rule']} (control)", found, controls, True) for found in summary["controls"]]
    names = [name for name, *_ in named]
    labels = [
        f"{name} {names[: place + 1].count(name)}" if names.count(name) > 1 else name
        for place, name in enumerate(names)
    ]
    return [
        Configuration(label=label, found=found, rows=_runs_of(found, rows), control=control)
        for label, (_, found, rows, control) in zip(labels, named, strict=True)
    ]


def _runs_of(found: Mapping[str, Any], rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if {k: v for k, v in row["config"].items() if k != "seed"} == found["config"]]


def confirmed_parts(summary: Mapping[str, Any], about: str, known: Sequence[Configuration], test: str) -> list[Part]:
    """The table, the accuracies with their seeds, and with two objectives the front."""
    if not known:
        return [Absent(title="Confirmed configurations", reason="there is neither a confirmed run nor a control yet.")]
    note = (
        "mean ± standard deviation over n fresh seeds; differences are paired by seed, with their 95 % t interval; "
        f"below the confirmed ones stand the controls, under the same protocol. {about}; {test}."
    )
    notes = (note, f"{floor}.") if (floor := floor_words(summary)) else (note,)
    table = Table(
        title="Confirmed configurations and controls", columns=columns(summary), rows=table_rows(summary), notes=notes
    )
    front = [_front(about, known)] if summary["objective"] == "both" else []
    return [table, _accuracies(about, known, test), *front]


def _seeds_note(known: Sequence[Configuration]) -> str:
    """n, and the runs that did not go well."""
    return "; ".join(f"{one.label}: {tally(one.rows)}" for one in known)


def _accuracies(about: str, known: Sequence[Configuration], test: str) -> Part:
    """Test accuracy of each configuration, its interval, and its seeds."""
    title = "Test accuracy of the confirmed configurations and controls"
    shown = [one for one in known if one.found["test_acc"] is not None]
    if not shown:
        return Absent(title=title, reason=f"no run has a test accuracy ({_seeds_note(known)}).")
    runs = [(one, row) for one in shown for row in one.rows if "test_acc" in row["metrics"]]
    return Figure(
        title=title,
        note=(
            "Large marks: mean over seeds, bars: its 95 % t interval (none for one seed); small marks: single seeds, "
            f"× diverged, at chance. Runs: {_seeds_note(known)}. {about}; {test}."
        ),
        plot=plot(
            (trace for place, one in enumerate(shown) for trace in _point_and_seeds(place, one)),
            xaxis={"title": {"text": "test accuracy, %"}},
            yaxis={
                "tickvals": list(range(len(shown))),
                "ticktext": [one.label for one in shown],
                "range": [len(shown) - 0.4, -0.6],
                "showgrid": False,
                "zeroline": False,
            },
            showlegend=False,
        ),
        columns=("configuration", "uid", "seed", "status", "test accuracy, %"),
        rows=[
            (one.label, row["uid"], row["config"]["seed"], row["status"], 100 * row["metrics"]["test_acc"])
            for one, row in runs
        ],
        height=110 + 48 * len(shown),
    )


def _point_and_seeds(place: int, one: Configuration) -> list[Any]:
    """The mean with its interval, and the seeds a little below it."""
    import plotly.graph_objects as go

    found = one.found["test_acc"]
    color = look(one.rule).color
    rows = [row for row in one.rows if "test_acc" in row["metrics"]]
    mean = go.Scatter(
        x=[100 * found["mean"]],
        y=[place],
        error_x={**whiskers([found]), "color": color},
        mode="markers",
        hovertemplate=f"{one.label}<br>{spread_of(found)} %<extra></extra>",
        **{**rule_style(one.rule, size=11), "name": one.label},
    )
    seeds = go.Scatter(
        x=[100 * row["metrics"]["test_acc"] for row in rows],
        y=[place + 0.27] * len(rows),
        text=[f"seed {row['config']['seed']}, {described(row)}" for row in rows],
        mode="markers",
        opacity=0.7,
        marker={
            "symbol": ["x" if row["status"] == "diverged" else "line-ns-open" for row in rows],
            "size": 8,
            "color": color,
        },
        hovertemplate="%{text}<br>%{x:.2f} %<extra></extra>",
    )
    return [mean, seeds]


def _front(about: str, known: Sequence[Configuration]) -> Part:
    """Accuracy against robustness, by validation, and the front of those that no other dominates."""
    import plotly.graph_objects as go

    title = "Pareto front: validation accuracy against its area under noise"
    shown = [one for one in known if one.found["val_acc"] is not None and one.found["val_area"] is not None]
    if not shown:
        return Absent(title=title, reason="no configuration has both an accuracy and an area.")
    front = sorted((one for one in shown if one.found.get("front")), key=lambda one: one.found["val_area"]["mean"])
    step = go.Scatter(
        x=[100 * one.found["val_area"]["mean"] for one in front],
        y=[100 * one.found["val_acc"]["mean"] for one in front],
        mode="lines",
        line={"shape": "vh", "color": GREY, "width": 1.5, "dash": "dot"},
        name="front",
        hoverinfo="skip",
    )
    return Figure(
        title=title,
        note=(
            "Means over seeds with their 95 % t intervals; the front joins the confirmed configurations that no other "
            "beats in both (large); what differs by less than its interval may trade places. "
            f"Runs: {_seeds_note(shown)}. {about}; validation only."
        ),
        plot=plot(
            [step, *(_compromise(one) for one in shown)],
            xaxis={"title": {"text": f"{METRICS['val_area']}, %"}},
            yaxis={"title": {"text": f"{METRICS['val_acc']}, %"}},
            showlegend=True,
        ),
        columns=("configuration", "n", "validation accuracy, %", "area, %", "on the front"),
        rows=[
            (one.label, one.found["val_acc"]["n"], *(100 * one.found[m]["mean"] for m in METRICS), one in front)
            for one in shown
        ],
    )


def _compromise(one: Configuration) -> Any:
    """One configuration in both objectives."""
    import plotly.graph_objects as go

    area, accuracy = one.found["val_area"], one.found["val_acc"]
    style = rule_style(one.rule, size=12 if one.found.get("front") else 7)
    color = look(one.rule).color
    return go.Scatter(
        x=[100 * area["mean"]],
        y=[100 * accuracy["mean"]],
        error_x={**whiskers([area]), "color": color},
        error_y={**whiskers([accuracy]), "color": color},
        mode="markers",
        hovertemplate=f"{one.label}<br>accuracy {spread_of(accuracy)} %<br>area {spread_of(area)} %<extra></extra>",
        **{**style, "name": one.label, "legendgroup": one.label},
    )


# --- alignment -----------------------------------------------------------------------------------------------------

_LAYER, _FLOOR = "angle/", "floor_angle/"
#: The means over layers: title, and by what they are measured.
_MEANS = {
    "angle": ("Mean angle between W and B", "Of the weights alone: no test data in it."),
    "dx_angle": ("Mean angle between the errors sent and backprop's", "By validation examples: no test data in it."),
}


def alignment_parts(about: str, known: Sequence[Configuration]) -> list[Part]:
    """Angles per layer of the best confirmed configuration, and their means of each configuration."""
    return [_layers(about, known), *(_means(about, known, metric) for metric in _MEANS)]


def _layers(about: str, known: Sequence[Configuration]) -> Part:
    """Layers from the input (above) to the output, epochs from left to right, means over seeds."""
    import plotly.graph_objects as go

    title = "Angle between W and B, per layer"
    best = next((one for one in known if not one.control), None)
    if best is None or not (cells := _angles(best.rows)):
        return Absent(title=title, reason=_no_angle(best))
    layers, epochs = list(dict.fromkeys(layer for layer, _ in cells)), sorted({epoch for _, epoch in cells})
    grid = [[cells.get((layer, epoch)) for epoch in epochs] for layer in layers]
    floors = _floors(best.rows)
    below = {layer: f", floor {floors[layer]:.1f}°" if layer in floors else "" for layer in layers}
    words = [
        ["" if at is None else f"n {at.n}{_sd(at)}{below[layer]}" for at in line]
        for layer, line in zip(layers, grid, strict=True)
    ]
    surface = go.Heatmap(
        x=epochs,
        y=layers,
        z=[[None if at is None else at.mean for at in line] for line in grid],
        text=words,
        zmin=0,
        zmax=max(90.0, *(at.mean for at in cells.values())),
        colorscale=SEQUENTIAL,
        colorbar={"title": {"text": "degrees"}, "thickness": 14, "tickvals": [0, 30, 60, 90]},
        xgap=1,
        ygap=1,
        hovertemplate="%{y}, epoch %{x}: %{z:.1f}°<br>%{text}<extra></extra>",
    )
    return Figure(
        title=f"{title}: {best.label}",
        note=(
            f"Mean over seeds after each epoch ({_seeds_note([best])}; sd where one points, and in the CSV); layers in "
            f"the order of the network. 90°: B has nothing of W. {about}. {_MEANS['angle'][1]}"
        ),
        plot=plot(
            [surface],
            xaxis={"title": {"text": "epoch"}, "tickformat": "d", "showgrid": False, **_whole(epochs)},
            yaxis={"autorange": "reversed", "dtick": 1, "tickfont": {"size": 10}, "showgrid": False},
            showlegend=False,
        ),
        columns=("layer", "epoch", "angle, °", "sd, °", "n", "floor, °"),
        rows=[(layer, epoch, at.mean, at.sd, at.n, floors.get(layer)) for (layer, epoch), at in cells.items()],
        height=110 + 17 * max(8, len(layers)),
    )


def _sd(at: Estimate) -> str:
    return "" if at.sd is None else f", sd {at.sd:.1f}°"


def _whole(epochs: Sequence[float]) -> dict[str, Any]:
    return {"dtick": 1} if len(epochs) <= 12 else {}


def _angles(rows: Iterable[Row]) -> dict[tuple[str, float], Estimate]:
    """(layer, epoch) to the angle over the runs that have it, layers in the order of the history."""
    found: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        for at in row["history"]:
            for name in (name for name in at if name.startswith(_LAYER)):
                found.setdefault((name.removeprefix(_LAYER), at["epoch"]), []).append(at[name])
    return {key: estimate(values) for key, values in found.items()}


def _floors(rows: Iterable[Row]) -> dict[str, float]:
    """By layer, what its angle cannot go below, over the runs that know it: known at their ends."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name in (name for name in row["metrics"] if name.startswith(_FLOOR)):
            found.setdefault(name.removeprefix(_FLOOR), []).append(row["metrics"][name])
    return {layer: estimate(values).mean for layer, values in found.items()}


def _no_angle(one: Configuration | None) -> str:
    """Why there is nothing to show."""
    if one is None:
        return "no configuration is confirmed."
    if one.rule == REFERENCE:
        return f"{REFERENCE} sends errors back through W itself: there is no other weight to compare it with."
    if not one.found["config"].get("measure_alignment", True):
        return "the runs did not measure it (measure_alignment is off)."
    if not any(row["history"] for row in one.rows):
        return f"no run of {one.label} finished an epoch ({tally(one.rows)})."
    return f"the runs of {one.label} have no angle per layer."


def _means(about: str, known: Sequence[Configuration], metric: str) -> Part:
    """The mean angle over the layers after each epoch, with the interval over seeds."""
    title, measured = _MEANS[metric]
    curves = [(one, curve) for one in known if one.rule != REFERENCE and (curve := _mean_curve(one.rows, metric))]
    if not curves:
        return Absent(title=title, reason=_no_angle(next((one for one in known if not one.control), None)))
    epochs = sorted({epoch for _, curve in curves for epoch in curve})
    highest = max(at.mean for _, curve in curves for at in curve.values())
    floors = {
        one.label: one.found["floor_angle"]["mean"]
        for one, _ in curves
        if metric == "angle" and one.found["floor_angle"]
    }
    dotted = "" if not floors else f"Dotted: {FLOOR}. "
    return Figure(
        title=title,
        note=(
            "Lines: mean over layers and seeds; bands: 95 % t interval over seeds (none for one seed). "
            f"{dotted}Runs: {_seeds_note([one for one, _ in curves])}. {about}. {measured}"
        ),
        plot=plot(
            [
                trace
                for place, (one, curve) in enumerate(curves)
                for trace in (
                    *_line_and_band([other.rule for other, _ in curves[:place]].count(one.rule), one, curve),
                    *([_floor_line(one, epochs, floors[one.label])] if one.label in floors else []),
                )
            ],
            xaxis={"title": {"text": "epoch"}, "tickformat": "d", **_whole(epochs)},
            yaxis={"title": {"text": "angle, °"}, "range": [0, max(92.0, highest + 2)], "dtick": 15},
            showlegend=True,
        ),
        columns=("configuration", "epoch", "angle, °", "sd, °", "low, °", "high, °", "n", "floor, °"),
        rows=[
            (one.label, epoch, at.mean, at.sd, at.low, at.high, at.n, floors.get(one.label))
            for one, curve in curves
            for epoch, at in curve.items()
        ],
    )


def _mean_curve(rows: Iterable[Row], metric: str) -> dict[float, Estimate]:
    found: dict[float, list[float]] = {}
    for row in rows:
        for at in row["history"]:
            if metric in at:
                found.setdefault(at["epoch"], []).append(at[metric])
    return {epoch: estimate(found[epoch]) for epoch in sorted(found)}


def _floor_line(one: Configuration, epochs: Sequence[float], floor: float) -> Any:
    import plotly.graph_objects as go

    return go.Scatter(
        x=[epochs[0], epochs[-1]],
        y=[floor, floor],
        mode="lines",
        line={"color": look(one.rule).color, "dash": "dot", "width": 1.5},
        name=f"{one.label}: floor",
        legendgroup=one.label,
        hovertemplate=f"{one.label}: floor %{{y:.1f}}°<extra></extra>",
    )


def _line_and_band(place: int, one: Configuration, curve: Mapping[float, Estimate]) -> Iterator[Any]:
    """``place``: how many configurations of this rule were drawn before."""
    import plotly.graph_objects as go

    style = {**rule_style(one.rule, size=7), "name": one.label, "legendgroup": one.label}
    if place:
        style["line"] = {**style["line"], "dash": _DASHES[place % len(_DASHES)]}
    ends = [(epoch, at.low, at.high) for epoch, at in curve.items() if at.low is not None and at.high is not None]
    if len(ends) > 1:
        x, low, high = map(list, zip(*ends, strict=True))
        yield band(x, low, high, one.rule).update(legendgroup=one.label)
    yield go.Scatter(
        x=list(curve),
        y=[at.mean for at in curve.values()],
        text=[f"n {at.n}{_sd(at)}" for at in curve.values()],
        mode="lines+markers",
        hovertemplate=f"{one.label}, epoch %{{x}}: %{{y:.1f}}°<br>%{{text}}<extra></extra>",
        **style,
    )
