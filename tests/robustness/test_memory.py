"""Too little memory, for real: the trial is begun again from its checkpoint, twice at most; the search goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import engine
from bench.config import TrialResult
from bench.director import MAX_LOSSES, Director
from bench.worker import Running
from engine_script import Script, config, task

HERE = Path(__file__).parents[1]


@pytest.fixture
def message(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """The last word of a trial that asks for more memory than any machine has."""
    monkeypatch.syspath_prepend(str(HERE))

    def made(**options: Any) -> dict[str, Any]:
        running = Running({"trial": "fake_trials:act", "config": config().to_dict(), "options": options})
        return running.next_message()

    return made


@pytest.mark.parametrize("asked_of", ["python", "numpy", "torch"])
def test_too_little_memory_is_told_from_a_bug(message: Callable[..., dict[str, Any]], asked_of: str) -> None:
    last = message(act="ask too much", asked_of=asked_of)
    assert last["blame"] == "memory"
    assert TrialResult.from_dict(last["result"]).status == "failed"
    assert message(act="raise")["blame"] == ""


def test_a_trial_that_runs_out_of_memory_is_begun_again_twice_and_then_failed_with_its_reason(
    message: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    script, said = Script([task("greedy"), task("next")]), list[str]()
    director = Director(
        script,
        trial="m:f",
        room=lambda: 1,
        log=tmp_path / "ray.log",
        say=said.append,
        tick=None,
        interrupted=lambda: False,
    )
    first = director.suggest("0")
    for attempt in range(MAX_LOSSES):
        director.started(str(attempt))
        director.returned(str(attempt), message(act="ask too much", asked_of="torch"))
        assert script.results == {}
        assert director.suggest(str(attempt + 1)) == first
    director.lost(str(MAX_LOSSES), "killed")
    reason = script.results["greedy"].reason or ""
    assert reason == "ran out of memory 2 times and lost its worker process 1 time (killed)"
    assert [line.split(" (")[0] for line in said] == ["greedy: ran out of memory"] * MAX_LOSSES
    assert "DefaultCPUAllocator: can't allocate memory" in said[0]
    assert director.suggest("next") is not None
    assert director.fault is None


def memory() -> tuple[int, int]:
    """The machine's bytes: used, and all."""
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines()}
    return found["MemTotal"] - found["MemAvailable"], found["MemTotal"]


@pytest.mark.faults
def test_a_worker_that_rays_memory_monitor_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used, total = memory()
    allowed = used + 1_500_000_000  # Ray and an idle worker need half of it
    if allowed > 0.9 * total:
        pytest.skip("less than 1.5 GB of memory are free")
    monkeypatch.setenv("RAY_memory_usage_threshold", str(allowed / total))
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    monkeypatch.syspath_prepend(str(HERE))
    said: list[str] = []
    script = Script([task("hoards", act="hoard", checkpoint=str(tmp_path / "epochs")), task("next")])
    outcome = engine.run(
        script, trial="fake_trials:act", concurrent=1, cpus_per_trial=1, log=tmp_path / "ray.log", say=said.append
    )
    assert outcome == "done"
    assert script.results["hoards"].status == "failed"
    reason = script.results["hoards"].reason or ""
    assert reason.startswith(f"lost its worker process {MAX_LOSSES + 1} times (1 worker(s) were killed due to the node")
    assert "running low on memory" in reason
    assert sum(line.startswith("hoards: lost its worker process") for line in said) == MAX_LOSSES
    assert script.epochs_of("hoards") == [1]  # it went on from its checkpoint: none was trained twice
    assert script.results["next"].status == "finished"
