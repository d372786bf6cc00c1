"""What this machine offers, and what would go wrong on it: the checks behind ``bench doctor``.

Reads, and changes nothing. Linux is known best; what another system does not show is said to be unchecked.
"""

from __future__ import annotations

import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from bench.check import Check, Status
from bench.config import UserError
from bench.files import is_taken
from bench.provenance import usable_cores
from bench.remote_results import RemotePath, local_folder

#: Packages with a line of their own; the others are checked together.
NAMED = ("torch", "ray", "optuna", "mlflow", "pandas")

_NOT_INSTALLED = "bench is not installed, so what it needs is unchecked"
_INSTALL = "pip install -c constraints.txt -e ."

GIB = 2**30
#: A search needs Ray's processes (0.5 GiB), the driver with MLflow (0.5) and 1 for each of two trials.
ENOUGH_MEMORY = 3 * GIB
#: Ray puts its shared memory here, and goes on with a slow file in its stead where it is small.
ENOUGH_SHARED = 256 * 2**20
#: Checkpoints, journals and MLflow's database of one study, with room to spare.
ENOUGH_DISK, LITTLE_DISK = 5 * GIB, GIB // 2


def diagnose(results: Path | str) -> list[Check]:
    """Every check, with results to be written under ``results`` (a URI: there, and in a copy here).

    Takes a few seconds: torch is imported.
    """
    from bench.leftovers import check_leftovers  # what reads rows takes a second to import

    here = results if isinstance(results, Path) else local_folder(results)
    return [
        check_python(sys.version_info[:3]),
        *check_packages(),
        *check_torchvision(),
        check_cores(Path("/")),
        check_memory(Path("/")),
        check_shared_memory(Path("/dev/shm")),
        check_results(results) if isinstance(results, Path) else check_store(results),
        check_disk("disk for results", here),
        check_disk("disk for temporary files", Path(tempfile.gettempdir())),
        check_loopback("127.0.0.1"),
        check_gpu(),
        check_processes(Path("/proc")),
        check_folders(Path(tempfile.gettempdir())),
        *check_leftovers(here),
    ]


# --- software --------------------------------------------------------------------------------------------


def check_python(version: tuple[int, ...], allowed: str | None = None) -> Check:
    """The interpreter; ``allowed``: the installed package's Requires-Python by default."""
    text = ".".join(map(str, version))
    ours = _distribution("bench")
    if allowed is None and ours is not None:
        allowed = ours.metadata["Requires-Python"]
    if allowed is None:
        return Check(name="python", status="warn", detail=f"{text}; {_NOT_INSTALLED}", remedy=_INSTALL)
    if text in SpecifierSet(allowed):
        return Check(name="python", status="ok", detail=f"{text} (bench needs {allowed})")
    remedy = f"make a virtual environment with a Python that is {allowed}"
    return Check(name="python", status="fail", detail=f"{text}; bench needs {allowed}", remedy=remedy)


def check_packages(requirements: list[str] | None = None) -> list[Check]:
    """Each requirement of ours, and whether all that they need in turn is there and fits.

    ``requirements``: those of the installed package by default.
    """
    if requirements is None:
        ours = _distribution("bench")
        if ours is None:
            return [Check(name="packages", status="warn", detail=_NOT_INSTALLED, remedy=_INSTALL)]
        requirements = ours.requires or []
    direct = [r for r in map(Requirement, requirements) if r.marker is None or r.marker.evaluate({"extra": ""})]
    rows = [_check_requirement(r) for r in direct if r.name in NAMED]
    conflicts, count = _conflicts(direct)
    if not conflicts:
        return [*rows, Check(name="packages", status="ok", detail=f"{count} installed packages fit together")]
    detail = "; ".join(conflicts[:3]) + (f"; and {len(conflicts) - 3} more" if len(conflicts) > 3 else "")
    remedy = f"{_INSTALL} (in a new virtual environment if that fails)"
    return [*rows, Check(name="packages", status="fail", detail=detail, remedy=remedy)]


def _check_requirement(requirement: Requirement) -> Check:
    found = _distribution(requirement.name)
    fits = found is not None and requirement.specifier.contains(found.version, prereleases=True)
    wanted = f"bench needs {requirement.specifier}"
    if found is not None and fits:
        return Check(name=requirement.name, status="ok", detail=f"{found.version} ({wanted})")
    detail = f"{found.version if found else 'not installed'}; {wanted}"
    remedy = f"pip install -c constraints.txt '{requirement.name}{requirement.specifier}'"
    return Check(name=requirement.name, status="fail", detail=detail, remedy=remedy)


