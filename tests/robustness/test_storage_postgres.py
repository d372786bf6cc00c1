"""A study on a real PostgreSQL server: its driver is killed at random moments, and the server, too."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import optuna
import pytest
from optuna.distributions import FloatDistribution

from bench.config import StudyConfig, TrialConfig, TrialResult, UserError
from bench.study import Study
from mlflow_book import Book
from postgres import PASSWORD, Server, server
from rehearsal import rows

HERE = Path(__file__).parents[1]
SPACE = {"sparse": FloatDistribution(1e-4, 10.0, log=True), "amp": FloatDistribution(0.0, 1.0)}


@pytest.fixture(scope="module")
def postgres() -> Iterator[Server]:
    with server() as made:
        yield made


class Driver:
    """`storage_driver.py`, begun again as often as it is killed. ``killed``: how often."""

    def __init__(self, folder: Path, url: str, trials: int, seconds: float) -> None:
        self._log = folder / "driver.log"
        self._arguments = [str(folder), url, str(trials), str(seconds)]
        self.killed = 0
        self.begin()

    def begin(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "storage_driver.py"), *self._arguments],
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join((str(HERE.parent), str(HERE)))},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.killed += 1

    def said(self) -> str:
        return self._log.read_text()

    def completed(self) -> int:
        return self.said().count("completed ")

    def end(self) -> None:
        assert self.process.wait(timeout=300) == 0, self.said()
        assert self.said().splitlines()[-2:] == ["complete True", "ended FINISHED"]


def trials_of(url: str) -> list[optuna.trial.FrozenTrial]:
    kept = optuna.storages.RDBStorage(url)
    try:
        found = optuna.load_study(study_name="s", storage=kept).trials
        optuna.delete_study(study_name="s", storage=kept)  # the next test has one of this name
    finally:
        kept.remove_session()
        kept.engine.dispose()
    return list(found)


def check_whole(folder: Path, url: str, trials: int) -> None:
    """Exactly so many trials, each proposed, run and filed once; confirmed and compared once; nothing left behind."""
    known = trials_of(url)
    assert [t.number for t in known] == list(range(trials))
    assert {t.state.name for t in known} <= {"COMPLETE", "PRUNED"}
    assert len({str(t.params) for t in known}) == trials
    filed = rows(folder / "s" / "rows.jsonl") + rows(folder / "controls" / "rows.jsonl")
    assert max(Counter(r["uid"] for r in filed).values()) == 1
    assert Counter(r["kind"] for r in filed) == {"search": trials, "confirm": 2, "control": 4}
    said = {r["uid"]: r["metrics"]["val_acc"] for r in filed if r["kind"] == "search"}
    assert {t.user_attrs["uid"]: t.value for t in known} == said
    best = max((r for r in filed if r["kind"] == "search" and r["status"] == "finished"), key=lambda r: said[r["uid"]])
    confirmed = [r["config"]["coefficients"] for r in filed if r["kind"] == "confirm"]
    assert confirmed == [best["config"]["coefficients"]] * 2
    assert list((folder / "s" / "checkpoints").iterdir()) == []


@pytest.mark.faults
def test_killed_at_random_moments_it_loses_and_doubles_nothing(tmp_path: Path, postgres: Server) -> None:
    trials, moments = 24, random.Random(0)
    with Driver(tmp_path, postgres.url, trials, 0.1) as driver:
        while driver.killed < 8 and driver.completed() < trials - 2:
            time.sleep(moments.uniform(2.0, 8.0))
            driver.kill()
            driver.begin()
        assert driver.killed >= 3
        driver.end()
    check_whole(tmp_path, postgres.url, trials)


@pytest.mark.faults
def test_a_server_that_crashes_and_comes_back_costs_nothing(tmp_path: Path, postgres: Server) -> None:
    trials = 12
    with Driver(tmp_path, postgres.url, trials, 0.5) as driver:
        for mode, wanted in (("immediate", 3), ("fast", 7)):
            wait_until(lambda wanted=wanted: driver.completed() >= wanted, driver.process)  # type: ignore[misc]
            postgres.stop(mode)
            time.sleep(3)
            postgres.start()
        driver.end()
        said = driver.said()
    check_whole(tmp_path, postgres.url, trials)
    away = [part.partition("answers again")[0] for part in said.split("does not answer")[1:]]
    assert any("completed" in part for part in away)  # what ran went on
    assert "answers again" in said
    assert PASSWORD not in said


@pytest.mark.slow
def test_one_driver_finds_there_what_it_finds_with_a_journal(tmp_path: Path, postgres: Server) -> None:
    found = []
    for folder, url in (("journal", None), ("server", postgres.url)):
        config = StudyConfig(
            name="same", rule="activation", arch="lenet", dataset="digits", trials=10, epochs=9, sampler="tpe"
        )
        with Study.open(tmp_path / folder, config, SPACE, say=print, chance=0.1, url=url) as study:
            while (proposal := study.ask()) is not None:
                value = 0.9 - abs(proposal.params["amp"] - 0.3)
                stopped = any(study.report(proposal.uid, epoch, value * epoch / 9) for epoch in (3, 9))
                metrics = {"val_acc": value}
                result = TrialResult(
                    config=TrialConfig(rule="activation"), status="stopped" if stopped else "finished", metrics=metrics
                )
                study.tell(proposal.uid, result)
            known = study._known
            found.append([(t.number, t.state, t.params, t.values, t.intermediate_values) for t in known])
    assert found[0] == found[1]
    assert len(found[0]) == 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (PASSWORD, "password authentication failed"),
        ("/postgres", 'database "nowhere" does not exist'),
    ],
)
def test_a_server_that_refuses_is_one_line_without_the_password(
    tmp_path: Path, postgres: Server, wrong: str, words: str
) -> None:
    url = postgres.url.replace(wrong, "/nowhere" if wrong.startswith("/") else "mistyped")
    config = StudyConfig(name="s", rule="activation", arch="lenet", dataset="digits")
    with pytest.raises(UserError, match=words) as raised:
        Study.open(tmp_path / "s", config, SPACE, say=print, chance=0.1, url=url)
    said = str(raised.value)
    assert "\n" not in said
    assert PASSWORD not in said
    assert "mistyped" not in said
    assert "does not answer" in said
    assert list((tmp_path / "s").glob("*.yaml")) == []


class Command:
    """`bench search` as a user runs it: real Ray, training and MLflow."""

    OPTIONS = (
        *("--rule", "mirror", "--arch", "lenet", "--trials", "8", "--epochs", "4", "--confirm-seeds", "1"),
        *("--concurrent", "1", "--scheduler", "none", "--sampler", "random", "--json"),
        *("--set", "train_examples=64", "--set", "batch_size=32", "--set", "augment=false"),
    )

    def __init__(self, folder: Path, url: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.cli", "search", *self.OPTIONS, "--storage", url],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def end(self) -> tuple[dict[str, Any], str]:
        out, err = self.process.communicate(timeout=600)
        assert self.process.returncode == 0, err
        return json.loads(out), err


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own, in the client that this test reads with
def test_a_second_command_is_refused_and_after_a_kill_goes_on_and_mlflow_agrees(
    tmp_path: Path, postgres: Server
) -> None:
    name = "mirror-lenet-digits"
    book = tmp_path / "results" / name
    with Command(tmp_path, postgres.url) as first:
        wait_until(lambda: len(rows(book / "rows.jsonl")) >= 2, first.process)
        first.process.send_signal(signal.SIGSTOP)  # it holds the study, and cannot end before it is killed
        with Command(tmp_path, postgres.url) as refused:
            _, said = refused.process.communicate(timeout=120)
            assert refused.process.returncode == 2
            assert f"study '{name}' in results is being run by another process ({first.process.pid} on " in said
        first.process.kill()
        _, before = first.process.communicate()
    with Command(tmp_path, postgres.url) as second:
        found, after = second.end()
    assert found["outcome"] == "done"
    assert sum(found["trials"].values()) == 8
    assert PASSWORD not in (book / "storage.yaml").read_text() + before + said + after
    uids = [r["uid"] for r in rows(book / "rows.jsonl")]
    assert len(uids) == len(set(uids)) == 9
    recorded = Book(tmp_path / "results")
    assert recorded.parent(name).info.status == "FINISHED"
    children = recorded.children(name)  # a uid stands once
    assert set(children) == {*uids, *(r["uid"] for r in rows(tmp_path / "results" / "controls" / "rows.jsonl"))}
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    with Command(tmp_path, postgres.url) as third:
        again, _ = third.end()
    assert again["outcome"] == "known"
    assert again["confirmed"] == found["confirmed"]


def wait_until(true: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 400  # a busy machine is slow, not wrong
    while not true():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
