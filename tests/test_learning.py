"""The learning core against autograd, against the authors' numbers, and against backprop."""

from __future__ import annotations

import json
from itertools import chain, combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.config import PRIMITIVE_NAMES
from bench.learning.layers import AsymmetricLayer, asymmetric_from, exact_gradients
from bench.learning.learner import FeedbackLearner, parameter_groups
from bench.learning.ops import Maps
from bench.learning.primitives import PRIMITIVES, activity_gradient
from bench.learning.rules import RULES, Rule, parse_rule
from layer_problems import PROBLEMS, Problem

SUBSETS = [
    "+".join(s)
    for s in chain.from_iterable(combinations(PRIMITIVE_NAMES, k) for k in range(1, len(PRIMITIVE_NAMES) + 1))
]
#: torch warns once of what the plain layer does here; ours does it without a word
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
problems = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)


def asymmetric(problem: Problem, rule: Rule, coefficients: dict[str, float]) -> tuple[AsymmetricLayer, Tensor]:
    layer, x = problem.make()
    generator = torch.Generator().manual_seed(3)
    return asymmetric_from(layer, rule, coefficients, generator), x


def gradients(layer: AsymmetricLayer, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """dx, dW, db and B's gradient as the optimizer would see it, from one backward pass."""
    groups = parameter_groups(layer, lr=0.0, weight_decay=0.0)
    optimizer = torch.optim.SGD(groups, lr=0.0)
    FeedbackLearner(layer, optimizer)
    x = x.clone().requires_grad_()
    layer(x).backward(delta)
    optimizer.step()
    assert x.grad is not None
    assert layer.weight.grad is not None
    db = None if layer.bias is None else layer.bias.grad
    return x.grad, layer.weight.grad, db, None if layer.feedback is None else layer.feedback.grad


def close(actual: Tensor | None, expected: Tensor, relative: float = 1e-10) -> None:
    assert actual is not None
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= relative * expected.norm().clamp_min(1e-300)


def plain(layer: AsymmetricLayer, x: Tensor) -> tuple[Maps, Tensor, Tensor, Tensor]:
    """What a primitive reads of a layer: maps, z, W, B."""
    W = layer.weight.detach()
    return layer.maps, layer.maps.forward(x, W), W, layer.feedback_weight()


# The three maps


@problems
def test_maps_against_autograd_of_the_plain_layer(problem: Problem) -> None:
    layer, x = problem.make()
    maps = asymmetric_from(layer, RULES["feedback"], {}, None).maps
    x.requires_grad_()
    z = layer(x)
    delta = torch.randn_like(z)
    dx, dW = torch.autograd.grad(z, (x, layer.weight), delta)
    close(maps.forward(x, layer.weight, layer.bias), z.detach())
    close(maps.transpose(delta, layer.weight.detach(), x), dx)
    close(maps.kernel_grad(x.detach(), delta, layer.weight), dW)


@problems
def test_transpose_is_the_adjoint_of_forward(problem: Problem) -> None:
    layer, x = problem.make()
    maps = asymmetric_from(layer, RULES["feedback"], {}, None).maps
    K = torch.randn_like(layer.weight)
    z = torch.randn_like(maps.forward(x, K))
    left, right = (z * maps.forward(x, K)).sum(), (maps.transpose(z, K, x) * x).sum()
    close(left.detach(), right.detach())
    close((maps.kernel_grad(x, z, K) * K).sum().detach(), left.detach())


# Primitives


@problems
@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitive_gradient_against_autograd_of_its_energy(problem: Problem, name: str) -> None:
    layer, x = asymmetric(problem, RULES["feedback"], {})
    maps, z, W, B = plain(layer, x)
    B = B.clone().requires_grad_()
    (expected,) = torch.autograd.grad(PRIMITIVES[name].energy(maps, x, z, W, B), B)
    close(PRIMITIVES[name].gradient(maps, x, z, W, B.detach()), expected)


@problems
@pytest.mark.parametrize("subset", SUBSETS)
def test_layer_gradient_of_every_subset_against_autograd_of_the_energies(problem: Problem, subset: str) -> None:
    rule = parse_rule(subset)
    coefficients = {name: 0.1 + 0.2 * i for i, name in enumerate(rule.primitives)}
    layer, x = asymmetric(problem, rule, coefficients)
    maps, z, W, B = plain(layer, x)
    B = B.clone().requires_grad_()
    energy = torch.stack([c * PRIMITIVES[p].energy(maps, x, z, W, B) for p, c in coefficients.items()]).sum()
    (expected,) = torch.autograd.grad(energy, B)
    delta = torch.randn_like(z)
    dx, dW, db, dB = gradients(layer, x, delta)
    close(dB, expected)
    close(dx, maps.transpose(delta, B.detach(), x))
    close(dW, maps.kernel_grad(x, delta, W))
    if layer.bias is not None:
        close(db, delta.movedim(1 if delta.dim() == 4 and isinstance(layer, nn.Conv2d) else -1, 0).flatten(1).sum(1))


def test_a_zero_coefficient_costs_nothing_and_amp_rides_along() -> None:
    """Counted, not timed: how many maps each combination calls (design, section 3)."""

    class Counting:
        def __init__(self, maps: Maps) -> None:
            self.maps, self.calls = maps, list[str]()

        def __getattr__(self, name: str):
            self.calls.append(name)
            return getattr(self.maps, name)

    layer, x = asymmetric(PROBLEMS[5], RULES["feedback"], {})
    maps, z, _, B = plain(layer, x)
    expected = {
        ("amp",): ["kernel_grad"],
        ("amp", "sparse"): ["forward", "kernel_grad"],
        ("amp", "null"): ["transpose", "kernel_grad"],
        ("amp", "null", "sparse"): ["forward", "kernel_grad", "transpose", "kernel_grad"],
    }
    for on, calls in expected.items():
        counting = Counting(maps)
        activity_gradient(counting, {n: float(n in on) for n in PRIMITIVE_NAMES}, x, z, B)
        assert counting.calls == calls


@problems
def test_identities_of_the_energies(problem: Problem) -> None:
    layer, x = asymmetric(problem, RULES["feedback"], {})
    maps, z, W, B = plain(layer, x)
    n, c = x.shape[0], 0.7
    other = torch.randn_like(B)

    def energy(B: Tensor, *names: str) -> Tensor:
        return c * torch.stack([PRIMITIVES[p].energy(maps, x, z, W, B) for p in names]).sum()

    def half(t: Tensor) -> Tensor:
        return c * 0.5 * t.square().sum()

    for names, square in (
        (("decay", "self"), lambda B: half(W - B)),
        (("amp", "sparse"), lambda B: half(z - maps.forward(x, B)) / n),
        (("amp", "null"), lambda B: half(x - maps.transpose(z, B, x)) / n),
    ):
        # equal up to a constant: the difference between two points is the same
        close(energy(B, *names) - energy(other, *names), square(B) - square(other), relative=1e-9)


# The authors' numbers

AUTHORS = np.load(Path(__file__).parent / "authors_gradients.npz")
CASES = json.loads(str(AUTHORS["meta"]))
#: their names in our primitives; their decay, sparse and null carry no ½
TRANSLATION = {
    "symmetric": {"decay": ("alpha", 2), "self": ("beta", 1)},
    "activation": {"sparse": ("alpha", 2), "amp": ("beta", 1)},
    "mirror": {"decay": ("alpha", 2), "amp": ("beta", 1)},
    "information": {"amp": ("alpha", 1), "null": ("beta", 2), "decay": ("gamma", 2)},
    "kolen_pollack": {"decay": ("alpha", 2)},
    "feedback": {},
}


@pytest.mark.parametrize("case", CASES)
def test_against_the_authors_own_code(case: str) -> None:
    about, array = CASES[case], lambda name: torch.from_numpy(AUTHORS[f"{case}/{name}"]).double()
    rule_name = case.split("/")[1]
    W = array("W")
    shape = (W.shape[1], W.shape[0])
    layer = (
        nn.Conv2d(*shape, W.shape[2:], stride=about["stride"], padding=about["padding"], bias=False)
        if W.dim() == 4
        else nn.Linear(*shape, bias=False)
    ).double()
    coefficients = {
        ours: about["coefficients"][theirs] * factor for ours, (theirs, factor) in TRANSLATION[rule_name].items()
    }
    ours = asymmetric_from(layer, RULES[rule_name.replace("_", "-")], coefficients, None)
    ours.weight.data, ours.feedback.data = W, array("B")
    if ours.state.rule.learns:
        dx, dW, _, dB = gradients(ours, array("x"), array("dy"))
        close(dB, array("task_dB") + array("alignment_dB"), relative=1e-4)
    else:
        x = array("x").requires_grad_()
        ours(x).backward(array("dy"))
        dx, dW = x.grad, ours.weight.grad
        assert not array("task_dB").any()
        assert not array("alignment_dB").any()
    close(ours(array("x")).detach(), array("y"), relative=1e-4)
    close(dx, array("dx"), relative=1e-4)
    close(dW, array("dW"), relative=1e-4)


def test_the_authors_file_covers_every_translation() -> None:
    assert {case.split("/")[1] for case in CASES} == set(TRANSLATION)
    assert {case.split("/")[0] for case in CASES} == {"fc", "conv_s1", "conv_s2", "conv_1x1_s2"}


# The layer as a whole


@problems
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_with_B_equal_to_W_it_is_backprop_bit_for_bit(problem: Problem, dtype: torch.dtype) -> None:
    layer, x = problem.make()
    layer, x = layer.to(dtype), x.to(dtype)
    ours = asymmetric_from(layer, RULES["feedback"], {}, None)
    ours.feedback.data = layer.weight.detach().clone()
    results = []
    for module in (layer, ours):
        layer.weight.grad = None
        here = x.clone().requires_grad_()
        out = module(here)
        torch.manual_seed(0)
        out.backward(torch.randn_like(out))
        results.append(
            (out.detach(), here.grad, layer.weight.grad, None if layer.bias is None else layer.bias.grad.clone())
        )
        if layer.bias is not None:
            layer.bias.grad = None
    for plain_result, our_result in zip(*results, strict=True):
        assert plain_result is our_result is None or torch.equal(plain_result, our_result)


@problems
def test_exact_gradients_sends_the_true_one_and_is_undone(problem: Problem) -> None:
    layer, x = asymmetric(problem, RULES["symmetric"], {"decay": 1.0, "self": 1.0})
    x.requires_grad_()
    with exact_gradients(layer):
        out = layer(x)
        delta = torch.randn_like(out)
        (true,) = torch.autograd.grad(out, x, delta)
    close(true, layer.maps.transpose(delta, layer.weight.detach(), x.detach()))
    assert layer.state.batches == 0
    layer.eval()
    (through_B,) = torch.autograd.grad(layer(x), x, delta)
    close(through_B, layer.maps.transpose(delta, layer.feedback.detach(), x.detach()))


def test_exact_gradients_is_undone_after_an_error() -> None:
    layer, _ = asymmetric(PROBLEMS[0], RULES["feedback"], {})
    with pytest.raises(KeyError), exact_gradients(layer):
        raise KeyError
    assert not layer.state.exact


def test_an_input_without_a_batch_is_a_batch_of_one() -> None:
    for problem in (PROBLEMS[0], PROBLEMS[5]):
        layer, x = asymmetric(problem, RULES["feedback"], {})
        close(layer(x[0]).detach(), layer(x)[0].detach())


@pytest.mark.parametrize("rule", [r for r in RULES.values() if r.feedback != "weight"], ids=lambda r: r.name)
def test_contract_of_every_rule(rule: Rule) -> None:
    """Every row: dx through B, dW exact, B moves exactly if it learns, nothing happens in evaluation mode."""
    coefficients = dict.fromkeys(rule.primitives, 0.5)
    layer, x = asymmetric(PROBLEMS[5], rule, coefficients)
    W, B = layer.weight.detach().clone(), layer.feedback_weight().clone()
    assert rule.source
    assert rule.summary
    assert B.shape == W.shape
    if rule.feedback == "sign":
        close(B, W.sign() * W.std(correction=0))
    else:
        assert torch.equal(B.flatten().sort().values, W.flatten().sort().values)
        assert not torch.equal(B, W)
    optimizer = torch.optim.SGD(parameter_groups(layer, lr=0.1, weight_decay=0.0), lr=0.1)
    FeedbackLearner(layer, optimizer)
    here = x.clone().requires_grad_()
    delta = torch.randn_like(layer(x))
    layer(here).backward(delta)
    close(here.grad, layer.maps.transpose(delta, B, x))
    close(layer.weight.grad, layer.maps.kernel_grad(x, delta, W))
    optimizer.step()
    moved = rule.learns and not torch.equal(layer.feedback_weight(), B)
    assert moved == rule.learns
    assert not torch.equal(layer.weight, W)
    layer.eval()
    optimizer.zero_grad()
    layer(x.clone().requires_grad_()).backward(delta)
    assert layer.state.batches == 0
    assert layer.state.total is None


def test_sign_follows_W_and_keeps_its_scale() -> None:
    layer, _ = asymmetric(PROBLEMS[0], RULES["sign"], {})
    scale = layer.weight.std(correction=0).item()
    layer.weight.data = -3.0 * layer.weight.data
    close(layer.feedback_weight(), layer.weight.detach().sign() * scale)
    assert "feedback_scale" in layer.state_dict()


def test_kolen_pollack_draws_W_and_B_together_at_the_known_rate() -> None:
    """W − B shrinks by (1 − lr·decay) in each step, whatever the data are."""
    lr, decay, steps = 0.1, 0.3, 20
    layer, x = asymmetric(PROBLEMS[5], RULES["kolen-pollack"], {"decay": decay})
    before = (layer.weight - layer.feedback).detach()
    optimizer = torch.optim.SGD(parameter_groups(layer, lr=lr, weight_decay=decay), lr=lr)
    FeedbackLearner(layer, optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        layer(x.clone().requires_grad_()).square().mean().backward()
        optimizer.step()
    close((layer.weight - layer.feedback).detach(), before * (1 - lr * decay) ** steps)
