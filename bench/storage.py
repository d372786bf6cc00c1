"""Where a study is kept: in a journal in its folder, or in an Optuna storage (PostgreSQL, MySQL, SQLite)."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial
from sqlalchemy.exc import ArgumentError, InterfaceError, NoSuchModuleError, OperationalError, SQLAlchemyError

from bench.config import UserError
from bench.files import read_yaml, write_yaml
from bench.journal import WholeLines, mend
from bench.stores import alone, check_storage, shown

Say = Callable[[str], None]

#: Seconds for which a storage that has fallen silent is tried, and the least number of attempts in them.
PATIENCE, ATTEMPTS = 180.0, 8
#: Seconds to the second attempt; each further one waits twice as long, up to the last value.
FIRST_WAIT, LAST_WAIT = 0.5, 10.0

#: What pip calls the package that SQLAlchemy speaks to a database with, by the module that is missing.
PACKAGES = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}

#: No answer within seconds is none; a server that vanished without a word is noticed.
_CONNECT: dict[str, dict[str, Any]] = {
    "postgresql": {
        "connect_timeout": 5,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 20_000,
    },
    "mysql": {"connect_timeout": 5},
    "mariadb": {"connect_timeout": 5},
    "sqlite": {"timeout": 30},
}

#: The file that says where the study of a folder is kept, if not in its journal; and the journal.
BOOK, JOURNAL = "storage.yaml", "journal.log"


class StorageAwayError(Exception):
    """The storage does not answer now; what it was asked to write, it may have written."""


class Line:
    """The line to a storage: says when it breaks and when it holds again, and how long it is tried meanwhile."""

    def __init__(self, name: str, say: Say) -> None:
        self._name, self._say = name, say
        self._since = self._again = 0.0
        self._failures = 0

    @contextmanager
    def trying(self) -> Iterator[None]:
        """Around what asks the storage. `StorageAwayError`, at once if it is too early to try; UserError: given up."""
        if self._failures and time.monotonic() < self._again:
            raise StorageAwayError(f"{self._name} does not answer")
        try:
            yield
        except StorageAwayError as error:
            self._failed(error)
            raise
        if self._failures:
            self._failures = 0
            self._say(f"{self._name} answers again.")

    def _failed(self, error: StorageAwayError) -> None:
        now = time.monotonic()
        if not self._failures:
            self._since = now
            self._say(
                f"{self._name} does not answer ({error}); what runs goes on, and it is tried again for "
                f"{PATIENCE:.0f} s."
            )
        self._failures += 1
        self._again = now + min(FIRST_WAIT * 2 ** (self._failures - 1), LAST_WAIT)
        if now - self._since > PATIENCE and self._failures >= ATTEMPTS:
            raise UserError(
                f"{self._name} has not answered for {now - self._since:.0f} s ({error}); nothing that is finished is "
                "lost: start it, and the same command goes on."
            ) from error


@contextmanager
def kept(folder: Path, name: str, url: str | None, say: Say) -> Iterator[tuple[BaseStorage, str | None]]:
    """Open the storage of a study, and in it the study; `bench.journal.claim` its folder first.

    Also gives the identity that the study has on a server. UserError for whatever keeps it from being opened, then
    and within: it does not answer, is damaged, or is not where this folder's study is kept.
    """
    if url is None:
        with _undamaged(folder / JOURNAL):
            yield _in_journal(folder, name, say), None
        return
    if (folder / JOURNAL).exists():
        raise UserError(f"study {name!r} is kept in {folder / JOURNAL}: leave --storage out, or use another --name.")
    storage = reach(url)
    try:
        with _at_start(url):
            yield storage, _identity(folder, name, shown(url), storage)
    except BaseException:
        hang_up(storage)
        raise


def _in_journal(folder: Path, name: str, say: Say) -> BaseStorage:
    if (folder / BOOK).exists():
        where = read_yaml(folder / BOOK).get("storage")
        raise UserError(f"study {name!r} is kept in {where}: go on with it by --storage, or use another --name.")
    journal = folder / JOURNAL
    mend(journal, say)
    storage = JournalStorage(WholeLines(journal, JournalFileBackend))
    _check_journal(storage, journal)
    names = [study.study_name for study in storage.get_all_studies()]
    if names and name not in names:
        raise UserError(
            f"{folder} holds the study {names[0]!r}, not {name!r}; use --name {names[0]}, or another folder."
        )
    return storage


@contextmanager
def _undamaged(journal: Path) -> Iterator[None]:
    """A UserError for whatever Optuna raises, or asserts, where a line of the journal is none of its own."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{journal} is damaged ({what}); restore it, or begin again under another --name.") from error


def _check_journal(storage: JournalStorage, journal: Path) -> None:
    """ValueError for a journal that no search of ours has written; nothing is appended to it then.

    It begins with its study, no trial comes before its settings, and each is the next one of its space.
    """
    studies = storage.get_all_studies()
    if not studies and journal.stat().st_size:
        raise ValueError("it has no study")
    for study in studies:
        trials = storage.get_all_trials(study._study_id, deepcopy=False)
        kept = study.user_attrs.get("settings", {}).get("distributions", {})
        space = {name: json_to_distribution(text) for name, text in kept.items()}
        for number, trial in enumerate(trials):
            uid = f"{study.study_name}-{number:04d}"
            _check_trial(trial, number, uid, {name: space[name] for name in trial.params})
            if trial.values is not None and len(trial.values) != len(study.directions):
                raise ValueError(f"trial {number} has {len(trial.values)} values")


