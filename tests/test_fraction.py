"""``feedback_fraction``: B's gradient from a part of each batch, unbiased, and cheaper by as much; W's is as ever."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.cli import main
from bench.config import TrialConfig, UserError
from bench.group import Group
from bench.learning.activity import Activity
from bench.learning.convert import convert
from bench.learning.layers import AsymmetricLayer, asymmetric_from, asymmetric_layers
from bench.learning.learner import FeedbackLearner, parameter_groups
from bench.learning.ops import ConvMaps
from bench.learning.primitives import PRIMITIVES
from bench.learning.rules import Rule, parse_rule
from bench.learning.switch import examples_seen
from bench.training import check_together, prepare, train_epoch
from layer_problems import PROBLEMS, Problem

EVERYTHING = {"decay": 0.3, "amp": 0.2, "null": 0.1, "sparse": 0.4, "self": 0.5}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
problems = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)


def layer_of(problem: Problem, rule: Rule, **how: Any) -> tuple[AsymmetricLayer, Tensor]:
    layer, _ = problem.make()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        x = torch.randn(4, *problem.input_shape[1:], dtype=torch.float64)
    coefficients = {name: EVERYTHING[name] for name in rule.primitives}
    return asymmetric_from(layer, rule, coefficients, torch.Generator().manual_seed(3), activity=Activity(**how)), x


def gradients(layer: AsymmetricLayer, x: Tensor, fraction: float) -> list[Tensor]:
    """(B's, dx, dW) of one backward pass."""
    layer.zero_grad()
    optimizer = torch.optim.SGD(parameter_groups(layer, lr=0.0, weight_decay=0.0), lr=0.0)
    FeedbackLearner(layer, optimizer, fraction=fraction)
    x = x.clone().requires_grad_()
    layer(x).square().sum().backward()
    optimizer.step()
    assert layer.feedback is not None
    assert layer.feedback.grad is not None
    assert x.grad is not None
    assert layer.weight.grad is not None
    return [layer.feedback.grad.clone(), x.grad, layer.weight.grad.clone()]


@problems
@pytest.mark.parametrize("rule", ["+".join(EVERYTHING), "mirror", "information", "activation", "sparse"])
def test_mean_over_all_samples_is_the_gradient_of_the_whole_batch(problem: Problem, rule: str) -> None:
    layer, x = layer_of(problem, parse_rule(rule))
    whole, dx, dW = gradients(layer, x, 1.0)
    found = []
    for first in combinations(range(4), 2):
        order = [*first, *(i for i in range(4) if i not in first)]
        own, own_dx, own_dW = gradients(layer, x[order], 0.5)
        found.append(own)
        torch.testing.assert_close(own_dx, dx[order], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(own_dW, dW, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.stack(found).mean(0), whole, rtol=1e-10, atol=1e-12)
    assert max((own - whole).abs().max().item() for own in found) > 1e-3  # no sample is the whole


@problems
def test_a_sample_gives_what_the_energies_of_its_examples_give(problem: Problem) -> None:
    rule = parse_rule("+".join(EVERYTHING))
    layer, x = layer_of(problem, rule)
    (found, *_), few = gradients(layer, x, 0.75), x[:3]
    W, B = layer.weight.detach(), layer.feedback_weight().clone().requires_grad_()
    z = layer.maps.forward(few, W)
    energies = [c * PRIMITIVES[name].energy(layer.maps, few, z, W, B) for name, c in EVERYTHING.items()]
    (expected,) = torch.autograd.grad(torch.stack(energies).sum(), B)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("problem", PROBLEMS[::5], ids=lambda p: p.name)
def test_other_scalings_see_a_smaller_batch(problem: Problem, centered: bool) -> None:
    rule = parse_rule("amp+null+sparse")
    layer, x = layer_of(problem, rule, scaling="normalized", centered=centered)
    found, *_ = gradients(layer, x, 0.5)
    alone, *_ = gradients(layer, x[:2], 1.0)
    torch.testing.assert_close(found, alone, rtol=1e-10, atol=1e-12)


def test_what_was_overwritten_is_computed_again_for_the_sample_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    forward = ConvMaps.forward

    def counted(self: ConvMaps, x: Tensor, *rest: Any) -> Tensor:
        sizes.append(len(x))
        return forward(self, x, *rest)

    plain, x = layer_of(PROBLEMS[4], parse_rule("mirror"))
    overwritten, _ = layer_of(PROBLEMS[4], parse_rule("mirror"))
    found = []
    for layer, last in ((plain, F.relu), (overwritten, F.relu_)):
        monkeypatch.setattr(ConvMaps, "forward", counted)
        optimizer = torch.optim.SGD(parameter_groups(layer, lr=0.0, weight_decay=0.0), lr=0.0)
        FeedbackLearner(layer, optimizer, fraction=0.5)
        last(layer(x.clone().requires_grad_())).sum().backward()
        optimizer.step()
        assert layer.feedback is not None
        found.append(layer.feedback.grad)
    assert sizes == [4, 4, 2]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("fraction", "batch", "seen"), [(1.0, 7, 7), (0.5, 7, 4), (0.25, 128, 32), (0.001, 128, 1), (0.3, 1, 1)]
)
def test_share_of_a_batch_in_examples(fraction: float, batch: int, seen: int) -> None:
    assert examples_seen(fraction, batch) == seen


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.01, float("nan")])
def test_no_share_is_refused(fraction: float) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    convert(model, "sparse", {"sparse": 0.1})
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.1, weight_decay=0.0))
    with pytest.raises(ValueError, match="must lie in"):
        FeedbackLearner(model, optimizer, fraction=fraction)
    with pytest.raises(UserError, match="feedback_fraction"):
        TrialConfig(rule="sparse", coefficients={"sparse": 0.1}, feedback_fraction=fraction)


