"""The doctor, on real faults: killed runs, missing packages, files in the way, small containers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import doctor
from bench.doctor import Check

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def test_diagnosis_is_json_and_changes_nothing(tmp_path: Path) -> None:
    found = doctor.diagnose(tmp_path / "results")
    rows = json.loads(json.dumps([check.to_dict() for check in found]))
    assert [Check.from_dict(row) for row in rows] == found
    assert len({check.name for check in found}) == len(found)
    assert all(bool(check.remedy) == (check.status != "ok") for check in found)
    assert list(tmp_path.iterdir()) == []


# --- software --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "status"),
    [((3, 10, 13), "fail"), ((3, 11, 0), "ok"), ((3, 13, 9), "ok"), ((3, 14, 0), "fail")],
)
def test_python(version: tuple[int, ...], status: str) -> None:
    allowed = tomllib.loads(PYPROJECT.read_text())["project"]["requires-python"]
    assert doctor.check_python(version, allowed).status == status


def test_what_is_installed_here_fits() -> None:
    requirements = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    found = doctor.check_packages(requirements)
    assert [(c.name, c.status) for c in found] == [(name, "ok") for name in (*doctor.NAMED, "packages")]


def install(folder: Path, name: str, version: str, *needs: str) -> None:
    """A package of which nothing but its metadata is there."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {n}" for n in needs)]
    (info / "METADATA").write_text("\n".join(lines))


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_package_of_the_wrong_version_or_missing(packages: Path) -> None:
    install(packages, "pandas", "1.0")
    found = doctor.check_packages(["pandas>=2", "absent-package>=1"])
    assert [(c.name, c.status) for c in found] == [("pandas", "fail"), ("packages", "fail")]
    assert found[0].detail == "1.0; bench needs >=2"
    assert found[1].detail == "bench needs pandas>=2, not 1.0; bench needs absent-package>=1, which is missing"


def test_a_conflict_further_down(packages: Path) -> None:
    install(packages, "alpha", "1", "beta", "gamma>5; extra == 'more'", "absent; python_version < '3'")
    install(packages, "beta", "1", "gamma>=2", "alpha")
    install(packages, "gamma", "3")
    assert doctor.check_packages(["alpha"])[0].detail == "3 installed packages fit together"
    assert doctor.check_packages(["alpha[more]"])[0].detail == 'alpha needs gamma>5; extra == "more", not 3'


@pytest.mark.parametrize(
    ("code", "status", "detail"),
    [
        ("__version__ = '0.28.0'", "ok", "0.28.0"),
        (
            "raise RuntimeError('operator does not exist')",
            "warn",
            "cannot be imported: RuntimeError: operator does not exist",
        ),
        ("import os; os._exit(3)", "warn", "cannot be imported: exit status 3"),
    ],
)
def test_torchvision(packages: Path, monkeypatch: pytest.MonkeyPatch, code: str, status: str, detail: str) -> None:
    (packages / "torchvision.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(packages))
    (found,) = doctor.check_torchvision()
    assert (found.status, found.detail) == (status, detail)


def test_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert doctor.check_gpu().status == "fail"


def test_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="A big one", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert doctor.check_gpu().detail.startswith("A big one (80.0 GiB), A big one (80.0 GiB); driver ")


# --- hardware --------------------------------------------------------------------------------------------


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


OWN, GROUPS = "proc/self/cgroup", "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, float("inf")),
        ({OWN: "0::/\n", f"{GROUPS}/memory.max": "max\n"}, float("inf")),
        ({OWN: "0::/\n", f"{GROUPS}/memory.max": "2147483648\n"}, 2**31),
        ({OWN: "0::/a/b\n", f"{GROUPS}/a/memory.max": "1024", f"{GROUPS}/a/b/memory.max": "2048"}, 1024),
        ({OWN: "3:cpu:/\n4:memory:/x\n0::/\n", f"{GROUPS}/memory/memory.limit_in_bytes": "4096"}, 4096),
        ({OWN: "4:memory:/x\n", f"{GROUPS}/memory/x/memory.limit_in_bytes": "9"}, 9),
    ],
)
def test_memory_limit_as_the_kernel_shows_it(tmp_path: Path, files: dict[str, str], limit: float) -> None:
    assert doctor.memory_limit(tree(tmp_path, files)) == limit


