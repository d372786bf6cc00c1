"""Trial functions that train nothing: what the engine's tests run in real worker processes."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.config import TrialConfig, TrialResult

Report = Callable[[int, Mapping[str, float]], None]


def accuracy(config: TrialConfig, epoch: int) -> float:
    """Grows with every epoch, and with the coefficient `sparse`."""
    return config.coefficients.get("sparse", 0.5) * epoch / config.epochs


def train(config: TrialConfig, report: Report, *, seconds: float = 0.0, checkpoint: str | None = None) -> TrialResult:
    """An epoch takes ``seconds``; the number of those done is kept in the file ``checkpoint``."""
    path = Path(checkpoint) if checkpoint else None
    done = int(path.read_text()) if path and path.exists() else 0
    history = [{"epoch": float(e), "val_acc": accuracy(config, e)} for e in range(1, done + 1)]
    for epoch in range(done + 1, config.epochs + 1):
        time.sleep(seconds)
        history.append({"epoch": float(epoch), "val_acc": accuracy(config, epoch)})
        if path:
            path.parent.mkdir(exist_ok=True)
            path.with_suffix(".new").write_text(str(epoch))
            path.with_suffix(".new").replace(path)
        report(epoch, {"val_acc": accuracy(config, epoch)})
    return TrialResult(config=config, status="finished", metrics={"val_acc": history[-1]["val_acc"]}, history=history)


def act(config: TrialConfig, report: Report, *, act: str = "train", deaths: int = 0, **options: Any) -> Any:
    """Does what ``act`` says: train (and die after the next ``deaths`` epochs), raise, exit, return nonsense, hoard."""
    if act == "raise":
        raise ValueError("no such coefficient\nin any table")
    if act == "exit":
        raise SystemExit(3)
    if act == "nonsense":
        return 42
    if act == "ask too much":
        _ask_too_much(options["asked_of"])
    if act == "hoard":
        return _hoard(config, report, options["checkpoint"])
    if act == "die later":
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def deadly(epoch: int, metrics: Mapping[str, float]) -> None:
        report(epoch, metrics)
        folder = Path(options["checkpoint"]).parent
        died = len(list(folder.glob("died-*")))
        if died < deaths:
            (folder / f"died-{died}").touch()
            print("a last word", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    result = train(config, deadly if deaths else report, **options)
    here = {
        "pid": os.getpid(),
        "threads": os.environ["OMP_NUM_THREADS"],
        "niceness": os.nice(0),
        "folder": str(Path.cwd()),
    }
    return dataclasses.replace(result, provenance=here)


def act_together(
    config: TrialConfig, report: Report, *, group: Any, act: str = "", member: int = 0, epoch: int = 0, **options: Any
) -> TrialResult:
    """Trains in earnest; after this epoch the ``member`` does what ``act`` says: die, once, or raise."""
    from bench.trial import run_trial

    def reported(done: int, metrics: Mapping[str, float]) -> None:
        report(done, metrics)
        if (act, member, epoch) == ("raise", group.rank, done):
            raise ZeroDivisionError("in one of them")
        died = Path(f"{options['checkpoint']}.died")
        if (act, member, epoch) == ("die", group.rank, done) and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return run_trial(config, reported, group=group, **options)


def _ask_too_much(asked_of: str) -> None:
    """An allocation that no machine can make, in the words of these three."""
    import numpy as np
    import torch

    size = 10**15
    {"python": bytearray, "numpy": np.empty, "torch": torch.empty}[asked_of](size)  # type: ignore[operator]


def _hoard(config: TrialConfig, report: Report, checkpoint: str) -> TrialResult:
    """One epoch, and then 2 GB of memory, used a little at a time, and held; until somebody ends this."""
    path = Path(checkpoint)
    if not path.exists():
        path.write_text("1")
        report(1, {"val_acc": accuracy(config, 1)})
    held = []
    for _ in range(40):
        held.append(b"x" * 50_000_000)
        time.sleep(0.1)
    time.sleep(60)
    return TrialResult(config=config, status="finished", metrics={"val_acc": len(held)})


def soak(config: TrialConfig, report: Report, *, checkpoint: str, **_: Any) -> TrialResult:
    """`train`, in epochs of some length, as a search calls it."""
    result = train(config, report, seconds=1.0, checkpoint=checkpoint)
    return dataclasses.replace(
        result, metrics={**result.metrics, "test_acc": 0.1, "train_seconds": 3.0}, provenance={"classes": 10}
    )
