"""Adversarial robustness: accuracy on the worst images within ε of the clean ones, by attacks of the library ART.

The layers of a rule send the error back through B. An attack that climbs this gradient fails for want of a
direction, and the network looks robust (gradient masking: Athalye et al. 2018, arXiv 1802.00420). So attacks take
the true gradient unless told otherwise. ``square`` takes none, and is the check on both: where it leaves a lower
accuracy than ``pgd``, what pgd measured is masking.

ART (Nicolae et al. 2018, arXiv 1807.01069) takes seconds to import, and so is imported where it is used.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.config import UserError, check_range, unknown
from bench.learning.layers import exact_gradients
from bench.noise import Normalize

#: Examples in one batch of an attack. Smaller than in evaluation: a backward pass keeps what the forward pass made.
BATCH = 128
#: Of pgd. Steps of 2.5·ε/STEPS can cross the whole ball and come back (Madry et al. 2018, section 5).
STEPS = 20
#: Of square, at most, per image; fewer would make any network look robust.
QUERIES = 1000
#: Of square: the share of the image that its first square covers (Andriushchenko et al. 2020, section 3).
FIRST_SQUARE = 0.8

#: Which gradient an attack climbs. For a network without asymmetric layers (backprop) the two are the same.
GRADIENTS = {
    "true": "the gradient of the loss, sent back through Wᵀ in every layer: what an attacker who knows W has",
    "feedback": "what the network itself sends back, through B: not the gradient, and a weaker attack",
}

#: From where nothing happens to where little is left, on images of 8 to 64 pixels a side.
_LEVELS = tuple(k / 255 for k in (1, 2, 4, 8, 16, 32, 64))


@dataclass(frozen=True, kw_only=True)
class Attack:
    """An untargeted attack on the true labels. ``levels``: the default ε, in ``unit``, measured in ``norm``.

    ``settings(ε, queries)``: what else it depends on, for the record. ``build(classifier, ε, batch, queries)``:
    ART's attack.
    """

    name: str
    uses_gradient: bool
    summary: str
    source: str
    settings: Callable[[float, int], dict[str, float]]
    build: Callable[[Any, float, int, int], Any]
    norm: str = "L∞"
    unit: str = "pixel values in [0, 1]"
    levels: tuple[float, ...] = _LEVELS


@dataclass(frozen=True, kw_only=True)
class AdversarialAccuracy:
    """``accuracy``: of the ``n`` examples, the fraction answered right both before and after the attack.

    ``clean``: the fraction answered right before it. ``settings``: how the attack was run beside its level, gradient
    and seed (steps, queries, ...); empty at level 0, where none was.
    """

    accuracy: float
    clean: float
    n: int
    settings: dict[str, float]


def _fgsm(classifier: Any, level: float, batch: int, _: int) -> Any:
    from art.attacks.evasion import FastGradientMethod

    return FastGradientMethod(classifier, norm=np.inf, eps=level, batch_size=batch)


def _pgd(classifier: Any, level: float, batch: int, _: int) -> Any:
    from art.attacks.evasion import ProjectedGradientDescent

    return ProjectedGradientDescent(
        classifier,
        norm=np.inf,
        eps=level,
        eps_step=_step_size(level),
        max_iter=STEPS,
        num_random_init=1,
        batch_size=batch,
        verbose=False,
    )


def _square(classifier: Any, level: float, batch: int, queries: int) -> Any:
    from art.attacks.evasion import SquareAttack

    # the stripes that it starts with are the first query
    return SquareAttack(
        classifier,
        norm=np.inf,
        eps=level,
        max_iter=queries - 1,
        p_init=FIRST_SQUARE,
        nb_restarts=1,
        batch_size=batch,
        verbose=False,
    )


def _step_size(level: float) -> float:
    return 2.5 * level / STEPS


_ROWS = (
    Attack(
        name="fgsm",
        uses_gradient=True,
        summary="fast gradient sign: one step of ε along the sign of the gradient",
        source="Goodfellow et al. 2015, arXiv 1412.6572",
        settings=lambda _level, _queries: {"steps": 1},
        build=_fgsm,
    ),
    Attack(
        name="pgd",
        uses_gradient=True,
        summary=f"projected gradient descent: {STEPS} steps of 2.5·ε/{STEPS} along its sign, from one random start",
        source="Madry et al. 2018, arXiv 1706.06083",
        settings=lambda level, _queries: {"steps": STEPS, "step_size": _step_size(level), "starts": 1},
        build=_pgd,
    ),
    Attack(
        name="square",
        uses_gradient=False,
        summary="random squares of ±ε, kept if the margin shrinks: a black box that sees logits alone",
        source="Andriushchenko et al. 2020, arXiv 1912.00049",
        settings=lambda _level, queries: {"queries": queries, "starts": 1},
        build=_square,
    ),
)

ATTACKS: dict[str, Attack] = {row.name: row for row in _ROWS}


def adversarial_accuracy(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    normalize: Normalize,
    *,
    attack: str,
    level: float,
    gradient: str = "true",
    seed: int,
    queries: int = QUERIES,
    batch: int = BATCH,
) -> AdversarialAccuracy:
    """Accuracy of ``normalize``, then ``model``, on pixels (n, c, h, w) in [0, 1] within ``level`` of the given ones.

    The worst of clean and attacked: an example counts as robust only if it is answered right both times. An
    attacker may leave an image alone, so one that is wrong already is broken, although a step along the gradient may
    happen to repair it; thus accuracy ≤ clean at every level. At level 0 no attack is run: accuracy is clean.
    No attack finds every adversarial example: from its one random start pgd may miss an image that fgsm breaks.

    The model is in evaluation mode within. It and the global random states are the same afterwards, to the bit; the
    result is a function of ``seed`` (and of the order of the examples, and, by rounding, of ``batch``). ``gradient``:
    one of `GRADIENTS`; for an attack that uses none, leave it.

    Errors: ValueError without examples; UserError for an unknown attack or gradient, for a number out of range,
    for a setting without effect, and where the gradient is NaN though the logits are numbers.
    """
    _check(attack, level, gradient, seed, queries, batch)
    if not len(pixels):
        raise ValueError("no examples to attack")
    with _seeded(seed, _device(model, pixels)), _untouched(model):
        robust = right = _right(model, pixels, labels, normalize, batch)
        if level:
            how = partial(adversarial_examples, attack=attack, level=level, gradient=gradient, seed=seed)
            attacked = how(model, pixels, labels, normalize, queries=queries, batch=batch)
            robust = right & _right(model, attacked, labels, normalize, batch)
    return AdversarialAccuracy(
        accuracy=robust.double().mean().item(),
        clean=right.double().mean().item(),
        n=len(right),
        settings=ATTACKS[attack].settings(level, queries) if level else {},
    )


def adversarial_examples(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    normalize: Normalize,
    *,
    attack: str,
    level: float,
    gradient: str = "true",
    seed: int,
    queries: int = QUERIES,
    batch: int = BATCH,
) -> Tensor:
    """The images (n, c, h, w) that the attack makes: in [0, 1], no pixel further than ``level`` from the given one.

    Arguments and errors as in `adversarial_accuracy`. All images are attacked, those answered wrong too.
    """
    _check(attack, level, gradient, seed, queries, batch)
    if not ATTACKS[attack].uses_gradient:
        _check_squares(*pixels.shape[-2:])
    if not level:
        return pixels.clone()
    device, network = _device(model, pixels), _Network(model, normalize)
    with ExitStack() as stack:
        for context in (_seeded(seed, device), _untouched(model), _quiet(), torch.enable_grad()):
            stack.enter_context(context)
        if gradient == "true":
            stack.enter_context(exact_gradients(model))
        if device.type == "cuda":  # ART takes the current one
            stack.enter_context(torch.cuda.device(device))
        with torch.no_grad():
            classes = network(pixels[:1].to(device)).shape[1]
        classifier = _classifier(network, tuple(pixels.shape[1:]), classes, device)
        one_hot = nn.functional.one_hot(labels.cpu(), classes).float().numpy()
        made = ATTACKS[attack].build(classifier, level, batch, queries)
        images = torch.from_numpy(made.generate(x=pixels.cpu().float().numpy(), y=one_hot)).to(pixels)
    if blind := int(network.blind):
        raise UserError(
            f"attack {attack!r}: the gradient was NaN for an image {blind} times, and the attack blind: use 'square', "
            "which needs no gradient."
        )
    # ART adds the projected step to the image once more, which rounds
    images = images.clamp_(0.0, 1.0)
    assert (images - pixels).abs().max() <= level + 1e-6, "ART left the ball"
    return images


class _Network(nn.Module):
    """``normalize``, then the model, as ART sees it: a module without parameters.

    The model stands in a closure, so what ART does to its module (mode, device, zero_grad) does not reach it.
    """

    def __init__(self, model: nn.Module, normalize: Normalize) -> None:
        super().__init__()
        self._logits: Callable[[Tensor], Tensor] = lambda pixels: model(normalize(pixels)).float()
        self.blind: Tensor | int = 0

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (n, classes); counts in ``blind`` the images with logits and without a gradient."""
        logits = self._logits(pixels)
        if pixels.requires_grad:
            answered = logits.detach().isfinite().all(1)

            def watch(grad: Tensor) -> None:
                # ART would set NaN to 0 and go on: the image would stand still, and the network look robust
                self.blind = self.blind + (grad.isnan().flatten(1).any(1) & answered).sum()

            pixels.register_hook(watch)  # type: ignore[no-untyped-call]
        return logits


