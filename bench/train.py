"""`bench train` and `bench evaluate`: one configuration, in this process; recorded as everything is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from bench.checkpoint import checkpoint_file, load_weights, read_checkpoint
from bench.config import TrialConfig, UserError, digest
from bench.rows import TRAININGS, RowFile, row
from bench.stores import embedded
from bench.tracking import Tracker, sharing
from bench.training import Diverged, pick_device, prepare
from bench.trial import alignment, resume, run_trial, score


def train(
    config: TrialConfig,
    *,
    results: Path,
    tracking_uri: str | None,
    checkpoint: Path | str | None,
    data_dir: str | None,
    device: str,
    read_test: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Train one configuration, a line per epoch; its row, which is also appended to results/train/rows.jsonl."""
    trial = prepare(config, data_dir=data_dir, device=device)
    if checkpoint is not None:
        resume(
            trial, checkpoint_file(str(checkpoint))
        )  # all that can be refused is refused before anything is recorded
    dataset = trial.data.name, trial.data.digest
    del trial
    uri, artifacts = (tracking_uri, None) if tracking_uri else embedded(results)
    uid = f"{TRAININGS}-{digest([config.to_dict(), time.time_ns()])}"
    rows = RowFile(results / TRAININGS / "rows.jsonl", say=say)
    with (
        sharing(results / TRAININGS) as alone,
        Tracker.open(uri=uri, artifacts=artifacts, results=results, say=say) as tracker,
    ):
        tracker.study(TRAININGS, config={}, tags={}, sweep=alone)
        for known in rows.read():
            try:
                tracker.record(known["uid"], known["kind"], known)
            except UserError as error:  # of an earlier training: this one goes on
                say(f"{rows.path}: the row of {known['uid']} is not recorded in MLflow ({error}).")
        tracker.dataset(*dataset)
        tracker.start(uid, "train", config, {"bench.rule": config.rule})

        def report(epoch: int, metrics: Mapping[str, float]) -> None:
            tracker.report(uid, epoch, metrics)
            say(
                f"epoch {epoch}/{config.epochs}  loss {metrics['train_loss']:.4f}  "
                f"val {metrics['val_acc']:.2%}{_angles(metrics)}  {metrics['seconds']:.1f} s"
            )

        result = run_trial(
            config,
            report,
            data_dir=data_dir,
            device=device,
            checkpoint=None if checkpoint is None else str(checkpoint),
            read_test=read_test,
        )
        filed = row(uid, TRAININGS, "train", result)
        rows.append(filed)
        tracker.finish(uid, result)
        if result.reason:
            say(f"{result.status}: {result.reason}")
    return filed


def _angles(metrics: Mapping[str, float]) -> str:
    """The mean angles that were measured; of W and B also what rule and activity allow."""
    angle = f"  angle {metrics['angle']:.1f}°" if "angle" in metrics else ""
    floor = f" (floor {metrics['floor_angle']:.1f}°)" if "floor_angle" in metrics else ""
    return angle + floor + (f"  dx angle {metrics['dx_angle']:.1f}°" if "dx_angle" in metrics else "")


def evaluate(
    checkpoint: Path | str, *, split: Literal["val", "test"], data_dir: str | None, device: str
) -> dict[str, Any]:
    """Accuracy and loss of the network in a checkpoint, on one split of its data set; angles, by validation examples.

    The protocol reads test once for a configuration; whoever asks for it here answers for that.
    """
    file = checkpoint_file(str(checkpoint))
    state = read_checkpoint(file, pick_device(device))
    config = TrialConfig.from_dict(state["config"])
    trial = prepare(config, data_dir=data_dir, device=device)
    load_weights(file, trial.model, state["model"])
    try:
        metrics = score(trial, split)
    except Diverged as end:
        raise UserError(f"{checkpoint}: {end}; the network in it has diverged.") from end
    if trial.conversion.swapped:
        metrics |= {name: value for name, value in alignment(trial, floor=True).items() if math.isfinite(value)}
    return {"config": config.to_dict(), "epoch": state["epoch"], "split": split, "metrics": metrics}
