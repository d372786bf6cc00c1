"""B's own optimizer: its order, its schedule, its checkpoints, and what it must not touch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.config import TrialConfig, UserError
from bench.learning.convert import convert
from bench.learning.layers import asymmetric_layers
from bench.learning.learner import FeedbackLearner, parameter_groups
from bench.training import coefficients_at, feedback_lr_factor, prepare, train_epoch
from bench.trial import run_trial


def small(**changes: Any) -> TrialConfig:
    base = {
        "rule": "symmetric",
        "coefficients": {"self": 1.0, "decay": 1.0},
        "arch": "resnet20",
        "epochs": 2,
        "batch_size": 32,
        "train_examples": 96,
        "lr": 0.05,
        "feedback_optimizer": "sgd",
        "feedback_lr": 0.1,
    }
    return TrialConfig.from_dict({**base, **changes})


def network(rule: str, coefficients: dict[str, float]) -> tuple[nn.Module, torch.optim.SGD, list[nn.Parameter]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    convert(model, rule, coefficients, seed=1)
    groups = parameter_groups(model, lr=0.1, weight_decay=0.0)
    own = [p for group in groups if group["name"] == "feedback" for p in group["params"]]
    return model, torch.optim.SGD([group for group in groups if group["name"] != "feedback"]), own


def test_B_steps_after_W_and_from_the_new_W() -> None:
    """With self = decay = 1, a rate of 1 and no momentum B is the new W, to the last bit: no lag."""
    model, optimizer, own = network("symmetric", {"self": 1.0, "decay": 1.0})
    learner = FeedbackLearner(model, optimizer, feedback_optimizer=torch.optim.SGD(own, lr=1.0))
    layer = list(asymmetric_layers(model).values())[1]
    for _ in range(3):
        before = layer.weight.detach().clone()
        optimizer.zero_grad()
        model(torch.randn(4, 3, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        learner.step()
        assert not torch.equal(layer.weight, before)
        torch.testing.assert_close(layer.feedback_weight(), layer.weight.detach(), rtol=0, atol=1e-15)


def test_clipping_does_not_see_Bs_gradient() -> None:
    model, optimizer, own = network("mirror", {"amp": 1.0, "decay": 100.0})
    learner = FeedbackLearner(model, optimizer, feedback_optimizer=torch.optim.SGD(own, lr=1e-3))
    x = torch.randn(4, 3, dtype=torch.float64)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        total = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        ours = [p.grad for layer in (model[0], model[2]) for p in (layer.weight, layer.bias)]  # type: ignore[index]
        assert float(total) == pytest.approx(float(torch.stack([g.norm() for g in ours]).norm()))
        optimizer.step()
        learner.step()


def test_a_forgotten_step_of_B_and_wrong_optimizers_are_refused() -> None:
    model, optimizer, own = network("symmetric", {"self": 1.0, "decay": 1.0})
    FeedbackLearner(model, optimizer, feedback_optimizer=torch.optim.SGD(own, lr=1.0))
    x = torch.ones(1, 3, dtype=torch.float64)
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match=r"call FeedbackLearner\.step\(\) after each"):
        optimizer.step()
    both = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match="in both optimizers"):
        FeedbackLearner(model, both, feedback_optimizer=torch.optim.SGD(own, lr=1.0))
    model, optimizer, own = network("kolen-pollack", {"decay": 0.1})
    with pytest.raises(UserError, match="ties B to W"):
        FeedbackLearner(model, optimizer, feedback_optimizer=torch.optim.SGD(own, lr=1.0))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rule": "feedback", "coefficients": {}}, "its B does not learn"),
        ({"rule": "kolen-pollack", "coefficients": {}}, "B must make the steps of W"),
        ({"feedback_lr": None}, "needs feedback_lr"),
        ({"feedback_lr_factor": 2.0}, "feedback_lr_factor has no effect"),
        ({"feedback_optimizer": "shared"}, "feedback_lr has no effect with feedback_optimizer 'shared'"),
        ({"feedback_schedule": "step"}, "needs step_epochs"),
        ({"stabilize": ["center_input"]}, "stabilize has no effect in rule 'symmetric'"),
        ({"coefficient_schedules": {"amp": {"stop": 0.5}}}, "belongs to no coefficient"),
        ({"coefficient_schedules": {"self": {"start": 0.5, "stop": 0.5}}}, "must be below stop"),
    ],
)
def test_what_has_no_effect_is_refused_in_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        prepare(small(**changes), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"feedback_optimizer": "adam", "feedback_lr": 0.01, "feedback_every": 2},
        {
            "rule": "information",
            "coefficients": {"amp": 1.0, "null": 0.3, "decay": 1.0},
            "feedback_input": "uniform",
            "update_noise": 0.1,
            "coefficient_schedules": {"amp": {"course": "exponential", "rate": 0.5}},
        },
    ],
    ids=["sgd", "adam", "noise"],
)
def test_from_a_checkpoint_it_goes_on_bit_for_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    config = small(**changes)

    class Stop(Exception):  # noqa: N818
        pass

    def stop(*_: Any) -> None:
        raise Stop

    whole = run_trial(config, device="cpu")
    with pytest.raises(Stop):
        run_trial(config, stop, device="cpu", checkpoint=str(tmp_path / "run.pt"))
    rest = run_trial(config, device="cpu", checkpoint=str(tmp_path / "run.pt"))
    for name in ("val_loss", "train_loss", "angle", "dx_angle"):
        assert whole.metrics[name] == rest.metrics[name]


def test_rates_and_coefficients_against_their_definitions() -> None:
    config = small(feedback_schedule="cosine", feedback_lr_warmup_epochs=1.0, epochs=3, schedule="constant")
    assert [feedback_lr_factor(config, at) for at in (0.5, 1.0, 2.0, 3.0)] == pytest.approx([0.5, 1.0, 0.5, 0.0])
    assert feedback_lr_factor(small(), 1.9) == 1.0
    config = small(
        epochs=10,
        coefficient_schedules={
            "self": {"start": 0.2, "stop": 0.5, "course": "linear", "rate": -0.6},
            "decay": {"course": "exponential", "rate": 0.1},
        },
    )
    at = [coefficients_at(config, epoch) for epoch in (1.0, 2.0, 3.0, 5.0, 6.0)]
    assert [c["self"] for c in at] == pytest.approx([0.0, 1.0, 0.4, 0.0, 0.0])
    assert [c["decay"] for c in at] == pytest.approx([1.1051709, 1.2214028, 1.3498588, 1.6487213, 1.8221188])


def test_B_alone_moves_in_its_turn_and_stands_still_in_Ws() -> None:
    trial = prepare(small(feedback_every=3, train_examples=96), device="cpu")
    moved: list[tuple[bool, bool]] = []
    layer = list(asymmetric_layers(trial.model).values())[3]
    last = [layer.weight.detach().clone(), layer.feedback_weight().clone()]

    def look(*_: Any) -> None:
        now = [layer.weight.detach().clone(), layer.feedback_weight().clone()]
        moved.append((not torch.equal(now[0], last[0]), not torch.equal(now[1], last[1])))
        last[:] = now

    step = trial.learner.step

    def watched() -> None:
        step()
        look()

    trial.learner.step = watched  # type: ignore[method-assign]
    train_epoch(trial)
    assert moved == [(True, False), (True, False), (False, True)]


def test_symmetric_on_a_network_follows_W() -> None:
    result = run_trial(small(epochs=2, train_examples=None), device="cpu")
    assert result.metrics["angle"] < 1.0
    assert result.metrics["dx_angle"] < 5.0


def test_own_energies_are_autograds_and_plain_without_operations() -> None:
    """The stabilising operations against their definition, written out example by example."""
    from bench.learning.activity import Activity, energy_gradient
    from bench.learning.ops import ConvMaps
    from bench.learning.primitives import PRIMITIVES

    maps, generator = ConvMaps((1, 1), (1, 1), (1, 1), 1), torch.Generator().manual_seed(0)
    x, W, B = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 2, 4, 4), (5, 2, 3, 3), (5, 2, 3, 3))
    )
    coefficients = {"amp": 0.5, "null": 0.3, "sparse": 0.2}
    plain = energy_gradient(maps, Activity(), coefficients, x, W, B, 3)
    z = maps.forward(x, W)
    expected = sum(c * PRIMITIVES[name].gradient(maps, x, z, W, B) for name, c in coefficients.items())
    torch.testing.assert_close(plain, expected)

    def example(t: Tensor, normalize: bool) -> Tensor:
        rows = []
        for one in t:
            flat = one.flatten() - one.flatten().mean()
            rows.append((flat / flat.norm() if normalize else flat).view_as(one))
        return torch.stack(rows)

    on = Activity(
        stabilize=(
            "normalize_input",
            "batch_center_backward_input",
            "center_forward_output",
            "batch_center_forward_output",
            "normalize_backward_output",
        )
    )
    learned = B.clone().requires_grad_()
    seen = example(x, normalize=True)
    z, back = maps.forward(seen, W), maps.forward(seen - seen.mean(0), learned)
    again = example(maps.transpose(z, learned, seen), normalize=False)
    z, again = example(z, normalize=False), again - again.mean(0)
    z, back = z - z.mean(0), example(back, normalize=True)
    energy = -0.5 * (z * back).sum() + 0.5 * 0.2 * back.square().sum() + 0.5 * 0.3 * again.square().sum()
    (theirs,) = torch.autograd.grad(energy / 3, learned)
    torch.testing.assert_close(energy_gradient(maps, on, coefficients, x, W, B, 3), theirs)

    learned = B.clone().requires_grad_()
    energy = 0.5 * 0.3 * maps.transpose(maps.forward(x, learned), W, x).square().sum()
    (theirs,) = torch.autograd.grad(energy / 3, learned)
    torch.testing.assert_close(energy_gradient(maps, Activity(reversed_null=True), {"null": 0.3}, x, W, B, 3), theirs)


def test_a_network_trains_with_the_stabilising_operations() -> None:
    changes = {
        "rule": "information",
        "coefficients": {"amp": 1e-3, "null": 1e-3, "decay": 0.1},
        "stabilize": ["normalize_forward_output", "center_input"],
        "reversed_null": True,
        "epochs": 1,
        "warmup_epochs": 0.0,
    }
    config = small(**changes)
    assert config.stabilize == ("center_input", "normalize_forward_output")
    assert run_trial(config, device="cpu").status == "finished"
