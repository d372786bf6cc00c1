"""Several processes that train one network: layer by layer what one process makes of the whole batch, in float64."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.batch_norm import GroupBatchNorm, check_norms, share_norms
from bench.config import TrialConfig, UserError
from bench.datasets import load
from bench.datasets.memory import MemorySource
from bench.evaluators.accuracy import accuracy
from bench.group import Group
from bench.learning.activity import Activity
from bench.learning.convert import convert
from bench.learning.learner import FeedbackLearner, parameter_groups
from bench.learning.rules import parse_rule
from bench.training import check_together, prepare
from dataset_files import write_folder
from together import together

CPU = torch.device("cpu")
COEFFICIENTS = {"decay": 0.3, "amp": 0.2, "null": 0.1, "sparse": 0.4, "self": 0.5}
EVERYTHING = "+".join(COEFFICIENTS)
#: rule, scaling, centered, parts of an accumulated batch, share of it that B sees
CASES: tuple[tuple[str, Any, bool, int, float], ...] = (
    *((EVERYTHING, scaling, centered, 1, 1.0) for scaling in ("reference", "normalized") for centered in (False, True)),
    (EVERYTHING, "normalized", True, 2, 1.0),
    (EVERYTHING, "reference", False, 1, 0.5),
    (EVERYTHING, "normalized", True, 2, 0.6),
    ("amp+null", "normalized", False, 1, 0.3),
    ("mirror", "reference", False, 2, 1.0),
    ("kolen-pollack", "reference", False, 1, 1.0),
    ("feedback", "reference", False, 1, 1.0),
    ("sign", "reference", False, 1, 1.0),
    ("backprop", "reference", False, 1, 1.0),
    ("frozen", "reference", False, 1, 1.0),
)
BATCH, STEPS = 14, 3


def network(rule: str, scaling: Any, centered: bool) -> nn.Sequential:
    """Convolutions, a sequence of tokens and both kinds of norm, one of them without parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=2, bias=False),
            nn.BatchNorm2d(6, affine=False, momentum=None),
            nn.ReLU(inplace=True),
            nn.Flatten(2),
            nn.Linear(9, 4),
            nn.Flatten(),
            nn.Linear(24, 8),
            nn.BatchNorm1d(8),
            nn.Linear(8, 5),
        ).double()
    coefficients = {name: COEFFICIENTS[name] for name in parse_rule(rule).primitives}
    convert(model, rule, coefficients, activity=Activity(scaling=scaling, centered=centered), seed=5)
    return model


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(STEPS, BATCH, 2, 6, 6, dtype=torch.float64, generator=g)
    return x + 2.0, torch.randint(5, (STEPS, BATCH), generator=g)


def trained(case: tuple[str, Any, bool, int, float], group: Group | None) -> dict[str, Tensor]:
    """The network's state after some steps; with a group, by this process's part of each batch."""
    rule, scaling, centered, pieces, fraction = case
    model = network(rule, scaling, centered)
    if group is not None:
        group = group.over(BATCH // pieces)
        share_norms(model, group)
    groups = parameter_groups(model, lr=0.05, weight_decay=1e-3)
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    FeedbackLearner(model, optimizer, group, fraction=fraction)
    for x, labels in zip(*data(), strict=True):
        optimizer.zero_grad()
        mine = list(range(BATCH)) if group is None else group.pick(BATCH, pieces)
        for part, answers in zip(x[mine].chunk(pieces), labels[mine].chunk(pieces), strict=True):
            share = 1.0 if group is None else group.share
            (F.cross_entropy(model(part), answers) * share / pieces).backward()
        learned = [p for p in model.parameters() if p.grad is not None]
        if group is not None:
            group.add_up(p.grad for p in learned)
        nn.utils.clip_grad_norm_(learned, 0.5)
        optimizer.step()
    return dict(model.state_dict())


def all_trained(group: Group, _: Path) -> list[dict[str, Tensor]]:
    return [trained(case, group) for case in CASES]


@functools.cache
def alone() -> list[dict[str, Tensor]]:
    return [trained(case, None) for case in CASES]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])  # 14 examples, or 7, are divided unequally by three, or by two
def test_they_train_as_one_process_does(size: int, tmp_path: Path) -> None:
    for found in (processes := together(all_trained, size, tmp_path)):
        for case, one, here, first in zip(CASES, alone(), found, processes[0], strict=True):
            assert one.keys() == here.keys()
            for name, value in one.items():
                torch.testing.assert_close(here[name], value, rtol=1e-10, atol=1e-12, msg=f"{case}: {name}")
                assert torch.equal(here[name], first[name]), "the processes have grown apart"


def test_what_was_compared_has_moved() -> None:
    """Else any arithmetic would have passed."""
    for (rule, *_), state in zip(CASES, alone(), strict=True):
        start = network(rule, "reference", False).state_dict()
        moved = {name for name, value in state.items() if not torch.allclose(value, start[name], atol=1e-4)}
        assert "11.weight" in moved
        assert {name for name in state if "running" in name} <= moved
        assert ("7.feedback" in moved) == (parse_rule(rule).learns)


