"""`bench transfer`, whole, on trials whose best coefficients are known: what runs, what is reused, what is said."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.campaign import confirm_seeds
from bench.config import TrialConfig, UserError
from bench.place import Options
from bench.space_files import load_space
from bench.transfer import TransferConfig, position, prepare_transfer, spread_out, transfer
from bench.transfer_words import SAME, matrix_rows, pair_rows
from rehearsal import Formula, Stage, rows, stage  # noqa: F401  (stage is a fixture)

#: log10 of the best coefficient, and of the largest that does not diverge, by network.
BEST = {"lenet": -2.0, "resnet18": -4.0}
LIMIT = {"lenet": -1.2, "resnet18": -2.5}


def trained(config: TrialConfig) -> float | None:
    """A parabola over log10(sparse), which moves a little with the seed; controls are flat."""
    if config.rule != "sparse":
        return 0.9 if config.rule == "backprop" else 0.2
    where = math.log10(config.coefficients["sparse"])
    if where > LIMIT[config.arch]:
        return None
    return max(0.1, 0.8 - 0.05 * (where - BEST[config.arch]) ** 2 + 0.001 * (config.seed % 7))


def prepared(folder: Path, *, both: bool = False, configs: int = 3, rules: tuple[str, ...] = ("sparse",), **given: Any):  # type: ignore[no-untyped-def]
    config = TransferConfig(
        name="t",
        rules=rules,
        source="resnet18",
        targets=("lenet",),
        dataset="digits",
        spaces=("reference",),
        configs=configs,
        both=both,
    )
    budget = {"trials": 6, "epochs": 2, "scheduler": "none", "sampler": "random", "confirm_seeds": 3, **given}
    options = Options(results=folder, concurrent=2)
    return prepare_transfer(config, given=budget, changes={}, options=options)


def run(folder: Path, **changes: Any) -> tuple[str, dict[str, Any]]:
    return transfer(prepared(folder, **changes), say=lambda _: None)


def the_best(folder: Path, arch: str) -> float:
    found = [r for r in rows(folder / f"sparse-{arch}-digits-reference" / "rows.jsonl") if r["kind"] == "search"]
    finished = [r for r in found if r["status"] == "finished"]
    return float(max(finished, key=lambda r: r["metrics"]["val_acc"])["config"]["coefficients"]["sparse"])


def accuracy(arch: str, sparse: float, seed: int) -> float:
    found = trained(TrialConfig(rule="sparse", arch=arch, coefficients={"sparse": sparse}, seed=seed))
    assert found is not None
    return found


def test_regret_is_what_the_formula_says(tmp_path: Path, stage: Callable[[Formula], Stage]) -> None:  # noqa: F811
    stage(trained)
    outcome, summary = run(tmp_path)
    assert outcome == "done"
    assert summary["complete"]
    assert not summary["pairs"][0]["same"]
    (pair,) = summary["pairs"]
    ours, theirs = the_best(tmp_path, "resnet18"), the_best(tmp_path, "lenet")
    seeds = [1000, 1001, 1002]
    expected = [accuracy("lenet", theirs, s) - accuracy("lenet", ours, s) for s in seeds]
    assert pair["regret"]["val_acc"]["mean"] == pytest.approx(sum(expected) / 3)
    assert pair["regret"]["test_acc"]["mean"] == pytest.approx(sum(expected) / 3)
    assert pair["regret"]["test_acc"]["n"] == 3
    back = (
        [accuracy("resnet18", ours, s) - accuracy("resnet18", theirs, s) for s in seeds] if theirs < 10**-2.5 else None
    )
    if back:
        assert pair["back_regret"]["test_acc"]["mean"] == pytest.approx(sum(back) / 3)


def test_the_same_configurations_on_both_networks(tmp_path: Path, stage: Callable[[Formula], Stage]) -> None:  # noqa: F811
    stage(trained)
    _, summary = run(tmp_path)
    own = rows(tmp_path / "t" / "rows.jsonl")
    carried = [r for r in own if r["config"]["seed"] == 0]
    there = {
        r["config"]["coefficients"]["sparse"]
        for r in rows(tmp_path / "sparse-resnet18-digits-reference" / "rows.jsonl")
    }
    assert len(carried) == 4  # the best, and three more
    assert {r["config"]["arch"] for r in carried} == {"lenet"}
    assert {r["config"]["coefficients"]["sparse"] for r in carried} <= there
    assert the_best(tmp_path, "resnet18") in {r["config"]["coefficients"]["sparse"] for r in carried}
    assert not any(r["test_read"] for r in carried)
    assert summary["pairs"][0]["rank"]["n"] == 4
    # their recipe is the target's own
    assert {r["kind"] for r in own} == {"transfer"}


def test_confirmed_runs_have_the_fresh_seeds_of_the_target(tmp_path: Path, stage: Callable[[Formula], Stage]) -> None:  # noqa: F811
    stage(trained)
    run(tmp_path)
    tested = [r for r in rows(tmp_path / "t" / "rows.jsonl") if r["test_read"]]
    by_arch = Counter(r["config"]["arch"] for r in tested)
    assert by_arch == {"lenet": 3, "resnet18": 3}  # moved, and moved back
    assert {r["config"]["seed"] for r in tested} == {1000, 1001, 1002}


def test_a_search_that_exists_is_not_run_again(tmp_path: Path, stage: Callable[[Formula], Stage]) -> None:  # noqa: F811
    first = stage(trained)
    run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("*/rows.jsonl")}
    ran = len(first.runs)
    outcome, summary = run(tmp_path)
    assert outcome == "known"
    assert summary["complete"]
    assert len(first.runs) == ran
    assert before == {path: path.read_bytes() for path in tmp_path.glob("*/rows.jsonl")}


@pytest.mark.parametrize("stop", [1, 5, 13, 20, 26])
def test_interrupted_and_resumed_gives_the_same(tmp_path: Path, stage: Callable[[Formula], Stage], stop: int) -> None:  # noqa: F811
    whole = stage(trained)
    _, expected = run(tmp_path / "whole", both=True)
    assert stop < len(whole.runs)
    broken = stage(trained)
    broken.stop_after = stop
    outcome, partial = run(tmp_path / "broken", both=True)
    assert outcome == "interrupted"
    assert not partial["complete"]
    broken.stop_after = None
    outcome, summary = run(tmp_path / "broken", both=True)
    assert outcome == "done"
    kept = ("study", "pairs", "rules", "runs", "complete")
    assert {k: summary[k] for k in kept} == {k: expected[k] for k in kept}
    assert Counter(uid for uid, _ in broken.runs if broken.runs).most_common(1)[0][1] <= 2  # only what was under way
    for study in ("t", "sparse-lenet-digits-reference", "sparse-resnet18-digits-reference", "controls"):
        filed = [r["uid"] for r in rows(tmp_path / "broken" / study / "rows.jsonl")]
        assert sorted(filed) == sorted(r["uid"] for r in rows(tmp_path / "whole" / study / "rows.jsonl"))


def test_both_directions_share_their_runs(tmp_path: Path, stage: Callable[[Formula], Stage]) -> None:  # noqa: F811
    made = stage(trained)
    _, summary = run(tmp_path, both=True)
    assert [(p["source"], p["target"]) for p in summary["pairs"]] == [("resnet18", "lenet"), ("lenet", "resnet18")]
    assert summary["pairs"][0]["back_regret"] == summary["pairs"][1]["regret"]
    assert max(Counter(uid for uid, _ in made.runs).values()) == 1


def test_what_a_search_has_run_already_is_not_run_again(tmp_path: Path, stage: Callable[[Formula], Stage]) -> None:  # noqa: F811
    """Two networks with one space and one seed draw the same first trials: these are carried over already."""
    made = stage(lambda config: 0.5 - abs(math.log10(config.coefficients.get("sparse", 1e-5)) + 5) / 100)
    config = TransferConfig(
        name="t", rules=("sparse",), source="resnet18", targets=("resnet20",), dataset="digits", spaces=("reference",)
    )
    given = {"trials": 6, "epochs": 2, "scheduler": "none", "sampler": "random", "confirm_seeds": 3}
    plan = prepare_transfer(config, given=given, changes={}, options=Options(results=tmp_path))
    outcome, summary = transfer(plan, say=lambda _: None)
    assert outcome == "done"
    assert rows(tmp_path / "t" / "rows.jsonl") == []
    assert len({config.digest() for _, config in made.runs}) == len(made.runs)
    (pair,) = summary["pairs"]
    assert pair["rank"]["n"] == 5
    assert pair["regret"]["test_acc"]["mean"] == pair["back_regret"]["test_acc"]["mean"] == 0
    assert pair["same"]
    assert pair_rows(summary)[0][5] == matrix_rows(summary, "sparse", "reference")[0][2] == SAME


def test_what_the_source_stopped_early_is_run_there_whole(tmp_path: Path, stage: Callable[[Formula], Stage]) -> None:  # noqa: F811
    stage(trained)
    _, summary = run(tmp_path, trials=9, epochs=9, scheduler="asha", configs=8)
    status = Counter(r["status"] for r in rows(tmp_path / "sparse-resnet18-digits-reference" / "rows.jsonl"))
    assert status["stopped"]
    again = [r for r in rows(tmp_path / "t" / "rows.jsonl") if r["config"]["arch"] == "resnet18" and not r["test_read"]]
    assert len(again) == status["stopped"]
    assert summary["pairs"][0]["rank"]["n"] == 9


def test_a_source_where_nothing_finished_says_so(tmp_path: Path, stage: Callable[[Formula], Stage]) -> None:  # noqa: F811
    stage(lambda config: None if config.arch == "resnet18" and config.rule == "sparse" else trained(config))
    outcome, summary = run(tmp_path)
    assert outcome == "done"
    (pair,) = summary["pairs"]
    assert pair["regret"]["test_acc"] is None
    assert pair["reason"]


def test_unequal_budgets_are_refused(tmp_path: Path, stage: Callable[[Formula], Stage]) -> None:  # noqa: F811
    stage(trained)
    run(tmp_path)
    with pytest.raises(UserError, match="has epochs = 2, and this plan 3"):
        prepared(tmp_path, epochs=3)
    with pytest.raises(UserError, match="has trials = 6, and this plan 4"):
        prepared(tmp_path, trials=4)
    known = prepared(tmp_path, trials=None, epochs=None, scheduler=None, sampler=None)
    assert {(r.config.trials, r.config.epochs, r.config.sampler) for r in known.searches.values()} == {(6, 2, "random")}


def test_a_larger_budget_goes_on_with_the_searches(tmp_path: Path, stage: Callable[[Formula], Stage]) -> None:  # noqa: F811
    made = stage(trained)
    run(tmp_path)
    before = len(made.runs)
    run(tmp_path, trials=7)
    searched = [uid for uid, c in made.runs[before:] if uid.endswith("-0006") and c.seed == 0]
    assert sorted(searched) == ["sparse-lenet-digits-reference-0006", "sparse-resnet18-digits-reference-0006"]


def test_another_recipe_is_refused(tmp_path: Path, stage: Callable[[Formula], Stage]) -> None:  # noqa: F811
    stage(trained)
    run(tmp_path)
    config = TransferConfig(
        name="t", rules=("sparse",), source="resnet18", targets=("lenet",), dataset="digits", spaces=("reference",)
    )
    with pytest.raises(UserError, match="trained with another recipe"):
        prepare_transfer(config, given={}, changes={"lr": 0.5}, options=Options(results=tmp_path))


def test_a_transfer_grows_and_is_no_other(tmp_path: Path, stage: Callable[[Formula], Stage]) -> None:  # noqa: F811
    stage(trained)
    run(tmp_path)
    run(tmp_path, rules=("sparse", "symmetric"), configs=4, both=True)
    with pytest.raises(UserError, match="does not cover"):
        run(tmp_path, rules=("symmetric",), configs=4, both=True)


def test_points_are_spread_out() -> None:
    """By hand: from 0.2, the farthest is 1.0, then 0.6 (0.4 from both), then 0.0."""
    points = [(0.2,), (0.0,), (1.0,), (0.6,), (0.25,)]
    assert spread_out(points, 0, 4) == [0, 2, 3, 1]
    assert spread_out(points, 0, 99) == [0, 2, 3, 1, 4]
    assert spread_out([(0.5,), (0.5,)], 1, 2) == [1, 0]


def test_positions_are_on_the_scale_of_the_space() -> None:
    space = load_space("sparse", "resnet18", space="reference")  # 1e-7 to 1e-2, logarithmic
    config = TrialConfig(rule="sparse", coefficients={"sparse": 10**-4.5}).to_dict()
    assert position(space, config) == pytest.approx((0.5,))


def test_seeds_are_paired(tmp_path: Path) -> None:
    searches = prepared(tmp_path).searches.values()
    assert len({tuple(confirm_seeds(ready.config)) for ready in searches}) == 1
