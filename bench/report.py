"""`bench report`: a page for each study, and an index of all. From rows alone; nothing here can start a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bench.cells import difference, spread_of
from bench.config import UserError
from bench.kinds import KINDS
from bench.pages.index import Entry, index_page
from bench.pages.parts import Page
from bench.pages.render import write
from bench.reading import Found, find, pick, read_search, search_summary
from bench.summary import REFERENCE, budget_words, space_words

INDEX = "index.html"

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Made:
    """A page that was written; ``size`` in bytes."""

    name: str
    kind: str
    path: Path
    size: int


def report(
    results: Path,
    studies: Sequence[str],
    out: Path,
    *,
    say: Say,
    show: Callable[[Callable[[], str]], None] = lambda _: None,
    tick: Callable[[], None] = lambda: None,
) -> list[Made]:
    """Write the pages of these studies; of all of them, and an index, if none is named.

    ``out``: a folder, or the file of the one page. A study without anything to show is said, and left out; if it was
    named, it is a UserError. ``show`` and ``tick``: the live display's.
    """
    found = pick(results, studies) if studies else find(results)
    if not studies and not found:
        raise UserError(f"nothing to report in {results}: run `bench search` first, or give its folder with --results.")
    _refuse_twins(found)
    single = out.suffix == ".html"
    if single and (len(found) > 1 or not studies):
        raise UserError(f"--out {out} is one page: name one study, or give a folder.")
    made: list[Made] = []
    entries: list[Entry] = []
    show(lambda: f"{len(made)} of {len(found)} pages")
    for each in found:
        tick()
        try:
            page, entry = _page(each)
        except UserError as error:
            if studies:
                raise
            say(f"left out: {each.name}: {error}")
            entries.append(_unreadable(each, str(error)))
            continue
        path = out if single else out / f"{each.name}.html"
        made.append(_written(page, path, each.name, each.kind))
        entries.append(entry)
    if not studies:
        made.append(_written(index_page(entries), out / INDEX, "index", "index"))
    return made


def _refuse_twins(found: Sequence[Found]) -> None:
    """UserError for two studies of one name, and one of the index's: their pages would be one file."""
    seen: dict[str, Path] = {Path(INDEX).stem: Path(INDEX)}
    for each in found:
        if each.name in seen:
            raise UserError(
                f"{seen[each.name]} and {each.folder} are both {each.name}: report one at a time, with --out."
            )
        seen[each.name] = each.folder


def _written(page: Page, path: Path, name: str, kind: str) -> Made:
    write(page, path)
    return Made(name=name, kind=kind, path=path, size=path.stat().st_size)


def _page(found: Found) -> tuple[Page, Entry]:
    """The page of a study, and its line in the index."""
    kind = KINDS[found.kind]
    if found.kind == "search":  # its rows alone make a page, too, and all of them are on it
        rows = read_search(found)
        summary = search_summary(rows)
        page = kind.load("page")(summary, rows.searched, rows.confirmed, rows.controls)
    elif found.folder.is_file():
        raise UserError(f"{found.folder}: rows of a {found.kind} alone make no page; give the folder with its book.")
    else:
        summary = kind.load("read")(found.folder)
        page = kind.load("page")(summary)
    complete, when = summary["complete"], _when(found)
    own = kind.load("line")(summary)
    return page, Entry(name=found.name, kind=found.kind, href=_href(found), when=when, complete=complete, **own)


def _unreadable(found: Found, reason: str) -> Entry:
    """The line of a study that has no page."""
    return Entry(
        name=found.name,
        kind=found.kind,
        href=None,
        what=f"no page: {reason}",
        budget="",
        runs="",
        headline="",
        when=_when(found),
        complete=False,
    )


def search_line(summary: Mapping[str, Any]) -> dict[str, Any]:
    best = summary["confirmed"][0] if summary["confirmed"] else None
    space = space_words(best["config"]) if best else ""
    versus = best and best[f"test_acc_versus_{REFERENCE}"]
    against = f"; − {REFERENCE}: {difference(versus)}" if versus and summary["rule"] != REFERENCE else ""
    return {
        "what": f"{summary['rule']} on {summary['arch']}, {summary['dataset']}{space and f', {space}'}",
        "budget": budget_words(summary),
        "runs": _counts(summary["trials"]),
        "headline": f"test {spread_of(best['test_acc'])} %{against}" if best else "nothing is confirmed",
        **{name: summary[name] for name in ("rule", "arch", "dataset")},
        "test_acc": best and best["test_acc"],
    }


def robustness_line(summary: Mapping[str, Any]) -> dict[str, str]:
    rules = ", ".join(summary["coefficients"])
    return {
        "what": f"{rules} on {summary['arch']}, {summary['dataset']}",
        "budget": f"{len(summary['seeds'])} seeds × {summary['epochs']} epochs",
        "runs": _counts(summary["runs"]),
        "headline": ", ".join(site["site"] for site in summary["sites"]),
    }


def confirmation_line(summary: Mapping[str, Any]) -> dict[str, str]:
    lines = summary["studies"]
    epochs = sorted({line["epochs"] for line in lines})
    accuracies = [f"{line['study']} {spread_of(line['test_acc'])} %" for line in lines]
    return {
        "what": f"{len(lines)} configurations on {summary['dataset']}",
        "budget": f"{len(summary['seeds'])} seeds × {' or '.join(map(str, epochs)) or '?'} epochs",
        "runs": _counts(summary["runs"]),
        "headline": f"test {'; '.join(accuracies)}" if accuracies else "nothing is known yet",
    }


def transfer_line(summary: Mapping[str, Any]) -> dict[str, str]:
    ranked = [f"{r['rule']} ({r['space']})" for r in summary["rules"] if r["place"]]
    return {
        "what": f"{', '.join(dict.fromkeys(p['rule'] for p in summary['pairs']))}: {', '.join(summary['archs'])}",
        "budget": f"{summary['trials']} trials × {summary['epochs']} epochs a search",
        "runs": _counts(summary["runs"]),
        "headline": f"least regret first: {', '.join(ranked)}" if ranked else "no regret is known",
    }


def matrix_line(summary: Mapping[str, Any]) -> dict[str, str]:
    subsets = [whole["subsets"] for whole in summary["archs"].values()]
    counts = dict.fromkeys(("finished", "stopped", "diverged", "failed"), 0)
    for whole in summary["archs"].values():
        for line in whole["table"]:
            counts |= {name: counts[name] + line["trials"][name] for name in counts}
    best = [f"{arch}: {whole['table'][0]['name']}" for arch, whole in summary["archs"].items() if whole["table"]]
    return {
        "what": f"{sum(s['measured'] for s in subsets)} of {sum(s['expected'] for s in subsets)} subsets on "
        f"{', '.join(summary['archs'])}, {summary['dataset']}, {summary['space']}",
        "budget": f"{summary['trials']} trials × {summary['epochs']} epochs a search",
        "runs": _counts(counts),
        "headline": f"best by validation: {'; '.join(best)}" if best else "nothing is confirmed",
    }


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in counts.items() if n) or "none"


def _href(found: Found) -> str:
    return f"{quote(found.name)}.html"


def _when(found: Found) -> str:
    """The day of its newest file of rows; rows themselves have no date."""
    files = [found.folder] if found.folder.is_file() else [found.folder / "rows.jsonl", found.folder / "summary.json"]
    times = [file.stat().st_mtime for file in files if file.exists()]
    return datetime.fromtimestamp(max(times), UTC).date().isoformat() if times else ""