def _classifier(network: _Network, shape: tuple[int, ...], classes: int, device: torch.device) -> Any:
    """ART's view of the network, which remembers what it was just asked."""
    from art.estimators.classification import PyTorchClassifier

    recent: deque[dict[bytes, np.ndarray]] = deque(maxlen=3)

    class Remembering(PyTorchClassifier):  # type: ignore[misc]
        """In one query, square asks about all images, about those that stand, and about their candidates.

        All but the candidates were answered in the query before. To ask again would cost three times as much.
        """

        def predict(self, x: np.ndarray, batch_size: int = BATCH, **_: Any) -> np.ndarray:
            keys = [blake2b(image.tobytes(), digest_size=16).digest() for image in x]
            known = {key: logits for call in recent for key, logits in call.items()}
            new = {key: image for key, image in zip(keys, x, strict=True) if key not in known}
            images = list(new.values())
            with torch.no_grad():
                parts = [
                    network(torch.from_numpy(np.stack(images[i : i + batch_size])).to(device)).cpu().numpy()
                    for i in range(0, len(images), batch_size)
                ]
            known.update(zip(new, (logits for part in parts for logits in part), strict=True))
            recent.append({key: known[key] for key in keys})
            return np.stack([known[key] for key in keys])

    return Remembering(
        model=network,
        loss=nn.CrossEntropyLoss(),
        input_shape=shape,
        nb_classes=classes,
        clip_values=(0.0, 1.0),
        preprocessing=None,
        device_type="gpu" if device.type == "cuda" else "cpu",
    )