def _conflicts(roots: list[Requirement]) -> tuple[list[str], int]:
    """What is missing or does not fit in everything that these requirements need; and how many packages that is."""
    waiting, seen, packages, problems = [("bench", r) for r in roots], set(), set(), []
    while waiting:
        needy, requirement = waiting.pop(0)
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras), str(requirement.specifier))
        if key in seen:
            continue
        seen.add(key)
        found = _distribution(requirement.name)
        if found is None:
            problems.append(f"{needy} needs {requirement}, which is missing")
            continue
        packages.add(key[0])
        if not requirement.specifier.contains(found.version, prereleases=True):
            problems.append(f"{needy} needs {requirement}, not {found.version}")
        waiting += [(requirement.name, r) for r in _needs(found, requirement.extras)]
    return problems, len(packages)


def _needs(distribution: metadata.Distribution, extras: set[str]) -> Iterator[Requirement]:
    """What a package requires on this system, with these of its extras."""
    for requirement in map(Requirement, distribution.requires or []):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def _distribution(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


def check_torchvision() -> list[Check]:
    """Whether torchvision can be imported, if it is there: a build for CUDA fails beside a CPU build of torch."""
    if util.find_spec("torchvision") is None:
        return []
    command = [sys.executable, "-W", "ignore", "-c", "import torchvision; print(torchvision.__version__)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return [Check(name="torchvision", status="ok", detail=done.stdout.strip())]
    remedy = "install the build of torchvision that belongs to this torch; torchvision:NAME and timm:NAME need it"
    detail = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
    return [Check(name="torchvision", status="warn", detail=f"cannot be imported: {detail}", remedy=remedy)]


# --- hardware, as much of it as is ours ------------------------------------------------------------------


def check_cores(root: Path) -> Check:
    """Cores by affinity and by the container's quota; a library that counts all of them starts too many threads."""
    usable, all_cores = usable_cores(root), os.cpu_count() or 1
    detail = f"{usable:g} usable of {all_cores}"
    if usable < 1:
        remedy = "give the container a whole core (docker run --cpus 2)"
        return Check(name="cores", status="warn", detail=detail, remedy=remedy)
    return Check(name="cores", status="ok", detail=detail)


def check_memory(root: Path) -> Check:
    """Main memory, or the container's limit if that is less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = memory_limit(root)
    usable = min(machine, limit)
    of = f" (the container's limit; the machine has {_gib(machine)})" if limit < machine else ""
    detail = f"{_gib(usable)}{of}"
    if usable < ENOUGH_MEMORY:
        remedy = "run one trial at a time (--concurrent 1), or give the container more (docker run --memory)"
        return Check(name="memory", status="warn", detail=detail, remedy=remedy)
    return Check(name="memory", status="ok", detail=detail)


def memory_limit(root: Path) -> float:
    """The least memory limit, in bytes, of this process's cgroup and those above it (versions 1 and 2), or infinity."""
    own = root / "proc/self/cgroup"
    limits = [math.inf]
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mount, file = root / "sys/fs/cgroup" / controllers, "memory.limit_in_bytes" if controllers else "memory.max"
        here = Path(path.lstrip("/"))
        found = [mount / step / file for step in (here, *here.parents) if (mount / step / file).exists()]
        limits += [float(text) for text in (limit.read_text().strip() for limit in found) if text != "max"]
    return min(limits)


def check_shared_memory(folder: Path) -> Check:
    """/dev/shm, which containers make 64 MiB small."""
    if not folder.is_dir():
        return Check(name="shared memory", status="ok", detail=f"no {folder} on this system, and none needed")
    size = shutil.disk_usage(folder).total
    if size < ENOUGH_SHARED:
        detail = f"{folder} has {_gib(size)}; Ray uses a slow file in its stead"
        return Check(name="shared memory", status="warn", detail=detail, remedy="docker run --shm-size=1g")
    return Check(name="shared memory", status="ok", detail=f"{folder} has {_gib(size)}")


def check_gpu() -> Check:
    """The GPUs that torch can use; a driver without a torch that uses it is worth a word."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its shared libraries
        return Check(name="GPU", status="fail", detail=f"torch cannot be imported: {error}", remedy=_INSTALL)
    driver = Path("/sys/module/nvidia/version")
    version = driver.read_text().strip() if driver.exists() else None
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = ", ".join(f"{gpu.name} ({_gib(gpu.total_memory)})" for gpu in found)
        return Check(
            name="GPU", status="ok", detail=f"{names}; driver {version or 'unknown'}, CUDA {torch.version.cuda}"
        )
    if version is None:
        return Check(name="GPU", status="ok", detail="none: trials run on the CPU")
    detail = f"driver {version}, but torch {torch.__version__} cannot use it"
    return Check(
        name="GPU", status="warn", detail=detail, remedy="install a build of torch for CUDA, or a newer driver"
    )


# --- places ----------------------------------------------------------------------------------------------


def check_results(results: Path) -> Check:
    """Whether the results folder, or the first folder above it that exists, can be written."""
    folder = _existing(results)
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Check(name="results", status="ok", detail=f"{results} is writable")
    except OSError as error:
        detail = f"{folder}: {error.strerror}"
        return Check(name="results", status="fail", detail=detail, remedy="name a writable folder with --results")


def check_store(uri: str) -> Check:
    """Whether files can be listed, written and removed there."""
    try:
        remote = RemotePath(uri)
        remote.files()
        remote.check_writable()
    except UserError as error:
        detail, _, remedy = str(error).rpartition(": ")
        return Check(name="results", status="fail", detail=detail, remedy=remedy.rstrip("."))
    return Check(name="results", status="ok", detail=f"{uri} is writable; here it is {local_folder(uri)}")


def check_disk(name: str, path: Path) -> Check:
    """Free space where this path is, or will be."""
    free = shutil.disk_usage(_existing(path)).free
    status: Status = "ok" if free >= ENOUGH_DISK else "warn" if free >= LITTLE_DISK else "fail"
    remedy = "" if status == "ok" else "free space there, or choose another folder (--results, TMPDIR)"
    return Check(name=name, status=status, detail=f"{_gib(free)} free at {path}", remedy=remedy)


def _existing(path: Path) -> Path:
    """The path, or the nearest thing above it that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def check_loopback(host: str) -> Check:
    """A port of our own on this address: Ray and ``bench ui`` need some."""
    try:
        with socket.socket() as server:
            server.bind((host, 0))
            port = server.getsockname()[1]
    except OSError as error:
        remedy = "bring the loopback interface up (ip link set lo up), or allow the sandbox to use it"
        return Check(name="network", status="fail", detail=f"no port on {host}: {error.strerror}", remedy=remedy)
    return Check(name="network", status="ok", detail=f"{host} has free ports ({port}, for one)")


# --- leftovers of a killed run ---------------------------------------------------------------------------


def check_processes(proc: Path) -> Check:
    """Ray's servers whose driver is gone: a run of ours starts them as its children, and Python is their parent."""
    name = "Ray processes"
    if not proc.is_dir():
        return Check(name=name, status="ok", detail=f"unchecked: this system has no {proc}")
    servers = {pid: parent for pid, program, parent in _processes(proc) if program in ("raylet", "gcs_server")}
    orphans = sorted(pid for pid, parent in servers.items() if not _is_python(proc / str(parent)))
    if orphans:
        numbers = " ".join(map(str, orphans))
        remedy = f"kill {numbers} (not if you started a cluster with `ray start`: that one is meant to stay)"
        return Check(name=name, status="warn", detail=f"{len(orphans)} without a driver: {numbers}", remedy=remedy)
    detail = "none" if not servers else f"{len(servers)}, all of a run that is going on"
    return Check(name=name, status="ok", detail=detail)


def _processes(proc: Path) -> Iterator[tuple[int, str, int]]:
    """Process id, program and parent's id of this user's processes."""
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if folder.stat().st_uid == os.getuid():
                # "pid (program) state parent ...", and a program may hold blanks and brackets.
                before, _, after = (folder / "stat").read_text(errors="replace").rpartition(")")
                yield int(folder.name), before.partition("(")[2], int(after.split()[1])
        except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
            continue


def _is_python(process: Path) -> bool:
    try:
        program = (process / "cmdline").read_bytes().split(b"\0")[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return Path(os.fsdecode(program)).name.startswith("python")


def check_folders(temporary: Path) -> Check:
    """Folders of runs that were killed. A living run holds the lock of its own (bench.processes.scratch_folder)."""
    owners = [owner for owner in temporary.glob("bench-*/owner") if os.access(owner, os.W_OK)]
    left = sorted(owner.parent for owner in owners if not is_taken(owner))
    if not left:
        return Check(name="folders", status="ok", detail=f"no leftovers in {temporary}")
    detail = f"{len(left)} left by killed runs in {temporary}; the next search removes them"
    remedy = "rm -r " + " ".join(map(str, left))
    return Check(name="folders", status="warn", detail=detail, remedy=remedy)


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"
