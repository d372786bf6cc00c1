"""What the driver logs to MLflow: `Tracker` turns it into operations and queues them. It never waits, nor fails.

One writer, the driver: a parent run per study, a child run per trial, confirmation and control. The operations are
`bench.mlflow_store`'s, carried out in the thread of `bench.mlflow_queue`; MLflow is imported there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from bench.config import Kind, TrialConfig, TrialResult, UserError
from bench.disk import on_disk
from bench.files import take
from bench.mlflow_queue import MlflowQueue
from bench.mlflow_store import Description, Store
from bench.provenance import git_revision
from bench.rows import flatten, result_of
from bench.stores import check_uri, shown

#: The longest value of a parameter or tag that older servers take too, in characters.
_LONGEST = 5000
#: What MLflow's names may not hold, and a rule's may: amp+null.
_NOT_IN_A_NAME = re.compile(r"[^\w\-. :/]")
#: MLflow's steps are whole numbers; the levels of noise and of attacks are not.
STEPS_PER_LEVEL = 1_000_000


class Tracker:
    """The record of one study in MLflow. Every method but ``close`` returns at once.

    Use it as a context: left by an exception, it ends the open runs as interrupted (KILLED). In order:
    ``open``, ``study``, ``dataset``, then ``start``, ``report``, ``finish`` per run, ``record`` for rows that
    are finished already, ``headline``, ``artifacts``, ``close``.
    """

    def __init__(self, store: Store, uri: str, queue: MlflowQueue | None = None) -> None:
        """Make one that records at once, and raises what goes wrong, if there is no ``queue``."""
        self._store, self._uri, self._queue = store, uri, queue
        self._study = ""
        self._dataset: dict[str, str] | None = None
        self._open: dict[str, Description] = {}
        self._over = False
        self._lost = 0

    @classmethod
    def open(
        cls,
        *,
        uri: str,
        artifacts: Path | None,
        results: Path,
        experiment: str = "bench",
        say: Callable[[str], None] = print,
    ) -> Self:
        """Make a tracker that writes to the MLflow at ``uri`` in the background.

        Args:
            uri: `bench.stores.embedded` gives the default one.
            artifacts: where a new experiment keeps files; None: where the server says.
            results: the folder of the rows, in which those who write to MLflow keep out of each other's way.
            say: receives lines for the user, also from the thread.

        Raises:
            UserError: the address cannot work.
        """
        check_uri(uri)
        store = Store(uri, artifacts, experiment, results / "mlflow.lock")
        return cls(store, uri, MlflowQueue(f"MLflow at {shown(uri)}", say))

    def study(
        self,
        name: str,
        *,
        config: Mapping[str, Any],
        tags: Mapping[str, Any] | None = None,
        identity: str | None = None,
        sweep: bool = True,
    ) -> None:
        """Begin or go on with a study: its parent run is found by name and ``identity``, or made.

        Args:
            identity: tells this study from another of the same name on a shared server (default: the name).
            tags: also in place of our own git revision.
            sweep: end children that a dead driver left RUNNING as interrupted; not where others may be at work.
        """
        for text in (name, identity or ""):
            if set(text) & set("'\"`\\"):
                raise UserError(f"study {text!r}: a name with quotes or backslashes cannot be searched for; rename it.")
        self._study, identity = name, identity or name
        revision = {"bench.git_revision": git_revision(), **(tags or {})}
        ours = self._tags({**revision, "bench.kind": "study", "bench.identity": identity})
        self._put(Store.begin, name=name, identity=identity, params=_texts(config), tags=ours, sweep=sweep)

    def dataset(self, name: str, digest: str) -> None:
        """The data set of this study: an MLflow input of the parent and of every child, and tags."""
        self._dataset = {"name": name, "digest": digest}
        tags = {"bench.dataset": name, "bench.dataset_digest": digest}
        self._put(Store.dataset, dataset=self._dataset, tags=self._tags(tags))

    def start(
        self,
        uid: str,
        kind: Kind,
        config: TrialConfig,
        tags: Mapping[str, Any] | None = None,
        evaluation: Mapping[str, Any] | None = None,
    ) -> None:
        """A run begins, or goes on: one with this uid is reopened. ``evaluation``: as in TrialResult."""
        more = {"bench.status": "running", "bench.git_revision": git_revision(), **(tags or {})}
        run = self._described(uid, kind, config, evaluation or {}, more)
        self._put(Store.start, run=run)
        self._open[uid] = run

    def report(self, uid: str, epoch: int, metrics: Mapping[str, float]) -> None:
        """One epoch's metrics, at step = epoch. What is not finite becomes the tag ``bench.not_finite``."""
        if uid not in self._open:
            raise ValueError(f"report of {uid!r} before start, or after its end")
        kept, dropped = _finite(metrics)
        tags = {"bench.not_finite": f"{', '.join(dropped)} in epoch {epoch}"} if dropped else {}
        self._put(Store.report, uid=uid, epoch=epoch, metrics=kept, tags=tags)

    def finish(self, uid: str, result: TrialResult, extra_tags: Mapping[str, Any] | None = None) -> None:
        """A run's end: its final metrics, status, reason and provenance; epochs that were not reported, too."""
        if uid not in self._open:
            raise ValueError(f"finish of {uid!r} before start, or after its end")
        self._put(Store.finish, run=self._open.pop(uid), **self._ended(result, extra_tags or {}))

    def record(self, uid: str, kind: Kind, row: Mapping[str, Any]) -> None:
        """A finished run from its row, whole: a control of another study, or what a killed driver left out.

        A run that is in this study already, with this end, stays as it is.
        """
        result = result_of(row)
        more = {} if row["study"] == self._study else {"bench.from_study": row["study"]}
        revision = {"bench.git_revision": result.provenance.get("git_revision")}
        run = self._described(uid, kind, result.config, result.evaluation, revision)
        self._put(Store.finish, run=run, **self._ended(result, more))

    def interrupt(self) -> None:
        """End all open runs as interrupted (KILLED); ``start`` with the same uid reopens one."""
        for uid in sorted(self._open):
            self._put(Store.interrupt, uid=uid)
        self._open.clear()

    def headline(self, metrics: Mapping[str, float]) -> None:
        """The study's own numbers, on the parent run; those that are not finite become a tag."""
        kept, dropped = _finite(metrics)
        tags = {"bench.not_finite": ", ".join(dropped)} if dropped else {}
        self._put(Store.headline, metrics={metric_name(name): value for name, value in kept.items()}, tags=tags)

    def curve(self, name: str, points: Mapping[float, float]) -> None:
        """A curve of the study: the metric ``name`` on the parent run, at step = level · 10⁶ (MLflow's are whole).

        A value that is there already is not logged again. In names, what MLflow forbids becomes "-".
        """
        finite = {level: float(value) for level, value in points.items() if math.isfinite(value)}
        steps = {round(level * STEPS_PER_LEVEL): value for level, value in finite.items()}
        self._put(Store.curve, metric=metric_name(name), points=steps)

    def artifacts(self, paths: Iterable[Path]) -> None:
        """Files and folders for the parent run; they are read when they are delivered."""
        found = [path.resolve() for path in paths]
        if missing := [str(path) for path in found if not path.exists()]:
            raise UserError(f"no such file for MLflow: {', '.join(missing)}; write it before it is recorded.")
        self._put(Store.artifacts, paths=found)

    def flush(self, timeout: float) -> bool:
        """Wait until all is delivered; False if it is not after so many seconds."""
        return self._queue is None or self._queue.flush(timeout)

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED", timeout: float = 30.0) -> int:
        """`end`, and deliver what is left for up to ``timeout`` seconds; how many operations MLflow did not take.

        `bench sync`, and the next start of the same command, record from the rows what is lacking then.
        """
        self.end(status)
        self._lost = 0 if self._queue is None else self._queue.close(timeout)
        return self._lost

    def end(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """End the parent run with this status, and runs that are still open as interrupted; what follows is ignored."""
        if not self._over:
            self._over = True
            self.interrupt()
            if self._study:
                self._put(Store.end, status=status)

    def link(self) -> dict[str, Any]:
        """Where this study is in MLflow; ids are None until the store has been reached. ``lost``: as `close` says."""
        return {
            "tracking_uri": shown(self._uri),
            "experiment_id": self._store.experiment_id,
            "parent_run_id": self._store.parent,
            "study": self._study,
            "lost": self._lost,
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("FINISHED" if kind is None else "KILLED" if not issubclass(kind, Exception) else "FAILED")

    def _put(self, method: Callable[..., None], **values: Any) -> None:
        if not self._study:
            raise ValueError(f"{method.__name__} before study")
        operation = partial(self._store.deliver, method, **values, when=int(time.time() * 1000))
        if self._queue is None:
            operation()
        else:
            self._queue.put(operation)

    def _tags(self, tags: Mapping[str, Any]) -> dict[str, str]:
        return _texts({"bench.study": self._study, **{k: v for k, v in tags.items() if v is not None}})

    def _described(
        self, uid: str, kind: Kind, config: TrialConfig, evaluation: Mapping[str, Any], more: Mapping[str, Any]
    ) -> Description:
        names = ("rule", "arch", "dataset", "seed")
        tags = {"bench.uid": uid, "bench.kind": kind, **{f"bench.{n}": getattr(config, n) for n in names}, **more}
        params = config.to_dict() | ({"evaluation": dict(evaluation)} if evaluation else {})
        name = self._run_name(uid, kind, config, evaluation)
        return Description(uid=uid, name=name, params=_texts(params), tags=self._tags(tags), dataset=self._dataset)

    def _run_name(self, uid: str, kind: Kind, config: TrialConfig, evaluation: Mapping[str, Any]) -> str:
        """What tells a run from its neighbours, first: MLflow's table shows some twenty letters of a name."""
        if kind == "robustness":
            site, level = evaluation.get("site", "update"), evaluation.get("level", config.update_noise)
            through = " through B" if evaluation.get("gradient") == "feedback" else ""
            what = f"{site}{through} {level:g}" if evaluation or level else "training"
            own = f"{config.rule} {what} seed {config.seed}"
        elif kind == "transfer":
            own = f"{config.rule} on {config.arch} seed {config.seed} {uid[-6:]}"
        elif kind in ("confirm", "control"):
            own = f"{kind} {config.rule} seed {config.seed}"
        else:
            own = f"{kind} {uid.removeprefix(f'{self._study}-')}"
        return f"{own} · {self._study}"

    def _ended(self, result: TrialResult, more: Mapping[str, Any]) -> dict[str, Any]:
        """How a run ended: outcome, metrics, history and tags."""
        kept, dropped = _finite(result.metrics)
        history = [_finite(epoch)[0] for epoch in result.history]
        tags = {"bench.status": result.status, "bench.reason": result.reason, **more}
        tags |= dict(flatten({"provenance": result.provenance}))
        if dropped:
            tags["bench.not_finite"] = ", ".join(dropped)
        return {"outcome": result.status, "metrics": kept, "history": history, "tags": self._tags(tags)}


@contextlib.contextmanager
def sharing(folder: Path) -> Iterator[bool]:
    """Write to a study that has no driver of its own, beside others who do; gives whether there is none of them."""
    with contextlib.ExitStack() as held:
        with on_disk(folder / "lock"):
            folder.mkdir(parents=True, exist_ok=True)
            file = held.enter_context((folder / "lock").open("a+"))  # NFS locks for reading what is open for it
            alone = take(file)
            fcntl.flock(file, fcntl.LOCK_SH)
        yield alone


def _finite(metrics: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
    """The finite ones, and the names of the others: MLflow keeps NaN badly, and its charts fail on it."""
    kept = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
    return kept, [name for name in metrics if name not in kept]


def metric_name(text: str) -> str:
    """As MLflow takes it: amp+null is amp-null there."""
    return _NOT_IN_A_NAME.sub("-", text)


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Nested values as MLflow's flat text: ``coefficients.decay`` = 0.001; cut where it is too long."""
    flat = {
        metric_name(name): value if isinstance(value, str) else json.dumps(value) for name, value in flatten(values)
    }
    return {name: text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…" for name, text in flat.items()}
