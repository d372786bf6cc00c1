"""Ray Tune: runs tasks in parallel worker processes, as a source hands them out. The cluster is `bench.cluster`'s.

Ray Tune schedules, watches and restarts the workers; it decides and remembers nothing. What to run, when
to stop a trial and what became of it is the source's business, which therefore survives a crash of this
process on its own terms: every run starts a new Tuner, and none is ever restored.

    source.next ──► Searcher ──► Worker: trial(config, report) ──► Scheduler ──► source.reported
                                    └──► result ──► Searcher ──► source.completed
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from bench import processes
from bench.cluster import Cluster, Needs, cluster
from bench.director import WAIT, Director, RepeatedError, Source, Task, Wait
from bench.streams import quiet
from bench.worker import Running

# isort: split
# after bench.cluster, which sets what Ray reads when it is imported
from ray import tune
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

__all__ = ["WAIT", "Outcome", "RepeatedError", "Source", "Task", "Wait", "run"]

Outcome = Literal["done", "interrupted"]

#: Ray's words for a node that is gone fill lines; so many letters of them say enough.
_LONGEST_CAUSE = 100


def run(
    source: Source,
    *,
    trial: str = "bench.trial:run_trial",
    concurrent: int | None,
    cpus_per_trial: float,
    gpus_per_trial: float = 0.0,
    workers_per_trial: int = 1,
    address: str | None = None,
    shared: bool = True,
    log: Path,
    say: Callable[[str], None],
    tick: Callable[[], None] | None = None,
    grace: float = 5.0,
) -> Outcome:
    """Run the source's tasks, ``concurrent`` at a time, until it has no more or a signal comes.

    ``address``: of a Ray cluster to join (None: one of our own, on this machine); its nodes must all see the folder of
    ``log``, if that is ``shared``. ``concurrent`` may then be None, as many as it has room for at any time.

    ``trial`` names, as module:function, a ``trial(config, report, **options) -> TrialResult`` that can be
    imported here and so in the workers; ``report(epoch, metrics)`` may not return (the trial is stopped).
    An exception in it is its result (status failed) and is not retried; a trial whose worker or node died, or that
    ran out of memory, is begun again, up to MAX_LOSSES times (where trials share GPUs: with one fewer at a time): to go
    on from where it was is the trial function's business. Of several ``workers_per_trial`` (`bench.distributed`) each
    has the CPUs, and all together the GPUs. ``tick`` is called about ten times a second, and between any two events.

    Ray's output goes to ``log``; ``say`` and ``tick`` reach the terminal through the streams of a
    `quiet` around this call. SIGINT or SIGTERM: workers are killed, and the answer is "interrupted".
    Ray's processes have ``grace`` seconds to go before they are killed too.

    Errors: UserError (too few GPUs, Ray runs already, no such cluster), RepeatedError, and whatever the source raises.
    """
    needs = Needs(concurrent=concurrent, cpus=cpus_per_trial, gpus=gpus_per_trial, workers=workers_per_trial)
    needs.check()
    with (
        quiet(log),
        processes.Interrupts() as interrupts,
        cluster(needs, address, shared=log.parent.absolute() if shared else None, say=say, grace=grace) as place,
    ):
        director = Director(
            source,
            **_trial(trial, place),
            room=place.room,
            log=log,
            say=say,
            tick=tick,
            interrupted=lambda: interrupts.raised,
            shares_gpus=needs.shares_gpus,
        )
        interrupts.arm()
        if not interrupts.raised:
            _tuner(director, place).fit()
            _keep_last_words(place.folder, log)
    if director.fault is not None:
        raise director.fault
    if not (interrupts.raised or director.over):
        raise RuntimeError(f"Ray Tune ended the run before its time; see {log}.")
    return "interrupted" if interrupts.raised else "done"


class _Search(Searcher):  # type: ignore[misc]  # Ray has no types
    def __init__(self, director: Director) -> None:
        super().__init__()
        self._director = director

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
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
    def __init__(self, director: Director, stop: _Stop) -> None:
        super().__init__()
        self._director, self._stop = director, stop
        self._added = False

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        if not self._added:
            self._stop.actors = lambda: _actors(tune_controller)
            _outlive_lost_workers(tune_controller)
        self._added = True
        super().on_trial_add(tune_controller, trial)

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
    cause = lines[-1].removeprefix("bench.worker.WorkerLostError: ") if "ray::" in lines[0] else lines[0]
    return cause if len(cause) <= _LONGEST_CAUSE else f"{cause[:_LONGEST_CAUSE]}..."


class _Stop(tune.Stopper):  # type: ignore[misc]
    """Asked after every step of Tune's loop, ten times a second at least: the run's pulse, and its end."""

    def __init__(self, director: Director, place: Cluster) -> None:
        self._director, self._place = director, place
        #: the processes that have trials
        self.actors: Callable[[], list[Any]] = list

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as with the director

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:  # noqa: ARG002
        return False

    def stop_all(self) -> bool:
        self._director.beat()
        end = self._director.over or self._director.stopping
        if end:
            # Asked politely, one in the middle of an epoch, or still starting, keeps Tune waiting for 5 to 15 s.
            self._place.kill(self.actors())
        return end


def _actors(tune_controller: Any) -> list[Any]:
    """Ray's handles of the controller's workers, of which it gives none away; without them, the end takes longer."""
    manager = getattr(tune_controller, "_actor_manager", None)
    return [actor for actor, _ in getattr(manager, "_live_actors_to_ray_actors_resources", {}).values()]


def _outlive_lost_workers(tune_controller: Any) -> None:
    """Tune ends the whole run if Ray says of a task that its worker was killed for want of memory, or that its result
    was lost with its node: it knows only the actor's own errors. To us, each of them is a lost worker."""
    manager = getattr(tune_controller, "_actor_manager", None)
    failed = getattr(manager, "_actor_task_failed", None)
    if manager is None or failed is None:  # another Ray: tests/test_memory.py says whether it still needs this
        return

    def told(tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, RayError) and not isinstance(exception, RayActorError | RayTaskError):
            exception = RayActorError(error_msg=str(exception))
        failed(tracked_actor_task=tracked_actor_task, exception=exception)

    manager._actor_task_failed = told


