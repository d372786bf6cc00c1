"""`bench sync`: what MLflow lacks of the results is recorded from their rows; nothing stays RUNNING.

Study by study, but for those that a living driver has: rows that have no run, or one that ended otherwise, are recorded
whole; runs that a dead driver left RUNNING are ended; the study's own numbers and files are put beside its run. What
MLflow has already stays as it is, so a second time there is nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.config import UserError, one_line
from bench.filed import Filed, read_filed, read_trainings, trainings_of
from bench.journal import BusyError, claim
from bench.mlflow_queue import UnreachableError
from bench.mlflow_store import RUN_STATUS, Seen, Store
from bench.reading import Found, find
from bench.rows import TRAININGS
from bench.stores import check_uri, embedded, shown
from bench.tracking import Tracker, sharing

#: So many problems of a study are named.
_NAMED = 3

LEFT_ALONE = "left to its driver, which is at work"


@dataclass(frozen=True, kw_only=True)
class Synced:
    """What was done for a study: rows recorded, runs ended.

    ``agrees``: whether MLflow has now what its files say; None if it was left alone. ``note``: why.
    """

    study: str
    recorded: int = 0
    ended: int = 0
    agrees: bool | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """``away``: why the store did not answer any more; empty if it did."""

    store: str
    studies: Sequence[Synced] = ()
    away: str = ""

    @property
    def agrees(self) -> bool:
        """MLflow has everything, but for what living drivers are at work on."""
        return not self.away and all(study.agrees is not False for study in self.studies)


def sync(results: Path, tracking_uri: str | None) -> Report:
    """Bring MLflow up to date with the results. ``tracking_uri``: None is the embedded store.

    Errors: UserError for what cannot be read, and an address that cannot work; `bench.stores.MLflowAwayError` where
    nobody answers at first. A store that goes away meanwhile is said in the report.
    """
    if not results.is_dir():
        raise UserError(f"there is no folder {results}; name that of your results with --results.")
    uri, artifacts = (tracking_uri, None) if tracking_uri else embedded(results)
    studies = find(results)
    if not (studies or trainings_of(results).parent.exists()):
        return Report(store=shown(uri))
    check_uri(uri)
    return _Sync(results, uri, artifacts).run(studies)


class _Sync:
    """One store, and what it lacks."""

    def __init__(self, results: Path, uri: str, artifacts: Path | None) -> None:
        self._results, self._uri = results, uri
        self._store = Store(uri, artifacts, "bench", results / "mlflow.lock")

    def run(self, studies: Sequence[Found]) -> Report:
        done: list[Synced] = []
        away = ""
        try:
            for found in studies:
                done.append(self._study(found))
            if trainings_of(self._results).parent.exists():
                done.append(self._trainings())
        except UnreachableError as error:
            away = str(error)
        return Report(store=shown(self._uri), studies=done, away=away)

    def _study(self, found: Found) -> Synced:
        """Settle it, unless a living driver has its folder."""
        try:
            with claim(found.folder):
                return self._settle(read_filed(found))
        except BusyError:
            return Synced(study=found.name, note=LEFT_ALONE)
        except UserError as error:
            return Synced(study=found.name, agrees=False, note=str(error))

    def _trainings(self) -> Synced:
        with sharing(trainings_of(self._results).parent) as alone:
            pass  # one that begins now waits for nobody; its end is recorded by itself
        if not alone:
            return Synced(study=TRAININGS, note=LEFT_ALONE)
        try:
            filed = read_trainings(self._results)
            known = bool(filed.rows) or self._look(filed).status is not None
            return self._settle(filed) if known else Synced(study=TRAININGS, agrees=True)
        except UserError as error:
            return Synced(study=TRAININGS, agrees=False, note=str(error))

    def _look(self, filed: Filed) -> Seen:
        try:
            return self._store.look(filed.name, filed.identity)
        except UnreachableError:
            raise
        except Exception as error:  # whatever a server may say that is no MLflow, or not one of ours
            raise UserError(f"MLflow cannot be asked about it: {str(error).splitlines()[0]}; see its log.") from error

    def _settle(self, filed: Filed) -> Synced:
        """Compare, and record what is lacking; without any writing if nothing is."""
        seen = self._look(filed)
        ends = {row["uid"]: (RUN_STATUS[row["status"]], row["status"]) for row in filed.rows}
        rows = [row for row in filed.rows if seen.runs.get(row["uid"]) != ends[row["uid"]]]
        running = sum(status == "RUNNING" and uid not in ends for uid, (status, _) in seen.runs.items())
        status = "FINISHED" if filed.complete else "FAILED" if seen.status == "FAILED" else "KILLED"
        is_open = seen.status in ("RUNNING", None) or (filed.complete and seen.status != status)
        numbers = any(seen.metrics.get(name) != value for name, value in filed.metrics.items())
        numbers = numbers or not filed.curves.keys() <= seen.metrics.keys()
        files = [path for path in filed.files if seen.files.get(path.name) != path.stat().st_size]
        if not (rows or running or is_open or numbers or files):
            return Synced(study=filed.name, agrees=True)
        problems: list[str] = []
        tracker = Tracker(self._store, self._uri)

        def tried(what: str, operation: Callable[..., None], *values: Any, **named: Any) -> bool:
            try:
                operation(*values, **named)
            except UnreachableError:
                raise
            except Exception as error:  # noqa: BLE001 (reported: whatever is refused, the rest is recorded)
                problems.append(f"{what} is not recorded ({one_line(str(error))})")
                return False
            return True

        # who ran it has said with what revision; we have not run it
        revision = filed.rows[-1]["provenance"].get("git_revision") if seen.status is None and filed.rows else None
        tags = {**filed.tags, "bench.git_revision": revision}
        tried("its run", tracker.study, filed.name, config=filed.config, tags=tags, identity=filed.identity)
        if filed.dataset is not None:
            tried("its data set", tracker.dataset, *filed.dataset)
        named = [(f"the row of {row['uid']}", row) for row in rows]
        recorded = sum(tried(what, tracker.record, row["uid"], row["kind"], row) for what, row in named)
        tried("its headline", tracker.headline, filed.metrics)
        for name, points in filed.curves.items():
            tried(f"the curve {name}", tracker.curve, name, points)
        tried("its folder", tracker.artifacts, files)
        tried("its end", tracker.end, status)
        return Synced(
            study=filed.name,
            recorded=recorded,
            ended=running + (is_open and seen.status is not None),
            agrees=not problems,
            note="; ".join(problems[:_NAMED]),
        )
