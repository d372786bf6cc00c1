"""Attacks against the slow way, on networks that B misleads, and without a trace."""

from __future__ import annotations

import copy
import logging
import math
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from art.attacks.evasion import SquareAttack
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn
from torch.nn import functional as F

from bench.config import UserError, check_levels
from bench.datasets import load
from bench.evaluators.accuracy import accuracy
from bench.evaluators.adversarial import (
    ATTACKS,
    GRADIENTS,
    QUERIES,
    STEPS,
    adversarial_accuracy,
    adversarial_examples,
)
from bench.learning.convert import convert
from bench.learning.layers import asymmetric_layers, exact_gradients
from bench.learning.learner import FeedbackLearner, parameter_groups

DATA = load("digits")
normalize = DATA.normalize


def network(*extra: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    convolutions = (nn.Conv2d(1, 8, 3, padding=1), *extra, nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU())
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(144, 10))


@lru_cache(maxsize=2)
def trained(rule: str) -> nn.Module:
    model = network()
    if rule != "backprop":
        convert(model, rule, seed=0)
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.05, weight_decay=0.0), lr=0.05, momentum=0.9)
    if rule != "backprop":
        FeedbackLearner(model, optimizer)
    for epoch in range(5):
        for x, y in DATA.batches("train", 64, device=torch.device("cpu"), seed=0, epoch=epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(normalize(x)), y).backward()
            optimizer.step()
    return model.eval()


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    pixels, labels = next(DATA.batches("test", 200, device=torch.device("cpu")))
    return pixels, labels


def attacked(rule: str, attack: str, level: float, n: int = 200, **options: Any) -> float:
    pixels, labels = (t[:n] for t in digits())
    found = adversarial_accuracy(
        trained(rule), pixels, labels, normalize, attack=attack, level=level, **{"seed": 0, **options}
    )
    assert found.accuracy <= found.clean
    assert found.n == n
    return found.accuracy


# --- the rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_levels_of_a_row_span_the_range(attack: str) -> None:
    row = ATTACKS[attack]
    check_levels(attack, row.levels)
    assert row.levels[0] == 1 / 255
    assert row.levels[-1] <= 1
    assert row.name == attack


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_the_levels_reach_from_no_effect_to_nothing_left(attack: str) -> None:
    clean, first, last = (
        attacked("feedback", attack, level)
        for level in (0, *ATTACKS[attack].levels[:: len(ATTACKS[attack].levels) - 1])
    )
    assert clean > 0.9
    assert first >= clean - 0.02
    assert last <= 0.05


def test_art_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, bench.evaluators.adversarial; print('art' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- what an attack does ---------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ATTACKS)
def test_level_0_changes_nothing(attack: str) -> None:
    pixels, labels = digits()
    model = trained("feedback")
    same = adversarial_examples(model, pixels, labels, normalize, attack=attack, level=0, seed=0)
    assert torch.equal(same, pixels)
    found = adversarial_accuracy(model, pixels, labels, normalize, attack=attack, level=0, seed=0)
    assert found.accuracy == found.clean == accuracy(model, [(pixels, labels)], normalize)["acc"]
    assert found.settings == {}


def gradient_at(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    x = pixels.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(normalize(x)), labels), x)
    return grad


