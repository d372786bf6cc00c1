"""The trials of a search, over epochs and over time: one mark for each status, and none left out.

A trial that was stopped early has the value that it had then; a diverged one stands at chance; one that failed has
none, and is marked on the edge.
"""

from __future__ import annotations

import html
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bench.looks import GREY, look
from bench.pages.parts import Absent, Figure, Part, plot, rule_style
from bench.rows import Row
from bench.space import PARAMETERS, UPDATE_FIELDS
from bench.summary import updates_of

#: What a search maximises, in words; both in % of accuracy.
METRICS = {"val_acc": "validation accuracy", "val_area": "area under validation accuracy against noise"}

#: So many trials of one status are drawn, evenly by rank: more cannot be told apart. The CSV has all.
DRAWN = 1_000

#: Learning curves of more points are drawn by WebGL: as SVG they would take the browser seconds. (Nothing else is: a
#: browser has some sixteen WebGL contexts, and a figure takes three.)
SVG_POINTS = 5_000


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A run of a search, as figures see it: its number, its parameters, and what is said when one points at it."""

    number: int
    row: Row
    params: Mapping[str, float]
    text: str

    @property
    def status(self) -> str:
        return str(self.row["status"])

    def complete(self, metric: str) -> bool:
        """Whether its value is final: it had its full budget, or diverged."""
        return self.status in ("finished", "diverged") and self.value(metric) is not None

    def value(self, metric: str) -> float | None:
        """In %; None where the run has none."""
        found = self.row["metrics"].get(metric)
        return None if found is None else 100 * found


@dataclass(frozen=True, kw_only=True)
class Search:
    """The trials of a search in the order in which they were proposed; ``about`` says the data and the budget."""

    rule: str
    trials: Sequence[Trial]
    epochs: int
    about: str

    @property
    def color(self) -> str:
        return look(self.rule).color

    @cached_property
    def params(self) -> tuple[str, ...]:
        """The parameters that were searched: those with more than one value, or that only some trials have."""
        names = dict.fromkeys(name for trial in self.trials for name in trial.params)
        order = [name for name in PARAMETERS if name in names]
        whole = len(self.trials)
        return tuple(name for name in order if len(set(known := self.values_of(name))) > 1 or len(known) < whole)

    def values_of(self, name: str) -> list[float]:
        """The values of one parameter, of the trials that have it."""
        return [trial.params[name] for trial in self.trials if name in trial.params]

    def having(self, *names: str) -> list[Trial]:
        """The trials that have all of these parameters."""
        return [trial for trial in self.trials if all(name in trial.params for name in names)]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """How a trial of one status is drawn, and what the legend says of it."""

    words: str
    symbol: str
    opacity: float


MARKS = {
    "finished": Mark(words="finished", symbol="circle", opacity=0.9),
    "stopped": Mark(words="stopped early", symbol="circle-open", opacity=0.9),
    "diverged": Mark(words="diverged, at chance", symbol="x", opacity=0.8),
    "failed": Mark(words="failed", symbol="cross-open", opacity=0.9),
}


def trials_of(rows: Iterable[Row]) -> list[Trial]:
    """The trials by their number, which ends the uid."""
    numbered = [(_number(row["uid"], place), row) for place, row in enumerate(rows)]
    return [_trial(number, row) for number, row in sorted(numbered, key=lambda pair: pair[0])]


def _number(uid: str, place: int) -> int:
    found = re.search(r"-(\d+)$", uid)
    return int(found[1]) if found else place


def _trial(number: int, row: Row) -> Trial:
    config = row["config"]
    params = {**config["coefficients"], **{n: config[n] for n in UPDATE_FIELDS if config.get(n) is not None}}
    return Trial(number=number, row=row, params=params, text=f"trial {number}, {described(row)}")


def described(row: Row) -> str:
    """One run, for the text that shows when one points at it."""
    config = row["config"]
    said = [f"{name} {value:.3g}" for name, value in config["coefficients"].items()]
    said += [f"{name} {value:.3g}" for name, value in updates_of(config).items()]
    reason = f" ({textwrap.shorten(row['reason'], 70, placeholder='…')})" if row["reason"] else ""
    return f"{row['status']}{html.escape(reason)}<br>{row['uid']}<br>{config['rule']}: {', '.join(said) or '–'}"


def best_of(trials: Iterable[Trial], metric: str) -> Trial | None:
    """Of the finished trials the highest; of equals, the earlier."""
    finished = [(value, t) for t in trials if t.status == "finished" and (value := t.value(metric)) is not None]
    return max(finished, key=lambda pair: (pair[0], -pair[1].number))[1] if finished else None


def counts(trials: Iterable[Trial]) -> str:
    """So many trials of each status, none left out."""
    statuses = [trial.status for trial in trials]
    said = [f"{n} {mark.words}" for status, mark in MARKS.items() if (n := statuses.count(status))]
    return f"{len(statuses)} trials: {', '.join(said) or 'none'}"


def thinned(trials: Sequence[Trial], metric: str, most: int) -> list[Trial]:
    """At most so many trials, evenly by rank, in their order: the best and the worst are among them."""
    if len(trials) <= most:
        return list(trials)

    def rank(trial: Trial) -> tuple[float, int]:
        value = trial.value(metric)
        return (-math.inf if value is None else value, trial.number)

    ranked = sorted(trials, key=rank)
    chosen = [ranked[round(i * (len(ranked) - 1) / (most - 1))] for i in range(most)]
    return sorted(chosen, key=lambda trial: trial.number)


# --- marks: one trace per status; what has no value is marked on the lower edge ------------------------------------


def shown_of(trials: Sequence[Trial], metric: str) -> dict[str, list[Trial]]:
    """The trials that are drawn, by status."""
    return {status: thinned([t for t in trials if t.status == status], metric, DRAWN) for status in MARKS}


def drawn_note(trials: Sequence[Trial]) -> str:
    """That not all are drawn, where that is so."""
    statuses = [trial.status for trial in trials]
    drawn = sum(min(DRAWN, statuses.count(status)) for status in MARKS)
    if drawn == len(trials):
        return ""
    return f" Of the trials {drawn:,} are drawn, up to {DRAWN:,} of a status, evenly by rank; the CSV has all."


def marks(search: Search, trials: Sequence[Trial], metric: str, x: Callable[[Trial], float]) -> Iterator[Any]:
    """Value against x, a trace per status, and a ring around the best; without a value: on the edge (`edge_axis`)."""
    import plotly.graph_objects as go

    for status, drawn in shown_of(trials, metric).items():
        mark = MARKS[status]
        among = f" of {n:,}" if (n := sum(t.status == status for t in trials)) > len(drawn) else ""
        shown = [t for t in drawn if t.value(metric) is not None]
        edge = [t for t in drawn if t.value(metric) is None]
        style = {"symbol": mark.symbol, "size": 8, "color": search.color if status == "finished" else GREY}
        kept = {"mode": "markers", "marker": style, "opacity": mark.opacity}
        if shown:
            yield go.Scatter(
                x=[x(t) for t in shown],
                y=[t.value(metric) for t in shown],
                text=[t.text for t in shown],
                name=f"{mark.words} ({len(shown):,}{among})",
                hovertemplate="%{text}<br>" + METRICS[metric] + " %{y:.2f} %<extra></extra>",
                **kept,
            )
        if edge:
            yield go.Scatter(
                x=[x(t) for t in edge],
                y=[0.02] * len(edge),
                yaxis="y2",
                text=[t.text for t in edge],
                name=f"{mark.words}, no value: on the edge ({len(edge):,}{among})",
                hovertemplate="%{text}<br>no value<extra></extra>",
                **kept,
            )
    best = best_of(trials, metric)
    if best is not None:
        ring = {"symbol": "circle-open", "size": 16, "color": search.color, "line": {"width": 2}}
        place = {"x": [x(best)], "y": [best.value(metric)]}
        yield go.Scatter(**place, mode="markers", marker=ring, name="the best finished", hoverinfo="skip")


def edge_axis() -> dict[str, Any]:
    """The second axis that the marks on the edge stand on; it does not move with the first."""
    return {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True}


def trials_note(search: Search, trials: Sequence[Trial], said: str) -> str:
    """What every figure of trials says: counts, spread, data set, budget, use of the test set."""
    read = sum(bool(t.row["test_read"]) for t in search.trials)
    test = f"{read} trials read test, which is not shown" if read else "no trial read test"
    return f"{said} {counts(trials)}; one run each, so without spread. {search.about}. Validation only; {test}."


# --- over epochs, and from trial to trial --------------------------------------------------------------------------

_Run = tuple[str, Row]


def learning_curves(search: Search, confirmed: Sequence[Row]) -> Part:
    """Validation accuracy after each epoch: all trials, and the confirmed runs."""
    import plotly.graph_objects as go

    title = "Learning curves: validation accuracy"
    kinds = [*((t.text, t.row) for t in search.trials), *((described(row), row) for row in confirmed)]
    points = {row["uid"]: curve_of(row) for _, row in kinds}
    if not any(points.values()):
        return Absent(title=title, reason="no run has finished an epoch, or diverged.")
    said = (
        "A line is a run; faded: stopped early; × at chance: diverged. In the colour of the rule: the best trial "
        f"(dashed) and {len(confirmed)} confirmed runs with fresh seeds (by status: {tally(confirmed)})."
        f"{drawn_note(search.trials)}"
    )
    shown = shown_of(search.trials, "val_acc")
    total = sum(len(points[t.row["uid"]]) for trials in shown.values() for t in trials)
    return Figure(
        title=title,
        note=trials_note(search, search.trials, said),
        plot=plot(
            _all_curves(search, shown, confirmed, go.Scatter if total <= SVG_POINTS else go.Scattergl),
            xaxis={"title": {"text": "epoch"}, "tickformat": "d", **({"dtick": 1} if search.epochs <= 12 else {})},
            yaxis={"title": {"text": "validation accuracy, %"}},
            showlegend=True,
        ),
        columns=("uid", "kind", "status", "seed", "epoch", "validation accuracy, %"),
        rows=[
            (row["uid"], row["kind"], row["status"], row["config"]["seed"], epoch, value)
            for _, row in kinds
            for epoch, value in points[row["uid"]]
        ],
    )


def curve_of(row: Row) -> list[tuple[float, float]]:
    """(epoch, validation accuracy in %); a diverged run ends at chance, in the epoch that it did not finish."""
    points = [(at["epoch"], 100 * at["val_acc"]) for at in row["history"] if "val_acc" in at]
    if row["status"] == "diverged" and "val_acc" in row["metrics"]:
        last = max((at["epoch"] for at in row["history"]), default=0)
        points.append((last + 1, 100 * row["metrics"]["val_acc"]))
    return points


def tally(rows: Iterable[Row]) -> str:
    """So many runs of each status."""
    statuses = [row["status"] for row in rows]
    return ", ".join(f"{n} {status}" for status in MARKS if (n := statuses.count(status))) or "none"


def _all_curves(
    search: Search, shown: Mapping[str, Sequence[Trial]], confirmed: Sequence[Row], made: Any
) -> Iterator[Any]:
    best = best_of(search.trials, "val_acc")
    faint = max(0.25, min(0.6, 30 / max(1, sum(map(len, shown.values())))))
    for status, mark in MARKS.items():
        runs = [(t.text, t.row) for t in shown[status] if t is not best]
        opacity = faint if status == "finished" else 0.6 * faint
        name = f"{mark.words} ({len(runs)})" if status != "finished" else f"other finished ({len(runs)})"
        style = {"line": {"color": GREY, "width": 1.5}, "marker": {"color": GREY, "size": 4}}
        yield from _curves(made, runs, f"trials: {name}", {**style, "opacity": opacity})
    if best is not None:
        style = {"line": {"color": search.color, "width": 3, "dash": "dash"}, "marker": {"color": search.color}}
        yield from _curves(made, [(best.text, best.row)], f"best trial: {best.number}", style)
    for rule in dict.fromkeys(row["config"]["rule"] for row in confirmed):
        runs = [(described(row), row) for row in confirmed if row["config"]["rule"] == rule]
        style = {key: value for key, value in rule_style(rule, size=6).items() if key in ("line", "marker")}
        yield from _curves(made, runs, f"{rule}, confirmed ({len(runs)})", style)


def _curves(made: Any, runs: Sequence[_Run], name: str, style: Mapping[str, Any]) -> Iterator[Any]:
    """One line for all of the runs, broken between them, and an × where one diverged."""
    x: list[float | None] = []
    y: list[float | None] = []
    text: list[str | None] = []
    for words, row in runs:
        points = curve_of(row)
        x += [*(epoch for epoch, _ in points), None]
        y += [*(value for _, value in points), None]
        text += [*(words for _ in points), None]
    hover = "%{text}<br>epoch %{x}: %{y:.2f} %<extra></extra>"
    if len(x) > len(runs):
        yield made(x=x, y=y, text=text, mode="lines+markers", name=name, legendgroup=name, hovertemplate=hover, **style)
    ends = [(words, curve_of(row)[-1]) for words, row in runs if row["status"] == "diverged" and curve_of(row)]
    if ends:
        yield made(
            x=[at for _, (at, _) in ends],
            y=[value for _, (_, value) in ends],
            text=[words for words, _ in ends],
            mode="markers",
            marker={"symbol": "x", "size": 9, "color": style["marker"]["color"]},
            legendgroup=name,
            showlegend=False,
            hovertemplate=hover,
        )


def optimisation_history(search: Search, metric: str) -> Part:
    """What each trial came to, in the order in which they were proposed, and the best so far."""
    import plotly.graph_objects as go

    title = f"Optimisation history: {METRICS[metric]}"
    if not search.trials:
        return Absent(title=title, reason="the search has no trial yet.")
    best = _running_best(search.trials, metric)
    turns = [i for i, value in enumerate(best) if i in (0, len(best) - 1) or value != best[i - 1]]
    steps = go.Scatter(
        x=[search.trials[i].number for i in turns],
        y=[best[i] for i in turns],
        mode="lines",
        line={"color": search.color, "width": 2, "shape": "hv"},
        name="best so far",
        hoverinfo="skip",
    )
    value = f"{METRICS[metric]}, %"
    return Figure(
        title=title,
        note=trials_note(
            search, search.trials, f"The line is the best of the finished trials so far.{drawn_note(search.trials)}"
        ),
        plot=plot(
            [steps, *marks(search, search.trials, metric, lambda t: t.number)],
            xaxis={"title": {"text": "trial"}, "tickformat": "d", "zeroline": False},
            yaxis={"title": {"text": value}},
            yaxis2=edge_axis(),
            showlegend=True,
        ),
        columns=("trial", "uid", "status", value, "best so far, %"),
        rows=[
            (t.number, t.row["uid"], t.status, t.value(metric), so_far)
            for t, so_far in zip(search.trials, best, strict=True)
        ],
    )


def _running_best(trials: Sequence[Trial], metric: str) -> list[float | None]:
    """The highest value of a finished trial up to each; None before there is one."""
    found: list[float | None] = []
    for trial in trials:
        before = found[-1] if found else None
        value = trial.value(metric) if trial.status == "finished" else None
        found.append(max((v for v in (before, value) if v is not None), default=None))
    return found
