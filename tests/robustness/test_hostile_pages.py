"""Rows that somebody else wrote: whatever their words are, a page runs nothing of them, and a table is no formula."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bench.pages.parts import Absent, Figure, Link, Page, Section, Table, plot
from bench.pages.render import render
from malformed import examples, run, said_in_one_line

PUBLISHED = Path(__file__).parents[2] / "results" / "published"
SEARCH = PUBLISHED / "symmetric-resnet18-digits.jsonl"

HOSTILE = (
    *("<script>alert(1)</script>", "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "'\"><b>"),
    *('" onmouseover="alert(1)', "javascript:alert(1)", "{{ 7 * 7 }}", "{% raw %}", "%{y}", "<a href='//x'>y</a>"),
    *("]]>", "<!--", "--></title>", "&lt;", "=1+1", "+cmd|' /C calc'!A0", "@SUM(1)", "-2+3", "[link=x]y[/link]", "[/]"),
)
WORDS = st.sampled_from(HOSTILE) | st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=20)


class Elements(html.parser.HTMLParser):
    """The elements of a page with the names of their attributes, and what stands in its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []
        self.scripts: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))
        self.links += [str(value) for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] == "script":
            self.scripts.append(data)


def page(word: str) -> str:
    figure = Figure(title=word, note=word, plot=plot([]), columns=(word,), rows=[(word,)], unit=word)
    table = Table(title=word, columns=(word, "n"), rows=[(word, Link(text=word, href="a.html"))], notes=(word,))
    parts = (figure, table, Absent(title=word, reason=word))
    sections = [Section(title=word, lines=(word,), parts=parts), Section(title=word)]
    return render(Page(title=word, kind=word, facts={word: word}, lines=(word,), sections=sections))


CLEAN = Elements(page("word"))


@examples(60)
@given(WORDS)
@example("")
def test_no_word_becomes_an_element_or_a_script(word: str) -> None:
    found = Elements(page(word))
    assert found.found == CLEAN.found
    assert found.links == CLEAN.links
    assert all(text.isascii() and "<" not in text for text in found.scripts[:2]), "figures and Plotly are base64"
    assert found.scripts[-1] == CLEAN.scripts[-1], "the page's own script is another"


PLACES = (
    *(("uid",), ("study",), ("reason",), ("config", "rule"), ("config", "arch"), ("config", "dataset")),
    *(("provenance", "device_name"), ("provenance", "git_revision"), ("provenance", "versions", "torch")),
    *(
        ("provenance", "device"),
        ("provenance", "dataset_digest"),
        ("metrics", "val_acc/x"),
        ("history", 0, "val_acc/x"),
    ),
)


def put(value: Any, at: tuple[Any, ...], word: str) -> None:
    for key in at[:-1]:
        value = value[key]
    if "/x" in str(at[-1]):
        value[f"angle/{word}"] = 1.0
    else:
        value[at[-1]] = word


def whole() -> list[dict[str, Any]]:
    return [json.loads(line) for line in SEARCH.read_text().splitlines()]


@examples(30)
@given(st.sampled_from(PLACES), WORDS)
@example(("reason",), HOSTILE[0])
@example(("config", "arch"), "=HYPERLINK(1)")
def test_a_copied_file_of_rows_runs_nothing(place: tuple[Any, ...], word: str) -> None:
    rows = whole()
    for number, each in enumerate(rows):
        put(each, place, f"{word}{number}" if place == ("uid",) else word)
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "copied.jsonl", Path(folder) / "pages"
        file.write_text("".join(json.dumps(each) + "\n" for each in rows))
        status, _, err = run(["report", str(file), "--out", str(out)])
        said_in_one_line(status, err)
        for made in out.glob("*"):
            found = Elements(made.read_text())
            assert [tag for tag, _ in found.found].count("script") == 3
            assert not [name for _, names in found.found for name in names if name.startswith("on")]
            assert found.links == [f"#section-{i}" for i in range(1, len(found.links) + 1)]
        status, text, err = run(["compare", str(file), "--csv"])
        said_in_one_line(status, err)
        for cell in (cell for line in csv.reader(io.StringIO(text)) for cell in line):
            assert cell[:1] not in ("=", "@", "\t", "\r")
            assert cell[:1] not in ("+", "-") or float(cell) == float(cell)
        status, text, err = run(["compare", str(file)])
        said_in_one_line(status, err)
        assert "\x1b" not in text


@pytest.mark.parametrize("word", ["\x1b]0;owned\x07", "\x1b[2J", "a\nb", "\u202eevil", "[/]", "[red]x"])
def test_a_name_is_no_command_to_the_terminal(word: str, tmp_path: Path) -> None:
    rows = whole()
    for each in rows:
        each["config"]["arch"] = each["reason"] = word
    file = tmp_path / "copied.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    for arguments in (
        ["compare", str(file)],
        ["compare", str(file), "--csv"],
        ["report", str(file), "--out", str(tmp_path)],
    ):
        status, out, err = run(arguments)
        said_in_one_line(status, err)
        for text in (out, err):
            assert all(c.isprintable() for c in text.replace("\r\n", "").replace("\n", ""))
