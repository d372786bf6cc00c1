"""The networks: geometry, keys and outputs of the standard form, initialisation, seeds, and what is refused."""

from __future__ import annotations

import copy
import hashlib
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import models, networks
from bench.learning.convert import convert
from bench.learning.layers import asymmetric_layers

SMALL = ("resnet18", "resnet34", "resnet50", "resnet18v2", "resnet34v2", "resnet50v2", "resnet20", "resnet56", "lenet")
DEEP = ("resnet101", "resnet152", "resnet101v2", "resnet152v2")

#: Trainable numbers: classes=1000 and 3 channels, the v2 ones as in timm 1.0.31's resnetv2_N; lenet, resnet20 and
#: resnet56 with 10 classes, counted by hand (lenet on one channel: LeCun's 60k, with a C3 that sees all maps).
COUNTS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnet18v2": 11_687_720,
    "resnet34v2": 21_795_880,
    "resnet50v2": 25_549_352,
    "resnet101v2": 44_541_480,
    "resnet152v2": 60_185_128,
    "lenet": 61_706,
    "resnet20": 269_722,
    "resnet56": 853_018,
}

#: Recorded from torchvision 0.28.0, 1000 classes: see `layout`.
TORCHVISION_LAYOUT = {
    "resnet18": "84fb10d9c6905a1c",
    "resnet34": "28f9096d51307499",
    "resnet50": "d7e4f8bb0a536344",
    "resnet101": "02c0f34f4842751f",
    "resnet152": "685c66205bc823aa",
}

#: Recorded from torchvision 0.28.0 with 5 classes: the logits of `picture` under the weights of `fill`.
TORCHVISION_LOGITS: dict[str, list[float]] = {
    "resnet18": [-5.3053617, 1.7950222, 1.7423069, -5.3871017, 8.9323444],
    "resnet50": [-307.4447677, 234.8623294, 661.9809868, 764.3936994, 492.1425694],
}


