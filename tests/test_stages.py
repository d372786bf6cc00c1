"""`bench speed trial`: every second of a trial is in one stage, once."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from bench.cli import main
from bench.config import TrialConfig
from bench.stages import listening, stage, waiting
from bench.trial import run_trial
from mlflow_book import Book


def test_what_is_within_another_stage_is_not_counted_twice() -> None:
    with listening() as clock:
        with stage("outer"):
            time.sleep(0.05)
            for _ in range(2):
                with stage("inner"):
                    time.sleep(0.1)
        list(waiting("items", iter([1, 2, 3])))
    assert clock.calls == {"inner": 2, "outer": 1, "items": 4}
    assert 0.2 <= clock.seconds["inner"] < 0.4
    assert 0.05 <= clock.seconds["outer"] < 0.15


def test_a_stage_that_fails_is_counted_and_the_clock_goes_on() -> None:
    with listening() as clock:
        with pytest.raises(KeyError), stage("outer"), stage("inner"):
            raise KeyError
        with stage("outer"):
            pass
    assert clock.calls == {"inner": 1, "outer": 2}
    with stage("outer"):
        pass
    assert clock.calls["outer"] == 2, "nobody listens any more"


def test_items_come_through_and_their_end_too() -> None:
    assert list(waiting("items", [3, None, 1])) == [3, None, 1]
    assert list(waiting("items", [])) == []


def test_a_trial_has_each_stage_as_often_as_it_happens(tmp_path: Path) -> None:
    config = TrialConfig(
        rule="mirror",
        arch="lenet",
        coefficients={"amp": 1e-4, "decay": 0.1},
        batch_size=16,
        train_examples=48,
        epochs=2,
        noise_site="weight",
        noise_levels=(0.1, 0.2),
    )
    with listening() as clock:
        run_trial(config, checkpoint=str(tmp_path / "trial.pt"), read_test=True)
    steps = 2 * 3
    assert clock.calls == {
        "prepare": 1,
        "data": steps + 2,
        "forward": steps,
        "backward": steps,
        "update": steps,
        "loss": 2,
        "evaluation": 2 + 1,
        "noise": 2 + 1,
        "angles": 2,
        "checkpoint": 2,
    }


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")  # MLflow's own use
def test_shares_add_up_and_are_in_mlflow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--rule", "sparse", "--arch", "lenet", "--epochs", "1", "--results", str(tmp_path)]
    assert main(["speed", "trial", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (run,) = Book(tmp_path).children("speed").values()
    assert run.data.tags["bench.way"] == "a trial's stages"
    for each in found["stages"]:
        assert run.data.metrics[f"seconds/{each['stage']}"] == pytest.approx(each["seconds"])
    assert sum(each["share"] for each in found["stages"]) == pytest.approx(1.0)
    assert {each["stage"] for each in found["stages"]} >= {"prepare", "data", "forward", "backward", "update", "rest"}
    assert found["config"]["batch_size"] == 32  # the recipe's


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--epochs", "0"], "epochs = 0 is out of range"),
        (["--threads", "0"], "threads = 0 is out of range"),
        (["--rule", "backprop,sign"], "unknown rule"),
        (["--batch-size", "64"], "unrecognized arguments: --batch-size 64; see bench --help"),
    ],
)
def test_what_cannot_be_timed_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speed", "trial", *words]) == 2
    assert said in capsys.readouterr().err
