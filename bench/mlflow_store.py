"""MLflow, as the delivery thread sees it: every operation on the runs of a study, and each may come twice.

So each looks before it writes: a run is found by its uid (or made), an epoch is logged if the run lacks it,
parameters (which MLflow never changes) are logged once. The metric ``epoch`` goes in the same transaction as
the epoch's other metrics: its history says which epochs are there.

What a dead driver left may come after another has gone on with its study: the tag `BEGUN` says since when. Such an
operation (``taken``, and older than that) ends nothing and reopens nothing; what it adds is what is lacking.

A parent run per study (tag bench.kind = study), and one level of children below it, found by tag bench.uid.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.delivery import Operation
from bench.mlflow_client import Client

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

#: When a driver last began with a study, or with a run of it: milliseconds, as the operation says.
BEGUN = "bench.begun"


def _begun(run: Any) -> int:
    """When a driver last began with an MLflow run; 0 if none has said so."""
    return int(run.data.tags.get(BEGUN, 0))


def _older(operation: Operation, begun: int) -> bool:
    """Whether an operation that was left behind is older than what its run, or study, was begun with since."""
    return bool(operation.get("taken")) and operation["time"] < begun


def _is_known(operation: Operation, timestamp: int) -> bool:
    """Whether a point of this time is this operation's own, or of a driver after the one that left it."""
    return operation["time"] == timestamp or _older(operation, timestamp)


def _emptiness(run: Any) -> tuple[bool, bool, int, int]:
    """Rises, of several runs that stand for one, from what was written to."""
    over = run.info.status in ("FINISHED", "FAILED")
    return DUPLICATE in run.data.tags, not over, -len(run.data.metrics), -len(run.data.params)


@dataclass(kw_only=True)
class _Run:
    """What is known of a run in MLflow. ``epochs``: those that it has; None: not asked yet."""

    run_id: str
    status: str
    outcome: str | None = None
    begun: int = 0
    epochs: set[int] | None = None


def _known(run: Any) -> _Run:
    """What an MLflow run says of itself."""
    outcome = run.data.tags.get("bench.status")
    return _Run(run_id=run.info.run_id, status=run.info.status, outcome=outcome, begun=_begun(run))


