"""The page of a transfer: its figures' numbers against rows by hand, and what happens without them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest

from bench.pages.parts import Absent, Figure, Page, Section, Table
from bench.pages.render import render
from bench.pages.transfer import transfer_page
from bench.robustness_words import SEVERAL
from bench.rows import FIELDS, Row
from bench.transfer_summary import Carried, Pair, summarize_transfer
from bench.transfer_words import matrix_rows, pair_rows, ranking_rows

CHANCE = 0.1


def run(seed: int, val: float, test: float | None = None, status: str = "finished", at: int = 1) -> Row:
    metrics = {} if status == "failed" else {"val_acc": val, **({} if test is None else {"test_acc": test})}
    config = {"rule": "mirror", "coefficients": {"amp": float(at)}, "seed": seed}
    return {**dict.fromkeys(FIELDS), "uid": f"{at}-{seed}", "status": status, "config": config, "metrics": metrics}


def confirmed(*accuracies: float, status: str = "finished") -> list[Row]:
    return [run(seed, a, a, status) for seed, a in enumerate(accuracies, 1000)]


def carried(*points: tuple[float, float], status: str = "finished") -> list[Carried]:
    return [Carried(home=run(0, h, at=i), away=run(0, a, at=i, status=status)) for i, (h, a) in enumerate(points)]


def pair(source: str = "a", target: str = "b", rule: str = "mirror", space: str = "reference", **more: Any) -> Pair:
    empty: dict[str, Sequence[Any]] = dict.fromkeys(("carried", "native", "moved", "home", "back", "reference"), ())
    given = {**empty, "chance": CHANCE, "examples": 900, **more}
    return Pair(rule=rule, source=source, target=target, space=space, **given)


def moved(cost: float, *more: float, **names: Any) -> Pair:
    """Native 0.90 and 0.92; moved so much less, at every seed or each its own."""
    costs = (cost, *more) if more else (cost, cost)
    native = (0.90, 0.92)
    away = confirmed(*(n - c for n, c in zip(native, costs, strict=True)))
    return pair(native=confirmed(*native), moved=away, home=confirmed(0.80, 0.80), **names)


def summary(*pairs: Pair, complete: bool = True) -> dict[str, Any]:
    runs = {"finished": 9, "diverged": 0, "failed": 0}
    named = {"study": "move", "dataset": "digits", "trials": 20, "epochs": 8, "configs": 3, "complete": complete}
    return {**named, "runs": runs, **summarize_transfer(pairs)}


def section(page: Page, title: str) -> Section:
    return next(found for found in page.sections if found.title == title)


def figure(page: Page, title: str) -> Figure:
    found = [part for each in page.sections for part in each.parts if part.title == title]
    return next(part for part in found if isinstance(part, Figure))


def records(made: Figure) -> list[dict[str, Any]]:
    return [dict(zip(made.columns, row, strict=True)) for row in made.rows]


def heat(made: Figure) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The grey cells, and those with a regret."""
    grey, shaded = made.plot["data"]
    return grey, shaded


def joined(first: Iterable[Iterable[str]], second: Iterable[Iterable[str]]) -> list[list[str]]:
    return [[a or b for a, b in zip(*rows, strict=True)] for rows in zip(first, second, strict=True)]


def test_regrets_are_those_of_the_rows_in_points_ordered_by_rank() -> None:
    """Costs 0.04 and 0.06: mean 0.05, half width 12.7062·0.01."""
    page = transfer_page(summary(moved(0.04, 0.06), moved(0.01, rule="symmetric"), moved(-0.02, rule="amp")))
    made = figure(page, "Regret of every pair")
    found = {row["rule"]: row for row in records(made)}
    assert found["mirror"]["mean"] == pytest.approx(0.05)
    assert found["mirror"]["high"] - found["mirror"]["mean"] == pytest.approx(12.7062 * 0.01, rel=1e-5)
    bars = [trace for trace in made.plot["data"] if trace["type"] == "bar"]
    assert [(bar["name"], bar["x"]) for bar in bars] == [
        ("amp, reference", [-2]),
        ("symmetric, reference", [1]),
        ("mirror, reference", [5]),
    ]
    assert bars[2]["error_x"]["array"] == [pytest.approx(12.7062, rel=1e-5)]
    axis = made.plot["layout"]["yaxis"]
    labels = dict(zip(axis["tickvals"], axis["ticktext"], strict=True))
    assert [(labels[bar["y"][0] - 1], labels[bar["y"][0]]) for bar in bars] == [
        (f"<b>{rule}, reference</b>", "a → b") for rule in ("amp", "symmetric", "mirror")
    ]


