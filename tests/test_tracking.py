"""The record in MLflow, read back from a real SQLite store: complete, and once."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench.config import StudyConfig, TrialConfig, UserError
from bench.rows import row
from mlflow_book import CONFIG, Book, delivered, epochs, finished, made, run_whole, study_name

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),  # MLflow's own use
]


@pytest.fixture
def book(tmp_path_factory: pytest.TempPathFactory) -> Book:
    return made(tmp_path_factory.getbasetemp())


@pytest.fixture
def name(request: pytest.FixtureRequest, book: Book) -> str:
    return study_name(request, book)


def test_a_study_is_a_parent_with_one_level_of_children(book: Book, name: str, tmp_path: Path) -> None:
    (tmp_path / "best.yaml").write_text("rule: mirror\n")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "x").write_text("x")
    config = StudyConfig(name=name, rule="mirror", arch="resnet18", dataset="digits", recipe={"lr": 0.2})
    with book.open() as tracker:
        tracker.study(name, config=config.to_dict(), tags={"bench.rule": "mirror"})
        tracker.dataset("digits", "d" * 64)
        run_whole(tracker, f"{name}-0000", finished())
        tracker.headline({"val_acc": 0.8, "not_a_number": float("nan")})
        tracker.artifacts([tmp_path / "best.yaml", tmp_path / "more"])
        delivered(tracker)
        assert tracker.close() == 0
        link = tracker.link()
    parent, (child,) = book.parent(name), book.children(name).values()
    assert link["parent_run_id"] == parent.info.run_id
    assert link["experiment_id"] == parent.info.experiment_id
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert parent.data.params["recipe.lr"] == "0.2"
    assert parent.data.params["trials"] == "20"
    assert parent.data.metrics == {"val_acc": 0.8}
    assert parent.data.tags["bench.not_finite"] == "not_a_number"
    assert [a.path for a in book.client().list_artifacts(parent.info.run_id)] == ["best.yaml", "more"]
    assert child.data.params["coefficients.decay"] == "0.001"
    assert child.data.params["nesterov"] == "true"
    tags = {k.removeprefix("bench."): v for k, v in child.data.tags.items() if k.startswith("bench.")}
    tags.pop("git_revision", None)  # there is none outside a checkout
    assert tags == {
        "study": name,
        "uid": f"{name}-0000",
        "kind": "search",
        "status": "finished",
        "rule": "mirror",
        "arch": "resnet18",
        "dataset": "digits",
        "seed": "3",
    }
    assert child.data.tags["provenance.versions.torch"] == "2.13.0"
    assert child.info.run_name == f"search 0000 · {name}"
    assert book.points(child, "val_acc") == [(1, 0.6), (2, 0.7), (3, 0.8)]
    assert book.points(child, "test_acc") == [(3, 0.25)]
    for run in (parent, child):
        (entry,) = run.inputs.dataset_inputs
        assert (entry.dataset.name, entry.dataset.digest) == ("digits", "d" * 36)
        assert json.loads(entry.dataset.source)["sha256"] == "d" * 64
    assert book.said == []


@pytest.mark.parametrize(
    ("status", "run_status"),
    [("finished", "FINISHED"), ("stopped", "FINISHED"), ("diverged", "FINISHED"), ("failed", "FAILED")],
)
def test_every_end_has_its_status(book: Book, name: str, status: str, run_status: str) -> None:
    result = finished(2, status=status, reason=None if status == "finished" else f"why {status}")
    with book.open() as tracker:
        tracker.study(name, config={})
        run_whole(tracker, "a", result)
        delivered(tracker)
    (child,) = book.children(name).values()
    assert child.info.status == run_status
    assert child.info.end_time is not None
    assert child.data.tags["bench.status"] == status
    assert child.data.tags.get("bench.reason") == result.reason


def test_the_latest_accuracy_of_a_diverged_run_is_chance(book: Book, name: str) -> None:
    with book.open() as tracker:
        tracker.study(name, config={})
        run_whole(tracker, "a", finished(2, status="diverged", reason="loss is nan", metrics={"val_acc": 0.1}))
        run_whole(tracker, "b", finished(0, status="diverged", reason="loss is nan", metrics={"val_acc": 0.1}))
        delivered(tracker)
    children = book.children(name)
    assert [children[uid].data.metrics["val_acc"] for uid in "ab"] == [0.1, 0.1]
    assert book.points(children["a"], "val_acc") == [(1, 0.6), (2, 0.7), (3, 0.1)]
    assert book.points(children["b"], "val_acc") == [(0, 0.1)]


def test_what_is_not_finite_never_reaches_mlflow_and_is_named(book: Book, name: str) -> None:
    with book.open() as tracker:
        tracker.study(name, config={})
        tracker.start("a", "search", CONFIG)
        tracker.report("a", 1, {"val_acc": 0.1, "train_loss": float("inf"), "norm": float("nan")})
        delivered(tracker)
    (child,) = book.children(name).values()
    assert child.data.metrics == {"val_acc": 0.1, "epoch": 1.0}
    assert child.data.tags["bench.not_finite"] == "train_loss, norm in epoch 1"


def test_limits_of_a_request_and_of_a_value(book: Book, name: str) -> None:
    config = {"long": "x" * 20_000, "many": {f"p{i}": i for i in range(250)}}
    metrics = {f"layer{i}/angle": float(i) for i in range(1500)}
    with book.open() as tracker:
        tracker.study(name, config=config, tags={"note": "y" * 20_000})
        tracker.start("a", "search", CONFIG)
        tracker.report("a", 1, metrics)
        delivered(tracker)
    parent, (child,) = book.parent(name), book.children(name).values()
    assert len(parent.data.params) == 251
    assert parent.data.params["long"] == "x" * 4999 + "…"
    assert parent.data.tags["note"] == "y" * 4999 + "…"
    assert child.data.metrics == {**metrics, "epoch": 1.0}
    assert book.said == []


def test_a_run_goes_on_with_one_value_per_epoch(book: Book, name: str) -> None:
    with book.open() as tracker:
        tracker.study(name, config={})
        tracker.start("a", "search", CONFIG)
        for n, metrics in enumerate(epochs(3), 1):
            tracker.report("a", n, metrics)
        tracker.interrupt()
        delivered(tracker)
    (child,) = book.children(name).values()
    assert (child.info.status, child.data.tags["bench.status"]) == ("KILLED", "interrupted")
    with book.open() as tracker:
        tracker.study(name, config={})
        tracker.start("a", "search", CONFIG)
        delivered(tracker)
        assert book.children(name)["a"].info.status == "RUNNING"
        # From the checkpoint of epoch 2: epoch 3 again (a GPU gives another value), then 5; 4 went missing.
        tracker.report("a", 3, {"val_acc": 0.79, "train_loss": 0.3})
        tracker.report("a", 5, epochs(5)[4])
        tracker.finish("a", finished(5))
        delivered(tracker)
    (child,) = book.children(name).values()
    assert child.info.status == "FINISHED"
    for key in ("val_acc", "train_loss", "epoch"):
        assert Counter(step for step, _ in book.points(child, key)) == Counter([1, 2, 3, 4, 5])


def test_trials_may_grow_and_other_parameters_of_a_run_may_not(book: Book, name: str) -> None:
    with book.open() as tracker:
        tracker.study(name, config={"trials": 20, "rule": "mirror"})
        run_whole(tracker, "a", finished())
        delivered(tracker)
    with book.open() as tracker:
        tracker.study(name, config={"trials": 40, "rule": "mirror"})
        tracker.start("a", "search", CONFIG.replace(lr=0.7))
        delivered(tracker)
        tracker.interrupt()
    parent, (child,) = book.parent(name), book.children(name).values()
    assert parent.data.params["trials"] == "20"
    assert parent.data.tags["now.trials"] == "40"
    assert child.data.params["lr"] == "0.1"
    assert "refused an operation (a was recorded with another lr)" in book.said[0]
    assert "refused 1; bench sync records" in book.said[1]


def test_a_row_is_recorded_once_whole(book: Book, name: str) -> None:
    control = row("control-1", "another", "control", finished(4))
    with book.open() as tracker:
        tracker.study(name, config={})
        tracker.record("control-1", "control", control)
        tracker.record("control-1", "control", control)
        delivered(tracker)
    with book.open() as tracker:
        tracker.study(name, config={})
        tracker.record("control-1", "control", control)
        delivered(tracker)
    (child,) = book.children(name).values()
    assert child.info.status == "FINISHED"
    assert child.data.tags["bench.from_study"] == "another"
    assert child.data.tags["bench.git_revision"] == "abc"
    assert [step for step, _ in book.points(child, "val_acc")] == [1, 2, 3, 4]


NAMES: list[tuple[TrialConfig, dict[str, Any], str]] = [
    (CONFIG, {}, "mirror training seed 3"),
    (CONFIG.replace(update_noise=0.3), {}, "mirror update 0.3 seed 3"),
    (CONFIG, {"site": "weight", "level": 0.0, "draws": 5}, "mirror weight 0 seed 3"),
    (CONFIG, {"site": "weight", "level": 0.25, "draws": 5}, "mirror weight 0.25 seed 3"),
    (CONFIG, {"site": "pgd", "level": 8 / 255, "gradient": "true"}, "mirror pgd 0.0313725 seed 3"),
    (CONFIG, {"site": "pgd", "level": 8 / 255, "gradient": "feedback"}, "mirror pgd through B 0.0313725 seed 3"),
]


def test_runs_of_a_measurement_are_named_by_what_they_are_of(book: Book, name: str) -> None:
    with book.open() as tracker:
        tracker.study(name, config={})
        for i, (config, evaluation, _) in enumerate(NAMES):
            tracker.start(str(i), "robustness", config, evaluation=evaluation)
            tracker.finish(str(i), finished(0, config=config, evaluation=evaluation))
        delivered(tracker)
    children = book.children(name)
    for i, (_, evaluation, wanted) in enumerate(NAMES):
        run = children[str(i)]
        assert run.info.run_name == f"{wanted} · {name}"
        found = {k.removeprefix("evaluation."): v for k, v in run.data.params.items() if k.startswith("evaluation.")}
        assert found == {k: v if isinstance(v, str) else json.dumps(v) for k, v in evaluation.items()}


def test_a_curve_has_its_levels_as_steps_and_each_value_once(book: Book, name: str) -> None:
    metric, curve = "weight/mirror/test_acc", {0.0: 0.9, 8 / 255: 0.8, 0.1: 0.7, 1.0: math.nan}
    for points in (curve, curve, {**curve, 0.2: 0.4}, {**curve, 0.1: 0.6}):
        with book.open() as tracker:
            tracker.study(name, config={})
            tracker.curve(metric, points)
            delivered(tracker)
    by_time = sorted(book.client().get_metric_history(book.parent(name).info.run_id, metric), key=lambda p: p.timestamp)
    assert [(p.step, p.value) for p in by_time[:4]] == [(0, 0.9), (31_373, 0.8), (100_000, 0.7), (200_000, 0.4)]
    assert [(p.step, p.value) for p in by_time[4:]] == [(100_000, 0.6)]  # measured anew, of other seeds


def test_a_rule_of_several_primitives_has_names_that_mlflow_takes(book: Book, name: str) -> None:
    """It forbids the + in amp+null, and would refuse the whole parent run for it."""
    with book.open() as tracker:
        tracker.study(name, config={"rules": {"amp+null": {"lr": 0.1}}}, tags={"bench.rules": "amp+null"})
        tracker.headline({"weight/amp+null/area": 0.5, "weight/backprop/area": 0.6})
        tracker.curve("weight/amp+null/test_acc", {0.0: 0.9})
        delivered(tracker)
    parent = book.parent(name)
    assert parent.data.params == {"rules.amp-null.lr": "0.1"}
    assert parent.data.tags["bench.rules"] == "amp+null"
    assert parent.data.metrics == {
        "weight/amp-null/area": 0.5,
        "weight/backprop/area": 0.6,
        "weight/amp-null/test_acc": 0.9,
    }
    assert book.said == []


def test_studies_of_one_name_are_told_apart_by_identity(book: Book, name: str) -> None:
    for identity in ("one", "two"):
        with book.open() as tracker:
            tracker.study(name, config={"who": identity}, identity=identity)
            run_whole(tracker, "a", finished())
            delivered(tracker)
    parents = book.runs(f"tags.`bench.study` = '{name}' AND tags.`bench.kind` = 'study'")
    assert [p.data.params["who"] for p in parents] == ["one", "two"]
    for parent in parents:
        assert len(book.runs(f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")) == 1


def test_a_study_that_several_processes_write_is_not_swept(book: Book, name: str) -> None:
    with book.open() as one, book.open() as other:
        one.study(name, config={}, sweep=False)
        one.start("a", "train", CONFIG)
        delivered(one)
        other.study(name, config={}, sweep=False)
        other.start("b", "train", CONFIG)
        delivered(other)
        assert {uid: run.info.status for uid, run in book.children(name).items()} == {"a": "RUNNING", "b": "RUNNING"}


def test_misuse_is_an_error(book: Book, name: str) -> None:
    with book.open() as tracker:
        with pytest.raises(ValueError, match="start before study"):
            tracker.start("a", "search", CONFIG)
        with pytest.raises(UserError, match="quotes"):
            tracker.study("it's", config={})
        tracker.study(name, config={})
        with pytest.raises(ValueError, match="before start"):
            tracker.report("a", 1, {})
        with pytest.raises(ValueError, match="before start"):
            tracker.finish("a", finished())
        with pytest.raises(UserError, match="no such file"):
            tracker.artifacts([Path("nowhere")])


def test_mlflow_is_imported_in_the_thread_alone() -> None:
    code = "import sys, bench.tracking; print([m for m in ('mlflow', 'pandas', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
