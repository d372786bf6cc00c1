"""The bookkeeping between a source and the workers, and the inside of a worker; without Ray."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bench
from bench.config import TrialResult, UserError
from bench.director import ALIKE_FAILURES, MAX_LOSSES, WAIT, Director, RepeatedError, Source, Task
from bench.provenance import source_digest
from bench.worker import Running
from engine_script import Script, config, task

HERE = Path(__file__).parent


@pytest.fixture
def direct(tmp_path: Path) -> Callable[..., Director]:
    def made(source: Source, *, interrupted: Callable[[], bool] = lambda: False, **changes: Any) -> Director:
        settings: dict[str, Any] = {"trial": "m:f", "room": lambda: 2, "tick": None, **changes}
        return Director(source, log=tmp_path / "ray.log", say=print, interrupted=interrupted, **settings)

    return made


def success() -> dict[str, Any]:
    result = TrialResult(config=config(), status="finished")
    return {"result": result.to_dict(), "where": "", "traceback": "", "blame": ""}


def failure(where: str, reason: str = "ValueError: no", *, blame: str = "") -> dict[str, Any]:
    failed = TrialResult(config=config(), status="failed", reason=reason)
    return {"result": failed.to_dict(), "where": where, "traceback": "Traceback: ...", "blame": blame}


def test_director_keeps_to_the_concurrency_and_knows_waiting_from_the_end(direct: Callable[..., Director]) -> None:
    director = direct(Script([task("a"), WAIT, task("b"), task("c")]))
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
    assert isinstance(director.fault, RepeatedError)
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
        return Running(content)

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


def test_a_worker_knows_the_code_that_it_began_with(tmp_path: Path) -> None:
    """A real process, with a package of its own that is edited while it works."""
    package = tmp_path / "bench"
    shutil.copytree(Path(bench.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    script = """
import json, pathlib, sys
from bench.worker import Running
Running(json.loads(sys.argv[1]))
with pathlib.Path("bench/models.py").open("a") as file:
    file.write("# edited")
