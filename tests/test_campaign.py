"""What a search hands out, and when: without Ray, with a study and an MLflow that only remember."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.campaign import Campaign, Ready
from bench.config import StudyConfig, TrialResult, UserError
from bench.engine import WAIT, Task
from bench.files import read_yaml, write_yaml
from bench.place import Options, Place, Share
from bench.rows import RowFile, row
from bench.search import opened
from bench.space_files import load_space
from bench.study import Study
from rehearsal import Formula, Stage, stage  # noqa: F401

SPACE = load_space("sparse", "resnet18", space="reference")


class Silent:
    """A tracker that writes down which method was called for which uid."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda uid, *_: self.calls.append((name, uid))


def ready(folder: Path, *, name: str = "s", trials: int = 2, **changes: Any) -> Ready:
    config = StudyConfig(
        name=name, rule="sparse", arch="resnet18", dataset="digits", trials=trials, epochs=2, confirm_seeds=1, **changes
    )
    place = Place(
        options=Options(results=folder),
        share=Share(concurrent=2, threads=1, gpus=0.0),
        dataset=("digits", "0"),
        examples={"train": 8, "val": 1, "test": 2},
        chance=0.1,
        key="cpu 0",
        uri="",
        artifacts=None,
    )
    return Ready(config=config, space=SPACE, place=place)


def campaign(folder: Path, **changes: Any) -> Campaign:
    made = ready(folder, **changes)
    study = Study.open(made.folder, made.config, SPACE.distributions(), say=print, chance=0.1)
    rows, controls = RowFile(made.folder / "rows.jsonl"), RowFile(folder / "controls" / "rows.jsonl")
    return Campaign(made, study, Silent(), rows=rows, controls=controls)  # type: ignore[arg-type]


def finish(source: Campaign, task: Task, accuracy: float, status: Any = "finished") -> None:
    metrics = {} if status == "failed" else {"val_acc": accuracy, "test_acc": accuracy}
    source.started(task.uid)
    result = TrialResult(
        config=task.config, status=status, reason=None if metrics else "a bug", metrics=metrics, provenance={"here": 1}
    )
    source.completed(task.uid, result)


def drain(source: Campaign, status: Any = "finished") -> list[str]:
    """Run everything, one after the other; the uids in their order."""
    done = []
    while isinstance(task := source.next(), Task):
        finish(source, task, 0.5 + 0.01 * len(done), status if task.uid.startswith("control") else "finished")
        done.append(task.uid)
    assert task is None
    return done


def test_trials_then_controls_while_trials_run_then_confirmations(tmp_path: Path) -> None:
    source = campaign(tmp_path)
    first, second = source.next(), source.next()
    assert isinstance(first, Task)
    assert isinstance(second, Task)
    controls = [source.next(), source.next()]
    assert [c.config.rule for c in controls] == ["backprop", "feedback"]
    assert source.next() is WAIT  # the best is not known yet
    finish(source, first, 0.7)
    assert source.next() is WAIT
    finish(source, second, 0.6)
    confirm = source.next()
    assert confirm.config.coefficients == first.config.coefficients
    assert confirm.config.seed == 1000
    assert (first.options.get("read_test", False), confirm.options["read_test"]) == (False, True)
    for task in (*controls, confirm):
        finish(source, task, 0.6)
    assert source.next() is None
    assert source.complete
    kinds = ("search", "control", "confirm")
    assert [source.filed(kind) for kind in kinds] == [2, 2, 1]
    source._study.close()
    again = campaign(tmp_path)
    assert [again.filed(kind) for kind in kinds] == [2, 2, 1]


def test_controls_are_run_once_for_a_recipe(tmp_path: Path) -> None:
    first = drain(campaign(tmp_path, name="one"))
    second = drain(campaign(tmp_path, name="two"))
    assert sum(uid.startswith("control") for uid in first) == 2
    assert not any(uid.startswith("control") for uid in second)
    other = drain(campaign(tmp_path, name="three", recipe={"lr": 0.01}))
    assert sum(uid.startswith("control") for uid in other) == 2


def test_a_control_that_failed_is_tried_again_at_the_next_start_only(tmp_path: Path) -> None:
    first = campaign(tmp_path)
    failed = [uid for uid in drain(first, status="failed") if uid.startswith("control")]
    assert len(failed) == 2
    assert first.complete  # in this start; its table shows the failures
    assert [entry["failed"] for entry in first.summary()["controls"]] == [1, 1]
    first._study.close()
    again = campaign(tmp_path)
    assert not again.complete
    retried = drain(again)
    assert retried == [f"{uid}.2" for uid in failed]
    assert [entry["failed"] for entry in again.summary()["controls"]] == [0, 0]


def test_two_searches_that_run_the_same_control_share_its_row(tmp_path: Path) -> None:
    one, two = campaign(tmp_path, name="one", trials=1), campaign(tmp_path, name="two", trials=1)
    tasks = {}
    for source in (one, two):
        trial = source.next()
        tasks[source] = source.next()
        finish(source, trial, 0.5)
    assert tasks[one].uid == tasks[two].uid
    finish(one, tasks[one], 0.8)
    finish(two, tasks[two], 0.9)  # the slower one: adopts the row
    for source in (one, two):
        assert [r["metrics"]["val_acc"] for r in source.control_rows()] == [0.8]