def test_a_small_container(tmp_path: Path) -> None:
    files = {OWN: "0::/\n", f"{GROUPS}/memory.max": str(2**30), f"{GROUPS}/cpu.max": "50000 100000"}
    memory, cores = doctor.check_memory(tree(tmp_path, files)), doctor.check_cores(tmp_path)
    assert (memory.status, cores.status) == ("warn", "warn")
    assert memory.detail.startswith("1.0 GiB (the container's limit; the machine has ")
    assert cores.detail.startswith("0.5 usable of ")


def test_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_shared_memory(tmp_path / "absent").status == "ok"
    assert doctor.check_shared_memory(tmp_path).status == "ok"
    monkeypatch.setattr(doctor, "ENOUGH_SHARED", 2**80)
    assert doctor.check_shared_memory(tmp_path).status == "warn"
    monkeypatch.setattr(doctor, "ENOUGH_DISK", 2**80)
    monkeypatch.setattr(doctor, "LITTLE_DISK", 0)
    assert doctor.check_disk("disk", tmp_path / "not" / "yet").status == "warn"
    monkeypatch.setattr(doctor, "LITTLE_DISK", 2**80)
    assert doctor.check_disk("disk", tmp_path / "not" / "yet").status == "fail"


# --- places ----------------------------------------------------------------------------------------------


def test_results_that_cannot_be_written(tmp_path: Path) -> None:
    assert doctor.check_results(tmp_path / "new" / "results").status == "ok"
    (tmp_path / "file").write_text("")
    assert doctor.check_results(tmp_path / "file" / "results").status == "fail"
    assert doctor.check_results(Path("/proc/results")).status == "fail"


def test_an_address_that_is_not_ours() -> None:
    assert doctor.check_loopback("127.0.0.1").status == "ok"
    assert doctor.check_loopback("192.0.2.1").status == "fail"  # reserved for documentation


# --- leftovers -------------------------------------------------------------------------------------------


@contextmanager
def started(*command: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def raylet(tmp_path: Path) -> str:
    """A program of that name, which sleeps."""
    program = tmp_path / "raylet"
    shutil.copy(str(shutil.which("sleep")), program)
    return str(program)


def test_a_ray_server_without_a_driver(raylet: str) -> None:
    with started("sh", "-c", f"'{raylet}' 60 & echo $!; wait") as shell:
        assert shell.stdout is not None
        pid = int(shell.stdout.readline())
        try:
            while (Path("/proc") / str(pid) / "comm").read_text() != "raylet\n":
                time.sleep(0.01)
            found = doctor.check_processes(Path("/proc"))
        finally:
            subprocess.run(["kill", str(pid)], check=True)
    assert found.status == "warn"
    assert str(pid) in found.remedy.split()


def test_a_ray_server_of_a_living_driver(raylet: str) -> None:
    with started(raylet, "60") as server:  # Python, this one, is its parent
        found = doctor.check_processes(Path("/proc"))
    assert str(server.pid) not in found.remedy.split()
    assert "none" not in found.detail


def test_no_proc(tmp_path: Path) -> None:
    assert "unchecked" in doctor.check_processes(tmp_path / "proc").detail


def test_the_folder_of_a_killed_run() -> None:
    code = "import time; from bench.processes import scratch_folder\n"
    code += "with scratch_folder() as folder: print(folder, flush=True); time.sleep(60)"
    with started(sys.executable, "-c", code) as run:
        assert run.stdout is not None
        folder = Path(run.stdout.readline().strip())
        try:
            assert str(folder) not in doctor.check_folders(folder.parent).remedy.split()
            run.kill()
            run.wait()
            found = doctor.check_folders(folder.parent)
        finally:
            shutil.rmtree(folder)
    assert found.status == "warn"
    assert str(folder) in found.remedy.split()
