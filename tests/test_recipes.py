"""The recipe of new runs: by data set, network and optimizer; and its precision, settled once, where runs begin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import place, search
from bench.cli import main
from bench.config import StudyConfig, TrialConfig, UserError
from bench.files import write_yaml
from bench.optimizers import OPTIMIZERS
from bench.place import Options, cpu_has_bf16, recipe_for
from bench.plans import Wanted, plan
from bench.recipes import RECIPES, recipe_of
from bench.robustness_plan import rules_of

OPTIONS = Options(device="cpu")
TINY = ["--arch", "lenet", "--epochs", "1", "--set", "train_examples=64", "--set", "warmup_epochs=0"]


@pytest.fixture
def bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has it."""
    monkeypatch.setattr(place, "cpu_has_bf16", lambda: True)


# --- optimizers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", RECIPES)
def test_every_data_set_has_a_recipe_for_every_optimizer(dataset: str) -> None:
    assert set(RECIPES[dataset]) == set(OPTIMIZERS)
    for optimizer, recipe in RECIPES[dataset].items():
        assert recipe.source
        for arch in ("resnet18", *recipe.archs):
            TrialConfig.from_dict({"rule": "backprop", "optimizer": optimizer, **recipe_of(dataset, arch, optimizer)})


def test_sgds_recipes_are_as_they_were() -> None:
    assert recipe_of("digits", "resnet18") == {"batch_size": 32, "lr": 0.02}
    assert recipe_of("cifar10", "resnet18") == {}


def test_set_optimizer_brings_its_recipe_and_set_goes_over_it() -> None:
    made = recipe_for("cifar10", "resnet18", {"optimizer": "adamw"}, OPTIONS)
    assert made == {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05}
    made = recipe_for("cifar10", "resnet18", {"optimizer": "muon", "lr": 0.5}, OPTIONS)
    assert made == {"optimizer": "muon", "lr": 0.5, "momentum": 0.6, "weight_decay": 0.01}
    with pytest.raises(UserError, match="Did you mean 'adamw'"):
        recipe_for("digits", "resnet18", {"optimizer": "adam"}, OPTIONS)


def test_a_configuration_that_is_known_gets_another_optimizers_recipe(tmp_path: Path) -> None:
    path = tmp_path / "best.yaml"
    write_yaml(path, TrialConfig(rule="feedback", arch="resnet20", lr=0.3, momentum=0.5).to_dict())

    def made(**changes: Any) -> TrialConfig:
        found = rules_of([], changes=changes, files=[path], options=Options(results=tmp_path))
        assert found["backprop"] == found["feedback"].replace(rule="backprop")
        return found["feedback"]

    assert (made().lr, made(optimizer="sgd").lr) == (0.3, 0.3)
    adamw = RECIPES["digits"]["adamw"].changes
    assert (made(optimizer="adamw").lr, made(optimizer="adamw").weight_decay) == (adamw["lr"], adamw["weight_decay"])
    assert made(optimizer="adamw", lr=0.004).lr == 0.004