def plain_twin(model: nn.Module) -> nn.Module:
    """The same function with plain layers, which know nothing of B."""
    twin = network().eval()
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "feedback" not in k})
    return twin


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_gradient_that_art_takes_is_the_one_named(gradient: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (pixels, labels) = trained("feedback"), digits()
    taken: list[np.ndarray] = []
    original = PyTorchClassifier.loss_gradient

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        taken.append(original(self, *args, **kwargs))
        return taken[-1]

    monkeypatch.setattr(PyTorchClassifier, "loss_gradient", spy)
    options: dict[str, Any] = {"attack": "fgsm", "level": 0.1, "gradient": gradient, "seed": 0, "batch": 200}
    adversarial_examples(model, pixels, labels, normalize, **options)
    through_b, true = gradient_at(model, pixels, labels), gradient_at(plain_twin(model), pixels, labels)
    with exact_gradients(model):
        torch.testing.assert_close(gradient_at(model, pixels, labels), true)
    expected, other = (true, through_b) if gradient == "true" else (through_b, true)
    (found,) = (torch.from_numpy(t) for t in taken)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)
    assert F.cosine_similarity(found.flatten(), other.flatten(), dim=0) < 0.9


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_fgsm_is_one_step_along_the_sign_to_the_bit(gradient: str) -> None:
    """The digits are sixteenths, and so is ε: then nothing is rounded."""
    model, (pixels, labels) = trained("feedback"), digits()
    options: dict[str, Any] = {"attack": "fgsm", "level": 1 / 16, "gradient": gradient, "seed": 0, "batch": 200}
    found = adversarial_examples(model, pixels, labels, normalize, **options)
    grad = gradient_at(plain_twin(model) if gradient == "true" else model, pixels, labels)
    assert torch.equal(found, (pixels + grad.sign() / 16).clamp(0, 1))


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("level", [1 / 255, 0.3])
def test_no_pixel_leaves_the_ball_or_the_range(attack: str, level: float) -> None:
    pixels, labels = (t[:20] for t in digits())
    before = pixels.clone()
    found = adversarial_examples(trained("feedback"), pixels, labels, normalize, attack=attack, level=level, seed=0)
    step = (found - pixels).abs().max().item()
    assert 0.9 * level < step <= level + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    assert torch.equal(pixels, before)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_the_gradient_through_B_makes_a_network_look_robust(attack: str) -> None:
    levels = (4 / 255, 16 / 255, 32 / 255)
    true = [attacked("feedback", attack, level) for level in levels]
    through_b = [attacked("feedback", attack, level, gradient="feedback") for level in levels]
    assert all(t <= b for t, b in zip(true, through_b, strict=True))
    assert true[-1] < through_b[-1] - 0.3


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_without_asymmetric_layers_the_two_gradients_are_one(attack: str) -> None:
    found = [
        adversarial_examples(
            trained("backprop"), *digits(), normalize, attack=attack, level=0.1, gradient=gradient, seed=0
        )
        for gradient in GRADIENTS
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("rule", ["backprop", "feedback"])
def test_pgd_is_no_weaker_than_fgsm(rule: str) -> None:
    """Not for every image, from one random start: one in 200 may stand that fgsm breaks. Over all it is stronger."""
    levels = (8 / 255, 16 / 255, 32 / 255)
    pgd, fgsm = ([attacked(rule, attack, level) for level in levels] for attack in ("pgd", "fgsm"))
    assert all(p <= f + 1 / 200 for p, f in zip(pgd, fgsm, strict=True))
    assert sum(pgd) < sum(fgsm) - 0.02


def test_the_settings_are_stated() -> None:
    pixels, labels = (t[:5] for t in digits())
    for attack, settings in {
        "fgsm": {"steps": 1},
        "pgd": {"steps": STEPS, "step_size": pytest.approx(2.5 * 0.4 / STEPS), "starts": 1},
        "square": {"queries": QUERIES, "starts": 1},
    }.items():
        found = adversarial_accuracy(trained("feedback"), pixels, labels, normalize, attack=attack, level=0.4, seed=0)
        assert found.settings == settings


# --- square ----------------------------------------------------------------------------------------------


class Curve(nn.Module):
    """Logits (f(p), 0) for images of one pixel p."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        value = self.f(x.flatten(1))
        return torch.cat([value, torch.zeros_like(value)], 1)


class Counting(nn.Module):
    """A network that counts the images that it is asked about."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.asked = 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += len(x)
        logits: Tensor = self.inner(x)
        return logits


def test_square_lowers_the_accuracy_without_a_gradient() -> None:
    assert attacked("feedback", "square", 48 / 255, n=30) <= attacked("feedback", "square", 0, n=30) - 0.5


@pytest.mark.parametrize("queries", [1000, 1100])
def test_square_asks_about_each_image_as_often_as_stated(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that nothing changes: every query is made. Each draws the signs of its candidate once."""
    draws: list[Any] = []
    choice = np.random.choice
    monkeypatch.setattr(np.random, "choice", lambda *args, **kwargs: draws.append(args) or choice(*args, **kwargs))
    model = Counting(Curve(lambda p: 1 + 0 * p[:, :1]))
    pixels, labels = torch.full((1, 3, 16, 16), 0.5), torch.tensor([0])
    options: dict[str, Any] = {"attack": "square", "level": 0.1, "seed": 0, "queries": queries}
    found = adversarial_examples(model, pixels, labels, lambda x: x, **options)
    assert torch.equal(found, pixels)
    assert len(draws) == queries
    # one to learn the number of classes, and one as the image is; what was asked just before is not asked again
    assert 0.8 * queries < model.asked <= 2 + queries


def test_square_is_the_one_of_art() -> None:
    """Against ART's own classifier, which asks three times as often: to the bit, from the same draws.

    In double precision, or the rounding of other batches would decide now and then which candidate is better.
    """
    pixels, labels = (t[:6] for t in digits())
    model, level = copy.deepcopy(trained("backprop")).double(), 12 / 255

    def double(x: Tensor) -> Tensor:
        return normalize(x.double())

    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = model(double(x))
            return logits

    classifier = PyTorchClassifier(
        Whole(), nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0.0, 1.0), device_type="cpu"
    )
    square = SquareAttack(classifier, eps=level, max_iter=QUERIES - 1, batch_size=128, verbose=False)
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    expected = square.generate(pixels.numpy(), labels.numpy())
    np.random.set_state(state)  # noqa: NPY002
    found = adversarial_examples(model, pixels, labels, double, attack="square", level=level, seed=3)
    assert torch.equal(found, torch.from_numpy(expected))


def test_square_refuses_images_in_which_it_cannot_move() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(UserError, match=r"4x4 pixels.*use 'pgd'"):
        adversarial_accuracy(
            model, torch.zeros(1, 1, 4, 4), torch.tensor([0]), lambda x: x, attack="square", level=0.1, seed=0
        )


# --- what counts as robust -------------------------------------------------------------------------------


def test_an_attack_that_repairs_an_example_does_not_count() -> None:
    """f is below 0 around 0.5. From 0.4, already wrong, the step leads through the valley and out of it."""
    model = Curve(lambda p: (p - 0.5) ** 2 - 0.04)
    pixels, labels = torch.tensor([0.4, 0.0]).view(2, 1, 1, 1), torch.tensor([0, 0])
    options: dict[str, Any] = {"attack": "fgsm", "level": 0.4, "seed": 0}
    images = adversarial_examples(model, pixels, labels, lambda x: x, **options)
    torch.testing.assert_close(images.flatten(), torch.tensor([0.8, 0.4]))
    assert accuracy(model, [(images, labels)], lambda x: x)["acc"] == 0.5
    found = adversarial_accuracy(model, pixels, labels, lambda x: x, **options)
    assert (found.clean, found.accuracy, found.n) == (0.5, 0.0, 2)


def test_a_gradient_that_is_no_number_is_no_robustness() -> None:
    model = Curve(lambda p: 1 + torch.sqrt(0 * p))
    options: dict[str, Any] = {"level": 0.1, "seed": 0}
    one = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])
    for attack in ("fgsm", "pgd"):
        with pytest.raises(UserError, match=r"gradient was NaN.*'square'"):
            adversarial_accuracy(model, *one, lambda x: x, attack=attack, **options)


def test_logits_that_are_no_numbers_are_wrong() -> None:
    model = Curve(lambda p: p * math.nan)
    one = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])
    found = adversarial_accuracy(model, *one, lambda x: x, attack="fgsm", level=0.1, seed=0)
    assert (found.clean, found.accuracy) == (0.0, 0.0)


# --- nothing else changes --------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ["pgd", "square"])
def test_the_seed_determines_the_result(attack: str) -> None:
    pixels, labels = (t[:10] for t in digits())

    def run(seed: int) -> Tensor:
        torch.manual_seed(random.randrange(2**31))
        np.random.seed(random.randrange(2**31))  # noqa: NPY002
        return adversarial_examples(trained("feedback"), pixels, labels, normalize, attack=attack, level=0.3, seed=seed)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_the_batch_changes_no_draw() -> None:
    options: dict[str, Any] = {"attack": "pgd", "level": 0.05, "seed": 1}
    found = [adversarial_examples(trained("feedback"), *digits(), normalize, batch=b, **options) for b in (64, 200)]
    assert ((found[0] - found[1]).abs() < 1e-5).double().mean() > 0.99


def snapshot(model: nn.Module) -> dict[str, Any]:
    states = {k: dict(vars(layer.state)) for k, layer in asymmetric_layers(model).items()}
    return {
        "tensors": {k: v.detach().clone() for k, v in model.state_dict().items()},
        "versions": {k: v._version for k, v in model.state_dict().items()},
        "grads": {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()},
        "flags": {k: p.requires_grad for k, p in model.named_parameters()},
        "modes": {k: m.training for k, m in model.named_modules()},
        "totals": {k: None if (t := s.pop("total")) is None else t.clone() for k, s in states.items()},
        "states": states,
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "python": random.getstate(),
        "logger": logging.getLogger("art").level,
    }


def unequal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() != b.keys() or any(unequal(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return len(a) != len(b) or any(unequal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Tensor | np.ndarray):
        return not np.array_equal(np.asarray(a), np.asarray(b))
    return bool(a != b)


def halfway(rule: str = "information") -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network in the middle of training: gradients in W and of B, a frozen layer, one that is not in training."""
    model = network(nn.BatchNorm2d(8))
    convert(model, rule, {"amp": 0.1, "null": 0.1, "decay": 0.01}, seed=0)
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.1, weight_decay=0.0), lr=0.1)
    FeedbackLearner(model, optimizer)
    pixels, labels = digits()
    F.cross_entropy(model(normalize(pixels[:50])), labels[:50]).backward()
    model[0].weight.requires_grad_(False)
    model[1].eval()
    return model, optimizer


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_leaves_no_trace(attack: str) -> None:
    model, _ = halfway()
    pixels, labels = (t[:10] for t in digits())
    before = snapshot(model)
    assert any(t is not None for t in before["totals"].values())
    assert not unequal(before, snapshot(model))
    adversarial_accuracy(model, pixels, labels, normalize, attack=attack, level=0.1, seed=7)
    assert not unequal(before, snapshot(model))


