"""Accuracy and alignment against known answers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.evaluators.accuracy import accuracy
from bench.evaluators.alignment import alignment, angle, error_alignment, floor_alignment, weight_alignment
from bench.learning.activity import Activity
from bench.learning.convert import convert
from bench.learning.layers import AsymmetricLinear, asymmetric_layers, conv_maps
from bench.learning.learner import FeedbackLearner, parameter_groups
from bench.learning.ops import LinearMaps


class Fixed(nn.Module):
    """Answers with the logits that are its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_accuracy_top5_and_loss_against_the_slow_way() -> None:
    logits = torch.randn(37, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(8, (37,), generator=torch.Generator().manual_seed(1))
    batches = [(logits[:20], labels[:20]), (logits[20:], labels[20:])]
    found = accuracy(Fixed(), batches, lambda x: x)
    order = logits.argsort(1, descending=True)
    first = sum(int(o[0] == y) for o, y in zip(order, labels, strict=True))
    five = sum(int(y in o[:5]) for o, y in zip(order, labels, strict=True))
    loss = sum(-math.log(row.softmax(0)[y]) for row, y in zip(logits.double(), labels, strict=True))
    assert found["acc"] == pytest.approx(first / 37)
    assert found["top5"] == pytest.approx(five / 37)
    assert found["loss"] == pytest.approx(loss / 37, rel=1e-5)


def test_normalisation_is_applied_and_the_mode_restored() -> None:
    model = nn.Sequential(Fixed(), nn.Dropout(0.9)).train()
    found = accuracy(model, [(torch.tensor([[1.0, 2.0]]), torch.tensor([0]))], lambda x: -x)
    assert found["acc"] == 1.0  # and no dropout
    assert model.training


def test_answers_that_are_not_numbers_are_wrong() -> None:
    found = accuracy(Fixed(), [(torch.tensor([[float("nan"), 0.0]]), torch.tensor([1]))], lambda x: x)
    assert found["acc"] == 0.0
    assert math.isnan(found["loss"])


def test_of_equal_answers_the_first_counts() -> None:
    logits = torch.zeros(8, 8)
    found = accuracy(Fixed(), [(logits, torch.arange(8))], lambda x: x)
    assert found["acc"] == 1 / 8
    assert found["top5"] == 5 / 8


def test_no_examples_is_an_error() -> None:
    with pytest.raises(ValueError, match="no examples"):
        accuracy(Fixed(), [], lambda x: x)


@pytest.mark.parametrize("degrees", [0.0, 1e-6, 30.0, 90.0, 150.0, 180.0])
def test_angles_are_known(degrees: float) -> None:
    radians = math.radians(degrees)
    left = torch.tensor([2.0, 0.0], dtype=torch.float64)
    right = 3 * torch.tensor([math.cos(radians), math.sin(radians)], dtype=torch.float64)
    assert angle(left, right) == pytest.approx(degrees, abs=1e-9)


def network() -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))
    return model.double()


def test_weight_alignment_per_layer_and_its_mean_without_the_first() -> None:
    model = network()
    convert(model, "feedback")
    layers = asymmetric_layers(model)
    layers["0"].feedback.data = -layers["0"].weight.data
    layers["3"].feedback.data = 2 * layers["3"].weight.data
    found = weight_alignment(model)
    assert set(found) == {"angle", *(f"{what}/{name}" for what in ("angle", "norm_ratio") for name in "035")}
    assert found["angle/0"] == pytest.approx(180, abs=1e-6)
    assert found["angle/3"] == pytest.approx(0, abs=1e-6)
    assert found["norm_ratio/3"] == pytest.approx(2)
    assert found["norm_ratio/5"] == pytest.approx(1)
    cosine = nn.functional.cosine_similarity(
        layers["5"].weight.detach().flatten(), layers["5"].feedback.flatten(), dim=0
    )
    assert found["angle/5"] == pytest.approx(math.degrees(math.acos(cosine)), rel=1e-6)
    assert found["angle"] == pytest.approx((found["angle/3"] + found["angle/5"]) / 2)


def test_error_alignment_against_backprop_through_a_copy() -> None:
    """The slow way: the same network twice, one with B and one plain, gradients at each layer's input."""
    model, plain = network(), network()
    convert(model, "feedback", seed=1)
    x = torch.randn(5, 1, 6, 6, dtype=torch.float64)
    labels = torch.randint(3, (5,))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    found = error_alignment(model, x, labels)
    assert set(found) == {"dx_angle", "dx_angle/3", "dx_angle/5"}
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    for name in ("3", "5"):
        gradients = []
        for net in (model.eval(), plain.eval()):
            here = x
            for child, module in net.named_children():
                if child == name:
                    here = watched = here.detach().requires_grad_()
                here = module(here)
            nn.functional.cross_entropy(here, labels).backward()
            gradients.append(watched.grad)
        assert found[f"dx_angle/{name}"] == pytest.approx(angle(*gradients), rel=1e-9)


def test_error_alignment_is_zero_where_B_is_W() -> None:
    model = network()
    convert(model, "feedback")
    for layer in asymmetric_layers(model).values():
        layer.feedback.data.copy_(layer.weight.data)
    found = error_alignment(model, torch.randn(4, 1, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))
    assert found["dx_angle"] == pytest.approx(0, abs=1e-6)


