"""`scaling` and `centered`: energies against slow ones, the scaled gradient against autograd, and what it is for."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.config import TrialConfig, UserError
from bench.learning.activity import Activity, centered
from bench.learning.convert import convert
from bench.learning.layers import AsymmetricLayer, AsymmetricLinear, asymmetric_from, asymmetric_layers
from bench.learning.learner import FeedbackLearner, parameter_groups
from bench.learning.ops import ConvMaps, LinearMaps, Maps
from bench.learning.primitives import PRIMITIVES, activity_gradient, sees_batch
from bench.learning.rules import RULES, Rule, parse_rule, subsets
from bench.training import prepare, resolve_coefficients
from bench.trial import run_trial
from layer_problems import PROBLEMS, Problem

#: torch warns once of what the plain layer does here; ours does it without a word
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
problems = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
ACTIVITY_RULES = subsets(["amp", "null", "sparse"])
both: dict[str, Any] = {"scaling": "normalized", "centered": True}


def coefficients_of(rule: Rule) -> dict[str, float]:
    return {name: 0.3 + 0.2 * i for i, name in enumerate(rule.primitives)}


def asymmetric(problem: Problem, rule: Rule, **how: Any) -> tuple[AsymmetricLayer, Tensor]:
    layer, x = problem.make()
    return asymmetric_from(
        layer, rule, coefficients_of(rule), torch.Generator().manual_seed(3), activity=Activity(**how)
    ), x


def backward(layer: AsymmetricLayer, x: Tensor) -> list[Tensor | None]:
    """B's gradient as the optimizer would see it, then y, dx, dW, db, from one backward pass."""
    optimizer = torch.optim.SGD(parameter_groups(layer, lr=0.0, weight_decay=0.0), lr=0.0)
    FeedbackLearner(layer, optimizer)
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    optimizer.step()
    db = None if layer.bias is None else layer.bias.grad
    assert layer.feedback is not None
    return [layer.feedback.grad, y.detach(), x.grad, layer.weight.grad, db]


def feedback_gradient(layer: AsymmetricLayer, x: Tensor) -> Tensor:
    grad = backward(layer, x)[0]
    assert grad is not None
    return grad


def close(actual: Tensor, expected: Tensor, relative: float = 1e-10) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= relative * expected.norm().clamp_min(1e-300)


def without_mean(problem: Problem, x: Tensor) -> Tensor:
    dims = (0, 2, 3) if problem.name.startswith("conv") else tuple(range(x.dim() - 1))
    return x - x.mean(dims, keepdim=True)


def minimised(problem: Problem, layer: AsymmetricLayer, x: Tensor) -> Tensor:
    """The gradient by autograd of what the layer's settings say it is: x and z as seen, each energy over its own."""
    maps, W, B = layer.maps, layer.weight.detach(), layer.feedback_weight().clone().requires_grad_()
    x = without_mean(problem, x) if layer.state.activity.centered else x
    z, total = maps.forward(x, W), torch.zeros((), dtype=x.dtype)
    for name, coefficient in layer.state.coefficients.items():
        per = 1.0
        if layer.state.activity.scaling == "normalized" and PRIMITIVES[name].sees == "batch":
            per = slow_energy(maps, "null" if name == "null" else "sparse", x, z, W).item()
        total = total + coefficient / per * PRIMITIVES[name].energy(maps, x, z, W, B)
    return torch.autograd.grad(total, B)[0]


def slow_energy(maps: Maps, name: str, x: Tensor, z: Tensor, K: Tensor) -> Tensor:
    """The trace of the Hessian of this primitive's energy for one output (of null: input) channel: one-hot B by one.

    With groups, the mean over them: all of B's traces, over the channels of that side.
    """
    trace = torch.zeros((), dtype=x.dtype)
    for at in range(K.numel()):
        one = torch.zeros(K.numel(), dtype=K.dtype)
        one[at] = 1
        trace += 2 * PRIMITIVES[name].energy(maps, x, z, K, one.view_as(K))
    groups = maps.groups if isinstance(maps, ConvMaps) else 1
    return trace / (K.shape[1] * groups if name == "null" else K.shape[0])


# The energies


