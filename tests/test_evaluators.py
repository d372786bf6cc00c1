"""Accuracy and alignment against known answers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from bench.evaluators.accuracy import accuracy
from bench.evaluators.alignment import angle, error_alignment, weight_alignment
from bench.learning.convert import convert
from bench.learning.layers import asymmetric_layers


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
