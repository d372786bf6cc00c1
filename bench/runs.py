"""Runs that a source hands out: which are done, which are under way, and what became of them.

`Runs` is the part of an `director.Source` that knows nothing of what there is to run: a search, or a measurement of
robustness, says that. What is finished is a row, and is never run again; what failed is tried again at the next start.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from bench.checkpoint import File, remove_checkpoint, sweep_checkpoints
from bench.config import Kind, TrialConfig, TrialResult, UserError
from bench.director import Source, Task, Wait
from bench.disk import DiskError
from bench.place import Place
from bench.provenance import provenance
from bench.rows import Row, RowFile, attempts, row
from bench.terminal import duration

Outcome = Literal["done", "interrupted", "known"]

#: The seeds of confirmations, controls and measurements: the same for every rule, so that differences are paired.
FIRST_CONFIRM_SEED = 1000


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A run to be: what its row is filed as, the trial function's ``options``, ``evaluation`` as in TrialResult."""

    config: TrialConfig
    kind: Kind
    options: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)

    def with_options(self, **options: Any) -> Planned:
        """These options besides."""
        return dataclasses.replace(self, options={**options, **self.options})


@dataclass
class Running:
    """A run under way."""

    plan: Planned
    since: float
    epoch: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)


class Recorder(Protocol):
    """What is told of runs, as `bench.tracking.Tracker` takes it."""

    def start(
        self,
        uid: str,
        kind: Kind,
        config: TrialConfig,
        tags: Mapping[str, Any] | None = None,
        evaluation: Mapping[str, Any] | None = None,
    ) -> None: ...

    def report(self, uid: str, epoch: int, metrics: Mapping[str, float]) -> None: ...

    def finish(self, uid: str, result: TrialResult, extra_tags: Mapping[str, Any] | None = None) -> None: ...

    def record(self, uid: str, kind: Kind, row: Mapping[str, Any]) -> None: ...


