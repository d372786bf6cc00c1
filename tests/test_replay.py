"""Summaries made again from rows alone are those that the commands printed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import matrix, robustness_points, transfer
from bench.config import UserError
from bench.pages.transfer import transfer_page

PUBLISHED = Path(__file__).parents[1] / "results" / "published"
MATRIX = PUBLISHED / "matrix-resnet18-digits" / "matrix-resnet18-digits-normalized-centered"
TRANSFER = PUBLISHED / "transfer-resnet18-resnet50-digits" / "transfer-resnet18-to-resnet50-digits"
ROBUSTNESS = PUBLISHED / "robustness-resnet18-digits" / "robustness-resnet18-digits"


def printed(folder: Path) -> dict[str, Any]:
    """What the command left as its summary, without what is of the moment; then a space was called a scaling."""
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    for part in (found, *found.get("pairs", ()), *found.get("rules", ())):
        if "scaling" in part:
            part["space"] = part.pop("scaling")
    found.pop("busy")
    return found


def test_a_matrix_again_is_what_it_was() -> None:
    again = json.loads(json.dumps(matrix.read_summary(MATRIX)))
    for line in (line for arch in again["archs"].values() for line in arch["table"]):
        assert line.pop("floor_angle", None) is None  # the release that ran it did not measure the floor
    assert again == printed(MATRIX)
    assert again["complete"]


def test_a_transfer_again_is_what_it_was() -> None:
    again = json.loads(json.dumps(transfer.read_summary(TRANSFER)))
    assert again["complete"]
    for pair in again["pairs"]:  # older releases did not keep them in the summary
        points = pair["rank"].pop("points")
        assert len(points) == pair["rank"]["n"]
    was = printed(TRANSFER)
    for pair in was["pairs"]:
        pair["rank"].pop("points", None)
    assert again == was


def test_a_measurement_again_has_the_grid_of_its_last_command() -> None:
    """Rows at σ = 0.5 and 32 are of another grid; the numbers are those of the README's table."""
    found = robustness_points.read_summary(ROBUSTNESS)
    (site,) = found["sites"]
    assert (found["complete"], site["levels"]) == (True, [1, 2, 4, 8, 16])
    assert (sum(found["runs"].values()), found["other_levels"]) == (120, 24)
    assert found["runs"]["diverged"] == site["counts"]["diverged"] == 38
    rules = {rule["rule"]: rule for rule in site["rules"]}
    assert all(rule["incomplete"] == 0 for rule in rules.values())
    assert rules["backprop"]["clean"]["mean"] == pytest.approx(0.98, abs=0.02)


def test_a_matrix_whose_searches_are_not_all_there_is_not_complete(tmp_path: Path) -> None:
    copy = shutil.copytree(MATRIX.parent, tmp_path / "results")
    shutil.rmtree(copy / "amp-resnet18-digits-normalized-centered")
    found = matrix.read_summary(copy / MATRIX.name)
    assert not found["complete"]
    assert found["archs"]["resnet18"]["subsets"]["measured"] == 30


def test_a_transfer_names_the_searches_that_are_not_there(tmp_path: Path) -> None:
    copy = shutil.copytree(TRANSFER.parent, tmp_path / "results")
    shutil.rmtree(copy / "mirror-resnet50-digits")
    found = transfer.read_summary(copy / TRANSFER.name)
    assert (found["complete"], found["missing"]) == (False, ["mirror-resnet50-digits-reference"])
    assert {(p["rule"], p["space"]) for p in found["pairs"]}.isdisjoint({("mirror", "reference")})
    page = transfer_page(found)
    assert page.facts["Searches that are not there"] == "mirror-resnet50-digits-reference"


def test_what_cannot_be_shown_is_said(tmp_path: Path) -> None:
    alone = shutil.copytree(MATRIX, tmp_path / "results" / MATRIX.name)
    with pytest.raises(UserError, match="none of this plan's searches is there"):
        matrix.read_summary(alone)
    (alone / "matrix.yaml").write_text("config: 3\n")
    with pytest.raises(UserError, match=r"matrix\.yaml is damaged"):
        matrix.read_summary(alone)


def test_a_report_cannot_start_a_run(tmp_path: Path) -> None:
    """It needs neither Ray nor MLflow: both may be missing."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('ray', 'mlflow')));"
        "from pathlib import Path; from bench.report import report;"
        f"print(len(report(Path({str(TRANSFER.parent)!r}), [{TRANSFER.name!r}], Path({str(tmp_path)!r}), say=print)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("1", "")
