"""The page of a robustness measurement: its figures' numbers against points by hand, and what happens without them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from bench.noise import SITES
from bench.pages.levels import axis, place
from bench.pages.parts import Absent, Figure, Page, Section, Table
from bench.pages.render import render
from bench.pages.robustness import robustness_page
from bench.robustness_points import unit_of
from bench.robustness_summary import Point, summarize
from bench.robustness_words import SEVERAL, curve_rows, table_rows, verdict_lines

LEVELS = (1.0, 2.0, 4.0)


def network(rule: str, seed: int, *accuracies: float | None, site: str = "update", lost: int = 0) -> list[Point]:
    """One curve, the clean accuracy first; None is a run that failed, and the last ``lost`` diverged."""
    levels = (0.0, *LEVELS)[: len(accuracies)]
    status = ["finished"] * (len(levels) - lost) + ["diverged"] * lost
    status = ["failed" if a is None else s for a, s in zip(accuracies, status, strict=True)]
    given = zip(levels, accuracies, status, strict=True)
    return [Point(site=site, rule=rule, seed=seed, level=level, accuracy=a, status=s) for level, a, s in given]


def summary(points: Iterable[Point], *, complete: bool = True, floor: float = 0.1, **more: Any) -> dict[str, Any]:
    points = list(points)
    found = summarize(points, chance=0.1, tested=1000, floor=floor, **more)
    return {
        "study": "noise",
        "arch": "lenet",
        "dataset": "digits",
        "epochs": 3,
        "seeds": sorted({p.seed for p in points}),
        "complete": complete,
        "runs": {"finished": len(points), "diverged": 0, "failed": 0},
        "coefficients": {"backprop": {}, "mirror": {"amp": 0.25, "decay": 0.5}},
        **found,
        "sites": [{**site, "unit": unit_of(site["site"])} for site in found["sites"]],
    }


TWO = [
    *network("backprop", 0, 0.90, 0.80, 0.60, 0.20),
    *network("backprop", 1, 0.92, 0.84, 0.64, 0.24),
    *network("mirror", 0, 0.80, 0.80, 0.70, 0.60),
    *network("mirror", 1, 0.82, 0.80, 0.74, 0.10, lost=1),
]


def section(page: Page, title: str) -> Section:
    return next(found for found in page.sections if found.title == title)


def parts(page: Page, title: str = "update") -> tuple[Any, ...]:
    return tuple(section(page, title).parts)


def named(figure: Figure, name: str) -> Mapping[str, Any]:
    return next(trace for trace in figure.plot["data"] if trace.get("name") == name)


def by_hand(rows: Iterable[Iterable[Any]], columns: Iterable[str], **wanted: Any) -> dict[str, Any]:
    found = [dict(zip(columns, row, strict=True)) for row in rows]
    [one] = [row for row in found if all(row[name] == value for name, value in wanted.items())]
    return one


def test_csv_and_marks_are_the_means_and_intervals_of_the_points() -> None:
    """0.80 and 0.84: sd 0.04/√2, half width t(1)·sd/√2 = 12.7062·0.02."""
    figure, *_ = parts(robustness_page(summary(TWO)))
    row = by_hand(figure.rows, figure.columns, rule="backprop", level=1.0)
    assert (row["n"], row["mean"], row["sd"]) == (2, pytest.approx(0.82), pytest.approx(0.04 / math.sqrt(2)))
    assert row["high"] - row["mean"] == pytest.approx(12.7062 * 0.02, rel=1e-5)
    marks = named(figure, "backprop")
    assert marks["x"] == [-1, None, 0, 1, 2]  # 0 is one octave before 1, behind a gap
    assert marks["y"] == [91, None, 82, 62, 22]
    assert len(figure.rows) == 2 * 4
    assert "n 2" in marks["text"][2]
    assert "82.00 %" in marks["text"][2]
    assert "amp 0.25" in named(figure, "mirror")["text"][0]


def test_a_level_where_a_run_diverged_is_open_and_counted() -> None:
    figure, *_ = parts(robustness_page(summary(TWO)))
    assert named(figure, "mirror")["marker"]["symbol"] == ["diamond"] * 4 + ["diamond-open"]
    assert set(named(figure, "backprop")["marker"]["symbol"]) == {"circle"}
    assert "1 of 16 runs diverged and count at chance" in figure.note
    assert by_hand(figure.rows, figure.columns, rule="mirror", level=4.0)["mean"] == pytest.approx((0.60 + 0.10) / 2)


def test_differences_are_paired_and_side_by_side() -> None:
    """mirror − backprop at 0: −0.10 and −0.10; at 2: 0.10 and 0.10."""
    figure = parts(robustness_page(summary(TWO)))[1]
    row = by_hand(figure.rows, figure.columns, rule="mirror", level=2.0)
    assert (row["mean"], row["n"]) == (pytest.approx(0.10), 2)
    assert [dict(zip(figure.columns, r, strict=True))["level"] for r in figure.rows] == [0.0, 1.0, 2.0, 4.0]
    more = [p for s in (0, 1) for p in network("sign", s, 0.8, 0.7, 0.6, 0.5)]
    figure = parts(robustness_page(summary([*TWO, *more])))[1]
    mirror, sign = (named(figure, rule)["x"] for rule in ("mirror", "sign"))
    assert [b - a for a, b in zip(mirror, sign, strict=True)] == pytest.approx([0.3] * 4)
    low, high = figure.plot["layout"]["xaxis"]["range"]
    assert low < min(*mirror, *sign)
    assert max(*mirror, *sign) < high


def test_the_front_is_of_means_of_clean_accuracy_and_area() -> None:
    """Areas on a log axis: backprop (.82/2 + .62 + .22/2)/2 = .57, mirror (.80/2 + .72 + .35/2)/2 = .6475."""
    worse = [p for s in (0, 1) for p in network("sign", s, 0.5, 0.4, 0.3, 0.2)]
    [figure] = parts(robustness_page(summary([*TWO, *worse])), "Pareto fronts")
    rows = {row[0]: dict(zip(figure.columns, row, strict=True)) for row in figure.rows}
    assert rows["backprop"]["area_mean"] == pytest.approx(0.57)
    assert rows["mirror"]["area_mean"] == pytest.approx(0.6475)
    assert {rule: row["on_front"] for rule, row in rows.items()} == {"backprop": True, "mirror": True, "sign": False}
    assert named(figure, "front")["x"] == [91, 81]  # the best without noise first
    mark = named(figure, "sign")
    assert (mark["x"], mark["y"]) == ([50], [30])
    assert mark["error_x"]["array"] == [0]  # two equal seeds


def test_tables_and_sentences_are_those_of_the_terminal() -> None:
    given = summary(TWO)
    page, site = robustness_page(given), given["sites"][0]
    curves, areas = (part for part in parts(page) if isinstance(part, Table))
    assert (curves.rows, areas.rows) == (curve_rows(site), table_rows(site))
    assert list(page.lines) == verdict_lines(given)
    assert len(page.lines) == 1


def test_many_sentences_stand_with_their_sites() -> None:
    points = [
        p
        for site in SITES
        for rule in ("backprop", "mirror", "sign", "amp")
        for s in (0, 1)
        for p in network(rule, s, 0.9, 0.8 - s / 100, 0.7, 0.2, site=site)
    ]
    given = summary(points)
    page = robustness_page(given)
    assert len(verdict_lines(given)) > len(page.lines)
    assert SEVERAL in page.lines
    said = [line for site in SITES for line in section(page, site).lines]
    assert [*said, SEVERAL] == verdict_lines(given)


def test_not_all_measured_means_no_verdict() -> None:
    page = robustness_page(summary(TWO, complete=False))
    assert [line for line in page.lines if "verdict" in line] == list(page.lines)
    assert "more robust" not in " ".join(page.lines)
    assert "less robust" not in " ".join(page.lines)
    assert "not all is measured yet" in parts(page)[0].note


def test_one_seed_has_no_interval_and_one_rule_no_difference() -> None:
    page = robustness_page(summary(network("backprop", 0, 0.9, 0.8, 0.5, 0.1)))
    figure, missing, *_ = parts(page)
    assert "one seed, and so without an interval" in figure.note
    assert "95 %" not in figure.note
    assert not [trace for trace in figure.plot["data"] if trace.get("fill")]
    assert isinstance(missing, Absent)
    assert "only backprop" in missing.reason
    assert by_hand(figure.rows, figure.columns, level=1.0)["low"] is None


def test_without_the_reference_it_says_so() -> None:
    missing = parts(robustness_page(summary(network("mirror", 0, 0.9, 0.8, 0.5, 0.1))))[1]
    assert isinstance(missing, Absent)
    assert "backprop was not measured here" in missing.reason


def test_failed_levels_leave_a_gap_and_a_row() -> None:
    figure, *_ = parts(robustness_page(summary([*network("backprop", 0, 0.9, 0.8, None, 0.3)])))
    assert named(figure, "backprop")["y"] == [90, None, 80, None, 30]
    row = by_hand(figure.rows, figure.columns, level=2.0)
    assert (row["mean"], row["n"], row["failed"]) == (None, 0, 1)
    assert "1 failed" in figure.note


def test_all_diverged_stand_at_chance_open() -> None:
    points = [p for s in (0, 1) for p in network("backprop", s, 0.1, 0.1, 0.1, 0.1, lost=4)]
    figure, *_ = parts(robustness_page(summary(points)))
    marks = named(figure, "backprop")
    assert [y for y in marks["y"] if y is not None] == [10] * 4
    assert marks["marker"]["symbol"][2:] == ["circle-open"] * 3


def test_a_rule_that_no_noise_gets_to_has_its_clean_mark_alone() -> None:
    points = [*TWO, *network("feedback", 0, 0.7), *network("feedback", 1, 0.72)]
    page = robustness_page(summary(points, unaffected={"update": ["feedback"]}))
    figure, differences, *_ = parts(page)
    assert [y for y in named(figure, "feedback, no noise")["y"] if y is not None] == [71]
    assert "No noise gets to feedback" in figure.note
    assert "Not compared: feedback" in differences.note
    [front] = parts(page, "Pareto fronts")
    assert "not shown: feedback" in front.note


def test_an_attack_through_b_is_compared_with_no_one_and_has_no_front() -> None:
    points = [
        p
        for site in ("pgd", "pgd through B")
        for rule in ("backprop", "mirror")
        for s in (0, 1)
        for p in network(rule, s, 0.9, 0.6, 0.3, 0.01 * s, site=site)
    ]
    page = robustness_page(summary(points, floor=0.0, symbols={"pgd": "ε", "pgd through B": "ε"}))
    figure, missing, *_ = parts(page, "pgd through B")
    assert isinstance(missing, Absent)
    assert "not robustness" in missing.reason
    assert "ε (pixel values in [0, 1])" in figure.plot["layout"]["xaxis"]["title"]["text"].replace("<br>", " ")
    assert [part.title.split(":")[0] for part in parts(page, "Pareto fronts")] == ["pgd"]


def test_nothing_measured_yet() -> None:
    empty = robustness_page({**summary(TWO), "sites": []})
    assert list(empty.lines) == ["Nothing is measured yet."]
    begun = robustness_page(summary(network("backprop", 0, 0.9), complete=False))
    assert [type(part) for part in parts(begun)] == [Absent]
    assert "<h1>noise: lenet on digits</h1>" in render(begun)


def test_one_level_can_be_drawn_and_has_no_area() -> None:
    page = robustness_page(summary([*network("backprop", 0, 0.9, 0.5), *network("mirror", 0, 0.9, 0.5)]))
    assert isinstance(parts(page)[0], Figure)
    [front] = parts(page, "Pareto fronts")
    assert isinstance(front, Absent)
    assert "two levels" in front.reason


def test_the_axis_of_levels_labels_what_it_has_room_for() -> None:
    site = {
        "site": "weight",
        "symbol": "σ",
        "unit": SITES["weight"].unit,
        "levels": [0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0],
    }
    made = axis(site)
    places, texts = made["tickvals"], made["ticktext"]
    assert len(texts) == len(places) == 9
    assert (texts[0], texts[-1]) == ("0", "1")
    labelled = [x for x, text in zip(places, texts, strict=True) if text]
    room = (places[-1] - places[0]) / 9
    assert min(b - a for a, b in itertools.pairwise(labelled)) >= 0.99 * room
    assert places[1:] == [place(level, site["levels"]) for level in site["levels"]]
    assert places[1] - places[0] == pytest.approx(math.log2(20) / 7)  # one step of the grid