def small(**changes: Any) -> TrialConfig:
    fields = {"arch": "lenet", "rule": "mirror", "coefficients": {"amp": 1e-4, "decay": 0.1}, "train_examples": 64}
    return TrialConfig.from_dict({"batch_size": 32, "augment": False, "epochs": 2, **fields, **changes})


@pytest.mark.parametrize("rule", ["backprop", "feedback", "sign", "symmetric", "kolen-pollack", "decay"])
def test_a_rule_that_sees_no_activity_has_no_use_for_it(rule: str) -> None:
    primitives = parse_rule(rule).primitives
    coefficients = {} if rule == "kolen-pollack" else dict.fromkeys(primitives, 0.1)
    with pytest.raises(UserError, match=f"feedback_fraction has no effect in rule '{rule}'"):
        prepare(small(rule=rule, coefficients=coefficients, feedback_fraction=0.5))


def test_a_search_of_such_a_rule_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "--rule", "symmetric", "--arch", "lenet", "--set", "feedback_fraction=0.5"]) == 2
    assert "feedback_fraction" in capsys.readouterr().err


def test_too_few_examples_for_all_workers_are_refused() -> None:
    trial = prepare(small(feedback_fraction=0.05))
    check_together(trial, 2)  # 2 of 32
    with pytest.raises(UserError, match=r"feedback_fraction = 0.05 B sees 2 of a batch's 32 examples"):
        check_together(trial, 3)


@pytest.mark.parametrize("size", [2, 3])
def test_each_process_has_its_part_of_the_sample(size: int) -> None:
    groups = [Group(rank=rank, size=size).over(14) for rank in range(size)]
    whole = set(range(examples_seen(0.5, 14)))
    model = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 2))
    convert(model, "sparse", {"sparse": 0.1})
    found: list[int] = []
    for group in groups:
        optimizer = torch.optim.SGD(parameter_groups(model, lr=0.1, weight_decay=0.0))
        FeedbackLearner(model, optimizer, group, fraction=0.5)
        switch = asymmetric_layers(model)["0"].state.switch
        assert switch is not None
        seen, sharing = switch.seen(torch.tensor(group.pick(14)))
        assert sharing is not None
        assert sharing.share == len(seen) / len(whole)
        found += seen.tolist()
    assert sorted(found) == sorted(whole)


def test_it_reaches_the_layers_of_a_trial_and_moves_B_elsewhere() -> None:
    networks = {}
    for fraction in (1.0, 0.25):
        trial = prepare(small(feedback_fraction=fraction))
        assert {layer.state.switch.fraction for layer in asymmetric_layers(trial.model).values()} == {fraction}  # type: ignore[union-attr]
        train_epoch(trial)
        networks[fraction] = trial.model.state_dict()
    assert not torch.equal(networks[1.0]["conv2.feedback"], networks[0.25]["conv2.feedback"])
