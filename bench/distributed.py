"""One trial in several processes: a team of Ray Train's, which lives as long as the worker process that asks for it.

    worker process: run_together ──► post ──► each member: trial(config, report, group=...)
                         ▲                        │ the first one's reports, its result; anybody's failure
                         └───────── post ◄────────┘

Ray Train starts the members, connects them by torch.distributed, and watches them; it decides and remembers nothing,
as Ray Tune in `bench.engine`. A team takes seconds to start, so that it serves one trial after the other.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import ray
import torch

from bench.config import TrialConfig, TrialResult
from bench.group import Group, PeerLostError
from bench.provenance import source_digest
from bench.worker import ElsewhereError, WorkerLostError, begin, code_changed, failure, function

Report = Callable[[int, Mapping[str, float]], None]

#: What Ray Train reads when a team is started: nothing of it is measured, and a dead member is noticed in a second.
_VARIABLES = {
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
#: Seconds in which a team that is told to end has to do so; whoever stays ends with this process.
_PATIENCE = 20.0


def run_together(
    config: TrialConfig, report: Report, *, trial: str, members: list[dict[str, float]], **options: Any
) -> TrialResult:
    """What ``trial(config, report, **options)`` returns, run by several processes that share each batch.

    ``trial``, as module:function, takes the `bench.group.Group` of its process as ``group`` besides; all are called
    alike. ``members``: Ray's resources of each of the processes, all the same.

    ElsewhereError for an exception in any of them, WorkerLostError if one of them is gone.
    """
    team = _team(members)
    said = {"trial": trial, "config": config.to_dict(), "options": options, "source": source_digest()}
    task = json.dumps(said)
    try:
        return team.run(task, report)
    except (ElsewhereError, WorkerLostError):
        _kept.remove(team)
        team.end()
        raise


class _Post:
    """An actor that holds what the worker process and the members of its team have for each other."""

    def __init__(self, members: int) -> None:
        self._tasks: list[asyncio.Queue[str]] = [asyncio.Queue() for _ in range(members)]
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._answers: asyncio.Queue[bool] = asyncio.Queue()

    async def hand_out(self, task: str) -> None:
        for queue in self._tasks:
            queue.put_nowait(task)

    async def task(self, rank: int) -> str:
        return await self._tasks[rank].get()

    async def send(self, message: dict[str, Any]) -> None:
        self._messages.put_nowait(message)

    async def message(self) -> dict[str, Any]:
        return await self._messages.get()

    async def answer(self, go_on: bool) -> None:
        self._answers.put_nowait(go_on)

    async def answered(self) -> bool:
        return await self._answers.get()


_kept: list[_Team] = []


def _team(members: list[dict[str, float]]) -> _Team:
    """The one of this process."""
    if not (_kept and _kept[0].alive):
        _kept[:] = [_Team(members)]
    return _kept[0]


class _Team:
    """Members that wait for tasks, and the thread that has Ray Train watch them."""

    def __init__(self, members: list[dict[str, float]]) -> None:
        self._workers, self._each = len(members), members[0]
        self._post = ray.remote(num_cpus=0)(_Post).remote(self._workers)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def run(self, task: str, report: Report) -> TrialResult:
        """As `run_together`. ``report`` may not return: the members are then told to stop, and wait for a next task."""
        try:
            ray.get(self._post.hand_out.remote(task))
            while "result" not in (message := self._next()):
                go_on = False
                try:
                    report(message["epoch"], message["metrics"])
                    go_on = True
                finally:
                    ray.get(self._post.answer.remote(go_on))
        except ray.exceptions.RayError as error:
            raise WorkerLostError(_first_line(error)) from error
        if message["traceback"] or message["blame"]:
            raise ElsewhereError(message)
        return TrialResult.from_dict(message["result"])

    def _next(self) -> dict[str, Any]:
        message: dict[str, Any] = ray.get(self._post.message.remote())
        if "lost" in message:
            raise WorkerLostError(message["lost"])
        return message

    def end(self) -> None:
        """Without its post no member goes on; when one has failed, Ray Train ends the others."""
        ray.kill(self._post)
        self._thread.join(_PATIENCE)

    def _watch(self) -> None:
        reason = "its team has come to an end"
        try:
            self._trainer().fit()
        except Exception as error:  # noqa: BLE001  (whatever it is, the team is gone: the message says so)
            reason = _first_line(error)
        self._post.send.remote({"lost": f"one of the {self._workers} that trained it together is gone: {reason}"})

    def _trainer(self) -> Any:
        os.environ.update(_VARIABLES)
        session = ray._private.worker._global_node.get_session_dir_path()  # of Ray's own files, and goes with them
        from ray import train
        from ray.train.torch import TorchConfig, TorchTrainer

        gpus = self._each.get("GPU", 0)
        return TorchTrainer(
            _member,
            train_loop_config={"post": self._post},
            # NCCL gives each process a GPU of its own, and knows no tensors on the CPU
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus >= 1 else "gloo"),
            scaling_config=train.ScalingConfig(
                num_workers=self._workers,
                use_gpu=gpus > 0,
                resources_per_worker=self._each,
            ),
            run_config=train.RunConfig(
                name=uuid.uuid4().hex,
                storage_path=f"{session}/together",
                failure_config=train.FailureConfig(max_failures=0),  # the director begins trials again
            ),
        )


def _first_line(error: BaseException) -> str:
    """What has happened, of an error of Ray's, which has many lines and often another one inside."""
    failures = getattr(error, "worker_failures", None)
    said = next(iter(failures.values())) if failures else error
    said = getattr(said, "health_check_failure", said)
    return next((line.strip() for line in str(said).splitlines() if line.strip()), type(error).__name__)


def _member(settings: dict[str, Any]) -> None:
    """The life of one process of a team."""
    from ray import train

    begin()
    context, post = train.get_context(), settings["post"]
    group = Group(rank=context.get_world_rank(), size=context.get_world_size())
    while True:
        _take_part(json.loads(ray.get(post.task.remote(group.rank))), post, group)


class _Stopped(BaseException):
    """Raised out of ``report`` in every member at once; not an Exception, so that no trial function catches it."""


def _take_part(task: dict[str, Any], post: Any, group: Group) -> None:
    """Run a task with the others. The first member speaks for all, but each says what went wrong."""
    config = TrialConfig.from_dict(task["config"])
    if begin() != task["source"]:
        ray.get(post.send.remote(code_changed(config)))
        return

    def report(epoch: int, metrics: Mapping[str, float]) -> None:
        go_on = True
        if group.rank == 0:
            plain = {k: float(v) for k, v in metrics.items()}
            ray.get(post.send.remote({"epoch": int(epoch), "metrics": plain}))
            go_on = ray.get(post.answered.remote())
        if group.sum(torch.tensor(0 if go_on else 1)).item():
            raise _Stopped

    try:
        result = function(task["trial"])(config, report, group=group, **task["options"])
    except _Stopped:
        return
    except (PeerLostError, ray.exceptions.RayError):
        raise  # nothing is wrong here
    except BaseException as error:
        ray.get(post.send.remote(failure(config, error)))
        raise
    if group.rank == 0:
        ray.get(post.send.remote({"result": result.to_dict(), "where": "", "traceback": "", "blame": ""}))
