"""The one owner of Ray: runs tasks in parallel worker processes, as a source hands them out.

Ray Tune schedules, watches and restarts the workers; it decides and remembers nothing. What to run, when
to stop a trial and what became of it is the source's business, which therefore survives a crash of this
process on its own terms: every run starts a new Tuner, and none is ever restored.

    source.next ──► Searcher ──► Worker: trial(config, report) ──► Scheduler ──► source.reported
                                    └──► result ──► Searcher ──► source.completed
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from bench import processes
from bench.config import UserError
from bench.director import WAIT, Director, RepeatedError, Source, Task, Wait
from bench.streams import quiet
from bench.worker import Running

# Ray reads these two when it is imported. Under `uv run` it would else ship the working directory to its
# workers; and on Linux it would listen on the address that other machines see, even if told 127.0.0.1.
os.environ.update(RAY_ENABLE_UV_RUN_RUNTIME_ENV="0", RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

__all__ = ["WAIT", "Outcome", "RepeatedError", "Source", "Task", "Wait", "run"]

Outcome = Literal["done", "interrupted"]

#: Nothing goes through Ray's object store but its own small change; 75 MiB is the least that Ray takes.
OBJECT_STORE_BYTES = 80 * 2**20

# Ray asks for a token, and would else write one to the home directory. It remembers the first it sees.
_TOKEN = secrets.token_hex(32)
_SET_BY_RAY = ("RAY_AUTH_MODE", "RAY_CLIENT_MODE", "PYTHONBREAKPOINT")


def run(
    source: Source,
    *,
    trial: str = "bench.trial:run_trial",
    concurrent: int,
    cpus_per_trial: float,
    gpus_per_trial: float = 0.0,
    workers_per_trial: int = 1,
    log: Path,
    say: Callable[[str], None],
    tick: Callable[[], None] | None = None,
    grace: float = 5.0,
) -> Outcome:
    """Run the source's tasks, ``concurrent`` at a time, until it has no more or a signal comes.

    ``trial`` names, as module:function, a ``trial(config, report, **options) -> TrialResult`` that can be
    imported here and so in the workers; ``report(epoch, metrics)`` may not return (the trial is stopped).
    An exception in it is its result (status failed) and is not retried; a trial whose worker process
    died is begun again, up to MAX_LOSSES times: to go on from where it was is the trial function's
    business. With ``workers_per_trial`` above 1 each trial is run by so many processes (`bench.distributed`), with
    ``cpus_per_trial`` for each of them and ``gpus_per_trial`` for all. ``tick`` is called about ten times a second,
    and between any two events.

    Ray's output goes to ``log``; ``say`` and ``tick`` reach the terminal through the streams of a
    `quiet` around this call. SIGINT or SIGTERM: workers are killed, and the answer is "interrupted".
    Ray's processes have ``grace`` seconds to go before they are killed too.

    Errors: UserError (too few GPUs, Ray runs already), RepeatedError, and whatever the source raises.
    """
    _check(concurrent, cpus_per_trial, gpus_per_trial)
    together = {"trial": trial, "workers": workers_per_trial, "gpus": gpus_per_trial} if workers_per_trial > 1 else {}
    with quiet(log), processes.Interrupts() as interrupts:
        director = Director(
            source,
            trial="bench.distributed:run_together" if together else trial,
            also=together,
            concurrent=concurrent,
            log=log,
            say=say,
            tick=tick,
            interrupted=lambda: interrupts.raised,
        )
        with _cluster(concurrent, cpus_per_trial, gpus_per_trial, grace, workers_per_trial) as folder:
            interrupts.arm()
            if not interrupts.raised:
                # One of Ray's CPUs is one trial, however many cores that has: Ray starts a process for each.
                resources = {"cpu": 1, "gpu": 0 if together else _floor(gpus_per_trial)}
                _tuner(director, resources, folder / "tune").fit()
                _keep_last_words(folder, log)
    if director.fault is not None:
        raise director.fault
    if interrupts.raised:
        return "interrupted"
    if not director.over:
        raise RuntimeError(f"Ray Tune ended the run before its time; see {log}.")
    return "done"


def _check(concurrent: int, cpus: float, gpus: float) -> None:
    if concurrent < 1:
        raise UserError(f"concurrent must be at least 1, not {concurrent}.")
    if cpus <= 0:
        raise UserError(f"cpus_per_trial must be above 0, not {cpus}.")
    if gpus < 0:
        raise UserError(f"gpus_per_trial must not be negative, not {gpus}.")
    if ray.is_initialized():
        raise UserError("Ray runs in this process already; call ray.shutdown() first.")


def _floor(share: float) -> float:
    # Ray counts in ten-thousandths: 7 of 0.1429 GPUs would be one too many.
    return math.floor(share * 10_000) / 10_000


class _Search(Searcher):  # type: ignore[misc]  # Ray has no types
    def __init__(self, director: Director) -> None:
        super().__init__()
        self._director = director

    def suggest(self, trial_id: str) -> dict[str, str] | str | None:
        task = self._director.suggest(trial_id)
        return Searcher.FINISHED if self._director.over or self._director.stopping else task

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if not error and trial_id in self._director.live and result is not None:  # and was not stopped
            self._director.returned(trial_id, json.loads(result["message"]))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the source remembers."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a run is never restored; it starts anew from its source")


class _Schedule(FIFOScheduler):  # type: ignore[misc]
    def __init__(self, director: Director) -> None:
        super().__init__()
        self._director = director

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:  # noqa: ARG002
        message = json.loads(result["message"])
        if self._director.reported(trial.trial_id, message["epoch"], message["metrics"]):
            return str(TrialScheduler.STOP)
        return str(TrialScheduler.CONTINUE)


class _Watch(tune.Callback):  # type: ignore[misc]
    def __init__(self, director: Director) -> None:
        self._director = director

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:  # noqa: ARG002
        self._director.started(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:  # noqa: ARG002
        self._director.lost(trial.trial_id, _cause(Path(trial.error_file).read_text(encoding="utf-8")))


def _cause(errors: str) -> str:
    """One line from the file in which Tune collects a trial's errors: of the last one, what it is.

    An exception in a worker comes with its traceback and ends with what it is; Ray's own begin with it.
    """
    _, _, last = errors.rpartition("Failure # ")
    lines = [line.strip() for line in last.splitlines()[1:] if line.strip()] or ["no reason given"]
    return lines[-1].removeprefix("bench.worker.WorkerLostError: ") if "ray::" in lines[0] else lines[0]


class _Stop(tune.Stopper):  # type: ignore[misc]
    """Asked after every step of Tune's loop, ten times a second at least: the run's pulse, and its end."""

    def __init__(self, director: Director) -> None:
        self._director = director

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:  # noqa: ARG002
        return False

    def stop_all(self) -> bool:
        self._director.beat()
        end = self._director.over or self._director.stopping
        if end:
            # Asked politely, one in the middle of an epoch, or still starting, keeps Tune waiting for 5 to 15 s.
            processes.kill_titled("ray::")
        return end


def _tuner(director: Director, resources: dict[str, float], folder: Path) -> Any:
    return tune.Tuner(
        tune.with_resources(_Worker, resources),
        tune_config=tune.TuneConfig(
            search_alg=_Search(director),
            scheduler=_Schedule(director),
            num_samples=-1,
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            stop=_Stop(director),
            callbacks=[_Watch(director)],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            # The director begins trials again: Tune does not, if the worker died between two of them.
            failure_config=tune.FailureConfig(max_failures=0),
            verbose=0,
        ),
    )


def _name(trial: Any) -> str:
    return str(trial.trial_id)


@contextmanager
def _cluster(concurrent: int, cpus: float, gpus: float, grace: float, workers: int = 1) -> Iterator[Path]:
    """A Ray of our own on this machine's loopback, with room for ``concurrent`` trials; yields its folder."""
    variables = _variables(concurrent, cpus)
    with processes.scratch_folder() as folder, processes.environment(variables, also=_SET_BY_RAY):
        spared = processes.own_children()
        try:
            ray.init(
                address="local",
                num_cpus=concurrent if workers == 1 else concurrent * (1 + workers),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(folder),
            )
            _check_gpus(concurrent, gpus)
            yield folder
        finally:
            started = processes.descendants(spared)
            ray.shutdown()
            processes.end(started, grace)


