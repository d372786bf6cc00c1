"""The names of networks: stems, image sizes, errors, and the networks of torchvision and timm."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import models, networks
from bench.cli import main
from bench.config import UserError, study_name
from bench.listing import listing
from bench.place import Options
from bench.recipes import RECIPES, recipe_of
from bench.space_files import load_space
from bench.transfer import TransferConfig, prepare_transfer
from bench.verbs.common import BAD_INPUT, check_name

# ---- settings and errors ----


@pytest.mark.parametrize(
    ("stem", "arch", "size", "expected"),
    [
        ("auto", "resnet18", 8, "small"),
        ("auto", "resnet50v2", 64, "small"),
        ("auto", "resnet18", 65, "imagenet"),
        ("small", "resnet18", 224, "small"),
        ("imagenet", "resnet18", 8, "imagenet"),
        ("auto", "lenet", 32, "small"),
        ("auto", "resnet20", 224, "small"),
    ],
)
def test_resolve_stem(stem: Any, arch: str, size: int, expected: str) -> None:
    resolved = models.resolve_stem(stem, arch=arch, image_size=size)
    assert resolved == expected
    with torch.device("meta"):
        models.build(arch, classes=2, stem=resolved)


@pytest.mark.parametrize("arch", ["lenet", "resnet20", "resnet56"])
@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_a_stem_without_effect_is_refused(arch: str, stem: networks.Stem) -> None:
    with pytest.raises(UserError, match=f"'{arch}' has no choice of stem: stem={stem} has no effect; remove it"):
        models.resolve_stem(stem, arch=arch, image_size=32)


@pytest.mark.parametrize("arch", ["lenet", "resnet20"])
def test_a_stem_that_cannot_be_is_refused(arch: str) -> None:
    with pytest.raises(UserError, match="has no choice of stem and cannot have stem=imagenet"):
        models.build(arch, classes=2, stem="imagenet")


def test_required_image_sizes() -> None:
    sizes = {arch: models.required_image_size(arch) for arch in models.ARCHITECTURES}
    assert {arch: size for arch, size in sizes.items() if size is not None} == {"lenet": 32}


@pytest.mark.parametrize("name", ["resnet51", "ResNet50", "", "keras:resnet50", "resnet50v3"])
def test_an_unknown_name_lists_the_valid_ones(name: str) -> None:
    refusals = []
    for ask in (
        lambda: models.check_arch(name),
        lambda: models.build(name, classes=2),
        lambda: models.required_image_size(name),
        lambda: models.resolve_stem("auto", arch=name, image_size=8),
    ):
        with pytest.raises(UserError, match="unknown arch") as caught:
            ask()
        refusals.append(str(caught.value))
    assert len(set(refusals)) == 1
    assert "\n" not in refusals[0]
    assert all(part in refusals[0] for part in (repr(name), "lenet, resnet101", "torchvision:NAME", "timm:NAME"))


def test_the_nearest_name_is_offered() -> None:
    with pytest.raises(UserError, match="Did you mean 'resnet50v2'"):
        models.check_arch("resnet50_v2")


# ---- perceptrons, and networks of another width ----


@pytest.mark.parametrize("name", ["mlp:", "mlp:0", "mlp:x", "mlp:-5", "mlp:5-", "mlp:0512", "mlp:1e3", "mlp:1000000"])
def test_hidden_layers_that_are_none(name: str) -> None:
    with pytest.raises(UserError, match="name the units of each hidden layer, 1 to 999999, as in mlp:500") as caught:
        models.check_arch(name)
    assert "\n" not in str(caught.value)


def test_an_mlp_is_made_for_one_size_of_images() -> None:
    assert models.required_image_size("mlp:500@0.5") is None
    with pytest.raises(UserError, match="'mlp:500' is made for one size of images: give image_size"):
        models.build("mlp:500", classes=2)


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("resnet18@1", "resnet18"),
        ("mlp:500@1.0", "mlp:500"),
        ("resnet18@0.250", "resnet18@0.25"),
        ("resnet18@.25", "resnet18@0.25"),
        ("lenet@02", "lenet@2"),
        ("lenet@2.", "lenet@2"),
    ],
)
def test_a_width_is_written_in_one_way(given: str, written: str) -> None:
    with pytest.raises(UserError, match=f"write '{re.escape(written)}', its one name"):
        models.check_arch(given)
    models.check_arch(written)


@pytest.mark.parametrize("width", ["", ".", "x", "-1", "1e3", "1000", "inf", "0.5@2", "1/4", " 2", "\u0662"])
def test_a_width_that_is_none(width: str) -> None:
    with pytest.raises(UserError, match=r"the width is a factor below 1000, as in lenet@0\.25 or lenet@2"):
        models.check_arch(f"lenet@{width}")


@pytest.mark.parametrize(
    ("least", "too_small"),
    [
        ("resnet18@0.0078125", "resnet18@0.0078"),
        ("resnet50v2@0.0078125", "resnet50v2@0.0078"),
        ("resnet20@0.03125", "resnet20@0.0312"),
        ("lenet@0.084", "lenet@0.083"),
        ("mlp:500-5@0.1", "mlp:500-5@0.09"),
        ("mlp:500@0.001", "mlp:500@0"),
    ],
)
def test_a_width_leaves_each_layer_a_channel(least: str, too_small: str) -> None:
    with pytest.raises(UserError, match=r"leaves no channel of \d+; take a larger factor"):
        models.check_arch(too_small)
    with torch.device("meta"):
        network = models.build(least, classes=2, stem=None, image_size=32)
        assert network(torch.empty(2, 3, 32, 32)).shape == (2, 2)
    assert min(p.shape[0] for p in network.parameters()) == 1


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_a_librarys_network_has_one_width(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    Library(monkeypatch, name)
    with pytest.raises(UserError, match=f"the networks of {name} have one width; write '{name}:net_a'"):
        models.check_arch(f"{name}:net_a@0.5")


@pytest.mark.parametrize("arch", ["lenet@2", "resnet20@0.5", "mlp:500", "mlp:512-512@0.5"])
def test_no_choice_of_stem_at_any_width(arch: str) -> None:
    assert models.resolve_stem("auto", arch=arch, image_size=28) == "small"
    with pytest.raises(UserError, match=f"'{arch}' has no choice of stem: stem=small has no effect"):
        models.resolve_stem("small", arch=arch, image_size=28)


def test_a_width_keeps_its_networks_stem_size_recipe_and_space(monkeypatch: pytest.MonkeyPatch) -> None:
    assert models.resolve_stem("auto", arch="resnet18@0.25", image_size=224) == "imagenet"
    assert models.required_image_size("lenet@2") == 32
    sgd = replace(RECIPES["digits"]["sgd"], archs={"lenet": {"lr": 0.5}})
    monkeypatch.setitem(RECIPES, "digits", {"sgd": sgd})
    assert recipe_of("digits", "lenet@2") == recipe_of("digits", "lenet")
    assert recipe_of("digits", "lenet")["lr"] == 0.5
    of = {arch: load_space("sparse", arch, space="reference") for arch in ("lenet@2", "lenet", "resnet18")}
    assert of["lenet@2"] == of["lenet"] != of["resnet18"]


def test_names_of_studies_differ_as_the_networks_do() -> None:
    archs = ("resnet18", "resnet18@0.25", "mlp:512-2", "mlp:512@2", "mlp:5122", "mlp:512", "lenet@2")
    names = [study_name("mirror", arch, "digits") for arch in archs]
    assert names[1:4] == ["mirror-resnet18x0.25-digits", "mirror-mlp-512-2-digits", "mirror-mlp-512x2-digits"]
    assert len(set(names)) == len(names)
    assert [check_name(name) for name in names] == names
    assert study_name("transfer-resnet18@0.25-to", "resnet18", "digits") == "transfer-resnet18x0.25-to-resnet18-digits"


def test_the_list_shows_the_forms_of_names() -> None:
    shown = [row["name"] for row in listing("networks")]
    assert shown[-4:] == ["mlp:N[-N...]", "NAME@F", "torchvision:NAME", "timm:NAME"]


@pytest.mark.parametrize("arch", ["resnet18@0.25", "mlp:20-10", "lenet@0.5"])
def test_commands_take_these_names(arch: str, tmp_path: Path) -> None:
    """Until the search is ready to run; and a transfer between two widths of one network."""
    options = Options(results=tmp_path, concurrent=1)
    budget = {"trials": 2, "epochs": 2}
    config = TransferConfig(
        name="t", rules=("symmetric",), source=arch, targets=("resnet20@0.25",), dataset="digits", configs=1, both=True
    )
    ready = prepare_transfer(config, given=budget, changes={}, options=options)
    assert {wanted.arch for wanted in ready.searches} == {arch, "resnet20@0.25"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["train", "search"])
def test_a_network_beyond_this_machines_memory_is_refused_in_one_line(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> nn.Module:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you asked for 9 bytes.\nmore")

    monkeypatch.setattr("bench.training.build", refuse)
    monkeypatch.chdir(tmp_path)
    assert main([verb, "--rule", "backprop", "--arch", "lenet@999"]) == BAD_INPUT
    said = capsys.readouterr().err.strip()
    assert re.fullmatch(r"bench: too little memory \(.*9 bytes.*\); take a smaller network, width, .*", said)


# ---- the libraries, played by stand-ins where they are absent ----


class Library:
    """A stand-in that keeps what it was asked for, and draws its weights from torch's generator."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.asked: dict[str, Any] = {}
        self.models: Any
        sizes = {"vit_small": SimpleNamespace(fixed_input_size=True, input_size=(3, 384, 384)), "net_a": None}
        self.models = SimpleNamespace(
            list_models=lambda module: ["net_a", "vit_b_16"] if module is self.models else [],
            get_model=self.make,
            get_pretrained_cfg=sizes.get,
        )
        self.list_models, self.create_model = lambda: ["net_a", "vit_small"], self.make
        monkeypatch.setitem(sys.modules, name, self)

    def make(self, name: str, **options: Any) -> nn.Module:
        self.asked = {"name": name, **options}
        return nn.Linear(2, options["num_classes"])


