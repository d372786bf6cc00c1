"""One study's runs in MLflow: a parent run (tag bench.kind = study), and its children, told apart by tag bench.uid.

`MlflowQueue` may try an operation again whose answer was lost, so each looks before it writes: a run is found by its
uid or made, an epoch is logged if the run lacks it, parameters (which MLflow never changes) are logged once. The metric
``epoch`` is the last of each epoch: its history says which epochs are there.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.mlflow_client import Client
from bench.mlflow_queue import UnreachableError

#: MLflow's run status for each of ours. The tag ``bench.status`` keeps ours.
RUN_STATUS = {
    "finished": "FINISHED",
    "stopped": "FINISHED",
    "diverged": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}

#: A run that stands for what another one, whose id this is, stands for: the answer was lost when it was made.
DUPLICATE = "bench.duplicate"


def _emptiness(run: Any) -> tuple[bool, bool, int, int]:
    """Rises, of several runs that stand for one, from what was written to."""
    over = run.info.status in ("FINISHED", "FAILED")
    return DUPLICATE in run.data.tags, not over, -len(run.data.metrics), -len(run.data.params)


@dataclass(kw_only=True)
class _Run:
    """What MLflow has of a run. ``metrics``: the latest values; ``epochs``: those logged, None if not asked yet."""

    run_id: str
    status: str = "RUNNING"
    outcome: str | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    epochs: set[int] | None = None


def _known(run: Any) -> _Run:
    """What an MLflow run says of itself."""
    return _Run(
        run_id=run.info.run_id,
        status=run.info.status,
        outcome=run.data.tags.get("bench.status"),
        params=run.data.params,
        metrics=dict(run.data.metrics),
    )


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a run is: its uid, its name, what its configuration says, and the data set (name and digest)."""

    uid: str
    name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    dataset: Mapping[str, str] | None


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What MLflow has of a study. ``runs``: run status and ``bench.status`` by uid; ``files``: sizes of artifacts.

    ``status``: None if there is no run of it.
    """

    status: str | None = None
    runs: Mapping[str, tuple[str, str | None]] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, int | None] = field(default_factory=dict)


class Store:
    """The operations on one study at a time. One thread calls it: that of the queue, where there is one."""

    def __init__(self, uri: str, artifacts: Path | None, experiment: str, lock: Path) -> None:
        #: the id of the study's run, once it is known
        self.parent: str | None = None
        self._client = Client(uri, artifacts, experiment)
        self._lock = lock  # a file that all share who write studies of these results
        self._study = ("", "")
        self._runs: dict[str, _Run] | None = None  # of the study, by uid; None: to be looked up

    @property
    def experiment_id(self) -> str | None:
        """None until the store has been reached."""
        return self._client.experiment_id

    def deliver(self, operation: Callable[..., None], **values: Any) -> None:
        """Carry out a method. UnreachableError: it may succeed later; any other error: it never will."""
        with self._asked():
            operation(self, **values)

    def look(self, name: str, identity: str) -> Seen:
        """What MLflow has of a study now. Errors as in `deliver`."""
        with self._asked():
            parent = self._find(name, identity)
            if parent is None or self._runs is None:
                return Seen()
            runs = {uid: (run.status, run.outcome) for uid, run in self._runs.items()}
            files = self._client.files(parent.info.run_id)
            return Seen(status=parent.info.status, runs=runs, metrics=dict(parent.data.metrics), files=files)

    @contextlib.contextmanager
    def _asked(self) -> Iterator[None]:
        try:
            with self._client.asked():
                yield
        except Exception:
            self._runs = None  # what was believed of them may be wrong now
            raise

    # --- finding runs

    def _find(self, name: str, identity: str) -> Any:
        """The study's run, whose children are known from now on; None if there is none."""
        self._study, self.parent, self._runs = (name, identity), None, None
        same = [("bench.study", name), ("bench.identity", identity), ("bench.kind", "study")]
        parents = self._client.search(" AND ".join(f"tags.`{key}` = '{value}'" for key, value in same))
        if not parents:
            return None
        parent = self._one_of(parents)
        self.parent = str(parent.info.run_id)
        children: dict[str, list[Any]] = {}
        for run in self._client.search(f"tags.`mlflow.parentRunId` = '{self.parent}'"):
            children.setdefault(run.data.tags.get("bench.uid", ""), []).append(run)
        self._runs = {uid: _known(self._one_of(found)) for uid, found in children.items() if uid}
        return parent

    def _one_of(self, same: Sequence[Any]) -> Any:
        """Of the runs that stand for one the fullest, or oldest; the others are ended."""
        kept, *others = sorted(same, key=_emptiness)
        for run in others:
            if run.info.status == "RUNNING" or DUPLICATE not in run.data.tags:
                when, tags = int(time.time() * 1000), {DUPLICATE: kept.info.run_id, "bench.status": "interrupted"}
                self._client.write(run.info.run_id, when=when, tags=tags)
                self._client.end(run.info.run_id, "KILLED", when)
        return kept

    def _known_study(self) -> tuple[str, dict[str, _Run]]:
        """The id of the study's run, and its children."""
        if self._runs is None:
            self._find(*self._study)
        if self.parent is None or self._runs is None:
            raise LookupError(f"MLflow has no run of study {self._study[0]!r} (deleted meanwhile?)")
        return self.parent, self._runs

    def _child(self, uid: str) -> _Run:
        run = self._known_study()[1].get(uid)
        if run is None:
            raise LookupError(f"MLflow has no run of {uid!r} (deleted meanwhile?)")
        return run

    # --- writing to a run

    def _lacking(self, run: _Run, epoch: int, metrics: Mapping[str, float]) -> list[tuple[str, float, int]]:
        """An epoch's points, if the run lacks it; it is counted as there from now on."""
        if run.epochs is None:
            run.epochs = {point.step for point in self._client.history(run.run_id, "epoch")}
        if epoch in run.epochs:
            return []
        new = {**{key: value for key, value in metrics.items() if key != "epoch"}, "epoch": float(epoch)}
        run.metrics = run.metrics | new if epoch > max(run.epochs, default=0) else new | run.metrics
        run.epochs.add(epoch)
        return [(key, value, epoch) for key, value in new.items()]

    def _end(self, run: _Run, outcome: str, when: int) -> None:
        self._client.end(run.run_id, RUN_STATUS[outcome], when)
        run.status, run.outcome = RUN_STATUS[outcome], outcome

    def _interrupt(self, run: _Run, when: int) -> None:
        self._client.write(run.run_id, when=when, tags={"bench.status": "interrupted"})
        self._end(run, "interrupted", when)

    # --- the operations

    def begin(
        self,
        *,
        name: str,
        identity: str,
        params: Mapping[str, str],
        tags: Mapping[str, str],
        sweep: bool,
        when: int,
    ) -> None:
        """Find or make the study's run; ``sweep``: end the children that a dead driver left running."""
        with self._alone():
            parent = self._find(name, identity)
            if parent is None:
                self.parent, self._runs = self._client.create(name, tags, when), {}
        run_id, runs = self._known_study()
        known = {} if parent is None else parent.data.params
        # A parameter never changes in MLflow; what may grow (the number of trials) goes on as a tag.
        changed = {f"now.{key}": value for key, value in params.items() if known.get(key, value) != value}
        new = {key: value for key, value in params.items() if key not in known}
        self._client.write(run_id, when=when, params=new, tags={**tags, **changed})
        if parent is not None and parent.info.status != "RUNNING":
            self._client.reopen(run_id)
        for run in runs.values() if sweep else ():
            if run.status == "RUNNING":
                self._interrupt(run, when)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Two processes that look for a study's run at once would both make one."""
        try:
            self._lock.parent.mkdir(parents=True, exist_ok=True)
            file = self._lock.open("w")
        except OSError as error:
            raise UnreachableError(str(error)) from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def start(self, *, run: Description, when: int) -> None:
        """Find the child with this uid and reopen it, or make it."""
        known = self._described(run, when)
        if known.status != "RUNNING":
            self._client.reopen(known.run_id)
            known.status = "RUNNING"

    def _described(self, wanted: Description, when: int) -> _Run:
        """The child with this uid, made if need be, with its parameters, tags and data set."""
        parent, runs = self._known_study()
        tags = {**wanted.tags, "mlflow.parentRunId": parent}
        run = runs.get(wanted.uid)
        if run is None:
            run = _Run(run_id=self._client.create(wanted.name, tags, when), epochs=set())
        if changed := [key for key, value in wanted.params.items() if run.params.get(key, value) != value]:
            raise ValueError(f"{wanted.uid} was recorded with another {', '.join(changed)}")
        new = {key: value for key, value in wanted.params.items() if key not in run.params}
        self._client.write(run.run_id, when=when, params=new, tags=tags)
        run.params = wanted.params
        if wanted.dataset:
            self._client.write_dataset(run.run_id, wanted.dataset)
        runs[wanted.uid] = run
        return run

    def report(self, *, uid: str, epoch: int, metrics: Mapping[str, float], tags: Mapping[str, str], when: int) -> None:
        """Log one epoch, if the run lacks it."""
        run = self._child(uid)
        self._client.write(run.run_id, when=when, tags=tags, metrics=self._lacking(run, epoch, metrics))

    def finish(
        self,
        *,
        run: Description,
        outcome: str,
        metrics: Mapping[str, float],
        history: Sequence[Mapping[str, float]],
        tags: Mapping[str, str],
        when: int,
    ) -> None:
        """Log what the run lacks (all of it, if it is not there yet) and end it; one with this end stays as it is.

        A final metric goes to the last epoch; one whose last epoch's value differs (chance, for a diverged
        run) goes one step further, so that it is the run's latest.
        """
        known = self._known_study()[1].get(run.uid)
        if known is not None and (known.status, known.outcome) == (RUN_STATUS[outcome], outcome):
            return
        if known is None or not run.params.items() <= known.params.items():
            known = self._described(run, when)
        points = [point for n, epoch in enumerate(history, 1) for point in self._lacking(known, n, epoch)]
        there, last = known.metrics, len(history)
        final = {key: value for key, value in metrics.items() if there.get(key) != value}
        points += [(key, value, last + (key in there)) for key, value in final.items()]
        self._client.write(known.run_id, when=when, tags=tags, metrics=points)
        self._end(known, outcome, when)

    def interrupt(self, *, uid: str, when: int) -> None:
        """End a run that goes on later."""
        run = self._child(uid)
        if run.status == "RUNNING":
            self._interrupt(run, when)

    def headline(self, *, metrics: Mapping[str, float], tags: Mapping[str, str], when: int) -> None:
        """Log metrics on the study's run; a value that changed since goes one step further."""
        parent, _ = self._known_study()
        there = self._client.run(parent).data.metrics
        steps = {key: 1 + max(p.step for p in self._client.history(parent, key)) for key in metrics.keys() & there}
        points = [(key, value, steps.get(key, 0)) for key, value in metrics.items() if there.get(key) != value]
        self._client.write(parent, when=when, tags=tags, metrics=points)

    def curve(self, *, metric: str, points: Mapping[int, float], when: int) -> None:
        """Log a metric of the study's run at several steps; one that has this value there already is left alone."""
        parent, _ = self._known_study()
        by_time = sorted(self._client.history(parent, metric), key=lambda point: point.timestamp)
        there = {point.step: point.value for point in by_time}
        new = [(metric, value, step) for step, value in points.items() if there.get(step) != value]
        self._client.write(parent, when=when, metrics=new)

    def artifacts(self, *, paths: Sequence[Path], when: int) -> None:  # noqa: ARG002 (files have their own times)
        """Copy files and folders to the artifacts of the study's run; one that is there already is replaced."""
        for path in paths:
            self._client.write_file(self._known_study()[0], path)

    def dataset(self, *, dataset: Mapping[str, str], tags: Mapping[str, str], when: int) -> None:
        parent, _ = self._known_study()
        self._client.write(parent, when=when, tags=tags)
        self._client.write_dataset(parent, dataset)

    def end(self, *, status: str, when: int) -> None:
        self._client.end(self._known_study()[0], status, when)
