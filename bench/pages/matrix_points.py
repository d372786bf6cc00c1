"""What the figures of a matrix share: its columns, points with intervals, the controls as lines, and notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.cells import NOTHING, interval
from bench.looks import look
from bench.pages.parts import band, rule_style, whiskers
from bench.summary import REFERENCE, updates_of

#: What is neither a rule nor a scale: seen on white and on black.
NEUTRAL = "#888888"

#: The controls that are drawn as lines; the others stand among the subsets.
LINES = (REFERENCE, "feedback")

STATUS = ("finished", "stopped", "diverged", "failed")

#: What a column is, and its marker; the dots of the primitives have the marker of their kind too.
MARKERS = {
    "local only": "circle",
    "with a non-local primitive": "square",
    "control": "diamond",
    "nothing finished: at chance": "x-thin",
}

ESTIMATE = ("mean", "sd", "n", "low", "high")

TEST_USE = "test was read once per confirmed run; order and choice are by validation, nothing by test"

Line = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """`bench.matrix_summary` of one network, and what its notes need."""

    arch: str
    dataset: str
    found: Mapping[str, Any]

    @property
    def columns(self) -> list[Line]:
        """Subsets and controls that are no lines, in the order of the table, as far as test has them."""
        return [line for line in self.found["table"] if line["name"] not in LINES and line["test_acc"]]

    @property
    def lines(self) -> list[Line]:
        return [line for line in self.found["table"] if line["name"] in LINES and line["test_acc"]]

    @property
    def controls(self) -> str:
        """Which lines there are."""
        return " and ".join(line["name"] for line in self.lines) or f"none, {' and '.join(LINES)} are not there yet"

    @property
    def nothing(self) -> str:
        """Why there is no figure of subsets."""
        left = "; ".join(f"{left['rule']} ({left['reason']})" for left in self.found["left_out"])
        return f"no subset has a test accuracy yet{': ' if left else ''}{left}. {self.where}"

    @property
    def where(self) -> str:
        """Network, data set, budget and use of the test set: the end of every note."""
        budget = f"{self.found['trials']} trials × {self.found['epochs']} epochs a subset"
        return f"{self.arch} on {self.dataset}; {budget}; {TEST_USE}."

    @property
    def counts(self) -> str:
        """What became of the trials and of the confirmed runs."""
        table, subsets = self.found["table"], self.found["subsets"]
        trials = ", ".join(f"{sum(line['trials'][s] for line in table)} {s}" for s in STATUS)
        runs = ", ".join(f"{sum(line[s] for line in table)} {s}" for s in ("diverged", "failed"))
        return (
            f"{subsets['measured']} of {subsets['expected']} subsets, {len(self.found['left_out'])} left out; nothing "
            f"finished in {subsets['nothing_finished']}, which stand at chance (×). Trials, controls' too: {trials}. "
            f"Confirmed runs: {runs} (diverged ones count at chance, failed ones have no accuracy)."
        )


# --- one column, one point, of a subset or control ------------------------------------------------------------------


def kind_of(line: Line) -> str:
    if line["outcome"] != "confirmed":
        return "nothing finished: at chance"
    return "control" if line["control"] else "local only" if line["local"] else "with a non-local primitive"


def percent(value: Mapping[str, Any] | None, name: str) -> float | int | None:
    """Of an estimate, in %; n as it is."""
    if value is None or value[name] is None:
        return None
    found: float | int = value[name] if name == "n" else 100 * value[name]
    return found


def said(value: Mapping[str, Any] | None) -> str:
    """An accuracy with its interval and n."""
    if value is None:
        return NOTHING
    ends = "" if value["low"] is None else f" [{100 * value['low']:.2f}, {100 * value['high']:.2f}]"
    return f"{100 * value['mean']:.2f} %{ends}, n {value['n']}"


def seeds(values: Sequence[Mapping[str, Any] | None]) -> str:
    """Over how many seeds these estimates are."""
    found = sorted({value["n"] for value in values if value})
    many = f"n = {found[0]}" if len(found) == 1 else f"n = {found[0]} to {found[-1]}"
    return f"{many} seed{'s' if found[-1] > 1 else ''}{' (one has no interval)' if found[0] == 1 else ''}"


def hover(line: Line) -> str:
    against = line[f"test_acc_versus_{REFERENCE}"]
    settings = [f"{name} {value:.2e}" for name, value in line["coefficients"].items()]
    settings += [f"{name} {value:.2g}" for name, value in updates_of(line["config"]).items()]
    trials = ", ".join(f"{number} {status}" for status, number in line["trials"].items() if number)
    lost = ", ".join(f"{line[status]} {status}" for status in ("diverged", "failed") if line[status])
    lines = [
        f"<b>{line['name']}</b>: {kind_of(line)}",
        f"test {said(line['test_acc'])}",
        f"validation {said(line['val_acc'])}",
        f"− {REFERENCE}: {interval(against)} points, {against['verdict']}" if against else "",
        ", ".join(settings),
        f"cost floor {line['cost_floor']:.2f}",
        f"trials: {trials}" if trials else "",
        f"confirmed runs: {lost}" if lost else "",
    ]
    return "<br>".join(filter(None, lines))


def _markers(lines: Sequence[Line], size: int) -> dict[str, Any]:
    """Each in its rule's colour; open where a confirmed run diverged."""
    colors = [look(line["name"]).color for line in lines]
    symbols = [MARKERS[kind_of(line)] + ("-open" if line["diverged"] else "") for line in lines]
    return {"color": colors, "symbol": symbols, "size": size, "line": {"width": 2, "color": colors}}


