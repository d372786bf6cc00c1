"""Saving the state of a run, and going on from it. Nothing that is read is executed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.config import TrialConfig, UserError

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
    """Write the whole state, at once or not at all: a process that is killed leaves the old file or the new one."""
    state = {
        "config": config.to_dict(),
        "epoch": epoch,
        "history": history,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        torch.save(state, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def prepare_checkpoint(path: Path) -> None:
    """Make its folder, and sweep what a killed writer left; UserError now, not after an epoch, if it is no place."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f"{path.name}.*.new"):
            stale.unlink(missing_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise UserError(f"checkpoint {path} cannot be written; name a file in a folder that can be.")
    except OSError as error:
        raise UserError(f"checkpoint {path}: {error.strerror}; name a file in a folder that can be written.") from error


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
    if wrong := [name for name, fits in _FITS.items() if not fits(state[name])]:
        raise UserError(f"{path} is not a checkpoint of bench: its {wrong[0]} is of another kind; remove it.")
    if len(state["history"]) != state["epoch"]:
        raise UserError(
            f"{path} is damaged: {state['epoch']} epochs, {len(state['history'])} in its history; remove it."
        )
    return dict(state)


def _is_history(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(epoch, dict)
        and epoch.get("epoch") == number
        and all(isinstance(name, str) and isinstance(each, int | float) for name, each in epoch.items())
        for number, epoch in enumerate(value, 1)
    )


#: What is not looked at elsewhere before it is used.
_FITS: dict[str, Callable[[Any], bool]] = {
    "config": lambda value: isinstance(value, dict),
    "epoch": lambda value: type(value) is int and value >= 0,
    "history": _is_history,
    "model": lambda value: isinstance(value, dict) and all(isinstance(each, torch.Tensor) for each in value.values()),
    "optimizer": lambda value: isinstance(value, dict),
}


def load_weights(path: Path, model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Put a checkpoint's weights into a network; UserError if they are another network's."""
    error = UserError(f"{path} does not fit its own configuration's network; it is damaged: remove it.")
    for name, own in model.state_dict().items():  # torch would turn numbers of another type into these
        if name in weights and (weights[name].dtype, weights[name].layout) != (own.dtype, own.layout):
            raise error
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as cause:
        raise error from cause


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Put a checkpoint's momenta into an optimizer; UserError if they, or its settings, are another's."""
    error = UserError(f"{path} does not fit its own configuration's optimizer; it is damaged: remove it.")
    before, params = _settings(optimizer), [p for group in optimizer.param_groups for p in group["params"]]
    try:
        fits = all(_fit(params[index], kept["momentum_buffer"]) for index, kept in state["state"].items())
        if fits:  # torch would turn numbers of another type into these, too
            optimizer.load_state_dict(dict(state))
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as cause:
        raise error from cause
    if not fits or _settings(optimizer) != before:
        raise error


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, tuple[type, Any]]]:
    """All but the parameters and the learning rate, which is set anew in each step."""
    groups = optimizer.param_groups
    return [{k: (type(v), v) for k, v in group.items() if k not in ("params", "lr")} for group in groups]


def _fit(p: torch.Tensor, momentum: torch.Tensor | None) -> bool:
    return momentum is None or (momentum.shape, momentum.dtype, momentum.layout) == (p.shape, p.dtype, p.layout)
