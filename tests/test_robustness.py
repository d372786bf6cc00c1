"""`bench robustness` as a whole: what it leaves, interrupted or not; a user's own networks; and a real one."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import engine, robustness
from bench.checkpoint import read_checkpoint
from bench.cli import main
from bench.config import TrialConfig, UserError
from bench.engine import Task
from bench.noise import ADDED_UP
from bench.place import Options
from bench.present import print_robustness
from bench.probe import digest_of, run_probe
from bench.robustness import Ready, Robustness, measure, prepare_measurement
from bench.robustness_plan import Plan, RobustnessConfig
from bench.robustness_points import read_summary
from bench.rows import RowFile
from bench.train import evaluate
from bench.trial import run_trial
from bench.verbs.common import BAD_INPUT
from fake_networks import Silent, finish, ready, source, trains
from mlflow_book import Book

# --- the whole, with a machine that pretends --------------------------------------------------------------


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs tasks here, so many (None: all), with this status; what was run and what MLflow was told is kept."""
    world: dict[str, Any] = {"limit": None, "status": lambda _: "finished", "tasks": [], "trained": 0}

    def run(made: Robustness, **_: Any) -> str:
        world["tasks"] = tasks = []
        while isinstance(task := made.next(), Task):
            if len(tasks) == world["limit"]:
                made.started(task.uid)
                return "interrupted"
            tasks.append(task)
            world["trained"] += trains(task)
            finish(made, task, world["status"](task))
        return "done"

    def opened(**_: Any) -> Silent:
        world["tracker"] = Silent()
        return world["tracker"]

    monkeypatch.setattr(engine, "run", run)
    monkeypatch.setattr(robustness.Tracker, "open", opened)
    return world


def test_what_a_measurement_leaves(tmp_path: Path, pretended: dict[str, Any]) -> None:
    made = ready(tmp_path, "feedback", gradients=("true", "feedback"))
    outcome, found = measure(made, say=print)
    assert (outcome, found["complete"]) == ("done", True)
    names = ("update", "weight", "fgsm", "fgsm-through-B")
    files = {"robustness.yaml", "rows.jsonl", "summary.json", "report.html", *(f"{name}.svg" for name in names)}
    assert {p.name for p in made.folder.iterdir()} == {*files, "lock"}  # the networks are gone
    assert json.loads((made.folder / "summary.json").read_text())["sites"] == found["sites"]
    (sent,) = pretended["tracker"].of("artifacts")
    assert {p.name for p in sent[0]} == files
    sent_curves = dict(pretended["tracker"].of("curve"))
    assert sent_curves["weight/feedback/test_acc"] == pytest.approx({0.0: 0.9, 0.1: 0.8, 0.2: 0.7})
    assert sent_curves["fgsm through B/backprop/test_acc"] == sent_curves["fgsm/backprop/test_acc"]
    assert len(sent_curves) == 2 * len(names)
    (headline,) = pretended["tracker"].of("headline")
    assert headline[0]["weight/backprop/clean"] == pytest.approx(0.9)
    assert len(pretended["tracker"].of("start")) == len(found_rows(made))
    again, same = measure(made, say=print)
    assert (again, pretended["tracker"].of("start")) == ("known", [])
    assert len(pretended["tracker"].of("record")) == len(found_rows(made))
    assert same["sites"] == found["sites"]


