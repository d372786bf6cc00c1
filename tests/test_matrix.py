"""`bench matrix`, whole, on trials in which each primitive has a known effect: what runs, is reused, and is said."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.config import PRIMITIVE_NAMES, TrialConfig, UserError
from bench.journal import claim
from bench.learning.rules import ANY, parse_rule, subsets
from bench.matrix import MatrixConfig, beside, matrix, outlook, prepare_matrix
from bench.place import Options
from bench.spaces import DEFAULT
from rehearsal import Formula, Stage, rows, stage  # noqa: F401  (stage is a fixture)

#: What each primitive adds to the accuracy of 0.4 that fixed feedback has, and the one pair that does more together.
EFFECT = {"decay": 0.01, "amp": 0.05, "null": 0.02, "sparse": -0.03, "self": 0.08}
TOGETHER = 0.1


def trained(config: TrialConfig) -> float | None:
    on = set(parse_rule(config.rule).primitives)
    if config.rule == "backprop":
        return 0.9
    if config.rule in ("sign", "frozen", "kolen-pollack"):
        return 0.3
    return 0.4 + sum(EFFECT[p] for p in on) + TOGETHER * ({"amp", "sparse"} <= on) + 0.001 * (config.seed % 7)


def prepared(folder: Path, *, only: tuple[str, ...] = (), primitives: tuple[str, ...] = PRIMITIVE_NAMES, **more: Any):  # type: ignore[no-untyped-def]
    whole = more.pop("any", False)
    config = MatrixConfig(name="m", archs=("lenet",), dataset="digits", primitives=primitives, any=whole)
    given = {"trials": 2, "epochs": 1, "scheduler": "none", "sampler": "random", "confirm_seeds": 3, **more}
    options = Options(results=folder, concurrent=2)
    return prepare_matrix(config, only=only, given=given, changes={}, options=options)


def run(folder: Path, **changes: Any) -> tuple[str, dict[str, Any]]:
    return matrix(prepared(folder, **changes), say=lambda _: None)


def test_all_subsets_beside_the_controls(tmp_path: Path, stage: Callable[[Formula], Stage]) -> None:  # noqa: F811
    made = stage(trained)
    outcome, summary = run(tmp_path, any=True)
    assert outcome == "done"
    assert summary["complete"]
    trained_rules = Counter(config.rule for uid, config in made.runs if not uid.startswith("any"))
    expected = {"+".join(s) for n in range(1, 6) for s in itertools.combinations(PRIMITIVE_NAMES, n)}
    assert len(expected) == 31
    controls = {"backprop": 3, "feedback": 3, "sign": 4, "frozen": 4, "kolen-pollack": 5}  # by seeds; with a trial; two
    assert trained_rules == {**{parse_rule(s).name: 2 + 3 for s in expected}, **controls}
    table = summary["archs"]["lenet"]["table"]
    assert len(table) == 31 + 5
    assert [line["name"] for line in table[:2]] == ["backprop", "decay+amp+null+sparse+self"]  # 0.9, and 0.63
    the_effects_are_those_of_the_formula(summary["archs"]["lenet"])

    # one search over all subsets, of the budget of them all, is compared with the best of them
    found = summary["archs"]["lenet"]["any"]
    assert found["trials"] == found["matrix_trials"] == 2 * 31
    assert found["same_budget"]
    tried = {config.rule for uid, config in made.runs if uid.startswith("any-lenet-digits-00")}
    assert len(tried) > 10
    assert tried <= {"feedback", *(rule.name for rule in subsets())}
    searches = prepared(tmp_path, any=True).searches
    whole = next(ready for w, ready in searches.items() if w.rule == ANY)
    assert beside(whole, DEFAULT) == found
    # its budget, where nobody names one, is that of the searches that were found
    config = MatrixConfig(name="m", archs=("lenet",), dataset="digits", any=True)
    options = Options(results=tmp_path)
    known = prepare_matrix(config, only=(), given={}, changes={}, options=options).searches.values()
    assert {(ready.config.epochs, ready.config.confirm_seeds) for ready in known} == {(1, 3)}
    longer = replace(whole, config=whole.config.replace(epochs=2))
    assert beside(longer, DEFAULT) is None


def the_effects_are_those_of_the_formula(found: dict[str, Any]) -> None:
    for effect in found["effects"]:
        # half of the contexts of amp and of sparse hold the other one
        own = EFFECT[effect["primitive"]] + (TOGETHER / 2 if effect["primitive"] in ("amp", "sparse") else 0)
        assert effect["test_acc"]["mean"] == pytest.approx(own)
        assert effect["test_acc"]["n"] == 3
        assert effect["test_acc"]["contexts"] == 16
    for pair in found["interactions"]:
        expected = TOGETHER if set(pair["primitives"]) == {"amp", "sparse"} else 0.0
        assert pair["interaction"]["test_acc"]["mean"] == pytest.approx(expected, abs=1e-12)


def test_what_exists_is_reused(tmp_path: Path, stage: Callable[[Formula], Stage]) -> None:  # noqa: F811
    made = stage(trained)
    run(tmp_path, primitives=("decay", "amp"))
    first = {uid for uid, _ in made.runs}
    made.runs.clear()
    run(tmp_path, primitives=("decay", "amp", "self"))
    assert not first & {uid for uid, _ in made.runs}
    rules = {config.rule for _, config in made.runs}
    assert rules == {"self", "symmetric", "amp+self", "decay+amp+self"}
    made.runs.clear()
    assert run(tmp_path, primitives=("decay", "amp", "self"))[0] == "known"
    assert made.runs == []


@pytest.mark.parametrize("stop", [1, 9, 17, 30])
def test_interrupted_and_resumed_gives_the_same(tmp_path: Path, stage: Callable[[Formula], Stage], stop: int) -> None:  # noqa: F811
    stage(trained)
    three = ("decay", "amp", "sparse")
    _, expected = run(tmp_path / "whole", primitives=three)
    broken = stage(trained)
    broken.stop_after = stop
    outcome, partial = run(tmp_path / "broken", primitives=three)
    assert outcome == "interrupted"
    assert not partial["complete"]
    broken.stop_after = None
    _, summary = run(tmp_path / "broken", primitives=three)
    assert summary["archs"] == expected["archs"]
    for path in (tmp_path / "whole").glob("*/rows.jsonl"):
        filed = rows(tmp_path / "broken" / path.parent.name / path.name)
        assert sorted(r["uid"] for r in filed) == sorted(r["uid"] for r in rows(path))


def test_a_part_of_it_in_any_order(tmp_path: Path, stage: Callable[[Formula], Stage]) -> None:  # noqa: F811
    made = stage(trained)
    two = ("decay", "amp")
    _, summary = run(tmp_path, primitives=two, only=("mirror",))
    assert {config.rule for _, config in made.runs} == {"mirror", "backprop", "feedback"}
    assert not summary["complete"]
    assert {left["rule"] for left in summary["archs"]["lenet"]["left_out"]} >= {"decay", "amp"}
    _, summary = run(tmp_path, primitives=two, only=("amp", "decay", "sign", "frozen", "kolen-pollack"))
    assert summary["complete"]
    _, whole = run(tmp_path / "at once", primitives=two)
    assert summary["archs"] == whole["archs"]


def test_a_search_that_another_process_has_is_left_to_it(tmp_path: Path, stage: Callable[[Formula], Stage]) -> None:  # noqa: F811
    made = stage(trained)
    two = ("decay", "amp")
    with claim(tmp_path / "mirror-lenet-digits"):
        outcome, summary = run(tmp_path, primitives=two)
    assert outcome == "done"
    assert summary["busy"] == ["mirror-lenet-digits"]
    assert not summary["complete"]
    assert "mirror" not in {config.rule for _, config in made.runs}
    assert run(tmp_path, primitives=two)[1]["complete"]


def test_a_subset_that_always_diverges_stands_at_chance(tmp_path: Path, stage: Callable[[Formula], Stage]) -> None:  # noqa: F811
    stage(lambda config: None if config.rule == "amp" else trained(config))
    _, summary = run(tmp_path, primitives=("decay", "amp"))
    assert summary["complete"]
    found = summary["archs"]["lenet"]
    (amp,) = [line for line in found["table"] if line["name"] == "amp"]
    assert amp["outcome"] == "nothing finished"
    assert amp["lost"]["count"] == amp["lost"]["of"] == 2


def test_one_search_over_all_subsets_has_all_five_and_the_budget_of_the_rest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="searches all five"):
        prepared(tmp_path, primitives=("amp", "sparse"), any=True)
    searches = prepared(tmp_path, any=True, epochs=3).searches
    (whole,) = [ready.config for w, ready in searches.items() if w.rule == ANY]
    assert (whole.trials, whole.epochs, whole.sampler) == (2 * 31, 3, "random")
    default = prepared(tmp_path, any=True, sampler=None).searches
    assert [ready.config.sampler for w, ready in default.items() if w.rule == ANY] == ["tpe"]


def test_a_folder_is_one_plan_which_may_grow(tmp_path: Path, stage: Callable[[Formula], Stage]) -> None:  # noqa: F811
    stage(trained)
    run(tmp_path, primitives=("decay",))
    run(tmp_path, primitives=("decay", "self"))
    with pytest.raises(UserError, match=r"begun with primitives = \['decay', 'self'\]"):
        run(tmp_path, primitives=("decay",))


def test_a_second_process_is_refused(tmp_path: Path, stage: Callable[[Formula], Stage]) -> None:  # noqa: F811
    def second(config: TrialConfig) -> float | None:
        with pytest.raises(UserError, match=r"study 'm' in .* is being run by another process"):
            run(tmp_path, primitives=("decay",), only=("sign",))
        return trained(config)

    stage(second)
    assert run(tmp_path, primitives=("decay",))[0] == "done"


def test_rows_of_other_data_are_refused_before_anything_runs(
    tmp_path: Path,
    stage: Callable[[Formula], Stage],  # noqa: F811
) -> None:
    stage(trained)
    run(tmp_path, primitives=("decay",))
    path = tmp_path / "decay-lenet-digits" / "study.yaml"
    path.write_text(path.read_text().replace("runs_on: cpu", "runs_on: cuda"))
    with pytest.raises(UserError, match="use the same, or another --results"):
        prepared(tmp_path, primitives=("decay", "amp"))


def test_a_plan_has_a_name_of_its_own(tmp_path: Path) -> None:
    config = MatrixConfig(name="decay-lenet-digits", archs=("lenet",), dataset="digits", primitives=("decay",))
    with pytest.raises(UserError, match="one of its own searches"):
        prepare_matrix(config, only=(), given={}, changes={}, options=Options(results=tmp_path))


def test_of_a_grown_study_the_current_best_counts(tmp_path: Path, stage: Callable[[Formula], Stage]) -> None:  # noqa: F811
    made = stage(lambda config: 0.5 + 0.4 * (config.seed == 1000) if config.rule == "decay" else trained(config))
    run(tmp_path, primitives=("decay",), confirm_seeds=1)
    # the trial that is new is the best of the search, and confirms worse than the lucky one before
    made.formula = lambda config: 0.55 if config.rule == "decay" else trained(config)
    _, summary = run(tmp_path, primitives=("decay",), trials=4)
    (line,) = [line for line in summary["archs"]["lenet"]["table"] if line["name"] == "decay"]
    assert line["test_acc"]["n"] == 3
    assert line["test_acc"]["mean"] == pytest.approx(0.54)


def test_what_would_run_is_said_and_nothing_written(tmp_path: Path, stage: Callable[[Formula], Stage]) -> None:  # noqa: F811
    stage(trained)
    two = ("decay", "amp")
    lines = outlook(prepared(tmp_path / "new", primitives=two))
    assert not (tmp_path / "new").exists()
    assert {line["rule"]: line["runs"] for line in lines} == {
        **dict.fromkeys(("decay", "amp", "mirror", "kolen-pollack"), 5),
        **dict.fromkeys(("sign", "frozen"), 4),
    }
    floors = {line["rule"]: line["seconds"] / line["runs"] for line in lines}
    assert floors["mirror"] == pytest.approx(floors["decay"] * 4 / 3)
    run(tmp_path, primitives=two)
    assert all(line["runs"] == 0 for line in outlook(prepared(tmp_path, primitives=two)))


def test_unequal_budgets_are_refused(tmp_path: Path, stage: Callable[[Formula], Stage]) -> None:  # noqa: F811
    stage(trained)
    run(tmp_path, primitives=("decay",))
    with pytest.raises(UserError, match="budgets must be equal"):
        prepared(tmp_path, primitives=("decay", "amp"), epochs=2)
