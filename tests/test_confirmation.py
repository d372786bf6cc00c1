"""`bench confirm`: which trainings, what is paired, and that its rows alone give its numbers again."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.cli import main
from bench.config import TrialConfig, UserError
from bench.confirmation import FIRST_SEED, ConfirmationConfig, confirm, headline, prepare, read, summarize
from bench.place import Options
from bench.rows import RowFile, last_attempts
from bench.statistics import versus
from bench.summary import by_seed
from mlflow_book import Book
from rehearsal import Formula, Stage, rows, stage

__all__ = ["stage"]  # a fixture

PUBLISHED = Path(__file__).parents[1] / "results" / "published"
SMALL = {"arch": "lenet", "epochs": 2, "batch_size": 16}
#: Two rates of one rule, and a rule without coefficients.
CONFIGS: dict[str, dict[str, Any]] = {
    "slow": {**SMALL, "rule": "sparse", "coefficients": {"sparse": 0.1}},
    "fast": {**SMALL, "rule": "sparse", "coefficients": {"sparse": 1.0}},
    "sign": {**SMALL, "rule": "sign", "seed": 9},
}


def run(folder: Path, *, seeds: int = 3, names: tuple[str, ...] = ("slow", "fast", "sign")) -> tuple[str, Any]:
    configs = {name: TrialConfig.from_dict(CONFIGS[name]).to_dict() for name in names}
    config = ConfirmationConfig(name="c", configs=configs, seeds=seeds)
    place = prepare(config, Options(results=folder, concurrent=2))
    return confirm(config, place, say=lambda _: None)


def test_every_configuration_is_trained_with_every_seed_once(stage: Callable[[Formula], Stage], tmp_path: Path) -> None:
    world = stage(lambda _: 0.8)
    found = run(tmp_path)[1]
    trained = Counter((config.rule, config.coefficients.get("sparse"), config.seed) for _, config in world.runs)
    which = [("sparse", 0.1), ("sparse", 1.0), ("sign", None)]
    assert trained == {(rule, sparse, FIRST_SEED + s): 1 for rule, sparse in which for s in range(3)}
    assert found["complete"]
    kept = rows(tmp_path / "c" / "rows.jsonl")
    assert {row["kind"] for row in kept} == {"confirm"}
    assert all("test_acc" in row["metrics"] for row in kept)


def test_differences_are_paired_by_seed(stage: Callable[[Formula], Stage], tmp_path: Path) -> None:
    """The seeds differ by far more than the configurations do, and all alike."""
    lost = {0.1: 0.0, 1.0: 0.02, 0.5: 0.0}

    def accuracy(config: TrialConfig) -> float:
        noise = 0.0 if config.coefficients == {"sparse": 0.1} else (0.001, -0.001, 0.0)[config.seed % 3]
        return 0.5 + 0.15 * (config.seed % 3) + noise - lost[config.coefficients.get("sparse", 0.5)]

    stage(accuracy)
    found = run(tmp_path)[1]
    slow, fast, sign = found["studies"]
    assert (found["first"], [line["study"] for line in found["studies"]]) == ("slow", ["slow", "fast", "sign"])
    assert slow["test_acc"]["sd"] > 0.1
    assert slow["test_acc_versus_first"] is None
    assert fast["test_acc_versus_first"]["mean"] == pytest.approx(-0.02)
    assert (fast["test_acc_versus_first"]["verdict"], fast["test_acc_versus_first"]["n"]) == ("worse", 3)
    assert sign["test_acc_versus_first"]["verdict"] == "not distinguishable"
    assert found["notes"] == []  # nothing was searched, and nothing is unequal but what is compared
    assert headline(found)["fast/versus_first"] == fast["test_acc_versus_first"]["mean"]


def test_a_diverged_training_counts_at_chance(stage: Callable[[Formula], Stage], tmp_path: Path) -> None:
    stage(lambda config: None if config.coefficients == {"sparse": 1.0} else 0.8 + config.seed / 1e6)
    fast = run(tmp_path)[1]["studies"][1]
    assert (fast["diverged"], fast["val_acc"]["mean"]) == (3, pytest.approx(0.1))
    assert fast["test_acc_versus_first"]["verdict"] == "worse"


def test_it_goes_on_and_takes_more_seeds(stage: Callable[[Formula], Stage], tmp_path: Path) -> None:
    world = stage(lambda _: 0.8)
    world.stop_after = 4
    outcome, found = run(tmp_path)
    assert (outcome, found["complete"], headline(found)) == ("interrupted", False, {})
    world.stop_after = None
    assert run(tmp_path)[1]["complete"]
    assert len(world.runs) == 9
    run(tmp_path, seeds=4)
    assert len({uid for uid, _ in world.runs}) == len(world.runs) == 12
    assert run(tmp_path, seeds=4)[0] == "known"
    for changes in ({"seeds": 3}, {"seeds": 4, "names": ("slow", "fast")}):
        with pytest.raises(UserError, match="which may grow"):
            run(tmp_path, **changes)  # type: ignore[arg-type]


def test_nothing_is_compared_before_the_first_has_a_run(stage: Callable[[Formula], Stage], tmp_path: Path) -> None:
    world = stage(lambda _: 0.8)
    world.stop_after = 0
    outcome, found = run(tmp_path)
    assert (outcome, found["studies"], found["first"]) == ("interrupted", [], "slow")
    assert not (tmp_path / "c" / "report.html").exists()


def test_rows_alone_give_table_page_and_csv(
    stage: Callable[[Formula], Stage], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage(lambda config: 0.5 + config.coefficients.get("sparse", 0) / 9)
    found = run(tmp_path)[1]
    assert json.loads((tmp_path / "c" / "summary.json").read_text()) == summarize(*read(tmp_path / "c"))
    page = (tmp_path / "c" / "report.html").read_text()
    assert "Differences to slow" in page
    assert main(["report", "--results", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "c.html").read_text() == page
    assert "3 configurations on digits" in (tmp_path / "out" / "index.html").read_text()
    capsys.readouterr()
    assert main(["compare", "c", "--results", str(tmp_path), "--csv"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [line["study"] for line in lines] == ["slow", "fast", "sign"]
    assert float(lines[1]["test_acc_mean"]) == found["studies"][1]["test_acc"]["mean"]


def test_its_folder_is_no_other_study(stage: Callable[[Formula], Stage], tmp_path: Path) -> None:
    stage(lambda _: 0.8)
    run(tmp_path)
    assert main(["search", "--rule", "decay", "--arch", "lenet", "--name", "c", "--results", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a=slow"], "name two or more configurations"),
        (["a=slow", "b=slow"], "that differ in more than the seed"),
        (["a=slow", "a=fast"], "each name once"),
        (["slow", "b=fast"], "write NAME=FILE"),
        (["a=", "b=fast"], "write NAME=FILE"),
        (["../a=slow", "b=fast"], "use letters, digits"),
        (["a=slow", "b=nowhere"], "nowhere"),
        (["a=slow", "b=mnist"], "of several data sets"),
        (["a=slow", "b=fast", "--seeds", "0"], "seeds = 0"),
        (["a=slow", "b=fast", "--storage", "sqlite:///x.db"], "--storage has no effect"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, values in {**CONFIGS, "mnist": {**CONFIGS["fast"], "dataset": "mnist"}}.items():
        Path(name).write_text(json.dumps(values))  # YAML too
    assert main(["confirm", *words]) == 2
    assert said in capsys.readouterr().err
    assert not Path("results").exists()


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")  # MLflow's own use
def test_for_real(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a store that names no place for files has them in mlruns/, here
    for name in ("fast", "sign"):
        Path(name).write_text(json.dumps({**CONFIGS[name], "epochs": 1, "train_examples": 64}))
    command = ["confirm", "a=fast", "b=sign", "--seeds", "2"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["outcome"], found["complete"]) == ("done", True)
    assert [line["test_acc"]["n"] for line in found["studies"]] == [2, 2]
    assert main(command) == 0
    assert "the first: a" in capsys.readouterr().out
    book = Book(tmp_path / "results")
    assert len(book.children("confirm-lenet-digits")) == 4
    told = book.parent("confirm-lenet-digits").data.metrics
    assert told["a/test_acc"] == found["studies"][0]["test_acc"]["mean"]
    for recorded in (4, 0):  # what an MLflow lacks, it gets from the rows
        assert main(["sync", "--tracking-uri", f"sqlite:///{tmp_path / 'other.db'}", "--json"]) == 0
        (synced,) = json.loads(capsys.readouterr().out)["studies"]
        assert (synced["study"], synced["recorded"], synced["agrees"]) == ("confirm-lenet-digits", recorded, True)


def test_rows_of_an_earlier_release_give_the_numbers_that_it_published() -> None:
    """`bench speed --fractions` is gone; the README's table of it comes from its rows."""
    rows = last_attempts(
        RowFile(PUBLISHED / "fractions" / "fractions-activation-resnet18-digits" / "rows.jsonl", say=print).read()
    )
    parts = {
        fraction: by_seed([row for row in rows if row["config"]["feedback_fraction"] == fraction], "val_acc")
        for fraction in (1.0, 0.25, 0.125)
    }
    said = {}
    for fraction in (0.25, 0.125):
        found = versus(parts[fraction], parts[1.0])
        assert found is not None
        said[fraction] = [round(100 * found[name], 2) for name in ("mean", "low", "high")] + [found["n"]]
    assert said == {0.25: [-0.14, -4.16, 3.88, 5], 0.125: [-0.56, -4.57, 3.46, 5]}
