"""Provenance, in real checkouts and out of them, and cgroup limits from trees as the kernel shows them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench
from bench.provenance import cpu_model, git_revision, provenance, source_digest, usable_cores


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    done = subprocess.run(["git", *who, *arguments], cwd=folder, env=environment, capture_output=True, check=True)
    return done.stdout.decode().strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A package in a checkout with one commit."""
    package = tmp_path / "checkout" / "bench"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package.parent / "README").write_text("")
    git(package.parent, "init")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-m", "first")
    git_revision.cache_clear()
    return package


def test_revision_of_a_clean_checkout(checkout: Path) -> None:
    assert git_revision(checkout) == git(checkout, "rev-parse", "HEAD")


@pytest.mark.parametrize("name", ["__init__.py", "new.py"])
def test_a_changed_or_new_file_of_the_package_is_dirty(checkout: Path, name: str) -> None:
    (checkout / name).write_text("x = 1")
    assert git_revision(checkout) == git(checkout, "rev-parse", "HEAD") + "-dirty"


def test_a_change_outside_the_package_is_not(checkout: Path) -> None:
    (checkout.parent / "README").write_text("more")
    assert git_revision(checkout) == git(checkout, "rev-parse", "HEAD")


def test_a_hook_s_environment_does_not_mislead(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", str(checkout / "nowhere"))
    assert git_revision(checkout) == git(checkout, "rev-parse", "HEAD")


def test_no_checkout_no_revision(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("")
    assert git_revision(tmp_path) is None


def test_a_package_installed_inside_a_checkout_is_not_part_of_it(checkout: Path) -> None:
    installed = checkout.parent / ".venv" / "bench"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert git_revision(installed) is None


def test_without_git_there_is_no_revision(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_revision(checkout) is None


def test_keys_and_versions() -> None:
    found = provenance("cpu")
    code = {"git_revision", "source", "versions"}
    assert set(found) == code | {"platform", "cpu", "cores", "device", "device_name"}
    assert found["versions"]["bench"] == bench.__version__
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"].startswith("2.")
    assert found["device_name"] == found["cpu"] != ""
    assert json.loads(json.dumps(found)) == found


def test_an_accelerator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU at {device}")
    found = provenance("cuda:7")
    assert (found["device"], found["device_name"]) == ("cuda:7", "a GPU at cuda:7")
    assert "cuda" in found["versions"]


def test_the_caller_gets_a_copy() -> None:
    provenance("cpu")["versions"]["torch"] = "changed"
    assert provenance("cpu")["versions"]["torch"] != "changed"


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, bench.provenance as p; p.provenance('cpu');"
        "print([m for m in ('torch', 'ray', 'optuna', 'mlflow', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


FREE = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
V2, V1 = "0::/a/b\n", "12:memory:/x\n3:cpu,cpuacct:/docker/c\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, FREE),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, FREE),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/a/b/cpu.max": "50000 100000\n"}, 0.5),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/a/cpu.max": "25000 100000\n"}, 0.25),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "75000 100000\n"}, 0.75),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/docker/c/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/docker/c/cpu.cfs_period_us": "100000\n",
            },
            FREE,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
    ],
    ids=["no cgroup", "v2 unlimited", "v2", "v2 parent", "v2 container", "v1 unlimited", "v1 container"],
)
def test_usable_cores(tmp_path: Path, files: dict[str, str], expected: float) -> None:
    assert usable_cores(tree(tmp_path, files)) == expected


def test_cpu_model(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2GHz\nprocessor\t: 1\nmodel name\t: other\n")
    assert cpu_model(info) == "Some CPU @ 2GHz"
    assert cpu_model(tmp_path / "none") == (platform.processor() or platform.machine())


def test_the_digest_of_the_source_tells_two_dirty_checkouts_apart(tmp_path: Path) -> None:
    def digest() -> str:
        source_digest.cache_clear()
        return source_digest(tmp_path)

    (tmp_path / "sub").mkdir()
    (tmp_path / "one.py").write_text("a = 1\n")
    (tmp_path / "sub" / "two.py").write_text("b = 2\n")
    first = digest()
    (tmp_path / "notes.txt").write_text("no code")
    assert digest() == first
    (tmp_path / "sub" / "two.py").write_text("b = 3\n")
    changed = digest()
    (tmp_path / "sub" / "two.py").write_text("b = 2\n")
    (tmp_path / "one.py").rename(tmp_path / "other.py")
    assert len({first, changed, digest()}) == 3
    source_digest.cache_clear()
