"""`bench search`: Ray runs the trials, the study proposes, the best is confirmed beside its controls.

One source hands out everything: trials while the study asks for them; the controls, which depend on nothing,
where a worker would else stand idle; and, when the last trial is over, the best configurations with fresh
seeds. What is finished is a row, and is never run again.
"""

from __future__ import annotations

import dataclasses
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bench import engine
from bench.config import Kind, StudyConfig, TrialConfig, TrialResult, UserError, digest
from bench.files import read_yaml, write_yaml
from bench.provenance import provenance, usable_cores
from bench.rows import Row, RowFile, result_of, row
from bench.space import Space
from bench.stores import check_uri, embedded
from bench.study import Study, check_choices
from bench.summary import headline, summarize
from bench.terminal import duration
from bench.tracking import Tracker
from bench.trial import pick_device, prepare

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


def share_out(concurrent: int | None, device_type: str) -> Share:
    """Cores, or GPUs, divided among the trials: on the CPU a trial per core, because one thread wastes nothing."""
    cores = max(1, int(usable_cores()))
    if device_type != "cuda":
        trials = concurrent or cores
        return Share(concurrent=trials, threads=max(1, cores // trials), gpus=0.0)
    import torch

    gpus = torch.cuda.device_count()
    trials = concurrent or gpus
    return Share(concurrent=trials, threads=max(1, cores // trials), gpus=min(1.0, gpus / trials))


def study_name(rule: str, arch: str, dataset: str) -> str:
    """The default name: what the study is about, in characters that every file system takes."""
    kind, _, path = dataset.partition(":")
    data = f"{kind}-{Path(path).name}" if path else kind
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", f"{rule}-{arch}-{data}").strip("-.")


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

    def _open(self, tasks: Mapping[str, TrialConfig]) -> Iterator[tuple[str, TrialConfig]]:
        return ((uid, c) for uid, c in tasks.items() if uid not in self._done and uid not in self._running)

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
        self._row_files[run.kind].append(filed)  # the row first: what has one is never run again
        self._done[uid] = filed
        if run.kind == "search":
            self._study.tell(uid, result)
        self._tracker.finish(uid, result, self._tags(run))
        self._checkpoint(uid).unlink(missing_ok=True)
        del self._running[uid]
        self._finished_here.append(seconds)

    def _tags(self, run: _Running) -> dict[str, Any]:
        return {"bench.rule": run.config.rule, "bench.arch": run.config.arch, "bench.seed": run.config.seed}

    # --- what is known

    def control_rows(self) -> list[Row]:
        return [self._done[uid] for uid in self.control_tasks() if uid in self._done]

    def confirm_rows(self) -> list[Row]:
        return [self._done[uid] for uid in self.confirm_tasks() if uid in self._done]

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
        parts.append(f"controls {sum(u in self._done for u in controls)}/{len(controls)}")
        if confirms:
            parts.append(f"confirmed {sum(u in self._done for u in confirms)}/{len(confirms)}")
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
        runs = trials + sum(u not in self._done for u in controls) + fresh - sum(u in self._done for u in confirms)
        return runs * sum(self._finished_here) / len(self._finished_here) / self._ready.share.concurrent


Outcome = Literal["done", "interrupted", "known"]


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


def check(config: StudyConfig, space: Space, options: Options) -> Ready:
    """Everything that a search needs, tried out; UserError for what cannot work, before anything is written."""
    check_choices(config)
    uri, artifacts = (options.tracking_uri, None) if options.tracking_uri else embedded(options.results)
    if options.tracking_uri:
        check_uri(uri)
    device = pick_device(options.device).type
    lowest = trial_config(config, space.changes(space.corners()[0]))
    data = prepare(lowest, data_dir=options.data_dir, device="cpu").data
    return Ready(
        config=config,
        space=space,
        options=options,
        share=share_out(options.concurrent, device),
        dataset=(data.name, data.digest),
        chance=1.0 / data.classes,
        control_key=f"{device} {data.digest}",
        uri=uri,
        artifacts=artifacts,
    )


def search(
    ready: Ready,
    *,
    say: Callable[[str], None],
    watch: Callable[[Campaign], Callable[[], None]] | None = None,
) -> tuple[Outcome, dict[str, Any]]:
    """Run the search to its end, or go on with it; the summary of what is known by then.

    "known": everything had been run before. ``watch`` gets the campaign and returns what is called about
    ten times a second.
    """
    config, options, folder = ready.config, ready.options, ready.folder
    distributions = ready.space.distributions()
    with Study.open(folder, config, distributions, say=say, chance=ready.chance) as study:
        identity = _write_config(folder, config)
        spool = options.results / "spool"
        with Tracker.open(uri=ready.uri, artifacts=ready.artifacts, spool=spool, say=say) as tracker:
            rows = RowFile(folder / "rows.jsonl", say=say)
            controls = RowFile(options.results / "controls" / "rows.jsonl", say=say)
            campaign = Campaign(ready, study, tracker, rows=rows, controls=controls)
            tags = {"bench.rule": config.rule, "bench.arch": config.arch, "bench.seed": config.seed}
            tracker.study(config.name, config=config.to_dict(), tags=tags, identity=identity)
            tracker.dataset(*ready.dataset)
            campaign.record_known()
            outcome: Outcome = "known"
            if not campaign.complete:
                outcome = engine.run(
                    campaign,
                    concurrent=ready.share.concurrent,
                    cpus_per_trial=ready.share.threads,
                    gpus_per_trial=ready.share.gpus,
                    log=folder / "ray.log",
                    say=say,
                    tick=None if watch is None else watch(campaign),
                )
            summary = campaign.summary()
            _write_best(folder, campaign, summary)
            tracker.headline(headline(summary))
            files = ("study.yaml", "rows.jsonl", "journal.log", "best.yaml")
            tracker.artifacts([folder / name for name in files if (folder / name).exists()])
            tracker.close("KILLED" if outcome == "interrupted" else "FINISHED")
            return outcome, {**summary, "folder": str(folder), "mlflow": tracker.link()}


def _write_config(folder: Path, config: StudyConfig) -> str:
    """Keep the resolved configuration with the study; the id by which MLflow tells it from others of its name."""
    path = folder / "study.yaml"
    before = read_yaml(path) if path.exists() else {}
    if before and before["config"]["trials"] > config.trials:
        raise UserError(
            f"study {config.name!r} has a budget of {before['config']['trials']} trials; --trials may grow, not shrink."
        )
    identity = str(before.get("id") or uuid.uuid4().hex)
    write_yaml(path, {"id": identity, "config": config.to_dict()})
    return identity


def _write_best(folder: Path, campaign: Campaign, summary: Mapping[str, Any]) -> None:
    """The best confirmed configuration (before any is: the search's best), as `bench train --config` takes it."""
    configs = [found["config"] for found in summary["confirmed"]]
    if not configs:
        finished = [r for r in campaign.search_rows() if r["status"] == "finished"]
        configs = [r["config"] for r in sorted(finished, key=lambda r: -r["metrics"]["val_acc"])]
    if configs:
        write_yaml(folder / "best.yaml", {**configs[0], "seed": campaign.config.seed})
