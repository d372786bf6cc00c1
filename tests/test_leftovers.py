"""The doctor on a results folder: what killed runs left there, and what to do about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.check import Check
from bench.config import StudyConfig
from bench.filed import read_filed
from bench.files import write_yaml
from bench.journal import claim
from bench.leftovers import check_leftovers
from bench.reading import find
from bench.rows import RowFile, row
from bench.space_files import load_space
from mlflow_book import finished

SPACE = load_space("mirror", "resnet18", space="reference").to_dict()


def begin(results: Path, name: str, *, trials: int, ran: int) -> Path:
    """A search's folder with so many trials of its budget."""
    config = StudyConfig(
        name=name, rule="mirror", arch="resnet18", dataset="digits", trials=trials, space=SPACE, confirm_seeds=0
    )
    folder = results / name
    write_yaml(folder / "study.yaml", {"id": name, "runs_on": "cpu x", "config": config.to_dict()})
    for n in range(ran):
        RowFile(folder / "rows.jsonl").append(row(f"{name}-{n}", name, "search", finished(2)))
    return folder


def found(results: Path) -> dict[str, Check]:
    checks = check_leftovers(results)
    assert all(bool(check.remedy) == (check.status != "ok") for check in checks)
    return {check.name: check for check in checks}


DEEP = "[" * 100_000


def measurement(results: Path, rules: dict[str, Any], summary: str) -> Path:
    """The folder of a measurement of robustness, with this text as its summary."""
    config = {"name": "m", "rules": rules, "sites": ["weight"]}
    write_yaml(results / "m" / "robustness.yaml", {"id": "m", "runs_on": "cpu x", "config": config})
    (results / "m" / "summary.json").write_text(summary)
    return results / "m"


RULES = {"mirror": {"arch": "lenet", "dataset": "digits"}}
#: So many digits as no number of the machine has.
SITE = """{"complete": true, "sites": [{"site": "weight", "true_site": false, "rules": [{"rule": "mirror",
"at_chance": 0, "clean": {"mean": 0.5}, "area": {"mean": MEAN}, "relative_area": null,
"curve": [{"level": 0.1, "acc": {"mean": 0.4}}, {"level": Infinity, "acc": {"mean": 0.3}}]}]}]}"""


@pytest.mark.parametrize(
    ("rules", "summary"), [({}, "{}"), (RULES, DEEP), (RULES, SITE.replace("MEAN", "1" + "0" * 400))]
)
def test_a_damaged_measurement_is_one_line(tmp_path: Path, rules: dict[str, Any], summary: str) -> None:
    folder = measurement(tmp_path, rules, summary)
    check = found(tmp_path)["studies"]
    assert str(folder) in check.detail
    assert "damaged" in check.detail
    assert "\n" not in check.detail


def test_a_level_that_is_no_number_is_no_point_of_a_curve(tmp_path: Path) -> None:
    measurement(tmp_path, RULES, SITE.replace("MEAN", "0.4"))
    (study,) = find(tmp_path)
    assert read_filed(study).curves == {"weight/mirror/test_acc": {0.0: 0.5, 0.1: 0.4}}


def test_of_nothing_nothing_is_left(tmp_path: Path) -> None:
    assert {name: check.status for name, check in found(tmp_path / "results").items()} == {
        "studies": "ok",
        "torn files": "ok",
    }
    assert list(tmp_path.iterdir()) == []


def test_studies_that_stopped_before_their_budget_was_used(tmp_path: Path) -> None:
    begin(tmp_path, "whole", trials=2, ran=2)
    begin(tmp_path, "begun", trials=9, ran=2)
    write_yaml(tmp_path / "plan" / "transfer.yaml", plan())
    checks = found(tmp_path)
    assert checks["studies"].status == "warn"
    assert checks["studies"].detail == "unfinished, and without a driver: begun (2 of 9 trials), plan (0 runs)"
    with claim(tmp_path / "begun"), claim(tmp_path / "plan"):
        assert found(tmp_path)["studies"].status == "ok"


def plan() -> dict[str, object]:
    config = {"name": "plan", "rules": ["mirror"], "source": "lenet", "targets": ["mlp"], "dataset": "digits"}
    return {"id": "y", "runs_on": "cpu x", "config": config}


@pytest.mark.parametrize("file", ["rows.jsonl", "journal.log"])
def test_a_torn_last_line_is_named_and_left_to_the_next_start(tmp_path: Path, file: str) -> None:
    folder = begin(tmp_path, "torn", trials=2, ran=2)
    with (folder / file).open("ab") as opened:
        opened.write(b'{"uid": "x", ')
    checks = found(tmp_path)
    assert checks["torn files"].status == "warn"
    assert str(folder / file) in checks["torn files"].detail
    assert checks["studies"].status == "ok"


def test_a_damaged_study_is_named(tmp_path: Path) -> None:
    folder = begin(tmp_path, "damaged", trials=2, ran=2)
    lines = (folder / "rows.jsonl").read_text().splitlines()
    (folder / "rows.jsonl").write_text("\n".join(["?", json.dumps({"uid": "x"}), *lines]) + "\n")
    checks = found(tmp_path)
    assert checks["studies"].status == "warn"
    assert "rows.jsonl, line 1: not a result row" in checks["studies"].detail
