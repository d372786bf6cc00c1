"""Noise patches in place of activations: against autograd, closed forms, and the formulas for what sampling costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.config import TrialConfig, UserError
from bench.evaluators.alignment import angle
from bench.learning.activity import Activity, noise_gradient, noise_patches
from bench.learning.convert import convert
from bench.learning.layers import AsymmetricLayer, asymmetric_from, asymmetric_layers
from bench.learning.learner import FeedbackLearner, parameter_groups
from bench.learning.ops import LinearMaps
from bench.learning.rules import RULES, Rule, parse_rule
from bench.training import prepare, train_step
from layer_problems import PROBLEMS, Problem

COEFFICIENTS = {"amp": 0.7, "null": 0.4, "sparse": 0.3}
NORMAL = Activity(input="normal")


def of(rule: Rule) -> dict[str, float]:
    return {name: COEFFICIENTS.get(name, 0.2) for name in rule.primitives}


def energies(layer: AsymmetricLayer, patches: Tensor, B: Tensor) -> Tensor:
    """The definition: each patch is an image of the kernel's size, of which the layer makes one output."""
    W, n = layer.weight.detach(), len(patches)
    if W.dim() == 2:
        x = patches.reshape(n, -1)
        z, back = F.linear(x, W), F.linear(x, B)
        reconstruction = z @ B
    else:
        groups = patches.shape[1]
        x = patches.reshape(n, -1, *W.shape[2:])
        z, back = F.conv2d(x, W, groups=groups), F.conv2d(x, B, groups=groups)
        reconstruction = F.conv_transpose2d(z, B, groups=groups)
    c = layer.state.coefficients
    amp = -(z * back).sum() * c.get("amp", 0.0)
    sparse = 0.5 * back.square().sum() * c.get("sparse", 0.0)
    null = 0.5 * reconstruction.square().sum() * c.get("null", 0.0)
    return (amp + sparse + null) / n


@pytest.mark.parametrize("rule", [parse_rule(r) for r in ("mirror", "activation", "information", "null+sparse+amp")])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_the_gradient_is_autograds_on_the_energies_for_every_kind_of_layer(problem: Problem, rule: Rule) -> None:
    layer = asymmetric_from(problem.make()[0], rule, of(rule), torch.Generator().manual_seed(3), activity=NORMAL)
    weights = [(layer.maps, layer.weight.detach())]
    (patches,) = noise_patches(Activity(input="normal", samples=7), weights, torch.Generator().manual_seed(0))
    ours = noise_gradient(layer.maps, NORMAL, layer.state.coefficients, patches, weights[0][1], layer.feedback_weight())
    B = layer.feedback_weight().clone().requires_grad_()
    (theirs,) = torch.autograd.grad(energies(layer, patches, B), B)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_noise_is_white_with_variance_one(kind: Any) -> None:
    weights = [(LinearMaps(), torch.zeros(3, 5)), (LinearMaps(), torch.zeros(2, 4))]
    drawn = noise_patches(Activity(input=kind, samples=200_000), weights, torch.Generator().manual_seed(0))
    assert [tuple(each.shape) for each in drawn] == [(200_000, 1, 5), (200_000, 1, 4)]
    both = torch.cat([each[:, 0] for each in drawn], dim=1)
    torch.testing.assert_close(both.t() @ both / len(both), torch.eye(9), atol=0.02, rtol=0)
    assert both.mean().abs() < 0.005
    assert (both.abs().max() <= math.sqrt(3.0)) == (kind == "uniform")


@pytest.mark.parametrize("samples", [64, 256, 1024])
def test_one_draw_is_off_by_the_angle_of_the_formula(samples: int) -> None:
    """tan²θ = (n + 1) / N for amp on normal noise, W of n = 64 inputs."""
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(64, 64, generator=generator)
    tangents = []
    for _ in range(20):
        (patches,) = noise_patches(Activity(input="normal", samples=samples), [(LinearMaps(), W)], generator)
        gradient = noise_gradient(LinearMaps(), NORMAL, {"amp": 1.0}, patches, W, torch.zeros_like(W))
        tangents.append(math.tan(math.radians(angle(-gradient, W))) ** 2)
    assert sum(tangents) / len(tangents) == pytest.approx(65 / samples, rel=0.05)


