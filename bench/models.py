"""The networks, by name. PyTorch alone; ``torchvision:NAME`` and ``timm:NAME`` are imported only when asked for.

To add a network, add a row to `ARCHITECTURES`. Besides its names there is ``mlp:500`` (one hidden layer of 500
units), ``mlp:512-512`` (two), and so on; and each of all these with ``@FACTOR``, e.g. ``resnet18@0.25``: every number
of channels or hidden units times the factor, rounded to the nearest whole number, a half up. A factor is written in
one way only (``0.25``, not ``.25`` or ``0.250``; 1 is left out), so that a network has one name in all records.
"""

from __future__ import annotations

import difflib
import importlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from functools import partial
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn

from bench.config import UserError, base_arch, unknown
from bench.networks import BasicBlock, Bottleneck, LeNet, PreActBlock, ResNet, Stem, mlp

#: The largest image, in pixels a side, that the stem ``auto`` does not shrink.
SMALL_IMAGE = 64


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One network, as data.

    ``build(classes=, channels=, scale=)`` makes it, with ``stem=`` too where ``own_stem`` is None, and ``image_size=``
    where it is ``sized``: where its first layer depends on the images' size. ``own_stem``: what it begins with, in
    place of a stem of the caller's choice (None). ``image_size``: pixels a side; None: any. ``narrowest``: its
    smallest number of channels or hidden units.
    """

    name: str
    summary: str
    source: str
    build: Callable[..., nn.Module]
    narrowest: int = 64
    image_size: int | None = None
    own_stem: Stem | None = None
    sized: bool = False


_HE_A = "He et al. 2016a, arXiv 1512.03385"
_HE_B = "He et al. 2016b, arXiv 1603.05027"


def _resnet(name: str, kind: Literal["basic", "bottleneck"], depths: tuple[int, ...]) -> Architecture:
    return Architecture(
        name=name,
        summary=f"ResNet of {'-'.join(map(str, depths))} {kind} blocks, post-activation",
        source=_HE_A,
        build=partial(ResNet, {"basic": BasicBlock, "bottleneck": Bottleneck}[kind], depths),
    )


def _resnet_v2(name: str, kind: Literal["basic", "bottleneck"], depths: tuple[int, ...]) -> Architecture:
    return Architecture(
        name=name,
        summary=f"ResNet of {'-'.join(map(str, depths))} {kind} blocks, pre-activation",
        source=_HE_B,
        build=partial(ResNet, partial(PreActBlock, bottleneck=kind == "bottleneck"), depths, preactivation=True),
    )


def _resnet_cifar(name: str, depths: tuple[int, ...]) -> Architecture:
    return Architecture(
        name=name,
        summary=f"ResNet for CIFAR: {'-'.join(map(str, depths))} basic blocks, widths 16-32-64, zero-padded shortcuts",
        source=f"{_HE_A}, section 4.2",
        build=partial(ResNet, partial(BasicBlock, pad_shortcut=True), depths, stem="small", width=16),
        narrowest=16,
        own_stem="small",
    )


_ROWS = (
    Architecture(
        name="lenet",
        summary="LeNet-5: conv 6, 16, 120 of 5x5, linear 84; relu, max pooling, no norm",
        source="LeCun et al. 1998, doi 10.1109/5.726791; as in BioTorch, arXiv 2108.13446",
        build=LeNet,
        narrowest=6,
        image_size=32,
        own_stem="small",
    ),
    _resnet_cifar("resnet20", (3, 3, 3)),
    _resnet_cifar("resnet56", (9, 9, 9)),
    _resnet("resnet18", "basic", (2, 2, 2, 2)),
    _resnet("resnet34", "basic", (3, 4, 6, 3)),
    _resnet("resnet50", "bottleneck", (3, 4, 6, 3)),
    _resnet("resnet101", "bottleneck", (3, 4, 23, 3)),
    _resnet("resnet152", "bottleneck", (3, 8, 36, 3)),
    _resnet_v2("resnet18v2", "basic", (2, 2, 2, 2)),
    _resnet_v2("resnet34v2", "basic", (3, 4, 6, 3)),
    _resnet_v2("resnet50v2", "bottleneck", (3, 4, 6, 3)),
    _resnet_v2("resnet101v2", "bottleneck", (3, 4, 23, 3)),
    _resnet_v2("resnet152v2", "bottleneck", (3, 8, 36, 3)),
)

ARCHITECTURES: dict[str, Architecture] = {row.name: row for row in _ROWS}

#: The form of the names of perceptrons, and what all of them share; `_mlp` makes the row of one.
MLP = Architecture(
    name="mlp:N[-N...]",
    summary="multilayer perceptron of these hidden layers, as in mlp:500, mlp:512-512; relu, no norm",
    source="Rumelhart et al. 1986, doi 10.1038/323533a0",
    build=mlp,
    own_stem="small",
    sized=True,
)


def _mlp(name: str) -> Architecture:
    hidden = name.removeprefix("mlp:").split("-")
    if not all(re.fullmatch("[1-9][0-9]{0,5}", units) for units in hidden):
        raise UserError(f"arch {name!r}: name the units of each hidden layer, 1 to 999999, as in mlp:500, mlp:512-512.")
    units = tuple(map(int, hidden))
    return replace(MLP, name=name, build=partial(mlp, units), narrowest=min(units))


_LIBRARIES = ("torchvision", "timm")

#: torchvision's networks that take one image size only (with their default arguments).
_TORCHVISION_SIZES = dict.fromkeys(("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14", "maxvit_t"), 224)

#: Without these, googlenet and inception_v3 return a tuple in training mode, and warn of their initialisation.
_TORCHVISION_OPTIONS = {name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")}


def _library_of(arch: str) -> str | None:
    prefix, colon, _ = arch.partition(":")
    return prefix if colon and prefix in _LIBRARIES else None


def _import(library: str) -> ModuleType:
    try:
        return importlib.import_module(library)
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"arch '{library}:...' needs {library}, which cannot be imported ({reason}); "
            f"install the {library} that belongs to torch {torch.__version__}, or take another arch."
        ) from error


def _list_networks(library: str, module: ModuleType) -> list[str]:
    return list(module.models.list_models(module=module.models) if library == "torchvision" else module.list_models())


def _row_of(arch: str) -> Architecture:
    """The row of a built-in network, whatever its width; UserError for a name that is none."""
    base = base_arch(arch)
    if base.startswith("mlp:"):
        return _mlp(base)
    if base not in ARCHITECTURES:
        raise UserError(f"{unknown('arch', arch, ARCHITECTURES)} Or mlp:500, NAME@0.25, torchvision:NAME, timm:NAME.")
    return ARCHITECTURES[base]


def _factor_of(arch: str) -> Fraction:
    """The width of a built-in network; UserError if it is too small, or not written in the one way."""
    base, at, text = arch.partition("@")
    if not at:
        return Fraction(1)
    if not re.fullmatch(r"[0-9]{0,3}(\.[0-9]*)?", text) or text in ("", "."):
        raise UserError(f"arch {arch!r}: the width is a factor below 1000, as in {base}@0.25 or {base}@2.")
    canonical = f"{Decimal(text).normalize():f}"
    if canonical == "1" or canonical != text:
        raise UserError(f"arch {arch!r}: write {base if canonical == '1' else f'{base}@{canonical}'!r}, its one name.")
    factor, narrowest = Fraction(text), _row_of(arch).narrowest
    if not _scaled(factor, narrowest):
        raise UserError(f"arch {arch!r}: a width of {text} leaves no channel of {narrowest}; take a larger factor.")
    return factor


def _scaled(factor: Fraction, channels: int) -> int:
    """The nearest whole number, a half rounded up: exact, where floats would round some halves down."""
    return math.floor(factor * channels + Fraction(1, 2))


def check_arch(name: str) -> None:
    """Refuse an unknown network; nothing is built, and torchvision or timm only imported if the prefix names it.

    Errors: UserError for an unknown name (with the nearest), or for a library that cannot be imported.
    """
    library = _library_of(name)
    if library is None:
        _row_of(name)
        _factor_of(name)
        return
    if "@" in name:
        raise UserError(f"arch {name!r}: the networks of {library} have one width; write {base_arch(name)!r}.")
    given, networks = name.partition(":")[2], _list_networks(library, _import(library))
    if given not in networks:
        near = difflib.get_close_matches(given, networks, n=3)
        hint = (
            f"Did you mean {' or '.join(f'{library}:{n}' for n in near)}?"
            if near
            else f"See {library}'s list_models()."
        )
        raise UserError(f"unknown arch {name!r}: {library} has no such classifier. {hint}")


def required_image_size(arch: str) -> int | None:
    """The one image size, in pixels a side, that this network takes; None: any."""
    check_arch(arch)
    library, name = _library_of(arch), arch.partition(":")[2]
    if library is None:
        return _row_of(arch).image_size
    if library == "torchvision":
        return _TORCHVISION_SIZES.get(name)
    shipped = _import(library).models.get_pretrained_cfg(name)
    return int(shipped.input_size[-1]) if shipped is not None and shipped.fixed_input_size else None


def _own_stem(arch: str) -> Stem | None:
    """The kind of the stem that ``arch`` brings along, the libraries' being made for ImageNet; None: a choice."""
    return "imagenet" if _library_of(arch) else _row_of(arch).own_stem