def test_only_what_the_layer_sends_counts_not_the_skip_connection() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.last = (nn.Linear(4, 4).double() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last(h + self.inner(h))

    torch.manual_seed(0)
    model = Residual()
    convert(model, "feedback")
    for layer in asymmetric_layers(model).values():
        layer.feedback.data.copy_(layer.weight.data)
    model.inner.feedback.data.neg_()
    found = error_alignment(model, torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1]))
    assert found["dx_angle/inner"] == pytest.approx(180, abs=1e-6)
    assert found["dx_angle/last"] == pytest.approx(0, abs=1e-6)


# --- the weights that an image reaches ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # torch's copy, not ours
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 2), (7, 5)])
@pytest.mark.parametrize(
    ("kernel", "layout"),
    [
        (1, {}),
        (3, {"padding": 1}),
        (3, {"padding": 1, "stride": 2}),
        (3, {"padding": 2, "dilation": 2}),
        (5, {"padding": 2, "groups": 2}),
        ((4, 2), {"padding": "same"}),
        ((1, 3), {"padding": (0, 1), "stride": (2, 1)}),
    ],
)
def test_a_weight_is_used_where_some_input_gives_it_a_gradient(
    size: tuple[int, int], kernel: int | tuple[int, int], layout: dict[str, Any]
) -> None:
    layer = nn.Conv2d(4, 6, kernel, **layout)
    x = torch.rand(2, 4, *size) + 0.5
    layer(x).sum().backward()
    used = conv_maps(layer).usable(x.shape, layer.weight)
    assert torch.equal(used.expand_as(layer.weight), layer.weight.grad != 0)


def test_a_linear_layer_uses_all_weights() -> None:
    assert LinearMaps().usable(torch.Size((3, 5)), torch.zeros(2, 5)).all()


def test_angles_are_over_the_weights_that_the_sample_reaches() -> None:
    """On a 1×1 image a 3×3 kernel is its middle; without a sample all of it counts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4, 3)).double()
    convert(model, "feedback")
    layer = asymmetric_layers(model)["1"]
    layer.feedback.data[..., 1, 1] = 2 * layer.weight.data[..., 1, 1]
    last = asymmetric_layers(model)["3"]
    last.feedback.data.copy_(last.weight.data)
    labels = torch.tensor([0, 1, 2, 0, 1])
    found = alignment(model, torch.randn(5, 2, 1, 1, dtype=torch.float64), labels)
    assert found["angle/1"] == pytest.approx(0, abs=1e-6)
    assert found["norm_ratio/1"] == pytest.approx(2)
    assert found["dx_angle/1"] == pytest.approx(0, abs=1e-6)
    assert found["angle"] == pytest.approx(0, abs=1e-6)
    assert weight_alignment(model)["angle/1"] > 30
    assert all(not m._forward_pre_hooks for m in model.modules())


# --- the floor of amp against decay ---------------------------------------------------------------------------------

UNITS = 64


def mirrored(layer: nn.Linear, *, centered: bool = False, **coefficients: float) -> nn.Sequential:
    """ReLU units, on which this layer is an asymmetric one that sends errors."""
    first = nn.Linear(layer.in_features, layer.in_features, bias=False)
    first.weight.data.copy_(torch.eye(layer.in_features))
    model = nn.Sequential(first, nn.ReLU(), layer)
    convert(model, "mirror", coefficients or {"decay": 1.0, "amp": 1.0}, activity=Activity(centered=centered))
    return model


def correlated(count: int, correlation: float) -> Tensor:
    """Gaussian units of variance 1, each two with this correlation."""
    return torch.randn(count, 1) * correlation**0.5 + torch.randn(count, UNITS) * (1 - correlation) ** 0.5


def settled(correlation: float, *, centered: bool) -> float:
    """The angle for isotropic W, from the second moments of ReLU units in closed form (Cho & Saul 2009)."""

    def moment(rho: float) -> float:
        both = (math.sqrt(1 - rho**2) + rho * (math.pi / 2 + math.asin(rho))) / (2 * math.pi)
        return both - (1 / (2 * math.pi) if centered else 0)

    squares = UNITS * moment(1) ** 2 + UNITS * (UNITS - 1) * moment(correlation) ** 2
    participation = (UNITS * moment(1)) ** 2 / squares
    return math.degrees(math.acos(min(1.0, math.sqrt(participation / UNITS))))


def test_the_floor_of_64_independent_units_is_the_published_one() -> None:
    assert settled(0.0, centered=False) == pytest.approx(68.4, abs=0.05)
    assert settled(0.0, centered=True) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("correlation", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("centered", [False, True])
def test_the_floor_of_relu_units_is_that_of_their_participation_ratio(correlation: float, centered: bool) -> None:
    torch.manual_seed(0)
    model = mirrored(nn.Linear(UNITS, 2000), centered=centered)
    found = floor_alignment(model, correlated(16384, correlation).chunk(8))
    expected = settled(correlation, centered=centered)
    assert found["floor_angle"] == pytest.approx(expected, abs=0.7 if expected else 2.0)


def test_few_examples_do_not_raise_the_floor() -> None:
    torch.manual_seed(1)
    model = mirrored(nn.Linear(UNITS, 2000))
    layer, expected = asymmetric_layers(model)["2"], settled(0.0, centered=False)
    halves, naive = [], []
    for _ in range(40):
        x = correlated(64, 0.0)
        halves.append(floor_alignment(model, x.chunk(2))["floor_angle"])
        naive.append(angle(layer.weight, second_moments(layer, x.relu())))
    assert sum(halves) / 40 == pytest.approx(expected, abs=0.3)
    assert sum(naive) / 40 > expected + 1


def second_moments(layer: AsymmetricLinear, x: Tensor) -> Tensor:
    return layer.weight @ (x.T @ x)


def test_the_floor_of_a_convolution_against_autograd() -> None:
    """W·C is the gradient of ½‖W·x‖²; with one batch twice the estimate is the plain angle, over the weights used."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 6, 5, padding=2, stride=2, groups=2), nn.Flatten()
    ).double()
    batch = torch.randn(7, 1, 4, 4, dtype=torch.float64)
    seen = model[1](model[0](batch)).detach()  # 2×2: a border of the kernel reaches nothing
    W = model[2].weight.detach().clone().requires_grad_()
    (0.5 * nn.functional.conv2d(seen, W, None, 2, 2, 1, 2).square().sum()).backward()
    convert(model, "mirror", {"decay": 1.0, "amp": 1.0})
    found = floor_alignment(model, [batch, batch])
    used = W.grad.abs().sum((0, 1)) > 0
    assert 0 < used.sum() < used.numel()
    assert set(found) == {"floor_angle", "floor_angle/2"}
    assert found["floor_angle/2"] == pytest.approx(angle(W.grad[..., used], W[..., used]), rel=1e-9)