def convolutions() -> list[tuple[ConvMaps, tuple[int, int]]]:
    """Maps and kernel sizes: every combination that fits an image of 9 by 8."""
    grid = product(((1, 1), (3, 3), (2, 4)), ((1, 1), (2, 2), (3, 1)), ((0, 0), (1, 1), (2, 0)), ((1, 1), (2, 1)))
    plain = [(ConvMaps(s, p, d, g), k) for (k, s, p, d), g in product(grid, (1, 2, 4))]
    same = []
    for kernel, dilation in product(((2, 4), (4, 2), (3, 2), (5, 5)), ((1, 1), (1, 2))):
        whole = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding, extra = (whole[0] // 2, whole[1] // 2), (whole[0] % 2, whole[1] % 2)
        same.append((ConvMaps((1, 1), padding, dilation, 2, extra), kernel))
    return plain + same


def test_energies_of_convolutions_against_every_patch_cut_out() -> None:
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for maps, (kh, kw) in convolutions():
        K = torch.randn(8, 4 // maps.groups, kh, kw, dtype=torch.float64)
        z = maps.forward(x, K)
        (sh, sw), (ph, pw), (dh, dw) = maps.stride, maps.padding, maps.dilation
        wide = F.pad(x, (pw, pw + maps.extra[1], ph, ph + maps.extra[0]))
        patches = F.unfold(wide, (kh, kw), dilation=maps.dilation, stride=maps.stride)
        assert patches.shape[2] == z.shape[2] * z.shape[3]
        close(maps.forward_energy(x, K), patches.square().sum() / (3 * maps.groups))
        total = 0.0
        energy = z.square().sum((0, 1)).tolist()
        for i, j, u, v in product(range(z.shape[2]), range(z.shape[3]), range(kh), range(kw)):
            row, column = i * sh + u * dh - ph, j * sw + v * dw - pw
            if 0 <= row < 9 and 0 <= column < 8:  # a position of x, not of its border, reads this z
                total += energy[i][j]
        close(maps.transpose_energy(z, K, x), torch.tensor(total / (3 * maps.groups), dtype=torch.float64))


@problems
def test_energies_are_the_traces_of_the_hessians(problem: Problem) -> None:
    layer, x = asymmetric(problem, RULES["feedback"])
    maps, W = layer.maps, layer.weight.detach()
    z = maps.forward(x, W)
    for name, energy in (("sparse", maps.forward_energy(x, W)), ("null", maps.transpose_energy(z, W, x))):

        def of(flat: Tensor, name: str = name) -> Tensor:
            return PRIMITIVES[name].energy(maps, x, z, W, flat.view_as(W))

        hessian = torch.autograd.functional.hessian(of, torch.zeros(W.numel(), dtype=W.dtype), vectorize=False)
        groups = maps.groups if isinstance(maps, ConvMaps) else 1
        copies = W.shape[0] if name == "sparse" else W.shape[1] * groups  # the same block for every such channel
        assert energy.shape == ()
        close(energy, hessian.trace() / copies)
        close(energy, slow_energy(maps, name, x, z, W))
        if groups == 1:
            assert torch.linalg.eigvalsh(hessian)[-1] <= energy


def test_energies_are_added_up_in_float32_and_need_no_values_of_K() -> None:
    x = torch.randn(64, 32, 20, 20, generator=torch.Generator().manual_seed(1)).bfloat16()
    K = torch.full((32, 32, 3, 3), torch.nan)
    conv = ConvMaps((1, 1), (1, 1), (1, 1), 1)
    for energy, exact in (
        (conv.forward_energy(x, K), conv.forward_energy(x.double(), K)),
        (conv.transpose_energy(x, K, x), conv.transpose_energy(x.double(), K, x.double())),
        (LinearMaps().forward_energy(x, K), LinearMaps().forward_energy(x.double(), K)),
    ):
        assert (energy.dtype, exact.dtype) == (torch.float32, torch.float64)
        close(energy.double(), exact, relative=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the way of a GPU")
def test_energies_on_a_gpu() -> None:
    x = torch.randn(8, 6, 9, 7)
    K, maps = torch.randn(4, 6, 3, 3), ConvMaps((2, 1), (1, 0), (1, 1), 1)
    z = maps.forward(x, K)
    there = x.cuda().contiguous(memory_format=torch.channels_last)
    close(maps.forward_energy(there, K.cuda()).cpu(), maps.forward_energy(x, K), relative=1e-5)
    close(maps.transpose_energy(z.cuda(), K.cuda(), there).cpu(), maps.transpose_energy(z, K, x), relative=1e-5)


# The gradient of B


@problems
@pytest.mark.parametrize("rule", [*ACTIVITY_RULES, RULES["information"]], ids=lambda r: r.name)
@pytest.mark.parametrize(
    "how", [{"scaling": "normalized"}, {"centered": True}, both], ids=["normalized", "centered", "both"]
)
def test_gradient_against_autograd_of_the_scaled_energies(problem: Problem, rule: Rule, how: dict[str, Any]) -> None:
    layer, x = asymmetric(problem, rule, **how)
    close(feedback_gradient(layer, x), minimised(problem, layer, x), relative=1e-9)


@problems
def test_all_but_B_is_left_as_it_is(problem: Problem) -> None:
    rule = parse_rule("decay+amp+null+sparse+self")
    (dB, *reference), (other, *rest) = (
        backward(*asymmetric(problem, rule)),
        backward(*asymmetric(problem, rule, **both)),
    )
    assert dB is not None
    assert other is not None
    assert not torch.allclose(dB, other)
    for a, b in zip(reference, rest, strict=True):
        assert a is b is None or (a is not None and b is not None and torch.equal(a, b))


@problems
def test_centred_amp_and_sparse_draw_B_to_W_where_the_centred_input_tells(problem: Problem) -> None:
    """amp = sparse = c is ½c‖z − B·x‖² of the centred x and z, here with a mean that carries most of the energy."""
    layer, x = problem.make()
    x = x + 5
    ours = asymmetric_from(
        layer, RULES["activation"], {"amp": 0.7, "sparse": 0.7}, None, activity=Activity(centered=True)
    )
    seen = without_mean(problem, x)
    B = ours.feedback_weight().clone().requires_grad_()
    gap = ours.maps.forward(seen, ours.weight.detach()) - ours.maps.forward(seen, B)
    (expected,) = torch.autograd.grad(0.35 * gap.square().sum() / len(x), B)
    close(feedback_gradient(ours, x), expected, relative=1e-9)


@problems
@pytest.mark.parametrize("scaling", ["reference", "normalized"])
def test_the_centred_gradient_does_not_see_the_mean_of_a_channel(problem: Problem, scaling: str) -> None:
    rule = parse_rule("amp+null+sparse")
    channels = 1 if problem.name.startswith("conv") else -1
    layer, x = asymmetric(problem, rule, scaling=scaling, centered=True)
    before = feedback_gradient(layer, x)
    shift = torch.linspace(-2, 3, x.shape[channels], dtype=x.dtype)
    layer.weight.grad = None
    close(feedback_gradient(layer, x + layer_shape(shift, x, channels)), before, relative=1e-9)
    layer.state.activity = Activity(scaling=layer.state.activity.scaling)
    layer.weight.grad = None
    assert (feedback_gradient(layer, x + layer_shape(shift, x, channels)) - before).norm() > 0.1 * before.norm()


def layer_shape(shift: Tensor, x: Tensor, channels: int) -> Tensor:
    return shift.view([-1 if d == channels % x.dim() else 1 for d in range(x.dim())])


def test_the_mean_is_taken_from_z_on_one_image_and_z_stays_as_it_is() -> None:
    maps, shapes = ConvMaps((1, 1), (1, 1), (1, 1), 1), []

    class Watched:
        channel_mean = staticmethod(maps.channel_mean)

        def forward(self, x: Tensor, K: Tensor) -> Tensor:
            shapes.append(tuple(x.shape))
            return maps.forward(x, K)

    x, W = torch.randn(6, 3, 5, 4).double() + 3, torch.randn(2, 3, 3, 3).double()
    z = maps.forward(x, W)
    kept = z.clone()
    seen, follows = centered(Watched(), x, z, W)  # type: ignore[arg-type]
    assert shapes == [(1, 3, 5, 4)]
    assert torch.equal(z, kept)
    assert seen.mean((0, 2, 3)).abs().max() < 1e-14
    assert follows is not None
    close(follows, maps.forward(seen, W))
    assert centered(Watched(), x, None, W)[1] is None  # type: ignore[arg-type]
    assert len(shapes) == 1


def test_as_many_maps_as_the_cost_floor_says() -> None:
    """Counted, not timed, for every subset of the primitives: a backprop step has 3, and B's gradient adds these."""
    calls: list[str] = []

    class Counting:
        def __init__(self, maps: Maps) -> None:
            self.maps = maps

        def __getattr__(self, name: str) -> Any:
            if name in ("forward", "transpose", "kernel_grad"):
                calls.append(name)
            return getattr(self.maps, name)

    layer, x = asymmetric(PROBLEMS[5], RULES["feedback"])
    z, B = layer.maps.forward(x, layer.weight.detach()), layer.feedback_weight()
    for rule, normalized in product(subsets(), (False, True)):
        calls.clear()
        coefficients = coefficients_of(rule)
        if sees_batch(coefficients):
            activity_gradient(Counting(layer.maps), coefficients, x, z, B, normalized=normalized)  # type: ignore[arg-type]
        assert 1 + len(calls) / 3 == pytest.approx(rule.cost_floor), rule.name


# What it is for


@problems
@pytest.mark.parametrize("rule", ACTIVITY_RULES, ids=lambda r: r.name)
def test_normalized_is_blind_to_the_scale_of_the_input(problem: Problem, rule: Rule) -> None:
    for scaling, factor in (("normalized", 1.0), ("reference", 0.01)):
        layer, x = asymmetric(problem, rule, scaling=scaling)
        before = feedback_gradient(layer, x)
        layer.weight.grad = None
        close(feedback_gradient(layer, x * 0.1), before * factor)


@pytest.mark.parametrize("rule", ACTIVITY_RULES, ids=lambda r: r.name)
def test_normalized_is_blind_to_the_size_of_the_image(rule: Rule) -> None:
    torch.manual_seed(0)
    for scaling, grows in (("normalized", 1.0), ("reference", 16.0)):
        how = {"scaling": scaling, "centered": False}
        point = asymmetric_from(
            nn.Conv2d(6, 5, 1).double(), rule, coefficients_of(rule), None, activity=Activity(**how)
        )  # type: ignore[arg-type]
        tile = torch.randn(4, 6, 3, 3).double()
        once = feedback_gradient(point, tile)
        point.weight.grad = None
        close(feedback_gradient(point, tile.repeat(1, 1, 4, 4)), grows * once)  # exactly: the same patches

        layer = asymmetric_from(
            nn.Conv2d(6, 5, 3, padding=1).double(), rule, coefficients_of(rule), None, activity=Activity(**how)
        )  # type: ignore[arg-type]
        found = []
        for size in (8, 16, 32):
            layer.weight.grad = None
            found.append(feedback_gradient(layer, torch.randn(64, 6, size, size).double()))
        small, middle, large = (grad.norm().item() for grad in found)
        assert large / small == pytest.approx(grows, rel=0.25)  # the border, and the draw
        assert middle / small == pytest.approx(grows**0.5, rel=0.25)


@pytest.mark.parametrize("how", [{"scaling": "normalized"}, both], ids=["normalized", "both"])
@pytest.mark.parametrize("rule", ACTIVITY_RULES, ids=lambda r: r.name)
def test_nothing_in_gives_nothing_out(rule: Rule, how: dict[str, Any]) -> None:
    for problem in (PROBLEMS[0], PROBLEMS[5]):
        layer, x = asymmetric(problem, rule, **how)
        assert not feedback_gradient(layer, torch.zeros_like(x)).any()
        layer.weight.grad = None
        assert feedback_gradient(layer.float(), torch.full_like(x, 1e-30).float()).isfinite().all()


@problems
@pytest.mark.parametrize("name", ["sparse", "null"])
def test_a_coefficient_of_ten_is_stable_in_every_layer_when_normalized(problem: Problem, name: str) -> None:
    """Learning rate 0.1, Nesterov momentum 0.9: stable up to a coefficient of 13.6 wherever there is one group."""
    sizes = {}
    for scaling in ("normalized", "reference"):
        layer, x = problem.make()
        ours = asymmetric_from(layer, RULES[name], {name: 10.0}, None, activity=Activity(scaling=scaling))  # type: ignore[arg-type]
        ours.weight.requires_grad_(False)
        assert ours.feedback is not None
        optimizer = torch.optim.SGD([ours.feedback], lr=0.1, momentum=0.9, nesterov=True)
        FeedbackLearner(ours, optimizer)
        start = ours.feedback.norm()
        x = (10 * x).requires_grad_()
        for _ in range(60):
            optimizer.zero_grad()
            ours(x).sum().backward()
            optimizer.step()
        sizes[scaling] = (ours.feedback.norm() / start).item()
    assert sizes["normalized"] < 1
    assert not sizes["reference"] < 1e6


def test_under_autocast_the_gradient_is_that_of_float32_within_its_precision() -> None:
    rule = parse_rule("amp+null+sparse")
    torch.manual_seed(0)
    x, plain = torch.randn(16, 6, 8, 8) + 1, nn.Conv2d(6, 5, 3, padding=1)
    whole = asymmetric_from(
        copy.deepcopy(plain), rule, coefficients_of(rule), torch.Generator().manual_seed(1), activity=Activity(**both)
    )
    low = asymmetric_from(
        plain, rule, coefficients_of(rule), torch.Generator().manual_seed(1), activity=Activity(**both)
    )
    expected = feedback_gradient(whole, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = feedback_gradient(low, x)
    assert found.dtype == torch.float32
    close(found, expected, relative=0.02)


# The settings, on their way from a configuration to a layer


def small(**changes: Any) -> TrialConfig:
    base = {"arch": "lenet", "dataset": "digits", "epochs": 2, "batch_size": 32, "train_examples": 256, "lr": 0.05}
    return TrialConfig.from_dict({**base, **changes})


def test_they_reach_every_layer_and_stay_in_a_copy() -> None:
    config = small(rule="mirror", coefficients={"amp": 0.1, "decay": 0.1}, scaling="normalized", centered=True)
    model = prepare(config, device="cpu").model
    for network in (model, copy.deepcopy(model)):
        states = [layer.state for layer in asymmetric_layers(network).values()]
        assert states
        assert {s.activity for s in states} == {Activity(scaling="normalized", centered=True)}
    made = AsymmetricLinear(
        3, 2, rule=RULES["sparse"], coefficients={"sparse": 1.0}, activity=Activity(scaling="normalized")
    )
    assert made.state.activity == Activity(scaling="normalized")


@pytest.mark.parametrize("rule", ["backprop", "feedback", "sign", "kolen-pollack", "symmetric", "frozen"])
@pytest.mark.parametrize(
    ("how", "named"),
    [({"scaling": "normalized"}, "scaling has"), ({"centered": True}, "centered has"), (both, "scaling and centered")],
)
def test_settings_without_effect_are_refused(rule: str, how: dict[str, Any], named: str) -> None:
    coefficients = dict.fromkeys(RULES[rule].primitives, 0.1) if rule == "symmetric" else {}
    with pytest.raises(UserError, match=rf"^{named} .*no effect in rule '{rule}'.*remove it.*\.$"):
        resolve_coefficients(small(rule=rule, coefficients=coefficients, **how), RULES[rule])
    coefficients = dict.fromkeys(RULES[rule].primitives, 0.1)
    with pytest.raises(UserError, match="no effect"):
        convert(nn.Sequential(nn.Linear(3, 2)), rule, coefficients, activity=Activity(**how))


def test_an_unknown_scaling_is_refused() -> None:
    with pytest.raises(UserError, match=r"unknown scaling 'normalised'\. Did you mean 'normalized'"):
        convert(nn.Sequential(nn.Linear(3, 2)), "sparse", {"sparse": 1.0}, activity=Activity(scaling="normalised"))  # type: ignore[arg-type]


def test_a_coefficient_at_which_the_reference_diverges_is_stable_when_normalized_and_centred() -> None:
    config = small(rule="activation", coefficients={"amp": 10.0, "sparse": 10.0}, lr=0.01)
    assert run_trial(config, device="cpu").status == "diverged"
    result = run_trial(config.replace(scaling="normalized", centered=True), device="cpu")
    assert result.status == "finished"
    assert result.history[-1]["train_loss"] < 2.4  # that of guessing is 2.3