def layout(network: nn.Module) -> str:
    """A digest of the state_dict's keys and shapes, in order."""
    lines = (f"{key} {tuple(value.shape)}" for key, value in network.state_dict().items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def fill(network: nn.Module) -> nn.Module:
    """The same network with weights and statistics given by a formula, and in evaluation mode."""
    for i, (key, value) in enumerate(network.state_dict().items()):
        if not value.is_floating_point():
            continue
        wave = torch.sin(torch.arange(value.numel(), dtype=torch.float64) * 1.7 + i).reshape(value.shape)
        if value.ndim > 1:
            value.copy_(wave * value[0].numel() ** -0.5)
        else:
            value.copy_(1 + wave / 2 if key.endswith(("weight", "running_var")) else wave / 10)
    return network.eval()


def picture() -> Tensor:
    return torch.sin(torch.arange(3 * 64 * 64) * 0.37).reshape(1, 3, 64, 64)


def picture_size(arch: str) -> int:
    return models.required_image_size(arch) or 8


def layers_of(network: nn.Module) -> list[Any]:
    return [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def build(arch: str, **options: Any) -> Any:
    """The network, typed loosely: the tests look into its parts by name."""
    return models.build(arch, **{"classes": 5, **options})


def build_small(arch: str, **options: Any) -> Any:
    return build(arch, stem="small", **options)


# ---- the registry ----


def test_registry_names_exactly_the_promised_networks() -> None:
    assert set(models.ARCHITECTURES) == {*SMALL, *DEEP}
    for name, row in models.ARCHITECTURES.items():
        assert row.name == name
        assert row.summary
        assert "\n" not in row.summary
        assert any(mark in row.source for mark in ("arXiv", "doi"))


@pytest.mark.parametrize("arch", sorted(COUNTS))
def test_parameter_counts_of_the_literature(arch: str) -> None:
    classes, channels = (1000, 3) if models.ARCHITECTURES[arch].own_stem is None else (10, 1 if arch == "lenet" else 3)
    with torch.device("meta"):
        network = build(arch, classes=classes, channels=channels)
    assert sum(p.numel() for p in network.parameters()) == COUNTS[arch]


# ---- the standard form is torchvision's ----


@pytest.mark.parametrize("arch", sorted(TORCHVISION_LAYOUT))
def test_keys_and_shapes_recorded_from_torchvision(arch: str) -> None:
    with torch.device("meta"):
        assert layout(build(arch, classes=1000)) == TORCHVISION_LAYOUT[arch]


@pytest.mark.parametrize("arch", sorted(TORCHVISION_LOGITS))
def test_outputs_recorded_from_torchvision(arch: str) -> None:
    with torch.no_grad():
        logits = fill(build(arch, classes=5))(picture())[0]
    torch.testing.assert_close(logits, torch.tensor(TORCHVISION_LOGITS[arch]), rtol=1e-4, atol=1e-5)


# ---- geometry ----


@pytest.mark.parametrize("arch", SMALL)
def test_smallest_images_and_one_channel(arch: str) -> None:
    """8x8 pixels (lenet: 32x32) through a training step: finite, and every layer gets its gradient."""
    network = build_small(arch, channels=1)
    size = picture_size(arch)
    logits = network(torch.randn(4, 1, size, size, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (4, 5)
    F.cross_entropy(logits, torch.arange(4)).backward()  # type: ignore[no-untyped-call]
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("arch", DEEP)
@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_deep_networks_have_their_shape(arch: str, stem: networks.Stem) -> None:
    with torch.device("meta"):
        network = build(arch, classes=11, channels=2, stem=stem)
        assert network(torch.empty(2, 2, 8, 8)).shape == (2, 11)


def sizes_after(network: Any, names: tuple[str, ...], size: int) -> list[tuple[int, ...]]:
    shapes = []
    hooks = [
        network.get_submodule(n).register_forward_hook(lambda *a: shapes.append(tuple(a[2].shape[1:]))) for n in names
    ]
    network(torch.empty(2, 3, size, size, device="meta"))
    for hook in hooks:
        hook.remove()
    return shapes


@pytest.mark.parametrize("arch", ["resnet50", "resnet50v2"])
@pytest.mark.parametrize(("stem", "size", "expected"), [("imagenet", 224, (112, 56, 7)), ("small", 32, (32, 32, 4))])
def test_stem_geometry(arch: str, stem: networks.Stem, size: int, expected: tuple[int, ...]) -> None:
    with torch.device("meta"):
        network = build(arch, classes=2, stem=stem)
    after_stem, after_first, after_last = expected
    assert sizes_after(network, ("conv1", "layer1", "layer4"), size) == [
        (64, after_stem, after_stem),
        (256, after_first, after_first),
        (2048, after_last, after_last),
    ]
    kernel, stride = ((7, 7), (2, 2)) if stem == "imagenet" else ((3, 3), (1, 1))
    assert (network.conv1.kernel_size, network.conv1.stride, network.conv1.bias) == (kernel, stride, None)
    assert any(isinstance(m, nn.MaxPool2d) for m in network.modules()) == (stem == "imagenet")


def test_without_a_stem_the_standard_form_is_built() -> None:
    with torch.device("meta"):
        assert build("resnet18", classes=2).conv1.kernel_size == (7, 7)


@pytest.mark.parametrize(("arch", "layers"), [("resnet20", 20), ("resnet56", 56)])
def test_cifar_resnets_have_their_depth_and_parameter_free_shortcuts(arch: str, layers: int) -> None:
    with torch.device("meta"):
        network = build(arch, classes=10)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(layers_of(network)) == layers
    assert {m.kernel_size for m in convolutions} == {(3, 3)}
    assert sum(isinstance(m, networks.PadShortcut) for m in network.modules()) == 2
    assert sizes_after(network, ("layer1", "layer2", "layer3"), 32) == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_option_a_shortcut_by_hand() -> None:
    x = torch.arange(1.0, 19.0).reshape(1, 2, 3, 3)
    expected = torch.tensor([[[1.0, 3.0], [7.0, 9.0]], [[10.0, 12.0], [16.0, 18.0]], [[0.0] * 2] * 2, [[0.0] * 2] * 2])
    assert torch.equal(networks.PadShortcut(2, 4, 2)(x), expected[None])


def test_lenet_layers() -> None:
    shapes = [tuple(m.weight.shape) for m in layers_of(build_small("lenet", classes=10, channels=1))]
    assert shapes == [(6, 1, 5, 5), (16, 6, 5, 5), (120, 16, 5, 5), (84, 120), (10, 84)]


# ---- perceptrons ----


def test_mlp_layers_and_outputs_by_hand() -> None:
    network = build("mlp:7-4", classes=3, channels=2, image_size=5).double()
    layers = layers_of(network)
    assert [(m.in_features, m.out_features, m.bias is not None) for m in layers] == [
        (50, 7, True),
        (7, 4, True),
        (4, 3, True),
    ]
    x = torch.randn(6, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = x.reshape(6, 50)
    for i, layer in enumerate(layers):
        h = h @ layer.weight.T + layer.bias
        h = h.clamp(min=0) if i < 2 else h
    torch.testing.assert_close(network(x), h)


def test_mlp_begins_as_torchs_linear_layers_do() -> None:
    network = build("mlp:30", classes=10, channels=1, image_size=28, seed=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        expected = [nn.Linear(784, 30), nn.Linear(30, 10)]
    for mine, theirs in zip(layers_of(network), expected, strict=True):
        assert torch.equal(mine.weight, theirs.weight)
        assert torch.equal(mine.bias, theirs.bias)


@pytest.mark.parametrize("arch", ["mlp:500", "mlp:512-512", "lenet@0.5", "resnet18@0.03125"])
def test_converted_networks_keep_their_outputs_and_with_b_of_w_their_gradient(arch: str) -> None:
    """All layers are swapped; with B = W they are backprop."""
    plain = build(arch, stem=None if arch != "resnet18@0.03125" else "small", image_size=32, channels=1).double()
    swapped = copy.deepcopy(plain)
    report = convert(swapped, "feedback")
    assert len(report.swapped) == len(layers_of(plain))
    assert report.kept == {}
    with torch.no_grad():
        for layer in asymmetric_layers(swapped).values():
            assert layer.feedback is not None
            layer.feedback.copy_(layer.weight)
    x = torch.randn(4, 1, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for network in (plain, swapped):
        F.cross_entropy(network(x), torch.arange(4)).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(swapped(x), plain(x))
    theirs = dict(swapped.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(theirs[name].grad, parameter.grad)


# ---- widths ----


def widths_of(arch: str, **options: Any) -> list[int]:
    """The outputs of every convolution, norm and linear layer but the last, whose outputs are classes."""
    with torch.device("meta"):
        network = build(arch, image_size=32, **options)
    kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
    return [m.weight.shape[0] for m in network.modules() if isinstance(m, kinds)][:-1]


@pytest.mark.parametrize("factor", ["0.25", "0.3", "0.1", "2", "1.75"])
@pytest.mark.parametrize("arch", [*SMALL, "mlp:500-33"])
def test_a_width_multiplies_every_number_of_channels(arch: str, factor: str) -> None:
    exact = Decimal(factor)
    expected = [int((exact * n).quantize(Decimal(1), ROUND_HALF_UP)) for n in widths_of(arch)]
    assert widths_of(f"{arch}@{factor}") == expected
    with torch.device("meta"):
        size = picture_size(arch)
        network = build(f"{arch}@{factor}", channels=1, image_size=size)
        assert network(torch.empty(2, 1, size, size)).shape == (2, 5)


def test_known_widths() -> None:
    assert widths_of("lenet@2") == [12, 32, 240, 168]
    assert widths_of("lenet@0.25") == [2, 4, 30, 21]  # 6/4 is a half: rounded up
    assert widths_of("mlp:512@0.5") == [256]
    assert sorted(set(widths_of("resnet18@0.25"))) == [16, 32, 64, 128]
    with torch.device("meta"):
        assert sum(p.numel() for p in build("resnet18@0.25", classes=10, stem="small").parameters()) == 701_466


# ---- what asymmetric layers rely on ----


def overwritten(network: nn.Module, x: Tensor) -> list[str]:
    """The convolutions and linear layers whose input or output somebody writes into before the pass is over."""
    seen: list[tuple[str, Tensor, int]] = []
    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(
                lambda _, inputs, out, name=name: seen.extend((name, t, t._version) for t in (inputs[0], out))
            )
    network(x)
    return [name for name, tensor, version in seen if tensor._version != version]


@pytest.mark.parametrize("arch", SMALL)
def test_nothing_writes_into_a_layers_input_or_output(arch: str) -> None:
    size = picture_size(arch)
    assert overwritten(build_small(arch), torch.zeros(2, 3, size, size)) == []


def test_writing_into_a_layers_output_would_be_seen() -> None:
    assert overwritten(nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(inplace=True)), torch.zeros(2, 3, 8, 8)) == ["0"]


# ---- pre-activation ----


def order_in(block: nn.Module, x: Tensor) -> str:
    """What runs in a block, in order: c(onvolution), n(orm), r(elu)."""
    letters: list[str] = []
    for kind, letter in ((nn.Conv2d, "c"), (nn.BatchNorm2d, "n"), (nn.ReLU, "r")):
        for module in block.modules():
            if isinstance(module, kind):
                module.register_forward_hook(lambda *_, letter=letter: letters.append(letter))
    block(x)
    return "".join(letters)


@pytest.mark.parametrize(
    ("arch", "first", "changing", "plain"),
    [
        ("resnet18", "cnrcnr", "cncnrcnr", "cnrcnr"),
        ("resnet50", "cncnrcnrcnr", "cncnrcnrcnr", "cnrcnrcnr"),
        ("resnet18v2", "cnrc", "nrccnrc", "nrcnrc"),
        ("resnet50v2", "ccnrcnrc", "nrccnrcnrc", "nrcnrcnrc"),
    ],
)
def test_order_of_norm_relu_and_convolution(arch: str, first: str, changing: str, plain: str) -> None:
    with torch.device("meta"):
        network = build(arch, classes=2)
        x = torch.empty(2, 64, 8, 8)
        assert order_in(network.layer1[0], x) == first
        x = network.layer1(x)
        assert order_in(network.layer2[0], x) == changing
        assert order_in(network.layer2[1], network.layer2[0](x)) == plain


def plain_preactivation(weights: dict[str, Tensor], x: Tensor, depths: tuple[int, ...], convolutions: int) -> Tensor:
    """He et al. 2016b written down from the paper, small stem, training mode: functions only, nothing in place."""

    def activate(x: Tensor, norm: str) -> Tensor:
        return F.relu(F.batch_norm(x, None, None, weights[f"{norm}.weight"], weights[f"{norm}.bias"], training=True))

    def convolve(x: Tensor, name: str, stride: int = 1) -> Tensor:
        kernel = weights[f"{name}.weight"]
        return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    strided = 1 if convolutions == 2 else 2
    x = activate(convolve(x, "conv1"), "bn1")
    for stage, depth in enumerate(depths, start=1):
        for j in range(depth):
            name, stride = f"layer{stage}.{j}", 2 if stage > 1 and j == 0 else 1
            active = x if stage == 1 and j == 0 else activate(x, f"{name}.bn1")
            projected = f"{name}.downsample.weight" in weights
            shortcut = convolve(active, f"{name}.downsample", stride) if projected else x
            branch = convolve(active, f"{name}.conv1", stride if strided == 1 else 1)
            for k in range(2, convolutions + 1):
                branch = convolve(activate(branch, f"{name}.bn{k}"), f"{name}.conv{k}", stride if strided == k else 1)
            x = shortcut + branch
    pooled = activate(x, "last.0").mean((2, 3))
    return F.linear(pooled, weights["fc.weight"], weights["fc.bias"])


@pytest.mark.parametrize(
    ("arch", "depths", "convolutions"), [("resnet18v2", (2,) * 4, 2), ("resnet50v2", (3, 4, 6, 3), 3)]
)
def test_preactivation_against_the_paper_written_down(arch: str, depths: tuple[int, ...], convolutions: int) -> None:
    network = build_small(arch).double()
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = plain_preactivation(network.state_dict(), x, depths, convolutions)
        torch.testing.assert_close(network(x), expected, rtol=1e-9, atol=1e-9)


# ---- initialisation and seeds ----


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet20", "resnet56"])
def test_exactly_the_last_norm_of_each_block_starts_at_zero(arch: str) -> None:
    network = build_small(arch)
    zero = {name for name, p in network.named_parameters() if name.endswith("weight") and not p.any()}
    blocks = {name for name, m in network.named_modules() if isinstance(m, (networks.BasicBlock, networks.Bottleneck))}
    last = "bn3" if arch == "resnet50" else "bn2"
    assert zero == {f"{name}.{last}.weight" for name in blocks}


def test_a_fresh_post_activation_block_is_its_shortcut() -> None:
    x = torch.rand(2, 64, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(build_small("resnet18").layer1[1](x), x)


def test_preactivation_starts_without_zeros_and_every_weight_learns_at_once() -> None:
    network = build_small("resnet18v2")
    network(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    for name, parameter in network.named_parameters():
        if name.endswith("weight"):
            assert parameter.any(), name
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


@pytest.mark.parametrize(
    ("arch", "layer"), [("resnet18", "layer4.0.conv1"), ("resnet18v2", "layer3.0.conv1"), ("lenet", "conv3")]
)
def test_convolutions_start_normal_with_he_scale(arch: str, layer: str) -> None:
    """std = sqrt(2 / (out·kh·kw)); the bounds are six standard errors of it, of the mean and of the fourth moment."""
    weight = build_small(arch).get_submodule(layer).weight.detach().double()
    scaled = weight / (2 / (weight.shape[0] * weight[0, 0].numel())) ** 0.5
    error = 6 * weight.numel() ** -0.5
    assert abs(scaled.std() - 1) < error * 0.5**0.5
    assert abs(scaled.mean()) < error
    assert abs((scaled**4).mean() - 3) < error * 96**0.5


@pytest.mark.parametrize("arch", ["resnet18", "resnet18v2", "resnet20", "lenet"])
def test_the_seed_alone_decides_and_global_random_state_stays(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(seed: int) -> None:
        raise AssertionError(f"the accelerators' generators were seeded with {seed}")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    before = torch.get_rng_state()
    first = build_small(arch, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    again, other = build_small(arch, seed=1).state_dict(), build_small(arch, seed=2).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    convolutions = [key for key, value in first.items() if value.ndim == 4]
    assert all(not torch.equal(first[key], other[key]) for key in convolutions)


def test_a_copy_is_independent() -> None:
    """Modules are found by name, so a deep copy must run its own layers (averaging and evaluation copy networks)."""
    network = build_small("resnet20").eval()
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(float("nan"))
        assert torch.isfinite(twin(torch.zeros(1, 3, 8, 8))).all()
