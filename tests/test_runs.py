"""What a measurement of robustness hands out, and when: without Ray, whatever happens to its runs."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.engine import WAIT, Task
from bench.robustness import Robustness
from fake_networks import CHANCE, LEVELS, begin, curves, drain, end, file_of, finish, kinds, source, trains

# --- order -----------------------------------------------------------------------------------------------


def test_networks_then_evaluations_then_noise_in_training(tmp_path: Path) -> None:
    made = source(tmp_path, "feedback", seeds=1)
    first, second = made.next(), made.next()
    assert [t.config.rule for t in (first, second)] == ["backprop", "feedback"]
    assert first.options["read_test"]
    noisy = made.next()  # nothing can be evaluated yet
    assert noisy.config.update_noise == 0.1
    finish(made, second)
    probe = made.next()
    assert probe.config.rule == "feedback"
    assert probe.options["evaluation"] == {"site": "weight", "draws": 5, "level": 0.0}
    assert probe.options["network"] == second.options["checkpoint"]
    assert made.next().options["network"] == probe.options["network"]  # a whole network is for all
    finish(made, first)
    finish(made, noisy)
    assert kinds(drain_rest(made)) == {"training": 3, "weight": 3 + 1, "fgsm": 3 + 3}


def drain_rest(made: Robustness) -> list[Task]:
    """What is not under way."""
    tasks = []
    while isinstance(task := made.next(), Task):
        tasks.append(task)
        finish(made, task)
    assert task is WAIT
    return tasks


def test_a_plan_is_run_once_and_grows_by_what_is_new(tmp_path: Path) -> None:
    first = drain(source(tmp_path, "feedback"))
    assert kinds(first) == {"training": 2 * 2 * 3, "weight": 2 * 2 * 3, "fgsm": 2 * 2 * 3}
    assert drain(source(tmp_path, "feedback")) == []
    more = {**LEVELS, "weight": (0.1, 0.2, 0.4)}
    assert kinds(drain(source(tmp_path, "feedback", levels=more))) == {"weight": 4}
    assert kinds(drain(source(tmp_path, "feedback", seeds=3))) == {"training": 6, "weight": 6, "fgsm": 6}
    new = drain(source(tmp_path, "feedback", "sign"))
    assert {task.config.rule for task in new} == {"sign"}
    assert kinds(new) == {"training": 6, "weight": 6, "fgsm": 6}
    whole = curves(source(tmp_path, "feedback", "sign"))
    assert whole["weight", "sign"] == [(0.1, pytest.approx(0.8), 0, 0), (0.2, pytest.approx(0.7), 0, 0)]
    assert whole["update", "backprop"] == [(0.1, pytest.approx(0.8), 0, 0), (0.3, pytest.approx(0.6), 0, 0)]


# --- what goes wrong -------------------------------------------------------------------------------------


def of_feedback(status: str) -> Callable[[Task], str]:
    def told(task: Task) -> str:
        mine = task.config.rule == "feedback" and task.config.seed == 2001 and not task.config.update_noise
        return status if mine and "evaluation" not in task.options else "finished"

    return told


def test_a_training_that_failed_is_not_waited_for_and_tried_again_at_the_next_start(tmp_path: Path) -> None:
    first = source(tmp_path, "feedback")
    tasks = drain(first, of_feedback("failed"))
    assert kinds(tasks) == {"training": 12, "weight": 9, "fgsm": 9}
    found = first.summary()
    assert found["runs"] == {"finished": 29, "diverged": 0, "failed": 1}
    assert curves(first)["weight", "feedback"] == [(0.1, 0.8, 0, 1), (0.2, 0.7, 0, 1)]
    entry = next(r for s in found["sites"] if s["site"] == "weight" for r in s["rules"] if r["rule"] == "feedback")
    assert (entry["seeds"], entry["failed"], entry["incomplete"]) == ([2000, 2001], 1, 1)
    (failed,) = [r for r in first.rows() if r["status"] == "failed"]
    again = source(tmp_path, "feedback")
    assert not again.complete
    retried = drain(again)
    assert retried[0].uid == f"{failed['uid']}.2"
    assert retried[0].options["checkpoint"].endswith(f"{failed['uid']}.pt")  # goes on where it was
    assert kinds(retried) == {"training": 1, "weight": 3, "fgsm": 3}
    assert again.summary()["runs"] == {"finished": 36, "diverged": 0, "failed": 0}


def test_a_training_that_diverged_stands_at_chance_at_every_level(tmp_path: Path) -> None:
    made = source(tmp_path, "feedback")
    assert kinds(drain(made, of_feedback("diverged"))) == {"training": 12, "weight": 9, "fgsm": 9}
    for site, level, left in (("weight", 0.2, CHANCE), ("fgsm", 0.02, 0.0), ("fgsm", 0.01, 0.0)):  # an attack leaves 0
        assert (level, pytest.approx((0.9 - level + left) / 2), 1, 0) in curves(made)[site, "feedback"]
    assert made.summary()["runs"] == {"finished": 29, "diverged": 1, "failed": 0}
    assert drain(source(tmp_path, "feedback")) == []


def test_an_evaluation_that_failed_is_filed_as_one_and_tried_again(tmp_path: Path) -> None:
    def fails(task: Task) -> str:
        return "failed" if task.options.get("evaluation", {}).get("level") == 0.2 else "finished"

    first = source(tmp_path, seeds=1)
    drain(first, fails)
    (row,) = [r for r in first.rows() if r["status"] == "failed"]
    assert row["evaluation"] == {"site": "weight", "draws": 5, "level": 0.2}
    assert curves(first)["weight", "backprop"] == [(0.1, 0.8, 0, 0), (0.2, None, 0, 1)]
    again = source(tmp_path, seeds=1)
    (task,) = drain(again)
    assert task.uid == f"{row['uid']}.2"
    assert curves(again)["weight", "backprop"][1] == (0.2, pytest.approx(0.7), 0, 0)


def test_a_network_that_is_gone_is_trained_again_by_one_of_its_evaluations(tmp_path: Path) -> None:
    drain(source(tmp_path, seeds=1, levels={"update": (0.1, 0.3)}))  # leaves no network
    made = source(tmp_path, seeds=1, levels={"weight": (0.1, 0.2)})
    first = made.next()
    assert trains(first)
    assert made.next() is WAIT
    made.started(first.uid)
    begin(first)  # there is a file now, of half a network
    assert made.next() is WAIT
    made.completed(first.uid, end(first))
    others = made.next()
    assert not trains(others)
    assert isinstance(made.next(), Task)
    finish(made, others)
    uids = [r["uid"] for r in made.rows()]
    assert len(uids) == len(set(uids)) == 3


def test_a_network_that_a_kill_left_half_trained_is_finished_by_one_evaluation(tmp_path: Path) -> None:
    drain(source(tmp_path, seeds=1, levels={"update": (0.1, 0.3)}))
    killed = source(tmp_path, seeds=1, levels={"weight": (0.1, 0.2)})
    begin(killed.next())
    made = source(tmp_path, seeds=1, levels={"weight": (0.1, 0.2)})
    first = made.next()
    assert trains(first)
    assert made.next() is WAIT
    finish(made, first)
    assert kinds(drain(made)) == {"weight": 2}


class Life:
    """One measurement from its first start to its end, in which anything may happen at any time."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.width, self.calm = self.random.choice([1, 2, 4]), False
        self.live: dict[str, Task] = {}
        self.done: Counter[str] = Counter()
        self.made = self.start()

    def start(self) -> Robustness:
        self.live.clear()
        return source(self.folder, "feedback")

    def hand_out(self) -> bool:
        """As the director does; whether anything is left."""
        while len(self.live) < self.width:
            task = self.made.next()
            if task is None:
                assert not self.live
                return False
            if task is WAIT:
                assert self.live, "nothing runs, and there is nothing to run: it would wait for ever"
                return True
            self.check(task)
            self.live[task.uid] = task
            self.made.started(task.uid)
        return True

    def check(self, task: Task) -> None:
        assert self.done[task.uid] == 0, "a run that is filed is run again"
        if trains(task):
            assert not [t for t in self.live.values() if file_of(t) == file_of(task)], "two train one network"
        elif "evaluation" in task.options:
            assert not [t for t in self.live.values() if file_of(t) == file_of(task) and trains(t)]

    def step(self) -> bool:
        if not self.hand_out():
            return False
        task = self.random.choice(list(self.live.values()))
        dice = 1.0 if self.calm else self.random.random()
        if dice < 0.1:
            self.made = self.start()  # killed
        elif dice < 0.15:
            for path in (self.folder / "m" / "networks").glob("*"):
                if not any(file_of(t) == path for t in self.live.values()):
                    path.unlink()
        elif dice < 0.4:
            begin(task)
        else:
            status = "finished" if dice > 0.55 or "evaluation" in task.options else "diverged"
            status = "failed" if dice < 0.45 else status
            begin(task)
            self.done[task.uid] += 1
            self.made.completed(self.live.pop(task.uid).uid, end(task, status))
        return True


@pytest.mark.parametrize("seed", range(25))
def test_whatever_happens_it_comes_to_its_end_and_nothing_is_lost_or_doubled(seed: int, tmp_path: Path) -> None:
    life = Life(tmp_path, seed)
    while life.step():
        pass
    life.calm, life.made = True, life.start()  # what failed is tried again
    while life.step():
        pass
    rows = life.made.rows()
    assert Counter(r["status"] for r in rows)["failed"] == 0
    assert len(rows) == len({r["uid"] for r in rows})
    diverged = {(r["config"]["rule"], r["config"]["seed"]) for r in rows if r["status"] == "diverged"}
    sites = life.made.summary()["sites"]
    assert [(len(site["rules"]), len(site["levels"])) for site in sites] == [(2, 2)] * 3
    assert {(len(rule["seeds"]), rule["incomplete"]) for site in sites for rule in site["rules"]} == {(2, 0)}
    trained = {(r["config"]["rule"], r["config"]["seed"]) for r in rows if r["evaluation"]}
    assert len(trained | diverged) == 4
