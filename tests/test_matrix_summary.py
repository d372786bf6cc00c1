"""What each primitive does, where it is known: an additive model with interactions, slow loops, and by hand."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations
from statistics import mean, stdev
from typing import Any

import pytest

from bench import matrix_words as words
from bench.config import PRIMITIVE_NAMES
from bench.learning.primitives import PRIMITIVES
from bench.learning.rules import parse_rule
from bench.matrix_summary import Cell, summarize_matrix
from bench.rows import FIELDS, Row

CHANCE, EXAMPLES = 0.1, 900  # at chance: up to 0.1 + 2·0.01
SEEDS = (1000, 1001, 1002)
KINDS = {name: row.kind for name, row in PRIMITIVES.items()}
ALL = [frozenset(s) for size in range(6) for s in combinations(PRIMITIVE_NAMES, size)]

Accuracy = Callable[[frozenset[str], int], float]


def run(rule: str, seed: int, val: float | None, test: float | None, status: str = "finished", at: float = 1.0) -> Row:
    metrics = {name: value for name, value in (("val_acc", val), ("test_acc", test)) if value is not None}
    config = {"rule": rule, "coefficients": {"decay": at}, "seed": seed, "epochs": 4}
    filled = {"uid": f"{rule}-{at}-{seed}", "status": status, "config": config, "metrics": metrics}
    return {**dict.fromkeys(FIELDS), **filled}


def name_of(subset: Iterable[str]) -> str:
    ordered = [name for name in PRIMITIVE_NAMES if name in subset]
    return parse_rule("+".join(ordered)).name if ordered else "feedback"


def trials(rule: str, *status: str) -> list[Row]:
    return [run(rule, 0, None if s == "failed" else 0.5, None, s, at=i) for i, s in enumerate(status)]


def cell(subset: Iterable[str], accuracies: Iterable[float], rule: str | None = None, **more: Any) -> Cell:
    """Test accuracies, a seed each; on validation each is half of it."""
    rule = rule or name_of(subset)
    given = {
        "rule": rule,
        "primitives": tuple(name for name in PRIMITIVE_NAMES if name in subset),
        "searched": trials(rule, "finished"),
        "confirmed": [run(rule, seed, a / 2, a) for seed, a in zip(SEEDS, accuracies, strict=False)],
        "control": not subset,
    }
    return Cell(**{**given, **more})


def backprop(*accuracies: float) -> Cell:
    return cell((), accuracies, rule="backprop")


def diverging(subset: Iterable[str], *status: str) -> Cell:
    rule = name_of(subset)
    return cell(subset, (), searched=trials(rule, *(status or ("diverged", "diverged"))))


def cells_of(accuracy: Accuracy, subsets: Iterable[frozenset[str]] = ALL) -> list[Cell]:
    return [cell(s, [accuracy(s, seed) for seed in SEEDS]) for s in subsets]


def summary(cells: Iterable[Cell], primitives: Iterable[str] = PRIMITIVE_NAMES, **more: Any) -> dict[str, Any]:
    found = summarize_matrix(
        list(cells),
        primitives=tuple(primitives),
        kinds=KINDS,
        chance=CHANCE,
        examples=EXAMPLES,
        trials=8,
        epochs=3,
        **more,
    )
    json.dumps(found, allow_nan=False)  # JSON-ready, always
    return found


# --- effects: a model whose effects are known ------------------------------------------------------------

EFFECT = {"decay": 0.01, "amp": 0.06, "null": -0.02, "sparse": 0.03, "self": 0.0}
#: What a seed adds to the effect of a primitive.
BY_SEED = {"decay": 0.002, "amp": 0.0, "null": 0.01, "sparse": 0.0, "self": 0.004}
TOGETHER = {frozenset(("amp", "decay")): 0.08, frozenset(("null", "self")): -0.05, frozenset(("amp", "null")): 0.004}


def additive(subset: frozenset[str], seed: int) -> float:
    own = sum(EFFECT[p] + BY_SEED[p] * (seed - 1001) for p in subset)
    return 0.4 + own + sum(value for pair, value in TOGETHER.items() if pair <= subset) + 0.007 * (seed - 1001)


def interaction(p: str, q: str) -> float:
    return TOGETHER.get(frozenset((p, q)), 0.0)


@pytest.mark.parametrize("p", PRIMITIVE_NAMES)
def test_the_effect_of_a_primitive_is_its_own_and_half_of_its_interactions(p: str) -> None:
    """Every other primitive is there in half of the contexts."""
    effect = next(e for e in summary(cells_of(additive))["effects"] if e["primitive"] == p)
    found = effect["test_acc"]
    assert (effect["kind"], effect["contexts_expected"], found["contexts"], found["n"]) == (KINDS[p], 16, 16, 3)
    assert found["mean"] == pytest.approx(EFFECT[p] + sum(interaction(p, q) / 2 for q in PRIMITIVE_NAMES))
    assert found["sd"] == pytest.approx(BY_SEED[p], abs=1e-12)
    signs = [interaction(p, q) for q in PRIMITIVE_NAMES]
    assert found["smallest"]["value"] == pytest.approx(EFFECT[p] + sum(s for s in signs if s < 0))
    assert found["largest"]["value"] == pytest.approx(EFFECT[p] + sum(s for s in signs if s > 0))
    assert effect["val_acc"]["mean"] == pytest.approx(found["mean"] / 2)


def test_the_effects_have_the_verdict_that_their_seeds_allow() -> None:
    """decay: 0.05 ± 0.002·t/√3; null: −0.043 ± 0.025; self: −0.025 ± 0.0099; amp has no spread, which says nothing."""
    said = {e["primitive"]: e["test_acc"]["verdict"] for e in summary(cells_of(additive))["effects"]}
    assert said == {
        "decay": "raises",
        "amp": "not distinguishable",
        "null": "lowers",
        "sparse": "not distinguishable",
        "self": "lowers",
    }


@pytest.mark.parametrize("pair", list(combinations(PRIMITIVE_NAMES, 2)))
def test_an_interaction_is_what_both_do_beyond_the_sum(pair: tuple[str, str]) -> None:
    found = next(e for e in summary(cells_of(additive))["interactions"] if e["primitives"] == list(pair))
    p, q = pair
    assert found["interaction"]["test_acc"]["mean"] == pytest.approx(interaction(p, q), abs=1e-12)
    assert found["interaction"]["test_acc"]["contexts"] == found["contexts_expected"] == 8
    rest = [(interaction(p, r) + interaction(q, r)) / 2 for r in PRIMITIVE_NAMES if r not in pair]
    both = found["both"]["test_acc"]
    assert both["mean"] == pytest.approx(EFFECT[p] + EFFECT[q] + interaction(p, q) + sum(rest))
    assert both["sd"] == pytest.approx(BY_SEED[p] + BY_SEED[q], abs=1e-12)


def test_an_interaction_that_is_sure_is_said() -> None:
    """amp and null do 0.1, 0.11, 0.12 beyond the sum, by seed."""
    found = summary(cells_of(lambda s, seed: 0.5 + (0.01 * (seed - 990)) * ({"amp", "null"} <= s)))["interactions"]
    said = {tuple(e["primitives"]): e["interaction"]["test_acc"] for e in found}
    assert (said["amp", "null"]["mean"], said["amp", "null"]["verdict"]) == (pytest.approx(0.11), "more than the sum")
    assert said["decay", "amp"]["verdict"] == "not distinguishable"


# --- effects: any accuracies, studies missing, against slow loops ----------------------------------------


def slow(known: Mapping[frozenset[str], list[float]], without: Iterable[str], terms: Callable[[Any], list[Any]]) -> Any:
    """(mean, sd, contexts, least, greatest) by explicit loops; ``terms``: (sign, subset) in a context."""
    contexts = [s for s in ALL if not s & set(without) and all(t in known for _, t in terms(s))]
    table = [[sum(sign * known[t][i] for sign, t in terms(s)) for i in range(3)] for s in contexts]
    over_seeds = [mean(column) for column in zip(*table, strict=True)]
    each = [mean(line) for line in table]
    return mean(over_seeds), stdev(over_seeds), len(contexts), min(each), max(each)


def facts(found: Mapping[str, Any]) -> Any:
    return found["mean"], found["sd"], found["contexts"], found["smallest"]["value"], found["largest"]["value"]


@pytest.mark.parametrize("seed", range(4))
def test_effects_of_whatever_is_there_are_those_of_explicit_loops(seed: int) -> None:
    rng = random.Random(seed)
    kept = [s for s in ALL if rng.random() < 0.85]
    known = {s: [rng.uniform(0.3, 0.9) for _ in SEEDS] for s in kept}
    found = summary([cell(s, accuracies) for s, accuracies in known.items()])
    for e in found["effects"]:
        p = frozenset((e["primitive"],))
        assert facts(e["test_acc"]) == pytest.approx(slow(known, p, lambda s, p=p: [(1, s | p), (-1, s)]))
    for e in found["interactions"]:
        p, q = (frozenset((name,)) for name in e["primitives"])
        both = slow(known, p | q, lambda s, p=p, q=q: [(1, s | p | q), (-1, s)])
        more = slow(known, p | q, lambda s, p=p, q=q: [(1, s | p | q), (-1, s | p), (-1, s | q), (1, s)])
        assert facts(e["both"]["test_acc"]) == pytest.approx(both)
        assert facts(e["interaction"]["test_acc"]) == pytest.approx(more)


def test_contexts_name_the_subset_that_was_added_to() -> None:
    found = summary(cells_of(additive))["effects"][0]["test_acc"]  # decay: 0.01, with amp 0.09
    assert "amp" in found["largest"]["context"]
    assert found["smallest"]["context"] == "feedback"


def test_without_the_empty_subset_its_contexts_are_missing_and_one_seed_has_no_interval() -> None:
    found = summary([cell(["decay"], [0.5]), cell(["amp"], [0.6]), cell(["decay", "amp"], [0.8])], ("decay", "amp"))
    decay = found["effects"][0]
    assert (decay["contexts_expected"], decay["test_acc"]["contexts"]) == (2, 1)
    assert decay["test_acc"]["mean"] == pytest.approx(0.2)
    assert (decay["test_acc"]["n"], decay["test_acc"]["low"]) == (1, None)
    assert decay["test_acc"]["verdict"] == "not distinguishable"
    assert found["interactions"][0]["interaction"] == {"val_acc": None, "test_acc": None}


def test_a_failed_run_takes_its_seed_from_every_context() -> None:
    broken = cell(["decay"], [0.5, 0.6, 0.7])
    broken.confirmed[1].update(status="failed", metrics={})
    found = summary([cell((), [0.1, 0.1, 0.1]), broken], ("decay",))["effects"][0]["test_acc"]
    assert (found["n"], found["mean"]) == (2, pytest.approx(0.5))


# --- what counts at chance, and what is left out ---------------------------------------------------------


def test_a_study_in_which_nothing_finished_counts_at_chance() -> None:
    found = summary([cell((), [0.4, 0.5, 0.6]), diverging(["null"]), backprop(0.9, 0.9, 0.9)], ("null",))
    assert found["effects"][0]["test_acc"]["mean"] == pytest.approx(0.1 - 0.5)
    assert found["subsets"] == {"expected": 1, "given": 1, "measured": 1, "nothing_finished": 1}
    line = found["table"][-1]
    assert (line["name"], line["outcome"], line["val_acc"]["mean"]) == (
        "null",
        "nothing finished",
        pytest.approx(CHANCE),
    )
    assert (line["seeds"], line["diverged"], line["coefficients"]) == (list(SEEDS), 0, {})
    assert (line["lost"]["count"], line["lost"]["of"], line["trials"]["diverged"]) == (2, 2, 2)
    assert found["left_out"] == []


@pytest.mark.parametrize(
    ("left", "reason"),
    [
        (cell(["null"], [0.9, 0.9, 0.9], complete=False), "not complete"),
        (diverging(["null"], "failed", "failed"), "most trials failed"),
        (diverging(["null"], "finished", "diverged"), "not confirmed"),
        (cell(["null"], (), confirmed=[run("null", 1000, None, None, "failed")]), "every confirmed run failed"),
    ],
)
def test_a_study_without_accuracies_is_left_out_and_named(left: Cell, reason: str) -> None:
    found = summary([cell((), [0.4, 0.5, 0.6]), left], ("null",))
    assert found["left_out"] == [{"rule": "null", "reason": reason}]
    assert found["effects"][0]["test_acc"] is None
    assert [line["name"] for line in found["table"]] == ["feedback"]
    assert f"null ({reason})" in words.table_caption(found)[-1]


def test_a_subset_stands_once_and_is_made_of_the_primitives() -> None:
    with pytest.raises(ValueError, match="mirror stands twice"):
        summary([cell(["amp", "decay"], [0.5]), cell(["decay", "amp"], [0.5])])
    with pytest.raises(ValueError, match="mirror is no subset of null"):
        summary([cell(["amp", "decay"], [0.5])], ("null",))


def test_a_control_with_primitives_is_not_their_subset() -> None:
    kolen = cell(["decay"], [0.2], rule="kolen-pollack", control=True)
    found = summary([cell((), [0.4]), kolen, cell(["decay"], [0.5])], ("decay",))
    assert (len(found["table"]), found["subsets"]["measured"]) == (3, 1)
    assert found["effects"][0]["test_acc"]["mean"] == pytest.approx(0.1)


# --- the table -------------------------------------------------------------------------------------------


def test_the_table_is_ranked_by_validation_with_paired_differences_to_backprop() -> None:
    liar = cell(["self"], (), confirmed=[run("self", s, 0.2, 0.99) for s in SEEDS])
    found = summary([liar, cell(["amp"], [0.80, 0.81, 0.83]), backprop(0.90, 0.92, 0.91)])
    assert [line["name"] for line in found["table"]] == ["backprop", "amp", "self"]
    amp = found["table"][1]
    # differences −0.10, −0.11, −0.08
    assert amp["test_acc_versus_backprop"]["mean"] == pytest.approx(-0.29 / 3)
    assert amp["test_acc_versus_backprop"]["sd"] == pytest.approx(stdev([-0.10, -0.11, -0.08]))
    assert amp["test_acc_versus_backprop"]["verdict"] == "worse"
    assert (amp["cost_floor"], amp["local"], amp["control"]) == (pytest.approx(4 / 3), True, False)
    assert (found["table"][2]["local"], found["table"][0]["local"]) == (False, None)


def test_the_best_configuration_of_a_study_is_chosen_by_validation() -> None:
    rows = [run("amp", s, v, t, at=at) for s in SEEDS for at, v, t in ((1, 0.6, 0.7), (2, 0.5, 0.9))]
    found = summary([cell(["amp"], (), confirmed=rows)])["table"][0]
    assert (found["coefficients"], found["test_acc"]["mean"]) == ({"decay": 1}, pytest.approx(0.7))


def test_the_share_of_diverged_trials_leaves_failed_ones_out() -> None:
    searched = trials("amp", "finished", "diverged", "stopped", "failed", "diverged")
    found = summary([cell(["amp"], [0.5], searched=searched)])["table"][0]
    assert (found["lost"]["count"], found["lost"]["of"]) == (2, 4)
    assert found["trials"] == {"finished": 1, "stopped": 1, "diverged": 2, "failed": 1}


# --- comparisons -----------------------------------------------------------------------------------------


def test_local_rules_against_the_others_by_hand() -> None:
    found = summary(
        [
            cell(["decay"], [0.5, 0.5, 0.5], searched=trials("decay", "diverged", "finished")),
            cell(["amp"], [0.70, 0.72, 0.74]),
            cell(["self"], [0.80, 0.83, 0.86], searched=trials("self", "diverged", "diverged", "finished")),
            cell(["amp", "sparse"], [0.6, 0.6, 0.6]),
            cell(["decay"], [0.99] * 3, rule="kolen-pollack", control=True),
        ]
    )["locality"]
    assert (found["local"]["subsets"], found["local"]["best"]) == (2, "amp")
    assert (found["non_local"]["subsets"], found["non_local"]["best"]) == (2, "self")
    assert found["best_versus"]["mean"] == pytest.approx(-0.11)
    assert found["best_versus"]["verdict"] == "worse"  # −0.10, −0.11, −0.12
    assert found["local"]["mean"]["test_acc"]["mean"] == pytest.approx(0.61)
    assert found["mean_versus"]["mean"] == pytest.approx(0.61 - 0.715)
    assert (found["local"]["lost"]["count"], found["local"]["lost"]["of"]) == (1, 3)
    assert (found["non_local"]["lost"]["count"], found["non_local"]["lost"]["of"]) == (2, 4)


def test_the_cheapest_is_the_least_cost_floor_that_is_not_worse() -> None:
    lucky = [run("self", seed, 0.11, a) for seed, a in zip(SEEDS, (0.1, 0.9, 0.5), strict=True)]
    found = summary(
        [
            backprop(0.90, 0.91, 0.92),
            cell(["decay"], [0.5, 0.51, 0.54]),  # floor 1, worse
            cell(["self"], (), confirmed=lucky),  # floor 1, not distinguishable on test, at chance on validation
            cell(["amp"], [0.2, 0.9, 0.3]),  # floor 4/3, and so wide that it is not distinguishable
            cell(["amp", "decay"], [0.90, 0.92, 0.91]),  # floor 4/3 too, of two primitives
            cell(["amp", "sparse"], [0.93, 0.95, 0.94]),  # floor 5/3, better
        ]
    )
    cheapest = found["cheapest"]
    assert (cheapest["rule"], cheapest["cost_floor"]) == ("amp", pytest.approx(4 / 3))
    assert cheapest["versus"]["verdict"] == "not distinguishable"
    spread = stdev([0.2 - 0.9, 0.9 - 0.91, 0.3 - 0.92])
    assert cheapest["versus"]["half_width"] == pytest.approx(4.302653 * spread / math.sqrt(3), rel=1e-6)
    assert found["comparisons"] == {
        "subsets": 5,
        "better": 1,
        "worse": 1,
        "not_distinguishable": 3,
        "without_interval": 0,
        "at_chance": 1,
        "by_chance": pytest.approx(0.25),
    }


def test_of_one_seed_nothing_is_known_to_be_cheap() -> None:
    found = summary([backprop(0.9), cell(["decay"], [0.9])])
    assert found["cheapest"] is None
    assert (found["comparisons"]["subsets"], found["comparisons"]["without_interval"]) == (0, 1)


def test_at_equal_cost_the_smaller_subset_then_the_better_one_is_cheapest() -> None:
    near = (0.90, 0.92, 0.89)
    subsets = [cell(s, near) for s in (["decay", "self"], ["decay"])]
    assert summary([backprop(0.90, 0.91, 0.92), *subsets])["cheapest"]["rule"] == "decay"
    better = cell(["self"], [a + 0.001 for a in near])
    assert summary([backprop(0.90, 0.91, 0.92), *subsets, better])["cheapest"]["rule"] == "self"


@pytest.mark.parametrize(("number", "same"), [(3, True), (2, False)])
def test_one_search_over_all_subsets_against_the_best_of_the_matrix(number: int, same: bool) -> None:
    chosen, searched = cell(["amp"], [0.7, 0.7, 0.7]).confirmed, trials("amp", *["finished"] * number)
    of_any = cell(["x"], (), rule="any", confirmed=chosen, searched=searched)
    cells = [
        cell(["amp"], [0.8, 0.81, 0.82]),
        cell(["self"], [0.6] * 3, searched=trials("self", "finished", "diverged")),
        backprop(0.9, 0.9, 0.9),
    ]
    found = summary(cells, any_study=of_any)
    assert (found["any"]["rule"], found["any"]["best"]) == ("amp", "amp")
    assert found["any"]["versus"]["mean"] == pytest.approx(0.11)
    assert found["any"]["versus"]["verdict"] == "better"
    assert (found["any"]["trials"], found["any"]["matrix_trials"], found["any"]["same_budget"]) == (number, 3, same)
    assert [line["name"] for line in found["table"]] == ["backprop", "amp", "self"]
    assert ("not the same budget" in words.verdict_lines(found)[-1]) is not same
    assert summary(cells)["any"] is None


def test_a_search_over_all_subsets_that_is_not_there_yet_says_so() -> None:
    found = summary([cell(["amp"], [0.8])], any_study=cell(["amp"], [0.8], rule="any", complete=False))
    assert (found["any"]["outcome"], found["any"]["versus"], found["any"]["rule"]) == ("not complete", None, None)
    assert "not compared (not complete)" in words.verdict_lines(found)[-1]


def test_nothing_at_all_is_an_empty_summary() -> None:
    found = summary([])
    assert (found["table"], found["cheapest"], found["locality"]["best_versus"]) == ([], None, None)
    assert words.table_rows(found) == []
    assert len(words.verdict_lines(found)) == 3


# --- words -----------------------------------------------------------------------------------------------


def test_the_tables_say_what_was_found_and_over_how_many() -> None:
    found = summary([*cells_of(additive), backprop(0.70, 0.72, 0.74)])
    row = dict(zip(words.TABLE_COLUMNS, words.table_rows(found)[0], strict=True))
    assert (row[""], row["test % (n)"]) == ("1", "72.00 ± 2.00 (n 3)")
    caption = words.table_caption(found)
    assert "31 of 31 subsets, 8 trials of 3 epochs" in caption[0]
    assert "of 31 comparisons without any difference, about 1.6 would say otherwise" in caption[1]
    effect = dict(zip(words.EFFECT_COLUMNS, words.effect_rows(found)[0], strict=True))
    assert effect["test, points [95 %]"] == "+5.00 [+4.50, +5.50] raises (n 3)"
    assert (effect["contexts"], effect["smallest, test"]) == ("16", "+1.00 on feedback")
    pair = dict(zip(words.INTERACTION_COLUMNS, words.interaction_rows(found)[0], strict=True))
    assert pair["pair"] == "decay + amp"
    assert pair["interaction, test, points [95 %]"].startswith("+8.00")
    sides = [dict(zip(words.LOCALITY_COLUMNS, side, strict=True)) for side in words.locality_rows(found)]
    assert [side["subsets"] for side in sides] == ["7", "24"]
    assert "best of 7" in words.verdict_lines(found)[0]
