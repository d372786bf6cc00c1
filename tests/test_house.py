"""The house rules, checked on the source: floors, owners of heavy packages, light imports, sizes, packaging.

To add a module, give it a floor; to add a dependency, give it an owner here and a comment in pyproject.toml.
"""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "bench"

#: A module may import from lower floors only. A folder that stands here as one name is one room: its modules may
#: import each other. `GROUND` is what everybody stands on.
FLOORS = {
    "check": 0,
    "streams": 0,
    "networks": 0,
    "models": 1,
    "datasets": 0,
    "journal": 1,
    "processes": 0,
    "provenance": 0,
    "worker": 1,
    "group": 0,
    "director": 1,
    "stores": 0,
    "mlflow_queue": 0,
    "disk": 0,
    "learning.ops": 0,
    "front": 0,
    "kinds": 0,
    "looks": 0,
    "remote_results": 1,
    "optuna_ui": 0,
    "cells": 0,
    "learning.primitives": 1,
    "learning.rules": 1,
    "statistics": 1,
    "terminal": 1,
    "recipes": 1,
    "optimizers": 1,
    "checkpoint": 2,
    "noise": 1,
    "batch_norm": 1,
    "curves": 1,
    "robustness_summary": 2,
    "learning.activity": 2,
    "learning.switch": 2,
    "stages": 0,
    "heap": 0,
    "arithmetic": 4,
    "steps": 8,
    "speed": 9,
    "confirmation": 12,
    "learning.layers": 3,
    "robustness_words": 2,
    "learning.convert": 4,
    "learning.learner": 4,
    "evaluators": 4,
    "space": 4,
    "spaces": 5,
    "space_files": 6,
    "rows": 5,
    "mlflow_client": 4,
    "shape": 1,
    "mlflow_store": 5,
    "choices": 5,
    "training": 5,
    "trial": 6,
    "tracking": 6,
    "proposals": 6,
    "summary": 6,
    "storage": 6,
    "study": 7,
    "engine": 7,
    "distributed": 7,
    "joining": 5,
    "cluster": 6,
    "listing": 7,
    "train": 7,
    "ui": 7,
    "place": 7,
    "probe": 7,
    "figures": 7,
    "transfer_summary": 7,
    "matrix_summary": 7,
    "transfer_words": 8,
    "matrix_words": 8,
    "pace": 8,
    "runs": 8,
    "pages": 9,
    "reading": 9,
    "campaign": 9,
    "filed": 10,
    "leftovers": 11,
    "sync": 11,
    "doctor": 12,
    "robustness_plan": 9,
    "compare": 10,
    "compare_words": 11,
    "robustness_points": 10,
    "search": 10,
    "robustness": 11,
    "searched": 10,
    "plans": 11,
    "programme": 11,
    "warm": 12,
    "transfer": 12,
    "matrix": 12,
    "present": 12,
    "present_plans": 13,
    "report": 14,
    "verbs": 15,
    "cli": 16,
}
GROUND = ("", "config", "files", "learning")  # `learning` itself: an empty __init__

#: Whoever else wants one of these asks its owner.
OWNERS: dict[str, tuple[str, ...]] = {
    "torch": (
        *("learning", "models", "datasets", "noise", "evaluators", "checkpoint", "training", "trial", "probe"),
        *("networks", "provenance", "doctor", "place", "pace", "group", "batch_norm", "distributed"),
        *("arithmetic", "stages", "steps", "speed", "optimizers"),
    ),
    "numpy": ("datasets", "evaluators"),
    "art": ("evaluators",),
    "matplotlib": ("figures",),
    "ray": ("engine", "cluster", "distributed"),
    "optuna": ("study", "storage", "proposals", "choices", "space", "optuna_ui", "pages"),
    "optuna_dashboard": ("optuna_ui",),
    "plotly": ("pages",),
    "jinja2": ("pages",),
    "mlflow": ("mlflow_client",),
    "pandas": ("rows",),
    "scipy": ("statistics",),
    "rich": ("terminal",),
    "yaml": ("files",),
    "pydantic": ("config", "shape"),
    "PIL": ("datasets",),
    "sklearn": ("datasets",),
    "packaging": ("doctor",),
    "psutil": ("processes",),
    "sqlalchemy": ("storage",),
    "filelock": ("journal",),
    "pyarrow": ("remote_results",),
}
#: Comes inside another package.
VENDORED = {"psutil": "ray", "sqlalchemy": "optuna"}
#: Distributions that are imported under another name.
IMPORT_NAMES = {
    "scikit-learn": "sklearn",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "adversarial-robustness-toolbox": "art",
    "optuna-dashboard": "optuna_dashboard",
}
#: Imported by name, when a user asks for a network of theirs.
BY_NAME = ("torchvision", "timm")

