"""What is installed, imported and pinned; who may import what stands in pyproject.toml, and `make check` looks."""

from __future__ import annotations

import ast
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
PYPROJECT = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
PROJECT = tomllib.loads(PYPROJECT)["project"]
EXTRAS = PROJECT["optional-dependencies"]
RUNTIME = [*PROJECT["dependencies"], *EXTRAS["vision"], *EXTRAS["postgresql"]]

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


# --- packaging -------------------------------------------------------------------------------------------


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write relative imports in full"
            found.add(str(node.module).partition(".")[0])
    return found - {"bench", *sys.stdlib_module_names}


def test_what_is_imported_is_required_and_has_an_owner() -> None:
    used = {package for path in PACKAGE.rglob("*.py") for package in imported(path)}
    required = {IMPORT_NAMES.get(n := Requirement(r).name, n) for r in PROJECT["dependencies"]} | set(VENDORED)
    contracts = tomllib.loads(PYPROJECT)["tool"]["importlinter"]["contracts"]
    owned = {package for contract in contracts for package in contract.get("protected_modules", ())}
    assert used <= required
    assert used == owned


def reason(requirement: str) -> str:
    """The comment behind a requirement in pyproject.toml."""
    found = re.search(rf'^ *"{re.escape(requirement)}", +# (.+)$', PYPROJECT, re.MULTILINE)
    assert found is not None, f"pyproject.toml: {requirement} has no comment that says who uses it"
    return found[1]


@pytest.mark.parametrize("requirement", RUNTIME)
def test_a_dependency_is_used_where_its_comment_says(requirement: str) -> None:
    name = Requirement(requirement).name
    through = re.search(r"through (\w+)", reason(requirement))
    package = through[1] if through else IMPORT_NAMES.get(name, name)
    named = [REPOSITORY / path for path in re.findall(r"bench(?:/\w+)+(?:\.py)?", reason(requirement))]
    files = [file for path in named for file in ([path] if path.is_file() else path.rglob("*.py"))]
    by_name = name in ("torchvision", "timm")  # imported when a user asks for a network of theirs
    assert any(f'"{package}"' in file.read_text() if by_name else package in imported(file) for file in files)


@pytest.mark.parametrize("requirement", [*EXTRAS["dev"], *EXTRAS["browser"]])
def test_a_tool_is_said_to_be_used(requirement: str) -> None:
    assert re.match(r"make (check|test|test-browser)\b", reason(requirement))


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
