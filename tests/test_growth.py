"""What a search costs beside its trials: that it is a whole one, and that its numbers are of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.cli import main
from bench.config import TrialConfig
from bench.growth import nothing, searched


def test_trial_that_does_nothing_reports_as_one_that_trains() -> None:
    reports: list[tuple[int, set[str]]] = []
    config = TrialConfig(rule="sparse", epochs=3, coefficients={"sparse": 0.1})
    result = nothing(config, lambda epoch, metrics: reports.append((epoch, set(metrics))))
    assert [epoch for epoch, _ in reports] == [1, 2, 3]
    assert result.status == "finished"
    assert result.metrics["val_acc"] == result.history[-1]["val_acc"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trials", "5"], "out of range"),
        (["--trials", "10.5"], "whole numbers"),
        (["--trials", "many"], "write numbers"),
        (["--trials", "10", "--sampler", "luck"], "sampler"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speed", *words]) == 2
    assert said in capsys.readouterr().err


class Filed:
    """A campaign, of which so many trials have rows; and five controls."""

    def __init__(self, trials: int) -> None:
        self.trials = trials

    def filed(self, kind: str) -> int:
        return self.trials if kind == "search" else 5


@pytest.mark.parametrize(("outcome", "trials"), [("interrupted", 7), ("interrupted", 10), ("done", 9), ("known", 0)])
def test_a_search_that_is_not_whole_is_no_measurement(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, outcome: str, trials: int
) -> None:
    def search(*_: Any, watch: Any, **__: Any) -> tuple[str, dict[str, Any]]:
        watch(Filed(trials))()
        return outcome, {}

    monkeypatch.setattr("bench.growth.search", search)
    with pytest.raises(SystemExit, match=rf"^the search was {outcome} after {trials} of 10 trials; measure it again"):
        searched(10, "random", tmp_path)


@pytest.mark.faults
def test_small_search_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speed", "--trials", "12", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["trials"], found["sampler"], found["left"]) == (12, "random", 0)
    assert 0 < found["start"] < found["seconds"]
    assert found["overhead"] == pytest.approx((found["seconds"] - found["start"]) / 12)
    assert found["disk"] == pytest.approx(found["rows"] + found["journal"] + found["mlflow"])
    assert min(found["rows"], found["journal"], found["mlflow"], found["memory"], found["late"]) > 0
