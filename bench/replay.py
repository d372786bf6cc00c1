"""The summaries of transfers, matrices and measurements again, from the rows in their folders.

Nothing is run, recorded in MLflow or written, and no data set is read: what a row keeps of its data is enough. The
numbers are those that the command printed when it had these rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench import matrix, transfer
from bench.campaign import Ready
from bench.config import Kind, TrialConfig, TrialResult, UserError
from bench.datasets import DATASETS
from bench.files import read_yaml
from bench.place import Options, Place, Share
from bench.plans import Wanted, find_wanted
from bench.programme import Searched
from bench.reading import place_of
from bench.rows import Row, RowFile, last_attempts
from bench.space import Space


class Silent:
    """A recorder of runs that keeps nothing: nothing is run here."""

    def start(
        self,
        uid: str,
        kind: Kind,
        config: TrialConfig,
        tags: Mapping[str, Any] | None = None,
        evaluation: Mapping[str, Any] | None = None,
    ) -> None: ...

    def report(self, uid: str, epoch: int, metrics: Mapping[str, float]) -> None: ...

    def finish(self, uid: str, result: TrialResult, extra_tags: Mapping[str, Any] | None = None) -> None: ...

    def record(self, uid: str, kind: Kind, row: Mapping[str, Any]) -> None: ...


def transfer_again(folder: Path) -> dict[str, Any]:
    """`bench.transfer`'s summary of what lies in this folder and in those of its searches."""
    config = transfer.TransferConfig.from_dict(_book(folder, transfer.BOOK))
    routes = transfer.routes_of(config)
    searches = _searches(folder.parent, transfer.searches_of(routes))
    known = [r for r in routes if {r.source, r.target} <= set(searches)]
    prepared = transfer.Prepared(config=config, routes=tuple(known), searches=searches)
    found = transfer.Transfer(prepared, Silent(), _file(folder))
    over = len(known) == len(routes)
    for ready in searches.values():
        searched = _searched(ready)
        if searched.complete:
            found.learned(searched)
        over = over and searched.complete
    missing = sorted({w.name for w in transfer.searches_of(routes)} - {w.name for w in searches})
    return {**found.summary(over=over), **({"missing": missing} if missing else {})}


def matrix_again(folder: Path) -> dict[str, Any]:
    """`bench.matrix`'s summary of what lies in the folders of its searches."""
    config = matrix.MatrixConfig.from_dict(_book(folder, matrix.BOOK))
    wanted = [*matrix.searches_of(config), *matrix.any_of(config)]
    searches = _searches(folder.parent, wanted)
    summary = matrix.Known(matrix.Prepared(config=config, searches=searches, run=())).summary()
    return {**summary, "complete": summary["complete"] and len(searches) == len(wanted)}


def robustness_again(folder):
    from bench.robustness_points import read_summary
    return read_summary(folder)


# --- what lies there


def _book(folder: Path, name: str) -> Mapping[str, Any]:
    config = read_yaml(folder / name).get("config")
    if not isinstance(config, Mapping):
        raise UserError(f"{folder / name} is damaged: it has no config. Run its command again.")
    return config


def _file(folder: Path) -> RowFile:
    return RowFile(folder / "rows.jsonl", say=lambda _: None)


def _searches(results: Path, wanted: Iterable[Wanted]) -> dict[Wanted, Ready]:
    """Those that were begun and have a row; UserError where none has."""
    options, found = Options(results=results), {}
    for w in dict.fromkeys(wanted):
        config = find_wanted(results, w)
        rows = _file(results / config.name).read() if config else []
        if config and rows:
            place = _place(rows, options, results / config.name)
            found[w] = Ready(config=config, space=Space.from_dict(config.space), place=place)
    if not found:
        raise UserError(f"{results}: none of this plan's searches is there; its rows must lie beside it.")
    return found


def _searched(ready: Ready) -> Searched:
    rows = matrix.read(ready)
    return Searched(
        ready=ready,
        searched=[row for row in rows if row["kind"] == "search"],
        confirmed=matrix.confirmed_rows(ready.config, rows),
        controls=matrix.controls_of(ready),
        summary={},
        complete=matrix.is_complete(ready.config, rows),
    )


def _place(rows: Iterable[Row], options: Options, folder: Path) -> Place:
    """Where these rows came about, as far as they say; UserError if none was trained."""
    for row in rows:
        kept, key = row["provenance"], place_of(row)
        if key is not None and "examples" in kept:
            name = row["config"]["dataset"]
            return Place(
                options=options,
                share=Share(concurrent=1, threads=1, gpus=0.0),
                dataset=(name, kept["dataset_digest"]),
                examples=kept["examples"],
                chance=1 / _classes(name, kept, folder),
                key=key,
                uri="",
                artifacts=None,
            )
    raise UserError(f"{folder}: no run got as far as its data, so there is nothing to show; run its command again.")


def _classes(name: str, kept: Mapping[str, Any], folder: Path) -> int:
    """How many classes the data have; older rows do not keep it."""
    known = kept.get("classes") or (DATASETS[name].classes if name in DATASETS else None)
    if known is None:
        raise UserError(f"{folder}: its rows do not say how many classes {name} has; run its command again.")
    return int(known)
