"""Several drivers of one search: its rows, confirmations and controls, what they say, and who ends it in MLflow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from bench import campaign, search
from bench.campaign import Ready
from bench.config import StudyConfig, TrialResult, UserError
from bench.director import WAIT, Task, Wait
from bench.files import read_yaml, write_yaml
from bench.pages.parts import Page
from bench.place import Options, Place, Share
from bench.rows import RowFile, row
from bench.search import Open, opened
from bench.space_files import load_space
from mlflow_book import Book, delivered, finished, made, study_name
from rehearsal import Silent, rows

SPACE = load_space("sparse", "resnet18", space="reference")

Driver = Callable[..., "One"]


class One:
    """One driver of the search, that runs what it is given when it is told to."""

    def __init__(self, it: Open, tracker: Silent, stack: ExitStack) -> None:
        self.it, self.tracker, self._stack = it, tracker, stack
        self.tasks: list[Task] = []
        self.ran: list[str] = []

    def next(self) -> Task | Wait | None:
        task = self.it.campaign.next()
        if isinstance(task, Task):
            self.it.campaign.started(task.uid)
            self.tasks.append(task)
        return task

    def complete(self, status: Any = "finished") -> None:
        """The oldest of what it has."""
        task = self.tasks.pop(0)
        accuracy = 0.5 + 0.1 * task.config.coefficients.get("sparse", 0.0)
        metrics = {} if status == "failed" else {"val_acc": accuracy, "test_acc": accuracy}
        result = TrialResult(config=task.config, status=status, metrics=metrics, provenance={"here": 1})
        self.it.campaign.completed(task.uid, result)
        self.ran.append(task.uid)

    def die(self) -> None:
        """As if it were killed: nothing is told to anybody."""
        self.it._study.close()

    def finish(self, outcome: Any = "done") -> dict[str, Any]:
        with self._stack:
            return self.it.finish(outcome)

    def said_of_the_end(self) -> list[Any]:
        return [arguments[0] for name, arguments in self.tracker.calls if name == "close"]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def driver(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    monkeypatch.setattr(campaign, "POLL", 0.0)
    page = Page(title="a search", kind="", facts={}, sections=())
    monkeypatch.setattr(search, "search_page", lambda *_: page)
    with ExitStack() as all_of_them:

        def begin(**changes: Any) -> One:
            place = Place(
                options=Options(results=tmp_path, storage=f"sqlite:///{tmp_path}/optuna.db"),
                share=Share(concurrent=2, threads=1, gpus=0.0),
                dataset=("digits", "0"),
                examples={"train": 8, "val": 1, "test": 2},
                chance=0.1,
                key="cpu 0",
                uri="",
                artifacts=None,
            )
            values = {"rule": "sparse", "arch": "resnet18", "dataset": "digits", "trials": 3, "epochs": 2}
            config = StudyConfig(name="s", confirm_seeds=2, sampler="random", **{**values, **changes})
            tracker, stack = Silent(), ExitStack()

            class Opener(ExitStack):
                def __enter__(self) -> Any:
                    return tracker

            monkeypatch.setattr("bench.search.Tracker.open", lambda **_: Opener())
            ready = Ready(config=config, space=SPACE, place=place)
            one = One(stack.enter_context(opened(ready, say=said.append)), tracker, stack)
            all_of_them.callback(stack.close)
            return one

        yield begin


def drain(*drivers: One) -> None:
    """Each in its turn takes two runs and completes the older one, until none has any more."""
    busy = list(drivers)
    while busy:
        for one in list(busy):
            while len(one.tasks) < 2 and isinstance(task := one.next(), Task):
                pass
            if one.tasks:
                one.complete()
            elif task is None:
                busy.remove(one)
            else:
                assert task is WAIT


def uids(tmp_path: Path) -> list[str]:
    return [r["uid"] for r in (*rows(tmp_path / "s" / "rows.jsonl"), *rows(tmp_path / "controls" / "rows.jsonl"))]


def test_together_they_run_everything_once_and_both_know_it_all(driver: Driver, tmp_path: Path) -> None:
    a, b = driver(), driver()
    drain(a, b)
    assert sorted(a.ran + b.ran) == sorted(set(a.ran + b.ran)) == sorted(uids(tmp_path))
    kinds = Counter(r["kind"] for r in rows(tmp_path / "s" / "rows.jsonl"))
    assert kinds == {"search": 3, "confirm": 2}
    assert len(rows(tmp_path / "controls" / "rows.jsonl")) == 4
    assert min(len(a.ran), len(b.ran)) > 2
    first, second = a.finish(), b.finish()
    ends = [d.said_of_the_end() for d in (a, b)]
    assert ends == [[None], ["FINISHED"]]  # the last one ends the search in MLflow
    same = {k: v for k, v in first.items() if k != "mlflow"}
    assert same == {k: v for k, v in second.items() if k != "mlflow"}
    assert first["complete"]
    recorded = {arguments[0] for name, arguments in b.tracker.calls if name == "record"}
    assert recorded == set(uids(tmp_path))  # also what the other one may not have told MLflow


def test_who_has_nothing_to_do_waits_and_takes_over_from_the_dead(driver: Driver, tmp_path: Path) -> None:
    a, b = driver(), driver()
    while isinstance(a.next(), Task):
        pass
    assert len(a.tasks) == 3 + 4  # all trials and controls
    assert b.next() is WAIT
    for _ in range(3):
        a.complete()
    assert isinstance(b.next(), Task)  # the first confirmation; a has the controls still
    assert isinstance(a.next(), Task)
    assert b.next() is WAIT
    a.die()
    drain(b)
    assert sorted(uids(tmp_path)) == sorted(set(uids(tmp_path)))
    assert len(uids(tmp_path)) == 3 + 4 + 2
    assert b.finish()["complete"]
    assert b.said_of_the_end() == ["FINISHED"]


def test_killed_between_the_row_and_the_tell_another_tells_it(driver: Driver, tmp_path: Path) -> None:
    a, b = driver(), driver()
    task = a.next()
    assert isinstance(task, Task)
    result = TrialResult(config=task.config, status="finished", metrics={"val_acc": 0.6})
    RowFile(tmp_path / "s" / "rows.jsonl").append(row(task.uid, "s", "search", result))
    a.die()
    drain(b)
    assert task.uid not in b.ran
    assert sum(b.finish()["trials"].values()) == 3


def test_what_failed_is_tried_again_at_a_new_start_only(driver: Driver) -> None:
    a, b = driver(), driver()
    while isinstance(a.next(), Task):
        pass
    failed = [task.uid for task in a.tasks[3:]]
    for _ in range(3):
        a.complete()
    for _ in failed:
        a.complete("failed")
    drain(a, b)
    assert [uid for uid in b.ran if uid.startswith("control")] == []
    a.die()
    c = driver()
    drain(c)
    assert sorted(c.ran) == sorted(f"{uid}.2" for uid in failed)


def test_an_interrupted_driver_leaves_the_search_to_the_others(driver: Driver) -> None:
    a, b = driver(), driver()
    a.next()
    a.finish("interrupted")
    assert a.said_of_the_end() == [None]
    drain(b)
    assert len(b.ran) == 3 + 4 + 2
    b.finish()
    assert b.said_of_the_end() == ["FINISHED"]


def test_another_budget_is_refused_while_others_run_and_recorded_when_it_grows(driver: Driver, tmp_path: Path) -> None:
    a = driver()
    with pytest.raises(UserError, match=r"is being run with --trials 3; use the same to join"):
        driver(trials=5)
    a.finish("interrupted")
    driver(trials=5).finish("interrupted")
    assert read_yaml(tmp_path / "s" / "study.yaml")["config"]["trials"] == 5
    with pytest.raises(UserError, match="may grow, not shrink"):
        driver(trials=3)


def test_other_code_is_said_and_kept(driver: Driver, said: list[str], tmp_path: Path) -> None:
    one = driver()
    drain(one)
    one.finish()
    assert said == []
    path = tmp_path / "s" / "study.yaml"
    book = read_yaml(path)
    write_yaml(path, {**book, "code": [{**book["code"][0], "torch": "1.0", "source": "0"}]})
    driver().finish()
    assert said[0].startswith("s: goes on with other code (source was 0, is ")
    assert "torch was 1.0, is " in said[0]
    assert "\n" not in said[0]
    assert [code["torch"] for code in read_yaml(path)["code"]] == ["1.0", book["code"][0]["torch"]]
    driver().finish()
    assert len(said) == 1
    assert len(read_yaml(path)["code"]) == 2


def test_a_record_that_was_put_back_is_not_mixed_with_later_rows(driver: Driver, tmp_path: Path) -> None:
    a = driver()
    task = a.next()
    assert isinstance(task, Task)
    other = task.config.replace(coefficients={"sparse": 0.123})
    filed = row(task.uid, "s", "search", TrialResult(config=other, status="finished", metrics={"val_acc": 0.6}))
    RowFile(tmp_path / "s" / "rows.jsonl").append(filed)
    a.die()
    with pytest.raises(
        UserError, match=r"the row s-0000 is of other coefficients than the study.s; restore the journal"
    ):
        driver().next()


# --- MLflow


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Book:
    return made(tmp_path_factory.getbasetemp() / "joint")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own
def test_two_trackers_write_one_study(book: Book, request: pytest.FixtureRequest) -> None:
    name = study_name(request, book)
    a, b = book.open(), book.open()
    for tracker, live in ((a, ()), (b, None)):
        tracker.study(name, config={"trials": 3}, live=live, shared=True)
    for tracker in (a, b):
        delivered(tracker)
    result = finished()
    a.start("x", "search", result.config)
    a.report("x", 1, result.history[0])
    a.start("y", "search", result.config)
    delivered(a)
    b.start("x", "search", result.config)  # a has lost it; the run that it made is found
    b.finish("x", result)
    b.close(None)
    assert book.parent(name).info.status == "RUNNING"
    a.interrupt()  # told late, of runs that are no longer its own
    a.study(name, config={"trials": 3}, shared=True)  # the last one: what is RUNNING is nobody's
    a.record("x", "search", row("x", name, "search", result))
    a.close("FINISHED")
    children = book.children(name)  # a uid stands once
    assert {uid: run.info.status for uid, run in children.items()} == {"x": "FINISHED", "y": "KILLED"}
    assert book.points(children["x"], "epoch") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert book.parent(name).info.status == "FINISHED"
