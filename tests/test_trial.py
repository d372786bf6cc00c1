"""One trial: the same from the same seeds, from any checkpoint; and every setting has the effect that it says."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import trial as module
from bench.checkpoint import read_checkpoint
from bench.config import TrialConfig, TrialResult, UserError
from bench.learning.layers import asymmetric_layers
from bench.provenance import code_of, provenance
from bench.training import lr_factor, prepare, train_epoch, who_learns
from bench.trial import alignment, run_trial

VOLATILE = {"seconds", "epoch_seconds", "train_seconds"}


def small(**changes: Any) -> TrialConfig:
    base = {
        "rule": "feedback",
        "arch": "resnet20",
        "dataset": "digits",
        "epochs": 2,
        "batch_size": 32,
        "train_examples": 64,
        "lr": 0.05,
    }
    return TrialConfig.from_dict({**base, **changes})


def steady(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in epoch.items() if k not in VOLATILE} for epoch in history]


def test_the_same_seed_gives_the_same_result_bit_for_bit_and_another_does_not() -> None:
    config = small(rule="activation", coefficients={"amp": 1e-3, "sparse": 1e-3})
    first, again, other = run_trial(config), run_trial(config), run_trial(config.replace(seed=1))
    assert steady(first.history) == steady(again.history)
    assert first.status == "finished"
    assert steady(first.history) != steady(other.history)


def test_no_global_random_state_is_read_or_moved() -> None:
    torch.manual_seed(1)
    first, state = run_trial(small(epochs=1)), torch.get_rng_state()
    torch.manual_seed(2)
    assert steady(run_trial(small(epochs=1)).history) == steady(first.history)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


class Killed(BaseException):
    """Stands for the end of a worker between two epochs."""


@pytest.mark.parametrize("rule", ["information", "kolen-pollack", "sign", "backprop"])
def test_from_a_checkpoint_it_goes_on_to_the_same_result_bit_for_bit(rule: str, tmp_path: Path) -> None:
    coefficients = {"amp": 1e-4, "null": 1e-4, "decay": 0.1} if rule == "information" else {}
    config = small(rule=rule, coefficients=coefficients, epochs=3)
    whole = run_trial(config, read_test=True)
    checkpoint = str(tmp_path / "state.pt")

    def dies(epoch: int, _: Any) -> None:
        if epoch == 2:
            raise Killed

    with pytest.raises(Killed):
        run_trial(config, dies, checkpoint=checkpoint)
    epochs: list[int] = []
    resumed = run_trial(config, lambda epoch, _: epochs.append(epoch), checkpoint=checkpoint, read_test=True)
    assert epochs == [1, 2, 3]  # what was known, too: the last report may never have arrived
    assert steady(resumed.history) == steady(whole.history)
    assert {k: v for k, v in resumed.metrics.items() if k not in VOLATILE} == {
        k: v for k, v in whole.metrics.items() if k not in VOLATILE
    }
    finished = run_trial(config, checkpoint=checkpoint, read_test=True)  # all epochs were done: nothing is trained
    assert finished.metrics["test_acc"] == whole.metrics["test_acc"]


def test_a_run_that_goes_on_with_other_code_says_with_which_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each code trains one epoch, is killed, and the next one goes on; an old checkpoint does not say its own."""
    config, path = small(epochs=4), tmp_path / "state.pt"
    own = provenance("cpu")

    def begin(source: str, epochs: int) -> TrialResult | None:
        monkeypatch.setattr("bench.provenance._provenance", lambda _: {**own, "source": source})

        def dies(epoch: int, _: Any) -> None:
            if epoch == epochs:
                raise Killed

        with contextlib.suppress(Killed):
            return run_trial(config, dies, checkpoint=str(path))
        return None

    assert begin("a", 1) is None
    assert begin("a", 2) is None
    assert [code["source"] for code in read_checkpoint(path)["code"]] == ["a"]
    assert begin("b", 3) is None
    whole = begin("c", 0)
    assert whole is not None
    assert whole.provenance["source"] == "c"
    assert whole.provenance["resumed_from"] == [{**code_of(own), "source": source} for source in "ab"]
    assert json.loads(json.dumps(whole.provenance)) == whole.provenance
    again = begin("b", 0)
    assert again is not None
    assert [code["source"] for code in again.provenance["resumed_from"]] == ["a", "c"]

    old = read_checkpoint(path)
    del old["code"]
    torch.save(old, path)
    unsaid = begin("d", 0)
    assert unsaid is not None
    assert "resumed_from" not in unsaid.provenance
    torch.save({**old, "code": [{"source": 5}]}, path)
    with pytest.raises(UserError, match=r"code\.0\.source must be a valid string, not 5\. Remove it"):
        read_checkpoint(path)