def resolve_stem(stem: Literal["auto", "small", "imagenet"], *, arch: str, image_size: int) -> Stem:
    """The stem that the setting means: ``auto`` is small up to 64 pixels a side, the ImageNet stem above.

    Errors: UserError for a stem asked of a network that has no choice of it (lenet, resnet20, resnet56, mlp, the
    libraries'): the setting would have no effect. With ``auto`` the kind of its own is returned.
    """
    check_arch(arch)
    own = _own_stem(arch)
    if own is not None and stem != "auto":
        raise UserError(f"arch {arch!r} has no choice of stem: stem={stem} has no effect; remove it (or stem=auto).")
    if stem != "auto":
        return stem
    return own or ("small" if image_size <= SMALL_IMAGE else "imagenet")


def build(
    arch: str,
    *,
    classes: int,
    channels: int = 3,
    image_size: int | None = None,
    stem: Stem | None = None,
    seed: int = 0,
) -> nn.Module:
    """A new network with random weights, the same for the same seed; torch's random state stays as it was.

    ``stem``: as `resolve_stem` returns it; None: the network's own, or the ImageNet stem where it is a choice.
    ``image_size``: pixels a side of the images; an mlp cannot be built without.
    Errors: UserError for an unknown ``arch``, a missing library, or a stem or channels that it cannot have.
    """
    check_arch(arch)
    library, own = _library_of(arch), _own_stem(arch)
    if own is not None and stem not in (None, own):
        raise UserError(f"arch {arch!r} has no choice of stem and cannot have stem={stem}; remove it (or stem=auto).")
    if library is None and image_size is None and _row_of(arch).sized:
        raise UserError(f"arch {arch!r} is made for one size of images: give image_size.")
    if library == "torchvision" and channels != 3:
        raise UserError(f"arch {arch!r} takes images of 3 channels, not {channels}; try timm:NAME or a built-in arch.")
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also seed the accelerators that fork_rng leaves out here.
        torch.default_generator.manual_seed(seed)
        if library is not None:
            return _build_from(library, arch.partition(":")[2], classes, channels)
        row, scale = _row_of(arch), partial(_scaled, _factor_of(arch))
        choice: dict[str, Any] = {} if own else {"stem": stem or "imagenet"}
        if row.sized:
            choice["image_size"] = image_size
        return row.build(classes=classes, channels=channels, scale=scale, **choice)


def _build_from(library: str, name: str, classes: int, channels: int) -> nn.Module:
    """A library's network, without pretrained weights."""
    module = _import(library)
    if library == "timm":
        network: nn.Module = module.create_model(name, pretrained=False, num_classes=classes, in_chans=channels)
    else:
        options = _TORCHVISION_OPTIONS.get(name, {})
        network = module.models.get_model(name, weights=None, num_classes=classes, **options)
    return network
