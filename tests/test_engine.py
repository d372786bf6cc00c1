"""The engine with real workers, that finish, fail, are stopped and are killed; and drivers that are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench import engine, processes
from bench.cluster import check_gpus
from bench.config import UserError
from bench.director import ALIKE_FAILURES
from engine_script import Script, config, task

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "wrong", [{"concurrent": 0}, {"cpus_per_trial": 0.0}, {"gpus_per_trial": -1.0}], ids=lambda w: next(iter(w))
)
def test_impossible_shares_are_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"concurrent": 1, "cpus_per_trial": 1.0, **wrong}
    with pytest.raises(UserError, match=next(iter(wrong))):
        engine.run(Script([]), log=tmp_path / "ray.log", say=print, **settings)


@pytest.mark.parametrize(("concurrent", "share"), [(2, 1.0), (7, 1 / 7), (3, 2 / 3)])
def test_gpus_are_counted_before_trials_wait_for_them(
    concurrent: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = round(concurrent * share)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0, "GPU": float(whole)})
    check_gpus(concurrent, share)
    with pytest.raises(UserError, match=f"Ray finds {whole}; run fewer at a time"):
        check_gpus(concurrent + 1, share)


def test_cause_is_the_last_error_in_one_line() -> None:
    first = "Failure # 1 (occurred at 2026-01-01)\nThe actor died unexpectedly.\n\tpid: 1\n"
    second = "Failure # 2 (occurred at 2026-01-01)\n\x1b[36mray::W.train()\x1b[39m\n  File ...\nImportError: no torch\n"
    assert engine._cause(first) == "The actor died unexpectedly."
    assert engine._cause(first + second) == "ImportError: no torch"
    assert engine._cause("") == "no reason given"


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> tuple[Script, list[str], Path, int]:
    """One run in which everything happens; looked at by the tests below."""
    folder = tmp_path_factory.mktemp("engine")
    said: list[str] = []
    ticks: list[float] = []

    def made(uid: str, **options: Any) -> engine.Task:
        (folder / uid).mkdir()
        return task(uid, checkpoint=str(folder / uid / "epochs"), **options)

    tasks = [
        made("plain"),
        made("slow", seconds=0.2),
        task("bug", act="raise"),
        made("unlucky", deaths=1),
        made("stopped"),
        task("nonsense", act="nonsense"),
        made("doomed", deaths=9),
        *(made(f"more-{i}") for i in range(6)),
    ]
    script = Script(tasks, stop={"stopped": 2})
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    variables = dict(os.environ)
    before = processes.own_children()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        patch.chdir(folder)
        outcome = engine.run(
            script,
            trial="fake_trials:act",
            concurrent=2,
            cpus_per_trial=2.5,  # together more than most laptops have: that is the user's business
            log=folder / "ray.log",
            say=said.append,
            tick=lambda: ticks.append(time.monotonic()),
        )
    assert outcome == "done"
    assert processes.own_children() == before
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers
    assert {k for k in variables | dict(os.environ) if variables.get(k) != os.environ.get(k)} == set()
    return script, said, folder, len(ticks)


@pytest.mark.slow
def test_every_task_is_started_and_completed_once(session: tuple[Script, list[str], Path, int]) -> None:
    script, _, _, ticks = session
    counts = Counter(e[:2] for e in script.events if e[0] != "reported")
    assert set(counts.values()) == {1}
    assert len(counts) == 2 * 13
    assert script.most == 2
    assert ticks > len(script.events)
    expected = {"bug": "failed", "nonsense": "failed", "doomed": "failed", "stopped": "stopped"}
    assert {uid: r.status for uid, r in script.results.items()} == {
        uid: expected.get(uid, "finished") for uid in script.results
    }


@pytest.mark.slow
def test_failures_are_recorded_and_not_tried_again(session: tuple[Script, list[str], Path, int]) -> None:
    script, said, folder, _ = session
    assert (script.results["bug"].reason or "").startswith("ValueError: no such coefficient in any table (fake_trials")
    assert not any("bug" in line for line in said)
    assert (folder / "ray.log").read_text().count("ValueError: no such coefficient") == 1


@pytest.mark.slow
def test_lost_worker_goes_on_where_it_was(session: tuple[Script, list[str], Path, int]) -> None:
    script, said, folder, _ = session
    assert script.epochs_of("unlucky") == [1, 2, 3]
    assert script.results["unlucky"].metrics["val_acc"] == script.results["plain"].metrics["val_acc"] == 0.5
    assert sum(line.startswith("unlucky: lost its worker process") for line in said) == 1
    assert script.results["doomed"].reason == (
        "lost its worker process 3 times (The actor died unexpectedly before finishing this task.)"
    )
    assert len(list((folder / "doomed").glob("died-*"))) == 3
    assert (folder / "ray.log").read_text().count("a last word") == 4


@pytest.mark.slow
def test_stopped_trial_ends_there_with_what_it_reported(session: tuple[Script, list[str], Path, int]) -> None:
    script, _, folder, _ = session
    stopped = script.results["stopped"]
    assert script.epochs_of("stopped") == [1, 2]
    assert (folder / "stopped" / "epochs").read_text() == "2"
    assert stopped.config == config()
    assert stopped.metrics == {"val_acc": pytest.approx(1 / 3)}
    assert [h["epoch"] for h in stopped.history] == [1.0, 2.0]
    assert [h["val_acc"] for h in stopped.history] == pytest.approx([1 / 6, 1 / 3])


@pytest.mark.slow
def test_processes_are_used_again_and_are_like_this_one(session: tuple[Script, list[str], Path, int]) -> None:
    script, _, folder, _ = session
    workers = [r.provenance for r in script.results.values() if r.status == "finished"]
    assert len({w["pid"] for w in workers}) < len(workers)
    assert {(w["threads"], w["niceness"], w["folder"]) for w in workers} == {("2", os.nice(0), str(folder))}


class Driver:
    """`engine_driver.py` as a process of its own group, as a terminal starts it."""

    def __init__(self, folder: Path, trials: int) -> None:
        paths = os.pathsep.join(str(p) for p in (HERE.parent, HERE))
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "engine_driver.py"), str(folder), str(trials), "0.4"],
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,
        )
        self.lines: list[str] = []

    def read_until(self, words: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.strip())
            if words in line:
                return
        raise AssertionError(f"no {words!r} in {self.lines}")

    def end(self) -> int:
        assert self.process.stdout is not None
        with self.process.stdout:
            self.lines += [line.strip() for line in self.process.stdout]
        return self.process.wait()


@pytest.mark.faults
def test_killed_and_interrupted_drivers_lose_and_double_nothing(tmp_path: Path) -> None:
    import psutil

    trials = 5
    drivers = [Driver(tmp_path, trials)]
    drivers[0].read_until("reported s-0001 1")
    drivers[0].process.kill()
    assert drivers[0].end() == -signal.SIGKILL

    drivers.append(Driver(tmp_path, trials))
    drivers[1].read_until("completed")
    drivers[1].process.kill()
    assert drivers[1].end() == -signal.SIGKILL

    drivers.append(Driver(tmp_path, trials))
    drivers[2].read_until("reported s-0003")
    family = psutil.Process(drivers[2].process.pid).children(recursive=True)
    os.killpg(drivers[2].process.pid, signal.SIGINT)
    assert drivers[2].end() == 0
    assert drivers[2].lines[-1] == "interrupted"
    assert [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []

    drivers.append(Driver(tmp_path, trials))
    assert drivers[3].end() == 0
    assert drivers[3].lines[-1] == "done"

    lines = [line for d in drivers for line in d.lines]
    completed = Counter(line for line in lines if line.startswith("completed"))
    assert sorted(completed) == [f"completed s-{i:04d} finished" for i in range(trials)]
    assert set(completed.values()) == {1}
    reports = Counter(line for line in lines if line.startswith("reported"))
    assert set(reports.values()) == {1}  # every epoch was saved before it was reported: none is trained twice
    assert (tmp_path / "journal.log").read_text().count('"op_code":4') == trials  # a trial begins once in the journal


@pytest.mark.slow
def test_worker_that_dies_between_trials_and_trials_that_fail_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pausing(Script):
        def next(self) -> engine.Task | engine.Wait | None:
            if not self.tasks[1:] or "late" not in self.results:
                return super().next()
            self.pause = getattr(self, "pause", time.monotonic() + 2)  # the idle worker dies meanwhile
            return super().next() if time.monotonic() > self.pause else engine.WAIT

    monkeypatch.syspath_prepend(str(HERE))
    said: list[str] = []
    script = Pausing([task("late", act="die later"), task("next"), *(task(str(i), act="raise") for i in range(9))])
    before = processes.own_children()
    with pytest.raises(engine.RepeatedError, match="failed alike: ValueError: no such coefficient in any table"):
        engine.run(
            script, trial="fake_trials:act", concurrent=1, cpus_per_trial=1, log=tmp_path / "ray.log", say=said.append
        )
    assert [(uid, r.status) for uid, r in script.results.items()] == [
        ("late", "finished"),
        ("next", "finished"),
        *((str(i), "failed") for i in range(ALIKE_FAILURES)),
    ]
    assert [line.partition(":")[0] for line in said] == ["next"]
    assert script.epochs_of("next") == [1, 2, 3]
    assert processes.own_children() == before
