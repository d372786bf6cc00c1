"""Gaussian noise in training: how large it is, whom it reaches, and that it is a function of its seed alone."""

from __future__ import annotations

import copy
import math
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from bench.config import Site, TrialConfig, UserError, check_levels
from bench.learning.convert import convert
from bench.learning.layers import asymmetric_layers
from bench.learning.learner import FeedbackLearner, parameter_groups
from bench.noise import ADDED_UP, CORRUPTION_SEVERITIES, SITES, On, UpdateNoise, seed_of
from bench.training import lr_factor, update_levels

COEFFICIENTS: dict[str, dict[str, float]] = {
    "backprop": {},
    "frozen": {},
    "feedback": {},
    "symmetric": {"decay": 0.1, "self": 0.1},
    "kolen-pollack": {"decay": 0.0},
    "activation": {"amp": 0.1, "sparse": 0.1},
}


# --- the table -------------------------------------------------------------------------------------------


def test_the_table_has_the_sites_of_the_configuration_and_grids_that_it_takes() -> None:
    assert tuple(SITES) == get_args(Site)
    for name, site in SITES.items():
        assert site.name == name
        assert (site.disturb is None) == (site.when == "training") == (name == "update")
        levels = site.levels or update_levels(TrialConfig(rule="backprop"), 40)
        check_levels(name, levels)
        assert 6 <= len(levels) <= 8
        TrialConfig(rule="backprop", noise_site=site.name, noise_levels=levels)
    assert get_type_hints(TrialConfig)["update_noise_on"] == On


def test_the_corruption_benchmarks_severities_are_on_the_map() -> None:
    assert CORRUPTION_SEVERITIES["ImageNet-C"] == (0.08, 0.12, 0.18, 0.26, 0.38)
    assert CORRUPTION_SEVERITIES["CIFAR-10-C"] == (0.04, 0.06, 0.08, 0.09, 0.10)
    assert set(CORRUPTION_SEVERITIES["ImageNet-C"]) <= set(SITES["input"].levels)


# --- how large it is -------------------------------------------------------------------------------------


def still(sizes: dict[str, list[tuple[int, ...]]], lrs: dict[str, float], dtype: Any = torch.float32) -> Any:
    """An optimizer whose steps move nothing (all gradients are zero): what moves is the noise."""
    groups = [
        {"name": n, "lr": lrs.get(n, 1.0), "params": [nn.Parameter(torch.zeros(s, dtype=dtype)) for s in shapes]}
        for n, shapes in sizes.items()
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    for p in parameters(optimizer):
        p.grad = torch.zeros_like(p)
    return optimizer


def parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def is_normal(sample: Tensor, sigma: float) -> bool:
    """Mean, variance and fourth moment of N(0, sigma²), each within 5 of its standard errors."""
    x, n = sample.double().flatten() / sigma, sample.numel()
    errors = (x.mean() * math.sqrt(n), (x.square().mean() - 1) * math.sqrt(n / 2), (x**4).mean() - 3)
    return abs(errors[0]) < 5 and abs(errors[1]) < 5 and abs(errors[2]) < 5 * math.sqrt(96 / n)


def test_the_noise_of_a_step_is_the_groups_learning_rate_times_sigma() -> None:
    optimizer = still(
        {"weights": [(200, 100), (40, 50, 3, 3)], "plain": [(9000,)], "feedback": [(200, 100)]},
        {"weights": 0.5, "plain": 0.5, "feedback": 0.02},
    )
    noise = UpdateNoise(optimizer, 0.3)
    noise.seed(0)
    optimizer.step()
    noise.add()
    W, K, gain, B = (p.detach().clone() for p in parameters(optimizer))
    for sample, lr in ((W, 0.5), (K, 0.5), (gain, 0.5), (B, 0.02)):
        assert is_normal(sample, 0.3 * lr)
        assert not is_normal(sample, 0.3 * lr * 1.1)  # the test can tell
    optimizer.param_groups[0]["lr"] = 0.01  # as a schedule does
    noise.add()
    second = parameters(optimizer)[0].detach() - W
    assert is_normal(second, 0.3 * 0.01)
    for other in (B, second):  # no two draws are one
        assert abs(torch.corrcoef(torch.stack([W.flatten(), other.flatten()]))[0, 1]) < 5 / math.sqrt(W.numel())


def test_against_the_slow_way_one_group_after_the_other() -> None:
    shapes = {"weights": [(8, 3), (2, 3, 3, 3)], "plain": [(5,)], "feedback": [(8, 3)]}
    optimizer = still(shapes, {"weights": 0.1, "plain": 0.1, "feedback": 0.4}, torch.float64)
    noise = UpdateNoise(optimizer, 2.0)
    noise.seed(11)
    for _ in range(3):
        noise.add()
    for group in optimizer.param_groups:
        generator = torch.Generator().manual_seed(seed_of(11, "update", group["name"]))
        total = sum(p.numel() for p in group["params"])
        draws = [torch.randn(total, generator=generator, dtype=torch.float64) for _ in range(3)]
        slow = sum(2.0 * group["lr"] * draw for draw in draws)
        torch.testing.assert_close(torch.cat([p.detach().flatten() for p in group["params"]]), slow)


def test_the_noise_does_not_depend_on_the_layout_in_memory() -> None:
    shapes = {"weights": [(6, 4, 3, 3), (10, 6)]}
    plain, last = still(shapes, {}), still(shapes, {})
    p = last.param_groups[0]["params"][0]
    p.data = p.data.to(memory_format=torch.channels_last)
    p.grad = torch.zeros_like(p)
    for optimizer in (plain, last):
        noise = UpdateNoise(optimizer, 1.0)
        noise.seed(5)
        noise.add()
    assert not p.is_contiguous()
    assert p.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(parameters(plain), parameters(last), strict=True))


