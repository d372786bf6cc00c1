"""The engine: its bookkeeping without Ray, and then real workers that finish, fail, are stopped and are killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from bench import engine, processes
from bench.config import TrialConfig, TrialResult, UserError
from bench.director import ALIKE_FAILURES, Director
from bench.streams import quiet
from bench.worker import Running

EPOCHS = 3
HERE = Path(__file__).parent


def config(value: float = 0.5) -> TrialConfig:
    return TrialConfig(rule="sparse", epochs=EPOCHS, coefficients={"sparse": value})


class Script:
    """A source with a fixed list of tasks, that writes down all that happens."""

    def __init__(self, tasks: list[engine.Task | engine.Wait], stop: Mapping[str, int] | None = None) -> None:
        self.tasks, self.stop = list(tasks), stop or {}
        self.events: list[tuple[str, ...]] = []
        self.results: dict[str, TrialResult] = {}
        self.live: set[str] = set()
        self.most = 0

    def next(self) -> engine.Task | engine.Wait | None:
        return self.tasks.pop(0) if self.tasks else None

    def started(self, uid: str) -> None:
        self.events.append(("started", uid))
        self.live.add(uid)
        self.most = max(self.most, len(self.live))

    def reported(self, uid: str, epoch: int, metrics: Mapping[str, float]) -> bool:
        assert metrics.keys() == {"val_acc"}
        self.events.append(("reported", uid, str(epoch)))
        return self.stop.get(uid) == epoch

    def completed(self, uid: str, result: TrialResult) -> None:
        self.events.append(("completed", uid))
        self.live.discard(uid)
        assert uid not in self.results
        self.results[uid] = result

    def epochs_of(self, uid: str) -> list[int]:
        return [int(e[2]) for e in self.events if e[:2] == ("reported", uid)]


def task(uid: str, **options: Any) -> engine.Task:
    return engine.Task(uid=uid, config=config(), options=options)


# --- bookkeeping, without Ray ------------------------------------------------------------------------------


@pytest.fixture
def direct(tmp_path: Path) -> Callable[..., Director]:
    def made(source: engine.Source, *, interrupted: Callable[[], bool] = lambda: False, **changes: Any) -> Director:
        settings: dict[str, Any] = {"trial": "m:f", "concurrent": 2, "tick": None, **changes}
        return Director(source, log=tmp_path / "ray.log", say=print, interrupted=interrupted, **settings)

    return made


def success() -> dict[str, Any]:
    return {"result": TrialResult(config=config(), status="finished").to_dict(), "where": "", "traceback": ""}


def failure(where: str, reason: str = "ValueError: no") -> dict[str, Any]:
    failed = TrialResult(config=config(), status="failed", reason=reason)
    return {"result": failed.to_dict(), "where": where, "traceback": "Traceback: ..."}


def test_director_keeps_to_the_concurrency_and_knows_waiting_from_the_end(direct: Callable[..., Director]) -> None:
    director = direct(Script([task("a"), engine.WAIT, task("b"), task("c")]))
    assert director.suggest("1") is not None
    assert director.suggest("2") is None  # the source said WAIT
    assert director.suggest("2") is not None
    assert director.suggest("3") is None
    assert len(director.live) == 2
    director.returned("1", success())
    assert director.suggest("3") is not None
    assert (director.suggest("4"), director.exhausted) == (None, False)  # both places are taken: not even asked
    director.returned("2", success())
    assert (director.suggest("4"), director.exhausted, director.over) == (None, True, False)
    director.returned("3", success())
    assert director.over


def test_lost_worker_is_replaced_twice(direct: Callable[..., Director]) -> None:
    script = Script([task("a")])
    director = direct(script)
    first = director.suggest("1")
    director.started("1")
    director.reported("1", 1, {"val_acc": 0.1})
    for attempt in ("1", "2"):
        director.lost(attempt, "killed")
        assert not director.over
        assert director.suggest(str(int(attempt) + 1)) == first
        director.started(str(int(attempt) + 1))
    assert script.results == {}
    director.lost("3", "killed")
    director.lost("3", "told twice")
    assert script.events == [("started", "a"), ("reported", "a", "1"), ("completed", "a")]
    assert script.results["a"].reason == "lost its worker process 3 times (killed)"
    assert director.suggest("4") is None
    assert director.over


def test_alike_failures_end_the_run_and_others_do_not(direct: Callable[..., Director], tmp_path: Path) -> None:
    script = Script([task(str(i)) for i in range(12)], stop={"3": 1})
    director = direct(script)
    places = ["a.py:1", "a.py:1", "", "stop", "a.py:1", "a.py:1", "b.py:2", "a.py:1", "a.py:1", "a.py:1"]
    for number, place in enumerate(places):
        assert director.fault is None
        director.suggest(str(number))
        if place == "stop":
            assert director.reported(str(number), 1, {"val_acc": 0.1})
        else:
            director.returned(str(number), failure(place, f"ValueError: {number}") if place else success())
    assert isinstance(director.fault, engine.RepeatedError)
    assert re.search(rf"{ALIKE_FAILURES} trials in a row failed alike: ValueError: 9", str(director.fault))
    assert director.stopping
    assert len(script.results) == len(places)
    assert (tmp_path / "ray.log").read_text().count("Traceback") == len(places) - 2


def test_fault_of_the_source_is_kept_and_the_source_left_in_peace(direct: Callable[..., Director]) -> None:
    class Faulty(Script):
        def reported(self, *_: object) -> bool:
            raise OSError("disk full")

    script = Faulty([task("a"), task("b")])
    director = direct(script)
    director.suggest("1")
    assert not director.reported("1", 1, {"val_acc": 0.1})
    assert isinstance(director.fault, OSError)
    director.returned("1", failure(""))
    assert director.suggest("2") is None
    assert (script.events, script.results) == ([], {})


def test_after_an_interruption_nothing_is_completed(direct: Callable[..., Director]) -> None:
    flag = threading.Event()
    script = Script([task("a")])
    director = direct(script, interrupted=flag.is_set)
    director.suggest("1")
    flag.set()
    director.returned("1", success())
    assert script.results == {}


def test_tick_and_its_fault(direct: Callable[..., Director]) -> None:
    director = direct(Script([]), tick=lambda: 1 / 0)
    director.beat()
    assert isinstance(director.fault, ZeroDivisionError)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Running]:
    monkeypatch.syspath_prepend(str(HERE))

    def made(**options: Any) -> Running:
        content = {"trial": "fake_trials:act", "config": config().to_dict(), "options": options}
        return Running(json.dumps(content))

    return made


def test_worker_stands_still_until_it_is_answered(work: Callable[..., Running], tmp_path: Path) -> None:
    checkpoint = tmp_path / "epochs"
    running = work(checkpoint=str(checkpoint))
    assert running.next_message()["epoch"] == 1
    time.sleep(0.05)
    assert checkpoint.read_text() == "1"
    assert running.next_message()["epoch"] == 2
    running.stop()
    assert checkpoint.read_text() == "2"


def test_worker_that_is_dropped_before_its_first_step_trains_nothing(
    work: Callable[..., Running], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "epochs"
    running = work(checkpoint=str(checkpoint))
    time.sleep(0.05)
    running.stop()
    assert not checkpoint.exists()


@pytest.mark.parametrize(
    ("act", "reason", "where"),
    [
        (
            "raise",
            r"^ValueError: no such coefficient in any table \(fake_trials.py:\d+, raise ValueError\(.*\)$",
            "Val",
        ),
        ("exit", r"^SystemExit: 3 \(fake_trials.py:\d+, raise SystemExit\(3\)\)$", "SystemExit fake_trials.py"),
        ("nonsense", r"^TypeError: fake_trials:act returned int, not TrialResult", "TypeError worker.py"),
    ],
)
def test_exception_is_a_result(work: Callable[..., Running], act: str, reason: str, where: str) -> None:
    message = work(act=act).next_message()
    result = TrialResult.from_dict(message["result"])
    assert (result.status, result.config) == ("failed", config())
    assert re.search(reason, result.reason or "")
    assert message["where"].startswith(where)
    assert message["traceback"].startswith("Traceback (most recent call last)")


def test_missing_trial_function_is_a_result_too() -> None:
    running = Running(json.dumps({"trial": "no.such:thing", "config": config().to_dict(), "options": {}}))
    assert running.next_message()["result"]["reason"].startswith("ModuleNotFoundError: No module named 'no'")


# --- what is borrowed from the operating system --------------------------------------------------------------


def test_quiet_catches_child_processes_and_gives_the_terminal_back(tmp_path: Path) -> None:
    code = """