def _right(model: nn.Module, pixels: Tensor, labels: Tensor, normalize: Normalize, batch: int) -> Tensor:
    """Whether each answer is right, (n,), on the CPU; as in `accuracy`, logits that are not numbers are wrong."""
    device, parts = _device(model, pixels), []
    with torch.no_grad():
        for i in range(0, len(pixels), batch):
            logits = model(normalize(pixels[i : i + batch].to(device))).float()
            wanted = labels[i : i + batch].to(device)
            parts.append((logits.argmax(1) == wanted) & logits.isfinite().all(1))
    return torch.cat(parts).cpu()


def _device(model: nn.Module, pixels: Tensor) -> torch.device:
    return next((p.device for p in model.parameters()), pixels.device)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, in which B does not learn, and no gradient for a parameter; afterwards as it was."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.eval()
        # ART calls backward(): otherwise every step would add to the gradients that training has collected
        for p, _ in flags:
            p.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for p, wanted in flags:
            p.requires_grad_(wanted)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The global generators at ``seed``, and afterwards where they were: ART draws from numpy's and from no other."""
    before = np.random.get_state()  # noqa: NPY002
    cuda = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda):
            np.random.seed(seed)  # noqa: NPY002
            # torch.manual_seed would seed every device, the others too
            torch.default_generator.manual_seed(seed)
            with torch.cuda.device(device) if cuda else nullcontext():
                if cuda:
                    torch.cuda.manual_seed(seed)
                yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing from ART's loggers: it reports each attack, and what its warnings say is an error here."""
    logger = logging.getLogger("art")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def _check(attack: str, level: float, gradient: str, seed: int, queries: int, batch: int) -> None:
    if attack not in ATTACKS:
        raise unknown("attack", attack, ATTACKS)
    if gradient not in GRADIENTS:
        raise unknown("gradient", gradient, GRADIENTS)
    row = ATTACKS[attack]
    if gradient != "true" and not row.uses_gradient:
        raise UserError(f"attack {attack!r} uses no gradient, so gradient={gradient!r} has no effect; remove it.")
    if queries != QUERIES and row.uses_gradient:
        raise UserError(f"attack {attack!r} makes no queries, so queries={queries} has no effect; remove it.")
    check_range("attack", "level", level, 0, 1)
    check_range("attack", "seed", seed, 0, 2**31 - 1)
    check_range("attack", "queries", queries, QUERIES, 10**6)
    check_range("attack", "batch", batch, 1, 10**6)


def _check_squares(height: int, width: int) -> None:
    if round(math.sqrt(FIRST_SQUARE * height * width)) >= min(height, width):
        raise UserError(
            f"attack 'square' has no room to move its first square in an image of {height}x{width} pixels; "
            "it needs square images of 5 pixels a side or more: use 'pgd'."
        )
