"""The index of all pages: a table for each kind of study, and every search's confirmed accuracy in one figure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from bench.kinds import KINDS
from bench.looks import look
from bench.pages.matrix_points import NEUTRAL, cut, percent, said, seeds
from bench.pages.parts import Absent, Cell, Figure, Link, Page, Part, Section, Table, plot, whiskers

COLUMNS = ("study", "what", "result", "complete", "budget", "runs", "file changed")

FIRST = "bench search --rule sparse --arch resnet50"

#: In rows of the figure: from a group's heading to its first row, and from its last row to the next heading.
BELOW, ABOVE = 1.4, 0.6
#: CSS pixels of a row.
ROW = 20
#: Characters of a heading that a phone has room for.
WIDE = 36

TITLE = "Confirmed test accuracy of every search"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One study, and where its page is.

    ``href``: None while it has no page. ``runs``: counts by status. ``headline``: its result, with spread, n and
    verdict. ``when``: the ISO date of its last row. Of a search also ``rule``, ``arch``, ``dataset``, and
    ``test_acc``: mean, sd, n, low and high (shares in [0, 1]) of its best confirmed configuration, None without one.
    """

    name: str
    kind: str
    href: str | None
    what: str
    budget: str
    runs: str
    headline: str
    when: str
    complete: bool
    rule: str | None = None
    arch: str | None = None
    dataset: str | None = None
    test_acc: Mapping[str, Any] | None = None

    @property
    def group(self) -> str:
        """What searches must share to be compared."""
        return f"{self.arch} on {self.dataset}"


def index_page(entries: Sequence[Entry]) -> Page:
    """The page that leads to all others; without entries it says what to run first."""
    if not entries:
        reason = f"nothing has run yet: start with `{FIRST}`, then `bench report` makes its page and this one."
        nothing = Section(title="Studies", parts=[Absent(title="No study", reason=reason)])
        return Page(title="All studies", kind="index", facts={"studies": "0"}, sections=[nothing])
    by_kind = {kind: [entry for entry in entries if entry.kind == kind] for kind in KINDS}
    sections = [_section(kind, some) for kind, some in by_kind.items() if some]
    return Page(
        title="All studies",
        kind="index",
        facts={
            "studies": str(len(entries)),
            **{KINDS[kind].plural.lower(): str(len(some)) for kind, some in by_kind.items() if some},
            "not complete": str(sum(not entry.complete for entry in entries)),
            "file changed": max(entry.when for entry in entries),
        },
        sections=sections,
    )


def _section(kind: str, entries: Sequence[Entry]) -> Section:
    parts = [*(_accuracies(entries) if kind == "search" else ()), _table(kind, entries)]
    return Section(title=KINDS[kind].plural, parts=parts)


def _table(kind: str, entries: Sequence[Entry]) -> Table:
    """Newest first; equally new ones by name."""
    named = sorted(entries, key=lambda entry: entry.name)
    rows: list[tuple[Cell, ...]] = [
        (
            Link(text=entry.name, href=entry.href) if entry.href else entry.name,
            entry.what,
            _whole(entry.headline),
            "yes" if entry.complete else "no",
            _whole(entry.budget),
            _whole(entry.runs),
            entry.when,
        )
        for entry in sorted(named, key=lambda entry: entry.when, reverse=True)
    ]
    return Table(title=f"{KINDS[kind].plural}, newest first", columns=COLUMNS, rows=rows, texts=len(COLUMNS))


def _whole(text: str) -> str:
    """A narrow column breaks it after a comma or semicolon only, and never within an interval."""
    return re.sub(r"(?<![;,]) |(?<=,) (?=[-+])", "\u00a0", text)


# --- all searches in one figure -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A search and the row it stands in."""

    entry: Entry
    y: float


def _accuracies(searches: Sequence[Entry]) -> list[Part]:
    """A row for each rule, under a heading for each network and data set; the rules in the order of their accuracy."""
    measured = [entry for entry in searches if entry.test_acc]
    if not measured:
        reason = f"none of {len(searches)} searches has a confirmed test accuracy yet; they are in the table."
        return [Absent(title=TITLE, reason=reason)]
    places, headings = _rows(measured)
    named = {place.y: place.entry.rule for place in places}
    bottom = max(named) + 0.7
    drawn = plot(
        [_points(places)],
        xaxis={"title": {"text": "test %"}, "zeroline": False, "side": "bottom"},
        yaxis={
            "tickvals": list(named),
            "ticktext": list(named.values()),
            "tickfont": {"size": 11},
            "range": [bottom, -0.7],
            "zeroline": False,
        },
        annotations=[_heading(y, text) for y, text in headings],
        showlegend=False,
    )
    height = 90 + round(ROW * (bottom + 0.7))
    return [Figure(title=TITLE, note=_note(searches, measured), plot=drawn, height=height, **_data(searches))]