@dataclass(kw_only=True)
class _Study:
    """``made``: by this process, so that nobody else has put runs into it."""

    parent: str
    runs: dict[str, _Run]
    begun: int = 0
    made: bool = False


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What MLflow has of a study. ``runs``: run status and ``bench.status`` by uid; ``files``: sizes of artifacts."""

    status: str
    runs: Mapping[str, tuple[str, str | None]]
    metrics: Mapping[str, float]
    files: Mapping[str, int | None]


class Store:
    """The operations, carried out in MLflow. One thread at a time calls it: the delivery thread, while there is one."""

    def __init__(self, uri: str, artifacts: Path | None, experiment: str, lock: Path | None = None) -> None:
        self.parents: dict[str, str] = {}
        self._client = Client(uri, artifacts, experiment)
        self._lock = lock  # a file that all share who write studies of these results
        self._studies: dict[tuple[str, str], _Study] = {}

    @property
    def experiment_id(self) -> str | None:
        """None until the store has been reached."""
        return self._client.experiment_id

    def deliver(self, operation: Operation) -> None:
        """Carry out one operation. UnreachableError: it may succeed later; any other error: it never will."""
        with self._asked():
            OPERATIONS[operation["op"]](self, operation)

    def look(self, name: str, identity: str) -> Seen | None:
        """What MLflow has of a study now; None: nothing. Errors as in `deliver`."""
        with self._asked():
            self._studies.pop((name, identity), None)
            study = self._study({"study": name, "identity": identity})
            if study is None:
                return None
            parent = self._client.run(study.parent)
            files = self._client.files(study.parent)
            runs = {uid: (run.status, run.outcome) for uid, run in study.runs.items()}
            return Seen(status=parent.info.status, runs=runs, metrics=dict(parent.data.metrics), files=files)

    @contextlib.contextmanager
    def _asked(self) -> Iterator[None]:
        try:
            with self._client.asked():
                yield
        except Exception:
            self._studies.clear()  # what was believed of the runs may be wrong now
            raise

    # --- finding and making runs

    def _study(self, operation: Operation) -> _Study | None:
        """The study's parent run and its children, as MLflow has them; None if there is no parent yet."""
        name, identity = operation["study"], operation["identity"]
        if (name, identity) not in self._studies:
            same = [("bench.study", name), ("bench.identity", identity), ("bench.kind", "study")]
            parents = self._client.search(" AND ".join(f"tags.`{key}` = '{value}'" for key, value in same))
            if not parents:
                return None
            parent = self._one_of(parents)
            self._remember(operation, parent.info.run_id, _begun(parent))
        return self._studies[name, identity]

    def _remember(self, operation: Operation, parent: str, begun: int) -> _Study:
        same: dict[str, list[Any]] = {}
        for run in self._client.search(f"tags.`mlflow.parentRunId` = '{parent}'"):
            same.setdefault(run.data.tags["bench.uid"], []).append(run)
        runs = {uid: _known(self._one_of(found)) for uid, found in same.items()}
        self.parents[operation["study"]] = parent
        study = _Study(parent=parent, runs=runs, begun=begun)
        self._studies[operation["study"], operation["identity"]] = study
        return study

    def _one_of(self, same: Sequence[Any]) -> Any:
        """Of the runs that stand for one the fullest, or oldest; the others are ended."""
        kept, *others = sorted(same, key=_emptiness)
        for run in others:
            if run.info.status == "RUNNING" or DUPLICATE not in run.data.tags:
                self._client.write_tags(run.info.run_id, {DUPLICATE: kept.info.run_id, "bench.status": "interrupted"})
                self._client.end(run.info.run_id, "KILLED", int(time.time() * 1000))
        return kept

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Two processes that look for a study's run at once would both make one."""
        with contextlib.ExitStack() as held:
            if self._lock is not None:
                with contextlib.suppress(OSError):  # who is alone, as most are, need not wait until there is room
                    self._lock.parent.mkdir(parents=True, exist_ok=True)
                    fcntl.flock(held.enter_context(self._lock.open("w")), fcntl.LOCK_EX)
            yield

    def _known_study(self, operation: Operation) -> _Study:
        study = self._study(operation)
        if study is None:
            raise LookupError(f"MLflow has no run of study {operation['study']!r} (deleted meanwhile?)")
        return study

    def _child(self, operation: Operation) -> _Run:
        run = self._known_study(operation).runs.get(operation["uid"])
        if run is None:
            raise LookupError(f"MLflow has no run of {operation['uid']!r} (deleted meanwhile?)")
        if operation.get("taken"):
            self._refresh(run)
        return run

    def _child_or_none(self, study: _Study, operation: Operation) -> _Run | None:
        """Also one that another process has made since this one looked: a driver, or who delivers for a dead one."""
        uid = operation["uid"]
        if uid not in study.runs and not study.made:
            same = f"tags.`mlflow.parentRunId` = '{study.parent}' AND tags.`bench.uid` = '{uid}'"
            if found := self._client.search(same):
                study.runs[uid] = _known(self._one_of(found))
        elif uid in study.runs and operation.get("taken"):
            self._refresh(study.runs[uid])
        return study.runs.get(uid)

    def _refresh(self, run: _Run) -> None:
        """Look again: a living driver may have gone on with it."""
        now = _known(self._client.run(run.run_id))
        run.status, run.outcome, run.begun = now.status, now.outcome, now.begun

    def _is_stale(self, operation: Operation, study: _Study) -> bool:
        """Whether another driver has begun with the study since this operation was made."""
        if operation.get("taken"):
            study.begun = _begun(self._client.run(study.parent))
        return _older(operation, study.begun)

    # --- writing to a run

    def _write_epoch(self, run: _Run, metrics: Mapping[str, float], epoch: int, when: int) -> None:
        if run.epochs is None:
            run.epochs = {point.step for point in self._client.history(run.run_id, "epoch")}
        if epoch not in run.epochs:
            rest = {key: value for key, value in metrics.items() if key != "epoch"}
            self._client.write_metrics(run.run_id, {**rest, "epoch": epoch}, epoch, when)  # epoch last: all are there
            run.epochs.add(epoch)

    def _end(self, run: _Run, outcome: str, when: int) -> None:
        self._client.end(run.run_id, RUN_STATUS[outcome], when)
        run.status, run.outcome = RUN_STATUS[outcome], outcome

    # --- the operations

    def _begun_with(self, operation: Operation, tags: Mapping[str, str]) -> _Study:
        """The study, with a parent run that is RUNNING; but of one that another driver has begun with since."""
        self._studies.pop((operation["study"], operation["identity"]), None)  # others may have written since
        study = self._study(operation)
        if study is None:
            parent = self._client.create(operation["study"], tags, operation["time"])
            study = self._remember(operation, parent, operation["time"])
            study.made = True
        elif not _older(operation, study.begun):
            self._client.reopen(study.parent)
            study.begun = operation["time"]
        return study

    def begin(self, operation: Operation) -> None:
        """Find or make the parent run; end the children that a dead driver left running."""
        tags = {**operation["tags"], BEGUN: str(operation["time"])}
        with self._apart():
            study = self._begun_with(operation, tags)
        if _older(operation, study.begun):
            return
        changed = self._client.write_params(study.parent, operation["params"])
        # A parameter never changes in MLflow; what may grow (the number of trials) goes on as a tag.
        self._client.write_tags(study.parent, {**tags, **{f"now.{key}": v for key, v in changed.items()}})
        live = study.runs if operation["live"] is None else operation["live"]
        for uid, run in study.runs.items():
            if run.status == "RUNNING" and uid not in live and not _older(operation, run.begun):
                self._interrupt(run, operation["time"])

    def start(self, operation: Operation) -> None:
        """Find the child with this uid and reopen it, or make it."""
        study, when = self._known_study(operation), operation["time"]
        tags = {**operation["tags"], "mlflow.parentRunId": study.parent, BEGUN: str(when)}
        run = self._child_or_none(study, operation)
        if run is None:
            run_id = self._client.create(operation["name"], tags, when)
            run = _Run(run_id=run_id, status="RUNNING", begun=when, epochs=set())
            study.runs[operation["uid"]] = run
        elif _older(operation, run.begun):
            return
        if changed := self._client.write_params(run.run_id, operation["params"]):
            raise ValueError(f"{operation['uid']} was recorded with another {', '.join(changed)}")
        delivered = operation.get("taken") and run.begun == when  # once before; it may be over by now
        if run.status != "RUNNING" and not delivered:
            self._client.reopen(run.run_id)
            run.status = "RUNNING"
        if run.status == "RUNNING":
            self._client.write_tags(run.run_id, tags)
        run.begun = when
        if operation["dataset"]:
            self._client.write_dataset(run.run_id, operation["dataset"])
        if run.status == "RUNNING" and self._is_stale(operation, study):  # its driver is dead, and was swept after
            self._interrupt(run, when)

    def report(self, operation: Operation) -> None:
        """Log one epoch, if the run lacks it."""
        run = self._child(operation)
        if not _older(operation, run.begun):
            self._write_epoch(run, operation["metrics"], operation["epoch"], operation["time"])
            self._client.write_tags(run.run_id, operation["tags"])

    def finish(self, operation: Operation) -> None:
        """Log the epochs that are missing and the final metrics, then end the run.

        A final metric goes to the last epoch; one whose last epoch's value differs (chance, for a diverged
        run) goes one step further, so that it is the run's latest.
        """
        run, when = self._child(operation), operation["time"]
        if _older(operation, run.begun):
            return
        history, final = operation["history"], operation["metrics"]
        for metrics in history:
            self._write_epoch(run, metrics, int(metrics["epoch"]), when)
        last = int(history[-1]["epoch"]) if history else 0
        there = self._client.run(run.run_id).data.metrics
        new = {key: value for key, value in final.items() if there.get(key) != value}
        self._client.write_metrics(run.run_id, {k: v for k, v in new.items() if k not in there}, last, when)
        self._client.write_metrics(run.run_id, {k: v for k, v in new.items() if k in there}, last + 1, when)
        self._client.write_tags(run.run_id, operation["tags"])
        self._end(run, operation["outcome"], when)

    def record(self, operation: Operation) -> None:
        """A whole finished run at once; one that is there with this outcome stays as it is."""
        run = self._known_study(operation).runs.get(operation["uid"])
        if run is None or run.status == "RUNNING" or run.outcome != operation["outcome"]:
            self.start({**operation, "tags": {**operation["tags"], "bench.status": "running"}})
            self.finish(operation)

    def interrupt(self, operation: Operation) -> None:
        """End a run that goes on elsewhere, or later; not one that has come to its end meanwhile."""
        run = self._child(operation)
        self._refresh(run)
        if run.status == "RUNNING" and not _older(operation, run.begun):
            self._interrupt(run, operation["time"])

    def _interrupt(self, run: _Run, when: int) -> None:
        self._client.write_tags(run.run_id, {"bench.status": "interrupted"})
        self._end(run, "interrupted", when)

    def headline(self, operation: Operation) -> None:
        """Log metrics on the parent; a value that changed since goes one step further."""
        parent = self._known_study(operation).parent
        for key, value in operation["metrics"].items():
            points = sorted(self._client.history(parent, key), key=lambda point: point.step)
            repeated = any(_is_known(operation, point.timestamp) for point in points)
            if not repeated and (not points or points[-1].value != value):
                self._client.write_metrics(
                    parent, {key: value}, points[-1].step + 1 if points else 0, operation["time"]
                )
        self._client.write_tags(parent, operation["tags"])

    def curve(self, operation: Operation) -> None:
        """Log a metric of the parent at several steps; one that has this value there already is left alone."""
        parent, name = self._known_study(operation).parent, operation["metric"]
        history = self._client.history(parent, name)
        there = {point.step: point.value for point in sorted(history, key=lambda point: point.timestamp)}
        repeated = {point.step for point in history if _is_known(operation, point.timestamp)}
        for step, value in operation["points"].items():
            if int(step) not in repeated and there.get(int(step)) != value:
                self._client.write_metrics(parent, {name: value}, int(step), operation["time"])

    def artifacts(self, operation: Operation) -> None:
        """Copy files and folders to the parent's artifacts; one that is there already is replaced."""
        parent = self._known_study(operation).parent
        for path in operation["paths"]:
            self._client.write_file(parent, Path(path))

    def dataset(self, operation: Operation) -> None:
        parent = self._known_study(operation).parent
        self._client.write_tags(parent, operation["tags"])
        self._client.write_dataset(parent, operation["dataset"])

    def end(self, operation: Operation) -> None:
        study = self._known_study(operation)
        if not self._is_stale(operation, study):
            self._client.end(study.parent, operation["status"], operation["time"])


#: What the queue may hold, by the operation's "op".
OPERATIONS: dict[str, Callable[[Store, Operation], None]] = {
    "begin": Store.begin,
    "start": Store.start,
    "report": Store.report,
    "finish": Store.finish,
    "record": Store.record,
    "interrupt": Store.interrupt,
    "headline": Store.headline,
    "curve": Store.curve,
    "artifacts": Store.artifacts,
    "dataset": Store.dataset,
    "end": Store.end,
}
