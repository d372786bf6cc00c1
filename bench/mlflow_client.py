"""MLflow's client, as we use it: one experiment, its runs found by a condition, and what is written to a run.

MLflow is imported when it is first asked for something, which takes seconds.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.mlflow_queue import UnreachableError
from bench.stores import alone

#: Held while a data set is entered: the trackers of one process write at the same time, each in its own thread.
_DATASETS = threading.Lock()

#: MLflow's limits a request are 100 parameters, 100 tags, 1000 metrics, and 1000 of all together.
_LIMITS = {"params": 100, "tags": 100, "metrics": 800}

#: HTTP statuses after which the same request may yet succeed: no permission (yet), timeout, too many requests.
_LATER = (401, 403, 408, 429)


def _brief(error: Exception) -> str:
    """The first line of an error, without a password, short enough for one line."""
    lines = str(error).splitlines() or [type(error).__name__]
    return re.sub(r"//[^/@\s]+@", "//***@", lines[0])[:200]


class Client:
    """Everything but `asked` is to be called within it."""

    def __init__(self, uri: str, artifacts: Path | None, experiment: str) -> None:
        self.experiment_id: str | None = None
        self._uri = uri
        self._artifacts = artifacts
        self._experiment = experiment
        self._client: Any = None

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Connected; what goes wrong within is an UnreachableError if it may succeed later."""
        try:
            self._client = self._client or self._connected()
        except Exception as error:
            # Whatever keeps the store from opening (disk, schema, package) is no fault of who asks.
            raise UnreachableError(_brief(error)) from error
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            status = error.get_http_status_code()
            if status >= 500 or status in _LATER:
                raise UnreachableError(_brief(error)) from error
            raise

    def _connected(self) -> Any:
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
        return client

    # --- what is there

    def search(self, condition: str) -> list[Any]:
        """All runs of the experiment for which it holds, the oldest first."""
        runs, token = [], None
        while True:
            page = self._client.search_runs(
                [self.experiment_id], condition, order_by=["attributes.start_time ASC"], page_token=token
            )
            runs += page
            token = page.token
            if not token:
                return runs

    def run(self, run_id: str) -> Any:
        return self._client.get_run(run_id)

    def history(self, run_id: str, metric: str) -> list[Any]:
        """All points of a metric, each with step, value and timestamp."""
        return list(self._client.get_metric_history(run_id, metric))

    def files(self, run_id: str) -> dict[str, int | None]:
        """The size of each artifact; None for a folder."""
        return {file.path: file.file_size for file in self._client.list_artifacts(run_id)}

    # --- making, reopening and ending runs

    def create(self, name: str, tags: Mapping[str, str], when: int) -> str:
        """The id of a new run."""
        return str(self._client.create_run(self.experiment_id, when, dict(tags), name).info.run_id)

    def reopen(self, run_id: str) -> None:
        self._client.update_run(run_id, "RUNNING")

    def end(self, run_id: str, status: str, when: int) -> None:
        self._client.set_terminated(run_id, status, when)

    # --- writing to a run

    def write(
        self,
        run_id: str,
        *,
        when: int,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        metrics: Iterable[tuple[str, float, int]] = (),
    ) -> None:
        """Log all of this in one request, or as few as the limits allow. ``metrics``: key, value, step."""
        from mlflow.entities import Metric, Param, RunTag

        new = {
            "params": [Param(key, value) for key, value in (params or {}).items()],
            "tags": [RunTag(key, value) for key, value in (tags or {}).items()],
            "metrics": [Metric(key, value, when, step) for key, value, step in metrics],
        }
        while any(new.values()):
            self._client.log_batch(run_id, **{what: entries[: _LIMITS[what]] for what, entries in new.items()})
            new = {what: entries[_LIMITS[what] :] for what, entries in new.items()}

    def write_dataset(self, run_id: str, dataset: Mapping[str, str]) -> None:
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

    def write_file(self, run_id: str, path: Path) -> None:
        """Copy a file, or a folder, to the artifacts; one that is there already is replaced."""
        try:
            if path.is_dir():
                self._client.log_artifacts(run_id, str(path), path.name)
            else:
                self._client.log_artifact(run_id, str(path))
        except FileNotFoundError:  # what was to be copied is gone
            raise
        except OSError as error:  # full, or not permitted: where they are kept, or the network to it
            raise UnreachableError(_brief(error)) from error