def _rows(entries: Sequence[Entry]) -> tuple[list[_Place], list[tuple[float, str]]]:
    """Where each search stands, and where each heading does. Searches of one rule and group share a row."""
    places: list[_Place] = []
    headings: list[tuple[float, str]] = []
    y = 0.0
    for group, some in groupby(sorted(entries, key=lambda e: e.group), key=lambda e: e.group):
        headings.append((y, group))
        y += BELOW
        by_rule: dict[str, list[Entry]] = {}
        for entry in sorted(some, key=_mean, reverse=True):
            by_rule.setdefault(str(entry.rule), []).append(entry)
        for same in by_rule.values():
            places += [_Place(entry=entry, y=y) for entry in same]
            y += 1
        y += ABOVE
    return places, headings


def _mean(entry: Entry) -> float:
    assert entry.test_acc is not None
    mean: float = entry.test_acc["mean"]
    return mean


def _points(places: Sequence[_Place]) -> Any:
    import plotly.graph_objects as go

    looks = [look(str(place.entry.rule)) for place in places]
    estimates = [place.entry.test_acc or {} for place in places]
    open_if = ["" if place.entry.complete else "-open" for place in places]
    colors = [one.color for one in looks]
    return go.Scatter(
        x=[100 * _mean(place.entry) for place in places],
        y=[place.y for place in places],
        mode="markers",
        error_x={**whiskers([cut(value) for value in estimates]), "color": NEUTRAL},
        marker={
            "color": colors,
            "symbol": [one.symbol.removesuffix("-open") + suffix for one, suffix in zip(looks, open_if, strict=True)],
            "size": 10,
            "line": {"color": colors, "width": 1.5},
        },
        hovertext=[_hover(place.entry) for place in places],
        hoverinfo="text",
    )


def _heading(y: float, text: str) -> dict[str, Any]:
    return {
        "text": f"<b>{text if len(text) <= WIDE else text.replace(' on ', '<br>on ')}</b>",
        "x": 0,
        "xref": "paper",
        "xanchor": "left",
        "xshift": -55,  # above the names of the rules
        "align": "left",
        "y": y,
        "yref": "y",
        "yanchor": "middle",
        "showarrow": False,
    }


def _hover(entry: Entry) -> str:
    value = entry.test_acc or {}
    sd = "" if value["sd"] is None else f", sd {100 * value['sd']:.2f}"
    return "<br>".join(
        [
            f"<b>{entry.name}</b>{'' if entry.complete else ' (not complete)'}",
            entry.what,
            f"test {said(value)}{sd}",
            entry.headline,
            f"budget: {entry.budget}",
            f"runs: {entry.runs}",
            entry.when,
        ]
    )


def _note(searches: Sequence[Entry], measured: Sequence[Entry]) -> str:
    budgets = {entry.budget for entry in measured}
    differ = f"Budgets differ ({len(budgets)} of them, in the hover and the CSV), which makes no fair comparison."
    budget = f"Budget of all: {measured[0].budget}." if len(budgets) == 1 else differ
    return (
        "Best confirmed configuration of each search, chosen by validation: mean and 95 % interval (cut at 0 and "
        f"100 %), {seeds([entry.test_acc for entry in measured])}; test was read once per confirmed run, and orders "
        f"the rows, but chose nothing. Open: not complete. {budget} Searches: {len(measured)}; without a confirmed "
        f"accuracy, in the table and the CSV only: {len(searches) - len(measured)}."
    )


def _data(searches: Sequence[Entry]) -> dict[str, Any]:
    """All searches, those without an accuracy too."""
    numbers = ("mean", "sd", "low", "high")
    columns = ("network", "data set", "rule", *(f"test % {name}" for name in numbers), "n", "budget", "runs")
    rows = []
    for entry in sorted(searches, key=lambda e: (e.group, -_mean(e) if e.test_acc else 1.0, e.name)):
        estimate = [percent(entry.test_acc, name) for name in (*numbers, "n")]
        row = [entry.arch, entry.dataset, entry.rule, *estimate, entry.budget, entry.runs]
        rows.append([*row, int(entry.complete), entry.when, entry.name])
    return {"columns": (*columns, "complete", "last row", "study"), "rows": rows}
