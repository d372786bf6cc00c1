"""Gaussian noise in a trained network: known variances, the slow way, paired draws, and a network left as it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.config import UserError
from bench.evaluators.accuracy import accuracy
from bench.evaluators.robustness import noisy_accuracy
from bench.learning.convert import convert
from bench.noise import SITES, evaluation_noise, forward_weights, seed_of

EVALUATION = [name for name, site in SITES.items() if site.when == "evaluation"]
Batch = tuple[Tensor, Tensor]


def network(rule: str = "backprop") -> nn.Sequential:
    """Convolutions, a norm in the middle of its life, biases; in float64, so that sums may be in any order."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(24, 5)
        ).double()
        model(torch.randn(50, 1, 6, 6, dtype=torch.float64))  # running statistics other than 0 and 1
    coefficients = {"mirror": {"amp": 0.1, "decay": 0.1}}.get(rule, {})
    convert(model, rule, coefficients)
    return model


def split() -> list[Batch]:
    """Three batches, the last one smaller, whose labels are what the network without noise answers, mostly."""
    pixels = torch.rand(110, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        labels = network().eval()(normalize(pixels)).argmax(1)
    labels[::10] = 0
    return list(zip(pixels.split(40), labels.split(40), strict=True))


def normalize(pixels: Tensor) -> Tensor:
    return (pixels - 0.5) / 0.25


def draw(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)


def is_normal(sample: Tensor, sigma: float) -> bool:
    """Mean and variance of N(0, sigma²), each within 5 of its standard errors."""
    x, n = sample.double().flatten() / sigma, sample.numel()
    return bool(abs(x.mean()) < 5 / math.sqrt(n)) and bool(abs(x.square().mean() - 1) < 5 * math.sqrt(2 / n))


# --- known variances -------------------------------------------------------------------------------------


def test_weight_noise_is_relative_to_each_tensors_rms_and_leaves_biases_alone() -> None:
    model = nn.Sequential(nn.Linear(200, 300), nn.Linear(300, 100, bias=False)).double()
    model[0].weight.data.mul_(0.01).add_(3.0)  # rms is not the standard deviation
    rms = [layer.weight.detach().square().mean().sqrt().item() for layer in model]
    with evaluation_noise(model, normalize, site="weight", level=0.2, seed=0) as (noisy, same), torch.no_grad():
        assert same is normalize
        at_zero = noisy(torch.zeros(1, 200).double())
        first = (noisy(torch.eye(200).double()) - at_zero).T  # W2·W1 with both noisy
        again = (noisy(torch.eye(200).double()) - at_zero).T
        assert torch.equal(first, again)  # one noisy network for all batches
        weights = dict(noisy.weights)
    assert set(weights) == {"0.weight", "1.weight"}
    noise = [weights[f"{i}.weight"] - model[i].weight.detach() for i in (0, 1)]
    torch.testing.assert_close(first, weights["1.weight"] @ weights["0.weight"])
    torch.testing.assert_close(at_zero[0], weights["1.weight"] @ model[0].bias.detach())
    for sample, scale in zip(noise, rms, strict=True):
        assert is_normal(sample, 0.2 * scale)
        assert not is_normal(sample, 0.22 * scale)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("rule", ["backprop", "mirror"])
def test_activation_noise_is_relative_to_the_spread_of_z_without_the_bias(kind: str, rule: str) -> None:
    layer = nn.Linear(20, 30) if kind == "linear" else nn.Conv2d(2, 30, 3)
    model = nn.Sequential(layer).double()
    model[0].bias.data.copy_(torch.linspace(-50, 50, 30))
    convert(model, rule, {"amp": 0.1, "decay": 0.1} if rule == "mirror" else {})
    x = torch.randn((2000, 20) if kind == "linear" else (40, 2, 10, 10), dtype=torch.float64)
    with torch.inference_mode():
        clean = model(x)
        bias = model[0].bias if kind == "linear" else model[0].bias.view(-1, 1, 1)
        spread = (clean - bias).std().item()
        with evaluation_noise(model, normalize, site="activation", level=0.5, seed=0) as (noisy, _):
            first, second = noisy(x) - clean, noisy(x) - clean
    for sample in (first, second):
        assert is_normal(sample, 0.5 * spread)
        assert not is_normal(sample, 0.55 * spread)
    assert not torch.allclose(first, second)  # drawn for each batch


def test_input_noise_is_in_pixels_before_the_normalisation_and_clipped_on_demand() -> None:
    pixels = torch.rand(20, 3, 30, 30, generator=torch.Generator().manual_seed(0))
    before = pixels.clone()

    def seen(clip: bool) -> Tensor:
        with evaluation_noise(nn.Identity(), normalize, site="input", level=0.38, seed=0, clip=clip) as (model, norm):
            return model(norm(pixels)) * 0.25 + 0.5

    free, clipped = seen(False), seen(True)
    assert torch.equal(pixels, before)
    assert is_normal(free - pixels, 0.38)
    assert not is_normal(free - pixels, 0.40)
    torch.testing.assert_close(clipped, free.clamp(0, 1))
    assert free.min() < 0
    assert free.max() > 1


# --- against the slow way --------------------------------------------------------------------------------


def slow_logits(site: str, level: float, seed: int) -> list[Tensor]:
    """The logits of every batch: a copy of the network, changed or run layer by layer, with the same generator."""
    model, generator = copy.deepcopy(network()).eval(), torch.Generator().manual_seed(seed)
    layers = [m for m in model if isinstance(m, (nn.Conv2d, nn.Linear))]
    if site == "weight":
        for layer in layers:
            W = layer.weight.data
            W += level * math.sqrt(sum(w**2 for w in W.flatten().tolist()) / W.numel()) * draw(W, generator)
    logits = []
    for pixels, _ in split():
        x = normalize(pixels + level * draw(pixels, generator) if site == "input" else pixels)
        for layer in model:
            y = layer(x)
            if site == "activation" and layer in layers:
                bias = layer.bias.view(-1, 1, 1) if y.dim() == 4 else layer.bias
                y = y + level * (y - bias).flatten().std(correction=0) * draw(y, generator)
            x = y
        logits.append(x.detach())
    return logits


@pytest.mark.parametrize("site", EVALUATION)
@pytest.mark.parametrize("rule", ["backprop", "mirror"])
def test_against_the_slow_way(site: str, rule: str) -> None:
    """Other rules have other layers, but the same noise: runs of one seed are paired."""
    model = network(rule).eval()
    slow = slow_logits(site, 0.4, seed=9)
    with evaluation_noise(model, normalize, site=site, level=0.4, seed=9) as (noisy, norm), torch.inference_mode():
        fast = [noisy(norm(pixels)) for pixels, _ in split()]
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b)
    found = noisy_accuracy(model, split, normalize, site=site, level=0.4, draws=3, seed=5)
    right = [
        [
            (z.argmax(1) == y).sum()
            for z, (_, y) in zip(slow_logits(site, 0.4, seed_of(5, site, k)), split(), strict=True)
        ]
        for k in range(3)
    ]
    assert found.values == tuple(sum(counts).item() / 110 for counts in right)