def uneven(group: Group, _: Path) -> dict[str, Any]:
    """What only one process brings: nothing to evaluate, another number, another tensor's dtype."""
    model, few = nn.Linear(3, 5).eval(), torch.eye(3)[: 1 - group.rank]
    with torch.no_grad():
        model.weight.copy_(torch.arange(15.0).view(5, 3))
        model.bias.zero_()
    batches = [(few, torch.full((1,), 4))] if len(few) else []
    found: dict[str, Any] = {"accuracy": accuracy(model, batches, lambda x: x, group)}
    tensors = [torch.full((2, 2), group.rank + 1.0).t(), torch.tensor([group.rank], dtype=torch.float64)]
    group.add_up(tensors)
    found["sums"] = [t.tolist() for t in tensors]
    found["rows"] = group.gather(torch.tensor([group.rank, 7])).tolist()
    group.check_equal(3, "never said")
    try:
        group.check_equal(group.rank, "they differ; mend that.")
    except UserError as error:
        found["said"] = str(error)
    return found


@pytest.mark.slow
def test_sums_over_processes_of_which_one_has_nothing(tmp_path: Path) -> None:
    first, second = together(uneven, 2, tmp_path)
    assert first == second
    assert first["accuracy"]["acc"] == first["accuracy"]["top5"] == 1.0  # the one example that there is
    assert first["sums"] == [[[3.0, 3.0], [3.0, 3.0]], [1.0]]
    assert first["rows"] == [[0, 7], [1, 7]]
    assert first["said"] == "they differ; mend that."


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize(("count", "pieces"), [(30, 1), (30, 3), (7, 1), (1, 1)])
def test_each_example_has_one_process(size: int, count: int, pieces: int) -> None:
    groups = [Group(rank=rank, size=size) for rank in range(size)]
    parts = [group.pick(count, pieces) for group in groups]
    assert sorted(i for part in parts for i in part) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= pieces
    assert all(part == sorted(part) for part in parts)
    for first in range(count // pieces):  # any first few of a piece are divided as equally
        sizes = [sum(i % (count // pieces) < first for i in part) for part in parts]
        assert max(sizes) - min(sizes) <= pieces
    if count // pieces >= size:
        shares = [group.over(count // pieces).share for group in groups]
        assert shares == [len(part) / count for part in parts]
        assert sum(shares) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_a_part_of_a_batch_is_as_it_is_in_the_whole(
    kept: bool, train: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Augmentation too; of images in memory (``kept``), and of those that a DataLoader decodes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if not kept:
        monkeypatch.setattr("bench.datasets.folder.MEMORY_LIMIT", 0)
    images = load(f"imagefolder:{write_folder(tmp_path / 'pets', {'train': 8, 'val': 2, 'test': 2})}")
    assert isinstance(images.source, MemorySource) == kept
    split: Any = "train" if train else "val"
    size, settings = (7, {"seed": 3, "epoch": 1, "augment": True}) if train else (3, {})

    def read(pick: Any) -> list[tuple[Tensor, Tensor]]:
        return list(images.batches(split, size, device=CPU, pick=pick, **settings))

    whole, parts = read(None), [read(Group(rank=rank, size=2).pick) for rank in (0, 1)]
    assert len(whole) == 2
    if not train:  # the last batch has one example, which is the first process's
        assert [len(part) for part in parts] == [2, 1]
        parts[1].append((whole[0][0][:0], whole[0][1][:0]))
    for (pixels, labels), *divided in zip(whole, *parts, strict=True):
        assert sum(len(x) for x, _ in divided) == len(pixels)
        for rank, (x, y) in enumerate(divided):
            assert torch.equal(x, pixels[rank::2])
            assert torch.equal(y, labels[rank::2])


def config(**changes: Any) -> TrialConfig:
    base = {"rule": "backprop", "arch": "lenet", "dataset": "digits", "batch_size": 32, "train_examples": 64}
    return TrialConfig.from_dict({**base, **changes})


class Odd(nn.BatchNorm2d):
    """Some library's, with a forward pass of its own."""


@pytest.mark.parametrize("layer", [Odd(1), nn.InstanceNorm2d(1, track_running_stats=True), nn.SyncBatchNorm(1)])
def test_statistics_that_cannot_be_shared_are_refused(layer: nn.Module) -> None:
    with pytest.raises(UserError, match=f"'0' is a {type(layer).__name__}.*leave out --workers-per-trial"):
        check_norms(nn.Sequential(layer, nn.BatchNorm2d(1)))


def test_what_several_would_not_train_alike_is_refused_beforehand() -> None:
    check_together(prepare(config(arch="resnet20")), 32)
    with pytest.raises(UserError, match="33 workers cannot share a batch of 32 examples"):
        check_together(prepare(config()), 33)
    with pytest.raises(UserError, match="17 workers cannot share a batch of 16"):
        check_together(prepare(config(accumulate=2)), 17)
    trial = prepare(config())
    trial.model = nn.Sequential(nn.Dropout(0.1), trial.model)
    state = torch.get_rng_state()
    with pytest.raises(UserError, match="draws random numbers as it trains"):
        check_together(trial, 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_norm_keeps_its_parameters_its_names_and_its_evaluation() -> None:
    model = network("feedback", "reference", False)
    model(data()[0][0])
    before, parameters = model.eval()(data()[0][0]), [id(p) for p in model.parameters()]
    names = list(model.state_dict())
    share_norms(model, Group(rank=0, size=2))
    assert sum(isinstance(m, GroupBatchNorm) for m in model.modules()) == 3
    assert [id(p) for p in model.parameters()] == parameters
    assert list(model.state_dict()) == names
    assert torch.equal(model(data()[0][0]), before)