# --- precision -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capabilities", "has"),
    [
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"avx2": True, "avx512_bf16": False}, False),
        ({}, False),
    ],
)
def test_what_a_cpu_has_is_torchs_word(
    capabilities: dict[str, bool], has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert cpu_has_bf16() is has


def test_a_torch_that_does_not_say_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not cpu_has_bf16()


@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize(
    ("given", "begun", "precision"),
    [
        ({}, None, "bf16"),
        ({"precision": "auto"}, None, "bf16"),
        ({"precision": "float32"}, None, "float32"),
        ({"precision": "float32"}, {"precision": "bf16"}, "float32"),  # and then the study says that it is another
        ({}, {"lr": 0.02}, None),
        ({}, {"precision": "auto"}, "auto"),
        ({}, {"precision": "bf16"}, "bf16"),
    ],
)
def test_auto_is_settled_where_nothing_is_begun(
    given: dict[str, Any], begun: dict[str, Any] | None, precision: str | None
) -> None:
    assert recipe_for("digits", "lenet", given, OPTIONS, begun=begun).get("precision") == precision


def test_what_was_begun_in_bf16_goes_on_in_it_on_any_cpu() -> None:
    assert "precision" not in recipe_for("digits", "lenet", {}, OPTIONS)
    assert recipe_for("digits", "lenet", {}, OPTIONS, begun={"precision": "bf16"})["precision"] == "bf16"


@pytest.mark.usefixtures("bf16")
def test_a_gpu_keeps_auto() -> None:
    elsewhere = Options(device="cuda", address="somewhere:1")
    assert "precision" not in recipe_for("digits", "lenet", {}, elsewhere)


@pytest.mark.usefixtures("bf16")
def test_an_auto_that_nobody_settled_is_float32_in_a_trial() -> None:
    from bench.training import prepare

    assert not prepare(TrialConfig(rule="backprop", arch="lenet"), device="cpu").bf16


class SeenError(Exception):
    """What the verb was about to run."""


@pytest.fixture
def recipe_of_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def stop(config: StudyConfig, *_: Any) -> None:
        raise SeenError(config)

    def run(*more: str) -> dict[str, Any]:
        with pytest.raises(SeenError) as seen:
            main(["search", "--rule", "symmetric", "--arch", "lenet", "--results", str(tmp_path), *more])
        config: StudyConfig = seen.value.args[0]
        folder = tmp_path / config.name
        folder.mkdir(exist_ok=True)
        if not (folder / "study.yaml").exists():
            write_yaml(folder / "study.yaml", {"config": config.to_dict()})
        return dict(config.recipe)

    monkeypatch.setattr(search, "check", stop)
    return run


def test_a_search_begun_without_goes_on_without(recipe_of_search: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "precision" not in recipe_of_search("--name", "old")
    monkeypatch.setattr(place, "cpu_has_bf16", lambda: True)
    assert "precision" not in recipe_of_search("--name", "old")
    assert recipe_of_search("--name", "new")["precision"] == "bf16"
    assert recipe_of_search("--name", "float", "--set", "precision=float32")["precision"] == "float32"
    assert (
        recipe_of_search("--name", "adam", "--set", "optimizer=adamw")["lr"] == RECIPES["digits"]["adamw"].changes["lr"]
    )
    monkeypatch.setattr(place, "cpu_has_bf16", lambda: False)
    assert recipe_of_search("--name", "new")["precision"] == "bf16"


@pytest.mark.usefixtures("bf16")
def test_the_searches_of_a_plan_have_one_precision(tmp_path: Path) -> None:
    wanted = [Wanted.of(rule, "lenet", "digits", "default") for rule in ("sign", "frozen")]
    options = Options(results=tmp_path, device="cpu")

    def precisions(begun: Any = None) -> set[str | None]:
        ready = plan(wanted, given={}, changes={}, options=options, begun=begun)
        return {each.config.recipe.get("precision") for each in ready.values()}

    assert precisions() == {"bf16"}
    assert precisions({}) == {None}
    old = StudyConfig(
        name=wanted[0].name, rule="sign", arch="lenet", dataset="digits", recipe=recipe_of("digits", "lenet")
    )
    (tmp_path / old.name).mkdir()
    write_yaml(
        tmp_path / old.name / "study.yaml",
        {"config": old.to_dict(), "runs_on": place.survey(options, TrialConfig(rule="sign", arch="lenet")).key},
    )
    assert precisions() == {None}


@pytest.mark.usefixtures("bf16")
def test_a_training_says_its_precision_and_goes_on_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def train(*more: str) -> dict[str, Any]:
        arguments = ["train", "--rule", "backprop", *TINY, "--results", str(tmp_path), "--json", "--device", "cpu"]
        assert main([*arguments, *more]) == 0
        return dict(json.loads(capsys.readouterr().out))

    old = str(tmp_path / "old.pt")
    with pytest.MonkeyPatch.context() as before:
        before.setattr(place, "cpu_has_bf16", lambda: False)
        first = train("--checkpoint", old)
    again, new = train("--checkpoint", old), train()
    found = [(row["config"]["precision"], row["provenance"]["precision"]) for row in (first, again, new)]
    assert found == [("auto", "float32"), ("auto", "float32"), ("bf16", "bf16")]


def test_a_measurement_begun_without_goes_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import robustness

    def stop(config: Any, *_: Any) -> None:
        raise SeenError(config)

    monkeypatch.setattr(robustness, "prepare_measurement", stop)

    def precision(name: str, *more: str) -> str:
        with pytest.raises(SeenError) as seen:
            main(["robustness", "--rule", "sign", "--site", "input", "--results", str(tmp_path), "--name", name, *more])
        config = seen.value.args[0].to_dict()
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        write_yaml(folder / "robustness.yaml", {"config": config})
        (found,) = {each["precision"] for each in config["rules"].values()}
        return str(found)

    assert precision("old") == "auto"
    monkeypatch.setattr(place, "cpu_has_bf16", lambda: True)
    assert (precision("old"), precision("new"), precision("own", "--set", "precision=float32")) == (
        "auto",
        "bf16",
        "float32",
    )
    monkeypatch.setattr(place, "cpu_has_bf16", lambda: False)
    assert precision("new") == "bf16"
