"""The page of a measurement of shares: what B loses where it sees a part of each batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.cells import NOTHING, interval
from bench.fractions_words import COLUMNS, rows_of, sentence
from bench.looks import BLACK
from bench.pages.parts import SHARES, Absent, Figure, Page, Part, Section, Table, plot, rule_style, whiskers
from bench.robustness_words import SEVERAL

_ENDS = ("mean", "sd", "n", "low", "high")


def fractions_page(summary: Mapping[str, Any]) -> Page:
    """All that a measurement says, of the summary that `bench speed --fractions` keeps as ``summary.json``."""
    rules = summary["rules"]
    tables = [
        Table(title=rule, columns=COLUMNS, rows=rows_of(found), notes=[_note(summary)], texts=0)
        for rule, found in rules.items()
    ]
    lines = [] if summary["complete"] else ["Not all is trained yet: what stands here may change."]
    lines += [sentence(rule, found) for rule, found in rules.items()]
    return Page(
        title=f"{summary['study']}: {summary['arch']} on {summary['dataset']}",
        kind="fractions",
        facts=_facts(summary),
        sections=[Section(title="What a part of the batch costs", parts=[_losses(summary), *tables]), _used(rules)],
        lines=[*lines, SEVERAL],
    )


def _facts(summary: Mapping[str, Any]) -> dict[str, str]:
    return {
        "Data set": summary["dataset"],
        "Network": summary["arch"],
        "Budget": f"{summary['epochs']} epochs a training, batches of {summary['batch_size']}",
        "Seeds": f"{len(summary['seeds'])} ({', '.join(map(str, summary['seeds']))})",
        "Runs": ", ".join(f"{n} {status}" for status, n in summary["runs"].items() if n) or "none",
    }


def _note(summary: Mapping[str, Any]) -> str:
    return (
        f"{summary['arch']}, {summary['dataset']}, {summary['epochs']} epochs; {len(summary['seeds'])} seeds, "
        "differences paired by seed; validation only, test was not read; diverged runs count at chance"
    )


def _losses(summary: Mapping[str, Any]) -> Part:
    """Each rule's difference from the whole batch, against the share."""
    title = "Accuracy less that of the whole batch"
    drawn = {
        rule: [line for line in found["lines"] if line["versus_whole"]] for rule, found in summary["rules"].items()
    }
    if not any(drawn.values()):
        return Absent(title=title, reason="no share and the whole batch were trained with the same seed yet.")
    zero = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 0, "y1": 0, "line": {"color": BLACK, "width": 1}}
    shares = sorted({line["fraction"] for lines in drawn.values() for line in lines})
    return Figure(
        title=title,
        note=f"{_note(summary)}. Whiskers: 95 % intervals, each by itself; below 0, the part is worse.",
        plot=plot(
            [_trace(rule, lines) for rule, lines in drawn.items() if lines],
            xaxis={
                "title": {"text": "share of each batch that B sees"},
                "type": "log",
                "tickvals": shares,
                "ticktext": [f"{share:g}" for share in shares],
                "zeroline": False,
            },
            yaxis={"title": {"text": "difference, points"}, "zeroline": False},
            shapes=[zero],
            showlegend=True,
        ),
        unit=SHARES,
        columns=("rule", "share", *_ENDS, "verdict"),
        rows=[
            (rule, line["fraction"], *(line["versus_whole"][name] for name in _ENDS), line["versus_whole"]["verdict"])
            for rule, lines in drawn.items()
            for line in lines
        ],
    )


def _trace(rule: str, lines: Sequence[Mapping[str, Any]]) -> Any:
    import plotly.graph_objects as go

    differences = [line["versus_whole"] for line in lines]
    return go.Scatter(
        **rule_style(rule, size=9),
        x=[line["fraction"] for line in lines],
        y=[100 * each["mean"] for each in differences],
        error_y=whiskers(differences),
        mode="lines+markers",
        text=[
            f"<b>{rule}</b>, share {line['fraction']:g}<br>{interval(line['versus_whole'])} points "
            f"(n {line['versus_whole']['n']}), {line['versus_whole']['verdict']}"
            for line in lines
        ],
        hovertemplate="%{text}<extra></extra>",
    )


def _used(rules: Mapping[str, Any]) -> Section:
    rows = [
        (rule, ", ".join(f"{name} {value:.3g}" for name, value in found["config"]["coefficients"].items()) or NOTHING)
        for rule, found in rules.items()
    ]
    table = Table(title="Coefficients, the same at every share", columns=("rule", "coefficients"), rows=rows)
    return Section(title="Rules", parts=[table])
