"""The page of a robustness measurement: per site its curves and paired differences; the fronts; the verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from bench.cells import NOTHING, interval
from bench.front import pareto_front
from bench.looks import BLACK, GREY
from bench.pages.levels import axis, middle, place, strokes
from bench.pages.parts import SHARES, Absent, Figure, Page, Part, Section, Table, band, plot, rule_style, whiskers
from bench.robustness_words import (
    CAPTION,
    NO_NOISE,
    SEVERAL,
    curve_columns,
    curve_rows,
    draws_line,
    origin,
    table_columns,
    table_rows,
    verdict_lines,
)

#: More sentences than these stand in the sections of their sites, not at the top.
_FEW = 8

_ENDS = ("mean", "sd", "low", "high")
_COUNTED = ("draws", "draw_se", "diverged", "failed")


def robustness_page(summary: Mapping[str, Any]) -> Page:
    """All that a measurement says, of the summary that `bench robustness` keeps as ``summary.json``."""
    sections = [_site_section(site, summary) for site in summary["sites"]]
    fronts = [_front(site, summary) for site in summary["sites"] if not site["true_site"]]
    if fronts:
        sections.append(Section(title="Pareto fronts", lines=_FRONT_LINES, parts=fronts))
    sections.append(Section(title="Rules", parts=[_rules(summary)]))
    return Page(
        title=f"{summary['study']}: {summary['arch']} on {summary['dataset']}",
        kind="robustness",
        facts=_facts(summary),
        sections=sections,
        lines=_lines(summary),
    )


_FRONT_LINES = (
    "Further right is better without noise, further up is better with it. The stair joins the rules that no other "
    "surpasses in both means; rules whose intervals overlap may trade places on it. Areas depend on the levels: those "
    "of two sites are not comparable. An attack through B has no front: its gradient is not the network's own.",
)


def _facts(summary: Mapping[str, Any]) -> dict[str, str]:
    tested = dict.fromkeys(f"{site['tested']}" for site in summary["sites"])
    return {
        "Data set": summary["dataset"],
        "Network": summary["arch"],
        "Budget": f"{summary['epochs']} epochs a training",
        "Seeds": f"{len(summary['seeds'])} ({', '.join(map(str, summary['seeds']))})",
        "Test examples": ", ".join(tested) or NOTHING,
        "Runs": ", ".join(f"{n} {status}" for status, n in summary["runs"].items()),
        **({"Not shown": f"{other} runs at levels of another grid"} if (other := summary.get("other_levels")) else {}),
    }


def _lines(summary: Mapping[str, Any]) -> list[str]:
    if not summary["sites"]:
        return ["Nothing is measured yet."]
    if not summary["complete"]:
        return ["Not all is measured yet: there are no verdicts, and what stands here may change."]
    return ["The verdicts stand with their sites, below.", SEVERAL] if _many(summary) else verdict_lines(summary)


def _many(summary: Mapping[str, Any]) -> bool:
    return bool(summary["complete"]) and len(verdict_lines(summary)) > _FEW


def _rules(summary: Mapping[str, Any]) -> Table:
    rows = [
        (rule, ", ".join(f"{name} {value:.3g}" for name, value in values.items()) or NOTHING)
        for rule, values in summary["coefficients"].items()
    ]
    return Table(title="Coefficients, the same at every level", columns=("rule", "coefficients"), rows=rows)


# --- one site ------------------------------------------------------------------------------------------------------


def _site_section(site: Mapping[str, Any], summary: Mapping[str, Any]) -> Section:
    """Figures and tables of one site; before its first level is measured there is nothing to draw."""
    name = site["site"]
    if not site["levels"]:
        return Section(title=name, parts=[Absent(title="Accuracy", reason=f"{name} was measured at no level yet.")])
    symbol = f"{site['symbol']}: {site['unit']}"
    curves = Table(
        title=f"{name}: accuracy, %",
        columns=curve_columns(site),
        rows=curve_rows(site),
        notes=[CAPTION, *filter(None, (symbol, draws_line(site)))],
        texts=0,
    )
    areas = Table(
        title=f"{name}: area under the curve",
        columns=table_columns(site),
        rows=table_rows(site),
        notes=[CAPTION, _note(summary, site)],
        texts=1,
    )
    lines = [line for line in verdict_lines({"sites": [site]}) if line != SEVERAL] if _many(summary) else []
    parts = [_accuracies(site, summary), _differences(site, summary), curves, areas]
    return Section(title=name, lines=lines, parts=parts)


def _note(summary: Mapping[str, Any], site: Mapping[str, Any]) -> str:
    """What a figure of this site is of."""
    return f"{summary['arch']}, {summary['dataset']}, {summary['epochs']} epochs; {origin(summary, site)}."


def _spread(summary: Mapping[str, Any]) -> str:
    return (
        " Bands and whiskers: 95 % intervals, each by itself; bands between 0 and 100 %."
        if len(summary["seeds"]) > 1
        else ""
    )


def _level_line(y: float, color: str, dash: str) -> dict[str, Any]:
    line = {"color": color, "width": 1.5, "dash": dash}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": line}


def _height(site: Mapping[str, Any]) -> int:
    """Room for a legend below, as a phone has it."""
    return 400 + 12 * len(site["rules"])


# --- accuracy ------------------------------------------------------------------------------------------------------


def _accuracies(site: Mapping[str, Any], summary: Mapping[str, Any]) -> Figure:
    """Mean and 95 % interval over seeds at every level; the network without noise stands before the break."""
    traces = [trace for found in site["rules"] for trace in _curve_traces(site, found, summary)]
    chance = 100 * site["chance"]
    label = {"text": "chance", "x": middle(site["levels"]), "y": chance, "yanchor": "bottom"}
    open_ = " Open marks: a run diverged there." if site["counts"]["diverged"] else ""
    spared = [found["rule"] for found in site["rules"] if found["unaffected"]]
    none = f" No noise gets to {', '.join(spared)}: clean accuracy alone." if spared else ""
    return Figure(
        title=f"{site['site']}: accuracy against {site['symbol']}",
        note=f"{_note(summary, site)}{_spread(summary)}{open_}{none}",
        plot=plot(
            traces,
            xaxis=axis(site),
            showlegend=True,
            yaxis={"title": {"text": "accuracy, %"}, "range": [0, 103]},
            shapes=[_level_line(chance, GREY, "dot"), *strokes(site["levels"])],
            annotations=[{**label, "showarrow": False, "font": {"color": GREY, "size": 11}}],
        ),
        unit=SHARES,
        columns=("rule", "level", "n", *_ENDS, *_COUNTED),
        rows=[
            (found["rule"], at["level"], at["n"], *_ends(at["acc"]), *(at.get(name) for name in _COUNTED))
            for found in site["rules"]
            for at in _levels(found)
        ],
        height=_height(site),
    )


def _levels(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The levels that have an accuracy or lost one, the clean one first."""
    clean = found["clean"]
    return [*([{"level": 0.0, "n": clean["n"], "acc": clean}] if clean else []), *found["curve"]]


