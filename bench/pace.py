"""How long a training takes on this machine, measured with a few steps of it."""

from __future__ import annotations

import time

import torch

from bench.config import TrialConfig
from bench.place import Options
from bench.training import prepare, train_epoch

#: Steps that are timed, after as many that are not: the first ones make kernels and memory ready.
STEPS = 3


def seconds_per_epoch(config: TrialConfig, options: Options, *, threads: int) -> float:
    """Wall-clock seconds of one epoch of training, without its evaluation; trains `STEPS` steps twice for it."""
    torch.set_num_threads(threads)
    whole = prepare(config, data_dir=options.data_dir, device="cpu").data
    few = config.replace(train_examples=min(STEPS * config.batch_size, whole.sizes["train"]))
    trial = prepare(few, data_dir=options.data_dir, device=options.device)
    for _ in range(2):
        started = time.perf_counter()
        train_epoch(trial)
        if trial.device.type == "cuda":
            torch.cuda.synchronize(trial.device)
        gone = time.perf_counter() - started
    timed, steps = (data.steps("train", config.batch_size) for data in (trial.data, whole))
    return gone / timed * steps
