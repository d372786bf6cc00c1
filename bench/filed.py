"""What the files of a study say that MLflow should have: its settings, rows, own numbers and files. Nothing is run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from bench.config import Status, UserError
from bench.files import read_yaml
from bench.kinds import KINDS
from bench.pages.render import PAGE
from bench.reading import Found, read_search, search_summary
from bench.rows import TRAININGS, Row, RowFile
from bench.summary import headline
from bench.tracking import metric_name

#: Whatever of these a study has, its run in MLflow has too; and its book, and its figures.
FILES = ("rows.jsonl", "journal.log", "storage.yaml", "best.yaml", "front.json", "summary.json", PAGE)

#: What is recorded of a row.
NEEDED = {"uid", "study", "kind", "status", "config", "metrics", "history", "provenance"}


@dataclass(frozen=True, kw_only=True)
class Filed:
    """A study. ``dataset``: name and digest, if all have one. ``metrics``, ``curves``: as MLflow names them.

    ``complete``: nothing is left to run. ``rows``: of a search, those of its controls too.
    """

    name: str
    identity: str
    config: Mapping[str, Any]
    tags: Mapping[str, Any]
    dataset: tuple[str, str] | None
    rows: Sequence[Row]
    files: Sequence[Path]
    metrics: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Mapping[float, float]] = field(default_factory=dict)
    complete: bool = False


def read_filed(found: Found) -> Filed:
    """What is in the folder of a study. UserError for what is damaged."""
    kind = KINDS[found.kind]
    path = found.folder / kind.manifest
    kept = read_yaml(path)
    config, identity = kept.get("config"), kept.get("id")
    if not (isinstance(config, dict) and isinstance(identity, str)):
        raise UserError(f"{path} is damaged: it has no config, or no id. Restore it.")
    try:
        dataset = kind.dataset(config)["dataset"]
        common = {
            "name": str(config["name"]),  # also where its folder was renamed
            "identity": identity,
            "tags": kind.run_tags(kept),
            "dataset": (str(dataset), str(kept.get("runs_on")).partition(" ")[2]),
            "files": _files(found.folder, kind.manifest),
        }
        return _search(found, common) if found.kind == "search" else _plan(found, config, common)
    except (KeyError, TypeError, AttributeError, OverflowError, StopIteration) as error:
        raise UserError(f"{found.folder} is damaged ({type(error).__name__}: {error}); restore its files.") from error


def trainings_of(results: Path) -> Path:
    """Where the rows of single runs are."""
    return results / TRAININGS / "rows.jsonl"


def read_trainings(results: Path) -> Filed:
    """The single runs of `bench train`: a study in MLflow, of which nothing but their rows is kept."""
    rows = _rows(trainings_of(results))
    return Filed(name=TRAININGS, identity=TRAININGS, config={}, tags={}, dataset=None, rows=rows, files=())


def _files(folder: Path, book: str) -> list[Path]:
    named = [folder / name for name in (book, *FILES)]
    return [path for path in (*named, *sorted(folder.glob("*.svg"))) if path.is_file()]


def _rows(path: Path) -> list[Row]:
    """All attempts, each of which was a run; a torn last line is said by who repairs it."""
    rows = RowFile(path, say=lambda _: None).read()
    for row in rows:
        if not (row.keys() >= NEEDED and row["status"] in get_args(Status)):
            raise UserError(f"{path}: the row of {row['uid']} is damaged; repair or remove that line.")
    return rows


def _search(found: Found, common: Mapping[str, Any]) -> Filed:
    rows = read_search(found)
    assert rows.config is not None
    summary = search_summary(rows)
    return Filed(
        **common,
        config=rows.config.to_dict(),
        rows=[*_rows(found.folder / "rows.jsonl"), *rows.controls],
        metrics=_named(headline(summary)),
        complete=summary["complete"],
    )


def _plan(found: Found, config: Mapping[str, Any], common: Mapping[str, Any]) -> Filed:
    """A plan whose command did not come to its end has no summary, and so no numbers of its own."""
    path = found.folder / "summary.json"
    try:
        summary = json.loads(path.read_text()) if path.exists() else None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); the study's own command writes it anew.") from error
    known: dict[str, Any] = {}
    if summary is not None:
        kind = KINDS[found.kind]
        curves = kind.load("curves")(summary) if kind.curves else {}
        known = {
            "metrics": _named(kind.load("headline")(summary)),
            "curves": {metric_name(name): kept for name, points in curves.items() if (kept := _at_levels(points))},
            "complete": summary["complete"],
        }
    return Filed(**common, config=config, rows=_rows(found.folder / "rows.jsonl"), **known)


def _at_levels(points: Mapping[float, float]) -> dict[float, float]:
    return {level: float(value) for level, value in points.items() if math.isfinite(level) and math.isfinite(value)}


def _named(metrics: Mapping[str, float]) -> dict[str, float]:
    return {metric_name(name): float(value) for name, value in metrics.items() if math.isfinite(value)}
