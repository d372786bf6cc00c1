"""What carried over, where it is known: a landscape with a known optimum for each network, and by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from bench.rows import FIELDS, Row
from bench.transfer_summary import Carried, Pair, portability, summarize_transfer
from bench.transfer_words import (
    PAIR_COLUMNS,
    RANKING_COLUMNS,
    matrices,
    matrix_columns,
    matrix_rows,
    pair_rows,
    ranking_rows,
)

CHANCE, EXAMPLES = 0.1, 900  # at chance: up to 0.1 + 2·0.01
SEEDS = (1000, 1001, 1002)


def run(seed: int, val: float | None, test: float | None = None, status: str = "finished", at: float = 1.0) -> Row:
    metrics = {name: value for name, value in (("val_acc", val), ("test_acc", test)) if value is not None}
    config = {"rule": "mirror", "coefficients": {"amp": at}, "seed": seed}
    filled = {"uid": f"{at}-{seed}", "status": status, "config": config, "metrics": metrics}
    return {**dict.fromkeys(FIELDS), **filled}


def confirmed(accuracies: Iterable[float], first: int = 1000) -> list[Row]:
    """Test accuracies from the first seed on; on validation each is half of it."""
    return [run(seed, a / 2, a) for seed, a in enumerate(accuracies, first)]


def carried(*pairs: tuple[float, float]) -> list[Carried]:
    """Validation accuracies at home and away."""
    return [Carried(home=run(0, h, at=i), away=run(0, a, at=i)) for i, (h, a) in enumerate(pairs, 1)]


def pair(source: str = "a", target: str = "b", rule: str = "mirror", space: str = "reference", **more: Any) -> Pair:
    empty: dict[str, Sequence[Any]] = dict.fromkeys(("carried", "native", "moved", "home", "back", "reference"), ())
    given = {**empty, "chance": CHANCE, "examples": EXAMPLES, **more}
    return Pair(rule=rule, source=source, target=target, space=space, **given)


def summary(*pairs: Pair) -> dict[str, Any]:
    found = summarize_transfer(pairs)
    json.dumps(found, allow_nan=False)  # JSON-ready, always
    return found


def one(**more: Any) -> dict[str, Any]:
    return dict(summary(pair(**more))["pairs"][0])


# --- regret ----------------------------------------------------------------------------------------------


def test_regret_is_native_minus_moved_paired_by_seed_by_hand() -> None:
    """Differences 0.04, 0.06, 0.05: mean 0.05, sd 0.01, half width 4.302653·0.01/√3."""
    found = one(native=confirmed([0.90, 0.92, 0.94]), moved=confirmed([0.86, 0.86, 0.89]))
    regret = found["regret"]["test_acc"]
    assert (regret["mean"], regret["n"], regret["verdict"]) == (pytest.approx(0.05), 3, "lower")
    assert regret["high"] - regret["mean"] == pytest.approx(4.302653 * 0.01 / 3**0.5, rel=1e-6)
    assert found["regret"]["val_acc"]["mean"] == pytest.approx(0.025)
    assert found["native"]["test_acc"]["mean"] == pytest.approx(0.92)
    assert found["moved"]["seeds"] == list(SEEDS)
    assert found["reason"] is None


@pytest.mark.parametrize(
    ("native", "moved", "said"),
    [
        ((0.80, 0.81, 0.82), (0.90, 0.91, 0.93), "higher"),
        ((0.80, 0.90, 0.85), (0.85, 0.80, 0.90), "not distinguishable"),
        ((0.90, 0.90, 0.90), (0.90, 0.90, 0.90), "not distinguishable"),  # the same configuration
        ((0.90,), (0.10,), "not distinguishable"),  # one seed has no interval
    ],
)
def test_the_verdict_is_on_the_run_that_was_moved(
    native: tuple[float, ...], moved: tuple[float, ...], said: str
) -> None:
    assert one(native=confirmed(native), moved=confirmed(moved))["regret"]["test_acc"]["verdict"] == said


def test_one_seed_has_a_regret_and_no_interval() -> None:
    regret = one(native=confirmed([0.9]), moved=confirmed([0.8]))["regret"]["test_acc"]
    assert regret["mean"] == pytest.approx(0.1)
    assert (regret["n"], regret["sd"], regret["low"], regret["high"]) == (1, None, None, None)


def test_diverged_runs_stand_at_chance_and_failed_ones_are_left_out_and_both_are_counted() -> None:
    moved = [run(1000, 0.1, 0.1, "diverged"), run(1001, None, None, "failed"), run(1002, 0.8, 0.8)]
    found = one(native=confirmed([0.9, 0.9, 0.9]), moved=moved)
    assert found["regret"]["test_acc"]["mean"] == pytest.approx((0.8 + 0.1) / 2)
    assert found["regret"]["test_acc"]["n"] == 2
    assert (found["moved"]["diverged"], found["moved"]["failed"]) == (1, 1)
    assert found["moved"]["test_acc"]["mean"] == pytest.approx(0.45)


def test_the_control_moves_the_targets_best_back() -> None:
    found = one(home=confirmed([0.9, 0.9]), back=confirmed([0.7, 0.6]), reference=confirmed([0.95, 0.97]))
    assert found["back_regret"]["test_acc"]["mean"] == pytest.approx(0.25)
    assert found["reference"]["test_acc"]["mean"] == pytest.approx(0.96)
    assert found["regret"] == {"val_acc": None, "test_acc": None}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({}, "no trial finished on a"),
        ({"carried": [Carried(home=run(0, 0.1, status="diverged"), away=None)]}, "no trial finished on a"),
        ({"carried": carried((0.9, 0.8))}, "no trial finished and was confirmed on b"),
        ({"moved": confirmed([0.9])}, "no trial finished and was confirmed on b"),
        ({"carried": carried((0.9, 0.8)), "native": confirmed([0.9])}, "the best of a was not run on b"),
        ({"moved": [run(1000, None, status="failed")], "native": confirmed([0.9])}, "every moved run on b failed"),
        ({"moved": confirmed([0.9]), "native": confirmed([0.9], first=7)}, "no seed in common"),
    ],
)
def test_a_regret_that_is_not_there_says_why(more: dict[str, Any], reason: str) -> None:
    found = summary(pair(**more))
    assert found["pairs"][0]["regret"]["test_acc"] is None
    assert reason in found["pairs"][0]["reason"]
    assert reason in pair_rows(found)[0][5]
    assert (found["rules"][0]["place"], found["rules"][0]["regret"]["test_acc"]) == (None, None)


# --- rank correlation and lost share ---------------------------------------------------------------------


def test_rank_correlation_and_lost_share_by_hand() -> None:
    """Eight configurations, so that the top quarter is two of them: 0.9 (0.12 away: chance) and 0.8 (0.5)."""
    both = carried((0.9, 0.12), (0.8, 0.5), (0.7, 0.6), (0.6, 0.7), (0.5, 0.4), (0.4, 0.3), (0.3, 0.2), (0.2, 0.15))
    found = one(carried=both)
    # ranks at home 8 7 6 5 4 3 2 1, away 1 6 7 8 5 4 3 2: Σd² = 49 + 1 + 1 + 9 + 1 + 1 + 1 + 1 = 64
    assert found["rank"]["rho"] == pytest.approx(1 - 6 * 64 / (8 * 63))
    assert found["rank"]["n"] == 8
    assert {name: found["lost"][name] for name in ("share", "count", "of", "top")} == {
        "share": 0.5,
        "count": 1,
        "of": 2,
        "top": 2,
    }
    # 1 of 2: (1 − p)² and p² are 0.975
    assert found["lost"]["low"] == pytest.approx(1 - 0.975**0.5)
    assert found["lost"]["high"] == pytest.approx(0.975**0.5)


def test_diverged_configurations_are_equal_in_rank_and_lost() -> None:
    homes = [run(0, v, at=i) for i, v in enumerate((0.9, 0.8, 0.7, 0.6, 0.5))]
    aways = [run(0, 0.1, status="diverged", at=i) for i in range(2)]
    aways += [run(0, v, at=i) for i, v in ((2, 0.7), (3, 0.5), (4, 0.6))]
    found = one(carried=[Carried(home=h, away=a) for h, a in zip(homes, aways, strict=True)])
    # ranks 5 4 3 2 1 and 1.5 1.5 5 3 4: covariance −6.5 of √(10·9.5)
    assert found["rank"]["rho"] == pytest.approx(-6.5 / math.sqrt(10 * 9.5))
    assert (found["rank"]["diverged"], found["rank"]["diverged_home"]) == (2, 0)
    assert (found["lost"]["count"], found["lost"]["of"]) == (2, 2)  # ceil(5 / 4)


def test_failed_and_missing_configurations_are_left_out_and_counted() -> None:
    both = [
        *carried((0.9, 0.8), (0.7, 0.6), (0.5, 0.3)),
        Carried(home=run(0, 0.95, at=7), away=run(0, None, status="failed", at=7)),
        Carried(home=run(0, 0.93, at=8), away=None),
        Carried(home=run(0, None, status="failed", at=9), away=run(0, 0.5, at=9)),
    ]
    found = one(carried=both)
    assert (found["rank"]["n"], found["rank"]["failed"], found["rank"]["missing"]) == (3, 2, 1)
    assert found["rank"]["rho"] == pytest.approx(1)
    assert {k: found["lost"][k] for k in ("of", "top", "failed", "missing", "share")} == {
        "of": 0,
        "top": 2,  # 0.95 and 0.93 of the five that have an accuracy at home
        "failed": 1,
        "missing": 1,
        "share": None,
    }


def test_what_was_at_chance_at_home_is_said() -> None:
    lost = one(carried=carried((0.11, 0.1), (0.1, 0.9)))["lost"]
    assert (lost["count"], lost["of"], lost["nothing_to_lose"]) == (0, 0, 1)


def test_one_side_without_any_order_has_no_rho() -> None:
    assert one(carried=carried((0.9, 0.1), (0.8, 0.1), (0.7, 0.1)))["rank"]["rho"] is None
    assert one(carried=carried((0.9, 0.1), (0.8, 0.2)))["rank"]["rho"] is None


def test_runs_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="less than its full budget"):
        Carried(home=run(0, 0.9, status="stopped"), away=None)
    with pytest.raises(ValueError, match="different coefficients"):
        Carried(home=run(0, 0.9, at=1), away=run(0, 0.9, at=2))
    with pytest.raises(ValueError, match="stands twice"):
        summarize_transfer([pair(), pair()])


# --- a landscape -----------------------------------------------------------------------------------------

OPTIMUM = {"a": 0.0, "b": 1.0, "c": 4.0}


def landscape(arch: str, at: float, seed: int) -> float:
    """Accuracy with the coefficient 10^at; the seeds' luck is the same everywhere."""
    return 0.9 - 0.03 * (at - OPTIMUM[arch]) ** 2 + 0.001 * (seed % 10)