class Runs:
    """Keeps the rows of one study, and the record of what is under way. ``files``: where rows of each kind go."""

    def __init__(self, study: str, place: Place, tracker: Recorder, files: Mapping[Kind, RowFile]) -> None:
        self.name, self._place, self._tracker = study, place, tracker
        self._row_files = dict(files)
        self._done: dict[str, Row] = {}
        for file in dict.fromkeys(files.values()):
            self._done |= file.by_uid()
        self._filed_of = Counter(known["kind"] for known in self._done.values())
        self._failed_here: set[str] = set()
        self._running: dict[str, Running] = {}
        #: whether another source of the same programme has this run under way
        self.elsewhere: Callable[[str], bool] = lambda uid: False  # noqa: ARG005
        self._started_at = time.monotonic()
        self._seconds: dict[bool, list[float]] = {False: [], True: []}  # of trainings, of evaluations; in this start

    @property
    def complete(self) -> bool:
        """Nothing is left to run."""
        raise NotImplementedError

    def next(self) -> Task | Wait | None:
        """As `director.Source` has it."""
        raise NotImplementedError

    def filed(self, kind: Kind) -> int:
        """How many runs of this kind have a row."""
        return self._filed_of[kind]

    @property
    def running(self) -> bool:
        """Whether any run of this source is under way."""
        return bool(self._running)

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        return self._place.chance

    def record(self, rows: Iterable[Row]) -> None:
        """Tell MLflow of rows that it may lack."""
        for known in rows:
            self._tracker.record(known["uid"], known["kind"], known)

    # --- attempts

    def _attempts(self, base: str) -> list[str]:
        """The names under which this run was tried (uid, uid.2, ...), and the one of a next attempt."""
        return attempts(base, self._done)

    def _next_attempt(self, base: str) -> str | None:
        """None if the run is settled: it is done, or failed in this very start. An older failure is tried again."""
        *tried, following = self._attempts(base)
        settled = tried and (self._done[tried[-1]]["status"] != "failed" or tried[-1] in self._failed_here)
        return None if settled else following

    def _open(self, plans: Mapping[str, Planned]) -> Iterator[tuple[str, Planned]]:
        """What of these is neither settled nor under way."""
        for base, plan in plans.items():
            uid = self._next_attempt(base)
            if uid is not None and uid not in self._running and not self.elsewhere(uid):
                yield uid, plan

    def _row_of(self, base: str) -> Row | None:
        """The row of the last attempt."""
        tried = self._attempts(base)
        return self._done[tried[-2]] if len(tried) > 1 else None

    def _rows_of(self, plans: Mapping[str, Planned]) -> list[Row]:
        return [known for base in plans if (known := self._row_of(base)) is not None]

    def _settled(self, plans: Mapping[str, Planned]) -> int:
        return sum(self._next_attempt(base) is None for base in plans)

    # --- director.Source, but for `next`

    def _task(self, uid: str, plan: Planned) -> Task:
        self._running[uid] = Running(plan, time.monotonic())
        options = {
            "data_dir": self._place.options.data_dir,
            "device": self._place.options.device,
            "threads": self._place.share.threads,
            **plan.options,
        }
        return Task(uid=uid, config=plan.config, options=options)

    def _checkpoint(self, uid: str) -> File:
        return self._place.options.kept(self.name) / f"checkpoints/{uid}.pt"

    def started(self, uid: str) -> None:
        run = self._running[uid]
        run.since = time.monotonic()
        self._tracker.start(uid, run.plan.kind, run.plan.config, self._tags(run), run.plan.evaluation)

    def reported(self, uid: str, epoch: int, metrics: Mapping[str, float]) -> bool:
        run = self._running[uid]
        run.epoch, run.metrics = epoch, metrics
        self._tracker.report(uid, epoch, metrics)
        return False

    def completed(self, uid: str, result: TrialResult) -> None:
        run = self._running[uid]
        seconds = time.monotonic() - run.since
        if run.plan.evaluation and not result.evaluation:  # failed: it is no training
            result = dataclasses.replace(result, evaluation=dict(run.plan.evaluation))
        if not result.provenance:  # stopped or failed: the worker had no say
            result = dataclasses.replace(result, provenance={**provenance("cpu"), "seconds": seconds})
        filed = row(uid, self.name, run.plan.kind, result)
        self._done[uid] = self._file(run.plan.kind, filed)  # the row first: what has one is never run again
        self._filed_of[run.plan.kind] += 1
        if result.status == "failed":
            self._failed_here.add(uid)
        self._filed(uid, run, result)
        self._tracker.finish(uid, result, self._tags(run))
        self._tidy(uid)
        del self._running[uid]
        self._seconds[bool(run.plan.evaluation)].append(seconds)

    def _filed(self, uid: str, run: Running, result: TrialResult) -> None:
        """The run's row is on the disk; whoever else must know is told here."""

    def _tidy(self, uid: str) -> None:
        """Remove the checkpoints of a run that is over."""
        remove_checkpoint(self._checkpoint(uid))

    def sweep(self, *, at_the_end: bool = False) -> None:
        """Remove the checkpoints of what has a row; ``at_the_end`` all, if nothing is left to run.

        A kill between a row and `_tidy` leaves one, as does a control that another search has finished; and in the end
        the confirmation of what is no longer among the best.
        """
        everything = at_the_end and self.complete and not self._running
        folder = self._place.options.kept(self.name) / "checkpoints"
        sweep_checkpoints(folder, lambda uid: everything or uid in self._done)

    def _file(self, kind: Kind, filed: Row) -> Row:
        """Append the row; a control that another search has filed meanwhile is that one's."""
        try:
            self._row_files[kind].append(filed)
        except DiskError:
            raise
        except UserError:
            known = self._row_files[kind].by_uid().get(filed["uid"]) if kind == "control" else None
            if known is None:
                raise
            return known
        return filed

    def _tags(self, run: Running) -> dict[str, Any]:
        config = run.plan.config
        return {"bench.rule": config.rule, "bench.arch": config.arch, "bench.seed": config.seed}

    # --- what is said of them

    def _time(self, trainings: int, evaluations: int = 0) -> str:
        """How long it has taken, and will take: so many are left, of kinds that take unlike times."""
        gone = f"{duration(time.monotonic() - self._started_at)} gone"
        kinds = [(trainings, self._seconds[False]), (evaluations, self._seconds[True])]
        at_a_time = self._place.share.concurrent or max(1, len(self._running))
        known = [count * sum(each) / len(each) for count, each in kinds if count and each]
        return f"{gone}, about {duration(sum(known) / at_a_time)} left" if known else gone

    def _lines(self) -> list[str]:
        """A line for each run under way."""
        lines = []
        for uid, run in list(self._running.items()):
            accuracy = f"  val {run.metrics['val_acc']:.2%}" if "val_acc" in run.metrics else ""
            lines.append(f"  {uid}  epoch {run.epoch}/{run.plan.config.epochs}{accuracy}")
        return lines

    def render(self) -> str:
        """The live display."""
        return "\n".join(self._lines())


class Complete(Source, Protocol):
    """A source that knows whether anything is left to run."""

    @property
    def complete(self) -> bool: ...


S = TypeVar("S", bound=Complete)


def carry_out(
    source: S,
    place: Place,
    log: Path,
    *,
    trial: str = "bench.trial:run_trial",
    say: Callable[[str], None],
    watch: Callable[[S], Callable[[], None]] | None = None,
) -> Outcome:
    """Run what is left of the source at this place; "known": nothing was. ``watch``: as in `bench.search.search`."""
    if source.complete:
        return "known"
    from bench import engine  # Ray takes seconds to import, and who only reads rows needs none

    return engine.run(
        source,
        trial=trial,
        concurrent=place.share.concurrent,
        cpus_per_trial=place.share.threads,
        gpus_per_trial=place.share.gpus,
        workers_per_trial=place.options.workers_per_trial,
        address=place.options.address,
        shared=place.options.store is None,
        log=log,
        say=say,
        tick=None if watch is None else watch(source),
    )
