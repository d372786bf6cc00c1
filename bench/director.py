"""Between a source of tasks and the machinery that runs them: what is handed out, and what comes back.

Knows nothing of Ray: `bench.engine` translates Tune's events into calls of a `Director`.
"""

from __future__ import annotations

import enum
import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from bench.config import TrialConfig, TrialResult, UserError
from bench.disk import DiskError
from bench.provenance import source_digest

Result = TypeVar("Result")

#: A worker that is lost, or runs out of memory, once more than this takes its trial with it.
MAX_LOSSES = 2
#: So many failures in a row, all at one place in the code, end the run: the next would fail as well.
ALIKE_FAILURES = 3

_LOST = "lost its worker process"


class Wait(enum.Enum):
    """``WAIT``: the source has no task now, but will have."""

    WAIT = "wait"


WAIT = Wait.WAIT


@dataclass(frozen=True, kw_only=True)
class Task:
    """One trial to run: ``options`` are JSON-ready keyword arguments for the trial function."""

    uid: str
    config: TrialConfig
    options: dict[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """Hands out tasks and is told what becomes of them; called from the thread that called `run`.

    Every started uid is completed exactly once, unless the run ends before (interrupted, or by an error).
    """

    def next(self) -> Task | Wait | None:
        """The next task; WAIT: none now; None: none any more."""

    def started(self, uid: str) -> None:
        """A worker has begun with it."""

    def reported(self, uid: str, epoch: int, metrics: Mapping[str, float]) -> bool:
        """One epoch is over, and the worker waits for the answer. True: stop this trial here."""

    def completed(self, uid: str, result: TrialResult) -> None:
        """It is over: finished, diverged or failed (the trial's own result), or stopped by `reported`."""


class RepeatedError(UserError):
    """Trials fail one after the other at the same place in the code: a bug, and no matter of coefficients."""


@dataclass
class _Live:
    task: Task
    started: bool = False
    losses: list[str] = field(default_factory=list)
    history: dict[int, dict[str, float]] = field(default_factory=dict)


def _guarded(method: Callable[..., Result]) -> Callable[..., Result | None]:
    """Keeps an exception for the end of the run, and ends it: Tune would log it and go on, or wrap it."""

    @functools.wraps(method)
    def guarded(self: Director, *arguments: Any) -> Result | None:
        if self.stopping:
            return None
        try:
            return method(self, *arguments)
        except Exception as error:  # noqa: BLE001  (raised again by `run`)
            self.fault = error
            return None

    return guarded


class Director:
    """All that happens in a run, in one place; Tune's trial ids are the keys. ``room``: for how many trials at a time.

    ``shares_gpus``: two trials may be on one GPU; with fewer of them at a time each then has more of its memory.
    ``live``: what is handed out and not over. ``exhausted``: the source has no more. ``fault``: the
    exception that ends the run, be it the source's or a RepeatedError.
    """

    def __init__(
        self,
        source: Source,
        *,
        trial: str,
        room: Callable[[], int],
        log: Path,
        say: Callable[[str], None],
        tick: Callable[[], None] | None,
        interrupted: Callable[[], bool],
        also: Mapping[str, Any] | None = None,
        shares_gpus: bool = False,
    ) -> None:
        self._also = also or {}  # options of the trial function that all tasks have
        self._source, self._trial, self._room, self._log = source, trial, room, log
        self._shares_gpus = shares_gpus
        self._say, self._tick, self._interrupted = say, tick, interrupted
        self.live: dict[str, _Live] = {}
        self.exhausted = False
        self._again: list[_Live] = []
        self.fault: Exception | None = None
        self._alike, self._place = 0, ""
        self._most = math.inf  # what a GPU's memory has shown to be too many, less one

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles all that it is given, for a restoration that never comes

    @property
    def stopping(self) -> bool:
        """Whether the run is to end now; the source is then left in peace."""
        return self.fault is not None or self._interrupted()

    @property
    def over(self) -> bool:
        """Whether there is nothing left to hand out or to wait for."""
        return self.exhausted and not self.live and not self._again

    @_guarded
    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next trial as Tune's configuration, with the coefficients where Ray's own tools look for parameters."""
        self.beat()
        live = self._next() if len(self.live) < min(self._room(), self._most) else None
        if live is None:
            return None
        self.live[trial_id] = live
        task = live.task
        options = {**task.options, **self._also}
        return {"trial": self._trial, "config": task.config.to_dict(), "options": options, "source": source_digest()}

    def _next(self) -> _Live | None:
        if self._again:
            return self._again.pop(0)
        task = None if self.exhausted else self._source.next()
        self.exhausted = task is None
        return _Live(task) if isinstance(task, Task) else None

    @_guarded
    def started(self, trial_id: str) -> None:
        """A worker has the trial; not the first one, perhaps."""
        self._start(self.live[trial_id])

    def _start(self, live: _Live) -> None:
        if not live.started:
            live.started = True
            self._source.started(live.task.uid)

    @_guarded
    def lost(self, trial_id: str, cause: str) -> None:
        """The worker process is gone; its trial is begun again by another one, though not for ever."""
        if trial_id in self.live:  # or over before: the worker was lost in its last moment
            self._begin_again(trial_id, _LOST, cause)

    def _begin_again(self, trial_id: str, what: str, cause: str) -> None:
        live = self.live[trial_id]
        live.losses.append(what)
        if len(live.losses) <= MAX_LOSSES:
            self._say(f"{live.task.uid}: {what} ({cause}); the trial is begun again.")
            self._again.append(self.live.pop(trial_id))
            return
        times = [f"{each} {count} {'time' if count == 1 else 'times'}" for each, count in Counter(live.losses).items()]
        reason = f"{' and '.join(times)} ({cause})"
        kinds = sorted(set(live.losses))
        self._start(live)  # a worker that dies before it has begun is lost as well, and what is over has begun
        self._complete(trial_id, TrialResult(config=live.task.config, status="failed", reason=reason))
        # how much memory was asked for, and was free, is never twice the same
        self._note(reason if kinds == [_LOST] else " and ".join(kinds), reason)

    @_guarded
    def reported(self, trial_id: str, epoch: int, metrics: dict[str, float]) -> bool:
        """Whether to stop the trial; its result is then what it has reported in this run."""
        live = self.live[trial_id]
        live.history[epoch] = {"epoch": float(epoch), **metrics}
        if not self._source.reported(live.task.uid, epoch, metrics):
            return False
        result = TrialResult(
            config=live.task.config,
            status="stopped",
            reason=f"stopped early, after epoch {epoch}",
            metrics=dict(metrics),
            history=[live.history[e] for e in sorted(live.history)],
        )
        self._complete(trial_id, result)
        self._note("", None)
        return True

    @_guarded
    def returned(self, trial_id: str, message: dict[str, Any]) -> None:
        """The trial function has come to its end. What is a disk's fault, or that of code that changed, ends the run,
        and not the trial.
        """
        result = TrialResult.from_dict(message["result"])
        if message["traceback"]:
            self._keep(f"{self.live[trial_id].task.uid} failed:\n{message['traceback']}")
        if message["blame"] == "disk":
            raise DiskError(result.reason or "the disk is at fault.")
        if message["blame"] == "code":
            raise UserError(result.reason or "the code changed.")
        if message["blame"] == "GPU memory" and self._shares_gpus and len(self.live) > 1:
            self._thin_out(trial_id)
            return
        if message["blame"] in ("memory", "GPU memory"):
            self._begin_again(trial_id, f"ran out of {message['blame']}", result.reason or "")
            return
        self._complete(trial_id, result)
        self._note(message["where"], result.reason)

    def _thin_out(self, trial_id: str) -> None:
        """A GPU's memory was too small for all that are live: the trial is begun again, when one fewer is."""
        self._most = len(self.live) - 1
        live = self.live.pop(trial_id)
        at_a_time = f"{self._most:.0f} trial{'s' if self._most > 1 else ''} at a time"
        self._say(f"{live.task.uid}: out of GPU memory beside others; from now on {at_a_time}, and it is begun again.")
        self._again.append(live)

    def _keep(self, text: str) -> None:
        """Add to the log, if it can be written: what went wrong is said in any case."""
        try:
            with self._log.open("a", encoding="utf-8", errors="backslashreplace") as log:
                log.write(text)
        except OSError as error:
            self._say(f"{self._log}: a traceback could not be kept there ({error.strerror}).")

    def _complete(self, trial_id: str, result: TrialResult) -> None:
        self._source.completed(self.live.pop(trial_id).task.uid, result)

    def _note(self, where: str, reason: str | None) -> None:
        self._alike = self._alike + 1 if where == self._place else 1
        self._place = where
        if where and self._alike >= ALIKE_FAILURES:
            alike = f"{ALIKE_FAILURES} trials in a row failed alike: {reason}"
            raise RepeatedError(f"{alike}. Mend that and run again; {self._log} has the whole story.")

    @_guarded
    def beat(self) -> None:
        """Between any two events."""
        if self._tick is not None:
            self._tick()
