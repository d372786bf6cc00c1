"""Searches for robustness, and for accuracy and robustness at once: what is maximised, confirmed, shown and kept."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.campaign import Campaign, Ready
from bench.choices import PATIENCE
from bench.cli import main
from bench.config import StudyConfig, TrialConfig, TrialResult
from bench.curves import area
from bench.datasets import load
from bench.engine import Task
from bench.files import read_yaml
from bench.front import pareto_front
from bench.noise import SITES
from bench.place import Options, Place, Share
from bench.rows import Row, RowFile, row
from bench.search import _write_best
from bench.space_files import load_space
from bench.study import Study
from bench.summary import columns, headline, summarize, table_rows
from bench.training import prepare, update_levels
from bench.verbs.common import BAD_INPUT
from bench.verbs.train import _train_config
from test_campaign import Silent
from test_search import rows, runs

SPACE = load_space("sparse", "resnet18", space="reference")
NOISE = {"noise_site": "input", "noise_levels": [0.2, 0.6], "noise_draws": 2}
SCHEDULER = {"accuracy": "asha", "robustness": "asha", "both": "none"}
#: (validation accuracy, area) of four trials; the last is dominated by the second.
VALUES = ((0.9, 0.4), (0.7, 0.7), (0.3, 0.9), (0.6, 0.6))


def campaign(folder: Path, objective: str, **changes: Any) -> Campaign:
    settings = {"trials": 4, "epochs": 9, "confirm_seeds": 2, "recipe": NOISE, "scheduler": SCHEDULER[objective]}
    config = StudyConfig.from_dict(
        {"name": "s", "rule": "sparse", "arch": "resnet18", "dataset": "digits", "objective": objective}
        | settings
        | changes
    )
    place = Place(
        options=Options(results=folder),
        share=Share(concurrent=2, threads=1, gpus=0.0),
        dataset=("digits", "0"),
        examples={"train": 8, "val": 1, "test": 2},
        chance=0.1,
        key="cpu 0",
        uri="",
        artifacts=None,
    )
    ready = Ready(config=config, space=SPACE, place=place)
    study = Study.open(ready.folder, config, SPACE.distributions(), say=print, chance=0.1)
    files = RowFile(ready.folder / "rows.jsonl"), RowFile(folder / "controls" / "rows.jsonl")
    return Campaign(ready, study, Silent(), rows=files[0], controls=files[1])  # type: ignore[arg-type]


def finish(source: Campaign, task: Task, values: Sequence[float], status: Any = "finished") -> None:
    """With what a trial that reads test would have, too: test goes the other way."""
    acc, under = values
    metrics = {"val_acc": acc, "val_area": under}
    if task.options.get("read_test"):
        metrics |= {"test_acc": 1 - acc, "test_area": 1 - under}
    source.started(task.uid)
    reason = None if status == "finished" else "so it is"
    source.completed(
        task.uid, TrialResult(config=task.config, status=status, reason=reason, metrics=metrics, provenance={"here": 1})
    )


def searched(source: Campaign, values: Sequence[Sequence[float]] = VALUES, status: Any = "finished") -> list[Task]:
    """The trials, run to their end with these values; the controls, too."""
    trials = []
    for value in values:
        trials.append(task := source.next())
        assert isinstance(task, Task)
        finish(source, task, value, status)
    while not source.searching and any(source._open(source.controls)):
        task = source.next()
        assert isinstance(task, Task)
        finish(source, task, (0.5, 0.4))
    return trials


def confirmations(source: Campaign) -> list[Task]:
    """What is handed out from here to the end, finished with 0.5 and 0.5."""
    tasks = []
    while isinstance(task := source.next(), Task):
        tasks.append(task)
        finish(source, task, (0.5, 0.5))
    assert task is None
    assert source.complete
    return tasks


def seeds_by_trial(trials: Sequence[Task], tasks: Sequence[Task]) -> dict[int, list[int]]:
    """The seeds with which each trial is run again, by its number."""
    number = {repr(t.config.coefficients): i for i, t in enumerate(trials)}
    found: dict[int, list[int]] = {}
    for task in tasks:
        found.setdefault(number[repr(task.config.coefficients)], []).append(task.config.seed)
    return found


# --- what the study is told ------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "stopped"), [("accuracy", False), ("robustness", True), ("both", False)])
def test_the_area_is_what_the_study_hears(tmp_path: Path, objective: str, stopped: bool) -> None:
    """Each trial is more accurate than the one before, and less robust."""
    source = campaign(tmp_path, objective, trials=PATIENCE + 1)
    for number in range(PATIENCE + 1):
        task = source.next()
        assert isinstance(task, Task)
        metrics = {"val_acc": 0.1 * (1 + number), "val_area": 0.1 * (9 - number)}
        source.started(task.uid)
        assert source.reported(task.uid, 3, metrics) is (stopped and number == PATIENCE)
        if number < PATIENCE:
            source.completed(task.uid, TrialResult(config=task.config, status="finished", metrics=metrics))
    best = list(range(PATIENCE))
    assert [r.number for r in source._study.best(9)] == (best if objective == "robustness" else best[::-1])


@pytest.mark.parametrize(("objective", "chosen"), [("accuracy", 0), ("robustness", 2)])
def test_the_best_in_the_objective_is_confirmed_and_comes_first(tmp_path: Path, objective: str, chosen: int) -> None:
    source = campaign(tmp_path, objective, confirm_top=2)
    trials = searched(source)
    again = confirmations(source)
    assert seeds_by_trial(trials, again) == {chosen: [1000, 1001], 1: [1000, 1001]}
    assert source.summary()["search_best_val_acc"] == 0.9
    assert source.summary().get("search_best_val_area") == (0.9 if objective == "robustness" else None)


@pytest.mark.parametrize(("confirm_top", "confirmed"), [(1, [1]), (2, [0, 1]), (3, [0, 1, 2]), (5, [0, 1, 2])])
def test_of_both_the_front_is_confirmed_each_with_the_fresh_seeds(
    tmp_path: Path, confirm_top: int, confirmed: list[int]
) -> None:
    source = campaign(tmp_path, "both", confirm_top=confirm_top)
    trials = searched(source)
    tasks = confirmations(source)
    assert seeds_by_trial(trials, tasks) == {number: [1000, 1001] for number in confirmed}
    assert all(task.options["read_test"] for task in tasks)
    assert not any(task.options.get("read_test") for task in trials)


@pytest.mark.parametrize("status", ["diverged", "failed"])
def test_of_both_what_did_not_finish_is_not_confirmed(tmp_path: Path, status: str) -> None:
    source = campaign(tmp_path, "both", confirm_top=5)
    searched(source, status=status)
    assert confirmations(source) == []
    summary = source.summary()
    assert (summary["confirmed"], summary["search_best_val_area"]) == ([], None)
    assert headline(summary)[f"trials_{status}"] == 4


# --- the controls ----------------------------------------------------------------------------------------


def test_controls_are_measured_under_the_same_noise_and_shared_by_the_searches_that_have_it(tmp_path: Path) -> None:
    found = {o: campaign(tmp_path / o, o) for o in ("robustness", "both")}
    found |= {
        "accuracy": campaign(tmp_path / "accuracy", "accuracy", recipe={}),
        "elsewhere": campaign(tmp_path / "elsewhere", "both", recipe={**NOISE, "noise_levels": [0.2, 0.7]}),
    }
    for name in ("robustness", "both"):
        configs = [plan.config for plan in found[name].controls.values()]
        assert [(c.rule, c.seed) for c in configs] == [(r, s) for r in ("backprop", "feedback") for s in (1000, 1001)]
        assert all({k: c.to_dict()[k] for k in NOISE} == NOISE for c in configs)
    uids = {name: set(source.controls) for name, source in found.items()}
    assert uids["robustness"] == uids["both"]
    assert not uids["accuracy"] & uids["both"]
    assert not uids["elsewhere"] & uids["both"]


def test_where_only_the_updates_of_B_are_noisy_controls_train_without_noise(tmp_path: Path) -> None:
    """Their B does not learn: there is nothing to be noisy."""
    for on in ("feedback", "forward"):
        noise = {"update_noise": 0.5, "update_noise_on": on, "batch_size": 32, "train_examples": 64}
        source = campaign(tmp_path / on, "accuracy", arch="lenet", recipe=noise)
        task = source.next()
        assert isinstance(task, Task)
        assert (task.config.update_noise, task.config.update_noise_on) == (0.5, on)
        for plan in source.controls.values():
            trial = prepare(plan.config, device="cpu")
            assert (trial.noise is None) == (on == "feedback")


# --- what is shown ---------------------------------------------------------------------------------------


def run(rule: str, seed: int, val: Sequence[float], test: Sequence[float], status: Any = "finished", **c: float) -> Row:
    config = TrialConfig(rule=rule, seed=seed, coefficients=c, **NOISE)
    names = ("val_acc", "val_area", "test_acc", "test_area")
    metrics = {} if status == "failed" else dict(zip(names, (*val, *test), strict=True))
    result = TrialResult(config=config, status=status, metrics=metrics)
    return row(f"{rule}-{c}-{seed}", "s", "confirm", result)


def study(objective: str) -> StudyConfig:
    return StudyConfig.from_dict(
        {"name": "s", "rule": "sparse", "arch": "resnet18", "dataset": "digits", "objective": objective}
        | ({} if objective == "accuracy" else {"recipe": NOISE})
    )


#: By coefficient: (validation accuracy, area) over two seeds, and test's, which would have it otherwise.
CONFIRMED = {
    1.0: (((0.70, 0.40), (0.72, 0.42)), ((0.99, 0.99), (0.99, 0.99))),  # dominated by the next, but best on test
    2.0: (((0.80, 0.50), (0.82, 0.52)), ((0.60, 0.20), (0.70, 0.30))),
    3.0: (((0.60, 0.70), (0.62, 0.72)), ((0.10, 0.10), (0.10, 0.10))),
    4.0: (((0.99, 0.99), (0.10, 0.10)), ((0.99, 0.99), (0.10, 0.10))),  # the second seed diverged: dominated
}
CONTROLS = [run("backprop", s, (0.9, 0.3), (0.5, 0.2)) for s in (1, 2)]


def confirmed_rows() -> list[Row]:
    found = []
    for value, (val, test) in CONFIRMED.items():
        for seed in (1, 2):
            status = "diverged" if (value, seed) == (4.0, 2) else "finished"
            found.append(run("sparse", seed, val[seed - 1], test[seed - 1], status, sparse=value))
    return [*found, run("sparse", 1, (0, 0), (0, 0), "failed", sparse=5.0)]


def test_the_front_is_that_of_the_confirmed_validation_means_and_the_order_is_by_accuracy() -> None:
    found = summarize(study("both"), [], confirmed_rows(), CONTROLS)
    marks = [(e["coefficients"]["sparse"], e.get("front")) for e in found["confirmed"]]
    assert marks == [(2.0, True), (1.0, False), (3.0, True), (4.0, False), (5.0, None)]
    assert not any("front" in e for e in found["controls"])
    for objective in ("accuracy", "robustness"):
        found = summarize(study(objective), [], confirmed_rows(), CONTROLS)
        order = [e["coefficients"]["sparse"] for e in found["confirmed"]]
        assert order == ([2.0, 1.0, 3.0, 4.0, 5.0] if objective == "accuracy" else [3.0, 4.0, 2.0, 1.0, 5.0])
        assert not any("front" in e for e in found["confirmed"])


def test_each_objective_has_its_columns_and_its_cells() -> None:
    tables = {}
    for objective, more in (("accuracy", 0), ("robustness", 3), ("both", 4)):
        found = summarize(study(objective), [], confirmed_rows(), CONTROLS)
        heads, cells = columns(found), table_rows(found)
        assert len(heads) == 9 + more
        assert {len(line) for line in cells} == {len(heads)}
        assert len(cells) == 6
        tables[objective] = [dict(zip(heads, line, strict=True)) for line in cells]
    first = tables["both"][0]
    assert (first["val area"], first["test area"]) == ("51.00 ± 1.41", "25.00 ± 7.07")
    # paired differences 0 and 0.1 to 0.2: mean 0.05, half width 12.706205·0.070711/√2
    assert first["test area − backprop, points [95 %]"] == "+5.00 [-58.53, +68.53] not distinguishable"
    assert [line["front"] for line in tables["both"]] == ["●", "", "●", "", "", ""]
    assert [line["rule"] for line in tables["both"]] == ["sparse"] * 5 + ["backprop"]
    assert tables["robustness"][4]["val area"] == "–"  # all failed
    assert tables["robustness"][5]["test area − backprop, points [95 %]"] == "–"
    assert tables["accuracy"][0] == {name: tables["both"][0][name] for name in tables["accuracy"][0]}


@pytest.mark.parametrize("objective", ["accuracy", "robustness", "both"])
def test_the_headline_has_the_area_where_it_was_searched(objective: str) -> None:
    tried = [run("sparse", 0, (0.8, 0.4), (0, 0), sparse=1.0), run("sparse", 0, (0.7, 0.6), (0, 0), sparse=2.0)]
    found = headline(summarize(study(objective), tried, confirmed_rows(), CONTROLS))
    assert found["search_best_val_acc"] == 0.8
    assert found.get("search_best_val_area") == (None if objective == "accuracy" else 0.6)
    best = 3.0 if objective == "robustness" else 2.0
    assert found["val_area"] == pytest.approx({2.0: 0.51, 3.0: 0.71}[best])
    assert (found["val_area_n"], found["test_area_n"]) == (2.0, 2.0)
    assert found["test_area"] == pytest.approx({2.0: 0.25, 3.0: 0.1}[best])
    assert found["test_area_versus_backprop"] == pytest.approx({2.0: 0.05, 3.0: -0.1}[best])
    on_front = [e.get("front", False) for e in summarize(study("both"), tried, confirmed_rows(), CONTROLS)["confirmed"]]
    assert found.get("front_size") == (sum(on_front) if objective == "both" else None)


@pytest.mark.parametrize(
    ("objective", "said"),
    [("accuracy", "best 70.00% (trial 0)"), ("robustness", "best area 60.00% (trial 1)"), ("both", None)],
)
def test_the_display_names_the_best_where_there_is_one(tmp_path: Path, objective: str, said: str | None) -> None:
    source = campaign(tmp_path, objective)
    assert "best" not in source.render()
    for values in ((0.7, 0.5), (0.6, 0.6)):
        task = source.next()
        assert isinstance(task, Task)
        finish(source, task, values)
    assert ("best" in source.render()) == (said is not None)
    assert said is None or said in source.render()


@pytest.mark.parametrize(
    ("values", "status", "at_first", "confirmed"),
    [
        (VALUES, "finished", 4 + 4 + 4 * 2, 3 * 2),  # five are wanted; of four trials three are on the front
        (VALUES[:1], "finished", 1 + 4 + 1 * 2, 1 * 2),
        (VALUES, "diverged", 4 + 4 + 4 * 2, 0),
    ],
    ids=["small front", "one trial", "nothing to confirm"],
)
def test_what_is_left_is_what_there_is_to_run(
    tmp_path: Path, values: Any, status: str, at_first: int, confirmed: int
) -> None:
    """Two fresh seeds each, and two controls with two seeds."""
    source = campaign(tmp_path, "both", confirm_top=5, trials=len(values))
    left: list[int] = []
    source._time = lambda runs_left: str(left.append(runs_left))  # type: ignore[method-assign]
    source.render()
    searched(source, values, status)
    source.render()
    confirmations(source)
    source.render()
    assert left == [at_first, confirmed, 0]


# --- what is kept ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["robustness", "both"])
def test_the_best_configuration_is_one_that_bench_train_reads(tmp_path: Path, objective: str) -> None:
    noise = {"noise_site": "update", "noise_levels": [0.1, 1.0]}
    source = campaign(tmp_path, objective, recipe=noise, confirm_top=2)
    searched(source)
    confirmations(source)
    _write_best(tmp_path, source, source.summary())
    path = tmp_path / "best.yaml"
    config = TrialConfig.from_dict(read_yaml(path))
    assert {**source.summary()["confirmed"][0]["config"], "seed": 0} == config.to_dict()
    assert (config.noise_site, config.noise_levels) == ("update", (0.1, 1.0))
    given = argparse.Namespace(config=path, set=[], rule=None, arch=None, dataset=None, epochs=None, seed=None)
    assert _train_config(given) == config


# --- the command line ------------------------------------------------------------------------------------

SEARCH = ["search", "--rule", "symmetric", "--arch", "resnet20"]
ROBUST = [*SEARCH, "--objective", "robustness"]
BOTH = [*SEARCH, "--objective", "both", "--site", "input"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (ROBUST, "--objective robustness needs the --site of the noise: update, weight, activation, input."),
        ([*SEARCH, "--objective", "both"], "--objective both needs the --site"),
        ([*SEARCH, "--objective", "robust", "--site", "input"], "Did you mean 'robustness'?"),
        ([*ROBUST, "--site", "weights"], "Did you mean 'weight'?"),
        ([*SEARCH, "--site", "input"], "no effect on accuracy; use --objective robustness or both."),
        ([*SEARCH, "--sigma", "0.1,0.2"], "no effect on accuracy"),
        ([*SEARCH, "--objective", "accuracy", "--draws", "2"], "no effect on accuracy"),
        ([*BOTH, "--scheduler", "asha"], "the scheduler 'asha' takes one only: use --scheduler none."),
        ([*BOTH, "--sampler", "cmaes"], "the sampler 'cmaes' takes one only: use --sampler gp or tpe or random."),
        ([*BOTH, "--sigma", "0.1"], "must be two or more, above 0 and rising"),
        ([*BOTH, "--sigma", "0.2,0.1"], "must be two or more, above 0 and rising"),
        ([*BOTH, "--sigma", "0,0.1"], "out of range"),
        ([*BOTH, "--sigma", "a,b"], "--sigma a,b: write numbers with commas between"),
        ([*BOTH, "--draws", "0"], "noise_draws = 0 is out of range"),
        ([*BOTH, "--confirm-top", "0"], "confirm_top = 0 is out of range"),
        ([*BOTH, "--set", "noise_site=weight"], "not part of the recipe"),
        ([*ROBUST, "--site", "update", "--draws", "2"], "--draws has no effect on --site update"),
        ([*ROBUST, "--site", "update", "--set", "update_noise=1"], "trains a network at each of noise_levels, once"),
        ([*SEARCH, "--set", "update_noise_on=forward"], "no effect without update_noise"),
        (["search", "--rule", "sign", "--set", "update_noise=1", "--set", "update_noise_on=feedback"], "no B learns"),
    ],
)
def test_what_does_not_fit_is_one_line_and_writes_nothing(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bench.verbs.search._run_search", lambda *_, **__: pytest.fail("it was not refused"))
    assert main(arguments) == BAD_INPUT
    out, err = capfd.readouterr()
    assert said in err
    assert (err.count("\n"), out) == (1, "")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def resolved(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    """The study that this command line would run."""
    found: list[Ready] = []

    def keep(_: object, ready: Ready, *__: object, **___: object) -> int:
        found.append(ready)
        return 0

    monkeypatch.setattr("bench.verbs.search._run_search", keep)
    assert main(arguments) == 0
    return found[0].config


def test_the_study_says_what_it_searches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = resolved(SEARCH, monkeypatch)
    assert (plain.name, plain.objective) == ("symmetric-resnet20-digits", "accuracy")
    assert not any(name.startswith("noise") for name in plain.recipe)
    assert (plain.scheduler, plain.confirm_top) == (StudyConfig.scheduler, 1)

    for site in SITES:
        robust = resolved([*ROBUST, "--site", site], monkeypatch)
        assert robust.name == f"symmetric-resnet20-digits-robustness-{site}"
        recipe = {k: v for k, v in robust.recipe.items() if not k.startswith(("noise_", "feedback_"))}
        plain = TrialConfig(rule="backprop", arch="resnet20", epochs=robust.epochs, **recipe)
        steps = load("digits").sizes["train"] // plain.batch_size
        assert robust.recipe["noise_levels"] == list(SITES[site].levels or update_levels(plain, steps))
        assert (robust.scheduler, robust.confirm_top) == (StudyConfig.scheduler, 1)

    both = resolved([*BOTH, "--sigma", "0.2,0.6", "--draws", "3", "--name", "mine"], monkeypatch)
    assert (both.name, both.objective, both.scheduler, both.confirm_top) == ("mine", "both", "none", 5)
    assert {k: both.recipe[k] for k in NOISE} == {**NOISE, "noise_draws": 3}
    assert resolved([*BOTH, "--confirm-top", "2"], monkeypatch).confirm_top == 2


# --- from end to end -------------------------------------------------------------------------------------

QUICK = [
    *("--arch", "lenet", "--epochs", "1", "--confirm-seeds", "1", "--concurrent", "2", "--json"),
    *("--set", "train_examples=64", "--set", "batch_size=32", "--set", "augment=false"),
]


def search(folder: Path, *arguments: str) -> dict[str, Any]:
    process = subprocess.run(
        [sys.executable, "-m", "bench.cli", "search", *QUICK, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert process.returncode == 0, process.stderr
    found: dict[str, Any] = json.loads(process.stdout)
    return found


def check_areas(some: Sequence[Row], site: str, levels: Sequence[float]) -> None:
    """Each row, and each of its epochs, has the area under the accuracies that it has."""
    for each in some:
        for metrics in (each["metrics"], *each["history"]):
            points = [metrics[f"val_acc/{site}/{level:g}"] for level in levels]
            assert metrics["val_area"] == area(levels, points)
        assert ("test_area" in each["metrics"]) == each["test_read"] == (each["kind"] != "search")


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own, in the client that this test reads with
def test_search_for_both_from_end_to_end(tmp_path: Path) -> None:
    found = search(
        tmp_path, *("--rule", "symmetric", "--objective", "both", "--site", "input"), "--sigma", "0.2,0.6", "--trials=3"
    )
    name = "symmetric-lenet-digits-both-input"
    assert (found["outcome"], found["study"]) == ("done", name)
    assert found["trials"] == {"finished": 3, "stopped": 0, "diverged": 0, "failed": 0}
    assert found["noise"] == {**NOISE, "noise_draws": 1}
    study_rows, controls = rows(tmp_path, name), rows(tmp_path, "controls")
    check_areas([*study_rows, *controls], "input", (0.2, 0.6))
    assert Counter(r["config"]["rule"] for r in controls) == {"backprop": 1, "feedback": 1}

    # the front of the search is confirmed, and that of the confirmed is marked
    tried = sorted((r for r in study_rows if r["kind"] == "search"), key=lambda r: r["uid"])
    front = pareto_front([(r["metrics"]["val_acc"], r["metrics"]["val_area"]) for r in tried])
    again = [r for r in study_rows if r["kind"] == "confirm"]
    key = "coefficients"
    assert {repr(r["config"][key]) for r in again} == {repr(tried[i]["config"][key]) for i in front}
    assert {r["config"]["seed"] for r in again} == {1000}
    points = [(e["val_acc"]["mean"], e["val_area"]["mean"]) for e in found["confirmed"]]
    assert [i for i, e in enumerate(found["confirmed"]) if e["front"]] == sorted(pareto_front(points))
    assert found["mlflow"]["experiment_id"] is not None

    # what is kept: the study, its best, and MLflow's view of both
    kept = read_yaml(tmp_path / "results" / name / "study.yaml")["config"]
    assert (kept["objective"], kept["scheduler"]) == ("both", "none")
    best = TrialConfig.from_dict(read_yaml(tmp_path / "results" / name / "best.yaml"))
    assert best.coefficients == found["confirmed"][0]["coefficients"]
    recorded = runs(tmp_path, name)
    assert {kind: len(some) for kind, some in recorded.items()} == {
        "study": 1,
        "search": 3,
        "confirm": len(again),
        "control": 2,
    }
    parent = recorded["study"][0]
    assert parent.data.metrics["test_area"] == pytest.approx(found["confirmed"][0]["test_area"]["mean"])


@pytest.mark.faults
def test_search_for_robustness_to_noise_in_training_from_end_to_end(tmp_path: Path) -> None:
    found = search(
        tmp_path,
        *("--rule", "symmetric", "--objective", "robustness", "--site", "update"),
        "--sigma=0.1,1",
        "--trials=2",
    )
    name = "symmetric-lenet-digits-robustness-update"
    assert (found["outcome"], found["study"]) == ("done", name)
    study_rows, controls = rows(tmp_path, name), rows(tmp_path, "controls")
    check_areas([*study_rows, *controls], "update", (0.1, 1.0))
    assert Counter(r["kind"] for r in (*study_rows, *controls)) == {"search": 2, "confirm": 1, "control": 2}
    tried = sorted((r for r in study_rows if r["kind"] == "search"), key=lambda r: r["uid"])
    best = max(tried, key=lambda r: r["metrics"]["val_area"])  # of equals the first
    assert found["confirmed"][0]["coefficients"] == best["config"]["coefficients"]
    assert found["search_best_val_area"] == best["metrics"]["val_area"]
    folder = tmp_path / "results" / name
    assert list((folder / "checkpoints").iterdir()) == []  # of no network
    config = TrialConfig.from_dict(read_yaml(folder / "best.yaml"))
    assert (config.noise_site, config.noise_levels) == ("update", (0.1, 1.0))


def test_without_confirmation_the_best_is_that_of_the_objective(tmp_path: Path) -> None:
    source = campaign(tmp_path, "robustness", confirm_seeds=0)
    trials = searched(source)
    _write_best(tmp_path, source, source.summary())
    assert read_yaml(tmp_path / "best.yaml")["coefficients"] == trials[2].config.coefficients
