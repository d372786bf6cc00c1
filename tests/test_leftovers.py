"""The doctor on a results folder: what killed runs left there, and what to do about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.check import Check
from bench.config import StudyConfig
from bench.files import write_yaml
from bench.journal import claimed
from bench.leftovers import check_leftovers
from bench.rows import RowFile, row
from bench.space import load_space
from bench.spool import Spool
from bench.stores import embedded, key
from mlflow_book import finished

SPACE = load_space("mirror", "resnet18").to_dict()


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


def leave(results: Path, uri: str, operations: int) -> None:
    file = Spool(results / "spool", key(uri, results), uri).create("a study")
    assert file is not None
    for _ in range(operations):
        file.append(b"{}")
    file.close()


def found(results: Path) -> dict[str, Check]:
    checks = check_leftovers(results)
    assert all(bool(check.remedy) == (check.status != "ok") for check in checks)
    return {check.name: check for check in checks}


def test_of_nothing_nothing_is_left(tmp_path: Path) -> None:
    assert {name: check.status for name, check in found(tmp_path / "results").items()} == {
        "spool": "ok",
        "refused": "ok",
        "studies": "ok",
        "torn files": "ok",
    }
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_delivered_is_counted_by_store_with_its_remedy(tmp_path: Path) -> None:
    for uri, operations in ((embedded(tmp_path)[0], 2), ("http://host:5000", 3), ("http://host:5000", 4)):
        leave(tmp_path, uri, operations)
    (tmp_path / "spool" / "rejected.jsonl").write_text("{}\n{}\n")
    checks = found(tmp_path)
    assert checks["spool"].status == "warn"
    assert checks["spool"].detail == "7 operations for http://host:5000, 2 operations for the embedded store"
    assert checks["spool"].remedy == "bench sync; bench sync --tracking-uri http://host:5000"
    assert checks["refused"].status == "warn"
    assert checks["refused"].detail == "MLflow refused 2 operations"


def test_what_a_living_run_delivers_is_no_leftover(tmp_path: Path) -> None:
    file = Spool(tmp_path / "spool", "key", "http://host").create("a study")
    assert file is not None
    file.append(b"{}")
    assert found(tmp_path)["spool"].status == "ok"
    file.close()
    assert found(tmp_path)["spool"].status == "warn"


def test_studies_that_stopped_before_their_budget_was_used(tmp_path: Path) -> None:
    begin(tmp_path, "whole", trials=2, ran=2)
    begin(tmp_path, "begun", trials=9, ran=2)
    write_yaml(tmp_path / "plan" / "transfer.yaml", plan())
    checks = found(tmp_path)
    assert checks["studies"].status == "warn"
    assert checks["studies"].detail == "unfinished, and without a driver: begun (2 of 9 trials), plan (0 runs)"
    with claimed(tmp_path / "begun"), claimed(tmp_path / "plan"):
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
