"""The floor, against torch's own count of the operations that a step really calls."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.arithmetic import floor, layers_of, products
from bench.config import TrialConfig
from bench.learning.rules import RULES, parse_rule
from bench.training import Trial, prepare, train_step

EVERYTHING = {"decay": 0.1, "amp": 0.1, "null": 0.1, "sparse": 0.1, "self": 0.1}
BATCH = 8


def trial_of(rule: str, arch: str, fraction: float = 1.0) -> Trial:
    primitives = () if rule == "kolen-pollack" else parse_rule(rule).primitives
    config = TrialConfig(
        rule=rule,
        arch=arch,
        coefficients={name: EVERYTHING[name] for name in primitives},
        batch_size=BATCH,
        train_examples=BATCH,
        lr=1e-6,
        feedback_fraction=fraction,
    )
    return prepare(config)


def batch(trial: Trial) -> tuple[torch.Tensor, torch.Tensor]:
    size = trial.data.image_size
    return torch.randn(BATCH, trial.data.channels, size, size), torch.arange(BATCH) % 10


def counted(trial: Trial) -> int:
    """Two operations for each multiplication and the sum that it goes into."""
    with FlopCounterMode(display=False) as counter:
        train_step(trial, *batch(trial))
    return int(counter.get_total_flops())


@pytest.mark.parametrize("arch", ["lenet", "resnet18"])
@pytest.mark.parametrize("rule", [*RULES, "null+sparse", "amp+null+sparse"])
def test_a_step_calls_exactly_what_the_floor_counts(rule: str, arch: str) -> None:
    trial, plain = trial_of(rule, arch), trial_of("backprop", arch)
    x, _ = batch(trial)
    own, backprop = layers_of(trial.model, x), layers_of(plain.model, x)
    assert counted(trial) == 2 * products(own, parse_rule(rule))
    assert counted(trial) / counted(plain) == pytest.approx(floor(own, backprop, parse_rule(rule)), rel=1e-12)


@pytest.mark.parametrize("rule", ["mirror", "information", "activation"])
@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_a_share_of_the_batch_costs_its_share(rule: str, fraction: float) -> None:
    trial = trial_of(rule, "resnet20", fraction)
    layers = layers_of(trial.model, batch(trial)[0])
    assert counted(trial) == 2 * products(layers, parse_rule(rule), fraction)


def test_known_numbers() -> None:
    """One 3x3 convolution of 4 to 8 channels on 6x6 pixels, and ten linear outputs of 8, by hand."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, last = layers_of(model, torch.randn(2, 4, 6, 6))
    assert (first.products, first.sends, first.maps) == (2 * 8 * 36 * 4 * 9, False, 2)
    assert (last.products, last.sends, last.maps) == (2 * 10 * 8, True, 3)
    assert products([first, last], RULES["backprop"]) == 2 * first.products + 3 * last.products
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_looking_leaves_the_statistics_of_norms_alone() -> None:
    trial = trial_of("backprop", "resnet20")
    before = {name: value.clone() for name, value in trial.model.state_dict().items()}
    layers_of(trial.model, batch(trial)[0])
    assert all(torch.equal(value, before[name]) for name, value in trial.model.state_dict().items())