HEAVY = (
    "torch",
    "ray",
    "optuna",
    "mlflow",
    "pandas",
    "pydantic",
    "numpy",
    "scipy",
    "sklearn",
    "PIL",
    "matplotlib",
    "art",
    "plotly",
    "jinja2",
    "pyarrow",
)


def name_of(path: Path) -> str:
    """bench/learning/ops.py is learning.ops; bench/__init__.py is the empty name."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


SOURCES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def imports(name: str) -> set[str]:
    """The full names of all that a module imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: write relative imports in full"
            # `from bench import space` means the module bench.space, `from bench.space import Space` does not.
            found |= {
                full if (full := f"{node.module}.{alias.name}").removeprefix("bench.") in SOURCES else str(node.module)
                for alias in node.names
            }
    return found


def ours(name: str) -> set[str]:
    """The modules of bench that a module imports."""
    return {i.removeprefix("bench").lstrip(".") for i in imports(name) if i.split(".")[0] == "bench"}


def theirs(name: str) -> set[str]:
    """The third-party packages that a module imports."""
    return {i.split(".")[0] for i in imports(name)} - {"bench", *sys.stdlib_module_names}


def within(name: str, unit: str) -> bool:
    """Whether a module is this one, or lies in this folder."""
    return name == unit or name.startswith(f"{unit}.")


def room(name: str) -> str | None:
    """The entry of `FLOORS` that a module belongs to."""
    return next((entry for entry in FLOORS if within(name, entry)), None)


# --- imports ---------------------------------------------------------------------------------------------


def test_the_source_is_found() -> None:
    assert {"", "config", "space", "learning.rules"} <= set(SOURCES)
    assert "bench.config" in imports("space")
    assert "config" in ours("learning.rules")


@pytest.mark.parametrize("name", sorted(set(SOURCES) - set(GROUND)))
def test_imports_run_downwards(name: str) -> None:
    own = room(name)
    assert own is not None, f"bench.{name} has no floor; add it to FLOORS"
    for other in ours(name) - set(GROUND):
        its = room(other)
        assert its is not None
        assert its == own or FLOORS[its] < FLOORS[own], f"{name} (floor {FLOORS[own]}) imports {other} ({FLOORS[its]})"


def test_the_ground_stands_on_nothing() -> None:
    assert {name: ours(name) | theirs(name) for name in GROUND} == {name: set() for name in GROUND}


def test_the_tables_hold_nothing_that_is_gone() -> None:
    assert set(FLOORS) == {room(name) for name in SOURCES} - {None}
    for package, owners in OWNERS.items():
        unused = [o for o in owners if not any(package in theirs(m) for m in SOURCES if within(m, o))]
        assert unused == [], f"{unused} no longer import {package}"


def test_no_circles() -> None:
    graphlib.TopologicalSorter({name: ours(name) - {name} for name in SOURCES}).prepare()


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_package_is_imported_by_its_owners_only(name: str) -> None:
    for package in theirs(name):
        assert package in OWNERS, f"bench.{name} imports {package}, which has no owner; add it to OWNERS"
        owners = OWNERS[package]
        assert any(within(name, owner) for owner in owners), f"{name} imports {package}; ask {owners}"


@pytest.mark.parametrize("module", ["config", "files", "space", "doctor", "learning.rules", "recipes", "cli"])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    code = f"import sys, bench.{module}; print(*(set({HEAVY}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_trial_needs_torch_and_no_orchestra() -> None:
    absent = ("ray", "optuna", "mlflow", "pandas", "rich", "scipy", "art", "matplotlib", "pyarrow")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import bench.trial; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("True", "")


