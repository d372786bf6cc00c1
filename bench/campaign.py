"""The runs of one search: what there is to run next, and what became of it.

One source hands out everything: trials while the study asks for them; the controls, which depend on nothing,
where a worker would else stand idle; and, when the last trial is over, the best configurations with fresh
seeds. What is finished is a row, and is never run again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import engine
from bench.config import Kind, StudyConfig, TrialConfig, TrialResult, UserError, digest
from bench.provenance import provenance
from bench.rows import Row, RowFile, result_of, row
from bench.space import Space
from bench.study import Study
from bench.summary import summarize
from bench.terminal import duration
from bench.tracking import Tracker

#: The rules that every confirmed configuration stands beside.
CONTROLS = ("backprop", "feedback")
#: The seeds of confirmations and controls: the same for every rule, so that differences are paired.
FIRST_CONFIRM_SEED = 1000


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a search runs; none of it is part of what is found. ``concurrent``: None is one trial per core (or GPU)."""

    results: Path = Path("results")
    data_dir: str | None = None
    device: str = "auto"
    concurrent: int | None = None
    tracking_uri: str | None = None


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one of ``concurrent`` trials has of the machine."""

    concurrent: int
    threads: int
    gpus: float


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A search of which nothing can be refused any more, as far as one can know before it begins."""

    config: StudyConfig
    space: Space
    options: Options
    share: Share
    dataset: tuple[str, str]
    chance: float
    control_key: str
    uri: str
    artifacts: Path | None

    @property
    def folder(self) -> Path:
        return self.options.results / self.config.name


def confirm_seeds(config: StudyConfig) -> list[int]:
    """Fresh ones: not the seed that the search itself trained with."""
    seeds = range(FIRST_CONFIRM_SEED, FIRST_CONFIRM_SEED + config.confirm_seeds + 1)
    return [s for s in seeds if s != config.seed][: config.confirm_seeds]


def trial_config(
    config: StudyConfig, changes: Mapping[str, Any], *, rule: str | None = None, seed: int | None = None
) -> TrialConfig:
    """One run of the study: its recipe, and these changes."""
    return TrialConfig.from_dict(
        {
            **config.recipe,
            "rule": rule or config.rule,
            "arch": config.arch,
            "dataset": config.dataset,
            "epochs": config.epochs,
            "seed": config.seed if seed is None else seed,
            **changes,
        }
    )


@dataclass
class _Running:
    kind: Kind
    config: TrialConfig
    since: float
    epoch: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)