def _check_trial(trial: FrozenTrial, number: int, uid: str, space: Mapping[str, BaseDistribution]) -> None:
    trial._validate()  # as Optuna does when a sampler is shown it
    inside = all(d._contains(d.to_internal_repr(trial.params[name])) for name, d in space.items())
    values = [*trial.intermediate_values.values(), *(trial.values or ())]
    if (trial.number, trial.user_attrs["uid"], trial.distributions) != (number, uid, space) or not inside:
        raise ValueError(f"trial {number} is none of its own")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"trial {number} has a value that is not finite")


def _identity(folder: Path, name: str, where: str, storage: BaseStorage) -> str:
    """Names on a server are used by many, so a study has an id of its own: in the storage, and beside its rows."""
    path = folder / BOOK
    book = read_yaml(path) if path.exists() else {}
    known, there = book.get("id"), _attributes(storage, name)
    if there is not None and there.get("identity") is not None and there["identity"] == known:
        return str(known)
    if book and book.get("storage") != where:
        raise UserError(f"study {name!r} is kept in {book.get('storage')}, not in {where}; give that as --storage.")
    if there:  # one without any attribute: begun by a driver that was killed in that moment
        raise UserError(
            f"{where} has a study {name!r} already, of another results folder; use that folder, or another --name."
        )
    rows = folder / "rows.jsonl"
    if rows.exists() and rows.stat().st_size:
        raise UserError(f"{where} has no study {name!r} any more, and {rows} has; restore it, or use another --name.")
    identity = str(known or uuid.uuid4().hex)
    write_yaml(path, {"id": identity, "storage": where})
    return identity


def _attributes(storage: BaseStorage, name: str) -> dict[str, Any] | None:
    """The study's user attributes (its trials, if it has none); None if there is no such study."""
    try:
        number = storage.get_study_id_from_name(name)
    except KeyError:
        return None
    found: dict[str, Any] = storage.get_study_user_attrs(number)
    return found or ({"trials": storage.get_n_trials(number)} if storage.get_n_trials(number) else {})


def reach(url: str) -> BaseStorage:
    """The storage at ``url``; one UserError for whatever keeps it from opening.

    Once it is open, `StorageAwayError` is all that is raised for a database that does not answer: Optuna's own retries
    would else write a trial twice whose first writing succeeded without an answer.
    """
    check_storage(url)
    scheme = url.partition("://")[0].partition("+")[0]
    settings = {"pool_pre_ping": True, "connect_args": _CONNECT.get(scheme, {})}
    try:
        with _at_start(url), alone(url):
            storage = _made(url.replace("{", "{{").replace("}", "}}"), settings)  # a brace would be Optuna's
    except ImportError as error:
        missing = getattr(error.__cause__ or error, "name", None) or "its driver"
        raise UserError(
            f"--storage {shown(url)} needs the package {missing}: pip install {PACKAGES.get(missing, missing)}"
        ) from error
    except (ArgumentError, NoSuchModuleError) as error:
        raise UserError(f"--storage {shown(url)} cannot be read ({_brief(error)}); correct it.") from error
    except RuntimeError as error:  # Optuna's, about the version of the tables
        raise UserError(f"the storage at {shown(url)} cannot be used: {_brief(error)}") from error
    sqlalchemy.event.listen(storage.engine, "handle_error", _away)
    return optuna.storages.get_storage(storage)


def _made(url: str, settings: dict[str, Any]) -> RDBStorage:
    """Of two processes that make the tables of a new database at once, one fails; a moment later they are there."""
    for pause in (0.5, 2.0):
        try:
            return RDBStorage(url, engine_kwargs=settings)
        except OperationalError:
            raise
        except (SQLAlchemyError, StorageInternalError) as error:
            if isinstance(error, (ArgumentError, NoSuchModuleError)) or _is_away(error.__cause__):
                raise
            time.sleep(pause)
    return RDBStorage(url, engine_kwargs=settings)


@contextmanager
def _at_start(url: str) -> Iterator[None]:
    try:
        yield
    except (ArgumentError, NoSuchModuleError):
        raise
    except (StorageAwayError, SQLAlchemyError, StorageInternalError) as error:
        raise UserError(
            f"the storage at {shown(url)} does not answer ({_brief(error)}); start it, or correct --storage."
        ) from error


def hang_up(storage: BaseStorage) -> None:
    """Close the connections, if there are any."""
    backend = getattr(storage, "_backend", None)
    if isinstance(backend, RDBStorage):
        backend.remove_session()
        backend.engine.dispose()


def _away(context: Any) -> None:
    """SQLAlchemy's hook: what an error of the database is to be raised as."""
    if not context.is_pre_ping and (context.is_disconnect or _is_away(context.sqlalchemy_exception)):
        raise StorageAwayError(_brief(context.original_exception)) from context.original_exception


def _is_away(error: BaseException | None) -> bool:
    return isinstance(error, (OperationalError, InterfaceError))


def _brief(error: BaseException) -> str:
    """The first line of what the database said, which has no password in it."""
    origin = getattr(error.__cause__, "orig", None) or getattr(error, "orig", None) or error
    lines = [line for line in str(origin).splitlines() if line.strip()] or [type(origin).__name__]
    return shown(lines[0].strip())[:200]