def test_a_checkpoint_of_another_configuration_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    run_trial(small(epochs=1), checkpoint=str(path))
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]
    with pytest.raises(UserError, match="another configuration"):
        run_trial(small(epochs=1, seed=5), checkpoint=str(path))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="cannot be read"):
        run_trial(small(epochs=1), checkpoint=str(path))
    torch.save({"epoch": 1}, path)
    with pytest.raises(UserError, match="not a checkpoint of bench"):
        read_checkpoint(path, torch.device("cpu"))
    for garbage in (b"", b"no checkpoint", b"PK\x03\x04", b"lr: 1\n"):
        path.write_bytes(garbage)
        with pytest.raises(UserError, match="cannot be read"):
            read_checkpoint(path, torch.device("cpu"))
    torch.save(5, path)
    with pytest.raises(UserError, match="not a checkpoint of bench"):
        read_checkpoint(path, torch.device("cpu"))


def test_a_place_where_no_checkpoint_can_be_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        run_trial(small(), checkpoint=str(tmp_path / "file" / "state.pt"))


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("touched"),))


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"config": Evil()}, "evil.pt")
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(Path("evil.pt"), torch.device("cpu"))
    assert not Path("touched").exists()


def test_a_diverged_run_is_a_result_with_its_reason_at_chance() -> None:
    reported: list[int] = []
    result = run_trial(
        small(rule="amp", coefficients={"amp": 1e6}), lambda epoch, _: reported.append(epoch), read_test=True
    )
    assert result.status == "diverged"
    assert result.reason.startswith("epoch 1: ")
    assert result.metrics["val_acc"] == result.metrics["test_acc"] == 0.1
    assert reported == []
    assert result.metrics["test_top5"] == 0.5
    assert set(result.metrics) == {"val_acc", "val_top5", "test_acc", "test_top5", "epochs_done", "train_seconds"}
    assert all(math.isfinite(v) for v in result.metrics.values())


def test_test_is_read_only_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = module.score
    monkeypatch.setattr(module, "score", lambda trial, split: read.append(split) or original(trial, split))
    result = run_trial(small())
    assert set(read) == {"val"}
    assert not any(name.startswith("test") for name in result.metrics)
    read.clear()
    run_trial(small(), read_test=True)
    assert read.count("test") == 1


