"""A study in a database: dead drivers, an outage, and names that others have. On SQLite."""

from __future__ import annotations

import socket
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution

from bench import storage
from bench.choices import SAMPLERS
from bench.config import StudyConfig, TrialConfig, TrialResult, UserError
from bench.proposals import Proposal
from bench.storage import StorageAwayError
from bench.stores import check_storage, shown
from bench.study import Study

SPACE = {"sparse": FloatDistribution(1e-4, 10.0, log=True), "amp": FloatDistribution(0.0, 1.0)}

Open = Callable[..., Study]


def config(**changes: Any) -> StudyConfig:
    values = {"name": "s", "rule": "activation", "arch": "lenet", "dataset": "digits", "trials": 6, "epochs": 9}
    return StudyConfig.from_dict({**values, "sampler": "random", **changes})


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/optuna.db"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def driver(tmp_path: Path, url: str, said: list[str]) -> Iterator[Open]:
    """A driver of the study."""
    made: list[Study] = []

    def opened(folder: str = "s", url: str | None = url, **changes: Any) -> Study:
        study = Study.open(tmp_path / folder, config(**changes), SPACE, say=said.append, chance=0.1, url=url)
        made.append(study)
        return study

    yield opened
    for study in made:
        study.close()


def result(value: float = 0.5, status: Any = "finished") -> TrialResult:
    return TrialResult(config=TrialConfig(rule="activation"), status=status, metrics={"val_acc": value})


def asked(study: Study) -> Proposal:
    proposal = study.ask()
    assert proposal is not None
    return proposal


def finish(study: Study, value: float = 0.5) -> Proposal:
    proposal = asked(study)
    for epoch in (1, 2):
        study.report(proposal.uid, epoch, value * epoch / 2)
    study.tell(proposal.uid, result(value))
    return proposal


def trials(url: str, name: str = "s") -> list[optuna.trial.FrozenTrial]:
    """As Optuna has them."""
    kept = optuna.storages.RDBStorage(url)
    try:
        found = optuna.load_study(study_name=name, storage=kept).trials
    finally:
        kept.remove_session()
        kept.engine.dispose()
    return list(found)


# --- a driver dies


def test_the_next_start_says_what_goes_on(driver: Open, said: list[str]) -> None:
    a = driver()
    left = [finish(a), asked(a), asked(a)][1:]
    a.close()
    b = driver()
    assert said == ["s: 2 interrupted trials go on."]
    assert [asked(b), asked(b)] == left
    assert len(said) == 1


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_one_driver_finds_in_a_database_what_it_finds_with_a_journal(url: str, driver: Open, sampler: str) -> None:
    found = []
    for folder, where in (("journal", None), ("database", url)):
        study = driver(folder, where, sampler=sampler)
        while (proposal := study.ask()) is not None:
            value = 0.9 - abs(proposal.params["amp"] - 0.3)
            stopped = any(study.report(proposal.uid, epoch, value * epoch / 9) for epoch in (3, 9))
            study.tell(proposal.uid, result(value, "stopped" if stopped else "finished"))
        known = study._known
        found.append([(t.number, t.state, t.params, t.values, t.intermediate_values, t.user_attrs) for t in known])
        study.close()
    assert found[0] == found[1]
    assert len(found[0]) == 6


# --- where a study is kept


def test_a_study_is_kept_in_one_place(driver: Open, tmp_path: Path) -> None:
    driver("journal", None).close()
    driver("database", name="d").close()
    with pytest.raises(UserError, match=r"study 's' is kept in .*journal.log: leave --storage out"):
        driver("journal")
    with pytest.raises(UserError, match=r"study 'd' is kept in sqlite:///.*optuna.db: go on with it by --storage"):
        driver("database", None, name="d")
    other = f"sqlite:///{tmp_path}/other.db"
    with pytest.raises(
        UserError, match=r"'d' is kept in sqlite:///.*optuna.db, not in sqlite:///.*other.db; give that"
    ):
        driver("database", other, name="d")
    (tmp_path / "moved").mkdir()
    (tmp_path / "optuna.db").rename(tmp_path / "moved" / "optuna.db")
    driver("database", f"sqlite:///{tmp_path}/moved/optuna.db", name="d").close()  # it is the same one, elsewhere


@pytest.mark.parametrize("kept", [True, False])
def test_a_second_driver_is_refused_wherever_the_study_is_kept(driver: Open, url: str, kept: bool) -> None:
    driver("s", url if kept else None)
    for where in (url, None):
        with pytest.raises(UserError, match=r"study 's' in .* is being run by another process"):
            driver("s", where)


def test_a_name_that_others_have_is_refused_and_nothing_of_theirs_is_touched(driver: Open, url: str) -> None:
    finish(driver())
    with pytest.raises(UserError, match=r"has a study 's' already, of another results folder.*another --name"):
        driver("elsewhere")
    assert len(trials(url)) == 1
    theirs = optuna.storages.RDBStorage(url)
    optuna.create_study(study_name="theirs", storage=theirs).add_trial(optuna.create_trial(value=1.0))
    theirs.remove_session()
    theirs.engine.dispose()
    with pytest.raises(UserError, match="has a study 'theirs' already"):
        driver("theirs", name="theirs")
    assert len(trials(url, "theirs")) == 1


def test_killed_before_its_first_word_it_begins_again(driver: Open, url: str, tmp_path: Path) -> None:
    empty = optuna.storages.RDBStorage(url)
    optuna.create_study(study_name="s", storage=empty)  # in that moment, nothing says whose it is
    empty.remove_session()
    empty.engine.dispose()
    storage.write_yaml(tmp_path / "s" / "storage.yaml", {"id": "abc", "storage": shown(url)})
    assert finish(driver()).number == 0


