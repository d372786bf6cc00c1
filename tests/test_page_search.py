"""The page of a search: the numbers in its figures against rows made by hand, and what stands where there are none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from bench.config import StudyConfig, TrialConfig
from bench.learning.rules import parse_rule
from bench.pages.parts import Absent, Figure, Page, Part, Table
from bench.pages.render import render
from bench.pages.search import search_page
from bench.pages.trials import DRAWN
from bench.rows import Row
from bench.summary import best_trial, summarize

CONFIG = TrialConfig(rule="backprop", arch="lenet", epochs=2).to_dict()
REASONS = {
    "finished": None,
    "stopped": "stopped early, after epoch 1",
    "diverged": "epoch 2: the training loss is nan",
    "failed": "RuntimeError: <no memory>",
}


def row(
    name: str,
    status: str = "finished",
    curve: Sequence[float] = (0.2, 0.5),
    *,
    kind: str = "search",
    rule: str = "symmetric",
    seed: int = 0,
    coefficients: Mapping[str, float] | None = None,
    angles: Sequence[float] = (),
    metrics: Mapping[str, float] | None = None,
) -> Row:
    """A run of two epochs, with this curve; ``angles`` are of the layer `first`, that of `last` is half of it."""
    history = [{"epoch": float(i + 1), "val_acc": value} for i, value in enumerate(curve)]
    for at, angle in zip(history, angles, strict=False):
        at.update({"angle": 0.75 * angle, "angle/first": angle, "angle/last": angle / 2})
    last: dict[str, float] = {"val_acc": 0.1} if status == "diverged" else {"val_acc": curve[-1]} if curve else {}
    return {
        "uid": name,
        "study": "s",
        "kind": kind,
        "status": status,
        "reason": REASONS[status],
        "test_read": kind != "search" and status != "failed",
        "config": {**CONFIG, "rule": rule, "seed": seed, "coefficients": dict(coefficients or {})},
        "evaluation": {},
        "metrics": {} if status == "failed" else {**last, **(metrics or {})},
        "history": history,
        "provenance": {"git_revision": "0123456789abcdef", "device_name": "a processor", "versions": {"torch": "2.0"}},
    }


def trial(number: int, decay: float, self_: float, status: str = "finished", curve: Sequence[float] = (0.2,)) -> Row:
    return row(f"s-{number:04d}", status, curve, coefficients={"decay": decay, "self": self_})


def again(seed: int, test: float, *, rule: str = "symmetric", kind: str = "confirm", **more: Any) -> Row:
    coefficients = {"decay": 0.1, "self": 0.2} if rule == "symmetric" else {}
    return row(
        f"{kind}-{rule}-{seed}", kind=kind, rule=rule, seed=seed, coefficients=coefficients,
        metrics={"test_acc": test}, **more,
    )  # fmt: skip


#: In the order in which they ended: not that of their numbers.
TRIALS = (
    trial(2, 0.001, 0.1, "stopped", (0.15,)),
    trial(0, 0.01, 0.01, "finished", (0.2, 0.4)),
    trial(1, 0.1, 0.2, "finished", (0.3, 0.6)),
    trial(4, 1.0, 1.0, "diverged", (0.12,)),
    trial(3, 0.5, 0.5, "failed", ()),
    trial(5, 0.2, 0.05, "finished", (0.1, 0.5)),
)
CONFIRMED = (again(1000, 0.5, angles=(80.0, 40.0)), again(1001, 0.6, angles=(60.0, 20.0)))
CONTROLS = (again(1000, 0.7, rule="backprop", kind="control"), again(1001, 0.9, rule="backprop", kind="control"))


def page_of(
    searched: Sequence[Row] = TRIALS,
    confirmed: Sequence[Row] = CONFIRMED,
    controls: Sequence[Row] = CONTROLS,
    **study: Any,
) -> Page:
    config = StudyConfig(name="s", dataset="digits", arch="lenet", epochs=2, **{"rule": "symmetric", **study})
    return search_page(summarize(config, searched, confirmed, controls), searched, confirmed, controls)


def part(page: Page, title: str) -> Part:
    """The one part whose title begins so."""
    found = [p for section in page.sections for p in section.parts if p.title.startswith(title)]
    assert len(found) == 1, [p.title for p in found]
    return found[0]


def figure(page: Page, title: str) -> Figure:
    found = part(page, title)
    assert isinstance(found, Figure), found
    return found


def reason(page: Page, title: str) -> str:
    found = part(page, title)
    assert isinstance(found, Absent), found
    return found.reason


def trace(shown: Figure, name: str) -> dict[str, Any]:
    """The one trace whose name in the legend begins so."""
    found = [t for t in shown.plot["data"] if str(t.get("name", "")).startswith(name)]
    assert len(found) == 1, [t.get("name") for t in shown.plot["data"]]
    return dict(found[0])


def test_facts_and_verdict() -> None:
    page = page_of()
    assert page.facts["trials"] == "3 finished, 1 stopped, 1 diverged, 1 failed"
    assert page.facts["budget"] == "6 trials × 2 epochs"
    assert page.facts["confirmed"] == "1 configuration × 2 seeds"
    assert page.facts["git revision"] == "0123456789"
    assert page.facts["test set"].startswith("test was read once per confirmed run")
    # differences −0.2 and −0.3: mean −25, t(1) = 12.706, sd/√2 = 5
    assert page.lines[1].startswith("symmetric − backprop on test: -25.00 [-88.53, +38.53] not distinguishable")
    assert page.lines[2] == "Best coefficients: decay 1.00e-01, self 2.00e-01."


def test_every_figure_says_its_data_its_budget_and_what_became_of_test() -> None:
    parts = [p for section in page_of().sections for p in section.parts]
    for shown in parts:
        if isinstance(shown, Figure):
            assert "digits, lenet, 6 trials × 2 epochs" in shown.note, shown.title
            assert "test" in shown.note, shown.title
            assert all(len(line) == len(shown.columns) for line in shown.rows), shown.title
            json.dumps(shown.plot, allow_nan=False)


def test_it_is_written_with_all_of_its_figures() -> None:
    page = page_of()
    text = render(page)
    assert text.count("<figure data-figure=") == sum(isinstance(p, Figure) for s in page.sections for p in s.parts)


def test_several_places_of_one_run_stand_side_by_side() -> None:
    other = {**TRIALS[0], "provenance": {**TRIALS[0]["provenance"], "git_revision": "fedcba9876543210"}}
    assert page_of((other, *TRIALS[1:])).facts["git revision"] == "fedcba9876; 0123456789"


def test_the_table_has_the_confirmed_and_then_the_controls() -> None:
    table = part(page_of(), "Confirmed configurations")
    assert isinstance(table, Table)
    assert [line[0] for line in table.rows] == ["symmetric", "backprop"]
    assert table.rows[0][3] == "55.00 ± 7.07"


def test_accuracies_have_their_interval_and_their_seeds() -> None:
    shown = figure(page_of(), "Test accuracy")
    mean, seeds = shown.plot["data"][:2]
    assert mean["x"] == pytest.approx([55.0])
    assert mean["error_x"]["array"] == pytest.approx([12.7062 * 5.0], rel=1e-5)
    assert seeds["x"] == pytest.approx([50.0, 60.0])
    assert [line[4] for line in shown.rows] == pytest.approx([50.0, 60.0, 70.0, 90.0])
    assert shown.plot["layout"]["yaxis"]["ticktext"] == ["symmetric", "backprop (control)"]


def test_a_single_seed_has_no_interval() -> None:
    mean = figure(page_of(confirmed=CONFIRMED[:1], controls=()), "Test accuracy").plot["data"][0]
    assert (mean["error_x"]["array"], mean["error_x"]["arrayminus"]) == ([None], [None])


def test_a_diverged_seed_counts_at_chance_and_is_marked() -> None:
    lost = again(1001, 0.1, status="diverged", curve=())
    page = page_of(confirmed=(CONFIRMED[0], lost))
    mean, seeds = figure(page, "Test accuracy").plot["data"][:2]
    assert mean["x"] == pytest.approx([30.0])
    assert seeds["marker"]["symbol"] == ["line-ns-open", "x"]
    assert "symmetric: 1 finished, 1 diverged" in figure(page, "Test accuracy").note


def test_configurations_of_one_rule_are_numbered_best_by_validation_first() -> None:
    worse = [again(seed, 0.9, curve=(0.1, 0.2)) for seed in (1000, 1001)]
    for line in worse:
        line["uid"] += "-b"
        line["config"]["coefficients"] = {"decay": 0.3, "self": 0.3}
    shown = figure(page_of(confirmed=(*worse, *CONFIRMED)), "Test accuracy")
    assert [line[0] for line in shown.rows[:4]] == ["symmetric 1", "symmetric 1", "symmetric 2", "symmetric 2"]
    assert shown.rows[0][4] == pytest.approx(50.0)


def test_the_front_of_two_objectives_is_that_of_the_confirmed_means() -> None:
    areas = {0.1: (0.5, 0.3), 0.2: (0.4, 0.4), 0.3: (0.3, 0.2)}  # the third is beaten in both
    runs = [
        row(f"c{d}", curve=(acc,), kind="confirm", coefficients={"decay": d, "self": d}, seed=1000,
            metrics={"val_area": area, "test_acc": acc})
        for d, (acc, area) in areas.items()
    ]  # fmt: skip
    searched = [{**t, "metrics": {**t["metrics"], "val_area": 0.2}} if t["metrics"] else t for t in TRIALS]
    page = page_of(searched, runs, (), objective="both", sampler="tpe", scheduler="none")
    shown = figure(page, "Pareto front")
    assert [line[-1] for line in shown.rows] == [True, True, False]
    assert (trace(shown, "front")["x"], trace(shown, "front")["y"]) == ([30.0, 40.0], [50.0, 40.0])
    assert "2 of 3 confirmed are on the front" in page.lines[-1]
    assert figure(page, "Optimisation history: area").rows[0][3] == pytest.approx(20.0)


def test_learning_curves_have_one_trace_per_status_with_gaps() -> None:
    shown = figure(page_of(), "Learning curves")
    others = trace(shown, "trials: other finished (2)")
    assert others["x"] == [1, 2, None, 1, 2, None]
    assert others["y"] == pytest.approx([20.0, 40.0, None, 10.0, 50.0, None])
    stopped = trace(shown, "trials: stopped early (1)")
    assert stopped["y"] == [15.0, None]
    assert stopped["opacity"] < others["opacity"]
    assert trace(shown, "best trial: 1")["y"] == [30.0, 60.0, None]
    assert trace(shown, "symmetric, confirmed (2)")["y"] == [20.0, 50.0, None, 20.0, 50.0, None]


def test_a_diverged_curve_ends_at_chance_with_a_cross() -> None:
    shown = figure(page_of(), "Learning curves")
    assert trace(shown, "trials: diverged")["y"] == [12.0, 10.0, None]
    crosses = [t for t in shown.plot["data"] if t["marker"].get("symbol") == "x"]
    assert [(t["x"], t["y"]) for t in crosses] == [([2], [10.0])]
    assert ("s-0004", "search", "diverged", 0, 2, 10.0) in list(shown.rows)


def test_the_best_so_far_never_falls_and_counts_finished_trials_only() -> None:
    shown = figure(page_of(), "Optimisation history")
    assert [line[0] for line in shown.rows] == [0, 1, 2, 3, 4, 5]
    assert [line[3] for line in shown.rows] == pytest.approx([40.0, 60.0, 15.0, None, 10.0, 50.0])
    assert [line[4] for line in shown.rows] == pytest.approx([40.0, 60.0, 60.0, 60.0, 60.0, 60.0])
    line = trace(shown, "best so far")
    assert (line["x"], line["y"]) == ([0, 1, 5], pytest.approx([40.0, 60.0, 60.0]))
    assert trace(shown, "failed, no value")["yaxis"] == "y2"
    assert "6 trials: 3 finished, 1 stopped early, 1 diverged, at chance, 1 failed" in shown.note


def test_the_best_trial_is_the_one_that_is_confirmed() -> None:
    best = best_trial(TRIALS)
    assert best is not None
    assert trace(figure(page_of(), "Learning curves"), "best trial:")["text"][0].split("<br>")[1] == best["uid"]


def test_a_slice_shows_every_trial_once_on_a_log_axis() -> None:
    shown = figure(page_of(), "Slice: validation accuracy against decay")
    assert shown.plot["layout"]["xaxis"]["type"] == "log"
    marked = [x for t in shown.plot["data"] if t["name"] != "the best finished" for x in t["x"]]
    assert sorted(marked) == [0.001, 0.01, 0.1, 0.2, 0.5, 1.0]
    assert trace(shown, "finished (3)")["x"] == pytest.approx([0.01, 0.1, 0.2])
    assert trace(shown, "the best finished")["x"] == [0.1]
    assert "&lt;no memory&gt;" in trace(shown, "failed")["text"][0]


def test_a_coefficient_that_was_zero_has_a_linear_axis() -> None:
    shown = figure(page_of((trial(9, 0.0, 0.3), *TRIALS)), "Slice: validation accuracy against decay")
    assert "type" not in shown.plot["layout"]["xaxis"]


def test_parallel_coordinates_place_logarithms_and_what_has_no_value() -> None:
    dimensions = {d["label"]: d for d in figure(page_of(), "Parallel").plot["data"][0]["dimensions"]}
    assert list(dimensions) == ["decay", "self", "outcome", "reached, %"]
    assert dimensions["decay"]["values"] == pytest.approx([-2.0, -1.0, -0.69897, -3.0, 0.0, -0.30103])
    assert dimensions["outcome"]["values"] == [0, 0, 0, 1, 2, 3]
    reached = dimensions["reached, %"]
    assert reached["values"][:5] == pytest.approx([40.0, 60.0, 50.0, 15.0, 10.0])
    assert reached["ticktext"][reached["tickvals"].index(reached["values"][5])] == "none"


def test_a_surface_is_of_what_ended_and_the_others_are_marked() -> None:
    shown = figure(page_of(), "Contour: validation accuracy over decay and self")
    surface = shown.plot["data"][0]
    heights = sorted(z for line in surface["z"] for z in line if z is not None)
    assert heights == pytest.approx([10.0, 40.0, 50.0, 60.0])
    assert trace(shown, "stopped early (1)")["x"] == [0.001]
    assert trace(shown, "failed (1)")["y"] == [0.5]
    assert len(shown.rows) == 6


def test_a_surface_takes_no_more_trials_than_a_browser_can() -> None:
    many = [trial(i, 10 ** (-i / 100), 10 ** (-(i * 7 % 300) / 100), curve=(0.2, i / 400)) for i in range(300)]
    shown = figure(page_of(many), "Contour")
    assert len(trace(shown, "finished")["x"]) == 100
    values = [line[-1] for line in shown.rows]  # the CSV has all
    assert len(values) == 300
    assert (min(values), max(values)) == pytest.approx((0.0, 299 / 4))
    assert "Drawn are 100 trials, 100 of them in the surface" in shown.note


def test_more_trials_than_can_be_told_apart_are_drawn_in_part_and_all_in_the_csv() -> None:
    many = [row(f"s-{i:04d}", "stopped", (i / 2000,), coefficients={"decay": 1.0 + i}) for i in range(DRAWN + 9)]
    shown = figure(page_of(many, (), (), rule="decay"), "Slice")
    assert len(trace(shown, f"stopped early ({DRAWN:,} of {DRAWN + 9:,})")["x"]) == DRAWN
    assert len(shown.rows) == DRAWN + 9
    assert f"{DRAWN:,} are drawn" in shown.note


def test_importance_finds_the_coefficient_that_matters() -> None:
    many = [trial(i, 10 ** (-i / 10), 10 ** (-(i * 7 % 30) / 10), curve=(0.2, 0.9 - i / 60)) for i in range(30)]
    shown = figure(page_of(many), "Parameter importance")
    assert [line[0] for line in shown.rows] == ["decay", "self"]
    assert shown.rows[0][1] > 0.8
    assert sum(line[1] for line in shown.rows) == pytest.approx(1.0)


def test_importance_is_refused_where_it_means_nothing() -> None:
    few = reason(page_of(), "Parameter importance")
    assert few == "3 of 6 trials finished; of fewer than 10 it means nothing."
    equal = [trial(i, 10 ** (-i / 10), 10 ** (-i / 20), curve=(0.5,)) for i in range(12)]
    assert reason(page_of(equal), "Parameter importance") == "all trials came to the same value."
    assert reason(page_of(equal), "Contour").startswith("too few trials that ended differ")
    one = [row(f"s-{i:04d}", coefficients={"decay": 1.0 + i}) for i in range(12)]
    assert "decay is the only coefficient" in reason(page_of(one, (), (), rule="decay"), "Parameter importance")


def test_a_search_over_all_subsets_shows_who_has_a_coefficient() -> None:
    def subset(i: int) -> Row:
        values = {
            name: 10 ** (-(i * k % 12) / 6) for k, name in ((5, "decay"), (7, "self")) if (i % 3, name) != (k % 3, name)
        }
        rule = parse_rule("+".join(values)).name if values else "feedback"
        return row(f"s-{i:04d}", rule=rule, coefficients=values, curve=(0.2, 0.3 + i / 40))  # fmt: skip

    many = [subset(i) for i in range(24)]
    page = page_of(many, (), (), rule="any", sampler="tpe")
    lacking = sum("decay" not in r["config"]["coefficients"] for r in many)
    shown = figure(page, "Slice: validation accuracy against decay")
    assert 0 < lacking < 24
    assert len(shown.rows) == 24 - lacking
    assert f"{lacking} trials without decay are not in it" in shown.note
    dimension = figure(page, "Parallel").plot["data"][0]["dimensions"][0]
    assert dimension["values"].count(dimension["tickvals"][0]) == lacking
    assert dimension["ticktext"][0] == "none"
    assert "use_decay" in [line[0] for line in figure(page, "Parameter importance").rows]


def test_the_angle_is_the_mean_over_seeds_layer_by_layer() -> None:
    surface = figure(page_of(), "Angle between W and B, per layer").plot["data"][0]
    assert (surface["y"], surface["x"]) == (["first", "last"], [1, 2])
    assert surface["z"] == [[70.0, 30.0], [35.0, 15.0]]
    assert (surface["zmin"], surface["zmax"]) == (0, 90)


def test_the_mean_angle_has_its_spread() -> None:
    shown = figure(page_of(), "Mean angle between W and B")
    assert trace(shown, "symmetric")["y"] == [52.5, 22.5]
    assert [line[3] for line in shown.rows] == pytest.approx([0.75 * 20 / 2**0.5] * 2)
    assert [line[6] for line in shown.rows] == [2, 2]


def test_the_floor_stands_beside_the_angle() -> None:
    floors = {"floor_angle": 50.0, "floor_angle/first": 60.0, "floor_angle/last": 40.0}
    confirmed = [again(1000 + i, 0.5, angles=(80.0, 70.0)) for i in range(2)]
    for run in confirmed:
        run["metrics"] |= {"angle": 52.5, **floors}
    page = page_of(confirmed=confirmed)
    layers = figure(page, "Angle between W and B, per layer")
    assert [line[5] for line in layers.rows] == [60.0, 40.0, 60.0, 40.0]
    assert "floor 60.0°" in layers.plot["data"][0]["text"][0][0]
    means = figure(page, "Mean angle between W and B")
    assert trace(means, "symmetric: floor")["y"] == [50.0, 50.0]
    assert {line[7] for line in means.rows} == {50.0}
    (table,) = (p for s in page.sections for p in s.parts if p.title.startswith("Confirmed configurations"))
    assert "angle ° (floor)" in table.columns
    assert "52.50 ± 0.00 (50.00)" in table.rows[0]
    assert any("floor: the angle at which B settles" in note for note in table.notes)


def test_the_angle_of_the_errors_sent_has_a_figure_of_its_own() -> None:
    title = "Mean angle between the errors sent"
    confirmed = [again(1000, 0.5, angles=(80.0, 70.0))]
    assert "no angle" in reason(page_of(confirmed=confirmed), title)
    for at, value in zip(confirmed[0]["history"], (85.0, 30.0), strict=True):
        at["dx_angle"] = value
    assert trace(figure(page_of(confirmed=confirmed), title), "symmetric")["y"] == [85.0, 30.0]


def test_an_angle_beyond_ninety_is_on_the_scale() -> None:
    runs = [again(1000, 0.5, angles=(120.0, 40.0))]
    assert figure(page_of(confirmed=runs), "Angle between W and B, per").plot["data"][0]["zmax"] == 120


def test_why_there_is_no_angle() -> None:
    title = "Angle between W and B, per layer"
    assert reason(page_of(confirmed=()), title) == "no configuration is confirmed."
    backprop = [again(1000, 0.7, rule="backprop")]
    assert reason(page_of(confirmed=backprop, controls=(), rule="backprop"), title).startswith("backprop sends")
    off = again(1000, 0.5)
    off["config"]["measure_alignment"] = False
    assert "measure_alignment is off" in reason(page_of(confirmed=(off,)), title)
    lost = again(1000, 0.1, status="diverged", curve=())
    assert reason(page_of(confirmed=(lost,)), title) == "no run of symmetric finished an epoch (1 diverged)."


def test_a_study_without_rows_says_so_in_every_place() -> None:
    page = page_of((), (), ())
    parts = [p for section in page.sections for p in section.parts]
    assert parts
    assert all(isinstance(p, Absent) for p in parts)
    assert page.lines == ["Nothing is confirmed: no trial finished yet."]
    assert page.facts["device"] == "unknown"


def test_a_search_that_only_diverged_stands_at_chance() -> None:
    lost = [trial(i, 10.0**-i, 10.0 ** -(i % 3), "diverged", ()) for i in range(4)]
    page = page_of(lost, (), ())
    assert trace(figure(page, "Slice: validation accuracy against self"), "diverged")["y"] == [10.0] * 4
    assert [line[4] for line in figure(page, "Optimisation history").rows] == [None] * 4
    assert isinstance(part(page, "Contour"), Absent)
    assert [line[4:] for line in figure(page, "Learning curves").rows] == [(1, 10.0)] * 4


def test_a_search_that_only_failed_is_still_shown() -> None:
    lost = [trial(i, 10.0**-i, 10.0**-i, "failed", ()) for i in range(3)]
    page = page_of(lost, (), ())
    assert len(trace(figure(page, "Optimisation history"), "failed, no value")["x"]) == 3
    assert reason(page, "Learning curves") == "no run has finished an epoch, or diverged."
    assert len(figure(page, "Parallel").rows) == 3


def test_a_rule_without_coefficients_has_no_figure_of_them() -> None:
    page = page_of([row("s-0000", rule="feedback")], (), (), rule="feedback")
    assert "no coefficient of feedback was searched" in reason(page, "Parallel")
