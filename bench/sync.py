"""`bench sync`: what MLflow lacks of the results is delivered, or recorded from their rows; nothing stays RUNNING.

First what runs left in the spool. Then study by study, but for those that a living driver has: rows that have no run,
or one that ended otherwise, are recorded whole; runs that a dead driver left RUNNING are ended; the study's own numbers
and files are put beside its run. What MLflow has already stays as it is, so a second time there is nothing to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from bench.config import UserError
from bench.delivery import Operation, UnreachableError
from bench.filed import Filed, read_filed, read_trainings, trainings_of
from bench.journal import BusyError, claim
from bench.mlflow_store import RUN_STATUS, Seen, Store
from bench.reading import Found, find
from bench.rows import TRAININGS, Row
from bench.spool import Left, survey
from bench.stores import check_uri, embedded, key, shown
from bench.tracking import Tracker, deliver_to

Say = Callable[[str], None]

#: Seconds without an answer after which the store is away.
PATIENCE = 8.0

#: How the store under the results is called where others are.
EMBEDDED = "the embedded store"

#: So many damaged rows of a study are named.
_NAMED = 3

LEFT_ALONE = "left to its driver, which is at work"


@dataclass(frozen=True, kw_only=True)
class Synced:
    """What was done for a study: operations delivered, rows recorded, runs ended.

    ``agrees``: whether MLflow has now what its files say; None if it was left alone. ``note``: why.
    """

    study: str
    delivered: int = 0
    recorded: int = 0
    ended: int = 0
    agrees: bool | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """``left``: operations that are still in the spool. ``elsewhere``: those for other stores, by store.

    ``away``: why the store did not answer any more; empty if it did.
    """

    store: str
    studies: Sequence[Synced] = ()
    rejected: int = 0
    left: int = 0
    away: str = ""
    elsewhere: Mapping[str, int]

    @property
    def agrees(self) -> bool:
        """MLflow has everything, but for what living drivers are at work on."""
        refused = self.rejected or any(study.agrees is False for study in self.studies)
        return not (self.away or self.left or refused)


@dataclass(frozen=True, kw_only=True)
class _Lack:
    """What MLflow lacks of a study. ``running``: runs without a row that nobody runs. ``open``: so is its own run."""

    rows: Sequence[Row]
    running: Sequence[str]
    open: bool
    numbers: bool
    files: Sequence[Path]

    def words(self) -> list[str]:
        """For the user; empty if there is nothing."""
        parts = [f"{len(self.rows)} rows have no run"] if self.rows else []
        parts += [f"{len(self.running) + self.open} runs are open"] if self.running or self.open else []
        parts += ["its numbers are lacking"] if self.numbers else []
        return parts + ([f"{', '.join(path.name for path in self.files)} not there"] if self.files else [])


def sync(results: Path, tracking_uri: str | None, *, say: Say) -> Report:
    """Bring MLflow up to date with the results. ``tracking_uri``: None is the embedded store (`EMBEDDED` in words).

    Errors: UserError for what cannot be read, and an address that cannot work; `bench.stores.MLflowAwayError` where
    nobody answers at first. A store that goes away meanwhile is said in the report.
    """
    if not results.is_dir():
        raise UserError(f"there is no folder {results}; name that of your results with --results.")
    uri, artifacts = (tracking_uri, None) if tracking_uri else embedded(results)
    studies, lying = find(results), survey(results / "spool")
    own = key(uri, results)
    elsewhere = Counter[str]()
    for left in lying:
        if left.key != own and left.operations:
            named = EMBEDDED if left.key == key(embedded(results)[0], results) else left.store
            elsewhere[named or f"a store that {left.path} does not name"] += left.operations
    if not (studies or trainings_of(results).exists() or any(left.key == own for left in lying)):
        return Report(store=shown(uri), elsewhere=elsewhere)
    check_uri(uri)
    return replace(_Sync(results, uri, artifacts, lying, say).run(studies), elsewhere=elsewhere)


class _Sync:
    """One store, and what is on its way to it."""

    def __init__(self, results: Path, uri: str, artifacts: Path | None, lying: Iterable[Left], say: Say) -> None:
        self._results, self._uri = results, uri
        self._store = Store(uri, artifacts, "bench", results / "mlflow.lock")
        self._named = {left.study for left in lying}
        self._living = {left.study for left in lying if left.held}
        self._delivered = Counter[str]()
        self._delivery = deliver_to(self._deliver, uri, results / "spool", say)

    def _deliver(self, operation: Operation) -> None:
        self._store.deliver(operation)
        if operation.get("taken"):
            self._delivered[str(operation.get("study"))] += 1

    def run(self, studies: Iterable[Found]) -> Report:
        done: list[Synced] = []
        away = ""
        try:
            self._drain()
            for found in studies:
                done.append(self._study(found))
            if TRAININGS in self._named or trainings_of(self._results).exists():
                done.append(self._trainings())
        except UnreachableError as error:
            away = str(error)
        finally:
            left = self._delivery.close(0)
        done = [replace(study, delivered=self._delivered.pop(study.study, 0)) for study in done]
        rest = [Synced(study=name, delivered=n, note="not compared") for name, n in sorted(self._delivered.items())]
        return Report(
            store=shown(self._uri),
            studies=[*done, *rest],
            rejected=self._delivery.rejected,
            left=left,
            away=away,
            elsewhere={},
        )

    def _drain(self) -> None:
        if not self._delivery.drain(PATIENCE):
            raise UnreachableError(f"no answer for {PATIENCE:.0f} s")

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
        try:
            filed = read_trainings(self._results)
            known = bool(filed.rows) or self._look(filed) is not None
            return self._settle(filed) if known else Synced(study=TRAININGS, agrees=True)
        except UserError as error:
            return Synced(study=TRAININGS, agrees=False, note=str(error))

    def _look(self, filed: Filed) -> Seen | None:
        try:
            return self._store.look(filed.name, filed.identity)
        except UnreachableError:
            raise
        except Exception as error:  # whatever a server may say that is no MLflow, or not one of ours
            raise UserError(f"MLflow cannot be asked about it: {str(error).splitlines()[0]}; see its log.") from error

    def _settle(self, filed: Filed) -> Synced:
        if filed.name in self._living:
            return Synced(study=filed.name, note=LEFT_ALONE)
        seen = self._look(filed)
        lack = _compare(filed, seen)
        if not lack.words():
            return Synced(study=filed.name, agrees=True)
        unusable = self._record(filed, seen, lack)
        self._drain()
        still = _compare(filed, self._look(filed)).words()
        return Synced(
            study=filed.name,
            recorded=len(lack.rows) - len(unusable),
            ended=len(lack.running) + (lack.open and seen is not None),
            agrees=not (still or unusable),
            note="; ".join([", ".join(still), *unusable[:_NAMED]]),
        )

    def _record(self, filed: Filed, seen: Seen | None, lack: _Lack) -> list[str]:
        """What is lacking, as the study's driver would have told it; a line for each row that is of no use."""
        unusable: list[str] = []
        tracker = Tracker(self._store, self._delivery, self._uri)
        # who ran it has said with what revision; we have not run it
        revision = filed.rows[-1]["provenance"].get("git_revision") if seen is None and filed.rows else None
        tags = {**filed.tags, "bench.git_revision": revision}
        rows = [row["uid"] for row in lack.rows]
        tracker.study(filed.name, config=filed.config, tags=tags, identity=filed.identity, live=rows)
        try:
            if filed.dataset is not None:
                tracker.dataset(*filed.dataset)
            for row in lack.rows:
                try:
                    tracker.record(row["uid"], row["kind"], row)
                except UserError as error:
                    unusable.append(f"the row of {row['uid']} is damaged ({error})")
            tracker.headline(filed.metrics)
            for name, points in filed.curves.items():
                tracker.curve(name, points)
            tracker.artifacts(lack.files)
        finally:
            tracker.end(_status(filed, seen))
        return unusable