def _tuner(director: Director, place: Cluster) -> Any:
    stop = _Stop(director, place)
    return tune.Tuner(
        tune.with_resources(_Worker, place.resources),
        tune_config=tune.TuneConfig(
            search_alg=_Search(director),
            scheduler=_Schedule(director, stop),
            num_samples=-1,
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(place.folder / "tune"),
            stop=stop,
            callbacks=[_Watch(director)],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            # The director begins trials again: Tune does not, if the worker died between two of them.
            failure_config=tune.FailureConfig(max_failures=0),
            verbose=0,
        ),
    )


def _name(trial: Any) -> str:
    return str(trial.trial_id)


def _trial(trial: str, place: Cluster) -> dict[str, Any]:
    """The trial function, and the options that all its calls have."""
    if len(place.members) == 1:
        return {"trial": trial}
    return {"trial": "bench.distributed:run_together", "also": {"trial": trial, "members": place.members}}


def _keep_last_words(folder: Path, log: Path) -> None:
    """Add the ends of what the workers wrote to stderr to the log: a crash in C++ says its reason there."""
    with suppress(OSError), log.open("ab") as kept:  # where it cannot be kept, that is what ended the run
        for path in sorted(folder.glob("session_2*/logs/worker-*.err")):
            lines = [line for line in path.read_bytes().splitlines() if not line.startswith(b":")]  # :job_id:01...
            kept.writelines(line + b"\n" for line in lines[-50:])


class _Worker(tune.Trainable):  # type: ignore[misc]
    """One process for many trials, one after the other."""

    def setup(self, config: dict[str, Any]) -> None:
        self._running = Running(config)

    def step(self) -> dict[str, Any]:
        message = self._running.next_message()
        # one string: of everything else Tune keeps statistics, number by number
        return {"message": json.dumps(message), "done": "result" in message}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._running.stop()
        self._running = Running(new_config)
        return True

    def cleanup(self) -> None:
        self._running.stop()
