"""What a person sees: every kind of page, and MLflow's own interface, in a real browser. `make test-browser`.

The pages are made from the committed rows. Nothing may be asked of any network but this machine's own MLflow.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PUBLISHED = Path(__file__).parents[2] / "results" / "published"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed"),
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)"),
]

#: A page of each kind: what `bench report` is given, and how many figures it must have at least.
KINDS = {
    "search": (["symmetric-resnet18-digits.jsonl"], PUBLISHED, 8),
    "diverged": (["information-lenet-imagefolder-cifar10.jsonl"], PUBLISHED, 8),
    "transfer": (["transfer-resnet18-to-resnet50-digits"], PUBLISHED / "transfer-resnet18-resnet50-digits", 3),
    "matrix": (["matrix-resnet18-digits-normalized-centered"], PUBLISHED / "matrix-resnet18-digits", 4),
    "robustness": (["robustness-resnet18-digits"], PUBLISHED / "robustness-resnet18-digits", 2),
}


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each kind, as `bench report` makes it."""
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    for kind, (studies, results, _) in KINDS.items():
        given = [str(results / name) if name.endswith(".jsonl") else name for name in studies]
        found[kind] = folder / f"{kind}.html"
        run("report", *given, "--results", str(results), "--out", str(found[kind]))
    run("report", "--results", str(PUBLISHED / "transfer-resnet18-resnet50-digits"), "--out", str(folder / "all"))
    found["index"] = folder / "all" / "index.html"
    return found


def run(*arguments: str, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "bench.cli", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # in a container its sandbox has no rights; what is opened here is our own
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Visit:
    """One page in one browser window, and what went wrong in it."""

    def __init__(self, browser: Any, address: str, **context: Any) -> None:
        self.window = browser.new_context(accept_downloads=True, **context)
        self.page = self.window.new_page()
        self.trouble: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda m: self.trouble.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)

    def draw(self) -> int:
        """Draw every figure, and wait for them; how many there are."""
        self.page.wait_for_function("window.drawEverything !== undefined")
        self.page.evaluate("window.drawEverything()")
        count: int = self.page.locator("[data-figure]").count()
        self.page.wait_for_function(f"document.querySelectorAll('.plot .main-svg').length >= {count}")
        return count


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    visits: list[Visit] = []

    def open_page(path: Path, **context: Any) -> Visit:
        visits.append(Visit(browser, path.as_uri(), **context))
        return visits[-1]

    yield open_page
    for each in visits:
        each.window.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_draws_all_that_it_has_and_asks_no_network(
    kind: str, scheme: str, pages: dict[str, Path], visit: Any
) -> None:
    seen = visit(pages[kind], color_scheme=scheme)
    assert seen.draw() >= KINDS[kind][2]
    assert seen.trouble == []
    outside = [url for url in seen.asked if not url.startswith(("file://", "data:", "blob:"))]
    assert outside == []
    # a figure is more than its frame: something is drawn in each
    empty = seen.page.evaluate(
        "[...document.querySelectorAll('[data-figure]')].filter(f => !f.querySelector("
        "'.plot path, .plot .heatmaplayer image, .plot canvas')).map(f => f.querySelector('h3').textContent)"
    )
    assert empty == []
    color = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert color == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 28)")


@pytest.mark.parametrize("kind", [*KINDS, "index"])
def test_a_page_fits_a_phone(kind: str, pages: dict[str, Path], visit: Any) -> None:
    seen = visit(pages[kind], viewport={"width": 400, "height": 800})
    seen.draw()
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= 400


@pytest.mark.parametrize("kind", [*KINDS, "index"])
def test_every_figure_says_what_it_is_of(kind: str, pages: dict[str, Path], visit: Any) -> None:
    seen = visit(pages[kind])
    notes = seen.page.locator("[data-figure] .note").all_text_contents()
    assert len(notes) == seen.page.locator("[data-figure]").count()
    for note in notes:
        assert re.search(r"\bn\b|\d+ (of|trials|runs|seeds|configurations|subsets|searches|networks|pairs)", note), note
        assert re.search(r"\btest\b|validation", note), note


