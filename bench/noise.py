"""Gaussian noise at the four sites of the protocol (design, section 5): into training, and into a trained network.

Everything is drawn from generators of its own: no other random stream moves, and a noise of zero is no noise at
all, bit for bit. A draw is a function of its seed and of the tensors' shapes, not of how they lie in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bench.config import Site, UserError, check_range, digest, unknown

#: From pixels in [0, 1] to what the network sees.
Normalize = Callable[[Tensor], Tensor]
#: Which parameters have noisy updates: forward ones (W, norms, biases), the feedback weights B, or both.
On = Literal["both", "forward", "feedback"]

#: The standard deviations of "gaussian_noise" in these benchmarks, severities 1 to 5, pixels in [0, 1]; they clip.
CORRUPTION_SEVERITIES: dict[str, tuple[float, ...]] = {
    "ImageNet-C": (0.08, 0.12, 0.18, 0.26, 0.38),
    "CIFAR-10-C": (0.04, 0.06, 0.08, 0.09, 0.10),
}


class Stream:
    """Standard normal numbers from one seed, on whatever device they are asked for."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def normal_like(self, tensor: Tensor) -> Tensor:
        """N(0, 1) of this shape, contiguous; float32 at least, so that the precision does not change the draw."""
        if tensor.device not in self._generators:
            self._generators[tensor.device] = torch.Generator(tensor.device).manual_seed(self._seed)
        return torch.randn(
            tensor.shape,
            generator=self._generators[tensor.device],
            device=tensor.device,
            dtype=torch.promote_types(tensor.dtype, torch.float32),
        )


#: (model, normalize, level > 0, stream, clip) to the noisy model and normalize, within the context.
Disturb = Callable[[nn.Module, Normalize, float, Stream, bool], AbstractContextManager[tuple[nn.Module, Normalize]]]


@dataclass(frozen=True, kw_only=True)
class NoiseSite:
    """One place for Gaussian noise, as data.

    ``unit``: what its level σ is measured in. ``levels``: the default grid, rising, from no effect to nothing left;
    None where that depends on the recipe (`bench.training.update_levels`). ``disturb``: how it is put into a trained
    network; None for noise in training, which is `UpdateNoise`.
    """

    name: Site
    when: Literal["training", "evaluation"]
    unit: str
    levels: tuple[float, ...] | None
    definition: str
    source: str
    disturb: Disturb | None = None


def seed_of(*words: int | str) -> int:
    """A generator's seed, in [0, 2^63), as a function of these words."""
    return int(digest(list(words)), 16) % 2**63


