"""The networks, by name. PyTorch alone; ``torchvision:NAME`` and ``timm:NAME`` are imported only when asked for.

To add a network, add a row to `ARCHITECTURES`. Convolutions are initialised as in torchvision's ResNet (He et
al. 2015: normal, fan_out, relu), linear layers and norms as PyTorch does. An asymmetric layer needs its own
output z once more on the way back, so nothing here writes into the output of a convolution or a linear layer:
activations and sums in place stand after a norm only.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.config import UserError, unknown

#: small: a 3x3 convolution of stride 1, no pooling. imagenet: 7x7 of stride 2, then 3x3 max pooling of stride 2.
Stem = Literal["small", "imagenet"]

#: The largest image, in pixels a side, that the stem ``auto`` does not shrink.
SMALL_IMAGE = 64


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """Post-activation block: relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x)))))), both 3x3; bn2 starts at zero.

    ``pad_shortcut``: option A in place of option B where the shape changes (see `_shortcut`).
    Source: He et al. 2016a, arXiv 1512.03385; the zero: Goyal et al. 2017, arXiv 1706.02677.
    """

    def __init__(self, inputs: int, width: int, stride: int, pad_shortcut: bool = False) -> None:
        super().__init__()
        self.outputs = width
        self.conv1, self.bn1 = _conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride, pad_shortcut)
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += shortcut
        return self.relu(out)  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """Post-activation block of 1x1, 3x3 (this one strides, as torchvision's does) and 1x1; bn3 starts at zero.

    Source: He et al. 2016a, arXiv 1512.03385; the zero: Goyal et al. 2017, arXiv 1706.02677.
    """

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.outputs = 4 * width
        self.conv1, self.bn1 = _conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, self.outputs, 1), nn.BatchNorm2d(self.outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, self.outputs, stride, pad=False)
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += shortcut
        return self.relu(out)  # type: ignore[no-any-return]


class PreActBlock(nn.Module):
    """Pre-activation block: norm and relu stand before each convolution, nothing after the sum.

    Two 3x3 convolutions, or 1x1, 3x3 and 1x1 (``bottleneck``); the first 3x3 strides. ``activate``: whether it
    starts with a norm; the network's first block does not, the stem has just done it. Where the shape changes,
    the shortcut is a 1x1 convolution of the activated input. Nothing starts at zero, as in He et al. (and timm
    by default): a zero in the last norm would be for ever, since relu has no gradient at 0, and one in the last
    convolution (Zhang et al. 2019, arXiv 1901.09321) leaves W no scale for the initial B to share.
    Source: He et al. 2016b, arXiv 1603.05027.
    """

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool, activate: bool = True) -> None:
        super().__init__()
        self.outputs = 4 * width if bottleneck else width
        kernels, widths = ((1, 3, 1), (width, width, self.outputs)) if bottleneck else ((3, 3), (width, width))
        self.relu, self.depth, self.activate, features = nn.ReLU(inplace=True), len(kernels), activate, inputs
        for i, (kernel, outputs) in enumerate(zip(kernels, widths, strict=True)):
            if i > 0 or activate:
                self.add_module(f"bn{i + 1}", nn.BatchNorm2d(features))
            self.add_module(f"conv{i + 1}", _conv(features, outputs, kernel, stride if i == kernels.index(3) else 1))
            features = outputs
        same = inputs == self.outputs and stride == 1
        self.downsample = None if same else _conv(inputs, self.outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.get_submodule("bn1")(x)) if self.activate else x
        shortcut = x if self.downsample is None else self.downsample(out)
        out = self.get_submodule("conv1")(out)
        for i in range(2, self.depth + 1):
            out = self.relu(self.get_submodule(f"bn{i}")(out))
            out = self.get_submodule(f"conv{i}")(out)
        return out + shortcut


class PadShortcut(nn.Module):
    """Option A of He et al. 2016a: every stride-th pixel, and zeros for the channels that x lacks; no parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.missing, self.stride = outputs - inputs, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.missing))