def test_no_noise_touches_and_draws_nothing() -> None:
    optimizer = still({"weights": [(30, 30)]}, {})
    (p,) = parameters(optimizer)
    p.data.fill_(-0.0)
    version, state = p._version, torch.get_rng_state()
    noise = UpdateNoise(optimizer, 0.0)
    noise.add()
    noise.seed(1)
    noise.add()
    assert p._version == version
    assert bool(p.signbit().all())
    assert torch.equal(torch.get_rng_state(), state)
    loud = UpdateNoise(optimizer, 1.0)
    loud.seed(1)
    loud.add()
    assert p._version > version
    assert torch.equal(torch.get_rng_state(), state)  # a stream of its own


# --- the seed --------------------------------------------------------------------------------------------


def test_from_the_seed_of_an_epoch_on_it_is_the_same_noise() -> None:
    def epoch(optimizer: Any, noise: UpdateNoise, seed: int) -> list[Tensor]:
        before = [p.detach().clone() for p in parameters(optimizer)]
        noise.seed(seed)
        noise.add()
        noise.add()
        return [p.detach() - b for p, b in zip(parameters(optimizer), before, strict=True)]

    shapes = {"weights": [(20, 20)], "plain": [(20,)]}
    whole, resumed = still(shapes, {}, torch.float64), still(shapes, {}, torch.float64)
    noise = UpdateNoise(whole, 1.0)
    first, second = epoch(whole, noise, 1), epoch(whole, noise, 2)
    torch.manual_seed(99)  # whatever else is drawn
    again = epoch(resumed, UpdateNoise(resumed, 1.0), 2)
    for a, b, c in zip(first, second, again, strict=True):
        torch.testing.assert_close(b, c)
        assert not torch.allclose(a, b)


def test_without_a_seed_there_is_no_noise_that_all_runs_would_share() -> None:
    with pytest.raises(RuntimeError, match="seed"):
        UpdateNoise(still({"weights": [(2, 2)]}, {}), 1.0).add()


def test_w_draws_the_same_whether_b_draws_or_not() -> None:
    shapes = {"weights": [(20, 20)], "plain": [(20,)]}
    alone, both = still(shapes, {}), still({**shapes, "feedback": [(20, 20)]}, {})
    for optimizer in (alone, both):
        noise = UpdateNoise(optimizer, 1.0)
        noise.seed(3)
        noise.add()
        noise.add()
    assert all(torch.equal(a, b) for a, b in zip(parameters(alone), parameters(both)[:2], strict=True))


def test_the_learning_rate_is_the_optimizers_after_it_was_loaded_too() -> None:
    optimizer = still({"weights": [(100, 100)]}, {})
    noise = UpdateNoise(optimizer, 1.0)
    noise.seed(0)
    optimizer.load_state_dict(optimizer.state_dict())  # new dictionaries
    optimizer.param_groups[0]["lr"] = 1e-3
    noise.add()
    assert is_normal(parameters(optimizer)[0].detach(), 1e-3)


# --- whom it reaches -------------------------------------------------------------------------------------