def _curve_traces(site: Mapping[str, Any], found: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterable[Any]:
    """The band, and the marks with their lines; no line crosses the break, or a level without an accuracy."""
    import plotly.graph_objects as go

    clean, *curve = _levels(found) if found["clean"] else [None, *found["curve"]]
    noisy = [at for at in curve if at["acc"]]
    if any(at["acc"]["low"] is not None for at in noisy):
        low, high = ([min(100, max(0, 100 * _end(at["acc"], end))) for at in noisy] for end in ("low", "high"))
        yield band([place(at["level"], site["levels"]) for at in noisy], low, high, found["rule"])
    marks = [clean, None, *(at if at["acc"] else None for at in curve)]
    style = rule_style(found["rule"])
    changes: dict[str, Any] = {"marker": _open_where([bool(at and at.get("diverged")) for at in marks], style)}
    if found["unaffected"]:
        changes["name"] = f"{found['rule']}, {NO_NOISE}"
    if clean:
        changes["error_y"] = whiskers([clean["acc"]]) | {"color": style["line"]["color"]}
    yield go.Scatter(
        **style | changes,
        x=[at and place(at["level"], site["levels"]) for at in marks],
        y=[at and 100 * at["acc"]["mean"] for at in marks],
        text=[at and _said(site, found, summary, at) for at in marks],
        mode="lines+markers",
        hovertemplate="%{text}<extra></extra>",
    )


def _end(value: Mapping[str, Any], end: str) -> float:
    """An unknown interval (n = 1) has no width."""
    return float(value["mean"] if value[end] is None else value[end])


def _ends(value: Mapping[str, Any] | None) -> list[Any]:
    return [value and value[name] for name in _ENDS]


def _open_where(flags: Sequence[bool], style: Mapping[str, Any]) -> dict[str, Any]:
    """A marker, open where the flag is up. A symbol that is always open becomes a circle there."""
    symbol, size, color = style["marker"]["symbol"], style["marker"]["size"], style["line"]["color"]
    open_ = "circle-open" if symbol.endswith("-open") else f"{symbol}-open"
    return {
        "color": color,
        "symbol": [open_ if flag else symbol for flag in flags],
        "size": [size + 3 if flag else size for flag in flags],
        "line": {"color": color, "width": 2},
        "opacity": 1,  # Plotly fades marks of several sizes
    }


def _said(site: Mapping[str, Any], found: Mapping[str, Any], summary: Mapping[str, Any], at: Mapping[str, Any]) -> str:
    """All that is known of one point, for the reader who hovers over it."""
    lines = [f"<b>{found['rule']}</b>, {site['symbol']} = {at['level']:g}", f"{_percent(at['acc'])} (n {at['n']})"]
    lines += [f"{at[name]} {name}" for name in ("diverged", "failed") if at.get(name)]
    lines += [f"{at['draws']} draws a network"] if (at.get("draws") or 1) > 1 else []
    values = summary["coefficients"].get(found["rule"], {})
    return "<br>".join([*lines, *(f"{name} {value:.3g}" for name, value in values.items())])


def _percent(value: Mapping[str, Any]) -> str:
    ends = "" if value["low"] is None else f" [{100 * value['low']:.2f}, {100 * value['high']:.2f}]"
    return f"{100 * value['mean']:.2f} %{ends}"


# --- paired differences --------------------------------------------------------------------------------------------


def _differences(site: Mapping[str, Any], summary: Mapping[str, Any]) -> Part:
    """One mark and interval per rule and level, side by side; or why there is none."""
    compared = [found for found in site["rules"] if any(at["versus"] for at in found["curve"])]
    title = f"{site['site']}: difference to {site['reference']}"
    if not compared:
        return Absent(title=title, reason=_not_compared(site))
    levels = site["levels"]
    gap = 0.6 * min(place(b, levels) - place(a, levels) for a, b in pairwise((0.0, *levels))) / len(compared)
    most = (len(compared) - 1) / 2
    left_out = [f["rule"] for f in site["rules"] if f not in compared and f["rule"] != site["reference"]]
    missing = f" Not compared: {', '.join(left_out)}." if left_out else ""
    traces = [_difference_trace(site, found, gap * (i - most)) for i, found in enumerate(compared)]
    return Figure(
        title=title,
        note=f"{_note(summary, site)} Rule − {site['reference']}, paired by seed.{_spread(summary)} "
        f"Marks at one level stand side by side.{missing}",
        plot=plot(
            traces,
            xaxis=axis(site, beside=gap * most),
            showlegend=True,
            yaxis={"title": {"text": f"rule − {site['reference']}, points"}, "zeroline": False},
            shapes=[_level_line(0, BLACK, "solid"), *strokes(levels)],
        ),
        unit=SHARES,
        columns=("rule", "level", "n", *_ENDS, "verdict"),
        rows=[
            (found["rule"], level, v["n"], *_ends(v), v["verdict"])
            for found in compared
            for level, v in _pairs_at(found)
        ],
        height=_height(site) - 40,
    )


def _not_compared(site: Mapping[str, Any]) -> str:
    """Why no level has a difference."""
    reference, rules = site["reference"], [found["rule"] for found in site["rules"]]
    if site["true_site"]:
        return (
            "an attack by another gradient than the network's own shows how far that one misleads, not robustness: "
            f"accuracy is not compared with {reference}, but with {site['true_site']} (see the verdicts)."
        )
    if reference not in rules:
        return f"{reference} was not measured here; add it to the rules."
    if rules == [reference]:
        return f"only {reference} was measured here."
    return f"no rule has a level and a seed in common with {reference}."


def _pairs_at(found: Mapping[str, Any]) -> list[tuple[float, Mapping[str, Any]]]:
    """(level, difference) where there is one, the clean one first."""
    at = [(0.0, found["clean_versus"]), *((level["level"], level["versus"]) for level in found["curve"])]
    return [(level, versus) for level, versus in at if versus]


def _difference_trace(site: Mapping[str, Any], found: Mapping[str, Any], shift: float) -> Any:
    import plotly.graph_objects as go

    at, style = _pairs_at(found), rule_style(found["rule"], size=7)
    return go.Scatter(
        **style,
        x=[place(level, site["levels"]) + shift for level, _ in at],
        y=[100 * versus["mean"] for _, versus in at],
        mode="markers",
        error_y=whiskers([versus for _, versus in at]) | {"color": style["line"]["color"]},
        text=[
            f"<b>{found['rule']} − {site['reference']}</b>, {site['symbol']} = {level:g}<br>"
            f"{interval(versus)} points (n {versus['n']})<br>{versus['verdict']}"
            for level, versus in at
        ],
        hovertemplate="%{text}<extra></extra>",
    )


# --- fronts --------------------------------------------------------------------------------------------------------


def _front(site: Mapping[str, Any], summary: Mapping[str, Any]) -> Part:
    """Clean accuracy and area of every rule that has both, and the front of their means."""
    shown = [found for found in site["rules"] if found["clean"] and found["area"]]
    title = f"{site['site']}: clean accuracy and accuracy {_condition(site)}"
    if not shown:
        return Absent(title=title, reason=f"no rule has an accuracy without noise and at two levels of {site['site']}.")
    points = [(found["clean"]["mean"], found["area"]["mean"]) for found in shown]
    front = pareto_front(points)
    traces = [_stair([points[i] for i in front]), *(_front_trace(found, i in front) for i, found in enumerate(shown))]
    left_out = [found["rule"] for found in site["rules"] if found not in shown]
    missing = f" Without an area, and so not shown: {', '.join(left_out)}." if left_out else ""
    return Figure(
        title=title,
        note=f"{_note(summary, site)} Area: mean accuracy over the levels {site['levels'][0]:.3g} to "
        f"{site['levels'][-1]:.3g} on a log axis, of the seeds that have all.{_spread(summary)} "
        f"Open marks: a run diverged.{missing}",
        plot=plot(
            traces,
            xaxis={"title": {"text": "clean accuracy, %"}, "zeroline": False},
            showlegend=True,
            yaxis={"title": {"text": f"accuracy {_condition(site)} (area), %"}, "zeroline": False},
        ),
        unit=SHARES,
        columns=("rule", *(f"{name}_{end}" for name in ("clean", "area") for end in ("n", *_ENDS)), "on_front"),
        rows=[
            (e["rule"], *(x for name in ("clean", "area") for x in (e[name]["n"], *_ends(e[name]))), i in front)
            for i, e in enumerate(shown)
        ],
        height=_height(site),
    )


def _condition(site: Mapping[str, Any]) -> str:
    return "under attack" if site["floor"] < site["chance"] else "under noise"


def _stair(points: Sequence[tuple[float, float]]) -> Any:
    """The edge of what the front's points, by their first value, best first, surpass."""
    import plotly.graph_objects as go

    return go.Scatter(
        x=[100 * x for x, _ in points],
        y=[100 * y for _, y in points],
        mode="lines",
        line={"color": GREY, "width": 1.5, "dash": "dot", "shape": "hv"},
        name="front",
        hoverinfo="skip",
    )


def _front_trace(found: Mapping[str, Any], best: bool) -> Any:
    import plotly.graph_objects as go

    style, clean, area = rule_style(found["rule"], size=10), found["clean"], found["area"]
    marker = _open_where([bool(found["diverged"])], style)
    color = {"color": style["line"]["color"]}
    lines = [f"<b>{found['rule']}</b>{', on the front' if best else ''}", f"clean {_percent(clean)} (n {clean['n']})"]
    lines += [f"area {_percent(area)} (n {area['n']})"]
    lines += [f"{found[name]} {name}" for name in ("diverged", "failed", "incomplete") if found[name]]
    return go.Scatter(
        **style | {"marker": marker},
        x=[100 * clean["mean"]],
        y=[100 * area["mean"]],
        mode="markers",
        error_x=whiskers([clean]) | color,
        error_y=whiskers([area]) | color,
        text=["<br>".join(lines)],
        hovertemplate="%{text}<extra></extra>",
    )