def test_spaces_of_one_rule_have_groups_of_their_own_in_its_colour() -> None:
    made = figure(transfer_page(summary(moved(0.03), moved(0.01, space="normalized"))), "Regret of every pair")
    bars = [trace for trace in made.plot["data"] if trace["type"] == "bar"]
    assert [bar["name"] for bar in bars] == ["mirror, normalized", "mirror, reference"]
    assert len({bar["marker"]["color"] for bar in bars}) == 1


def test_heat_maps_have_found_on_in_rows_used_on_in_columns_and_one_range() -> None:
    costs = {("a", "b"): 0.10, ("b", "a"): -0.04, ("a", "c"): 0.01}
    pairs = [moved(cost, source=s, target=t) for (s, t), cost in costs.items()]
    page = transfer_page(summary(*pairs, moved(0.02, rule="symmetric")))
    first, second = (figure(page, f"Portability of {rule}, reference") for rule in ("mirror", "symmetric"))
    grey, shaded = heat(first)
    assert (shaded["x"], shaded["y"]) == (["a", "b", "c"], ["a", "b", "c"])
    assert shaded["z"] == [[None, 10, 1], [-4, None, None], [None, None, None]]
    assert [(trace["zmin"], trace["zmid"], trace["zmax"]) for trace in (shaded, heat(second)[1])] == [(-10, 0, 10)] * 2
    assert [row["mean"] for row in records(first) if (row["from"], row["to"]) == ("a", "b")] == [pytest.approx(0.10)]
    own = [row["mean"] for row in records(first) if row["from"] == row["to"]]
    assert own == pytest.approx([0.80, 0.91, 0.91])  # of a at home, of b and c as targets
    texts = joined(grey["text"], shaded["text"])
    assert texts[0][0].startswith("80.0 %")
    assert texts[0][1].startswith("+10.0")
    assert texts[1][0].startswith("-4.0")
    assert texts[2][:2] == ["", ""]  # c was never left
    assert not any(
        a and b for rows in zip(grey["text"], shaded["text"], strict=True) for a, b in zip(*rows, strict=True)
    )


def test_the_same_choice_says_so_everywhere() -> None:
    page = transfer_page(summary(moved(0.0, same=True), moved(0.0, source="b", target="a", same=True)))
    assert heat(figure(page, "Portability of mirror, reference"))[1]["text"] == [
        ["", "0<br>same choice"],
        ["0<br>same choice", ""],
    ]
    bars, marks = figure(page, "Regret of every pair").plot["data"]
    assert (bars["x"], marks["text"]) == ([], [" 0: the same"] * 2)
    assert "chose the same in every pair" in page.lines[0]
    assert "not distinguishable" not in page.lines[0]


def test_scatter_has_the_points_and_rho_of_the_rows() -> None:
    points = ((0.2, 0.3), (0.4, 0.5), (0.6, 0.7), (0.8, 0.6))
    page = transfer_page(summary(moved(0.01, carried=carried(*points)), moved(0.01, rule="amp", carried=carried())))
    made = figure(page, "a → b, reference")
    line, marks = made.plot["data"]
    assert (marks["x"], marks["y"]) == ([20, 40, 60, 80], [30, 50, 70, 60])
    assert marks["name"].startswith("mirror: ρ +0.80")
    assert marks["name"].endswith("(n 4)")
    assert (line["x"], line["y"]) == ([17, 83], [17, 83])  # one range for both axes, so that equal is a diagonal
    assert [(row["home_val_acc"], row["away_val_acc"]) for row in records(made)] == list(points)
    assert "test was not read" in made.note


def test_diverged_failed_and_missing_runs_are_counted() -> None:
    some = [*carried((0.5, 0.1), status="diverged"), *carried((0.5, 0.0), status="failed")]
    some.append(Carried(home=run(0, 0.4, at=7), away=None))
    gone = pair(native=confirmed(0.9, 0.9), moved=confirmed(CHANCE, CHANCE, status="diverged"), carried=some)
    page = transfer_page(summary(gone))
    regrets, scatter = figure(page, "Regret of every pair"), figure(page, "a → b, reference")
    assert "2 moved and 0 native runs diverged and count at chance" in regrets.note
    assert regrets.plot["data"][0]["marker"]["opacity"][0] < 0.5
    assert regrets.plot["data"][0]["x"] == [80]
    assert "0 diverged on a and 1 on b" in scatter.note
    assert "1 failed and 1 are missing" in scatter.note