def _keep_last_words(folder: Path, log: Path) -> None:
    """Add the ends of what the workers wrote to stderr to the log: a crash in C++ says its reason there."""
    with log.open("ab") as kept:
        for path in sorted(folder.glob("session_2*/logs/worker-*.err")):
            lines = [line for line in path.read_bytes().splitlines() if not line.startswith(b":")]  # :job_id:01...
            kept.writelines(line + b"\n" for line in lines[-50:])


def _variables(concurrent: int, cpus: float) -> dict[str, str]:
    return {
        # What can be imported here can be imported in the workers, from whatever folder this was started.
        "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path),  # noqa: PTH100 ("" is the current one)
        "OMP_NUM_THREADS": str(max(1, int(cpus))),
        # glibc gives each thread a heap of its own and keeps what was freed in it; each trial is a thread, and a worker
        # grew by some 150 MB with each resnet18 (with one heap it stays at what the largest trial needs)
        "MALLOC_ARENA_MAX": os.environ.get("MALLOC_ARENA_MAX", "1"),
        "RAY_AUTH_TOKEN": _TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        # a node that is slow to answer on a busy machine is not dead; 5 missed answers ended a search of hours
        "RAY_health_check_failure_threshold": "100",
        "RAY_worker_niceness": "0",  # 15 by default: beside anything else that runs, it would stand still
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in options mean the same there as here
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_MAX_PENDING_TRIALS_PG": str(concurrent),
        "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # Tune's own snapshots, which nobody reads
    }


def _check_gpus(concurrent: int, gpus: float) -> None:
    found = ray.cluster_resources().get("GPU", 0)
    if concurrent * _floor(gpus) > found:
        raise UserError(
            f"{concurrent} trials at a time with {gpus:g} GPU each need {concurrent * gpus:g} GPUs, and Ray finds "
            f"{found:g}; run fewer at a time, share a GPU (0.5 each), or use the CPU."
        )


class _Worker(tune.Trainable):  # type: ignore[misc]
    """One process for many trials, one after the other."""

    def setup(self, config: dict[str, str]) -> None:
        self._running = Running(config["task"])

    def step(self) -> dict[str, Any]:
        message = self._running.next_message()
        return {"message": json.dumps(message), "done": "result" in message}

    def reset_config(self, new_config: dict[str, str]) -> bool:
        self._running.stop()
        self._running = Running(new_config["task"])
        return True

    def cleanup(self) -> None:
        self._running.stop()