import subprocess, sys
from pathlib import Path
from bench.streams import quiet
print("before")
with quiet(Path(sys.argv[1])) as (out, err):
    print("noise")
    subprocess.run(["sh", "-c", "echo child; echo moan >&2"])
    out.write("shown\\n")
    err.write("warned\\n")
    with quiet(Path(sys.argv[1])) as (inner, _):
        inner.write("inner\\n")
print("after")
"""
    log = tmp_path / "new" / "ray.log"
    done = subprocess.run([sys.executable, "-c", code, str(log)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("before\nshown\nafter\n", "warned\n")
    assert sorted(log.read_text().split()) == ["child", "inner", "moan", "noise"]


def test_quiet_says_that_a_log_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose a writable folder"), quiet(tmp_path):
        pass


def test_interrupts_come_once_and_handlers_come_back() -> None:
    seen: list[int] = []
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    mine = signal.getsignal(signal.SIGTERM)
    try:
        with processes.Interrupts() as interrupts:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as ray.init does
            interrupts.arm()
            assert not interrupts.raised
            signal.raise_signal(signal.SIGTERM)
            assert (interrupts.raised, seen) == (True, [])
            signal.raise_signal(signal.SIGTERM)
            assert seen == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_scratch_folder_is_removed_and_so_are_abandoned_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(f"/tmp/b{os.getpid()}")  # pytest's own folders have too long a path for a socket
    monkeypatch.setattr("tempfile.tempdir", str(root))
    root.mkdir()
    try:
        for name in ("bench-dead", "bench-newborn", "other"):
            (root / name).mkdir()
            (root / name / "owner").touch()
        for name in ("bench-dead", "other"):
            os.utime(root / name / "owner", (0, 0))
        (root / "bench-dead" / "session" / "logs").mkdir(parents=True)
        (root / "bench-dead" / "latest").symlink_to(root / "bench-dead" / "session")
        with processes.scratch_folder() as folder:
            os.utime(folder / "owner", (0, 0))
            assert {p.name for p in root.iterdir()} == {"bench-newborn", "other", folder.name}
            with processes.scratch_folder():
                assert folder.exists()  # its owner lives
        assert {p.name for p in root.iterdir()} == {"bench-newborn", "other"}
    finally:
        subprocess.run(["rm", "-r", str(root)], check=True)


def test_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_A", "1")
    with processes.environment({"BENCH_A": "2", "BENCH_B": "3"}):
        assert (os.environ["BENCH_A"], os.environ["BENCH_B"]) == ("2", "3")
    assert os.environ["BENCH_A"] == "1"
    assert "BENCH_B" not in os.environ


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
    engine._check_gpus(concurrent, share)
    with pytest.raises(UserError, match=f"Ray finds {whole}; run fewer at a time"):
        engine._check_gpus(concurrent + 1, share)


def test_cause_is_the_last_error_in_one_line() -> None:
    first = "Failure # 1 (occurred at 2026-01-01)\nThe actor died unexpectedly.\n\tpid: 1\n"
    second = "Failure # 2 (occurred at 2026-01-01)\n\x1b[36mray::W.train()\x1b[39m\n  File ...\nImportError: no torch\n"
    assert engine._cause(first) == "The actor died unexpectedly."
    assert engine._cause(first + second) == "ImportError: no torch"
    assert engine._cause("") == "no reason given"


# --- real workers ------------------------------------------------------------------------------------------


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


@pytest.mark.slow
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