def test_mean_and_standard_error_by_hand() -> None:
    found = noisy_accuracy(network(), split, normalize, site="weight", level=0.6, draws=4, seed=0)
    a, b, c, d = found.values
    mean = (a + b + c + d) / 4
    assert len({a, b, c, d}) > 1
    assert found.draws == 4
    assert found.mean == pytest.approx(mean, rel=1e-12)
    variance = ((a - mean) ** 2 + (b - mean) ** 2 + (c - mean) ** 2 + (d - mean) ** 2) / 3
    assert found.se == pytest.approx(math.sqrt(variance / 4), rel=1e-12)
    one = noisy_accuracy(network(), split, normalize, site="weight", level=0.6, draws=1, seed=0)
    assert (one.mean, one.se, one.values) == (a, None, (a,))  # draw 0 is draw 0, however many follow


@pytest.mark.parametrize("site", EVALUATION)
def test_level_zero_is_the_accuracy_without_noise_in_one_pass(site: str) -> None:
    model, passes = network().float(), []

    def batches() -> list[Batch]:
        passes.append(1)
        return [(pixels.float(), labels) for pixels, labels in split()]

    found = noisy_accuracy(model, batches, normalize, site=site, level=0.0, draws=5, seed=0)
    assert len(passes) == 1
    clean = accuracy(model, batches(), normalize)["acc"]
    assert (found.mean, found.se, found.draws, found.values) == (clean, 0.0, 1, (clean,))
    assert 0.5 < clean < 1
    with evaluation_noise(model, normalize, site=site, level=0.0, seed=0) as same:
        assert same == (model, normalize)
    much = noisy_accuracy(model, batches, normalize, site=site, level=30.0, draws=5, seed=0)
    assert much.mean < clean - 0.1


