"""`bench speed steps`: who takes turns, what is held, what is counted, and that MLflow has what is printed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from bench.cli import main
from bench.config import UserError
from bench.learning.layers import asymmetric_layers
from bench.learning.rules import parse_rule
from bench.speed import OURS
from bench.steps import Conditions, Step, kept_by, measure, noise, ours, race
from bench.training import prepare
from mlflow_book import Book
from obvious import contestant

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
CPU = torch.device("cpu")
STRAIGHTFORWARD = "straightforward"
SMALL = {"arch": "lenet", "batch_size": 16, "rounds": 4}
MIRROR = Conditions.from_dict({**SMALL, "rules": ["mirror"]})


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns of one step: what is asked is not how long they take."""
    monkeypatch.setattr("bench.steps.TURN", 0.0)


def steps(*rules: str, **changes: object) -> dict[tuple[str, str], Step]:
    conditions = Conditions.from_dict({**SMALL, "rules": rules, **changes})
    ways = {OURS: ours, STRAIGHTFORWARD: contestant}
    return {(step.rule, step.way): step for step in measure(conditions, ways, device="cpu", say=lambda _: None)}


def test_everybody_takes_as_many_turns_each_at_least_so_long() -> None:
    order: list[str] = []

    def of(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    # 0.3 s is longer than a turn: one step in each
    found = race({name: lambda n=name: of(n, 0.3) for name in "abc"}, 2, CPU)  # type: ignore[misc]
    assert {name: len(times) for name, times in found.items()} == {"a": 2, "b": 2, "c": 2}
    assert len(order) == 3 + 2 * 3  # one before, to see how long they take
    assert min(map(min, found.values())) >= 0.3


@pytest.mark.usefixtures("short")
def test_nobody_always_follows_the_same_other_one() -> None:
    order: list[str] = []
    race({name: lambda n=name: order.append(n) for name in "abcd"}, 40, CPU)  # type: ignore[misc]
    rounds = ["".join(order[i : i + 4]) for i in range(4, len(order), 4)]
    assert len(rounds) == 40
    assert all(sorted(each) == list("abcd") for each in rounds)
    followed = {each[i : i + 2] for each in rounds for i in range(3)}
    assert len(followed) == 4 * 3


@pytest.mark.usefixtures("short")
def test_each_rule_has_its_ways_its_floor_and_its_memory() -> None:
    found = steps("feedback", "mirror")
    assert list(found) == [("backprop", OURS), ("feedback", OURS), ("mirror", OURS), ("mirror", STRAIGHTFORWARD)]
    backprop, feedback, mirror = (found[name, OURS] for name in ("backprop", "feedback", "mirror"))
    assert (backprop.ratio, backprop.low, backprop.high, backprop.floor, backprop.memory_ratio) == (1, 1, 1, 1, 1)
    assert feedback.floor == 1.0
    assert 1.0 < mirror.floor < 4 / 3  # the first layer's B learns nothing
    assert all(step.low <= step.ratio <= step.high and step.rounds == 4 for step in found.values())
    assert all(step.over_floor == step.ratio / step.floor for step in found.values())
    model = prepare(MIRROR.config(parse_rule("mirror")), data=noise(MIRROR)).model
    B = sum(layer.weight.numel() for layer in asymmetric_layers(model).values()) * 4 / 2**20
    assert mirror.memory_allowed * backprop.memory == pytest.approx(backprop.memory + 2 * B)
    assert feedback.memory_allowed * backprop.memory == pytest.approx(backprop.memory + B)
    assert feedback.memory == pytest.approx(backprop.memory + B, rel=0.02)
    assert found["mirror", STRAIGHTFORWARD].memory > mirror.memory * 0.99


def test_what_a_network_keeps_is_counted_once() -> None:
    """W, B and their momentum; the first step makes the momentum."""
    trial = prepare(MIRROR.config(parse_rule("mirror")), data=noise(MIRROR))
    parameters = sum(p.numel() for p in trial.model.parameters())
    assert sum(t.numel() for t in kept_by(trial)) == parameters
    step, kept = ours(trial.config, noise(MIRROR), torch.randn(16, 3, 32, 32), torch.arange(16) % 10)
    step()
    first = next(p for name, p in trial.model.named_parameters() if name.endswith("feedback"))  # sends nothing
    assert sum(t.numel() for t in kept) == 2 * parameters - first.numel()


@pytest.mark.usefixtures("short")
def test_a_share_of_the_batch_lowers_the_floor_of_rules_that_see_it() -> None:
    whole, part = steps("mirror", "symmetric"), steps("mirror", "symmetric", fraction=0.25)
    extra = whole["mirror", OURS].floor - 1
    assert part["mirror", OURS].floor == pytest.approx(1 + extra / 4)
    assert part["symmetric", OURS].floor == 1.0


@pytest.mark.usefixtures("short")
def test_the_floor_is_of_the_examples_that_are_seen() -> None:
    """An eighth of 16 is 2; a thirtieth is one example too, a sixteenth."""
    extra = steps("mirror")["mirror", OURS].floor - 1
    assert steps("mirror", fraction=1 / 30)["mirror", OURS].floor == pytest.approx(1 + extra / 16)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rule", "nonsense"], "unknown rule"),
        (["--arch", "resnet19"], "resnet"),
        (["--rounds", "3"], "rounds = 3 is out of range"),
        (["--fraction", "0"], "fraction = 0"),
        (["--batch-size", "0"], "batch_size = 0"),
        (["--precision", "fp8"], "precision"),
        (["--device", "tpu"], "tpu"),
        (["--threads", "0"], "threads = 0"),
        (["--samples", "8", "--fraction", "0.5"], "--samples and --fraction"),
        (["--tracking-uri", "nowhere"], "unknown scheme"),
        (["--arch", "resnet18", "--image-size", "1", "--batch-size", "1"], "cannot be trained on 1 images of 1 pixels"),
        (["--image-size", "100000", "--batch-size", "100000"], "cannot be trained on 100000 images"),
    ],
)
def test_what_cannot_be_timed_is_refused_in_a_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["speed", "steps", *words, "--results", str(tmp_path / "r")]) == 2
    err = capsys.readouterr().err
    assert said in err.splitlines()[-1]
    assert not (tmp_path / "r").exists()


def test_conditions_are_strict() -> None:
    with pytest.raises(UserError, match="unknown key"):
        Conditions.from_dict({"rules": ["mirror"], "batchsize": 3})


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_what_is_printed_is_in_mlflow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--arch", "lenet", "--rule", "mirror", "--batch-size", "8", "--rounds", "4"]
    assert main(["speed", "steps", *words, "--results", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(s["rule"], s["way"]) for s in found["steps"]] == [("backprop", OURS), ("mirror", OURS)]
    assert found["conditions"]["batch_size"] == 8
    assert found["provenance"]["threads"] == torch.get_num_threads()
    book = Book(tmp_path)
    runs = book.children("speed").values()
    assert book.parent("speed").info.status == "FINISHED"
    told = {(run.data.tags["bench.rule"], run.data.tags["bench.way"]): run.data.metrics for run in runs}
    for step in found["steps"]:
        numbers = {name: value for name, value in step.items() if not isinstance(value, str)}
        assert told[step["rule"], step["way"]] == pytest.approx(numbers)
