"""Where a result comes from: the code's revision, the versions, the machine. Nothing that names a person or a host."""

from __future__ import annotations

import copy
import functools
import hashlib
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import bench

#: Whose versions are kept, where they are installed (they are not imported for it).
_PACKAGES = ("torch", "ray", "optuna", "mlflow", "numpy")


def provenance(device: str) -> dict[str, Any]:
    """What a result row keeps of code and machine; ``device`` as torch writes it: cpu, cuda, cuda:1, mps.

    git_revision (null outside a checkout), source (see `source_digest`), versions, platform, cpu (model),
    cores (usable), device, device_name.
    """
    return copy.deepcopy(_provenance(device))


@functools.cache
def _provenance(device: str) -> dict[str, Any]:
    cpu = cpu_model()
    return {
        "git_revision": git_revision(),
        "source": source_digest(),
        "versions": _versions(device),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu,
        "cores": usable_cores(),
        "device": device,
        "device_name": _device_name(device) or cpu,
    }


@functools.cache
def git_revision(package: Path = Path(bench.__file__).parent) -> str | None:
    """The commit that this package lies in, with "-dirty" if its files differ from it; None if there is none.

    A package that is merely installed inside somebody's checkout (a virtual environment) is not in it.
    """
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    revision = _git(package, "rev-parse", "HEAD")
    changes = _git(package, "--no-optional-locks", "status", "--porcelain", "--", ".")
    if revision is None or changes is None:
        return None
    return f"{revision}-dirty" if changes else revision


@functools.cache
def source_digest(package: Path = Path(bench.__file__).parent) -> str:
    """Sixteen hexadecimal digits (sha256) of this package's modules: tells two states of a dirty checkout apart."""
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        for part in (path.relative_to(package).as_posix().encode(), path.read_bytes()):
            found.update(len(part).to_bytes(8, "big") + part)
    return found.hexdigest()[:16]


def code_of(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Of a row's provenance, the part that says which code made it; older rows say less."""
    versions = provenance.get("versions") or {}
    known = {name: provenance.get(name) for name in ("git_revision", "source")}
    return {**known, **{name: versions.get(name) for name in ("bench", "torch", "optuna")}}


def older_code(made_by: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Those of these (of `code_of`) that compute with other modules than this process, or with another torch; once."""
    now, found = code_of(provenance("cpu")), list[dict[str, Any]]()
    for each in map(dict, made_by):
        if each not in found and any(each.get(name) != now[name] for name in ("source", "torch")):
            found.append(each)
    return found


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of git in this folder; None if there is no git, no checkout, or no answer."""
    # A hook's GIT_DIR would point elsewhere; a container's checkout often belongs to another user.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    command = ["git", "-C", str(folder), "-c", "safe.directory=*", *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _versions(device: str) -> dict[str, str]:
    found = {"bench": bench.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if device.startswith("cuda"):
        import torch

        found["cuda"] = str(torch.version.cuda)
    return found


def _device_name(device: str) -> str | None:
    """The accelerator's name; None for the CPU."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    return None if device == "cpu" else device


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, as Linux gives it; elsewhere what Python knows of it."""
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def usable_cores(root: Path = Path("/")) -> float:
    """Cores this process may use: its affinity, or the cgroup's CPU quota if that is less (2.5 of 64, say)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(float(allowed), _cgroup_quota(root))


def _cgroup_quota(root: Path) -> float:
    """The least CPU quota among the process's cgroup and its ancestors, in cores; infinite if there is none."""
    quota = math.inf
    for folder in _cgroup_folders(root):
        if (limit := folder / "cpu.max").exists():
            granted, period = limit.read_text().split()
            quota = min(quota, math.inf if granted == "max" else int(granted) / int(period))
        elif (limit := folder / "cpu.cfs_quota_us").exists() and (granted_us := int(limit.read_text())) > 0:
            quota = min(quota, granted_us / int((folder / "cpu.cfs_period_us").read_text()))
    return quota


def _cgroup_folders(root: Path) -> list[Path]:
    """Every folder that may hold a quota: of version 2 and of version 1's cpu controller, up to the mount's root."""
    own = root / "proc/self/cgroup"
    if not own.exists():
        return []
    folders = []
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if controllers == "" or "cpu" in names:
            # In a container the own cgroup is often mounted as the root, and the path leads nowhere.
            mount = root / "sys/fs/cgroup" / ("" if controllers == "" else "cpu")
            here = Path(path.lstrip("/"))
            folders += [mount / step for step in (here, *here.parents)]
    return folders