class Run:
    """A small network with norms and biases, its optimizer and learner; ``step`` trains it once."""

    def __init__(self, rule: str, sigma: float | None = None, on: On = "both") -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3)
            ).double()
            self.x = torch.randn(7, 1, 6, 6, dtype=torch.float64)
        convert(self.model, rule, COEFFICIENTS[rule])
        groups = parameter_groups(self.model, lr=0.1, weight_decay=0.0)
        self.optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, fused=True)
        self.learner = FeedbackLearner(self.model, self.optimizer)
        self.noise = None if sigma is None else UpdateNoise(self.optimizer, sigma, on)
        if self.noise is not None:
            self.noise.seed(4)

    def step(self, *, weights: bool = True, feedback: bool = True) -> None:
        """As in a trial: who does not learn has no gradient, or has its learner off."""
        self.learner.on = feedback
        self.optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(self.model(self.x), torch.tensor([0, 1, 2, 0, 1, 2, 0])).backward()
        for group in self.optimizer.param_groups:
            for p in group["params"] if group["name"] != "feedback" and not weights else ():
                p.grad = None
        self.optimizer.step()
        if self.noise is not None:
            self.noise.add()

    def values(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


FORWARD = {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias", "5.weight", "5.bias"}
B = {"3.feedback", "5.feedback"}  # the first layer sends nothing down: its B never moves


def reached(rule: str, on: On, **step: bool) -> set[str]:
    """What a noisy step leaves elsewhere than a quiet one, from the same place (with momentum behind both)."""
    quiet, noisy = Run(rule), Run(rule, 0.5, on)
    quiet.step()
    noisy.optimizer.load_state_dict(copy.deepcopy(quiet.optimizer.state_dict()))
    noisy.model.load_state_dict(quiet.model.state_dict())
    for run in (quiet, noisy):
        run.step(**step)
    values = quiet.values()
    return {name for name, v in noisy.values().items() if not torch.equal(v, values[name])}


@pytest.mark.parametrize("rule", ["activation", "symmetric", "kolen-pollack"])
@pytest.mark.parametrize(("on", "expected"), [("both", FORWARD | B), ("forward", FORWARD), ("feedback", B)])
def test_it_reaches_the_parameters_it_is_on(rule: str, on: On, expected: set[str]) -> None:
    assert reached(rule, on) == expected


@pytest.mark.parametrize("rule", ["activation", "symmetric"])
@pytest.mark.parametrize("on", get_args(On))
def test_what_stands_still_in_a_step_has_no_noise(rule: str, on: On) -> None:
    assert reached(rule, on, weights=False) == (set() if on == "forward" else B)
    assert reached(rule, on, feedback=False) == (set() if on == "feedback" else FORWARD)


def test_what_never_learns_has_no_noise() -> None:
    assert reached("feedback", "both") == FORWARD
    assert reached("backprop", "both") == FORWARD
    assert reached("frozen", "both") == {"5.weight", "5.bias"}


def test_training_with_a_noise_of_zero_is_training_without() -> None:
    quiet, zero = Run("activation"), Run("activation", 0.0)
    for _ in range(3):
        quiet.step()
        zero.step()
    values = zero.values()
    assert all(torch.equal(v, values[name]) for name, v in quiet.values().items())


def test_the_noise_stays_out_of_the_momentum() -> None:
    def momentum(run: Run) -> dict[str, Tensor]:
        run.step()
        state = run.optimizer.state
        return {name: state[p]["momentum_buffer"] for name, p in run.model.named_parameters() if p in state}

    quiet, noisy = momentum(Run("activation")), momentum(Run("activation", 0.5))
    assert set(quiet) == FORWARD | B
    assert all(torch.equal(v, noisy[name]) for name, v in quiet.items())


def test_what_makes_no_sense_is_refused() -> None:
    run = Run("feedback")
    assert asymmetric_layers(run.model)
    with pytest.raises(UserError, match="no B learns"):
        UpdateNoise(run.optimizer, 0.1, "feedback")
    with pytest.raises(UserError, match="update_noise = -1"):
        UpdateNoise(run.optimizer, -1)
    with pytest.raises(UserError, match="update_noise = nan"):
        UpdateNoise(run.optimizer, math.nan)
    with pytest.raises(UserError, match="both, feedback, forward"):
        UpdateNoise(run.optimizer, 0.1, "backward")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="parameter_groups"):
        UpdateNoise(torch.optim.SGD(run.model.parameters(), lr=0.1), 0.1)


def test_the_default_levels_of_update_noise_are_those_that_add_up_to_the_grid() -> None:
    """A weight that nothing moves but the noise and its decay, trained 2,000 times side by side."""
    config = TrialConfig(rule="backprop", epochs=12, lr=0.1, weight_decay=0.01, momentum=0.9)
    steps = 25  # decay undoes most of what the first half adds
    weight = nn.Parameter(torch.zeros(2000))
    group = {"params": [weight], "name": "weights", "lr": 0.0, "weight_decay": config.weight_decay}
    optimizer = torch.optim.SGD([group], lr=0.0, momentum=config.momentum, nesterov=config.nesterov)
    levels = update_levels(config, steps)
    noise = UpdateNoise(optimizer, sigma=levels[3])
    noise.seed(1)
    for step in range(config.epochs * steps):
        optimizer.param_groups[0]["lr"] = config.lr * lr_factor(config, (step + 0.5) / steps)
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        noise.add()
    assert weight.std().item() == pytest.approx(ADDED_UP[3], rel=0.06)
    assert [level / levels[3] for level in levels] == pytest.approx([a / ADDED_UP[3] for a in ADDED_UP], rel=0.1)


def test_a_longer_training_and_a_higher_rate_need_less_noise() -> None:
    config = TrialConfig(rule="backprop", epochs=4, weight_decay=0.0, schedule="constant", warmup_epochs=0)
    alone = update_levels(config, 25)
    # without decay and schedule: σ = size / (η·√steps)
    assert alone == pytest.approx([size / (config.lr * 10) for size in ADDED_UP], rel=0.06)
    assert update_levels(config.replace(epochs=16), 25) == pytest.approx([n / 2 for n in alone], rel=0.06)
    assert update_levels(config.replace(lr=0.2), 25) == pytest.approx([n / 2 for n in alone], rel=0.06)
