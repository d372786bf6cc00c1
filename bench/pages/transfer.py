"""The page of a transfer: what a move costs, from where to where, and whether configurations keep their order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.cells import NOTHING, interval
from bench.looks import GREY
from bench.pages.bars import Bar, bars
from bench.pages.parts import SHARES, Absent, Figure, Page, Part, Section, Table, plot, rule_style
from bench.pages.portability import portability_section
from bench.pages.transfer_notes import ENDS, TEST, VALIDATION, ends, key, losses, note, pairs_of, said, seeds
from bench.robustness_words import SEVERAL
from bench.transfer_words import (
    PAIR_COLUMNS,
    PAIRS_CAPTION,
    RANKING_CAPTION,
    RANKING_COLUMNS,
    matrices,
    pair_rows,
    ranking_rows,
)


def transfer_page(summary: Mapping[str, Any]) -> Page:
    """All that a transfer says, of the summary that `bench transfer` keeps as ``summary.json``."""
    sections = (
        [_costs(summary), portability_section(summary), _order(summary), _pairs(summary)] if summary["pairs"] else []
    )
    return Page(
        title=f"{summary['study']}: {', '.join(summary['archs'])} on {summary['dataset']}",
        kind="transfer",
        facts=_facts(summary),
        sections=sections,
        lines=_lines(summary),
    )


def _facts(summary: Mapping[str, Any]) -> dict[str, str]:
    return {
        "Data set": summary["dataset"],
        "Networks": ", ".join(summary["archs"]) or NOTHING,
        "Rules": ", ".join(dict.fromkeys(rule for rule, _ in matrices(summary))) or NOTHING,
        "Search spaces": ", ".join(dict.fromkeys(space for _, space in matrices(summary))) or NOTHING,
        "Budget of a search": f"{summary['trials']} trials × {summary['epochs']} epochs",
        "Carried over": f"the best and {summary['configs']} more configurations",
        **({"Searches that are not there": ", ".join(summary["missing"])} if summary.get("missing") else {}),
        "Runs beside the searches": ", ".join(f"{n} {status}" for status, n in summary["runs"].items()),
    }


# --- sentences -----------------------------------------------------------------------------------------------------

_VERDICTS = {
    "lower": "what was found elsewhere does worse than the network's own best",
    "higher": "what was found elsewhere does better than the network's own best",
    "not distinguishable": "not distinguishable from the network's own best at this n",
}


def _lines(summary: Mapping[str, Any]) -> list[str]:
    lines = [] if summary["complete"] else ["The transfer is not complete: what stands here may change."]
    if not summary["pairs"]:
        return [*lines, "No pair of networks is known yet."]
    lines += [_sentence(found, summary) for found in summary["rules"]]
    several = sum(found["regret"]["test_acc"] is not None for found in summary["rules"]) > 1
    return [*lines, SEVERAL] if several else lines


def _sentence(found: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    name, regret = f"{found['rule']}, {found['space']}", found["regret"]["test_acc"]
    mine = pairs_of(summary, found["rule"], found["space"])
    if regret is None:
        return f"{name}: no regret: {'; '.join(dict.fromkeys(pair['reason'] for pair in mine if pair['reason']))}."
    same = sum(pair["same"] for pair in mine)
    if same == len(mine):
        return f"{name}: the searches of both networks chose the same in every pair: there is nothing to regret."
    alike = f"; in {same} of {len(mine)} pairs both searches chose the same, a regret of 0" if same else ""
    return (
        f"{name}: mean regret {interval(regret)} points over {_counted(found)} (n = {regret['n']}): "
        f"{_VERDICTS[regret['verdict']]}{alike}."
    )


def _counted(found: Mapping[str, Any]) -> str:
    """Over how many pairs a mean regret is, and of how many."""
    measured, given = found["regret"]["test_acc"]["pairs"], found["pairs"]
    if measured < given:
        return f"{measured} of {given} pairs"
    return "1 pair" if given == 1 else f"{given} pairs"


# --- what a move costs ---------------------------------------------------------------------------------------------


def _costs(summary: Mapping[str, Any]) -> Section:
    ranking = Table(
        title="By portability",
        columns=RANKING_COLUMNS,
        rows=ranking_rows(summary),
        notes=RANKING_CAPTION,
        texts=3,
    )
    return Section(title="What a move costs", parts=[ranking, _regrets(summary), _lost_shares(summary)])


def _ranked(summary: Mapping[str, Any]) -> list[tuple[str, str, list[Mapping[str, Any]]]]:
    """Rule, space and pairs, in the order of the ranking."""
    return [(f["rule"], f["space"], pairs_of(summary, f["rule"], f["space"])) for f in summary["rules"]]


def _regrets(summary: Mapping[str, Any]) -> Figure:
    """Test regret of every pair, by rule and space."""
    groups = [(rule, space, [_regret_bar(pair) for pair in pairs]) for rule, space, pairs in _ranked(summary)]
    estimates = [pair["regret"]["test_acc"] for pair in summary["pairs"]]
    columns = ("rule", "space", "from", "to", *ENDS, "verdict", "same", "reason")
    return bars(
        groups,
        title="Regret of every pair",
        axis="regret on test, points",
        note=f"{note(summary)}; {seeds(estimates)}; {TEST}; {losses(summary['pairs'])}. Regret: test accuracy of "
        "the target's own best − that of the source's best on the target, paired by seed: right of 0, the move costs. "
        "Faded bars: a moved run diverged.",
        columns=columns,
        rows=[
            (*key(pair), *ends(pair["regret"]["test_acc"]), _verdict(pair), pair["same"], pair["reason"])
            for pair in summary["pairs"]
        ],
    )


def _verdict(pair: Mapping[str, Any]) -> str | None:
    return (pair["regret"]["test_acc"] or {}).get("verdict")


def _regret_bar(pair: Mapping[str, Any]) -> Bar:
    regret, label = pair["regret"]["test_acc"], (pair["source"], pair["target"])
    if regret is None or pair["same"]:
        return Bar(label=label, estimate=None, mark="0: the same" if regret else "none", said=said(pair))
    return Bar(label=label, estimate=regret, said=said(pair), faded=pair["moved"]["diverged"] > 0)


def _lost_shares(summary: Mapping[str, Any]) -> Part:
    """How many of the source's best quarter came to nothing on the target."""
    title = "Lost share of every pair"
    if not any(pair["lost"]["of"] for pair in summary["pairs"]):
        return Absent(title=title, reason="no pair has a configuration above chance at home that was run away yet.")
    groups = [(rule, space, [_lost_bar(pair) for pair in pairs]) for rule, space, pairs in _ranked(summary)]
    gaps = {
        name: sum(pair["lost"][name] for pair in summary["pairs"]) for name in ("failed", "missing", "nothing_to_lose")
    }
    names = ("share", "low", "high", "count", "of", "top", *gaps)
    return bars(
        groups,
        title=title,
        axis="lost, % of the best quarter",
        note=f"{note(summary)}; {VALIDATION}. Of the source's best quarter of configurations, how many diverge or fall "
        f"to chance on the target, with the exact 95 % interval. Not counted: {gaps['failed']} failed, "
        f"{gaps['missing']} missing, {gaps['nothing_to_lose']} at chance at home.",
        columns=("rule", "space", "from", "to", *names),
        rows=[(*key(pair), *(pair["lost"][name] for name in names)) for pair in summary["pairs"]],
        span=(0.0, 101.0),
    )


