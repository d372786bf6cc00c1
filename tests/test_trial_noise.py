"""Noise in a trial's training, and the area under it: the same from the same seeds, and nobody else's business."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import trial as module
from bench.checkpoint import load_weights, read_checkpoint
from bench.config import TrialConfig, TrialResult, UserError
from bench.curves import area
from bench.evaluators.accuracy import BATCH, accuracy
from bench.evaluators.alignment import error_alignment
from bench.evaluators.robustness import noisy_accuracy
from bench.learning.convert import convert
from bench.training import Diverged, Trial, prepare, train_epoch
from bench.trial import resume, run_trial

VOLATILE = {"seconds", "epoch_seconds", "train_seconds"}
COEFFICIENTS: dict[str, dict[str, float]] = {
    "symmetric": {"decay": 0.5, "self": 0.5},
    "mirror": {"amp": 1e-3, "decay": 0.1},
    "information": {"amp": 1e-4, "null": 1e-4, "decay": 0.1},
}
EVALUATED = {"noise_levels": [0.2, 0.6], "noise_draws": 2}
LEVELS = (0.5, 1.5)
UPDATE = {"noise_site": "update", "noise_levels": list(LEVELS)}


def small(rule: str = "feedback", **changes: Any) -> TrialConfig:
    base = {"arch": "lenet", "epochs": 2, "batch_size": 32, "train_examples": 64, "lr": 0.05}
    return TrialConfig.from_dict({"rule": rule, "coefficients": COEFFICIENTS.get(rule, {}), **base, **changes})


def still(metrics: Mapping[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if k not in VOLATILE}


def steady(result: TrialResult) -> list[dict[str, float]]:
    return [still(epoch) for epoch in result.history]


class Killed(BaseException):
    """Stands for the end of a worker."""


@contextmanager
def killed_at(save: int, *, before: bool = False) -> Iterator[None]:
    """Within, a run ends at this save of a state (from 1): right after it, or right before."""
    original, count = module.save, 0

    def dying(trial: Trial, path: Path) -> None:
        nonlocal count
        count += 1
        if not (before and count == save):
            original(trial, path)
        if count == save:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "save", dying)
        with pytest.raises(Killed):
            yield


# --- noise in the updates --------------------------------------------------------------------------------


def test_a_noise_of_zero_is_training_without() -> None:
    plain, zero = small(), TrialConfig.from_dict({**small().to_dict(), "update_noise": 0})
    assert prepare(zero).noise is None
    assert steady(run_trial(zero)) == steady(run_trial(plain))


@pytest.mark.parametrize("rule", ["feedback", "symmetric", "kolen-pollack"])
def test_noisy_training_is_reproducible_and_goes_on_from_a_checkpoint(rule: str, tmp_path: Path) -> None:
    config = small(rule, arch="resnet20", update_noise=0.5)
    whole = run_trial(config, read_test=True)
    assert steady(run_trial(config)) == steady(whole)
    others = (config, config.replace(update_noise=0.0), config.replace(update_noise=0.6), config.replace(seed=1))
    firsts = [run_trial(other.replace(epochs=1)).history[0]["val_loss"] for other in others]  # all of it is warm-up
    assert firsts[0] == whole.history[0]["val_loss"]
    assert len(set(firsts)) == 4

    checkpoint = str(tmp_path / "state.pt")
    with killed_at(1):
        run_trial(config, checkpoint=checkpoint)
    assert read_checkpoint(Path(checkpoint))["epoch"] == 1
    resumed = run_trial(config, checkpoint=checkpoint, read_test=True)
    assert steady(resumed) == steady(whole)
    assert still(resumed.metrics) == still(whole.metrics)


def after_one_step(rule: str, *, epoch: int = 0, **changes: Any) -> dict[str, Tensor]:
    """The parameters after an epoch that is one step long."""
    trial = prepare(small(rule, train_examples=32, schedule="constant", warmup_epochs=0.0, **changes))
    trial.epoch = epoch
    train_epoch(trial)
    return {name: p.detach().clone() for name, p in trial.model.named_parameters()}


def noise_of_a_step(rule: str, epoch: int, **changes: Any) -> dict[str, Tensor]:
    """What σ = 2 adds to the forward parameters, at a learning rate of 0.05."""
    quiet, noisy = (after_one_step(rule, epoch=epoch, update_noise=sigma, **changes) for sigma in (0.0, 2.0))
    return {name: noisy[name] - quiet[name] for name in quiet if not name.endswith("feedback")}


def test_the_noise_on_W_is_the_same_for_every_rule_and_another_in_every_epoch_and_run() -> None:
    first = noise_of_a_step("backprop", 0)
    drawn = torch.cat([d.flatten() for d in first.values()])
    assert len(drawn) > 10_000
    assert drawn.std().item() == pytest.approx(0.05 * 2.0, rel=0.03)
    for rule in ("feedback", "sign", "symmetric", "kolen-pollack", "information"):
        torch.testing.assert_close(noise_of_a_step(rule, 0), first, rtol=0, atol=1e-6, msg=rule)
    for others in (noise_of_a_step("feedback", 1), noise_of_a_step("feedback", 0, seed=1)):
        other = torch.cat([d.flatten() for d in others.values()])
        assert abs(torch.corrcoef(torch.stack([drawn, other]))[0, 1].item()) < 0.05


@pytest.mark.parametrize("rule", ["symmetric", "kolen-pollack"])
def test_the_noise_is_on_what_the_configuration_says(rule: str) -> None:
    quiet = after_one_step(rule)
    found = {on: after_one_step(rule, update_noise=2.0, update_noise_on=on) for on in ("forward", "feedback", "both")}

    def moved(on: str) -> set[str]:
        return {name for name, value in found[on].items() if not torch.equal(value, quiet[name])}

    sends = {name for name in quiet if name.endswith("feedback")} - {next(n for n in quiet if n.endswith("feedback"))}
    forward = {name for name in quiet if not name.endswith("feedback")}
    assert (moved("forward"), moved("feedback"), moved("both")) == (forward, sends, forward | sends)
    for on, names in (("forward", forward), ("feedback", sends)):  # each draws the same without the other
        assert all(torch.equal(found[on][name], found["both"][name]) for name in names)


def test_noise_on_a_B_that_does_not_learn_is_refused() -> None:
    with pytest.raises(UserError, match="no B learns here") as error:
        run_trial(small("feedback", update_noise=0.1, update_noise_on="feedback"))
    assert "\n" not in str(error.value)


# --- noise in the trained network ------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["weight", "activation", "input"])
def test_the_area_is_measured_after_every_epoch_and_of_test_only_where_test_is_read(site: str, tmp_path: Path) -> None:
    config = small(noise_site=site, **EVALUATED)
    path = tmp_path / "state.pt"
    reported: list[Mapping[str, float]] = []
    result = run_trial(config, lambda _, metrics: reported.append(metrics), checkpoint=str(path))
    curve = {"val_area", f"val_acc/{site}/0.2", f"val_acc/{site}/0.6"}
    assert [{"epoch": float(i), **m} for i, m in enumerate(reported, start=1)] == result.history
    for metrics in (*reported, result.metrics):
        assert {name for name in metrics if "area" in name or "_acc/" in name} == curve
        points = [metrics[f"val_acc/{site}/{level}"] for level in (0.2, 0.6)]
        assert metrics["val_area"] == area((0.2, 0.6), points)
    assert not any(name.startswith("test") for name in result.metrics)

    tested = run_trial(config, checkpoint=str(path), read_test=True)
    assert still(tested.metrics) | still(result.metrics) == still(tested.metrics)
    trial = prepare(config)  # the same numbers, from the network that was kept
    load_weights(path, trial.model, read_checkpoint(path)["model"])
    for split in ("val", "test"):
        for level in (0.2, 0.6):
            found = noisy_accuracy(
                trial.model,
                lambda split=split: trial.data.batches(split, BATCH, device=trial.device),
                trial.data.normalize,
                site=site,
                level=level,
                draws=2,
                seed=config.seed,
            )
            assert tested.metrics[f"{split}_acc/{site}/{level}"] == found.mean
    assert tested.metrics["test_area"] == area((0.2, 0.6), [tested.metrics[f"test_acc/{site}/{n}"] for n in (0.2, 0.6)])


@pytest.mark.parametrize(
    "noise", [{"noise_site": s, **EVALUATED} for s in ("weight", "activation", "input")] + [UPDATE]
)
def test_measuring_noise_does_not_change_what_is_measured_else(noise: dict[str, Any]) -> None:
    config = small("information", arch="resnet20")
    plain, measured = run_trial(config), run_trial(config.replace(**noise))
    for before, after in zip(steady(plain), steady(measured), strict=True):
        assert {name: after[name] for name in before} == before
        assert set(after) - set(before) == {
            "val_area",
            *(f"val_acc/{noise['noise_site']}/{level:g}" for level in noise["noise_levels"]),
        }


@pytest.mark.parametrize("noise", [{"noise_site": "input", **EVALUATED}, UPDATE])
@pytest.mark.parametrize("read_test", [False, True])
def test_a_diverged_trial_has_its_area_at_chance(noise: dict[str, Any], read_test: bool) -> None:
    config = small("amp", arch="resnet20", coefficients={"amp": 1e6}, **noise)
    result = run_trial(config, read_test=read_test)
    assert (result.status, result.history) == ("diverged", [])
    assert result.reason is not None
    assert result.reason.startswith("epoch 1: ")
    splits = ("val", "test") if read_test else ("val",)
    assert {k: v for k, v in result.metrics.items() if "area" in k} == {f"{split}_area": 0.1 for split in splits}


# --- one network for each level --------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["feedback", "symmetric"])
def test_the_networks_in_step_are_those_of_separate_runs_bit_for_bit(rule: str, tmp_path: Path) -> None:
    result = run_trial(small(rule, **UPDATE), checkpoint=str(tmp_path / "state.pt"), read_test=True)
    apart = [
        run_trial(small(rule, update_noise=level), checkpoint=str(tmp_path / f"apart-{level}.pt"), read_test=True)
        for level in (0.0, *LEVELS)
    ]
    for i, epoch in enumerate(result.history):
        accuracies = [run.history[i]["val_acc"] for run in apart]
        assert [epoch["val_acc"], *(epoch[f"val_acc/update/{level:g}"] for level in LEVELS)] == accuracies
        assert epoch["val_area"] == area(LEVELS, accuracies[1:])
    tests = [run.metrics["test_acc"] for run in apart]
    assert [result.metrics["test_acc"], *(result.metrics[f"test_acc/update/{n:g}"] for n in LEVELS)] == tests
    assert result.metrics["test_area"] == area(LEVELS, tests[1:])
    for suffix, level in (("", 0.0), (".1", LEVELS[0]), (".2", LEVELS[1])):
        lane = read_checkpoint(tmp_path / f"state.pt{suffix}")["model"]
        alone = read_checkpoint(tmp_path / f"apart-{level}.pt")["model"]
        assert all(torch.equal(lane[name], alone[name]) for name in alone)


def test_the_seconds_are_those_of_all_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "train_epoch", lambda trial: {**train_epoch(trial), "seconds": 0.0})
    clock = iter(range(1000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))
    result = run_trial(small(**UPDATE))
    assert [epoch["seconds"] for epoch in result.history] == [3.0, 3.0]  # a tick for each training
    assert result.metrics["train_seconds"] == 6.0


#: The second network is lost in the second epoch, where the learning rate is a thousand times that of the first.
LATE = {
    "rule": "backprop",
    "lr": 1e-5,
    "schedule": "step",
    "step_epochs": [1.0],
    "step_factor": 1e3,
    "warmup_epochs": 0.0,
    "noise_site": "update",
    "noise_levels": [0.5, 1e4],
}


@pytest.mark.parametrize("lost_from", [1, 2])
def test_a_network_that_diverges_counts_at_chance_and_the_others_go_on(lost_from: int) -> None:
    config = small(**LATE) if lost_from == 2 else small(noise_site="update", noise_levels=[0.5, 1e9])
    name = f"acc/update/{config.noise_levels[1]:g}"
    result = run_trial(config, read_test=True)
    assert (result.status, result.reason) == ("finished", None)
    assert len(result.history) == 2
    apart = run_trial(config.replace(noise_site=None, noise_levels=[], update_noise=config.noise_levels[1]))
    assert apart.status == "diverged"
    assert len(apart.history) == lost_from - 1
    for i, epoch in enumerate(result.history):
        at = 0.1 if i + 1 >= lost_from else apart.history[i]["val_acc"]
        assert epoch[f"val_{name}"] == at
        assert epoch["val_area"] == area(config.noise_levels, [epoch["val_acc/update/0.5"], at])
    assert result.metrics[f"test_{name}"] == 0.1
    assert result.metrics["test_area"] == area(config.noise_levels, [result.metrics["test_acc/update/0.5"], 0.1])


@pytest.mark.parametrize("noise", [0.0, LEVELS[1]])
def test_a_network_that_fails_on_test_alone_is_lost_as_any_other(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    original = module.score

    def scored(trial: Trial, split: str) -> dict[str, float]:
        if split == "test" and trial.config.update_noise == noise:
            raise Diverged("the test loss is inf")
        return original(trial, split)

    monkeypatch.setattr(module, "score", scored)
    result = run_trial(small(**UPDATE), read_test=True)
    assert len(result.history) == 2
    if noise:
        assert result.status == "finished"
        assert result.metrics[f"test_acc/update/{noise:g}"] == 0.1
        assert result.metrics["val_acc"] == result.history[-1]["val_acc"]
    else:
        assert (result.status, result.reason) == ("diverged", "epoch 2: the test loss is inf")
        assert result.metrics["test_area"] == result.metrics["test_acc"] == 0.1


@pytest.mark.parametrize("config", [small("mirror", **UPDATE), small(**LATE)], ids=["whole", "one is lost"])
def test_killed_between_or_in_the_middle_of_networks_it_goes_on_to_the_same_result(
    config: TrialConfig, tmp_path: Path
) -> None:
    whole = run_trial(config, checkpoint=str(tmp_path / "whole.pt"), read_test=True)
    saves = 6 if config.rule == "mirror" else 5
    for save in range(1, saves + 1):
        for before in (True, False) if save == 3 else (False,):
            checkpoint = str(tmp_path / f"{save}-{before}.pt")
            with killed_at(save, before=before):
                run_trial(config, checkpoint=checkpoint)
            epochs: list[int] = []
            resumed = run_trial(config, lambda e, _, seen=epochs: seen.append(e), checkpoint=checkpoint, read_test=True)
            assert epochs == [1, 2]
            assert steady(resumed) == steady(whole)
            assert still(resumed.metrics) == still(whole.metrics)


def test_the_first_networks_checkpoint_belongs_to_the_run_and_to_no_other_grid(tmp_path: Path) -> None:
    """`bench train` looks whether it can go on from the file before it records anything."""
    config, path = small(epochs=1, **UPDATE), tmp_path / "state.pt"
    run_trial(config, checkpoint=str(path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state.pt", "state.pt.1", "state.pt.2"]
    trial = prepare(config)
    resume(trial, path)
    assert trial.epoch == 1
    with pytest.raises(UserError, match="belongs to another configuration"):
        run_trial(config.replace(noise_levels=[*LEVELS, 6.0]), checkpoint=str(path))


# --- what measuring leaves -------------------------------------------------------------------------------


class Breaks(nn.Module):
    """Passes its input on, or breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = False

    def forward(self, x: Tensor) -> Tensor:
        if self.broken:
            raise ConnectionError("the device is gone")
        assert not self.training
        return x


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("measure", ["accuracy", "angles"])
def test_every_module_keeps_its_own_mode_after_an_exception_too(measure: str, broken: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3), Breaks()).train()
    convert(model, "feedback")
    model[1].eval()  # a module of its own mind
    model[3].broken = broken
    x, labels = torch.ones(2, 4), torch.tensor([0, 1])
    with pytest.raises(ConnectionError) if broken else nullcontext():
        if measure == "accuracy":
            accuracy(model, [(x, labels)], lambda pixels: pixels)
        else:
            error_alignment(model, x, labels)
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