# --- sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_functions_are_read_in_one_sitting(name: str) -> None:
    functions = [n for n in ast.walk(TREES[name]) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [f.name for f in functions if (f.end_lineno or 0) - f.lineno >= 60] == []


# --- packaging -------------------------------------------------------------------------------------------

PYPROJECT = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
PROJECT = tomllib.loads(PYPROJECT)["project"]
EXTRAS = PROJECT["optional-dependencies"]
RUNTIME = [*PROJECT["dependencies"], *EXTRAS["vision"], *EXTRAS["postgresql"]]


def reason(requirement: str) -> str:
    """The comment behind a requirement in pyproject.toml."""
    found = re.search(rf'^ *"{re.escape(requirement)}", +# (.+)$', PYPROJECT, re.MULTILINE)
    assert found is not None, f"pyproject.toml: {requirement} has no comment that says who uses it"
    return found[1]


def users(requirement: str) -> set[str]:
    """The modules that the comment names; a folder stands for all in it."""
    named = re.findall(r"bench(?:/\w+)+(?:\.py)?", reason(requirement))
    assert named, f"pyproject.toml: the comment on {requirement} names no file, e.g. bench/files.py"
    found: set[str] = set()
    for path in named:
        name = path.removesuffix(".py").removeprefix("bench/").replace("/", ".")
        matching = {module for module in SOURCES if within(module, name)}
        assert matching, f"pyproject.toml: {requirement} is said to be used by {path}, which does not exist"
        found |= matching
    return found


@pytest.mark.parametrize("requirement", RUNTIME)
def test_a_dependency_is_used_where_its_comment_says(requirement: str) -> None:
    name = Requirement(requirement).name
    through = re.search(r"through (\w+)", reason(requirement))
    package = through[1] if through else IMPORT_NAMES.get(name, name)
    modules = users(requirement)
    if package in BY_NAME:
        literals = {n.value for m in modules for n in ast.walk(TREES[m]) if isinstance(n, ast.Constant)}
        assert package in literals
    else:
        assert any(package in theirs(module) for module in modules)


@pytest.mark.parametrize("requirement", [*EXTRAS["dev"], *EXTRAS["browser"]])
def test_a_tool_is_said_to_be_used(requirement: str) -> None:
    assert re.match(r"make (check|test|test-browser)\b", reason(requirement))


def test_what_is_imported_is_required() -> None:
    required = {IMPORT_NAMES.get(n := Requirement(r).name, n) for r in PROJECT["dependencies"]} | set(VENDORED)
    assert {package for name in SOURCES for package in theirs(name)} <= required


def test_every_package_is_built_into_the_wheel() -> None:
    tool = tomllib.loads(PYPROJECT)["tool"]["setuptools"]
    folders = {".".join(path.parent.relative_to(REPOSITORY).parts) for path in PACKAGE.rglob("__init__.py")}
    assert set(tool["packages"]) == folders | {"bench.search_spaces"}
    assert tool["package-dir"] == {"bench.search_spaces": "search_spaces"}
    data = {"bench.search_spaces": ["*.yaml", "*/*.yaml"], "bench.pages": ["*.j2", "*.css", "*.js"]}
    assert tool["package-data"] == data


CONSTRAINTS = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
PINS = [Requirement(line) for line in CONSTRAINTS.splitlines() if line and not line.startswith("#")]


def test_constraints_are_exact_and_each_stands_once() -> None:
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in PINS)
    names = [(canonicalize_name(pin.name), str(pin.marker)) for pin in PINS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("requirement", [*RUNTIME, *EXTRAS["dev"], *EXTRAS["browser"]])
def test_a_pin_lies_in_its_range(requirement: str) -> None:
    wanted = Requirement(requirement)
    pins = [pin for pin in PINS if canonicalize_name(pin.name) == canonicalize_name(wanted.name)]
    assert pins, f"constraints.txt does not pin {wanted.name}"
    assert all(wanted.specifier.contains(str(pin.specifier).removeprefix("==")) for pin in pins)


# --- words -----------------------------------------------------------------------------------------------

TEXTS = [
    path
    for pattern in (
        "*.md",
        "*.toml",
        "*.txt",
        "Makefile",
        ".ci/*",
        "bench/**/*.py",
        "tests/**/*.py",
        "search_spaces/**/*.yaml",
    )
    for path in sorted(REPOSITORY.glob(pattern))
]
#: Paths of the machine that this was written on, and what is said there; in pieces, so that it is not said here.
LOCAL = re.compile(r"(?<![\w.~-])/(?:work|opt|root)/|\bwork" + r"place\b")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_file_knows_the_machine_it_was_written_on(path: Path) -> None:
    assert LOCAL.findall(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "Makefile", ".ci/run"])
def test_packaging_names_no_host(name: str) -> None:
    assert "://" not in (REPOSITORY / name).read_text(encoding="utf-8")