class UpdateNoise:
    """After a step, θ ← θ + η·ε with ε ~ N(0, σ²) and η the present learning rate of θ's group.

    ``optimizer``: with the groups of `bench.learning.learner.parameter_groups`, of which ``on`` picks ``feedback``,
    the others, or all. Call ``seed`` at the start of every epoch, with a number that names the run and the epoch, and
    ``add`` right after each ``optimizer.step()``, before the gradients are cleared: a parameter without a gradient
    has stood still (frozen, or W in a step of B alone, or B while its learner is off), and has no noisy update. As
    in the authors' code, the optimizer's momentum does not see the noise. With σ = 0 nothing is drawn or touched.

    Each group has a generator of its own: W draws the same whether B draws or not. Several processes that train one
    network must give the same seed. UserError for a σ below 0, another ``on``, groups without names, and
    ``feedback`` where no B learns; RuntimeError for ``add`` before ``seed``.

    Source: Kunin et al. 2020, arXiv 2003.01513. Their code (Neural-Alignment, build_noisy_optimizer in
    custom_optimizers.py) does ``var.assign_add(lr * normal(stddev=sqrt(variance)))`` for every variable that the
    optimizer updates, biases and norms too; what it is given is σ², and a filter on names picks among the variables.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, sigma: float, on: On = "both") -> None:
        check_range("noise", "update_noise", sigma, 0)
        if on not in get_args(On):
            raise unknown("value of update_noise_on", on, get_args(On))
        names = [group.get("name") for group in optimizer.param_groups]
        if None in names:
            raise UserError("the optimizer's groups have no names: make them with parameter_groups().")
        if on == "feedback" and on not in names:
            raise UserError("update_noise_on = 'feedback' has no effect: no B learns here; use 'forward' or 'both'.")
        chosen = [i for i, name in enumerate(names) if on == "both" or (name == "feedback") == (on == "feedback")]
        self._optimizer, self._sigma, self._seeded = optimizer, sigma, False
        self._groups = {i: _Group(optimizer.param_groups[i]["params"]) for i in chosen} if sigma else {}

    def seed(self, seed: int) -> None:
        """Start the noise anew: the same seed, the same noise from here on."""
        for i, group in self._groups.items():
            group.generator.manual_seed(seed_of(seed, "update", self._optimizer.param_groups[i]["name"]))
        self._seeded = True

    @torch.no_grad()
    def add(self) -> None:
        """Add the noise to what the last step updated."""
        if self._groups and not self._seeded:
            raise RuntimeError("UpdateNoise.seed() comes first, or every run would have the same noise.")
        for i, group in self._groups.items():
            # asked for anew each time: load_state_dict puts other dictionaries in the place of the groups
            group.add(self._optimizer.param_groups[i]["lr"] * self._sigma)


class _Group:
    """The parameters of one group (of one device and type), and a buffer that is drawn whole: one call, not one each.

    On a CPU the draw itself is nearly all of the cost, and the two ways are equal; on a GPU it saves the launches.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        sizes = [p.numel() for p in parameters]
        self.parameters = list(parameters)
        self.generator = torch.Generator(parameters[0].device)
        self.buffer = torch.empty(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
        self.parts = [part.view(p.shape) for part, p in zip(torch.split(self.buffer, sizes), parameters, strict=True)]

    def add(self, scale: float) -> None:
        pairs = [(p, part) for p, part in zip(self.parameters, self.parts, strict=True) if p.grad is not None]
        if pairs:
            self.buffer.normal_(generator=self.generator)
            torch._foreach_add_([p for p, _ in pairs], [part for _, part in pairs], alpha=scale)


@contextmanager
def evaluation_noise(
    model: nn.Module, normalize: Normalize, *, site: str, level: float, seed: int, clip: bool = False
) -> Iterator[tuple[nn.Module, Normalize]]:
    """Within, (model, normalize) with noise of this level σ at this site; evaluate ``model(normalize(pixels))``.

    Level 0 gives the two as they are. The model's own parameters are never written and its hooks are removed at the
    end, however that comes. ``weight`` draws once: one noisy network for the whole context; the others draw for each
    batch. The draws depend on ``seed`` and shapes, not on the level: σ scales one and the same noise.
    ``clip``, for ``input`` alone: keep the pixels in [0, 1], as ImageNet-C and CIFAR-10-C do.

    UserError for an unknown site, ``update`` (noise in training), a level below 0, a ``clip`` without effect, and a
    network without the layers that the site needs.
    """
    if site not in SITES:
        raise unknown("noise site", site, SITES)
    disturb = SITES[site].disturb
    if disturb is None:
        raise UserError(f"site {site!r} is noise in training, not in a trained network: set update_noise in a trial.")
    check_range("noise", "level", level, 0)
    if clip and site != "input":
        raise UserError(f"clip has no effect at site {site!r}, only at 'input'; remove it.")
    if level == 0:
        yield model, normalize
        return
    with disturb(model, normalize, level, Stream(seed), clip) as noisy:
        yield noisy


class _WithWeights(nn.Module):
    """The network with other tensors in the place of some of its parameters, which are not written."""

    def __init__(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.weights = model, weights
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = functional_call(self.model, self.weights, (x,))
        return result


@contextmanager
def _noisy_weights(
    model: nn.Module, normalize: Normalize, level: float, stream: Stream, _: bool
) -> Iterator[tuple[nn.Module, Normalize]]:
    """W + σ·rms(W)·ε, rms(W) = √(mean of W²) over the tensor.

    New tensors, not new values: autocast keeps what it cast of a parameter, and would go on with the old values.
    """
    noisy: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, W in forward_weights(model).items():
            scale = W.to(torch.promote_types(W.dtype, torch.float32)).square().mean().sqrt() * level
            noisy[name] = torch.add(W, stream.normal_like(W) * scale).to(W.dtype)
    yield _WithWeights(model, noisy), normalize


def forward_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weight matrices and kernels by name, each once: of convolutions, Linear, Bilinear and MultiheadAttention.

    Neither B (``feedback``), nor biases, nor the gains of norms. UserError if the network has none.
    """
    owners = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.modules.conv._ConvNd)
    found = {
        f"{name}.{own}" if name else own: p
        for name, module in model.named_modules()
        if isinstance(module, owners)
        for own, p in module.named_parameters(recurse=False)
        if own.endswith("weight") and p.dim() > 1
    }
    if not found:
        raise UserError("this network has no Linear and no convolution whose weights could be noisy.")
    first: dict[int, str] = {}  # a weight that two layers share is one tensor
    return {name: p for name, p in found.items() if first.setdefault(id(p), name) == name}


@contextmanager
def _noisy_activations(
    model: nn.Module, normalize: Normalize, level: float, stream: Stream, _: bool
) -> Iterator[tuple[nn.Module, Normalize]]:
    """y + σ·std(z)·ε after every Conv2d and Linear that is called; z is y without the bias (design, section 2).

    std over all of z: examples, channels and positions of the batch (with N, not N − 1).
    """
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    if not layers:
        raise UserError("this network has no Conv2d and no Linear whose output could be noisy.")

    def hook(layer: nn.Module, _: tuple[Tensor, ...], y: Tensor) -> Tensor:
        bias = layer.bias
        z = y if not isinstance(bias, Tensor) else y - (bias.view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else bias)
        noise = stream.normal_like(y)
        scale = z.to(noise.dtype).std(correction=0) * level
        return torch.add(y, noise.mul_(scale)).to(y.dtype)

    hooks = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield model, normalize
    finally:
        for handle in hooks:
            handle.remove()


@contextmanager
def _noisy_input(
    model: nn.Module, normalize: Normalize, level: float, stream: Stream, clip: bool
) -> Iterator[tuple[nn.Module, Normalize]]:
    """p + σ·ε before normalisation, for pixels p in [0, 1]."""

    def noisy(pixels: Tensor) -> Tensor:
        disturbed = torch.add(pixels, stream.normal_like(pixels), alpha=level)
        return normalize(disturbed.clamp_(0.0, 1.0) if clip else disturbed)

    yield model, noisy


#: The grid of ``update``: what the noise of a whole training adds up to in a weight (standard deviation). Weights
#: start near 0.02 to 0.06 in a resnet18, whose norms make it bear more noise than that.
ADDED_UP = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

_ROWS = (
    NoiseSite(
        name="update",
        when="training",
        unit="each step adds η·N(0, σ²)",
        levels=None,
        definition="after each optimizer step θ ← θ + η·ε, ε ~ N(0, σ²), η the current learning rate of θ's group",
        source="Kunin et al. 2020, arXiv 2003.01513; their code, custom_optimizers.build_noisy_optimizer",
    ),
    NoiseSite(
        name="weight",
        when="evaluation",
        unit="the root mean square of each weight tensor",
        levels=(0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0),
        definition="each weight tensor + N(0, (σ·rms(W))²), drawn once per pass over the split",
        source="this program: relative to the tensor, so that it does not depend on how a layer is scaled",
        disturb=_noisy_weights,
    ),
    NoiseSite(
        name="activation",
        when="evaluation",
        unit="the standard deviation of each layer's z, its output without the bias",
        levels=(0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 1.0),
        definition="the output of each Conv2d and Linear + N(0, (σ·std(z))²), std over the whole batch",
        source="this program",
        disturb=_noisy_activations,
    ),
    NoiseSite(
        name="input",
        when="evaluation",
        unit="pixel values in [0, 1]",
        levels=(0.04, 0.08, 0.12, 0.18, 0.26, 0.38, 0.6, 1.0),
        definition="pixels in [0, 1] + N(0, σ²), before normalisation; ImageNet-C's five severities are in the grid",
        source="Hendrycks & Dietterich 2019, arXiv 1903.12261, gaussian_noise (they clip to [0, 1])",
        disturb=_noisy_input,
    ),
)

SITES: dict[str, NoiseSite] = {row.name: row for row in _ROWS}
