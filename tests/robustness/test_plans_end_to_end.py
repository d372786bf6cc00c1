"""`bench matrix` and `bench transfer` as a user runs them: real Ray, real training, a real MLflow store."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench import matrix, transfer
from bench.space_files import space_folder
from mlflow_book import Book
from rehearsal import rows

QUICK = [
    *("--trials", "1", "--epochs", "1", "--confirm-seeds", "2", "--concurrent", "2", "--scheduler", "none"),
    *("--set", "train_examples=64", "--set", "batch_size=32", "--set", "warmup_epochs=0", "--json"),
]


#: Another range on another network: with one space and one seed, both searches would draw the same single trial.
ELSEWHERE = """
arch:
  resnet20:
    decay: {min: 1e-2, max: 2e-2, scale: log, source: "this test"}
"""
#: The command line, with the search spaces of another folder.
MAIN = (
    "import sys, pathlib, bench.space_files as s, bench.cli as c;"
    "s.space_folder = lambda: pathlib.Path('spaces').resolve(); sys.exit(c.main())"
)


def bench(folder: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *arguments, *QUICK],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def children(folder: Path, study: str) -> tuple[Any, list[Any], list[Any]]:
    """The parent run of a study, its children, and all runs of the store."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/results/mlflow.db")
    experiment = client.get_experiment_by_name("bench")
    every = client.search_runs([experiment.experiment_id], max_results=1000)
    (parent,) = [
        run for run in every if run.data.tags.get("bench.study") == study and run.data.tags.get("bench.kind") == "study"
    ]
    return parent, [r for r in every if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id], every


def told(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary as JSON has it, without what is of the command and not of the rows."""
    kept = {k: v for k, v in summary.items() if k not in ("outcome", "busy", "folder", "mlflow", "link")}
    plain: dict[str, Any] = json.loads(json.dumps(kept))
    return plain


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own, in the client that this test reads with
def test_a_matrix_and_then_a_transfer_that_reuses_one_of_its_searches(tmp_path: Path) -> None:
    spaces = shutil.copytree(space_folder(), tmp_path / "spaces")
    with (spaces / "symmetric.yaml").open("a") as file:
        file.write(ELSEWHERE)
    found = bench(tmp_path, "matrix", "--arch", "lenet", "--primitives", "decay,self")
    assert found["outcome"] == "done"
    assert found["complete"]
    whole = found["archs"]["lenet"]
    names = {"decay", "self", "symmetric", "backprop", "feedback", "sign", "frozen", "kolen-pollack"}
    assert {line["name"] for line in whole["table"]} == names
    for line in whole["table"]:
        assert line["test_acc"]["n"] == 2

    # in MLflow: one parent, whose children are what was confirmed and the controls; nested once
    parent, below, every = children(tmp_path, "matrix-lenet-digits")
    kinds = Counter(run.data.tags["bench.kind"] for run in below)
    assert kinds == {"confirm": 2 * 6, "control": 2 * 2}
    parents = {run.info.run_id for run in every if "mlflow.parentRunId" not in run.data.tags}
    assert all(run.data.tags["mlflow.parentRunId"] in parents for run in every if run.info.run_id not in parents)
    assert {run.info.status for run in every} == {"FINISHED"}
    assert "report.html" in Book(tmp_path / "results").files(parent)
    mean = next(line for line in whole["table"] if line["name"] == "symmetric")["test_acc"]["mean"]
    assert parent.data.metrics["lenet/symmetric/test_acc"] == pytest.approx(mean)

    filed = rows(tmp_path / "results" / "symmetric-lenet-digits" / "rows.jsonl")
    moved = bench(tmp_path, "transfer", "--rule", "symmetric", "--from", "lenet", "--to", "resnet20", "--both")
    assert moved["outcome"] == "done"
    assert [(p["source"], p["target"]) for p in moved["pairs"]] == [("lenet", "resnet20"), ("resnet20", "lenet")]
    assert rows(tmp_path / "results" / "symmetric-lenet-digits" / "rows.jsonl") == filed

    # again from the rows alone: the same numbers, and their pages
    results = tmp_path / "results"
    assert told(matrix.read_summary(results / "matrix-lenet-digits")) == told(found)
    assert told(transfer.read_summary(results / "transfer-lenet-to-resnet20-digits")) == told(moved)

    # regret by hand, from the rows: the target's own best against the source's best there
    own = rows(tmp_path / "results" / "transfer-lenet-to-resnet20-digits" / "rows.jsonl")
    native = rows(tmp_path / "results" / "symmetric-resnet20-digits" / "rows.jsonl")
    there = {r["config"]["seed"]: r for r in own if r["test_read"] and r["config"]["arch"] == "resnet20"}
    its = {r["config"]["seed"]: r for r in native if r["kind"] == "confirm"}
    assert set(there) == set(its) == {1000, 1001}
    by_hand = sum(its[s]["metrics"]["test_acc"] - there[s]["metrics"]["test_acc"] for s in its) / 2
    assert moved["pairs"][0]["regret"]["test_acc"]["mean"] == pytest.approx(by_hand)
    for row in own:
        recipe = row["config"]
        assert recipe["coefficients"] in [r["config"]["coefficients"] for r in (*filed, *native)]
    # several trackers wrote at the same time, and MLflow took it all
    parent, below, _ = children(tmp_path, "transfer-lenet-to-resnet20-digits")
    assert Counter(run.data.tags["bench.kind"] for run in below) == {"transfer": 6, "confirm": 4, "control": 8}
    assert parent.data.tags["bench.dataset"] == "digits"
    assert "report.html" in Book(tmp_path / "results").files(parent)
    assert parent.inputs.dataset_inputs