def landscape_pair(source: str, target: str) -> Pair:
    def seeds(arch: str, of: str) -> list[Row]:
        return [run(s, a := landscape(arch, OPTIMUM[of], s), a, at=OPTIMUM[of]) for s in SEEDS]

    grid = [-1.0, 0.0, 0.4, 1.3, 2.1, 3.2, 4.0]
    return pair(
        source,
        target,
        carried=[
            Carried(home=run(0, landscape(source, at, 0), at=at), away=run(0, landscape(target, at, 0), at=at))
            for at in grid
        ],
        native=seeds(target, target),
        moved=seeds(target, source),
        home=seeds(source, source),
        back=seeds(source, target),
    )


def test_a_known_optimum_per_network_gives_its_regrets() -> None:
    routes = [(s, t) for s in OPTIMUM for t in OPTIMUM if s != t]
    found = summary(*(landscape_pair(*route) for route in routes))
    for entry in found["pairs"]:
        expected = 0.03 * (OPTIMUM[entry["source"]] - OPTIMUM[entry["target"]]) ** 2
        assert entry["regret"]["test_acc"]["mean"] == pytest.approx(expected)
        assert entry["back_regret"]["test_acc"]["mean"] == pytest.approx(expected)
    rule = found["rules"][0]
    assert rule["regret"]["test_acc"]["mean"] == pytest.approx(0.03 * 2 * (1 + 16 + 9) / 6)
    assert (rule["pairs"], rule["regret"]["test_acc"]["pairs"]) == (6, 6)
    assert {rule["worst"]["source"], rule["worst"]["target"]} == {"a", "c"}
    assert rule["worst"]["mean"] == pytest.approx(0.48)
    rhos = [entry["rank"]["rho"] for entry in found["pairs"]]
    assert (rule["rho"]["mean"], rule["rho"]["pairs"]) == (pytest.approx(sum(rhos) / 6), 6)
    assert rhos[0] > 0 > rhos[1]  # a and b are near; the order on c is another
    assert rule["lost"]["of"] == 12
    matrix = portability(found, "mirror", "reference")
    assert matrix["archs"] == ["a", "b", "c"]
    assert matrix["native"]["b"]["mean"] == pytest.approx(0.901)
    assert matrix["regret"]["a"]["c"]["mean"] == pytest.approx(0.48)
    assert "a" not in matrix["regret"]["a"]


