"""One trial in two processes of Ray Train's: found as by one; stopped, failed, killed and interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import engine, processes
from bench.config import TrialConfig, UserError
from bench.place import Options, Share, share_out
from bench.trial import run_trial
from bench.worker import ElsewhereError, Running, WorkerLostError
from engine_script import Script

HERE = Path(__file__).parent


def lost(_: TrialConfig, report: Any) -> None:
    report(1, {"val_acc": 0.5})
    raise WorkerLostError("one of two is gone")


def failed_elsewhere(*_: Any) -> None:
    raise ElsewhereError({"result": {"status": "failed"}, "where": "there", "traceback": "the whole story"})


def running(trial: str) -> Running:
    config = TrialConfig(rule="backprop").to_dict()
    return Running({"trial": f"test_distributed:{trial}", "config": config, "options": {}})


def test_a_worker_that_lost_another_is_lost_itself() -> None:
    trial = running("lost")
    assert trial.next_message()["epoch"] == 1
    with pytest.raises(WorkerLostError, match="one of two is gone"):
        trial.next_message()
    trial.stop()


def test_what_failed_in_another_process_is_the_result_as_it_was_there() -> None:
    trial = running("failed_elsewhere")
    assert trial.next_message() == {"result": {"status": "failed"}, "where": "there", "traceback": "the whole story"}
    trial.stop()


def test_workers_share_what_a_trial_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.place.usable_cores", lambda: 8.0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)

    def share(device: str, **options: Any) -> Share:
        return share_out(Options(**options), device)

    cores = [share("cpu", workers_per_trial=w) for w in (1, 2, 3, 16)]
    assert [(s.concurrent, s.threads) for s in cores] == [(8, 1), (4, 1), (2, 1), (1, 1)]
    assert share("cpu", concurrent=1, workers_per_trial=2).threads == 4
    pairs = share("cuda", workers_per_trial=2)
    assert (pairs.concurrent, pairs.gpus, pairs.threads) == (2, 2.0, 2)
    assert share("cuda", concurrent=4, workers_per_trial=2).gpus == 1.0  # half a GPU for each worker
    assert share("cuda", gpus_per_trial=1.0, workers_per_trial=2).concurrent == 4
    assert share("cuda", address="127.0.0.1:1", workers_per_trial=2).gpus == 2.0


def config(**changes: Any) -> TrialConfig:
    base = {"rule": "activation", "arch": "resnet20", "coefficients": {"amp": 0.2, "sparse": 0.2}, "epochs": 3}
    more = {"scaling": "normalized", "centered": True, "batch_size": 33, "train_examples": 99, "lr": 0.05}
    return TrialConfig.from_dict({**base, **more, **changes})


@pytest.mark.faults
def test_a_team_runs_one_after_the_other_and_survives_the_end_of_a_member(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by the source; killed (-9) after its second epoch; failed, by a bug in one of the two."""
    monkeypatch.syspath_prepend(str(HERE))

    def task(uid: str, settings: TrialConfig, **options: Any) -> engine.Task:
        options |= {"checkpoint": str(tmp_path / f"{uid}.pt"), "threads": 1, "device": "cpu"}
        return engine.Task(uid=uid, config=settings, options=options)

    seconds: dict[str, list[float]] = {}

    class Open(Script):
        def reported(self, uid: str, epoch: int, metrics: Any) -> bool:
            seconds.setdefault(uid, []).append(metrics["seconds"])
            return super().reported(uid, epoch, {"val_acc": metrics["val_acc"]})

    tasks = [
        task("stopped", config()),
        task("killed", config(), act="die", member=1, epoch=2),
        task("wrong", config(), act="raise", member=1, epoch=1),
        task("after", config(rule="sign", coefficients={}, scaling="reference", centered=False)),
    ]
    script, said = Open(tasks, stop={"stopped": 1}), list[str]()
    before = processes.own_children()
    outcome = engine.run(
        script,
        trial="fake_trials:act_together",
        concurrent=1,
        cpus_per_trial=1,
        workers_per_trial=2,
        log=tmp_path / "ray.log",
        say=said.append,
    )
    assert outcome == "done"
    assert processes.own_children() == before
    results = script.results
    assert {uid: r.status for uid, r in results.items()} == {
        "stopped": "stopped",
        "killed": "finished",
        "wrong": "failed",
        "after": "finished",
    }
    assert [line.partition(" (")[0] for line in said] == ["killed: lost its worker process"]
    assert "(one of the 2 that trained it together is gone: " in said[0]
    assert (tmp_path / "killed.pt.died").exists()
    assert (results["wrong"].reason or "").startswith("ZeroDivisionError: in one of them (fake_trials.py")
    assert script.epochs_of("killed") == [1, 2, 1, 2, 3]  # what was known is reported again,
    assert seconds["killed"][:2] == seconds["killed"][2:4]  # and was not trained again
    for uid in ("killed", "after"):
        one = run_trial(results[uid].config, threads=1, device="cpu")
        assert results[uid].provenance["workers"] == 2
        assert results[uid].metrics["val_acc"] == one.metrics["val_acc"]
        assert results[uid].metrics["val_loss"] == pytest.approx(one.metrics["val_loss"], rel=1e-5)
        assert [h["train_loss"] for h in results[uid].history] == pytest.approx(
            [h["train_loss"] for h in one.history], rel=1e-5
        )


SEARCH = [
    *("--rule", "symmetric", "--arch", "lenet", "--trials", "1", "--concurrent", "1", "--confirm-seeds", "1"),
    *("--set", "train_examples=66", "--set", "batch_size=33", "--device", "cpu", "--json"),
]


def search(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "bench.cli", "search", *SEARCH, *arguments]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    files = (folder / "results").glob("*/rows.jsonl")
    found = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    return {row["uid"]: row for row in found}


@pytest.mark.faults
def test_a_search_of_two_workers_finds_what_one_of_one_finds(tmp_path: Path) -> None:
    for workers in ("1", "2"):
        process = search(tmp_path / workers, "--epochs", "2", "--workers-per-trial", workers)
        _, err = process.communicate(timeout=900)
        assert process.returncode == 0, err
    one, two = rows(tmp_path / "1"), rows(tmp_path / "2")
    assert len(one) == 4  # a trial, its confirmation, two controls
    assert one.keys() == two.keys()
    for uid, row in one.items():
        assert two[uid]["config"] == row["config"]
        assert two[uid]["provenance"]["workers"] == 2
        assert two[uid]["metrics"]["val_acc"] == row["metrics"]["val_acc"]
        assert two[uid]["metrics"]["val_loss"] == pytest.approx(row["metrics"]["val_loss"], rel=1e-5)
    assert {path.name for path in (tmp_path / "2").iterdir()} == {"results"}
    names = [{path.name for path in (tmp_path / w / "results").rglob("*")} for w in ("1", "2")]
    assert {n for n in names[1] - names[0] if "-" not in n and len(n) < 32} == set()  # (MLflow's have random names)


@pytest.mark.faults
def test_interrupted_it_leaves_no_process(tmp_path: Path) -> None:
    import psutil

    process = search(tmp_path, "--epochs", "500", "--workers-per-trial", "2")
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob("results/*/checkpoints/*.pt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    titles = [" ".join(p.cmdline()) for p in family]
    assert sum("RayTrainWorker" in title for title in titles) == 2
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.slow
def test_what_several_workers_cannot_train_alike_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    process = search(tmp_path, "--epochs", "1", "--workers-per-trial", "34")
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (2, "")
    with pytest.raises(UserError, match="34 workers cannot share a batch of 33 examples"):
        raise UserError(err)
    assert rows(tmp_path) == {}
