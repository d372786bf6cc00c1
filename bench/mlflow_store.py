"""MLflow, as the delivery thread sees it: every operation on the runs of a study, and each may come twice.

So each looks before it writes: a run is found by its uid (or made), an epoch is logged if the run lacks it,
parameters (which MLflow never changes) are logged once. The metric ``epoch`` goes in the same transaction as
the epoch's other metrics: its history says which epochs are there.

A parent run per study (tag bench.kind = study), and one level of children below it, found by tag bench.uid.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.delivery import Operation, UnreachableError
from bench.stores import alone

#: MLflow's run status for each of ours. The tag ``bench.status`` keeps ours.
RUN_STATUS = {
    "finished": "FINISHED",
    "stopped": "FINISHED",
    "diverged": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}

#: Held while a data set is entered: the trackers of one process write at the same time, each in its own thread.
_DATASETS = threading.Lock()

#: MLflow's limits a request: metrics; parameters or tags.
_METRICS, _ENTRIES = 1000, 100

#: HTTP statuses after which the same request may yet succeed: no permission (yet), timeout, too many requests.
_LATER = (401, 403, 408, 429)


def _parts(entries: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for begin in range(0, len(entries), size):
        yield entries[begin : begin + size]


def _brief(error: Exception) -> str:
    """The first line of an error, without a password, short enough for one line."""
    lines = str(error).splitlines() or [type(error).__name__]
    return re.sub(r"//[^/@\s]+@", "//***@", lines[0])[:200]


@dataclass(kw_only=True)
class _Run:
    """What is known of a run in MLflow. ``epochs``: those that it has; None: not asked yet."""

    run_id: str
    status: str
    outcome: str | None = None
    epochs: set[int] | None = None


@dataclass(kw_only=True)
class _Study:
    parent: str
    runs: dict[str, _Run]


class Store:
    """The operations, carried out in MLflow. Only the delivery thread calls it."""

    def __init__(self, uri: str, artifacts: Path | None, experiment: str, lock: Path | None = None) -> None:
        self.experiment_id: str | None = None
        self.parents: dict[str, str] = {}
        self._uri = uri
        self._artifacts = artifacts
        self._experiment = experiment
        self._lock = lock  # a file that the drivers of a study share
        self._client: Any = None
        self._studies: dict[tuple[str, str], _Study] = {}

    def deliver(self, operation: Operation) -> None:
        """Carry out one operation. UnreachableError: it may succeed later; any other error: it never will."""
        try:
            self._connect()
        except Exception as error:
            # Whatever keeps the store from opening (disk, schema, package) is no fault of the operation.
            raise UnreachableError(_brief(error)) from error
        from mlflow.exceptions import MlflowException

        try:
            OPERATIONS[operation["op"]](self, operation)
        except MlflowException as error:
            self._studies.clear()  # what was believed of the runs may be wrong now
            status = error.get_http_status_code()
            if status >= 500 or status in _LATER:
                raise UnreachableError(_brief(error)) from error
            raise

    def _connect(self) -> None:
        if self._client is not None:
            return
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # the queue retries
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient

        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        with alone(self._uri):
            client = MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)
            found = client.get_experiment_by_name(self._experiment)
            if found is None:
                place = self._artifacts.resolve().as_uri() if self._artifacts else None
                self.experiment_id = client.create_experiment(self._experiment, artifact_location=place)
            elif found.lifecycle_stage != "active":
                raise RuntimeError(f"its experiment {self._experiment!r} is deleted; restore it in MLflow")
            else:
                self.experiment_id = found.experiment_id
        self._client = client

    # --- finding and making runs

    def _search(self, condition: str) -> list[Any]:
        runs, token = [], None
        while True:
            page = self._client.search_runs(
                [self.experiment_id], condition, order_by=["attributes.start_time ASC"], page_token=token
            )
            runs += page
            token = page.token
            if not token:
                return runs

    def _study(self, operation: Operation) -> _Study | None:
        """The study's parent run and its children, as MLflow has them; None if there is no parent yet."""
        name, identity = operation["study"], operation["identity"]
        if (name, identity) not in self._studies:
            same = [("bench.study", name), ("bench.identity", identity), ("bench.kind", "study")]
            parents = self._search(" AND ".join(f"tags.`{key}` = '{value}'" for key, value in same))
            if not parents:
                return None
            self._remember(operation, parents[0].info.run_id)
        return self._studies[name, identity]

    def _remember(self, operation: Operation, parent: str) -> _Study:
        runs: dict[str, _Run] = {}
        for run in self._search(f"tags.`mlflow.parentRunId` = '{parent}'"):
            tags = run.data.tags
            known = _Run(run_id=run.info.run_id, status=run.info.status, outcome=tags.get("bench.status"))
            runs.setdefault(tags["bench.uid"], known)
        self.parents[operation["study"]] = parent
        study = _Study(parent=parent, runs=runs)
        self._studies[operation["study"], operation["identity"]] = study
        return study

    def _of_others(self, operation: Operation) -> _Run | None:
        """A child that another driver made, since this one looked."""
        study = self._known_study(operation)
        same = f"tags.`mlflow.parentRunId` = '{study.parent}' AND tags.`bench.uid` = '{operation['uid']}'"
        for run in self._search(same):
            made = _Run(run_id=run.info.run_id, status=run.info.status, outcome=run.data.tags.get("bench.status"))
            return study.runs.setdefault(operation["uid"], made)
        return None

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Two drivers that look for a study's run at once would both make one."""
        if self._lock is None:
            yield
            return
        try:
            self._lock.parent.mkdir(parents=True, exist_ok=True)
            file = self._lock.open("w")
        except OSError as error:
            raise UnreachableError(_brief(error)) from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
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
        return run

    def _create(self, operation: Operation, tags: Mapping[str, str], name: str) -> str:
        made = self._client.create_run(self.experiment_id, operation["time"], dict(tags), name)
        return str(made.info.run_id)

    # --- writing to a run

    def _write_params(self, run_id: str, params: Mapping[str, str]) -> dict[str, str]:
        """Log the parameters that the run lacks; those that it has with another value are returned."""
        from mlflow.entities import Param

        there = self._client.get_run(run_id).data.params
        new = [Param(key, value) for key, value in params.items() if key not in there]
        for part in _parts(new, _ENTRIES):
            self._client.log_batch(run_id, params=part)
        return {key: value for key, value in params.items() if there.get(key, value) != value}

    def _write_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        for part in _parts([RunTag(key, value) for key, value in tags.items()], _ENTRIES):
            self._client.log_batch(run_id, tags=part)

    def _write_metrics(self, run_id: str, metrics: Mapping[str, float], step: int, when: int) -> None:
        from mlflow.entities import Metric

        for part in _parts([Metric(key, value, when, step) for key, value in metrics.items()], _METRICS):
            self._client.log_batch(run_id, metrics=part)

    def _write_epoch(self, run: _Run, metrics: Mapping[str, float], epoch: int, when: int) -> None:
        if run.epochs is None:
            run.epochs = {point.step for point in self._client.get_metric_history(run.run_id, "epoch")}
        if epoch not in run.epochs:
            rest = {key: value for key, value in metrics.items() if key != "epoch"}
            self._write_metrics(run.run_id, {**rest, "epoch": epoch}, epoch, when)  # epoch last: all are there
            run.epochs.add(epoch)

    def _write_dataset(self, run_id: str, dataset: Mapping[str, str]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        source = json.dumps({"name": dataset["name"], "sha256": dataset["digest"]})
        entry = Dataset(dataset["name"][:500], dataset["digest"][:36], "bench", source)
        inputs = [DatasetInput(entry, [InputTag("mlflow.data.context", "training")])]
        with _DATASETS:
            try:
                self._client.log_inputs(run_id, inputs)
            except MlflowException:  # MLflow looks and then inserts: another writer may have been between, once
                self._client.log_inputs(run_id, inputs)

    def _end(self, run: _Run, outcome: str, when: int) -> None:
        self._client.set_terminated(run.run_id, RUN_STATUS[outcome], when)
        run.status, run.outcome = RUN_STATUS[outcome], outcome

    # --- the operations

    def begin(self, operation: Operation) -> None:
        """Find or make the parent run; end the children that a dead driver left running."""
        with self._apart():
            self._studies.pop((operation["study"], operation["identity"]), None)  # others may have written since
            study = self._study(operation)
            if study is None:
                study = self._remember(operation, self._create(operation, operation["tags"], operation["study"]))
            else:
                self._client.update_run(study.parent, "RUNNING")
        changed = self._write_params(study.parent, operation["params"])
        # A parameter never changes in MLflow; what may grow (the number of trials) goes on as a tag.
        self._write_tags(study.parent, {**operation["tags"], **{f"now.{key}": v for key, v in changed.items()}})
        live = study.runs if operation["live"] is None else operation["live"]
        for uid, run in study.runs.items():
            if run.status == "RUNNING" and uid not in live:
                self._interrupt(run, operation["time"])

    def start(self, operation: Operation) -> None:
        """Find the child with this uid and reopen it, or make it."""
        study = self._known_study(operation)
        tags = {**operation["tags"], "mlflow.parentRunId": study.parent}
        run = study.runs.get(operation["uid"]) or (self._of_others(operation) if operation.get("shared") else None)
        if run is None:
            run = _Run(run_id=self._create(operation, tags, operation["name"]), status="RUNNING", epochs=set())
            study.runs[operation["uid"]] = run
        if changed := self._write_params(run.run_id, operation["params"]):
            raise ValueError(f"{operation['uid']} was recorded with another {', '.join(changed)}")
        if run.status != "RUNNING":
            self._client.update_run(run.run_id, "RUNNING")
            run.status = "RUNNING"
        self._write_tags(run.run_id, tags)
        if operation["dataset"]:
            self._write_dataset(run.run_id, operation["dataset"])

    def report(self, operation: Operation) -> None:
        """Log one epoch, if the run lacks it."""
        run = self._child(operation)
        self._write_epoch(run, operation["metrics"], operation["epoch"], operation["time"])
        self._write_tags(run.run_id, operation["tags"])

    def finish(self, operation: Operation) -> None:
        """Log the epochs that are missing and the final metrics, then end the run.

        A final metric goes to the last epoch; one whose last epoch's value differs (chance, for a diverged
        run) goes one step further, so that it is the run's latest.
        """
        run, when = self._child(operation), operation["time"]
        history, final = operation["history"], operation["metrics"]
        for metrics in history:
            self._write_epoch(run, metrics, int(metrics["epoch"]), when)
        last = int(history[-1]["epoch"]) if history else 0
        there = self._client.get_run(run.run_id).data.metrics
        new = {key: value for key, value in final.items() if there.get(key) != value}
        self._write_metrics(run.run_id, {k: v for k, v in new.items() if k not in there}, last, when)
        self._write_metrics(run.run_id, {k: v for k, v in new.items() if k in there}, last + 1, when)
        self._write_tags(run.run_id, operation["tags"])
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
        if self._client.get_run(run.run_id).info.status == "RUNNING":
            self._interrupt(run, operation["time"])

    def _interrupt(self, run: _Run, when: int) -> None:
        self._write_tags(run.run_id, {"bench.status": "interrupted"})
        self._end(run, "interrupted", when)

    def headline(self, operation: Operation) -> None:
        """Log metrics on the parent; a value that changed since goes one step further."""
        parent = self._known_study(operation).parent
        for key, value in operation["metrics"].items():
            points = sorted(self._client.get_metric_history(parent, key), key=lambda point: point.step)
            repeated = any(point.timestamp == operation["time"] for point in points)
            if not repeated and (not points or points[-1].value != value):
                self._write_metrics(parent, {key: value}, points[-1].step + 1 if points else 0, operation["time"])
        self._write_tags(parent, operation["tags"])

    def curve(self, operation: Operation) -> None:
        """Log a metric of the parent at several steps; one that has this value there already is left alone."""
        parent, name = self._known_study(operation).parent, operation["metric"]
        history = self._client.get_metric_history(parent, name)
        there = {point.step: point.value for point in sorted(history, key=lambda point: point.timestamp)}
        repeated = {point.step for point in history if point.timestamp == operation["time"]}
        for step, value in operation["points"].items():
            if int(step) not in repeated and there.get(int(step)) != value:
                self._write_metrics(parent, {name: value}, int(step), operation["time"])

    def artifacts(self, operation: Operation) -> None:
        """Copy files and folders to the parent's artifacts; one that is there already is replaced."""
        parent = self._known_study(operation).parent
        for path in operation["paths"]:
            if Path(path).is_dir():
                self._client.log_artifacts(parent, path, Path(path).name)
            else:
                self._client.log_artifact(parent, path)

    def dataset(self, operation: Operation) -> None:
        parent = self._known_study(operation).parent
        self._write_tags(parent, operation["tags"])
        self._write_dataset(parent, operation["dataset"])

    def end(self, operation: Operation) -> None:
        self._client.set_terminated(self._known_study(operation).parent, operation["status"], operation["time"])


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