def test_a_table_is_sorted_by_a_click(pages: dict[str, Path], visit: Any) -> None:
    page = visit(pages["matrix"]).page
    table = page.locator("table").first
    head = table.locator("th", has_text="test %").first
    column = head.evaluate("th => [...th.parentNode.children].indexOf(th)")

    def values() -> list[float]:
        cells = table.locator(f"tbody tr td:nth-child({column + 1})").all_text_contents()
        return [float(found[0]) for cell in cells if (found := re.match(r"-?\d+\.\d+", cell))]

    before = values()
    assert len(before) > 20
    head.locator("button").click()
    assert values() == sorted(before)
    head.locator("button").click()
    assert values() == sorted(before, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"


def test_a_table_is_copied(pages: dict[str, Path], visit: Any) -> None:
    seen = visit(pages["search"])
    seen.window.grant_permissions(["clipboard-read", "clipboard-write"])
    seen.page.locator("[data-copy]").first.click()
    text = seen.page.evaluate("navigator.clipboard.readText()")
    rows = [line.split("\t") for line in text.splitlines()]
    assert len(rows) == seen.page.locator("table").first.locator("tr").count()
    assert {len(row) for row in rows} == {seen.page.locator("table").first.locator("th").count()}


def test_a_point_says_what_it_is_when_the_mouse_is_over_it(pages: dict[str, Path], visit: Any) -> None:
    seen = visit(pages["robustness"])
    seen.draw()
    plot = seen.page.locator(".plot").first
    plot.scroll_into_view_if_needed()
    point = plot.locator(".scatterlayer .point").first
    box = point.bounding_box()
    seen.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=4)
    label = plot.locator(".hoverlayer .hovertext")
    label.first.wait_for()
    assert re.search(r"\d", label.first.text_content())


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_of_every_figure_are_handed_out(
    kind: str, pages: dict[str, Path], visit: Any, tmp_path: Path
) -> None:
    seen = visit(pages[kind])
    seen.draw()
    names = set()
    for button in seen.page.locator("[data-csv]").all():
        seen.page.wait_for_timeout(200)  # Chromium drops the eleventh download of a second
        with seen.page.expect_download() as waiting:
            button.click()
        file = tmp_path / waiting.value.suggested_filename
        waiting.value.save_as(file)
        names.add(file.name)
        with file.open(newline="") as opened:
            head, *rows = list(csv.reader(opened))
        assert f"({len(rows)} rows)" in button.text_content()
        assert rows
        assert {len(row) for row in rows} == {len(head)}
    assert len(names) == seen.page.locator("[data-csv]").count()


def test_the_index_leads_to_the_pages(pages: dict[str, Path], visit: Any) -> None:
    seen = visit(pages["index"])
    links = seen.page.locator("table a")
    assert links.count() > 8
    name = links.first.text_content()
    links.first.click()
    seen.page.wait_for_load_state()
    assert name in seen.page.title() or name in seen.page.url
    assert seen.page.locator("[data-figure]").count() > 0


def test_a_printed_page_is_light_and_whole(pages: dict[str, Path], visit: Any, tmp_path: Path) -> None:
    seen = visit(pages["search"], color_scheme="dark")
    seen.draw()
    seen.page.emulate_media(media="print")
    assert seen.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not seen.page.locator("[data-csv]").first.is_visible()
    seen.page.pdf(path=tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").stat().st_size > 50_000


@contextmanager
def interrupted(server: subprocess.Popen[str]) -> Iterator[None]:
    """Ctrl-C at the end, which ends it well."""
    try:
        yield
    finally:
        server.send_signal(signal.SIGINT)
    assert server.wait(timeout=30) == 0


def test_mlflow_shows_the_runs_of_a_study_through_the_printed_link(tmp_path: Path, browser: Any) -> None:
    search = [
        *("search", "--rule", "symmetric", "--arch", "lenet", "--trials", "2", "--epochs", "1", "--confirm-seeds", "1"),
        *("--set", "train_examples=64", "--set", "batch_size=32", "--set", "warmup_epochs=0", "--json"),
    ]
    found = json.loads(run(*search, cwd=tmp_path))
    command = [sys.executable, "-m", "bench.cli", "ui", "--port", "0", "--optuna"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as server, interrupted(server):
        assert server.stdout is not None
        said: list[str] = []
        for line in server.stdout:
            said.append(line.strip())
            if "Ctrl-C" in line:
                break
        link = next(line.partition(": ")[2] for line in said if line.startswith(f"{found['study']}: "))
        visit = Visit(browser, link, viewport={"width": 1600, "height": 1000})
        names = ["search 0000", "search 0001", "confirm symmetric seed 1000", "control backprop seed 1000"]
        for name in names:
            visit.page.get_by_text(name, exact=False).first.wait_for(timeout=60_000)
        visit.window.close()
        dashboard = next(line.partition(": ")[2] for line in said if line.startswith("Optuna's dashboard"))
        visit = Visit(browser, dashboard)
        visit.page.get_by_text(found["study"], exact=False).first.wait_for(timeout=60_000)
        visit.window.close()
        assert any("report.html" in line for line in said if line.startswith("Pages"))
        page = re.search(r"file://\S+report\.html", "\n".join(said))
        assert page is not None
        own = Visit(browser, page[0])
        assert own.draw() > 0
        assert own.trouble == []
        own.window.close()
