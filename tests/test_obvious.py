"""Whole steps of every rule, against autograd on the energies: the same weights, B and norms, in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bench.config import TrialConfig
from bench.learning.rules import RULES, parse_rule
from bench.training import prepare
from obvious import Obvious

EVERYTHING = {"decay": 0.3, "amp": 0.002, "null": 0.001, "sparse": 0.004, "self": 0.5}
STEPS, BATCH = 3, 4


def config_of(rule: str, arch: str) -> TrialConfig:
    primitives = () if rule == "kolen-pollack" else parse_rule(rule).primitives
    return TrialConfig(
        rule=rule,
        arch=arch,
        coefficients={name: EVERYTHING[name] for name in primitives},
        batch_size=BATCH,
        train_examples=BATCH,
        lr=0.01,
    )


@pytest.mark.parametrize("arch", ["lenet", "resnet20"])
@pytest.mark.parametrize("rule", [*RULES, "decay+amp+null+sparse+self"])
def test_a_rule_moves_everything_as_the_obvious_way_does(rule: str, arch: str) -> None:
    trial, obvious = prepare(config_of(rule, arch)), Obvious(config_of(rule, arch), None, "cpu")
    for model in (trial.model, obvious.trial.model):
        model.double().train()
    generator = torch.Generator().manual_seed(1)
    start = {name: value.clone() for name, value in trial.model.state_dict().items()}
    for _ in range(STEPS):
        size = trial.data.image_size
        x = torch.randn(BATCH, trial.data.channels, size, size, dtype=torch.float64, generator=generator)
        labels = torch.randint(10, (BATCH,), generator=generator)
        trial.optimizer.zero_grad()
        F.cross_entropy(trial.model(x), labels).backward()
        trial.optimizer.step()
        obvious.step(x, labels)
    expected = obvious.trial.model.state_dict()
    for name, value in trial.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    moved = {name for name, value in expected.items() if not torch.allclose(value, start[name], rtol=1e-6, atol=1e-9)}
    last = [name for name in expected if name.endswith("feedback")][-1:]
    assert bool(moved & set(last)) == parse_rule(rule).learns
