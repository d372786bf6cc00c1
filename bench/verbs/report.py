"""`bench report`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.verbs.common import add_json, add_kept, verb


def add(verbs: Any) -> None:
    p = verb(verbs, "report", _report, "make pages of figures and tables from result rows; nothing is run")
    p.add_argument("studies", nargs="*", metavar="STUDY", help="names in the results, folders, or files of rows (all)")
    p.add_argument("--out", type=Path, default=Path("dashboards"), metavar="PATH", help="a folder, or one page's .html")
    add_kept(p, writes=False)
    add_json(p)


def _report(given: argparse.Namespace) -> int:
    from bench.report import report
    from bench.terminal import Progress

    with Progress(sys.stderr) as bar:
        made = report(given.results, given.studies, given.out, say=bar.say, show=bar.show, tick=bar.tick)
    if given.json:
        print(json.dumps([{**vars(page), "path": str(page.path)} for page in made]))
        return 0
    for page in made:
        print(f"{page.path}: {page.kind}, {page.size / 1e6:.1f} MB")
    return 0
