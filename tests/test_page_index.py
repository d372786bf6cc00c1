"""The index: every study once, newest first, searches in one figure; what has no accuracy is counted, not dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from bench.looks import look
from bench.pages.index import COLUMNS, FIRST, Entry, index_page
from bench.pages.parts import Absent, Figure, Link, Page, Table
from bench.pages.render import render
from bench.statistics import estimate


def search(rule: str, accuracies: Sequence[float], arch: str = "resnet18", **more: Any) -> Entry:
    given: dict[str, Any] = {
        "name": f"{rule}-{arch}-digits",
        "kind": "search",
        "href": f"{rule}-{arch}.html",
        "what": f"{rule} on {arch}, digits",
        "budget": "8 trials × 3 epochs",
        "runs": "7 finished, 1 diverged",
        "headline": "test 60.00 ± 1.00 (n 3) %; − backprop: -2.00 [-4.00, -0.10] worse",
        "when": "2025-11-20",
        "complete": True,
        "rule": rule,
        "arch": arch,
        "dataset": "digits",
        "test_acc": estimate(accuracies).to_dict() if accuracies else None,
    }
    return Entry(**{**given, **more})


PLAN = Entry(
    name="matrix-x",
    kind="matrix",
    href="matrix-x.html",
    what="31 subsets",
    budget="2 trials × 4 epochs",
    runs="62 finished",
    headline="best: amp",
    when="2025-11-19",
    complete=False,
)


def figure(page: Page) -> Figure:
    (found,) = [part for section in page.sections for part in section.parts if isinstance(part, Figure)]
    return found


def tables(page: Page) -> dict[str, Table]:
    return {s.title: part for s in page.sections for part in s.parts if isinstance(part, Table)}


def test_without_studies_it_says_what_to_run_first() -> None:
    (section,) = index_page([]).sections
    (part,) = section.parts
    assert isinstance(part, Absent)
    assert "`bench search --rule sparse --arch resnet50`" in part.reason
    assert FIRST in render(index_page([]))


def test_each_kind_has_a_table_newest_first_and_links_to_pages() -> None:
    old = search("mirror", [0.5, 0.6], when="2025-11-01")
    new = search("amp", [0.5, 0.6], when="2025-11-21", complete=False)
    pageless = search("decay", [], href=None, when="2025-11-10")
    page = index_page([old, PLAN, new, pageless])
    assert list(tables(page)) == ["Searches", "Matrices"]
    rows = tables(page)["Searches"].rows
    assert [row[0] for row in rows] == [
        Link(text=new.name, href="amp-resnet18.html"),
        pageless.name,
        Link(text=old.name, href="mirror-resnet18.html"),
    ]
    assert [row[COLUMNS.index("complete")] for row in rows] == ["no", "yes", "yes"]
    assert [row[COLUMNS.index("file changed")] for row in rows] == ["2025-11-21", "2025-11-10", "2025-11-01"]
    assert page.facts["studies"] == "4"
    assert (page.facts["searches"], page.facts["matrices"], page.facts["not complete"]) == ("3", "1", "2")
    assert page.facts["file changed"] == "2025-11-21"
    assert 'href="matrix-x.html"' in render(page)


def test_a_result_breaks_between_its_parts_only() -> None:
    (row,) = tables(index_page([search("amp", [0.5])]))["Searches"].rows
    result = str(row[COLUMNS.index("result")])
    assert result.split(" ") == [
        "test\u00a060.00\u00a0±\u00a01.00\u00a0(n\u00a03)\u00a0%;",
        "−\u00a0backprop:\u00a0-2.00\u00a0[-4.00,\u00a0-0.10]\u00a0worse",
    ]
    assert str(row[COLUMNS.index("runs")]).split(" ") == ["7\u00a0finished,", "1\u00a0diverged"]


def test_searches_are_drawn_by_network_and_data_set_with_their_intervals_and_colours() -> None:
    entries = [search("amp", [0.5, 0.6]), search("mirror", [0.7, 0.8]), search("amp", [0.3, 0.3], "vgg11")]
    found = figure(index_page(entries))
    (trace,) = found.plot["data"]
    assert trace["x"] == pytest.approx([75, 55, 30])
    assert trace["marker"]["color"] == [look("mirror").color, look("amp").color, look("amp").color]
    half = 12.706205 * 0.05 * 100  # t(1) · sd / √2 of two values that are 0.1 apart
    assert trace["error_x"]["arrayminus"][1] == pytest.approx(min(half, 55), rel=1e-4)
    assert trace["error_x"]["array"][1] == pytest.approx(min(half, 45), rel=1e-4)  # cut at 100 %
    axis = found.plot["layout"]["yaxis"]
    assert (axis["tickvals"], axis["ticktext"]) == (trace["y"], ["mirror", "amp", "amp"])
    headings = [(a["text"], a["y"]) for a in found.plot["layout"]["annotations"]]
    assert [text for text, _ in headings] == ["<b>resnet18 on digits</b>", "<b>vgg11 on digits</b>"]
    assert headings[0][1] < trace["y"][0] < trace["y"][1] < headings[1][1] < trace["y"][2]
    assert [row[:4] for row in found.rows] == [
        ["resnet18", "digits", "mirror", pytest.approx(75)],
        ["resnet18", "digits", "amp", pytest.approx(55)],
        ["vgg11", "digits", "amp", pytest.approx(30)],
    ]


def test_searches_of_one_rule_share_a_row_and_keep_their_names() -> None:
    two = [search("amp", [0.5, 0.6]), search("amp", [0.7, 0.8], name="amp-again", complete=False)]
    (trace,) = figure(index_page(two)).plot["data"]
    assert len(set(trace["y"])) == 1
    assert "<b>amp-again</b> (not complete)" in trace["hovertext"][0]
    assert [symbol.endswith("-open") for symbol in trace["marker"]["symbol"]] == [True, False]


def test_budgets_that_differ_are_said_and_listed() -> None:
    first, other = search("amp", [0.5, 0.6]), search("mirror", [0.5, 0.6], budget="30 trials × 5 epochs")
    same, differ = figure(index_page([first, search("mirror", [0.4])])), figure(index_page([first, other]))
    assert "Budget of all: 8 trials × 3 epochs." in same.note
    assert "Budgets differ (2 of them" in differ.note
    assert {row[differ.columns.index("budget")] for row in differ.rows} == {first.budget, other.budget}
    assert all(e.budget in "".join(differ.plot["data"][0]["hovertext"]) for e in (first, other))


def test_a_search_without_an_accuracy_is_counted_and_in_the_data() -> None:
    found = figure(index_page([search("amp", [0.5, 0.6]), search("mirror", [])]))
    assert len(found.plot["data"][0]["x"]) == 1
    assert "Searches: 1; without a confirmed accuracy, in the table and the CSV only: 1." in found.note
    assert [row[2:8] for row in found.rows][1] == ["mirror", None, None, None, None, None]


def test_of_one_seed_there_is_no_interval() -> None:
    found = figure(index_page([search("amp", [0.5]), search("mirror", [0.5, 0.6])]))
    row = next(row for row in found.rows if row[2] == "amp")
    assert row[3:8] == [50.0, None, None, None, 1]
    assert found.plot["data"][0]["error_x"]["array"][1] is None
    assert "n = 1 to 2 seeds (one has no interval)" in found.note


def test_where_no_search_is_confirmed_the_figure_is_absent_and_the_table_is_there() -> None:
    page = index_page([search("amp", []), replace(search("mirror", []), when="2025-11-22")])
    absent, table = page.sections[0].parts
    assert isinstance(absent, Absent)
    assert "none of 2 searches" in absent.reason
    assert isinstance(table, Table)
    assert len(table.rows) == 2
