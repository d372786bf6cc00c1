"""Saving the state of a run, and going on from it. Nothing that is read is executed."""

from __future__ import annotations

import errno
import glob
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.config import TrialConfig, UserError
from bench.disk import DiskError, on_disk

_KEYS = {"config", "epoch", "history", "model", "optimizer"}


def write_checkpoint(
    path: Path,
    *,
    config: TrialConfig,
    epoch: int,
    history: list[dict[str, float]],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write the whole state, at once or not at all: a kill, or a power cut, leaves the old file or the new one.

    DiskError if the disk does not take it.
    """
    state = {
        "config": config.to_dict(),
        "epoch": epoch,
        "history": history,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with on_disk(path):
            with temporary.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        with suppress(OSError):  # on a disk that takes no change; the next start sweeps
            temporary.unlink(missing_ok=True)


def prepare_checkpoint(path: Path) -> None:
    """Make its folder, and sweep what a killed writer left; UserError now, not after an epoch, if it is no place.

    DiskError if the disk does not take it: among others, one that was taken away, with the folder's own folder.
    """
    folder = path.parent
    if path.is_dir() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"checkpoint {path} cannot be written; name a file in a folder that can be.")
    if not folder.parent.exists():
        raise DiskError(
            f"checkpoint {path}: there is no folder {folder.parent}; make it, put it back or mount it again."
        )
    with on_disk(path):
        folder.mkdir(exist_ok=True)
        for stale in folder.glob(f"{glob.escape(path.name)}.*.new"):
            stale.unlink(missing_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A checkpoint's tensors, numbers and strings; UserError for a file that is none, or is damaged."""
    try:
        state: Any = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}.") from error
    except Exception as error:  # torch.load raises anything on a damaged file
        raise UserError(f"{path} cannot be read as a checkpoint ({type(error).__name__}); remove it.") from error
    if missing := _KEYS - set(state if isinstance(state, dict) else ()):
        raise UserError(f"{path} is not a checkpoint of bench: it has no {', '.join(sorted(missing))}.")
    return dict(state)


def load_weights(path: Path, model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Put a checkpoint's weights into a network; UserError if they are another network's."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not fit its own configuration's network; it is damaged: remove it.") from error