def _lost_bar(pair: Mapping[str, Any]) -> Bar:
    lost, label = pair["lost"], (pair["source"], pair["target"])
    if not lost["of"]:
        return Bar(label=label, estimate=None, mark="none", said="no configuration above chance at home")
    estimate = {"mean": lost["share"], "low": lost["low"], "high": lost["high"]}
    text = f"{lost['count']} of {lost['of']} lost [{100 * lost['low']:.0f}, {100 * lost['high']:.0f}] %"
    return Bar(label=label, estimate=estimate, said=text)


# --- order ---------------------------------------------------------------------------------------------------------


def _order(summary: Mapping[str, Any]) -> Section:
    """For every pair of networks and space: what the same configurations reach on both."""
    values = [100 * v for pair in summary["pairs"] for point in pair["rank"].get("points", ()) for v in point]
    span = (min(values, default=0.0) - 3, max(values, default=100.0) + 3)
    routes = dict.fromkeys((pair["space"], pair["source"], pair["target"]) for pair in summary["pairs"])
    lines = ["Where the points rise together, a search on one network serves the other. The line: as good on both."]
    return Section(
        title="The same configurations on both", lines=lines, parts=[_scatter(summary, *r, span) for r in routes]
    )


def _scatter(summary: Mapping[str, Any], space: str, source: str, target: str, span: tuple[float, float]) -> Part:
    title = f"{source} → {target}, {space}"
    pairs = [p for p in summary["pairs"] if (p["space"], p["source"], p["target"]) == (space, source, target)]
    drawn = [pair for pair in pairs if pair["rank"].get("points")]
    if not drawn:
        older = any("points" not in pair["rank"] for pair in pairs)
        reason = (
            "this summary is from before points were kept; give the same command again: what is known is not run anew."
        )
        return Absent(title=title, reason=reason if older else "no configuration has an accuracy on both.")
    counts = {
        name: sum(pair["rank"][name] for pair in pairs) for name in ("diverged_home", "diverged", "failed", "missing")
    }
    return Figure(
        title=title,
        note=f"{note(summary)}; {VALIDATION}; n is the number of configurations, ρ is Spearman's with its 95 % "
        f"interval. {counts['diverged_home']} diverged on {source} and {counts['diverged']} on {target}: they stand at "
        f"chance; {counts['failed']} failed and {counts['missing']} are missing: they have no point.",
        plot=plot(
            [_identity(span), *(_points(pair) for pair in drawn)],
            xaxis=_accuracy_axis(source, span),
            yaxis=_accuracy_axis(target, span),
            showlegend=True,
        ),
        unit=SHARES,
        columns=("rule", "space", "from", "to", "home_val_acc", "away_val_acc"),
        rows=[(*key(pair), home, away) for pair in drawn for home, away in pair["rank"]["points"]],
        height=420 + 20 * len(drawn),
    )