# --- streams ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", EVALUATION)
def test_the_seed_alone_says_what_is_drawn_and_no_global_stream_moves(site: str) -> None:
    def found(seed: int) -> Any:
        return noisy_accuracy(network(), split, normalize, site=site, level=0.5, draws=4, seed=seed)

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = found(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert found(0) == first
    assert found(1) != first


def test_the_draws_of_a_level_are_those_of_another_scaled() -> None:
    model, pixels = network(), split()[0][0]
    weights, inputs = [], []
    for level in (0.1, 0.3):
        with evaluation_noise(model, normalize, site="weight", level=level, seed=2) as (noisy, _):
            weights.append(noisy.weights["3.weight"] - model[3].weight.detach())
        with evaluation_noise(model, lambda p: p, site="input", level=level, seed=2) as (_, norm):
            inputs.append(norm(pixels) - pixels)
    torch.testing.assert_close(weights[1], 3 * weights[0])
    torch.testing.assert_close(inputs[1], 3 * inputs[0])


@pytest.mark.parametrize("site", EVALUATION)
def test_the_layout_in_memory_changes_nothing(site: str) -> None:
    plain, last = network(), network().to(memory_format=torch.channels_last)
    assert not last[3].weight.is_contiguous()
    pixels = split()[0][0]
    answers = []
    for model, layout in ((plain, torch.contiguous_format), (last, torch.channels_last)):
        with evaluation_noise(model.eval(), normalize, site=site, level=0.5, seed=2) as (noisy, norm), torch.no_grad():
            answers.append(noisy(norm(pixels.contiguous(memory_format=layout))))
    torch.testing.assert_close(*answers)


# --- the network afterwards ------------------------------------------------------------------------------


def everything(model: nn.Module) -> tuple[Any, ...]:
    return (
        {k: (v.clone(), v.data_ptr()) for k, v in model.state_dict().items()},
        {n: (id(p), p._version, p.requires_grad) for n, p in model.named_parameters()},
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    )


@pytest.mark.parametrize("site", EVALUATION)
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("level", [0.0, 0.5])
def test_the_network_is_as_it_was_after_an_exception_too(site: str, fails: bool, level: float) -> None:
    model = network("mirror").train()
    model[1].eval()  # a module of its own mind
    before = everything(model)

    def batches() -> Iterator[Batch]:
        yield from split()
        if fails:
            raise ConnectionError("the disk is gone")

    def run() -> None:
        noisy_accuracy(model, batches, normalize, site=site, level=level, draws=2, seed=0)

    if fails:
        with pytest.raises(ConnectionError):
            run()
    else:
        run()
    after = everything(model)
    assert before[1:] == after[1:]
    for name, (value, address) in before[0].items():
        assert torch.equal(after[0][name][0], value)
        assert after[0][name][1] == address


# --- which tensors ---------------------------------------------------------------------------------------


def test_the_weights_are_those_of_the_forward_path_each_once() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.plane = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.LayerNorm((4, 4))
            self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
            self.position, self.words = nn.Parameter(torch.zeros(1, 3, 4)), nn.Embedding(5, 4)
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model = Several()
    convert(model, "feedback")
    assert any(name.endswith("feedback") for name, _ in model.named_parameters())
    shared = ["conv.weight", "attention.in_proj_weight", "attention.out_proj.weight", "first.weight"]
    assert list(forward_weights(model)) == shared
    with evaluation_noise(model, normalize, site="weight", level=0.5, seed=0) as (noisy, _), torch.no_grad():
        W, x = noisy.weights["first.weight"], torch.randn(3, 4)
        slow = nn.functional.linear(nn.functional.linear(x, W, model.first.bias), W, model.second.bias)
        torch.testing.assert_close(noisy(x), slow)  # the layers still share one tensor


# --- precision and failure -------------------------------------------------------------------------------


@pytest.mark.parametrize("site", EVALUATION)
@pytest.mark.parametrize("rule", ["backprop", "mirror"])
def test_under_autocast_the_layers_stay_in_bfloat16_and_the_noise_is_the_same(site: str, rule: str) -> None:
    model, seen = network(rule).float().eval(), []
    pixels = split()[0][0].float()
    with evaluation_noise(model, normalize, site=site, level=0.3, seed=1) as (noisy, norm), torch.inference_mode():
        exact = noisy(norm(pixels))
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        clean = model(normalize(pixels)).float()  # leaves its weights in autocast's cache
        with evaluation_noise(model, normalize, site=site, level=0.3, seed=1) as (noisy, norm):
            handles = [m.register_forward_hook(lambda _, __, y: seen.append(y.dtype)) for m in (model[3], model[5])]
            low = noisy(norm(pixels)).float()
            for handle in handles:
                handle.remove()
    assert seen == [torch.bfloat16] * 2
    far, near = (clean - exact).norm() / exact.norm(), (low - exact).norm() / exact.norm()
    assert near < 0.03
    assert far > 0.1  # the cached weights would have been as far


def test_answers_that_are_not_finite_are_wrong() -> None:
    model = network().float()
    batches = [(pixels.float(), labels) for pixels, labels in split()]
    found = noisy_accuracy(model, lambda: batches, normalize, site="weight", level=1e38, draws=2, seed=0)
    assert (found.mean, found.se) == (0.0, 0.0)


def test_what_makes_no_sense_is_refused() -> None:
    def run(**changes: Any) -> Any:
        options = {"site": "input", "level": 0.1, "draws": 1, "seed": 0, **changes}
        return noisy_accuracy(options.pop("model", network()), options.pop("batches", split), normalize, **options)

    with pytest.raises(UserError, match="set update_noise in a trial"):
        run(site="update")
    with pytest.raises(UserError, match="noise in training"):
        run(site="update", level=0.0)
    with pytest.raises(UserError, match="Did you mean 'weight'"):
        run(site="weights")
    with pytest.raises(UserError, match=r"level = -0\.1"):
        run(level=-0.1)
    with pytest.raises(UserError, match="level = nan"):
        run(level=math.nan)
    with pytest.raises(UserError, match="draws = 0"):
        run(draws=0)
    with pytest.raises(UserError, match="clip has no effect"):
        run(site="weight", clip=True)
    for site, lacks in (("weight", "no Linear"), ("activation", "no Conv2d")):
        with pytest.raises(UserError, match=lacks):
            run(site=site, model=nn.Flatten())
    with pytest.raises(ValueError, match="no examples"):
        run(batches=list)