def test_accumulation_in_parts_is_the_same_step_without_batch_statistics() -> None:
    """LeNet has no norm, so the mean over parts is the mean over the whole."""
    base = small(
        arch="lenet", rule="information", coefficients={"amp": 1e-4, "null": 1e-5, "decay": 0.1}, epochs=1, lr=0.01
    )
    whole, parts = prepare(base), prepare(base.replace(accumulate=4))
    assert train_epoch(whole)["train_loss"] == pytest.approx(train_epoch(parts)["train_loss"], rel=1e-4)
    for (name, a), b in zip(whole.model.state_dict().items(), parts.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def weights_and_feedback(trial: module.Trial) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    layers = asymmetric_layers(trial.model).values()
    return [m.weight.detach().clone() for m in layers], [m.feedback.detach().clone() for m in layers][1:]


@pytest.mark.parametrize(
    ("changes", "moved"),
    [
        ({}, (True, True)),
        ({"feedback_warmup_epochs": 1.0}, (False, True)),
        ({"feedback_every": 100}, (True, False)),
    ],
)
def test_who_learns_is_who_moves(changes: dict[str, Any], moved: tuple[bool, bool]) -> None:
    trial = prepare(small(rule="mirror", coefficients={"amp": 1e-3, "decay": 0.1}, **changes))
    before = weights_and_feedback(trial)
    train_epoch(trial)
    after = weights_and_feedback(trial)
    for was, now, does in zip(before, after, moved, strict=True):
        assert all(torch.equal(a, b) != does for a, b in zip(was, now, strict=True))


def test_the_authors_alternation_and_delay() -> None:
    every = small(rule="self", coefficients={"self": 1.0}, feedback_every=3)
    assert [who_learns(every, step, 0.5) for step in range(6)] == [(True, False), (True, False), (False, True)] * 2
    delayed = every.replace(feedback_every=1, feedback_warmup_epochs=1.5)
    assert who_learns(delayed, 9, 1.4) == (False, True)
    assert who_learns(delayed, 9, 1.5) == (True, True)


def test_schedules_against_their_definitions() -> None:
    cosine = small(epochs=11, warmup_epochs=1.0)
    assert lr_factor(cosine, 0.25) == 0.25
    assert lr_factor(cosine, 1.0) == 1.0
    assert lr_factor(cosine, 6.0) == pytest.approx(0.5)
    assert lr_factor(cosine, 11.0) == pytest.approx(0.0, abs=1e-15)
    step = small(epochs=90, warmup_epochs=5.0, schedule="step", step_epochs=[30, 60, 80])
    assert [lr_factor(step, e) for e in (29.9, 30, 60, 80)] == pytest.approx([1, 0.1, 0.01, 0.001])
    assert lr_factor(small(schedule="constant", warmup_epochs=0.0), 1.7) == 1.0


def test_weight_decay_is_on_forward_weights_only_and_B_has_its_own_rate() -> None:
    trial = prepare(small(rule="symmetric", coefficients={"decay": 0.1, "self": 0.1}, feedback_lr_factor=3.0))
    groups = {g["name"]: g for g in trial.optimizer.param_groups}
    assert groups["weights"]["weight_decay"] == 5e-4
    assert groups["plain"]["weight_decay"] == groups["feedback"]["weight_decay"] == 0.0
    assert groups["feedback"]["full_lr"] == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rule": "feedback", "feedback_every": 2}, "no effect in rule 'feedback'"),
        ({"rule": "kolen-pollack", "feedback_warmup_epochs": 1.0}, "B moves with W"),
        ({"rule": "self", "coefficients": {"self": 1.0}, "feedback_warmup_epochs": 2.0}, "W would never learn"),
        ({"rule": "kolen-pollack", "coefficients": {"decay": 0.1}}, "must equal weight_decay"),
        ({"rule": "backprop", "feedback_lr_factor": 2.0}, "no effect"),
        ({"rule": "backprop", "coefficients": {"amp": 0.1}}, "no effect in rule 'backprop'"),
        ({"rule": "mirror"}, "needs the coefficients decay, amp"),
        ({"arch": "lenet", "image_size": 16}, "images of 32 pixels"),
        ({"arch": "resnet19"}, "unknown arch"),
        ({"dataset": "digit"}, "digits"),
        ({"batch_size": 512}, "fewer than batch_size"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        prepare(small(**changes))
    assert "\n" not in str(error.value)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="cannot be used here"):
        run_trial(small(), device="xpu:7")


def test_dropout_draws_from_the_seed_and_the_epoch_alone() -> None:
    def dropping(seed: int) -> float:
        trial = prepare(small(arch="lenet", epochs=1, seed=seed))
        trial.model = torch.nn.Sequential(torch.nn.Dropout(0.5), trial.model)
        torch.manual_seed(torch.seed() % 1000)
        return train_epoch(trial)["train_loss"]

    assert dropping(1) == dropping(1)
    assert dropping(1) != dropping(2)


def test_angles_are_measured_by_a_fixed_mixture_of_the_classes() -> None:
    trial = prepare(small())
    alignment(trial, floor=False)
    first = trial.sample[1].clone()
    alignment(trial, floor=False)
    assert torch.equal(trial.sample[1], first)
    assert len(first.unique()) > 5


@pytest.mark.parametrize(
    ("changes", "floor"),
    [
        ({}, True),
        ({"centered": True}, True),
        ({"feedback_input": "normal"}, False),
        ({"rule": "information", "coefficients": {"amp": 1e-4, "null": 1e-6, "decay": 0.1}}, False),
        ({"measure_alignment": False}, False),
    ],
)
def test_the_floor_is_known_at_the_last_epoch_where_amp_sees_activations(changes: dict[str, Any], floor: bool) -> None:
    mirror = {"rule": "mirror", "coefficients": {"amp": 1e-4, "decay": 0.1}, "arch": "lenet"}
    result = run_trial(small(**{**mirror, **changes}))
    assert ("floor_angle" in result.metrics) == floor
    assert "floor_angle" not in result.history[0]
    if floor:
        layers = {name.removeprefix("angle/") for name in result.metrics if name.startswith("angle/")}
        floors = {name.removeprefix("floor_angle/"): v for name, v in result.metrics.items() if "floor_angle/" in name}
        assert len(floors) == len(layers) - 1  # the first layer sends nothing
        assert all(0 < value < 90 for value in floors.values())


def test_backprop_has_no_angle_to_speak_of() -> None:
    metrics = run_trial(small(rule="backprop", arch="lenet", epochs=1)).metrics
    assert metrics["angle"] == metrics["dx_angle"] == 0


def test_bf16_trains_too() -> None:
    result = run_trial(small(rule="mirror", coefficients={"amp": 1e-4, "decay": 0.1}, precision="bf16", epochs=1))
    assert result.status == "finished"
    assert result.provenance["precision"] == "bf16"


def test_it_learns_real_digits() -> None:
    """Six epochs take resnet20 from chance to over 70 % with a B that follows W; a frozen network stays far below."""
    whole = {"arch": "resnet20", "train_examples": None, "epochs": 6, "batch_size": 64, "lr": 0.1}
    symmetric = run_trial(small(rule="symmetric", coefficients={"decay": 0.5, "self": 0.5}, **whole))
    frozen = run_trial(small(rule="frozen", **whole))
    assert symmetric.metrics["val_acc"] > 0.7
    assert symmetric.metrics["angle"] < 5
    assert frozen.metrics["val_acc"] < symmetric.metrics["val_acc"] - 0.2


def test_it_runs_without_ray_optuna_mlflow_and_pandas() -> None:
    code = """
import sys
for name in ("ray", "optuna", "mlflow", "pandas"):
    sys.modules[name] = None
from bench.config import TrialConfig
from bench.trial import run_trial
config = TrialConfig(rule="sign", arch="lenet", epochs=1, train_examples=64, batch_size=32)
assert run_trial(config).status == "finished"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