@pytest.mark.parametrize(
    ("rule", "coefficients", "tolerance"),
    [
        ("mirror", {"amp": 0.6, "decay": 1.2}, 4.0),
        (
            "activation",
            {"amp": 0.6, "sparse": 1.2},
            0.01,
        ),  # its gradient vanishes at the end: no sampling noise is left
        ("information", {"amp": 0.6, "null": 0.3, "decay": 0.9}, 4.0),
    ],
)
def test_B_settles_where_the_closed_form_says(rule: str, coefficients: dict[str, float], tolerance: float) -> None:
    """B* = (null·W·Wᵀ + decay)⁻¹·amp·W; for activation amp / sparse · W."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 12), nn.Linear(12, 6, bias=False)).double()
    convert(model, rule, coefficients, activity=Activity(input="normal", samples=128), seed=1)
    layer = list(asymmetric_layers(model).values())[1]
    groups = {group["name"]: group for group in parameter_groups(model, lr=0.0, weight_decay=0.0)}
    own = torch.optim.SGD(groups.pop("feedback")["params"], lr=0.02)
    optimizer = torch.optim.SGD(groups.values())
    learner = FeedbackLearner(model, optimizer, feedback_optimizer=own, seed=5)
    mean, steps = torch.zeros_like(layer.weight), 3000
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
        optimizer.step()
        learner.step()
        if step >= steps // 2:
            mean += layer.feedback_weight() / (steps - steps // 2)
    W = layer.weight.detach()
    null, hold = coefficients.get("null", 0.0), coefficients.get("decay", coefficients.get("sparse", 0.0))
    eye = torch.eye(6, dtype=torch.float64)
    expected = torch.linalg.solve(null * W @ W.t() + hold * eye, coefficients["amp"] * W)
    assert angle(mean, expected) < tolerance
    assert float(mean.norm() / expected.norm()) == pytest.approx(1.0, abs=0.03)


def test_mirror_on_noise_is_symmetric_on_average() -> None:
    W = torch.randn(9, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    (patches,) = noise_patches(Activity(input="uniform", samples=100_000), [(LinearMaps(), W)], generator)
    gradient = noise_gradient(LinearMaps(), NORMAL, {"amp": 0.3}, patches, W, torch.zeros_like(W))
    torch.testing.assert_close(gradient, -0.3 * W, atol=0.02, rtol=0)


def test_a_step_on_noise_does_not_depend_on_the_batch() -> None:
    def moved(seed: int, pixels: Tensor) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 3)
        )
        convert(model, "activation", {"amp": 1.0, "sparse": 1.0}, activity=Activity(input="normal", samples=8), seed=1)
        optimizer = torch.optim.SGD(parameter_groups(model, lr=0.1, weight_decay=0.0))
        FeedbackLearner(model, optimizer, seed=seed)
        model(pixels).sum().backward()
        optimizer.step()
        return list(asymmetric_layers(model).values())[1].feedback_weight()

    ones, noise = torch.ones(2, 1, 8, 8), torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(moved(1, ones), moved(1, noise))
    assert not torch.equal(moved(1, ones), moved(2, ones))


def config(**changes: Any) -> TrialConfig:
    base = {
        "rule": "information",
        "coefficients": {"amp": 1.0, "null": 0.3, "decay": 1.0},
        "arch": "resnet20",
        "epochs": 2,
        "batch_size": 32,
        "train_examples": 64,
        "lr": 0.05,
        "feedback_input": "normal",
        "feedback_samples": 16,
    }
    return TrialConfig.from_dict({**base, **changes})


def test_noise_follows_from_the_seed_and_the_epoch_alone() -> None:
    def after(accumulate: int) -> Tensor:
        """B of a layer after one step by batches that differ."""
        trial = prepare(config(accumulate=accumulate, feedback_optimizer="sgd", feedback_lr=0.1), device="cpu")
        for group in trial.optimizer.param_groups:
            group["lr"] = 0.0
        trial.learner.seed(4)
        pixels, labels = next(trial.data.batches("train", 32, device="cpu", seed=accumulate, epoch=0))
        train_step(trial, trial.data.normalize(pixels), labels)
        return trial.model.get_parameter("layer2.0.conv2.feedback").detach()

    assert torch.equal(after(1), after(2))  # one draw a step, however many parts its batch has


@pytest.mark.parametrize(
    ("rule", "activity", "said"),
    [
        ("symmetric", Activity(input="normal"), "feedback_input has no effect in rule 'symmetric'"),
        ("feedback", Activity(input="uniform"), "feedback_input has no effect"),
        ("mirror", Activity(reversed_null=True), "reversed_null has no effect in rule 'mirror'"),
    ],
)
def test_a_setting_without_effect_is_refused(rule: str, activity: Activity, said: str) -> None:
    with pytest.raises(UserError, match=said):
        activity.check(RULES[rule])
    with pytest.raises(UserError, match="has no effect with feedback_input 'normal'"):
        config(centered=True)
    with pytest.raises(UserError, match="feedback_samples has no effect"):
        TrialConfig(rule="mirror", feedback_samples=8)