def test_a_control_that_another_search_has_filed_meanwhile_is_not_run(tmp_path: Path) -> None:
    one, two = campaign(tmp_path, name="one", trials=1), campaign(tmp_path, name="two", trials=1)
    controls = [uid for uid in drain(one) if uid.startswith("control")]
    assert len(controls) == 2
    assert not set(controls) & set(drain(two))
    assert [r["uid"] for r in two.control_rows()] == controls


def test_a_row_that_was_written_before_a_kill_is_told_not_run_again(tmp_path: Path) -> None:
    first = campaign(tmp_path, trials=1)
    task = first.next()
    first.started(task.uid)
    result = TrialResult(config=task.config, status="finished", metrics={"val_acc": 0.6})
    RowFile(tmp_path / "s" / "rows.jsonl").append(row(task.uid, "s", "search", result))
    first._study.close()  # killed here: the study was never told
    again = campaign(tmp_path, trials=1)
    assert task.uid not in drain(again)
    assert again._study.counts().finished == 1


def test_a_record_that_was_put_back_is_not_mixed_with_later_rows(tmp_path: Path) -> None:
    first = campaign(tmp_path)
    task = first.next()
    other = task.config.replace(coefficients={"sparse": 0.123})
    result = TrialResult(config=other, status="finished", metrics={"val_acc": 0.6})
    RowFile(tmp_path / "s" / "rows.jsonl").append(row(task.uid, "s", "search", result))
    first._study.close()
    with pytest.raises(
        UserError, match=r"the row s-0000 is of other coefficients than the study.s; restore the journal"
    ):
        campaign(tmp_path).next()


def begin(folder: Path, said: list[str], **changes: Any) -> dict[str, Any]:
    """What a start keeps with the study."""
    with opened(ready(folder, **changes), say=said.append):
        return read_yaml(folder / "s" / "study.yaml")


def test_the_budget_may_grow_and_not_shrink(tmp_path: Path, stage: Callable[[Formula], Stage]) -> None:  # noqa: F811
    stage(lambda _: None)
    assert [begin(tmp_path, [], trials=n)["config"]["trials"] for n in (3, 5)] == [3, 5]
    with pytest.raises(UserError, match="may grow, not shrink"):
        begin(tmp_path, [], trials=3)


def test_other_code_is_said_and_kept(tmp_path: Path, stage: Callable[[Formula], Stage]) -> None:  # noqa: F811
    stage(lambda _: None)
    said: list[str] = []
    book = begin(tmp_path, said)
    assert said == []
    write_yaml(tmp_path / "s" / "study.yaml", {**book, "code": [{**book["code"][0], "torch": "1.0", "source": "0"}]})
    again = begin(tmp_path, said)
    assert said[0].startswith("s: goes on with other code (source was 0, is ")
    assert "torch was 1.0, is " in said[0]
    assert "\n" not in said[0]
    assert [code["torch"] for code in again["code"]] == ["1.0", book["code"][0]["torch"]]
    assert len(begin(tmp_path, said)["code"]) == 2
    assert len(said) == 1


def test_the_display_says_where_the_search_stands(tmp_path: Path) -> None:
    source = campaign(tmp_path)
    task = source.next()
    source.started(task.uid)
    source.reported(task.uid, 1, {"val_acc": 0.25})
    shown = source.render()
    assert "0/2 trials" in shown
    assert "controls 0/2" in shown
    assert "epoch 1/2  val 25.00%" in shown
    finish(source, task, 0.3)
    assert "best 30.00% (trial 0)" in source.render()
    assert "left" in source.render()


@pytest.mark.parametrize("status", ["diverged", "failed"])
def test_a_search_without_a_finished_trial_confirms_nothing(tmp_path: Path, status: str) -> None:
    source = campaign(tmp_path, trials=1)
    finish(source, source.next(), 0.1, status)
    assert all(uid.startswith("control") for uid in drain(source))
    assert source.summary()["confirmed"] == []


def _left(folder: Path, *names: str) -> Path:
    """What killed workers left of a study's checkpoints."""
    kept = folder / "s" / "checkpoints"
    kept.mkdir(parents=True, exist_ok=True)
    for name in names:
        (kept / name).touch()
    return kept


def test_checkpoints_of_what_has_a_row_are_removed_at_the_next_start(tmp_path: Path) -> None:
    """A kill between the row and the removal; and a control that another search finished meanwhile."""
    first = campaign(tmp_path, trials=2)
    done, open_ = first.next(), first.next()
    finish(first, done, 0.5)
    control = next(iter(first.controls))
    first._study.close()
    other = campaign(tmp_path, name="other", trials=1)
    assert control in drain(other)
    names = [f"{uid}.pt{end}" for uid in (done.uid, control, open_.uid) for end in ("", ".1", ".77.new", ".1.77.new")]
    kept = _left(tmp_path, *names, "of-the-user.txt")
    campaign(tmp_path, trials=2).sweep()
    assert {path.name for path in kept.iterdir()} == {*names[8:], "of-the-user.txt"}


def test_when_nothing_is_left_to_run_no_checkpoint_is_left(tmp_path: Path) -> None:
    """An interrupted confirmation of what is no longer among the best has no row, and will have none."""
    source = campaign(tmp_path, trials=2)
    kept = _left(tmp_path, "s-confirm-0123456789ab.pt")
    task = source.next()
    source.started(task.uid)
    source.sweep(at_the_end=True)
    assert len(list(kept.iterdir())) == 1
    finish(source, task, 0.5)
    drain(source)
    source.sweep(at_the_end=True)
    assert list(kept.iterdir()) == []