# --- rules -----------------------------------------------------------------------------------------------


def test_the_mean_over_pairs_is_taken_at_each_seed_then_estimated() -> None:
    """Regrets 0.1, 0.2, 0.3 and 0.4, 0.2, – : means at the two common seeds 0.25 and 0.2."""
    first = pair("a", "b", native=confirmed([0.9] * 3), moved=confirmed([0.8, 0.7, 0.6]))
    second = pair("a", "c", native=confirmed([0.9] * 3), moved=confirmed([0.5, 0.7]))
    regret = summary(first, second, pair("b", "c"))["rules"][0]["regret"]["test_acc"]
    assert (regret["mean"], regret["n"], regret["pairs"]) == (pytest.approx(0.225), 2, 2)
    assert regret["sd"] == pytest.approx(0.05 / math.sqrt(2))


def test_rules_are_ranked_by_regret_and_neighbours_compared_on_what_both_have() -> None:
    def given(rule: str, target: str, *moved: float) -> Pair:
        return pair("a", target, rule=rule, native=confirmed([0.9] * 3), moved=confirmed(moved))

    found = summary(
        given("mirror", "b", 0.5, 0.51, 0.52),
        pair("a", "b", rule="amp"),
        given("symmetric", "b", 0.88, 0.90, 0.89),
        given("symmetric", "c", 0.2, 0.2, 0.2),
        given("decay", "b", 0.5, 0.5, 0.5),
        given("decay", "c", 0.3, 0.3, 0.3),
    )
    assert [(r["rule"], r["place"]) for r in found["rules"]] == [
        ("symmetric", 1),
        ("mirror", 2),
        ("decay", 3),
        ("amp", None),
    ]
    by_rule = {r["rule"]: r for r in found["rules"]}
    # symmetric: mean of 0.01 and 0.7; over b alone, which both have: 0.01 − 0.39
    assert by_rule["symmetric"]["regret"]["test_acc"]["mean"] == pytest.approx(0.355)
    against = by_rule["symmetric"]["versus_next"]
    assert (against["mean"], against["pairs"], against["n"]) == (pytest.approx(-0.38), 1, 3)
    assert against["verdict"] == "lower"
    assert by_rule["mirror"]["versus_next"]["verdict"] == "not distinguishable"
    assert by_rule["mirror"]["versus_next"]["pairs"] == 1
    assert by_rule["mirror"]["versus_next"]["mean"] == pytest.approx(-0.01)
    assert by_rule["decay"]["versus_next"] is None