def test_native_runs_of_one_target_count_once() -> None:
    native = confirmed(CHANCE, CHANCE, status="diverged")
    pairs = [pair(source=s, target="c", native=native, moved=confirmed(0.5, 0.5)) for s in "ab"]
    assert "0 moved and 2 native" in figure(transfer_page(summary(*pairs)), "Regret of every pair").note


def test_a_pair_without_a_regret_says_why() -> None:
    page = transfer_page(summary(pair(native=confirmed(0.9), carried=carried((0.5, 0.5)))))
    reason = "the best of a was not run on b"
    assert records(figure(page, "Regret of every pair"))[0]["reason"] == reason
    marks = figure(page, "Regret of every pair").plot["data"][1]
    assert marks["text"] == [" none"]
    assert reason in marks["customdata"][0]
    grey, _ = heat(figure(page, "Portability of mirror, reference"))
    assert grey["text"][0][1] == "none"
    assert reason in grey["customdata"][0][1]
    assert page.lines == [f"mirror, reference: no regret: {reason}."]


def test_lost_share_by_hand() -> None:
    """Of eight configurations the best quarter is two; one of them falls to chance."""
    points = [(0.9, 0.1), (0.8, 0.7), *((0.5 - i / 100, 0.4) for i in range(6))]
    made = figure(transfer_page(summary(moved(0.01, carried=carried(*points)))), "Lost share of every pair")
    [row] = records(made)
    assert (row["share"], row["count"], row["of"]) == (0.5, 1, 2)
    assert made.plot["data"][0]["x"] == [50]
    assert row["low"] == pytest.approx(0.0126, abs=1e-4)  # Clopper-Pearson, 1 of 2: 1 − √0.975


def test_sentences_say_interval_and_verdict_and_first_that_it_is_not_complete() -> None:
    pairs = (moved(0.0501, 0.0499), moved(0.03, -0.03, rule="amp"), moved(0.02, rule="amp", source="c", same=True))
    page = transfer_page(summary(*pairs, complete=False))
    first, amp, mirror, last = page.lines
    assert "not complete" in first
    assert last == SEVERAL
    assert amp.startswith("amp, reference: mean regret +1.00 [")
    assert "over 2 pairs (n = 2)" in amp
    assert "not distinguishable" in amp
    assert "in 1 of 2 pairs both searches chose the same" in amp
    assert "over 1 pair (n = 2): what was found elsewhere does worse" in mirror
    assert "not all is run yet" in figure(page, "Regret of every pair").note


def test_one_seed_has_no_interval() -> None:
    page = transfer_page(summary(pair(native=confirmed(0.9), moved=confirmed(0.8))))
    made = figure(page, "Regret of every pair")
    assert "one seed, and so without an interval" in made.note
    assert made.plot["data"][0]["error_x"]["visible"] is False
    assert "<br>" not in heat(figure(page, "Portability of mirror, reference"))[1]["text"][0][1]


def test_tables_are_those_of_the_terminal() -> None:
    given = summary(moved(0.05), moved(0.01, source="b", target="a"))
    page = transfer_page(given)
    tables = [part for each in page.sections for part in each.parts if isinstance(part, Table)]
    wanted = [ranking_rows(given), matrix_rows(given, "mirror", "reference"), pair_rows(given)]
    assert [table.rows for table in tables] == wanted


def test_without_points_or_pairs_it_says_so() -> None:
    given = summary(moved(0.05))
    [missing] = section(transfer_page(given), "The same configurations on both").parts
    assert isinstance(missing, Absent)
    assert "no configuration has an accuracy on both" in missing.reason
    del given["pairs"][0]["rank"]["points"]
    [missing] = section(transfer_page(given), "The same configurations on both").parts
    assert isinstance(missing, Absent)
    assert "give the same command again" in missing.reason
    empty = transfer_page(summary(complete=False))
    assert "not complete" in empty.lines[0]
    assert "No pair" in empty.lines[1]
    assert not empty.sections
    assert '<p class="lead">No pair of networks is known yet.</p>' in render(empty)