def _shortcut(inputs: int, outputs: int, stride: int, pad: bool) -> nn.Module | None:
    """The way around a post-activation block: None for the identity, else option A (``pad``) or option B."""
    if inputs == outputs and stride == 1:
        return None
    if pad:
        return PadShortcut(inputs, outputs, stride)
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """ResNet: stem, one stage of blocks per depth (the width doubles, the image halves), mean, linear layer.

    x: (n, channels, h, w), result: (n, classes). ``block(inputs, width, stride)`` makes a block. Of BasicBlock
    or Bottleneck with the ImageNet stem, the state_dict is torchvision's, key by key. ``preactivation``: the
    blocks are PreActBlocks; the first takes the stem's activation, and a norm and relu follow the last.
    Source: He et al. 2016a, arXiv 1512.03385; pre-activation: 2016b, arXiv 1603.05027 (ends: its appendix).
    """

    def __init__(
        self,
        block: Callable[..., BasicBlock | Bottleneck | PreActBlock],
        depths: tuple[int, ...],
        *,
        classes: int,
        channels: int,
        stem: Stem,
        width: int = 64,
        preactivation: bool = False,
    ) -> None:
        super().__init__()
        small = stem == "small"
        self.conv1 = _conv(channels, width, 3) if small else _conv(channels, width, 7, 2)
        self.bn1, self.relu = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, padding=1)
        self.stages, features = tuple(f"layer{i + 1}" for i in range(len(depths))), width
        for i, (name, depth) in enumerate(zip(self.stages, depths, strict=True)):
            blocks = []
            for j in range(depth):
                options = {"activate": False} if preactivation and i == j == 0 else {}
                blocks.append(block(features, width * 2**i, 2 if i > 0 and j == 0 else 1, **options))
                features = blocks[-1].outputs
            self.add_module(name, nn.Sequential(*blocks))
        self.last = nn.Sequential(nn.BatchNorm2d(features), nn.ReLU(inplace=True)) if preactivation else nn.Identity()
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(features, classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            out = self.get_submodule(name)(out)
        return self.fc(self.avgpool(self.last(out)).flatten(1))  # type: ignore[no-any-return]


class LeNet(nn.Module):
    """LeNet-5 on 32x32: 5x5 convolutions of 6, 16 and 120 channels, linear layers of 84 and classes.

    x: (n, channels, 32, 32), result: (n, classes). Relu and 2x2 max pooling, no norm: the form in which this
    field's tables use it (BioTorch's), where LeCun et al. had tanh and a trained average; C3 sees all six maps.
    Source: LeCun et al. 1998, doi 10.1109/5.726791; Sanfiz & Akrout 2021, arXiv 2108.13446.
    """

    def __init__(self, *, classes: int, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(channels, 6, 5), nn.Conv2d(6, 16, 5), nn.Conv2d(16, 120, 5)
        self.pool, self.relu = nn.MaxPool2d(2), nn.ReLU()
        self.fc1, self.fc2 = nn.Linear(120, 84), nn.Linear(84, classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pool(self.relu(self.conv1(x)))
        out = self.pool(self.relu(self.conv2(out)))
        out = self.relu(self.conv3(out)).flatten(1)
        return self.fc2(self.relu(self.fc1(out)))  # type: ignore[no-any-return]


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One network, as data.

    ``build(classes=, channels=)`` makes it, with ``stem=`` too where ``own_stem`` is None. ``own_stem``: the kind
    of the one stem that it has; None: the stem is the caller's choice. ``image_size``: pixels a side; None: any.
    """

    name: str
    summary: str
    source: str
    build: Callable[..., nn.Module]
    image_size: int | None = None
    own_stem: Stem | None = None


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
        own_stem="small",
    )


_ROWS = (
    Architecture(
        name="lenet",
        summary="LeNet-5: conv 6, 16, 120 of 5x5, linear 84; relu, max pooling, no norm",
        source="LeCun et al. 1998, doi 10.1109/5.726791; as in BioTorch, arXiv 2108.13446",
        build=LeNet,
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


def check_arch(name: str) -> None:
    """Refuse an unknown network; nothing is built, and torchvision or timm only imported if the prefix names it.

    Errors: UserError for an unknown name (with the nearest), or for a library that cannot be imported.
    """
    library = _library_of(name)
    if library is None:
        if name not in ARCHITECTURES:
            raise UserError(f"{unknown('arch', name, ARCHITECTURES)} Or torchvision:NAME, timm:NAME.")
        return
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
        return ARCHITECTURES[arch].image_size
    if library == "torchvision":
        return _TORCHVISION_SIZES.get(name)
    shipped = _import(library).models.get_pretrained_cfg(name)
    return int(shipped.input_size[-1]) if shipped is not None and shipped.fixed_input_size else None


def _own_stem(arch: str) -> Stem | None:
    """The kind of the stem that ``arch`` brings along, the libraries' being made for ImageNet; None: a choice."""
    return "imagenet" if _library_of(arch) else ARCHITECTURES[arch].own_stem


def resolve_stem(stem: Literal["auto", "small", "imagenet"], *, arch: str, image_size: int) -> Stem:
    """The stem that the setting means: ``auto`` is small up to 64 pixels a side, the ImageNet stem above.

    Errors: UserError for a stem asked of a network that has its own (lenet, resnet20, resnet56, the
    libraries'): the setting would have no effect. With ``auto`` the kind of its own is returned.
    """
    check_arch(arch)
    own = _own_stem(arch)
    if own is not None and stem != "auto":
        raise UserError(f"arch {arch!r} has its own stem: stem={stem} has no effect there; remove it (or stem=auto).")
    if stem != "auto":
        return stem
    return own or ("small" if image_size <= SMALL_IMAGE else "imagenet")


def build(arch: str, *, classes: int, channels: int = 3, stem: Stem | None = None, seed: int = 0) -> nn.Module:
    """A new network with random weights, the same for the same seed; torch's random state stays as it was.

    ``stem``: as `resolve_stem` returns it; None: the network's own, or the ImageNet stem where it is a choice.
    Errors: UserError for an unknown ``arch``, a missing library, or a stem or channels that it cannot have.
    """
    check_arch(arch)
    library, own = _library_of(arch), _own_stem(arch)
    if own is not None and stem not in (None, own):
        raise UserError(f"arch {arch!r} has its own {own} stem and cannot have stem={stem}; remove it (or stem=auto).")
    if library == "torchvision" and channels != 3:
        raise UserError(f"arch {arch!r} takes images of 3 channels, not {channels}; try timm:NAME or a built-in arch.")
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also seed the accelerators that fork_rng leaves out here.
        torch.default_generator.manual_seed(seed)
        if library is not None:
            return _build_from(library, arch.partition(":")[2], classes, channels)
        choice = {} if own else {"stem": stem or "imagenet"}
        return ARCHITECTURES[arch].build(classes=classes, channels=channels, **choice)


def _build_from(library: str, name: str, classes: int, channels: int) -> nn.Module:
    """A library's network, without pretrained weights."""
    module = _import(library)
    if library == "timm":
        network: nn.Module = module.create_model(name, pretrained=False, num_classes=classes, in_chans=channels)
    else:
        options = _TORCHVISION_OPTIONS.get(name, {})
        network = module.models.get_model(name, weights=None, num_classes=classes, **options)
    return network