def found_rows(made: Ready) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (made.folder / "rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("limit", [0, 1, 2, 4, 9])
def test_interrupted_at_any_point_it_says_what_is_known_and_no_more(
    limit: int, tmp_path: Path, pretended: dict[str, Any]
) -> None:
    pretended["limit"] = limit
    made = ready(tmp_path, "feedback", seeds=1)
    outcome, found = measure(made, say=print)
    assert (outcome, found["complete"]) == ("interrupted", False)
    assert pretended["tracker"].of("headline") == []
    assert pretended["tracker"].of("close") == [["KILLED"]]
    assert all("not all is measured yet" in robustness.note(found, site) for site in found["sites"])
    assert limit == 0 or found["sites"]
    networks = list((made.folder / "networks").glob("*.pt"))
    pretended["limit"] = None
    assert measure(made, say=print)[0] == "done"
    assert len(pretended["tasks"]) == 2 * 9 - limit
    assert all(not path.exists() for path in networks)


def test_networks_are_kept_if_asked_once_and_as_long_as_something_failed(
    tmp_path: Path, pretended: dict[str, Any]
) -> None:
    made = ready(tmp_path / "asked", seeds=1, levels={"weight": (0.1, 0.2)})
    measure(made, say=print, keep_networks=True)
    measure(made, say=print)
    assert len(list((made.folder / "networks").iterdir())) == 1
    made = ready(tmp_path / "failed", seeds=1, levels={"weight": (0.1, 0.2)})
    pretended["status"] = lambda task: "failed" if "evaluation" in task.options else "finished"
    measure(made, say=print)
    assert len(list((made.folder / "networks").iterdir())) == 1
    pretended["status"] = lambda _: "finished"
    measure(made, say=print)
    assert (len(pretended["tasks"]), pretended["trained"]) == (3, 2)  # one in each of the two folders
    assert not (made.folder / "networks").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"draws": 4}, "draws was 5, is now 4"),
        ({"first_seed": 7}, "first_seed was 2000, is now 7"),
        ({"clip": True, "levels": {"input": (0.1, 0.2)}}, "clip was False, is now True"),
    ],
)
def test_another_measurement_is_refused_under_the_same_name(
    tmp_path: Path, pretended: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    same: dict[str, Any] = {"seeds": 1, "levels": {"weight": (0.1, 0.2)}}
    measure(ready(tmp_path, **same), say=print)
    tasks = len(pretended["tasks"])
    with pytest.raises(UserError, match=said):
        measure(ready(tmp_path, **{**same, **changes}), say=print)
    measure(ready(tmp_path, "sign", **{**same, "seeds": 2}), say=print)  # more of the same is not another
    assert len(pretended["tasks"]) == 3 * tasks  # three new networks


def test_what_has_no_effect_on_this_part_is_as_it_was(tmp_path: Path, pretended: dict[str, Any]) -> None:
    weight: dict[str, Any] = {"seeds": 1, "levels": {"weight": (0.1, 0.2)}, "draws": 8}
    measure(ready(tmp_path, **weight), say=print)
    measure(ready(tmp_path, seeds=1, levels={"update": (0.1, 0.2)}), say=print)  # draws nothing
    assert len(pretended["tasks"]) == 2
    assert measure(ready(tmp_path, **weight), say=print)[0] == "known"


def test_networks_that_were_removed_are_counted_and_another_network_is_said(
    tmp_path: Path, pretended: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pretended["limit"] is None

    def first(levels: tuple[float, ...]) -> Any:
        return ready(tmp_path, seeds=1, levels={"weight": levels})

    said: list[str] = []
    measure(first((0.1, 0.2)), say=said.append)
    assert not any("trained again" in line for line in said)
    looks: list[str] = []

    def watch(source: Any) -> Any:
        looks.append(source.outlook())
        return lambda: None

    monkeypatch.setattr(robustness.Robustness, "repeated", lambda _: ["backprop seed 2000"])
    measure(first((0.1, 0.2, 0.3)), say=said.append, watch=watch)
    assert "1 networks were removed and are trained again" in looks[0]
    assert any("came out different (backprop seed 2000)" in line for line in said)


def test_what_is_printed_claims_no_more_than_what_was_measured(
    tmp_path: Path, pretended: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    made = ready(tmp_path, "feedback", levels={"fgsm": (0.01, 0.02)}, attacked=50)

    def printed() -> str:
        outcome, found = measure(made, say=print)
        capsys.readouterr()
        print_robustness(outcome, {**found, "link": None}, made.place.options)
        return capsys.readouterr().out

    pretended["limit"] = 11
    early = printed()
    assert "interrupted: the same command goes on from here" in early
    assert "not all is measured yet" in early
    assert "feedback is" not in early  # no verdict on a part
    pretended.update(limit=None, status=lambda t: "failed" if t.options.get("evaluation") else "finished")
    failed = printed()
    assert "runs: 11 finished, 0 diverged, 5 failed" in failed
    assert "the same command tries what failed again" in failed
    pretended["status"] = lambda _: "finished"
    whole = printed()
    assert "runs: 16 finished, 0 diverged, 0 failed" in whole
    assert "fgsm: feedback is not distinguishable from backprop at this n" in whole
    assert "mean over 2 seeds" in whole
    assert "± is the half-width" in whole
    assert "accuracy on 50 test examples; nothing was chosen by it; 0 of 12 runs diverged" in whole
    assert "is finished; this is its result" in printed()


def test_a_measurement_in_the_folder_of_a_search_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "study.yaml").write_text("id: x\n")
    with pytest.raises(UserError, match="another --name"):
        prepare_measurement(ready(tmp_path).config, Options(results=tmp_path))


def test_the_display_says_where_it_stands(tmp_path: Path) -> None:
    made = source(tmp_path, "feedback", seeds=1)
    assert made.outlook() == "6 trainings of 2 epochs, 12 evaluations"
    task = made.next()
    made.started(task.uid)
    made.reported(task.uid, 1, {"val_acc": 0.25})
    assert "0/6 trainings · 0/12 evaluations" in made.render()
    assert "epoch 1/2  val 25.00%" in made.render()
    finish(made, task, "diverged")
    assert "1/6 trainings · 0/6 evaluations · 1 diverged" in made.render()
    assert made.outlook().endswith("12 evaluations, of which 1 is known")


# --- networks that were trained elsewhere -----------------------------------------------------------------

TINY = TrialConfig(
    rule="feedback", arch="lenet", epochs=1, train_examples=64, batch_size=32, seed=7, measure_alignment=False
)
TINY_FIRST = TINY.replace(rule="backprop")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mine") / "net.pt"
    run_trial(TINY, checkpoint=str(path), device="cpu")
    return path


def given_plan(folder: Path, path: Path, **changes: Any) -> Ready:
    made = ready(folder)
    rules = {rule: TINY.replace(rule=rule).to_dict() for rule in ("backprop", "feedback")}
    config = RobustnessConfig(name="m", rules=rules, levels={"weight": (0.1, 0.2)}, seeds=1, draws=2)
    plan = Plan(config, key="cpu 0", folder=folder / "m", given=[(TINY, path)])
    return dataclasses.replace(made, config=config, plan=plan, **changes)


@pytest.mark.usefixtures("pretended")
def test_a_checkpoint_is_measured_as_it_is_beside_a_backprop_of_its_seed(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "m" / "networks" / "mine.pt"  # where the networks of an earlier measurement were kept
    mine.parent.mkdir(parents=True)
    mine.write_bytes(trained.read_bytes())
    made = given_plan(tmp_path, mine)
    task = Robustness(made, Silent(), RowFile(made.folder / "rows.jsonl")).next()  # type: ignore[arg-type]
    assert (task.config.rule, task.config.seed, "evaluation" in task.options) == ("backprop", 7, False)

    def ran(made: Robustness, **_: Any) -> str:
        while isinstance(task := made.next(), Task):
            made.started(task.uid)
            made.completed(task.uid, run_probe(task.config, **task.options))
        return "done"

    monkeypatch.setattr(engine, "run", ran)
    measure(made, say=print)
    rows = found_rows(made)
    assert Counter((r["config"]["rule"], bool(r["evaluation"])) for r in rows) == {
        ("backprop", False): 1,
        ("backprop", True): 3,
        ("feedback", True): 3,
    }
    clean = {r["config"]["rule"]: r["metrics"]["test_acc"] for r in rows if r["evaluation"].get("level") == 0.0}
    assert clean["feedback"] == evaluate(trained, split="test", data_dir=None, device="cpu")["metrics"]["test_acc"]
    assert clean["backprop"] == next(r["metrics"]["test_acc"] for r in rows if not r["evaluation"])
    assert {r["evaluation"].get("file") for r in rows} == {None, digest_of(trained)}
    assert mine.read_bytes() == trained.read_bytes()
    assert list(mine.parent.iterdir()) == [mine]


def test_a_checkpoint_that_changes_meanwhile_is_refused_and_never_trained(trained: Path, tmp_path: Path) -> None:
    evaluation = {"site": "weight", "level": 0.0, "draws": 1, "file": digest_of(trained)}
    missing = tmp_path / "gone.pt"
    with pytest.raises(UserError, match="was changed or removed"):
        run_probe(TINY, network=str(missing), evaluation=evaluation, device="cpu")
    assert not missing.exists()
    missing.write_bytes(trained.read_bytes() + b"x")
    with pytest.raises(UserError, match="was changed or removed"):
        run_probe(TINY, network=str(missing), evaluation=evaluation, device="cpu")


def test_a_network_trained_again_gives_the_same_numbers(trained: Path, tmp_path: Path) -> None:
    path, told = tmp_path / "net.pt", list[int]()
    path.write_bytes(trained.read_bytes())
    noisy = {"site": "weight", "level": 0.5, "draws": 2}
    attack = {"site": "fgsm", "level": 0.0, "attacked": 10**6, "gradient": "true"}
    before = [run_probe(TINY, network=str(path), evaluation=e, device="cpu").metrics for e in (noisy, attack)]
    path.unlink()
    again = run_probe(TINY, lambda n, _: told.append(n), network=str(path), evaluation=noisy, device="cpu")
    assert (again.metrics, told) == (before[0], [1])
    assert read_checkpoint(path)["epoch"] == 1
    assert again.metrics["draws"] == 2.0
    clean = evaluate(trained, split="test", data_dir=None, device="cpu")["metrics"]["test_acc"]
    assert before[1] == {"test_acc": pytest.approx(clean), "examples": 359.0}


def test_a_network_that_diverges_when_it_is_trained_again_counts_at_chance(tmp_path: Path) -> None:
    evaluation = {"site": "weight", "level": 0.1, "draws": 1}
    path = tmp_path / "net.pt"
    found = run_probe(TINY.replace(lr=1e6), network=str(path), evaluation=evaluation, device="cpu")
    assert (found.status, found.metrics, found.evaluation) == ("diverged", {"test_acc": 0.1}, evaluation)


@pytest.mark.parametrize(
    ("networks", "arguments", "said"),
    [
        ([{"epoch": 0, "history": []}], [], "finish it with `bench train"),
        ([{}, {}], [], "given twice"),
        ([{}, {"config": {"seed": 8, "lr": 0.5}}], [], "differ in lr"),
        ([{}, {"config": {"rule": "sign", "lr": 0.5}}], [], "recipes differ in lr"),
        ([{}], ["--site", "update"], "noise in training"),
        ([{}], ["--arch", "resnet18"], "leave out --arch"),
        ([{}], ["--set", "lr=0.1"], "brings its configuration"),
        ([{}], ["--rule", "mirror"], "needs coefficients"),
    ],
)
def test_checkpoints_that_cannot_be_measured_are_refused(
    networks: list[dict[str, Any]],
    arguments: list[str],
    said: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for i, changes in enumerate(networks):
        state = read_checkpoint(trained)
        changed = {**state, **changes, "config": {**state["config"], **changes.get("config", {})}}
        torch.save(changed, f"{i}.pt")
        arguments = [*arguments, "--checkpoint", f"{i}.pt"]
    assert main(["robustness", *arguments]) == BAD_INPUT
    err = capfd.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "results").exists()


# --- the real one ----------------------------------------------------------------------------------------

QUICK = [
    *("--arch", "resnet20", "--epochs", "1", "--concurrent", "2", "--device", "cpu"),
    *("--set", "train_examples=64", "--set", "batch_size=32", "--set", "augment=false", "--json"),
]


def command(folder: Path, *arguments: str) -> dict[str, Any]:
    process = subprocess.run(
        [sys.executable, "-m", "bench.cli", "robustness", *QUICK, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert process.returncode == 0, process.stderr
    found: dict[str, Any] = json.loads(process.stdout)
    return found


def content(book: Book, name: str) -> list[Any]:
    """All that MLflow holds, but by which revision of the code, which may change."""
    found = book.snapshot(name)
    for _, _, tags, *_ in found:
        tags.pop("bench.git_revision", None)
    return found  # type: ignore[no-any-return]


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own, in the client that this test reads with
def test_a_measurement_from_end_to_end(tmp_path: Path) -> None:
    folder, name = tmp_path / "results" / "robustness-resnet20-digits", "robustness-resnet20-digits"
    first = ["--site", "update,input", "--attack", "fgsm", "--epsilon", "0.02,0.1", "--attacked", "20", "--seeds", "1"]
    found = command(tmp_path, "--rule", "feedback", *first)
    assert (found["outcome"], found["complete"], found["runs"]["failed"]) == ("done", True, 0)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    whole = {"training": 2 * (1 + len(ADDED_UP)), "input": 2 * 9, "fgsm": 2 * 3}
    assert Counter(r["evaluation"].get("site", "training") for r in rows) == whole
    assert all(r["test_read"] for r in rows)
    assert not (folder / "networks").exists()

    book = Book(tmp_path / "results")
    parent, children = book.parent(name), book.children(name)
    assert set(children) == {r["uid"] for r in rows}
    assert {run.info.status for run in (parent, *children.values())} == {"FINISHED"}
    for row in rows:
        data = children[row["uid"]].data
        assert data.metrics["test_acc"] == pytest.approx(row["metrics"]["test_acc"])
        if row["evaluation"]:
            assert data.params["evaluation.site"] == row["evaluation"]["site"]
            assert float(data.params["evaluation.level"]) == row["evaluation"]["level"]
        else:
            assert float(data.params["update_noise"]) == row["config"]["update_noise"]
    for site in found["sites"]:
        for rule in site["rules"]:
            points = book.points(parent, f"{site['site']}/{rule['rule']}/test_acc")
            wanted = [(0.0, rule["clean"]), *((at["level"], at["acc"]) for at in rule["curve"])]
            assert sorted(points) == [(round(level * 1e6), pytest.approx(acc["mean"])) for level, acc in wanted]
    kept = {"robustness.yaml", "rows.jsonl", "summary.json", "report.html"}
    assert book.files(parent) == {*kept, "update.svg", "input.svg", "fgsm.svg"}
    from_rows = json.loads(json.dumps(read_summary(folder)))
    assert from_rows == {key: found[key] for key in from_rows}

    # the same again runs nothing, and says nothing twice
    before = content(book, name)
    again = command(tmp_path, "--rule", "feedback", *first)
    assert (again["outcome"], again["sites"]) == ("known", found["sites"])
    assert content(book, name) == before

    # one more level, rule and seed: only what is new
    grown = ["--attack", "fgsm", "--epsilon", "0.02,0.05,0.1", "--attacked", "20", "--seeds", "2"]
    more = command(tmp_path, "--rule", "feedback,sign", *grown, "--keep-networks")
    new = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()][len(rows) :]
    of = Counter((r["config"]["rule"], r["config"]["seed"], r["evaluation"].get("level")) for r in new)
    levels = (None, 0.0, 0.02, 0.05, 0.1)
    wanted = {
        (rule, seed, level) for rule in ("backprop", "feedback", "sign") for seed in (2000, 2001) for level in levels
    }
    known = {(rule, 2000, level) for rule in ("backprop", "feedback") for level in levels if level != 0.05}
    assert of == dict.fromkeys(wanted - known, 1)
    assert len(list((folder / "networks").iterdir())) == 6
    assert set(book.children(name)) == {r["uid"] for r in (*rows, *new)}
    (site,) = more["sites"]
    assert [r["rule"] for r in site["rules"]] == ["backprop", "feedback", "sign"]
    assert all(at["n"] == 2 for r in site["rules"] for at in r["curve"])