@pytest.mark.parametrize("centered", [False, True])
def test_a_mirror_settles_at_its_floor(centered: bool) -> None:
    torch.manual_seed(0)
    model = mirrored(nn.Linear(UNITS, 100), centered=centered, decay=1.0, amp=3.0)
    groups = {group["name"]: group for group in parameter_groups(model, lr=0.0, weight_decay=0.0)}
    groups["feedback"]["lr"] = 0.02
    optimizer = torch.optim.SGD(list(groups.values()))
    FeedbackLearner(model, optimizer)
    for _ in range(400):
        optimizer.zero_grad()
        model(correlated(512, 0.1)).sum().backward()
        optimizer.step()
    floor = floor_alignment(model, correlated(4096, 0.1).chunk(8))["floor_angle/2"]
    assert floor == pytest.approx(settled(0.1, centered=centered), abs=4)  # W of 100 rows is not quite isotropic
    assert weight_alignment(model)["angle/2"] == pytest.approx(floor, abs=1)


@pytest.mark.parametrize(
    ("rule", "coefficients", "floor"),
    [
        ("mirror", {"decay": 0.5, "amp": 0.1}, True),
        ("amp", {"amp": 0.1}, True),
        ("information", {"decay": 0.5, "amp": 0.1, "null": 0.0}, True),
        ("information", {"decay": 0.5, "amp": 0.1, "null": 0.1}, False),
        ("mirror", {"decay": 0.5, "amp": 0.0}, False),
        ("activation", {"amp": 0.1, "sparse": 0.1}, False),
        ("symmetric", {"decay": 0.5, "self": 0.5}, False),
        ("kolen-pollack", {"decay": 0.5}, False),
        ("feedback", {}, False),
        ("sign", {}, False),
    ],
)
def test_which_rules_have_a_floor(rule: str, coefficients: dict[str, float], floor: bool) -> None:
    model = network()
    convert(model, rule, coefficients)
    found = floor_alignment(model, torch.randn(8, 1, 6, 6, dtype=torch.float64).chunk(2))
    assert set(found) == ({"floor_angle", "floor_angle/3", "floor_angle/5"} if floor else set())


def test_the_floor_is_that_of_what_training_sees() -> None:
    """Batch normalisation by the batch, not by the running statistics, takes the mean off these units."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(UNITS, UNITS, bias=False), nn.BatchNorm1d(UNITS), nn.Linear(UNITS, 500))
    model[0].weight.data.copy_(torch.eye(UNITS))
    convert(model, "mirror", {"decay": 1.0, "amp": 1.0})
    x = correlated(4096, 0.0) + 3.0
    assert floor_alignment(model, x.chunk(4))["floor_angle"] == pytest.approx(0, abs=3)
    assert angle(model[2].weight, second_moments(model[2], x)) > 70


def test_one_batch_tells_no_floor_and_nothing_is_left_in_the_network() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Dropout(0.5), network().float())
    convert(model, "mirror", {"decay": 1.0, "amp": 1.0})
    model.train()
    model[2].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert floor_alignment(model, [torch.randn(8, 1, 6, 6)]) == {}
    assert floor_alignment(model, torch.randn(8, 1, 6, 6).chunk(2))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert not model[2].training
    assert all(not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
