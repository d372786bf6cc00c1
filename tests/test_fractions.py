"""`bench speed --fractions`: which trainings, paired by seed, and what is said of the smallest share that is enough."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import headlines
from bench.cli import main
from bench.config import TrialConfig, UserError
from bench.fractions import FIRST_SEED, FractionsConfig, Ready, enough, fractions, prepare_fractions
from bench.pages.fractions import fractions_page
from bench.pages.parts import Absent
from bench.place import Options
from bench.replay import fractions_again
from mlflow_book import Book
from rehearsal import Formula, Stage, rows, stage

__all__ = ["stage"]  # a fixture

SHARES = [0.5, 0.25]


def best(folder: Path, rule: str, coefficients: dict[str, float]) -> Path:
    """As a search leaves it."""
    config = TrialConfig(rule=rule, arch="lenet", coefficients=coefficients, epochs=2, batch_size=16)
    path = folder / f"{rule}.json"  # YAML too
    path.write_text(json.dumps(config.to_dict()))
    return path


def ready(folder: Path, *, seeds: int = 3, shares: list[float] = SHARES, rules: tuple[str, ...] = ("mirror",)) -> Ready:
    known = {"mirror": {"amp": 1e-4, "decay": 0.1}, "sparse": {"sparse": 0.1}}
    return prepare_fractions(
        "f",
        [],
        shares,
        seeds=seeds,
        arch="lenet",
        dataset="digits",
        changes={},
        files=[best(folder, rule, known[rule]) for rule in rules],
        options=Options(results=folder / "results", concurrent=2),
    )


def played(made: Ready) -> dict[str, Any]:
    return fractions(made, say=lambda _: None)[1]


def test_every_share_is_trained_with_every_seed_once(stage: Callable[[Formula], Stage], tmp_path: Path) -> None:
    world = stage(lambda _: 0.8)
    found = played(ready(tmp_path, rules=("mirror", "sparse")))
    configs = [config for _, config in world.runs]
    wanted = {(r, f, FIRST_SEED + s): 1 for r in ("mirror", "sparse") for f in (1.0, 0.5, 0.25) for s in range(3)}
    assert Counter((c.rule, c.feedback_fraction, c.seed) for c in configs) == wanted
    assert len({c.replace(seed=0, feedback_fraction=1.0).digest() for c in configs if c.rule == "mirror"}) == 1
    assert found["complete"]
    assert {row["kind"] for row in rows(tmp_path / "results" / "f" / "rows.jsonl")} == {"speed"}
    assert not any(row["test_read"] for row in rows(tmp_path / "results" / "f" / "rows.jsonl"))


def test_differences_are_paired_by_seed(stage: Callable[[Formula], Stage], tmp_path: Path) -> None:
    """The seeds differ by far more than the shares do, and exactly alike."""
    lost = {1.0: 0.0, 0.5: 0.0, 0.25: 0.02}
    noise = {0.5: [0.001, -0.001, 0.0], 0.25: [0.001, -0.001, 0.0], 1.0: [0, 0, 0]}
    stage(lambda c: 0.3 * (1 + c.seed % 3) / 2 + noise[c.feedback_fraction][c.seed % 3] - lost[c.feedback_fraction])
    found = played(ready(tmp_path))["rules"]["mirror"]
    whole, half, quarter = found["lines"]
    assert whole["versus_whole"] is None
    assert whole["val_acc"]["sd"] > 0.1
    assert half["versus_whole"]["mean"] == pytest.approx(0.0)
    assert half["versus_whole"]["verdict"] == "not distinguishable"
    assert quarter["versus_whole"]["mean"] == pytest.approx(-0.02)
    assert quarter["versus_whole"]["verdict"] == "worse"
    assert found["enough"] == 0.5


def test_a_diverged_training_counts_at_chance(stage: Callable[[Formula], Stage], tmp_path: Path) -> None:
    stage(lambda c: None if c.feedback_fraction == 0.25 else 0.8 + c.seed / 1e6)
    *_, quarter = played(ready(tmp_path))["rules"]["mirror"]["lines"]
    assert (quarter["diverged"], quarter["val_acc"]["mean"]) == (3, pytest.approx(0.1))
    assert quarter["versus_whole"]["verdict"] == "worse"


def test_it_goes_on_and_grows(stage: Callable[[Formula], Stage], tmp_path: Path) -> None:
    world = stage(lambda _: 0.8)
    world.stop_after = 4
    outcome, found = fractions(ready(tmp_path), say=lambda _: None)
    assert (outcome, found["complete"]) == ("interrupted", False)
    world.stop_after = None
    assert played(ready(tmp_path))["complete"]
    assert len(world.runs) == 9
    played(ready(tmp_path, seeds=4, shares=[0.5, 0.25, 0.125]))
    assert len(world.runs) == 16
    assert len({uid for uid, _ in world.runs}) == 16
    assert fractions(ready(tmp_path, seeds=4, shares=[0.5, 0.25, 0.125]), say=lambda _: None)[0] == "known"
    with pytest.raises(UserError, match="which may grow"):
        played(ready(tmp_path, shares=[0.5]))


WHOLE = {"fraction": 1.0, "val_acc": {}, "versus_whole": None}


def line(fraction: float, low: float | None, high: float | None) -> dict[str, Any]:
    return {"fraction": fraction, "val_acc": {}, "versus_whole": {"low": low, "high": high}}


@pytest.mark.parametrize(
    ("lines", "smallest"),
    [
        ([line(0.5, -0.005, 0.1), line(0.25, -0.0099, 0.1)], 0.25),
        ([line(0.5, -0.005, -0.001), line(0.25, -0.005, 0.1)], 0.25),  # worse, by less than a point
        ([line(0.5, -0.2, -0.1), line(0.25, -0.005, 0.1)], 1.0),  # known to be worse
        ([line(0.5, -0.2, 0.1), line(0.25, -0.005, 0.1)], None),  # not distinguishable, which says nothing
        ([line(0.5, -0.005, 0.1), line(0.25, -0.2, -0.1), line(0.125, -0.005, 0.1)], 0.5),
        ([line(0.5, -0.005, 0.1), line(0.25, -0.8, -0.8)], 0.5),  # all its differences are equal
        ([line(0.5, -0.8, -0.8)], 1.0),
        ([{**line(0.5, 0, 0), "versus_whole": None}], None),
        ([line(0.5, None, None)], None),  # one seed
        ([line(0.5, -0.005, 0.1), line(0.25, None, None)], 0.5),
    ],
)
def test_the_smallest_share_below_which_nothing_is_lost(lines: list[dict[str, Any]], smallest: float | None) -> None:
    assert enough([WHOLE, *lines]) == smallest
    assert enough([*lines, WHOLE][::-1]) == smallest


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rule", "symmetric"], "has no effect on symmetric"),
        (["--rule", "mirror"], "mirror-lenet-digits"),  # never searched
        (["--rule", "all"], "name rules that have been searched"),
        (["--fractions", "0"], "fraction = 0"),
        (["--fractions", "half"], "write numbers"),
        (["--fractions", "1"], "the whole batch is always among them"),
        (["--fractions", "0.5,0.07,0.06"], "of 16 examples, some of 1, 0.5, 0.07, 0.06 are the same"),
        (["--seeds", "0"], "seeds = 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--config", str(best(tmp_path, "mirror", {"amp": 1e-4, "decay": 0.1}))] if "--rule" not in words else []
    known = ["--fractions", "0.5"] if "--fractions" not in words else []
    where = ["--arch", "lenet", "--results", str(tmp_path / "r")]
    assert main(["speed", *known, *words, *own, *where]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "r" / "fractions-lenet-digits" / "rows.jsonl").exists()


def test_a_share_of_one_alone_is_no_comparison() -> None:
    with pytest.raises(UserError, match="name a rule and a share"):
        FractionsConfig(name="f", rules={}, fractions=(0.5,))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")  # MLflow's own use
def test_for_real(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a store that names no place for files has them in mlruns/, here
    path = best(tmp_path, "mirror", {"amp": 1e-4, "decay": 0.1})
    words = ["--config", str(path), "--seeds", "2", "--epochs", "1", "--arch", "lenet", "--set", "train_examples=64"]
    command = ["speed", "--fractions", "0.25", *words, "--results", str(tmp_path / "r")]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["outcome"] == "done"
    assert [line["val_acc"]["n"] for line in found["rules"]["mirror"]["lines"]] == [2, 2]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "mirror: share of each batch that B sees" in out
    assert "mirror: " in out
    book = Book(tmp_path / "r")
    assert len(book.children("fractions-lenet-digits")) == 4
    known = json.loads((tmp_path / "r" / "fractions-lenet-digits" / "summary.json").read_text())["rules"]["mirror"]
    assert book.parent("fractions-lenet-digits").data.metrics.get("enough/mirror") == known["enough"]
    from_the_rows_alone(tmp_path / "r", capsys)


def from_the_rows_alone(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its summary, its page, its line in the index, and its runs in an MLflow that lacks them."""
    folder = results / "fractions-lenet-digits"
    assert fractions_again(folder) == json.loads((folder / "summary.json").read_text())
    page = (folder / "report.html").read_text()
    assert "mirror: " in page
    assert main(["report", "--results", str(results), "--out", str(results / "out")]) == 0
    assert (results / "out" / "fractions-lenet-digits.html").read_text() == page
    assert "Shares of the batch" in (results / "out" / "index.html").read_text()
    capsys.readouterr()
    other = f"sqlite:///{results / 'other.db'}"
    for recorded in (4, 0):
        assert main(["sync", "--results", str(results), "--tracking-uri", other, "--json"]) == 0
        (synced,) = json.loads(capsys.readouterr().out)["studies"]
        assert (synced["study"], synced["recorded"], synced["agrees"]) == (folder.name, recorded, True)


