"""What a warm start begins with, and what is said of it, on searches whose rows are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.config import StudyConfig, TrialConfig, TrialResult, UserError
from bench.files import write_yaml
from bench.rows import RowFile, row
from bench.space_files import load_space
from bench.warm import saved, warm_trials

SPACE = load_space("sparse", "resnet18", space="reference")  # 1e-7 to 1e-2


def study(name: str, arch: str = "resnet18", trials: int = 8, **more: Any) -> StudyConfig:
    return StudyConfig(
        name=name, rule="sparse", arch=arch, dataset="digits", trials=trials, space=SPACE.to_dict(), **more
    )


def file(folder: Path, config: StudyConfig, accuracies: list[float | None], coefficients: list[float]) -> None:
    """A search with these accuracies; None is a trial that was stopped."""
    write_yaml(folder / config.name / "study.yaml", {"config": config.to_dict()})
    rows = RowFile(folder / config.name / "rows.jsonl")
    for number, (accuracy, value) in reversed(list(enumerate(zip(accuracies, coefficients, strict=True)))):
        trial = TrialConfig(rule="sparse", arch=config.arch, coefficients={"sparse": value})
        metrics = {} if accuracy is None else {"val_acc": accuracy}
        result = TrialResult(config=trial, status="stopped" if accuracy is None else "finished", metrics=metrics)
        rows.append(row(f"{config.name}-{number:04d}", config.name, "search", result))


def test_the_best_first_and_only_what_lies_in_the_space(tmp_path: Path) -> None:
    accuracies = [0.3, 0.9, None, 0.8, 0.7, 0.9, 0.2, 0.1]
    file(tmp_path, study("source", "lenet"), accuracies, [1e-3, 1e-4, 1e-5, 5e-2, 1e-6, 1e-4, 2e-4, 3e-4])
    # 5e-2 is beyond this network's space, the second 1e-4 is the first again; a quarter of 8 trials are 2
    assert warm_trials(tmp_path, "source", study("target"), SPACE) == ({"sparse": 1e-4}, {"sparse": 1e-6})
    wide = warm_trials(tmp_path, "source", study("target", trials=100), SPACE)
    assert [w["sparse"] for w in wide] == [1e-4, 1e-6, 1e-3, 2e-4, 3e-4]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({}, "same network and data"),
        ({"arch": "lenet", "recipe": {"scaling": "normalized"}}, "its space is 'normalized', and this 'reference'"),
    ],
)
def test_what_cannot_be_begun_with(tmp_path: Path, source: dict[str, Any], said: str) -> None:
    file(tmp_path, study("source", **source), [0.5] * 8, [1e-4] * 8)
    with pytest.raises(UserError, match=said):
        warm_trials(tmp_path, "source", study("target"), SPACE)
    with pytest.raises(UserError, match="there is no search"):
        warm_trials(tmp_path, "nowhere", study("target"), SPACE)


WARM = {"warm_from": "source", "warm": [{"sparse": 1e-4}]}


def test_what_it_saved(tmp_path: Path) -> None:
    """Cold reaches 0.8 in its fifth trial and 0.9 later; warm has 0.8 at once, and never more: both are said."""
    file(tmp_path, study("cold"), [0.1, None, 0.3, 0.7, 0.8, 0.6, 0.9, 0.2], [1e-4] * 8)
    file(tmp_path, study("warm", **WARM), [0.8, 0.5, 0.7, 0.1, 0.2, 0.3, None, 0.2], [1e-4] * 8)
    found = saved(tmp_path, study("warm", **WARM), "cold")
    assert found["reason"] is None
    assert (found["level"], found["warm"], found["cold"], found["saved"]) == (0.8, 1, 5, 4)
    assert (found["warm_best"], found["cold_best"]) == (0.8, 0.9)


@pytest.mark.parametrize(
    ("cold", "count", "said"),
    [
        ({"epochs": 3}, 8, "differs in epochs"),
        (WARM, 8, "had a warm start, too"),
        ({}, 7, "cold has not run all"),
        (None, 0, "no cold search"),
    ],
)
def test_nothing_is_compared_that_cannot_be(tmp_path: Path, cold: dict[str, Any] | None, count: int, said: str) -> None:
    if cold is not None:
        file(tmp_path, study("cold", **cold), [0.5] * count, [1e-4] * count)
    file(tmp_path, study("warm", **WARM), [0.8] * 8, [1e-4] * 8)
    found = saved(tmp_path, study("warm", **WARM), "cold")
    assert said in found["reason"]
    assert found["saved"] is None
