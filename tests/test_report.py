"""`bench report`: which pages it writes, and what it refuses. What is on them: tests/test_page_*.py."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
from pathlib import Path

import pytest

from bench.cli import main
from bench.config import UserError
from bench.pages.parts import SHARES, Figure, Page, Section, plot
from bench.pages.render import render
from bench.report import report

PUBLISHED = Path(__file__).parents[1] / "results" / "published"
TRANSFER = PUBLISHED / "transfer-resnet18-resnet50-digits"


def studies(results: Path) -> list[str]:
    return sorted(folder.name for folder in results.iterdir() if folder.name != "controls")


def test_all_studies_have_a_page_and_the_index_leads_to_each(tmp_path: Path) -> None:
    said: list[str] = []
    made = report(TRANSFER, [], tmp_path, say=said.append)
    assert said == []
    assert [page.name for page in made] == [*studies(TRANSFER), "index"]
    assert {page.kind for page in made} == {"search", "transfer", "index"}
    index = (tmp_path / "index.html").read_text()
    for name in studies(TRANSFER):
        assert f'href="{name}.html"' in index
        assert (tmp_path / f"{name}.html").is_file()
    for page in made:
        assert page.size == page.path.stat().st_size < 5_000_000
    # it needs no network: nothing is fetched by any address, and the policy forbids it
    assert not re.search(r'(?:src|href)="(?:https?:)?//', index)
    assert "default-src 'none'" in index


def test_the_same_rows_give_the_same_page(tmp_path: Path) -> None:
    name = "symmetric-resnet18-digits"
    first, second = (report(TRANSFER, [name], tmp_path / f"{i}.html", say=print)[0].path for i in (1, 2))
    assert first.read_bytes() == second.read_bytes()


def test_a_study_with_nothing_to_show_is_left_out_and_said(tmp_path: Path) -> None:
    results = tmp_path / "results"
    for name in ("symmetric-resnet18-digits", "controls"):
        shutil.copytree(TRANSFER / name, results / name)
    shutil.copytree(TRANSFER / "transfer-resnet18-to-resnet50-digits", results / "lonely")
    (results / "lonely" / "transfer.yaml").write_text("id: x\n")
    said: list[str] = []
    made = report(results, [], tmp_path / "pages", say=said.append)
    assert [page.name for page in made] == ["symmetric-resnet18-digits", "index"]
    assert len(said) == 1
    assert said[0].startswith("left out: lonely: ")
    index = (tmp_path / "pages" / "index.html").read_text()
    assert "transfer.yaml is damaged" in index
    assert 'href="lonely.html"' not in index
    with pytest.raises(UserError, match="is damaged"):  # of what was asked for, it is an error
        report(results, ["lonely"], tmp_path / "pages", say=print)


@pytest.mark.parametrize(
    ("names", "out", "said"),
    [
        ([], "pages", "nothing to report"),
        (["nonsense"], "pages", "there is no study"),
        (
            [str(TRANSFER / "symmetric-resnet18-digits"), str(TRANSFER / "symmetric-resnet50-digits")],
            "a.html",
            "one page",
        ),
        (
            [str(PUBLISHED / "symmetric-resnet18-digits.jsonl"), str(TRANSFER / "symmetric-resnet18-digits")],
            "pages",
            "are both symmetric-resnet18-digits",
        ),
    ],
)
def test_what_cannot_be_reported_is_one_line(
    names: list[str], out: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["report", *names, "--results", str(tmp_path / "empty"), "--out", str(tmp_path / out)])
    captured = capsys.readouterr()
    assert (status, captured.out) == (2, "")
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert not (tmp_path / out).exists()


def test_a_study_with_the_name_of_the_index_is_refused(tmp_path: Path) -> None:
    shutil.copytree(TRANSFER / "symmetric-resnet18-digits", tmp_path / "results" / "index")
    with pytest.raises(UserError, match="are both index"):
        report(tmp_path / "results", [], tmp_path / "pages", say=print)


def test_a_search_under_way_says_how_far_it_is(tmp_path: Path) -> None:
    results, name = tmp_path / "results", "symmetric-resnet18-digits"
    shutil.copytree(TRANSFER / name, results / name)
    rows = (results / name / "rows.jsonl").read_text().splitlines(keepends=True)
    trials = [line for line in rows if '"kind": "search"' in line]
    (results / name / "rows.jsonl").write_text("".join(trials[:2]))
    report(results, [], tmp_path / "pages", say=print)
    page = (tmp_path / "pages" / f"{name}.html").read_text()
    assert "<dd>2 of 5 trials × 3 epochs</dd>" in page
    assert "<dd>no: the same command goes on</dd>" in page
    index = (tmp_path / "pages" / "index.html").read_text()
    assert "<dt>not complete</dt><dd>1</dd>" in index


def test_a_file_of_rows_that_is_none_is_one_line(tmp_path: Path) -> None:
    name = "symmetric-resnet18-digits"
    shutil.copytree(TRANSFER / name, tmp_path / name)
    (tmp_path / name / "rows.jsonl").unlink()
    (tmp_path / name / "rows.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot read"):
        report(tmp_path, [name], tmp_path / "pages", say=print)


def test_the_csv_says_its_unit_where_the_axes_have_another() -> None:
    figure = Figure(title="t", note="n", plot=plot([]), columns=("rule", "mean"), rows=[("amp", 0.5)], unit=SHARES)
    html = render(Page(title="p", kind="k", facts={}, sections=[Section(title="s", parts=[figure])]))
    packed = re.search(r'id="figures">([^<]*)<', html)
    assert packed is not None
    (data,) = json.loads(gzip.decompress(base64.b64decode(packed[1])))
    assert (data["columns"], data["rows"]) == (["rule", "mean", "unit"], [["amp", 0.5, "share of 1"]])


def test_rows_of_a_plan_without_its_book_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "alone.jsonl"
    shutil.copy(PUBLISHED / "robustness-resnet18-digits" / "robustness-resnet18-digits" / "rows.jsonl", file)
    with pytest.raises(UserError, match="give the folder with its book"):
        report(tmp_path, [str(file)], tmp_path / "pages", say=print)