def test_before_two_trainings_of_one_seed_there_is_nothing_to_draw(
    stage: Callable[[Formula], Stage], tmp_path: Path
) -> None:
    stage(lambda _: 0.8).stop_after = 1
    outcome, found = fractions(ready(tmp_path), say=lambda _: None)
    assert outcome == "interrupted"
    (losses, *_), lines = fractions_page(found).sections[0].parts, fractions_page(found).lines
    assert isinstance(losses, Absent)
    assert lines[0].startswith("Not all is trained yet")
    assert headlines.fractions(found) == {}


def test_network_and_data_are_those_of_the_file(tmp_path: Path) -> None:
    """Those of a TrialConfig are others."""
    made = prepare_fractions(
        None,
        [],
        [0.5],
        seeds=2,
        arch=None,
        dataset=None,
        changes={},
        files=[best(tmp_path, "mirror", {"amp": 1e-4, "decay": 0.1})],
        options=Options(results=tmp_path / "r", concurrent=2),
    )
    assert (made.config.name, made.config.rules["mirror"]["arch"]) == ("fractions-lenet-digits", "lenet")


def test_its_folder_is_no_other_study(stage: Callable[[Formula], Stage], tmp_path: Path) -> None:
    stage(lambda _: 0.8)
    played(ready(tmp_path))
    words = ["--rule", "decay", "--arch", "lenet", "--name", "f", "--results", str(tmp_path / "results")]
    assert main(["search", *words]) == 2
