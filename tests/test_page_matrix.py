"""The page of a matrix: its figures hold the numbers of its summary, and nothing of it is dropped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import pytest

from bench import matrix_words as words
from bench.config import PRIMITIVE_NAMES
from bench.learning.primitives import PRIMITIVES
from bench.learning.rules import parse_rule
from bench.looks import look
from bench.matrix_summary import Cell, summarize_matrix
from bench.pages.matrix import matrix_page
from bench.pages.parts import Absent, Figure, Page, Part, Table
from bench.pages.render import render
from bench.rows import FIELDS, Row

SEEDS = (1000, 1001, 1002)
THREE = ("decay", "amp", "self")


def run(rule: str, seed: int, accuracy: float | None, status: str = "finished", at: float = 1.0) -> Row:
    metrics = {} if accuracy is None else {"val_acc": accuracy / 2, "test_acc": accuracy}
    config = {"rule": rule, "coefficients": {"decay": at}, "seed": seed, "epochs": 3}
    return {
        **dict.fromkeys(FIELDS),
        "uid": f"{rule}-{at}-{seed}",
        "status": status,
        "config": config,
        "metrics": metrics,
    }


def cell(subset: Iterable[str], accuracies: Sequence[float], rule: str | None = None, **more: Any) -> Cell:
    """Test accuracies, a seed each; on validation half of it. ``trials``: the status of each."""
    primitives = tuple(name for name in PRIMITIVE_NAMES if name in subset)
    rule = rule or (parse_rule("+".join(primitives)).name if primitives else "feedback")
    trials = more.pop("trials", ("finished",))
    given = {
        "rule": rule,
        "primitives": primitives,
        "searched": [run(rule, 0, None if s == "failed" else 0.5, s, at=i) for i, s in enumerate(trials)],
        "confirmed": [run(rule, seed, a) for seed, a in zip(SEEDS, accuracies, strict=False)],
        "control": not subset,
    }
    return Cell(**{**given, **more})


def control(rule: str, *accuracies: float) -> Cell:
    return cell((), accuracies, rule=rule)


def found(cells: Iterable[Cell], primitives: Sequence[str] = THREE, **more: Any) -> dict[str, Any]:
    kinds = {name: row.kind for name, row in PRIMITIVES.items()}
    return summarize_matrix(
        list(cells), primitives=primitives, kinds=kinds, chance=0.1, examples=900, trials=8, epochs=3, **more
    )


def page_of(**archs: Any) -> Page:
    given = {"study": "matrix-x", "dataset": "digits", "space": "reference", "trials": 8, "epochs": 3}
    return matrix_page({**given, "complete": True, "archs": archs})


def part(page: Page, title: str, arch: str = "lenet") -> Any:
    """The part of this network whose title begins so."""
    section = next(section for section in page.sections if section.title == arch)
    (one,) = [p for p in section.parts if p.title.startswith(title)]
    return one


def every(page: Page, kind: type[Part]) -> list[Any]:
    return [p for section in page.sections for p in section.parts if isinstance(p, kind)]


def accuracy(subset: frozenset[str], seed: int) -> float:
    """decay adds 0.1, amp 0.2, self takes 0.05 away, decay and amp add 0.04 more; a seed 0.01."""
    own = {"decay": 0.1, "amp": 0.2, "self": -0.05}
    both = 0.04 if {"decay", "amp"} <= subset else 0.0
    return 0.3 + sum(own[p] + 0.001 * (seed - 1001) for p in subset) + both + 0.01 * (seed - 1001)


SUBSETS = [frozenset(s) for size in range(4) for s in combinations(THREE, size)]
WHOLE = [
    *(cell(s, [accuracy(s, seed) for seed in SEEDS]) for s in SUBSETS),
    control("backprop", 0.7, 0.71, 0.75),
    control("frozen", 0.2, 0.21, 0.22),
]


@pytest.fixture(scope="module")
def whole() -> Page:
    return page_of(lenet=found(WHOLE))


def columns_of(figure: Figure) -> Any:
    """The trace of the points of a figure of subsets: the one with the whiskers."""
    (points,) = [trace for trace in figure.plot["data"] if "error_y" in trace]
    return points


# --- what is in it, and how well it does --------------------------------------------------------------------


def test_subsets_stand_in_the_order_of_validation_and_two_controls_are_lines(whole: Page) -> None:
    figure = part(whole, "Every subset")
    points = columns_of(figure)
    ranked = sorted((s for s in SUBSETS if s), key=lambda s: -accuracy(s, 1001))
    assert points["y"] == pytest.approx([*(100 * accuracy(s, 1001) for s in ranked), 21])
    assert points["x"] == list(range(8))
    names = [parse_rule("+".join(p for p in THREE if p in s)).name for s in ranked]
    assert points["marker"]["color"] == [look(name).color for name in (*names, "frozen")]
    kinds = ["square" if "self" in s else "circle" for s in ranked]
    assert points["marker"]["symbol"] == [*kinds, "diamond"]
    half = 100 * 4.302653 * 0.011 / 3**0.5  # of one primitive: seeds 0.011 apart
    assert points["error_y"]["array"][names.index("amp")] == pytest.approx(half, rel=1e-4)
    levels = {t["name"].split(",")[0]: t for t in figure.plot["data"] if "," in (t.get("name") or "")}
    assert set(levels) == {"backprop", "feedback", "chance"}
    assert (levels["backprop"]["y"], levels["chance"]["y"]) == ([pytest.approx(72)] * 2, [10, 10])
    assert levels["feedback"]["line"]["color"] == look("feedback").color


def test_dots_say_which_primitives_are_in_a_column(whole: Page) -> None:
    figure = part(whole, "Every subset")
    names = [row[1] for row in figure.rows if row[1] not in ("backprop", "feedback")]
    joined, empty, filled = (trace for trace in figure.plot["data"] if trace.get("yaxis") == "y2")
    has = {(i, k) for i, name in enumerate(names) for k, p in enumerate(THREE) if p in parse_rule(name).primitives}
    assert set(zip(filled["x"], filled["y"], strict=True)) == has
    assert set(zip(empty["x"], empty["y"], strict=True)) == {(i, k) for i in range(8) for k in range(3)} - has
    column = names.index("symmetric")  # decay and self
    assert (joined["x"][:2], joined["y"][:2]) == ([0, 0], [0, 1])  # mirror is the best: decay and amp
    at = joined["x"].index(column)
    assert joined["y"][at : at + 2] == [0, 2]
    assert figure.plot["layout"]["yaxis2"]["ticktext"] == list(THREE)


def test_its_data_hold_every_line_of_the_table_in_full(whole: Page) -> None:
    figure = part(whole, "Every subset")
    rows = {row[1]: dict(zip(figure.columns, row, strict=True)) for row in figure.rows}
    assert len(rows) == 10
    mirror = rows["mirror"]
    assert (mirror["decay"], mirror["amp"], mirror["self"], mirror["kind"]) == (1, 1, 0, "local only")
    assert mirror["test mean"] == pytest.approx(64)
    assert (mirror["test n"], mirror["val mean"]) == (3, pytest.approx(32))
    assert mirror[f"test − {words.REFERENCE} mean"] == pytest.approx(64 - 72)
    assert mirror["cost floor"] == pytest.approx(4 / 3)
    assert rows["backprop"]["kind"] == "control"


def test_notes_say_n_spread_budget_place_and_how_test_was_used(whole: Page) -> None:
    figures = every(whole, Figure)
    assert len(figures) == 5
    for figure in figures:
        assert "95 %" in figure.note
        assert "n = 3 seeds" in figure.note
        assert "7 of 7 subsets, 0 left out" in figure.note
        assert "lenet on digits; 8 trials × 3 epochs a subset; test was read once per confirmed run" in figure.note


# --- effects ------------------------------------------------------------------------------------------------


def test_effects_are_drawn_in_points_with_their_reach(whole: Page) -> None:
    """decay: 0.1, and half of what it does with amp."""
    figure = part(whole, "What each primitive adds")
    reach, means = figure.plot["data"]
    assert means["x"] == pytest.approx([12, 22, -5])
    assert means["error_x"]["array"][0] == pytest.approx(100 * 4.302653 * 0.001 / 3**0.5, rel=1e-3)
    assert reach["x"][:2] == pytest.approx([10, 14])
    assert "raises" in means["hovertext"][0]
    assert "4 of 4 contexts" in means["hovertext"][0]
    assert figure.plot["layout"]["yaxis"]["ticktext"][0] == "decay<br>4 contexts"
    rows = {row[0]: dict(zip(figure.columns[:9], row, strict=False)) for row in figure.rows}
    assert (rows["self"]["mean"], rows["self"]["verdict"]) == (pytest.approx(-5), "lowers")


def test_pairs_are_a_heat_map_with_zero_in_the_middle(whole: Page) -> None:
    figure = part(whole, "Interaction of each pair")
    (heat,) = figure.plot["data"]
    assert (heat["x"], heat["y"]) == (["decay", "amp"], ["amp", "self"])
    assert heat["z"][0] == [pytest.approx(4), None]
    assert heat["z"][1] == pytest.approx([0, 0], abs=1e-9)
    assert (heat["zmin"], heat["zmax"]) == (pytest.approx(-4), pytest.approx(4))
    (both,) = part(whole, "What adding both").plot["data"]
    assert both["z"][0][0] == pytest.approx(34)
    assert both["text"][0][0].startswith("<b>+34.0</b><br>[")
    assert "raises" in both["hovertext"][0][0]
    assert len(figure.rows) == 3


def test_without_any_interaction_the_scale_still_has_a_width() -> None:
    flat = [cell(s, [0.5] * 3) for s in SUBSETS]
    (heat,) = part(page_of(lenet=found(flat)), "Interaction").plot["data"]
    assert (heat["zmin"], heat["zmax"]) == (-1, 1)


# --- cost, divergence ---------------------------------------------------------------------------------------


def test_equal_costs_stand_side_by_side_around_their_own(whole: Page) -> None:
    figure = part(whole, "Cost floor")
    points = columns_of(figure)
    cheap = [x for x in points["x"] if x < 1.2]
    assert len(cheap) == len(set(cheap)) == 4  # symmetric, decay, self, frozen
    assert sum(cheap) / 4 == pytest.approx(1.0)
    assert cheap == sorted(cheap)
    assert figure.plot["layout"]["xaxis"]["ticktext"] == ["1.00", "1.33"]
    assert {row[0]: row[2] for row in figure.rows}["mirror"] == pytest.approx(4 / 3)


def test_the_cheapest_that_is_not_worse_has_a_ring() -> None:
    cells = [
        control("backprop", 0.70, 0.71, 0.72),
        cell(["decay"], [0.5, 0.51, 0.53]),
        cell(["amp"], [0.69, 0.72, 0.71]),
        cell(["decay", "amp"], [0.71, 0.72, 0.70]),
    ]
    figure = part(page_of(lenet=found(cells, ("decay", "amp"))), "Cost floor")
    (ring,) = [trace for trace in figure.plot["data"] if trace.get("name", "").startswith("cheapest")]
    assert ring["name"] == "cheapest not worse: amp"
    assert ring["y"] == [pytest.approx(100 * 2.12 / 3)]
    assert "amp (not distinguishable)" in figure.note
    assert [row[0] for row in figure.rows if row[-1]] == ["amp"]


def test_without_a_cheapest_or_any_control_the_notes_say_so() -> None:
    page = page_of(lenet=found([cell(["decay"], [0.5])], ("decay",)))
    lonely = part(page, "Cost floor")
    assert "Ring: none" in lonely.note
    assert all(row[-1] == 0 for row in lonely.rows)
    assert "none, backprop and feedback are not there yet" in part(page, "Every subset").note


def test_shares_of_diverged_trials_are_bars_with_counts_the_worst_first() -> None:
    cells = [
        cell(["decay"], [0.5], trials=("finished", "diverged", "stopped", "failed", "diverged")),
        cell(["amp"], (), trials=("diverged", "diverged")),
        cell(["decay", "amp"], [0.5], trials=("finished",) * 3),
    ]
    figure = part(page_of(lenet=found(cells, ("decay", "amp"))), "Trials that diverged")
    (bars,) = figure.plot["data"]
    assert bars["x"] == pytest.approx([100, 50])
    assert figure.plot["layout"]["yaxis"]["ticktext"] == ["amp  2/2", "decay  2/4"]
    assert bars["error_x"]["arrayminus"][0] == pytest.approx(100 * (1 - 0.025**0.5))  # Clopper & Pearson, 2 of 2
    assert (
        "Of 9 trials 4 diverged; 1 more failed and do not count. Searches in which none diverged, not drawn: 1."
        in figure.note
    )
    rows = {row[0]: row[2:4] for row in figure.rows}
    assert rows == {"decay": [2, 4], "amp": [2, 2], "mirror": [0, 3]}


def test_where_nothing_diverged_the_counts_say_so(whole: Page) -> None:
    absent = part(whole, "Trials that diverged")
    assert isinstance(absent, Absent)
    assert "of 10 trials in 10 searches 0 diverged; 0 more failed" in absent.reason


# --- what is missing ----------------------------------------------------------------------------------------


def test_a_subset_in_which_nothing_finished_is_a_cross_at_chance_and_counted() -> None:
    broken = cell(["decay", "amp"], [0.5, 0.1, 0.52])
    broken.confirmed[1]["status"] = "diverged"
    cells = [*WHOLE[:1], cell(["amp"], (), trials=("diverged", "diverged")), broken]
    figure = part(page_of(lenet=found(cells, ("decay", "amp"))), "Every subset")
    points = columns_of(figure)
    assert points["marker"]["symbol"] == ["circle-open", "x-thin"]
    assert points["y"][1] == pytest.approx(10)
    assert "nothing finished in 1, which stand at chance" in figure.note
    assert "2 diverged" in figure.note
    assert "Confirmed runs: 1 diverged, 0 failed" in figure.note
    assert "nothing finished: at chance" in [trace.get("name") for trace in figure.plot["data"]]


def test_left_out_subsets_are_listed_with_their_reasons() -> None:
    cells = [*WHOLE[:3], cell(["self"], [0.9] * 3, complete=False)]
    page = page_of(lenet=found(cells))
    table = part(page, "Left out")
    assert [tuple(row) for row in table.rows] == [("self", "not complete")]
    ranking = part(page, "Subsets and controls")
    assert not any("left out" in note for note in ranking.notes)
    assert "3 of 7 subsets" not in part(page, "Every subset").note
    assert "2 of 7 subsets, 1 left out" in part(page, "Every subset").note


def test_a_network_without_any_accuracy_gives_one_reason_and_what_is_left_out() -> None:
    page = page_of(lenet=found([cell(["decay"], [0.5], complete=False)]), vgg11=found(WHOLE))
    first, second = page.sections[0].parts
    assert isinstance(first, Absent)
    assert "decay (not complete)" in first.reason
    assert isinstance(second, Table)
    assert isinstance(part(page, "Every subset", "vgg11"), Figure)
    assert page.facts["subsets"] == "0 of 7 on lenet; 7 of 7 on vgg11"


def test_of_one_seed_and_one_primitive_there_is_neither_interval_nor_pair() -> None:
    page = page_of(lenet=found([control("feedback", 0.2), cell(["amp"], [0.6])], ("amp",)))
    figure = part(page, "What each primitive adds")
    row = dict(zip(figure.columns[:9], figure.rows[0], strict=False))
    assert (row["mean"], row["n"], row["low"]) == (pytest.approx(40), 1, None)
    assert "n = 1 seed (one has no interval)" in figure.note
    assert "one primitive is no pair" in part(page, "Interaction").reason
    assert not [p for p in page.sections[0].parts if p.title.startswith(("Pairs", "What adding both"))]


def test_an_interval_is_cut_where_no_accuracy_can_be() -> None:
    figure = part(page_of(lenet=found([cell(["amp"], [0.1, 0.9, 0.5])], ("amp",))), "Every subset")
    points = columns_of(figure)
    assert (points["error_y"]["array"], points["error_y"]["arrayminus"]) == ([pytest.approx(50)], [pytest.approx(50)])
    assert dict(zip(figure.columns, figure.rows[0], strict=True))["test high"] > 100  # in full


# --- words --------------------------------------------------------------------------------------------------


def test_tables_and_sentences_are_those_of_the_terminal(whole: Page) -> None:
    summary = found(WHOLE)
    assert part(whole, "Subsets and controls").rows == words.table_rows(summary)
    assert part(whole, "Primitives").rows == words.effect_rows(summary)
    assert part(whole, "Local and non-local").rows == words.locality_rows(summary)
    pairs = [tuple(cell.replace("\u00a0", " ") for cell in row) for row in part(whole, "Pairs").rows]
    assert pairs == words.interaction_rows(summary)
    assert list(whole.sections[0].lines) == words.verdict_lines(summary)


def test_one_search_over_all_subsets_is_compared_in_words() -> None:
    of_any = cell(["amp"], [0.4] * 3, rule="any")
    page = page_of(lenet=found(WHOLE, any_study=of_any))
    assert (
        page.sections[0].lines[-1].startswith("one search over all subsets (1 trials against 7, not the same budget)")
    )


def test_a_matrix_of_two_networks_is_a_file_and_says_what_is_not_complete() -> None:
    given = {"study": "m", "dataset": "digits", "space": "reference", "trials": 8, "epochs": 3, "complete": False}
    page = matrix_page({**given, "archs": {"lenet": found(WHOLE), "vgg11": found(WHOLE[:3])}})
    assert page.facts["state"].startswith("not complete")
    titles = [figure.title for figure in every(page, Figure)]
    assert len(titles) == len(set(titles))  # each has a CSV of its own name
    assert "vgg11" in render(page)
