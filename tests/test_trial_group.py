"""Whole trials of two processes: what they measure, keep and decide is what one process does, but for rounding.

float32 sums in another order differ by some 1e-7, which a relu near 0, on or off, makes larger here and there: weights
move alike to 1e-3, losses agree to 1e-5, angles to 0.01 degrees, and accuracies exactly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.checkpoint import read_checkpoint
from bench.config import TrialConfig
from bench.group import Group
from bench.learning.rules import parse_rule
from bench.training import prepare
from bench.trial import run_trial
from together import together

#: Of a batch of 33, one process has 16 examples and the other 17.
BASE = {"dataset": "digits", "epochs": 2, "batch_size": 33, "train_examples": 132, "lr": 0.2, "warmup_epochs": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "backprop": {"arch": "resnet20", "rule": "backprop"},
    "feedback": {"arch": "resnet20", "rule": "feedback", "label_smoothing": 0.1},
    "sign": {"arch": "resnet20", "rule": "sign", "clip_norm": 1.0},
    "kolen-pollack": {"arch": "resnet20", "rule": "kolen-pollack", "clip_norm": 1.0},
    "symmetric": {"arch": "resnet20", "rule": "symmetric", "coefficients": {"decay": 0.5, "self": 0.5}},
    "mirror": {"rule": "mirror", "coefficients": {"amp": 1e-4, "decay": 0.1}, "accumulate": 3},
    "information": {
        "rule": "information",
        "coefficients": {"amp": 0.1, "null": 0.1, "decay": 0.1},
        "scaling": "normalized",
        "feedback_every": 2,
    },
    "activation": {
        "arch": "resnet20",
        "rule": "activation",
        "coefficients": {"amp": 0.3, "sparse": 0.3},
        "scaling": "normalized",
        "centered": True,
    },
    "a part for B": {"rule": "sparse", "coefficients": {"sparse": 1e-3}, "accumulate": 3, "feedback_fraction": 0.4},
    "resnet18": {
        "arch": "resnet18",
        "rule": "symmetric",
        "coefficients": {"decay": 0.5, "self": 0.5},
        "epochs": 1,
        "train_examples": 66,
    },
    "noise for B": {
        "rule": "information",
        "coefficients": {"amp": 1.0, "null": 0.3, "decay": 1.0},
        "feedback_input": "normal",
        "feedback_optimizer": "sgd",
        "feedback_lr": 0.02,
        "accumulate": 3,
    },
    "noisy updates": {"rule": "symmetric", "coefficients": {"decay": 0.5, "self": 0.5}, "update_noise": 0.1},
    "networks in step": {"rule": "feedback", "noise_site": "update", "noise_levels": [0.1, 0.5, 1e4]},
    "noisy activations": {
        "rule": "feedback",
        "noise_site": "activation",
        "noise_levels": [0.1, 0.3, 1.0],
        "noise_draws": 2,
    },
    "diverges": {"rule": "amp", "coefficients": {"amp": 1e6}},
}
SECONDS = ("seconds", "epoch_seconds", "train_seconds")


def config(name: str) -> TrialConfig:
    return TrialConfig.from_dict({**BASE, "arch": "lenet", **CASES[name]})


class Stopped(BaseException):
    """Raised out of a report, as the worker does."""


def stopped(config: TrialConfig, checkpoint: Path, group: Group | None) -> None:
    def report(epoch: int, _: Any) -> None:
        if epoch == 1:
            raise Stopped

    with pytest.raises(Stopped):
        run_trial(config, report, checkpoint=str(checkpoint), group=group)


def all_run(group: Group, folder: Path) -> dict[str, Any]:
    """Each process's results and reports; what is kept of the networks is the first one's."""
    found: dict[str, Any] = {}
    for name in CASES:
        reports: list[Any] = []
        path = str(folder / name)
        result = run_trial(
            config(name), lambda *heard, to=reports: to.append(heard), group=group, read_test=True, checkpoint=path
        )
        found[name] = {"result": result.to_dict(), "reports": reports}
    stopped(config("activation"), folder / "begun by two", group)
    result = run_trial(config("activation"), checkpoint=str(folder / "begun by one"), read_test=True, group=group)
    found["begun by one"] = {"result": result.to_dict()}
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path]:
    folder = tmp_path_factory.mktemp("two")
    stopped(config("activation"), folder / "begun by one", None)
    return together(all_run, 2, folder), folder


def compare(here: dict[str, Any], one: dict[str, Any]) -> None:
    assert (here["status"], here["reason"]) == (one["status"], one["reason"])
    assert here["metrics"].keys() == one["metrics"].keys()
    assert len(here["history"]) == len(one["history"])
    pairs = zip([*here["history"], here["metrics"]], [*one["history"], one["metrics"]], strict=True)
    for name, value, expected in ((k, h[k], o[k]) for h, o in pairs for k in o if k not in SECONDS):
        tolerance = 0.01 if "angle" in name else 0.0 if "acc" in name else 1e-5
        assert value == pytest.approx(expected, rel=tolerance, abs=tolerance), name


def compare_networks(name: str, here: Path, one: Path) -> None:
    """Within 1e-3 of how far a tensor has moved (and 1e-6 of its size); W and B must have moved much farther.

    At least within 1e-7, float32's resolution at 1: the gradient of a bias that stays near 0 is a sum that cancels.
    (Gains of norms in a residual branch hardly move at first: it starts with a gain of 0 at its end.)
    """
    states = [read_checkpoint(path)["model"] for path in (here, one)]
    start = prepare(config(name)).model.state_dict()
    assert states[0].keys() == states[1].keys() == start.keys()
    for key, expected in states[1].items():
        size, moved = float(expected.abs().max()), float((expected - start[key]).abs().max())
        torch.testing.assert_close(
            states[0][key], expected, rtol=0, atol=1e-3 * moved + max(1e-6 * size, 1e-7), msg=key
        )
        still = "feedback" in key and (key.startswith("conv1") or not parse_rule(config(name).rule).learns)
        assert still or expected.dim() < 2 or moved > 3e-5 * size, key


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_find_what_one_finds(name: str, two: tuple[list[Any], Path], tmp_path: Path) -> None:
    found, folder = two
    one = run_trial(config(name), checkpoint=str(tmp_path / "one"), read_test=True).to_dict()
    first, second = (process[name] for process in found)
    compare(first["result"], one)
    assert first["result"]["provenance"]["workers"] == 2
    assert "workers" not in one["provenance"]
    assert [epoch for epoch, _ in first["reports"]] == [h["epoch"] for h in one["history"]]
    for mine, other in zip(first["reports"], second["reports"], strict=True):  # their weights are equal, bit for bit
        assert {k: v for k, v in mine[1].items() if k not in SECONDS} == {
            k: v for k, v in other[1].items() if k not in SECONDS
        }
    if name == "diverges":
        assert one["status"] == "diverged"
        assert not (folder / name).exists()
        return
    compare_networks(name, folder / name, tmp_path / "one")
    lanes = sorted(path.name for path in tmp_path.glob("one.*"))
    assert lanes == (["one.1", "one.2"] if name == "networks in step" else [])  # the third diverges at once
    for lane in lanes:
        compare_networks(name, folder / lane.replace("one", name), tmp_path / lane)


@pytest.mark.slow
def test_a_checkpoint_of_two_is_one_for_one_and_the_other_way_round(
    two: tuple[list[Any], Path], tmp_path: Path
) -> None:
    found, folder = two
    whole = run_trial(config("activation"), read_test=True, checkpoint=str(tmp_path / "whole")).to_dict()
    assert read_checkpoint(folder / "begun by two")["epoch"] == 1
    compare(run_trial(config("activation"), read_test=True, checkpoint=str(folder / "begun by two")).to_dict(), whole)
    compare_networks("activation", folder / "begun by two", tmp_path / "whole")
    compare(found[0]["begun by one"]["result"], whole)
    compare_networks("activation", folder / "begun by one", tmp_path / "whole")
