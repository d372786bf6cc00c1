"""Saving the state of a run, and going on from it. Nothing that is read is executed.

A checkpoint is a file on this machine or on an object store (`bench.remote_results`). A store that is away for a while
costs no run its training: what cannot be saved or found there now is logged, and the run goes on without.
"""

from __future__ import annotations

import errno
import glob
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.config import TrialConfig, UserError, fields_model, validate
from bench.disk import DiskError, on_disk
from bench.files import written_whole
from bench.optimizers import laid_out_as
from bench.remote_results import RemoteAwayError, RemotePath, in_background, is_uri, log, settle, write_later

_KEYS = {"config", "epoch", "history", "model", "optimizer"}

#: Where a checkpoint is: a file here, or on an object store.
File = Path | RemotePath


def checkpoint_file(text: str, index: int = 0) -> File:
    """The file that is meant: a path, or a URI; of further networks FILE.1, FILE.2, ..."""
    if is_uri(text):
        return RemotePath(text).extended(f".{index}" if index else "")
    return Path(f"{text}.{index}" if index else text)


def location(path: File) -> str:
    """As `checkpoint_file` takes it, in whatever folder."""
    return path.uri if isinstance(path, RemotePath) else str(path.absolute())


def write_checkpoint(
    path: File,
    *,
    config: TrialConfig,
    epoch: int,
    history: list[dict[str, float]],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    feedback_optimizer: torch.optim.Optimizer | None = None,
    code: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write the whole state, at once or not at all: a kill, or a power cut, leaves the old file or the new one.

    ``code``: all that its epochs were made by, as `bench.provenance.code_of` has it.
    DiskError if the disk does not take it. To a store it is on its way when this returns; see `settle_checkpoint`.
    """
    state = {
        "config": config.to_dict(),
        "epoch": epoch,
        "history": history,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "feedback_optimizer": {} if feedback_optimizer is None else feedback_optimizer.state_dict(),
        "code": [dict(each) for each in code],
    }
    if isinstance(path, RemotePath):
        whole = io.BytesIO()  # in memory: a killed worker leaves no temporary files
        torch.save(state, whole)
        write_later(path, whole.getbuffer(), f"epoch {epoch} of this run")
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    with on_disk(path), written_whole(path, temporary) as file:
        torch.save(state, file)


def settle_checkpoint(path: File) -> None:
    """Wait, but not for ever, until what was last written there is there: a file on this machine is."""
    if isinstance(path, RemotePath):
        settle()


def previous(path: File, device: torch.device | str) -> dict[str, Any] | None:
    """What an earlier start of this run saved here, as `read_checkpoint`; None if there is nothing to go on from.

    UserError now, not after an epoch, if this is no place for a checkpoint.
    """
    if not isinstance(path, RemotePath):
        prepare_checkpoint(path)
        return read_checkpoint(path, device) if path.exists() else None
    try:
        if (data := path.read()) is not None:
            return _loaded(io.BytesIO(data), path, device)
        path.extended(".probe").write(b"")
        path.extended(".probe").delete()
    except RemoteAwayError as error:
        log(f"what was saved of this run cannot be read, so it begins anew: {error}")
    return None


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


def read_checkpoint(path: File, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A checkpoint's tensors, numbers and strings; UserError for a file that is none, or is damaged."""
    if isinstance(path, RemotePath):
        if (data := path.read()) is None:
            raise UserError(f"there is no checkpoint {path}.")
        return _loaded(io.BytesIO(data), path, device)
    return _loaded(path, path, device)


def _loaded(whole: Path | io.BytesIO, path: File, device: torch.device | str) -> dict[str, Any]:
    """``path``: what the user calls it."""
    try:
        state: Any = torch.load(whole, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}.") from error
    except Exception as error:  # torch.load raises anything on a damaged file
        raise UserError(f"{path} cannot be read as a checkpoint ({type(error).__name__}); remove it.") from error
    if missing := _KEYS - set(state if isinstance(state, dict) else ()):
        raise UserError(f"{path} is not a checkpoint of bench: it has no {', '.join(sorted(missing))}.")
    for name, absent in (("code", []), ("feedback_optimizer", {})):  # older releases did not say
        state.setdefault(name, absent)
    try:
        validate("", _model(), state)
    except UserError as error:
        raise UserError(f"{path} is not a checkpoint of bench: {error} Remove it.") from error
    if [epoch.get("epoch") for epoch in state["history"]] != list(range(1, 1 + len(state["history"]))):
        raise UserError(f"{path} is damaged: its history's epochs are not 1, 2, 3, …; remove it.")
    if len(state["history"]) != state["epoch"]:
        raise UserError(
            f"{path} is damaged: {state['epoch']} epochs, {len(state['history'])} in its history; remove it."
        )
    return dict(state)


def remove_checkpoint(path: File) -> None:
    """Remove it, and those of further networks: on a store not at once, since nobody should wait for that here."""
    if isinstance(path, RemotePath):
        in_background(path.delete, f"{path} is not removed")
        return
    with on_disk(path):
        for file in path.parent.glob(f"{glob.escape(path.name)}*"):
            file.unlink(missing_ok=True)


def sweep_checkpoints(folder: File, over: Callable[[str], bool]) -> None:
    """Remove from a study's folder of them those of runs (by uid) that are over, and what killed writers left of these.

    Nobody else may be writing there. On a store it is done in the background.
    """
    if isinstance(folder, RemotePath):
        in_background(lambda: _sweep(folder, over), f"{folder} is not tidied")
        return
    with on_disk(folder):
        for file in folder.glob("*.pt*"):
            if _is_over(file.name, over):
                file.unlink(missing_ok=True)


def _sweep(folder: RemotePath, over: Callable[[str], bool]) -> None:
    for name in folder.files():
        if _is_over(name, over):
            (folder / name).delete()


def _is_over(name: str, over: Callable[[str], bool]) -> bool:
    named = re.fullmatch(r"(.+)\.pt(\.\d+)*(\.new|(\.[0-9a-f]{8})?\.part)?", name)  # UID.pt, UID.pt.1, UID.pt.PID.new
    return named is not None and over(named[1])


@cache
def _model() -> Any:
    """What is not looked at elsewhere before it is used, as pydantic has it."""
    history = list[dict[str, float]]
    fields = {"config": dict[Any, Any], "epoch": int, "history": history, "model": dict[Any, torch.Tensor]}
    fields |= {"optimizer": dict[Any, Any], "feedback_optimizer": dict[Any, Any], "code": list[dict[str, str | None]]}
    return fields_model("checkpoint", {name: (kind, ...) for name, kind in fields.items()})


def load_weights(path: File, model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Put a checkpoint's weights into a network; UserError if they are another network's."""
    error = UserError(f"{path} does not fit its own configuration's network; it is damaged: remove it.")
    for name, own in model.state_dict().items():  # torch would turn numbers of another type into these
        if name in weights and (weights[name].dtype, weights[name].layout) != (own.dtype, own.layout):
            raise error
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as cause:
        raise error from cause


def load_optimizer(path: File, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Put a checkpoint's state into an optimizer; UserError if it, or the optimizer's settings, are another's."""
    error = UserError(f"{path} does not fit its own configuration's optimizer; it is damaged: remove it.")
    before, params = _settings(optimizer), [(p, group) for group in optimizer.param_groups for p in group["params"]]
    try:
        fits = all(_fits_state(params[index], kept) for index, kept in state["state"].items())
        if fits:  # torch would turn numbers of another type into these, too
            optimizer.load_state_dict(dict(state))
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as cause:
        raise error from cause
    if not fits or _settings(optimizer) != before:
        raise error
    for p, kept in optimizer.state.items():  # fused kernels go through memory, where a GPU has its own order
        kept.update({k: laid_out_as(p, v) for k, v in kept.items() if v is not None and v.shape == p.shape})


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, tuple[type, Any]]]:
    """All but the parameters and the learning rate, which is set anew in each step."""
    groups = optimizer.param_groups
    return [{k: (type(v), v) for k, v in group.items() if k not in ("params", "lr")} for group in groups]


def _fits_state(owner: tuple[torch.Tensor, Mapping[str, Any]], kept: Mapping[str, Any]) -> bool:
    """Whether it is what the group keeps of its parameter: a momentum, or Adam's two moments and number of steps."""
    p, group = owner
    if "betas" not in group:
        return kept["momentum_buffer"] is None or _fit(p, kept["momentum_buffer"])
    moments = ("exp_avg", "exp_avg_sq")
    return all(_fit(p, kept[name]) for name in moments) and _fit(torch.zeros(()), kept["step"])


def _fit(p: torch.Tensor, kept: torch.Tensor) -> bool:
    return (kept.shape, kept.dtype, kept.layout) == (p.shape, p.dtype, p.layout)
