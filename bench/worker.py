"""The inside of a worker process: a trial function in a thread, which stands still at every report."""

from __future__ import annotations

import errno
import importlib
import queue
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.config import TrialConfig, TrialResult, one_line
from bench.disk import find_disk_error
from bench.provenance import git_revision, source_digest


class _Stopped(BaseException):
    """Raised out of ``report``; not an Exception, so that no trial function catches it by mistake."""


class WorkerLostError(RuntimeError):
    """A process that took part in the trial is gone; it is begun again, as if this one were gone too."""


class ElsewhereError(RuntimeError):
    """The trial function raised an exception in another process; ``message`` is what `failure` made of it there."""

    def __init__(self, message: dict[str, Any]) -> None:
        super().__init__(message["where"])
        self.message = message


class Running:
    """A trial function that has been called, and its messages: one per report, and then its result.

    A report is ``{epoch, metrics}``; the result is ``{result, where, traceback, blame}``, the last three empty but
    for an exception, which is a result like any other (status failed), unless something else is to ``blame``: the
    "disk" or the "code" (the reason is then the line for the user), or the "memory" or "GPU memory", of which there was
    too little. All JSON-ready. But for a WorkerLostError, which is raised again where the message is waited for.
    """

    def __init__(self, task: Mapping[str, Any]) -> None:
        self._messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
        source = begin()
        self._changed = task.get("source", source) != source
        self._config = TrialConfig.from_dict(task["config"])
        self._thread = threading.Thread(target=self._work, args=(task["trial"], task["options"]), daemon=True)

    def next_message(self) -> dict[str, Any]:
        """Begin, or answer the last report with "go on"; then wait for the next message."""
        if self._thread.ident is None:
            # Not before it is asked for: Tune sets up a second worker for a trial, and drops it again, when
            # another one becomes free meanwhile. Both would train it.
            self._thread.start()
        else:
            self._answers.put(True)
        message = self._messages.get()
        if "lost" in message:
            raise WorkerLostError(message["lost"])
        return message

    def stop(self) -> None:
        """Answer the last report, if it is still open, with "stop", and wait for the end of the trial function."""
        self._answers.put(False)
        if self._thread.ident is not None:
            self._thread.join()

    def _report(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self._messages.put({"epoch": int(epoch), "metrics": {k: float(v) for k, v in metrics.items()}})
        if not self._answers.get():
            raise _Stopped

    def _work(self, trial: str, options: dict[str, Any]) -> None:
        if self._changed:
            self._messages.put(code_changed(self._config))
            return
        try:
            result = function(trial)(self._config, self._report, **options)
            if not isinstance(result, TrialResult):
                raise TypeError(f"{trial} returned {type(result).__name__}, not TrialResult")
            self._messages.put({"result": result.to_dict(), "where": "", "traceback": "", "blame": ""})
        except _Stopped:
            return
        except WorkerLostError as error:
            self._messages.put({"lost": str(error)})
        except ElsewhereError as error:
            self._messages.put(error.message)
        except BaseException as error:  # noqa: BLE001  (becomes the result; unsent, step() would wait for ever)
            self._messages.put(failure(self._config, error))


def function(name: str) -> Callable[..., Any]:
    """The trial function of this name, module:function."""
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def begin() -> str:
    """Note once and for all, while the code is being imported, which it is; `source_digest`.

    At the end of a trial of hours the files may be other ones, and the trial's row would name these.
    """
    git_revision()
    return source_digest()


def code_changed(config: TrialConfig) -> dict[str, Any]:
    """The message of a process that began with other code than the driver: no row may be made with it."""
    reason = "the code of bench changed during this run; the same command goes on, with the code as it is then."
    result = TrialResult(config=config, status="failed", reason=reason)
    return {"result": result.to_dict(), "where": "", "traceback": "", "blame": "code"}


def failure(config: TrialConfig, error: BaseException) -> dict[str, Any]:
    """The message of a trial function that has raised this."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(last.filename).name}:{last.lineno}, {last.line}"
    reason = " ".join(f"{type(error).__name__}: {error} ({where})".split())
    text = "".join(traceback.format_exception(error))
    blame = "GPU memory" if _is_of_gpu_memory(error) else "memory" if is_of_memory(error) else ""
    if fault := find_disk_error(error):
        blame, reason = "disk", str(fault)
    result = TrialResult(config=config, status="failed", reason=one_line(reason))  # a row takes half of no character
    where = f"{type(error).__name__} {where}"
    return {"result": result.to_dict(), "where": where, "traceback": text, "blame": blame}


def is_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory: Python's, numpy's and torch's own words for it, which share no class."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return "DefaultCPUAllocator: can't allocate" in str(error)


def _is_of_gpu_memory(error: BaseException) -> bool:
    """torch.OutOfMemoryError, by its name (torch need not be there); or what cuDNN and cuBLAS say in its stead."""
    if type(error).__name__ == "OutOfMemoryError":
        return True
    said = (
        "CUDA out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory",
    )
    return isinstance(error, RuntimeError) and any(text in str(error) for text in said)