def test_lost_configurations_are_summed_over_pairs_and_spaces_are_apart() -> None:
    found = summary(
        pair("a", "b", carried=carried((0.9, 0.1))),
        pair("a", "c", carried=carried((0.9, 0.8))),
        pair("a", "d"),
        pair("a", "b", space="normalized", carried=carried((0.9, 0.8))),
    )
    lost = {r["space"]: r["lost"] for r in found["rules"]}
    assert lost["reference"] == {"share": 0.5, "count": 1, "of": 2, "pairs": 2}
    assert lost["normalized"] == {"share": 0.0, "count": 0, "of": 1, "pairs": 1}


def test_nothing_at_all_is_an_empty_summary() -> None:
    assert summary() == {"archs": [], "pairs": [], "rules": []}


# --- words -----------------------------------------------------------------------------------------------


def test_the_tables_say_what_was_found_and_over_how_many() -> None:
    found = summary(
        pair(
            native=confirmed([0.90, 0.92, 0.94]),
            moved=[*confirmed([0.86, 0.86]), run(1002, 0.1, 0.1, "diverged")],
            carried=carried((0.9, 0.1), (0.8, 0.7), (0.7, 0.8), (0.6, 0.5)),
        )
    )
    cells = dict(zip(PAIR_COLUMNS, pair_rows(found)[0], strict=True))
    assert cells["from → to"] == "a → b"
    assert cells["native test %"] == "92.00 ± 2.00 (n 3)"
    assert cells["moved test %"].endswith("(n 3), 1 diverged")
    assert cells["regret, points [95 %]"].startswith("+31.33 [")
    assert cells["regret, points [95 %]"].endswith("not distinguishable (n 3)")
    assert cells["ρ [95 %] (n)"].startswith("-0.40 [")
    assert cells["ρ [95 %] (n)"].endswith("(n 4)")
    assert cells["lost"] == "1/1"
    assert cells["backprop test %"] == cells["moved back, points [95 %]"] == "–"
    ranked = dict(zip(RANKING_COLUMNS, ranking_rows(found)[0], strict=True))
    assert ranked["worst pair, points"] == "+31.33 (n 3) a → b"
    assert ranked["mean ρ (pairs)"] == "-0.40 (1)"


def test_the_matrix_has_the_native_accuracy_on_its_diagonal() -> None:
    found = summary(landscape_pair("a", "b"))
    assert matrices(found) == [("mirror", "reference")]
    assert matrix_columns(found, "mirror", "reference") == ("from \\ to", "a", "b")
    first, second = matrix_rows(found, "mirror", "reference")
    assert first[:2] == ("a", "90.10 ± 0.10 (n 3)")
    assert first[2].startswith("+3.00 [")
    assert second == ("b", "–", "90.10 ± 0.10 (n 3)")
