"""`bench search` as a user runs it: real Ray, a real study, a real MLflow store; killed, and run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench.campaign import confirm_seeds
from bench.config import StudyConfig, study_name
from bench.place import Options, share_out
from bench.reading import pick, read_search, search_summary
from mlflow_book import Book

QUICK = [
    *("--arch", "lenet", "--epochs", "2", "--confirm-seeds", "2", "--concurrent", "2", "--scheduler", "none"),
    *("--set", "train_examples=64", "--set", "batch_size=32", "--set", "augment=false", "--json"),
]


def command(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bench.cli", "search", *QUICK, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def search(folder: Path, *arguments: str) -> dict[str, Any]:
    process = command(folder, *arguments)
    out, err = process.communicate(timeout=300)
    logs = "".join(log.read_text(errors="replace")[-4000:] for log in (folder / "results").glob("*/ray.log"))
    assert process.returncode == 0, f"code {process.returncode}\nstdout: {out}\nstderr: {err}\nray.log: {logs}"
    found: dict[str, Any] = json.loads(out)
    return found


def rows(folder: Path, study: str) -> list[dict[str, Any]]:
    path = folder / "results" / study / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def runs(folder: Path, study: str) -> dict[str, list[Any]]:
    """MLflow's runs of a study, by kind; the parent is the kind 'study'."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/results/mlflow.db")
    found: dict[str, list[Any]] = {}
    experiment = client.get_experiment_by_name("bench")
    for run in client.search_runs([experiment.experiment_id], max_results=1000):
        if run.data.tags.get("bench.study") == study:
            found.setdefault(run.data.tags["bench.kind"], []).append(run)
    return found


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own, in the client that this test reads with
def test_search_from_end_to_end(tmp_path: Path) -> None:
    name = "symmetric-lenet-digits"
    first = search(tmp_path, "--rule", "decay+self", "--trials", "3")
    assert first["outcome"] == "done"
    assert first["rule"] == "symmetric"
    assert sum(first["trials"].values()) == 3

    # rows: three trials and the best of them with two fresh seeds; the controls in their own file
    kinds = Counter(r["kind"] for r in rows(tmp_path, name))
    assert kinds == {"search": 3, "confirm": 2}
    assert {r["config"]["seed"] for r in rows(tmp_path, name) if r["kind"] == "confirm"} == {1000, 1001}
    controls = rows(tmp_path, "controls")
    assert Counter(r["config"]["rule"] for r in controls) == {"backprop": 2, "feedback": 2}
    assert all(r["test_read"] == (r["kind"] != "search") for r in (*rows(tmp_path, name), *controls))
    assert all(r["provenance"]["versions"] for r in rows(tmp_path, name))
    kept = tmp_path / "results" / name / "checkpoints"
    assert list(kept.iterdir()) == []

    # the table: the best of the study, and what its rows say
    tried = sorted((r for r in rows(tmp_path, name) if r["kind"] == "search"), key=lambda r: r["uid"])
    best = max(tried, key=lambda r: r["metrics"]["val_acc"])  # of equals the first
    entry = first["confirmed"][0]
    assert entry["coefficients"] == best["config"]["coefficients"]
    confirmed = [r["metrics"]["test_acc"] for r in rows(tmp_path, name) if r["kind"] == "confirm"]
    assert entry["test_acc"]["mean"] == pytest.approx(sum(confirmed) / 2)

    # MLflow agrees with the rows, and nothing is left running
    found = runs(tmp_path, name)
    assert {kind: len(some) for kind, some in found.items()} == {"study": 1, "search": 3, "confirm": 2, "control": 4}
    parent = found["study"][0]
    assert all(run.info.status == "FINISHED" for some in found.values() for run in some)
    for kind in ("search", "confirm", "control"):
        assert {run.data.tags["mlflow.parentRunId"] for run in found[kind]} == {parent.info.run_id}
    assert parent.data.metrics["test_acc"] == pytest.approx(entry["test_acc"]["mean"])
    by_uid = {run.data.tags["bench.uid"]: run for run in found["search"]}
    for row in rows(tmp_path, name):
        if row["kind"] == "search":
            assert by_uid[row["uid"]].data.metrics["val_acc"] == pytest.approx(row["metrics"]["val_acc"])

    # from the rows alone: the numbers that were printed; and their page, which MLflow has too
    from_rows = search_summary(read_search(*pick(tmp_path / "results", [name])))
    assert json.loads(json.dumps(from_rows)) == {key: first[key] for key in from_rows}
    assert "report.html" in Book(tmp_path / "results").files(parent)

    # the same command again runs nothing, and removes what a kill left; more trials go on; a second study shares the
    # controls
    for left in (tried[0], controls[0]):
        (kept / f"{left['uid']}.pt").touch()
    again = search(tmp_path, "--rule", "symmetric", "--trials", "3")
    assert again["outcome"] == "known"
    assert list(kept.iterdir()) == []
    assert again["confirmed"] == first["confirmed"]
    more = search(tmp_path, "--rule", "symmetric", "--trials", "4")
    assert sum(more["trials"].values()) == 4
    assert len([r for r in rows(tmp_path, name) if r["kind"] == "search"]) == 4
    other = search(tmp_path, "--rule", "sign")
    assert sum(other["trials"].values()) == 1  # nothing to search: one configuration says all
    assert len(rows(tmp_path, "controls")) == 4
    assert len(runs(tmp_path, "sign-lenet-digits")["control"]) == 4

    # other settings under the same name, or fewer trials, are refused
    for arguments, said in ((["--trials", "4", "--seed", "7"], "seed"), (["--trials", "2"], "grow")):
        process = command(tmp_path, "--rule", "symmetric", *arguments)
        assert process.wait(timeout=120) == 2
        assert said in process.stderr.read()
        process.stdout.close()
        process.stderr.close()


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore")
def test_killed_at_two_moments_it_goes_on_and_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    name = "mirror-lenet-digits"
    arguments = ("--rule", "mirror", "--trials", "4", "--confirm-seeds", "1")
    for wanted in (1, 3):
        process = command(tmp_path, *arguments)
        deadline = time.monotonic() + 200
        while len(rows(tmp_path, name)) < wanted and process.poll() is None:
            assert time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    ended = search(tmp_path, *arguments)
    assert sum(ended["trials"].values()) == 4
    uids = [r["uid"] for r in rows(tmp_path, name)]
    assert len(uids) == len(set(uids)) == 5
    assert len(rows(tmp_path, "controls")) == 2
    found = runs(tmp_path, name)
    assert {kind: len(some) for kind, some in found.items()} == {"study": 1, "search": 4, "confirm": 1, "control": 2}
    assert {run.info.status for some in found.values() for run in some} == {"FINISHED"}

    whole = tmp_path / "undisturbed"
    whole.mkdir()
    search(whole, *arguments, "--concurrent", "1")
    accuracy = {r["uid"]: r["metrics"]["val_loss"] for r in rows(tmp_path, name)}
    undisturbed = {r["uid"]: r["metrics"]["val_loss"] for r in rows(whole, name)}
    assert accuracy[f"{name}-0000"] == undisturbed[f"{name}-0000"]  # the first proposal depends on the seed alone


def test_names_and_seeds() -> None:
    assert study_name("amp+null", "resnet18", "digits") == "amp+null-resnet18-digits"
    assert study_name("sign", "timm:vit_tiny", "imagefolder:/data/my set/") == "sign-timm-vit_tiny-imagefolder-my-set"
    config = StudyConfig(name="s", rule="sign", arch="lenet", dataset="digits", confirm_seeds=3, seed=1001)
    assert confirm_seeds(config) == [1000, 1002, 1003]


def test_cores_are_shared_out() -> None:
    alone = share_out(Options(concurrent=1), "cpu")
    assert alone.concurrent == 1
    assert alone.gpus == 0.0
    many = share_out(Options(concurrent=64), "cpu")
    assert (many.concurrent, many.threads) == (64, 1)