def test_rows_whose_study_is_gone_are_no_beginning(driver: Open, tmp_path: Path) -> None:
    driver().close()
    (tmp_path / "optuna.db").unlink()
    (tmp_path / "s" / "rows.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"has no study 's' any more, and .*rows.jsonl has; restore it"):
        driver()


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"epochs": 10}, "epochs was 9, is now 10"), ({"recipe": {"lr": 0.5}}, "recipe was {}, is now {'lr': 0.5}")],
)
def test_other_settings_are_refused(driver: Open, changes: dict[str, Any], words: str) -> None:
    driver().close()
    with pytest.raises(UserError) as raised:
        driver(**changes)
    assert words in str(raised.value)
    finish(driver(trials=7))  # this may change


# --- a storage that is away


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(storage._CONNECT, "sqlite", {"timeout": 0.05})
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.0)


@pytest.mark.usefixtures("impatient")
def test_while_it_does_not_answer_what_runs_goes_on(driver: Open, url: str, said: list[str], tmp_path: Path) -> None:
    study = driver(scheduler="none")
    one, two = asked(study), asked(study)
    study.report(one.uid, 1, 0.1)
    away = sqlite3.connect(tmp_path / "optuna.db", isolation_level=None)
    away.execute("BEGIN EXCLUSIVE")
    assert study.report(one.uid, 2, 0.2) is False
    assert study.report(one.uid, 3, 0.3) is False
    study.tell(one.uid, result(0.3))
    with pytest.raises(StorageAwayError):
        study.ask()
    assert study.counts().running == 2  # as last known
    assert len(said) == 1
    assert "does not answer (database is locked); what runs goes on" in said[0]
    away.execute("ROLLBACK")
    away.close()
    assert study.report(two.uid, 1, 0.2) is False
    assert said[1:] == [f"the storage at {url} answers again."]
    known = trials(url)
    assert known[0].intermediate_values == {1: 0.1, 2: 0.2, 3: 0.3}
    assert [t.state.name for t in known] == ["COMPLETE", "RUNNING"]
    assert known[1].intermediate_values == {1: 0.2}
    assert asked(study).number == 2


@pytest.mark.usefixtures("impatient")
def test_for_good_it_is_an_error_that_loses_nothing(
    driver: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study = driver()
    one = asked(study)
    away = sqlite3.connect(tmp_path / "optuna.db", isolation_level=None)
    away.execute("BEGIN EXCLUSIVE")
    study.report(one.uid, 1, 0.2)
    monkeypatch.setattr(storage, "PATIENCE", 0.0)
    monkeypatch.setattr(storage, "ATTEMPTS", 3)
    study.tell(one.uid, result(0.3))
    with pytest.raises(
        UserError, match=r"has not answered for .* nothing that is finished is lost: start it"
    ) as raised:
        study.ask()
    assert "\n" not in str(raised.value)
    study.close()
    away.close()
    again = driver()
    assert asked(again) == one  # its row, if it has one, says what became of it


@pytest.mark.usefixtures("impatient")
def test_a_tell_that_was_heard_but_not_answered_is_not_repeated(driver: Open, url: str, tmp_path: Path) -> None:
    a = driver()
    one = asked(a)
    away = sqlite3.connect(tmp_path / "optuna.db", isolation_level=None)
    away.execute("BEGIN EXCLUSIVE")
    a.tell(one.uid, result(0.3))
    away.execute("ROLLBACK")
    away.close()
    kept = optuna.storages.RDBStorage(url)
    optuna.load_study(study_name="s", storage=kept).tell(one.number, 0.3)
    kept.remove_session()
    kept.engine.dispose()
    assert asked(a).number == 1
    assert a.counts().finished == 1


def test_a_trial_that_was_added_but_not_answered_is_handed_out_once(
    driver: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = driver()
    add = study._study.add_trial

    def silent(trial: Any) -> None:
        add(trial)
        raise StorageAwayError

    with monkeypatch.context() as away:
        away.setattr(storage, "FIRST_WAIT", 0.0)
        away.setattr(study._study, "add_trial", silent)
        with pytest.raises(StorageAwayError):
            study.ask()
    assert [asked(study).number, asked(study).number] == [0, 1]


# --- addresses


@pytest.fixture
def port() -> Iterator[int]:
    """Somebody listens there, who is no database."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("optuna.db", "not a database that Optuna knows"),
        ("redis://127.0.0.1", "not a database that Optuna knows"),
        ("sqlite:///:memory:", "names no file"),
        ("postgresql://u:secret@127.0.0.1:1/db", r"no database answers at postgresql://\*\*\*@127.0.0.1:1/db"),
        ("postgresql://u:secret@127.0.0.1:x/db", "no database answers at"),
        ("mysql+pymysql://u:secret@127.0.0.1:{port}/db", "needs the package pymysql: pip install pymysql"),
        ("postgresql+nonsense://u:secret@127.0.0.1:{port}/db", "cannot be read"),
    ],
)
def test_an_address_that_cannot_work_is_one_line(tmp_path: Path, port: int, address: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        Study.open(tmp_path / "s", config(), SPACE, say=print, chance=0.1, url=address.format(port=port))
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)
    assert list((tmp_path / "s").glob("*.yaml")) == []


def test_passwords_are_not_shown() -> None:
    assert shown("postgresql://u:p@ss/w@h/db?password=x&a=1") == "postgresql://***@h/db?password=***&a=1"
    assert shown("sqlite:////home/a@b/c.db") == "sqlite:////home/a@b/c.db"
    check_storage("postgresql:///db?host=/run/postgresql")  # a socket: nothing to knock at
