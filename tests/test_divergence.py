"""What is not finite, put in for real: into the loss, W, B and the updates. Each is an outcome with its reason."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from bench.config import TrialConfig, TrialResult
from bench.learning.rules import RULES
from bench.trial import run_trial

CHANCE = 0.1
#: Of an epoch of the trials here, and of a whole trial.
STEPS, ALL_STEPS = 2, 4

LEARNING = sorted(name for name, rule in RULES.items() if rule.learns)


def small(rule: str, **changes: Any) -> TrialConfig:
    coefficients = {} if rule == "kolen-pollack" else dict.fromkeys(RULES[rule].primitives, 1e-4)
    base = {
        "rule": rule,
        "coefficients": coefficients,
        "arch": "lenet",
        "dataset": "digits",
        "epochs": ALL_STEPS // STEPS,
        "batch_size": 32,
        "train_examples": 64,
        "lr": 0.01,
        "augment": False,
        "precision": "float32",
    }
    return TrialConfig.from_dict({**base, **changes})


@contextmanager
def poisoned(group: str, step: int, value: float) -> Iterator[None]:
    """After this step (from 1) of any optimizer one entry of the group's last tensor has this value."""
    steps = 0

    def poison(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == step:
            (chosen,) = (g["params"] for g in optimizer.param_groups if g["name"] == group)
            with torch.no_grad():
                chosen[-1].view(-1)[0] = value

    handle = register_optimizer_step_post_hook(poison)
    try:
        yield
    finally:
        handle.remove()


def assert_diverged(result: TrialResult, reason: str, *, epoch: int) -> None:
    """At chance, in this epoch, for this reason; and nothing in the result that no row could hold."""
    assert result.status == "diverged"
    assert result.reason is not None
    assert result.reason.startswith(f"epoch {epoch}: ")
    assert reason in result.reason
    assert result.metrics["val_acc"] == CHANCE
    assert result.metrics["epochs_done"] == len(result.history) == epoch - 1
    assert all(math.isfinite(value) for epoch in (result.metrics, *result.history) for value in epoch.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("step", range(1, ALL_STEPS + 1))
def test_a_weight_that_is_not_finite_ends_the_trial_in_the_same_epoch(step: int, bad: float) -> None:
    with poisoned("weights", step, bad):
        result = run_trial(small("mirror"))
    last_of_epoch = step % STEPS == 0  # no loss has seen it: the weights themselves are looked at
    assert_diverged(result, "weight " if last_of_epoch else "the training loss is nan", epoch=math.ceil(step / STEPS))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("rule", LEARNING)
def test_a_feedback_weight_that_is_not_finite_after_the_very_last_step_is_seen(rule: str, bad: float) -> None:
    with poisoned("feedback", ALL_STEPS, bad):
        result = run_trial(small(rule))
    assert_diverged(result, ".feedback is not finite", epoch=ALL_STEPS // STEPS)


@pytest.mark.parametrize("rule", LEARNING)
def test_one_in_the_middle_of_an_epoch_is_seen_at_its_end_at_the_latest(rule: str) -> None:
    with poisoned("feedback", 1, math.nan):
        result = run_trial(small(rule))
    assert_diverged(result, "", epoch=1)
    assert "not finite" in result.reason or "loss is nan" in result.reason


@pytest.mark.parametrize("name", ["decay", "amp", "null", "sparse", "self"])
def test_coefficients_so_large_that_feedback_overflows(name: str) -> None:
    result = run_trial(small(name, coefficients={name: 1e38}, clip_norm=None))
    assert_diverged(result, "", epoch=1)


def test_a_feedback_weight_too_large_to_compute_with_is_named_as_that() -> None:
    with poisoned("feedback", ALL_STEPS, 1e30):
        result = run_trial(small("mirror"))
    assert_diverged(result, ".feedback is too large to compute with", epoch=2)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("rule", ["backprop", "mirror", "kolen-pollack"])
def test_a_learning_rate_beyond_all_bounds(rule: str, precision: str) -> None:
    result = run_trial(small(rule, precision=precision, lr=1e30))
    assert_diverged(result, "", epoch=1)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("on", ["forward", "feedback", "both"])
def test_noise_in_the_updates_that_overflows(on: str, precision: str) -> None:
    result = run_trial(small("mirror", update_noise=1e38, update_noise_on=on, lr=1.0, precision=precision))
    assert_diverged(result, "", epoch=1)


@contextmanager
def norms_poisoned() -> Iterator[None]:
    """Every running variance is NaN, as an infinite activation leaves it: what evaluation alone reads."""

    def spoil(module: torch.nn.Module, *_: Any) -> None:
        if isinstance(module, torch.nn.BatchNorm2d) and module.training and module.running_var is not None:
            module.running_var.data.fill_(math.nan)  # past autograd, which has saved it

    handle = torch.nn.modules.module.register_module_forward_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


def test_a_loss_that_is_finite_in_training_and_not_in_validation() -> None:
    with norms_poisoned():
        result = run_trial(small("mirror", arch="resnet20"))
    assert_diverged(result, "the val loss is nan", epoch=1)