class Campaign:
    """The source of all runs of one search (an `engine.Source`), and the keeper of its rows."""

    def __init__(self, ready: Ready, study: Study, tracker: Tracker, *, rows: RowFile, controls: RowFile) -> None:
        self.config, self._space = ready.config, ready.space
        self._ready, self._study, self._tracker = ready, study, tracker
        self._row_files: dict[Kind, RowFile] = {"search": rows, "confirm": rows, "control": controls}
        self._done: dict[str, Row] = {**rows.by_uid(), **controls.by_uid()}
        self._failed_here: set[str] = set()
        self._running: dict[str, _Running] = {}
        self._started_at = time.monotonic()
        self._finished_here: list[float] = []

    # --- what there is to run

    def control_tasks(self) -> dict[str, TrialConfig]:
        """uid to configuration: run once for a recipe, then shared by every study that has it."""
        tasks = {}
        for rule in CONTROLS:
            for seed in confirm_seeds(self.config) if rule != self.config.rule else ():
                config = trial_config(self.config, {}, rule=rule, seed=seed)
                tasks[f"control-{rule}-{digest([config.to_dict(), self._ready.control_key])}"] = config
        return tasks

    def confirm_tasks(self) -> dict[str, TrialConfig]:
        """uid to configuration: the study's best, with fresh seeds."""
        tasks = {}
        for best in self._study.best(self.config.confirm_top):
            for seed in confirm_seeds(self.config):
                config = trial_config(self.config, self._space.changes(best.params), seed=seed)
                tasks[f"{self.config.name}-confirm-{config.digest()}"] = config
        return tasks

    def _attempts(self, base: str) -> list[str]:
        """The names under which this run was tried (uid, uid.2, ...), and the one of a next attempt."""
        names = [base]
        while names[-1] in self._done:
            names.append(f"{base}.{len(names) + 1}")
        return names

    def _next_attempt(self, base: str) -> str | None:
        """None if the run is settled: it is done, or failed in this very start. An older failure is tried again."""
        *tried, following = self._attempts(base)
        settled = tried and (self._done[tried[-1]]["status"] != "failed" or tried[-1] in self._failed_here)
        return None if settled else following

    def _open(self, tasks: Mapping[str, TrialConfig]) -> Iterator[tuple[str, TrialConfig]]:
        """What of these is neither settled nor under way."""
        for base, config in tasks.items():
            uid = self._next_attempt(base)
            if uid is not None and uid not in self._running:
                yield uid, config

    def _rows_of(self, tasks: Mapping[str, TrialConfig]) -> list[Row]:
        return [self._done[tried[-2]] for base in tasks if len(tried := self._attempts(base)) > 1]

    def _settled(self, tasks: Mapping[str, TrialConfig]) -> int:
        return sum(self._next_attempt(base) is None for base in tasks)

    @property
    def searching(self) -> bool:
        counts = self._study.counts()
        return bool(counts.running or counts.remaining)

    @property
    def complete(self) -> bool:
        """Nothing is left to run."""
        return not (self.searching or any(self._open(self.control_tasks())) or any(self._open(self.confirm_tasks())))

    # --- engine.Source

    def next(self) -> engine.Task | engine.Wait | None:
        while proposal := self._study.ask():
            if proposal.uid in self._done:  # killed between the row and the tell
                self._study.tell(proposal.uid, result_of(self._done[proposal.uid]))
                continue
            return self._task(proposal.uid, "search", trial_config(self.config, self._space.changes(proposal.params)))
        if any(self._open(self.control_tasks())):
            self._done |= self._row_files["control"].by_uid()  # another search may have run some meanwhile
        for uid, config in self._open(self.control_tasks()):
            return self._task(uid, "control", config)
        if self.searching:
            return engine.WAIT
        for uid, config in self._open(self.confirm_tasks()):
            return self._task(uid, "confirm", config)
        return None

    def _task(self, uid: str, kind: Kind, config: TrialConfig) -> engine.Task:
        self._running[uid] = _Running(kind, config, time.monotonic())
        options = {
            "data_dir": self._ready.options.data_dir,
            "device": self._ready.options.device,
            "checkpoint": str(self._checkpoint(uid)),
            "read_test": kind != "search",
            "threads": self._ready.share.threads,
        }
        return engine.Task(uid=uid, config=config, options=options)

    def _checkpoint(self, uid: str) -> Path:
        return (self._ready.folder / "checkpoints" / f"{uid}.pt").absolute()

    def started(self, uid: str) -> None:
        run = self._running[uid]
        run.since = time.monotonic()
        self._tracker.start(uid, run.kind, run.config, self._tags(run))

    def reported(self, uid: str, epoch: int, metrics: Mapping[str, float]) -> bool:
        run = self._running[uid]
        run.epoch, run.metrics = epoch, metrics
        self._tracker.report(uid, epoch, metrics)
        return run.kind == "search" and self._study.report(uid, epoch, metrics["val_acc"])

    def completed(self, uid: str, result: TrialResult) -> None:
        run = self._running[uid]
        seconds = time.monotonic() - run.since
        if not result.provenance:  # stopped or failed: the worker had no say
            result = dataclasses.replace(result, provenance={**provenance("cpu"), "seconds": seconds})
        filed = row(uid, self.config.name, run.kind, result)
        self._done[uid] = filed = self._file(run.kind, filed)  # the row first: what has one is never run again
        if result.status == "failed":
            self._failed_here.add(uid)
        if run.kind == "search":
            self._study.tell(uid, result)
        self._tracker.finish(uid, result, self._tags(run))
        self._checkpoint(uid).unlink(missing_ok=True)
        del self._running[uid]
        self._finished_here.append(seconds)

    def _file(self, kind: Kind, filed: Row) -> Row:
        """Append the row; a control that another search has filed meanwhile is that one's."""
        try:
            self._row_files[kind].append(filed)
        except UserError:
            known = self._row_files[kind].by_uid().get(filed["uid"]) if kind == "control" else None
            if known is None:
                raise
            return known
        return filed

    def _tags(self, run: _Running) -> dict[str, Any]:
        return {"bench.rule": run.config.rule, "bench.arch": run.config.arch, "bench.seed": run.config.seed}

    # --- what is known

    def control_rows(self) -> list[Row]:
        return self._rows_of(self.control_tasks())

    def confirm_rows(self) -> list[Row]:
        return self._rows_of(self.confirm_tasks())

    def search_rows(self) -> list[Row]:
        return [r for r in self._done.values() if r["kind"] == "search"]

    def summary(self) -> dict[str, Any]:
        return summarize(self.config, self.search_rows(), self.confirm_rows(), self.control_rows())

    def record_known(self) -> None:
        """Tell MLflow what an earlier start, or another study's controls, left as rows."""
        for known in (*self.search_rows(), *self.confirm_rows(), *self.control_rows()):
            self._tracker.record(known["uid"], known["kind"], known)

    def render(self) -> str:
        """The live display: a line for the whole, and one for each run under way."""
        counts = self._study.counts()
        best = self._study.best(1)
        parts = [f"{counts.finished + counts.stopped + counts.diverged + counts.failed}/{self._study.budget} trials"]
        parts += [
            f"{n} {what}"
            for n, what in ((counts.stopped, "stopped"), (counts.diverged, "diverged"), (counts.failed, "failed"))
            if n
        ]
        controls, confirms = self.control_tasks(), {} if self.searching else self.confirm_tasks()
        parts.append(f"controls {self._settled(controls)}/{len(controls)}")
        if confirms:
            parts.append(f"confirmed {self._settled(confirms)}/{len(confirms)}")
        if best:
            parts.append(f"best {best[0].value:.2%} (trial {best[0].number})")
        left = self._seconds_left(counts.remaining + counts.running, controls, confirms)
        parts.append(
            f"{duration(time.monotonic() - self._started_at)} gone" + (f", about {duration(left)} left" if left else "")
        )
        lines = [f"{self.config.name}: " + " · ".join(parts)]
        for uid, run in list(self._running.items()):
            accuracy = f"  val {run.metrics['val_acc']:.2%}" if "val_acc" in run.metrics else ""
            lines.append(f"  {uid}  epoch {run.epoch}/{run.config.epochs}{accuracy}")
        return "\n".join(lines)

    def _seconds_left(self, trials: int, controls: Mapping[str, Any], confirms: Mapping[str, Any]) -> float | None:
        if not self._finished_here:
            return None
        fresh = len(confirm_seeds(self.config)) * self.config.confirm_top if not confirms else len(confirms)
        runs = trials + len(controls) - self._settled(controls) + fresh - self._settled(confirms)
        return runs * sum(self._finished_here) / len(self._finished_here) / self._ready.share.concurrent