def _accuracy_axis(arch: str, span: tuple[float, float]) -> dict[str, Any]:
    return {"title": {"text": f"validation accuracy<br>on {arch}, %"}, "zeroline": False, "range": span}


def _identity(span: tuple[float, float]) -> Any:
    import plotly.graph_objects as go

    line = {"color": GREY, "width": 1.5, "dash": "dot"}
    return go.Scatter(x=span, y=span, mode="lines", line=line, name="equal", hoverinfo="skip")


def _points(pair: Mapping[str, Any]) -> Any:
    import plotly.graph_objects as go

    rank, style = pair["rank"], rule_style(pair["rule"], size=10)
    rho = "no ρ" if rank["rho"] is None else f"ρ {interval(rank, 1, 2, name='rho')}"
    points = rank["points"]
    return go.Scatter(
        **style | {"name": f"{pair['rule']}: {rho} (n {rank['n']})"},
        x=[100 * home for home, _ in points],
        y=[100 * away for _, away in points],
        mode="markers",
        text=[_both(pair, *point) for point in points],
        hovertemplate="%{text}<extra></extra>",
    )


def _both(pair: Mapping[str, Any], home: float, away: float) -> str:
    return f"<b>{pair['rule']}</b><br>{pair['source']} {100 * home:.2f} %<br>{pair['target']} {100 * away:.2f} %"


def _pairs(summary: Mapping[str, Any]) -> Section:
    table = Table(title="Pairs", columns=PAIR_COLUMNS, rows=pair_rows(summary), notes=PAIRS_CAPTION, texts=3)
    return Section(title="Every pair", parts=[table])