@pytest.mark.parametrize("calls", [1, 2, 5])
def test_an_attack_that_fails_leaves_no_trace(calls: int) -> None:
    model, _ = halfway()

    def breaks() -> Iterator[None]:
        yield from [None] * (calls - 1)
        raise RuntimeError("out of memory")

    left = breaks()

    def failing(x: Tensor) -> Tensor:
        next(left)
        return normalize(x)

    before = snapshot(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        adversarial_accuracy(model, *digits(), failing, attack="pgd", level=0.1, seed=7)
    assert not unequal(before, snapshot(model))


def test_training_goes_on_as_if_nothing_had_been() -> None:
    results = []
    for attack in (False, True):
        model, optimizer = halfway()
        if attack:
            adversarial_accuracy(model, *digits(), normalize, attack="pgd", level=0.1, seed=0)
        pixels, labels = digits()
        for _ in range(2):
            optimizer.step()
            optimizer.zero_grad()
            F.cross_entropy(model(normalize(pixels[50:100])), labels[50:100]).backward()
        results.append(snapshot(model))
    assert not unequal(*({k: r[k] for k in ("tensors", "grads", "totals")} for r in results))


@pytest.mark.parametrize("attack", ATTACKS)
def test_art_is_silent(attack: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    pixels, labels = (t[:5] for t in digits())
    with caplog.at_level(logging.DEBUG):
        adversarial_accuracy(trained("feedback"), pixels, labels, normalize, attack=attack, level=0.4, seed=0)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


# --- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"attack": "pdg"}, r"unknown attack 'pdg'.*'pgd'.*Valid: fgsm, pgd, square"),
        ({"gradient": "exact"}, r"unknown gradient 'exact'.*Valid: feedback, true"),
        ({"attack": "square", "gradient": "feedback"}, r"'square' uses no gradient.*remove it"),
        ({"queries": 2000}, r"'pgd' makes no queries.*remove it"),
        ({"attack": "square", "queries": 999}, r"queries = 999 is out of range.*1000"),
        ({"level": -0.1}, "level = -0.1 is out of range"),
        ({"level": 1.5}, "level = 1.5 is out of range"),
        ({"level": math.nan}, "level = nan is out of range"),
        ({"seed": -1}, "seed = -1 is out of range"),
        ({"batch": 0}, "batch = 0 is out of range"),
    ],
)
def test_errors_name_the_remedy(wrong: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"attack": "pgd", "level": 0.1, "seed": 0, **wrong}
    for function in (adversarial_accuracy, adversarial_examples):
        with pytest.raises(UserError, match=message):
            function(network(), *digits(), normalize, **options)


def test_no_examples_is_an_error() -> None:
    pixels, labels = (t[:0] for t in digits())
    with pytest.raises(ValueError, match="no examples"):
        adversarial_accuracy(network(), pixels, labels, normalize, attack="fgsm", level=0.1, seed=0)