def cut(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """The interval as far as an accuracy can be: t knows no bounds."""
    if value["low"] is None:
        return value
    return {**value, "low": max(0.0, value["low"]), "high": min(1.0, value["high"])}


def points(lines: Sequence[Line], x: Sequence[float]) -> list[Any]:
    """The test accuracies with their intervals, and what the markers mean."""
    import plotly.graph_objects as go

    bars = {**whiskers([cut(line["test_acc"]) for line in lines]), "color": NEUTRAL}
    meant = {kind: symbol for kind, symbol in MARKERS.items() if any(kind_of(line) == kind for line in lines)}
    legend = [
        go.Scatter(
            x=[None],
            y=[None],
            mode="markers",
            name=kind,
            marker={"color": NEUTRAL, "symbol": symbol, "size": 9, "line": {"width": 2, "color": NEUTRAL}},
        )
        for kind, symbol in meant.items()
    ]
    points = go.Scatter(
        x=list(x),
        y=[100 * line["test_acc"]["mean"] for line in lines],
        mode="markers",
        error_y=bars,
        marker=_markers(lines, 9),
        hovertext=[hover(line) for line in lines],
        hoverinfo="text",
        showlegend=False,
    )
    return [points, *legend]


def level(line: Line, left: float, right: float) -> list[Any]:
    """A control as a line with its interval."""
    import plotly.graph_objects as go

    value = cut(line["test_acc"])
    ends, style = [left, right], rule_style(line["name"])
    level = go.Scatter(
        x=ends,
        y=[100 * value["mean"]] * 2,
        mode="lines",
        hovertext=hover(line),
        hoverinfo="text",
        **{**style, "name": f"{line['name']}, {100 * value['mean']:.1f} %"},
    )
    if value["low"] is None:
        return [level]
    return [band(ends, [100 * value["low"]] * 2, [100 * value["high"]] * 2, line["name"]), level]


def chance_line(matrix: Matrix, left: float, right: float) -> Any:
    import plotly.graph_objects as go

    chance = 100 * matrix.found["chance"]
    return go.Scatter(
        x=[left, right],
        y=[chance] * 2,
        mode="lines",
        name=f"chance, {chance:.3g} %",
        line={"color": NEUTRAL, "dash": "dot", "width": 1},
        hoverinfo="skip",
    )


def accuracy_range(matrix: Matrix, lines: Sequence[Line]) -> list[float]:
    """Of the accuracy axis: all means, chance, and intervals as far as an accuracy can be."""
    values = [matrix.found["chance"]]
    for line in lines:
        values += [v for v in (cut(line["test_acc"])[name] for name in ("mean", "low", "high")) if v is not None]
    low, high = 100 * min(values), 100 * max(values)
    return [low - 0.04 * (high - low), high + 0.04 * (high - low)]
