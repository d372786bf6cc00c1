"""A page as one HTML file: style, script, Plotly and all numbers inside, so that it needs no network and no server.

Plotly's script (5 MB) and the figures are gzipped, and unpacked by the browser (DecompressionStream: Chrome 80, Firefox
113, Safari 16.4 or newer). The file's own policy forbids it to load anything.
"""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bench
from bench.config import UserError
from bench.files import write_atomic
from bench.pages.parts import Absent, Figure, Link, Page, Section, Table

if TYPE_CHECKING:
    from jinja2 import Environment

#: The page of a study, in its own folder: its command writes it when it ends.
PAGE = "report.html"

#: Of gzip: the best makes a page of 10,000 trials 2 % smaller, in three times the time.
_LEVEL = 6


def write(page: Page, path: Path) -> None:
    """Write the page; UserError where that cannot be."""
    if path.suffix != ".html":
        raise UserError(f"cannot write {path}: a page is a file .html; rename it.")
    write_atomic(path, render(page))


def render(page: Page) -> str:
    """The whole file. The same page gives the same bytes."""
    figures = [part for section in page.sections for part in section.parts if isinstance(part, Figure)]
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            page=page,
            sections=_numbered(page.sections),
            version=bench.__version__,
            style=_file("page.css"),
            script=_file("page.js"),
            plotly=_plotly() if figures else "",
            figures=_packed(json.dumps([_data(figure) for figure in figures], allow_nan=False).encode()),
        )
    )


def _numbered(sections: Any) -> list[dict[str, Any]]:
    """The sections, each part with its kind; figures have their number on the page, tables theirs."""
    figures = tables = 0
    found: list[dict[str, Any]] = []
    for section in sections:
        assert isinstance(section, Section)
        parts: list[dict[str, Any]] = []
        for part in section.parts:
            if isinstance(part, Figure):
                parts.append({"kind": "figure", "number": figures, "part": part})
                figures += 1
            elif isinstance(part, Table):
                parts.append({"kind": "table", "number": tables, "part": part})
                tables += 1
            else:
                assert isinstance(part, Absent)
                parts.append({"kind": "absent", "number": 0, "part": part})
        found.append({"title": section.title, "lines": section.lines, "parts": parts})
    return found


def _data(figure: Figure) -> dict[str, Any]:
    """What the script needs of a figure."""
    kept = {f.name: getattr(figure, f.name) for f in dataclasses.fields(figure) if f.name not in ("note", "unit")}
    head, cell = (["unit"], [figure.unit]) if figure.unit else ([], [])
    return {**kept, "rows": [[*row, *cell] for row in figure.rows], "columns": [*figure.columns, *head]}


@lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("bench", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.tests["link"] = lambda cell: isinstance(cell, Link)
    return made


@lru_cache(maxsize=1)
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return _packed(get_plotlyjs().encode())


def _file(name: str) -> str:
    return resources.files("bench.pages").joinpath(name).read_text(encoding="utf-8")


def _packed(data: bytes) -> str:
    """Gzipped, in base64; the same data give the same text."""
    return base64.b64encode(gzip.compress(data, _LEVEL, mtime=0)).decode()