from bench.provenance import provenance
print(provenance("cpu")["source"])
"""
    before = source_digest(package)
    command = [sys.executable, "-c", script, json.dumps({"trial": "m:f", "config": config().to_dict(), "options": {}})]
    clean = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=clean, timeout=60, check=True)
    assert done.stdout.strip() == before
    source_digest.cache_clear()
    assert source_digest(package) != before
    source_digest.cache_clear()


def test_a_worker_with_other_code_than_the_driver_ends_the_run_and_files_nothing(
    direct: Callable[..., Director], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    script = Script([Task(uid=uid, config=config(), options={"act": "train"}) for uid in "ab"])
    director = direct(script, trial="fake_trials:act", room=lambda: 1)
    given = director.suggest("1")
    assert given is not None
    alike = Running(given)
    assert alike.next_message()["epoch"] == 1
    alike.stop()
    edited = Running({**given, "source": "0" * 16})
    director.started("1")
    director.returned("1", edited.next_message())
    assert isinstance(director.fault, UserError)
    assert "the code of bench changed during this run; the same command goes on" in str(director.fault)
    assert script.results == {}


def test_missing_trial_function_is_a_result_too() -> None:
    running = Running({"trial": "no.such:thing", "config": config().to_dict(), "options": {}})
    assert running.next_message()["result"]["reason"].startswith("ModuleNotFoundError: No module named 'no'")


def test_room_may_grow_and_shrink(direct: Callable[..., Director]) -> None:
    room = [1]
    director = direct(Script([task(str(i)) for i in range(5)]), room=lambda: room[0])
    assert director.suggest("1") is not None
    assert director.suggest("2") is None
    room[0] = 3  # a new node
    assert director.suggest("2") is not None
    assert director.suggest("3") is not None
    room[0] = 1  # two are lost
    director.returned("1", success())
    director.returned("2", success())
    assert director.suggest("4") is None
    director.returned("3", success())
    assert director.suggest("4") is not None


def test_gpu_memory_that_is_too_small_for_all_lowers_how_many_there_are(
    direct: Callable[..., Director], capsys: pytest.CaptureFixture[str]
) -> None:
    script = Script([task(uid) for uid in "abcd"])
    director = direct(script, room=lambda: 3, shares_gpus=True)
    for trial in "123":
        director.suggest(trial)
        director.started(trial)
    full = failure("OutOfMemoryError layers.py:1", "OutOfMemoryError: CUDA out of memory", blame="GPU memory")
    director.returned("2", full)  # b
    assert script.results == {}
    assert capsys.readouterr().out == (
        "b: out of GPU memory beside others; from now on 2 trials at a time, and it is begun again.\n"
    )
    assert director.suggest("4") is None  # two are enough
    director.returned("1", success())
    assert director.suggest("4") is not None  # b again
    director.returned("4", full)
    assert "b: out of GPU memory beside others; from now on 1 trial at a time" in capsys.readouterr().out
    director.returned("3", success())
    assert director.suggest("5") is not None
    assert director.suggest("6") is None
    for trial in "567":  # alone: it is begun again twice, for others use the GPU too; and then it is too large
        assert "b" not in script.results
        director.returned(trial, full)
        assert director.suggest(str(int(trial) + 1)) is not None
        assert director.suggest("9") is None
    assert {uid: result.status for uid, result in script.results.items()} == {
        "a": "finished",
        "c": "finished",
        "b": "failed",
    }
    assert script.results["b"].reason == "ran out of GPU memory 3 times (OutOfMemoryError: CUDA out of memory)"
    assert [event for event in script.events if event == ("started", "b")] == [("started", "b")]
    assert [live.task.uid for live in director.live.values()] == ["d"]


def test_gpu_memory_that_is_too_small_for_one_trial_alone_takes_no_place_from_others(
    direct: Callable[..., Director], capsys: pytest.CaptureFixture[str]
) -> None:
    """Where each has a GPU of its own, fewer at a time leave a GPU idle, and this trial no more memory than before."""
    script = Script([task(uid) for uid in "abc"])
    director = direct(script)
    for trial in "12":
        director.suggest(trial)
        director.started(trial)
    for trial in "235":
        director.returned(trial, failure("layers.py:1", "OutOfMemoryError: CUDA out of memory", blame="GPU memory"))
        assert director.suggest(str(int(trial) + 1 + (trial == "3"))) is not None
        assert len(director.live) == 2
    assert capsys.readouterr().out.count("b: ran out of GPU memory (OutOfMemoryError: CUDA out of memory)") == 2
    assert {uid: result.status for uid, result in script.results.items()} == {"b": "failed"}


@pytest.mark.parametrize("blame", ["memory", "GPU memory"])
def test_three_trials_that_run_out_of_memory_end_the_run_whatever_they_asked_for(
    direct: Callable[..., Director], blame: str
) -> None:
    script = Script([task(str(i)) for i in range(ALIKE_FAILURES + 1)])
    director = direct(script, room=lambda: 1)
    for attempt in range(ALIKE_FAILURES * (MAX_LOSSES + 1)):
        assert director.fault is None
        assert director.suggest(str(attempt)) is not None
        director.started(str(attempt))
        director.returned(str(attempt), failure("a.py:1", f"Tried to allocate {attempt}.00 GiB.", blame=blame))
    assert isinstance(director.fault, RepeatedError)
    assert f"failed alike: ran out of {blame} 3 times (Tried to allocate 8.00 GiB.)" in str(director.fault)
    assert len(script.results) == ALIKE_FAILURES


def test_a_worker_that_is_lost_before_it_begins_costs_its_trial_alone(direct: Callable[..., Director]) -> None:
    """Tune says that a trial starts when its worker stands: one that dies before then never began."""
    script = Script([task("a"), task("b")])
    director = direct(script, room=lambda: 1)
    for attempt in "012":
        director.suggest(attempt)
        director.lost(attempt, "killed")
    assert director.fault is None
    assert script.events == [("started", "a"), ("completed", "a")]
    director.suggest("3")
    director.started("3")
    director.returned("3", success())
    assert script.results["b"].status == "finished"


def test_an_exception_with_half_of_a_character_is_a_result_and_its_traceback_is_kept(
    work: Callable[..., Running], direct: Callable[..., Director], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a file's name has it that is no UTF-8."""

    def fail(config: Any, report: Any, **_: Any) -> None:  # noqa: ARG001
        raise ValueError(f"no data in {os.fsdecode(b'caf' + bytes([0xE9]))}")

    monkeypatch.setattr("fake_trials.act", fail)
    script = Script([task("a")])
    director = direct(script)
    director.suggest("1")
    director.started("1")
    director.returned("1", json.loads(json.dumps(work().next_message())))
    assert director.fault is None
    assert (script.results["a"].reason or "").startswith(r"ValueError: no data in caf\udce9 (test_director.py")
    assert r"caf\udce9" in (tmp_path / "ray.log").read_text()


def test_lack_of_gpu_memory_is_told_from_other_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    errors: dict[str, BaseException] = {
        "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        "shape": RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        "python": MemoryError(),
    }

    def fail(config: Any, report: Any, *, name: str) -> None:  # noqa: ARG001
        raise errors[name]

    monkeypatch.setattr("fake_trials.fail", fail, raising=False)
    monkeypatch.syspath_prepend(str(HERE))
    found = {}
    for name in errors:
        running = Running({"trial": "fake_trials:fail", "config": config().to_dict(), "options": {"name": name}})
        found[name] = running.next_message()["blame"]
    assert found == {"torch": "GPU memory", "cublas": "GPU memory", "shape": "", "python": "memory"}