@pytest.mark.parametrize(
    ("name", "channels", "asked"),
    [("torchvision", 3, {"weights": None}), ("timm", 1, {"pretrained": False, "in_chans": 1})],
)
def test_a_librarys_network_comes_without_pretrained_weights(
    monkeypatch: pytest.MonkeyPatch, name: str, channels: int, asked: dict[str, Any]
) -> None:
    stand_in, before = Library(monkeypatch, name), torch.get_rng_state()

    def build_one(seed: int) -> Tensor:
        return next(models.build(f"{name}:net_a", classes=7, channels=channels, seed=seed).parameters())

    first, again, other = (build_one(seed) for seed in (4, 4, 5))
    assert stand_in.asked == {"name": "net_a", "num_classes": 7, **asked}
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_librarys_image_size(monkeypatch: pytest.MonkeyPatch) -> None:
    Library(monkeypatch, "torchvision")
    Library(monkeypatch, "timm")
    names = ("torchvision:net_a", "torchvision:vit_b_16", "timm:net_a", "timm:vit_small")
    assert [models.required_image_size(n) for n in names] == [None, 224, None, 384]


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_a_librarys_network_has_its_own_stem(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    Library(monkeypatch, name)
    assert models.resolve_stem("auto", arch=f"{name}:net_a", image_size=8) == "imagenet"
    for stem in ("small", "imagenet"):
        with pytest.raises(UserError, match=f"stem={stem} has no effect"):
            models.resolve_stem(stem, arch=f"{name}:net_a", image_size=8)
    with pytest.raises(UserError, match="no choice of stem and cannot have stem=small"):
        models.build(f"{name}:net_a", classes=2, stem="small")


def test_torchvision_takes_three_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    Library(monkeypatch, "torchvision")
    with pytest.raises(UserError, match="takes images of 3 channels, not 1; try timm:NAME"):
        models.build("torchvision:net_a", classes=2, channels=1)


@pytest.mark.parametrize("name", ["torchvision", "timm"])
@pytest.mark.parametrize(
    ("given", "hint"), [("net_b", "Did you mean {}:net_a"), ("qqq", "See {}'s list_models"), ("", "See")]
)
def test_an_unknown_name_of_a_library(monkeypatch: pytest.MonkeyPatch, name: str, given: str, hint: str) -> None:
    Library(monkeypatch, name)
    with pytest.raises(UserError, match=hint.format(name)) as caught:
        models.check_arch(f"{name}:{given}")
    assert f"{name} has no such classifier" in str(caught.value)


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_without_the_library_its_networks_are_refused_and_the_others_work(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for absent in ("torchvision", "timm"):
        monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(UserError, match=f"needs {name}, which cannot be imported .*; install the {name}") as caught:
        models.build(f"{name}:resnet18", classes=2)
    assert "\n" not in str(caught.value)
    for arch in models.ARCHITECTURES:
        models.check_arch(arch)
    assert models.build("lenet", classes=2)(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


def test_a_library_built_for_another_torch_is_refused_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(UserError, match="operator torchvision::nms does not exist"):
        models.check_arch("torchvision:resnet18")


# ---- the libraries themselves, where they are installed ----


def library(name: str) -> ModuleType:
    """torchvision or timm, or a skip that says why. A torchvision built for CUDA fails beside the CPU build of
    torch for want of two operators: then they are declared (never called here), and the import tried again."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed (pip install 'bench[vision]'); stand-ins and recorded numbers are tested")
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for half_imported in [m for m in sys.modules if m.split(".")[0] in ("torchvision", "timm")]:
        del sys.modules[half_imported]
    OPERATORS.append(torch.library.Library("torchvision", "FRAGMENT"))  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        OPERATORS[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    return importlib.import_module(name)


#: Keeps the declarations of `library` alive.
OPERATORS: list[torch.library.Library] = []


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_standard_form_gives_torchvisions_outputs(arch: str) -> None:
    """Same weights, same images: equal logits, training and (with the statistics of that pass) evaluation."""
    draw = torch.Generator().manual_seed(0)
    theirs = library("torchvision").models.get_model(arch, weights=None, num_classes=5)
    ours = models.build(arch, classes=5, seed=3)
    theirs.load_state_dict(ours.state_dict())
    for norm in (m for m in theirs.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5, generator=draw)
    ours.load_state_dict(theirs.state_dict())
    images = torch.rand(2, 3, 64, 64, generator=draw)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))
        assert torch.equal(ours.eval()(images), theirs.eval()(images))


def test_networks_of_torchvision() -> None:
    library("torchvision")
    with torch.device("meta"):
        googlenet = models.build("torchvision:googlenet", classes=7)
        assert googlenet(torch.empty(2, 3, 64, 64)).shape == (2, 7)
        vit = models.build("torchvision:vit_b_32", classes=7)
    assert vit.image_size == models.required_image_size("torchvision:vit_b_32")
    assert models.required_image_size("torchvision:resnet18") is None
    with pytest.raises(UserError, match="Did you mean torchvision:resnet50"):
        models.check_arch("torchvision:resnet51")
    with pytest.raises(UserError, match="no such classifier"):
        models.check_arch("torchvision:fasterrcnn_resnet50_fpn")


def test_networks_of_timm() -> None:
    library("timm")
    network = models.build("timm:resnet10t", classes=7, channels=1, seed=1)
    assert network.eval()(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    assert models.required_image_size("timm:resnet10t") is None
    assert models.required_image_size("timm:vit_tiny_patch16_384") == 384
    with pytest.raises(UserError, match="Did you mean timm:resnet10t"):
        models.check_arch("timm:resnet10tt")
