"""What killed and interrupted runs left in a results folder: the checks of it behind ``bench doctor``. Reads only."""

from __future__ import annotations

from pathlib import Path

from bench.check import Check
from bench.config import UserError
from bench.filed import Filed, read_filed
from bench.files import is_taken
from bench.reading import Found, find

#: So many names stand in one finding.
_NAMED = 5


def check_leftovers(results: Path) -> list[Check]:
    """Which studies are unfinished, and which files are torn."""
    try:
        studies = find(results)
    except UserError as error:
        return [Check(name="studies", status="fail", detail=str(error), remedy="permit it, or name another --results")]
    return [check_studies(studies), check_torn(studies)]


def check_studies(studies: list[Found]) -> Check:
    """Studies that are not complete and that no driver is at work on, and damaged ones."""
    unfinished, damaged = [], []
    for found in studies:
        if is_taken(found.folder / "lock"):
            continue
        try:
            filed = read_filed(found)
        except UserError as error:
            damaged.append(str(error))
            continue
        if not filed.complete:
            unfinished.append(f"{filed.name} ({_progress(filed)})")
    if damaged:
        return Check(name="studies", status="warn", detail=_some(damaged), remedy="as it says")
    if unfinished:
        detail = f"unfinished, and without a driver: {_some(unfinished)}"
        remedy = "the same command goes on; bench sync ends what they left open in MLflow"
        return Check(name="studies", status="warn", detail=detail, remedy=remedy)
    count = f"{len(studies)} studies, each finished or under way" if studies else "none yet"
    return Check(name="studies", status="ok", detail=count)


def _progress(filed: Filed) -> str:
    trials = sum(row["kind"] == "search" for row in filed.rows)
    budget = filed.config.get("trials")
    return f"{trials} of {budget} trials" if budget else f"{len(filed.rows)} runs"


def _some(words: list[str]) -> str:
    return ", ".join(words[:_NAMED]) + (f" and {len(words) - _NAMED} more" if len(words) > _NAMED else "")


def check_torn(studies: list[Found]) -> Check:
    """Rows and journals whose last line was not written to its end, of studies that nobody writes to now."""
    files = [found.folder / name for found in studies for name in ("rows.jsonl", "journal.log")]
    torn = [str(path) for path in files if not is_taken(path.with_name("lock")) and _is_torn(path)]
    if torn:
        remedy = "nothing need be done: the study's next start cuts that line off, and says so"
        return Check(name="torn files", status="warn", detail=f"last line torn: {_some(torn)}", remedy=remedy)
    return Check(name="torn files", status="ok", detail="no rows or journal with a torn last line")


def _is_torn(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 1))
            return size > 0 and file.read(1) != b"\n"
    except FileNotFoundError:
        return False
