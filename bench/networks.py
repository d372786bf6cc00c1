"""The built-in networks: ResNet and its blocks, LeNet-5, the multilayer perceptron; `bench.models` has their names.

Convolutions are initialised as in torchvision's ResNet (He et al. 2015: normal, fan_out, relu), linear layers and
norms as PyTorch does. An asymmetric layer needs its own output z once more on the way back, so nothing here writes
into the output of a convolution or a linear layer: activations and sums in place stand after a norm only.
``scale`` gives the number of channels or units that a network of another width has in place of the given one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

#: small: a 3x3 convolution of stride 1, no pooling. imagenet: 7x7 of stride 2, then 3x3 max pooling of stride 2.
Stem = Literal["small", "imagenet"]

#: From a number of channels (or hidden units) of the published network to that of one of another width.
Scale = Callable[[int], int]


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """Post-activation block: relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x)))))), both 3x3; bn2 starts at zero.

    ``pad_shortcut``: option A in place of option B where the shape changes (see `_shortcut`).
    Source: He et al. 2016a, arXiv 1512.03385; the zero: Goyal et al. 2017, arXiv 1706.02677.
    """

    def __init__(self, inputs: int, width: int, stride: int, scale: Scale, pad_shortcut: bool = False) -> None:
        super().__init__()
        self.outputs = width = scale(width)
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

    def __init__(self, inputs: int, width: int, stride: int, scale: Scale) -> None:
        super().__init__()
        width, self.outputs = scale(width), scale(4 * width)
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

    def __init__(
        self, inputs: int, width: int, stride: int, scale: Scale, bottleneck: bool, activate: bool = True
    ) -> None:
        super().__init__()
        width, self.outputs = scale(width), scale(4 * width if bottleneck else width)
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

    x: (n, channels, h, w), result: (n, classes). ``block(inputs, width, stride, scale)`` makes a block. Of BasicBlock
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
        scale: Scale,
        width: int = 64,
        preactivation: bool = False,
    ) -> None:
        super().__init__()
        small, features = stem == "small", scale(width)
        self.conv1 = _conv(channels, features, 3) if small else _conv(channels, features, 7, 2)
        self.bn1, self.relu = nn.BatchNorm2d(features), nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, padding=1)
        self.stages = tuple(f"layer{i + 1}" for i in range(len(depths)))
        for i, (name, depth) in enumerate(zip(self.stages, depths, strict=True)):
            blocks = []
            for j in range(depth):
                options = {"activate": False} if preactivation and i == j == 0 else {}
                blocks.append(block(features, width * 2**i, 2 if i > 0 and j == 0 else 1, scale, **options))
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

    def __init__(self, *, classes: int, channels: int, scale: Scale) -> None:
        super().__init__()
        c1, c3, c5, f6 = map(scale, (6, 16, 120, 84))  # LeCun's names of these layers
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(channels, c1, 5), nn.Conv2d(c1, c3, 5), nn.Conv2d(c3, c5, 5)
        self.pool, self.relu = nn.MaxPool2d(2), nn.ReLU()
        self.fc1, self.fc2 = nn.Linear(c5, f6), nn.Linear(f6, classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pool(self.relu(self.conv1(x)))
        out = self.pool(self.relu(self.conv2(out)))
        out = self.relu(self.conv3(out)).flatten(1)
        return self.fc2(self.relu(self.fc1(out)))  # type: ignore[no-any-return]


def mlp(hidden: Sequence[int], *, classes: int, channels: int, image_size: int, scale: Scale) -> nn.Sequential:
    """Multilayer perceptron: the flattened image, linear layers of ``hidden`` units with relu, a linear layer.

    x: (n, channels, image_size, image_size), result: (n, classes). Source: Rumelhart et al. 1986, doi 10.1038/323533a0.
    """
    units = (channels * image_size**2, *map(scale, hidden))
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for i, (inputs, outputs) in enumerate(pairwise(units), start=1):
        layers[f"fc{i}"], layers[f"relu{i}"] = nn.Linear(inputs, outputs), nn.ReLU()
    layers[f"fc{len(units)}"] = nn.Linear(units[-1], classes)
    return nn.Sequential(layers)


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