def _status(filed: Filed, seen: Seen | None) -> Literal["FINISHED", "FAILED", "KILLED"]:
    """How the study's own run is to end: a driver that ended has said it, of one that was killed the rows tell."""
    if filed.complete:
        return "FINISHED"
    return "FAILED" if seen is not None and seen.status == "FAILED" else "KILLED"


def _compare(filed: Filed, seen: Seen | None) -> _Lack:
    """What MLflow lacks."""
    if seen is None:
        return _Lack(rows=filed.rows, running=(), open=True, numbers=bool(filed.metrics), files=filed.files)
    ends = {row["uid"]: (RUN_STATUS[row["status"]], row["status"]) for row in filed.rows}
    numbers = any(seen.metrics.get(name) != value for name, value in filed.metrics.items())
    return _Lack(
        rows=[row for row in filed.rows if seen.runs.get(row["uid"]) != ends[row["uid"]]],
        running=[uid for uid, (status, _) in seen.runs.items() if status == "RUNNING" and uid not in ends],
        open=seen.status == "RUNNING" or (filed.complete and seen.status != "FINISHED"),
        numbers=numbers or not filed.curves.keys() <= seen.metrics.keys(),
        files=[path for path in filed.files if seen.files.get(path.name) != path.stat().st_size],
    )
