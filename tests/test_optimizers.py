"""W's optimizers: torch's own arithmetic, on every layout of a kernel, and the same through checkpoints and noise."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.checkpoint import load_optimizer
from bench.config import TrialConfig, UserError
from bench.learning.convert import convert
from bench.learning.learner import FeedbackLearner, parameter_groups
from bench.learning.rules import parse_rule
from bench.noise import UpdateNoise
from bench.optimizers import NS_STEPS, Muon, make_optimizer
from bench.training import prepare, update_levels
from bench.trial import run_trial

CPU = torch.device("cpu")
FIELDS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "lr": 0.05},
    "adamw": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05},
    "muon": {"optimizer": "muon", "lr": 1e-2, "momentum": 0.6},
}


def small(**changes: Any) -> TrialConfig:
    base = {"rule": "symmetric", "arch": "lenet", "dataset": "digits", "epochs": 2, "batch_size": 32}
    return TrialConfig.from_dict(
        {**base, "train_examples": 64, "coefficients": {"self": 0.1, "decay": 0.1}, "measure_alignment": False}
        | changes
    )


def network(layout: torch.memory_format = torch.contiguous_format) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, (1, 3), groups=2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    )
    return net.to(memory_format=layout)  # type: ignore[call-overload]


def learn(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> list[Tensor]:
    """The parameters after so many steps by gradients that depend on them."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        net(torch.randn(16, 3, 8, 8, generator=generator)).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


def groups_of(net: nn.Module) -> list[dict[str, Any]]:
    return parameter_groups(net, lr=0.01, weight_decay=0.05)


# --- against torch, and against the obvious --------------------------------------------------------------


def test_sgd_is_torchs_bit_for_bit() -> None:
    config = small(optimizer="sgd", lr=0.01, momentum=0.9)
    ours, plain = network(), network()
    theirs = torch.optim.SGD(groups_of(plain), lr=0.01, momentum=0.9, nesterov=True, fused=True)
    for a, b in zip(learn(ours, make_optimizer(config, groups_of(ours), CPU)), learn(plain, theirs), strict=True):
        assert torch.equal(a, b)


def test_adamw_is_torchs_with_the_momentum_as_beta1() -> None:
    config = small(optimizer="adamw", lr=0.01, momentum=0.8)
    ours, plain = network(), network()
    theirs = torch.optim.AdamW(groups_of(plain), lr=0.01, betas=(0.8, 0.999), foreach=False)
    for a, b in zip(learn(ours, make_optimizer(config, groups_of(ours), CPU)), learn(plain, theirs), strict=True):
        torch.testing.assert_close(a, b)


def obvious_muon_step(W: Tensor, g: Tensor, m: Tensor, *, lr: float, decay: float, nesterov: bool) -> None:
    """In place, of a kernel as the matrix out × rest, with the transpose where that is the smaller square."""
    m.copy_(0.6 * m + 0.4 * g)
    u = (0.6 * m + 0.4 * g if nesterov else m).reshape(len(W), -1)
    wide = u if u.shape[0] <= u.shape[1] else u.T
    X = (wide.bfloat16() / wide.bfloat16().norm()).float()
    for _ in range(NS_STEPS):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    O = X if u.shape[0] <= u.shape[1] else X.T
    W.mul_(1 - lr * decay).sub_(lr * 0.2 * math.sqrt(max(u.shape)) * O.reshape(W.shape))


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(8, 3, 3, 3), (40, 2, 3, 3), (6, 4, 1, 1), (5, 7), (7, 5), (4, 3, 5), (1, 3, 4)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_takes_a_kernel_as_out_times_rest(
    shape: tuple[int, ...], layout: torch.memory_format, nesterov: bool
) -> None:
    if layout is torch.channels_last and len(shape) != 4:
        pytest.skip("channels_last is of four dimensions")
    torch.manual_seed(0)
    W = torch.randn(shape)
    p = nn.Parameter(W.clone().contiguous(memory_format=layout))
    memory = p.data_ptr()
    optimizer = Muon([{"params": [p], "lr": 0.1, "weight_decay": 0.3}], momentum=0.6, nesterov=nesterov)
    m = torch.zeros(shape)
    for step in range(3):
        g = torch.randn(shape)
        p.grad = g.clone().contiguous(memory_format=layout if step else torch.contiguous_format)
        optimizer.step()
        obvious_muon_step(W, g, m, lr=0.1, decay=0.3, nesterov=nesterov)
        moved = 0.1 * 0.2 * math.sqrt(max(len(W), W[0].numel()))  # bfloat16 has 8 bits of each number of O
        torch.testing.assert_close(p.detach(), W, atol=0.1 * (step + 1) * moved, rtol=0)
    assert p.data_ptr() == memory
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], m)


def test_muon_is_torchs_own_on_matrices_bit_for_bit() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(6, 9)) for _ in range(2))
    group = {"lr": 0.1, "weight_decay": 0.1}
    mine = Muon([{"params": [ours], **group}], momentum=0.6, nesterov=True)
    torchs = torch.optim.Muon(
        [{"params": [theirs], **group}], momentum=0.6, ns_steps=NS_STEPS, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        ours.grad = torch.randn(6, 9)
        theirs.grad = ours.grad.clone()
        mine.step()
        torchs.step()
    assert torch.equal(ours, theirs)


def test_under_muon_norms_and_biases_move_by_adamw() -> None:
    ours, plain = network(), network()
    learn(ours, make_optimizer(small(**FIELDS["muon"]), groups_of(ours), CPU), steps=1)
    learn(plain, torch.optim.AdamW(groups_of(plain), fused=True), steps=1)
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b) == (a.dim() < 2), name


# --- one optimizer to those who use it -------------------------------------------------------------------


def fitted(name: str) -> tuple[nn.Module, torch.optim.Optimizer, list[nn.Parameter]]:
    """A network with learned B, its optimizer, and the feedback weights."""
    torch.optim.Muon([nn.Parameter(torch.zeros(2, 2))])  # whose step then has hooks of its own
    net = network()
    convert(net, parse_rule("symmetric"), {"self": 0.1, "decay": 0.1}, seed=3)
    groups = groups_of(net)
    optimizer = make_optimizer(small(**FIELDS[name]), groups, CPU)
    FeedbackLearner(net, optimizer)
    return net, optimizer, groups[-1]["params"]


@pytest.mark.parametrize("name", FIELDS)
def test_the_learner_sets_b_and_the_optimizer_moves_it_once(name: str) -> None:
    net, optimizer, B = fitted(name)
    assert [group["name"] for group in optimizer.param_groups] == ["weights", "plain", "feedback"]
    before = [b.detach().clone() for b in B]
    learn(net, optimizer, steps=1)
    moved = [not torch.equal(b, was) for b, was in zip(B, before, strict=True)]
    assert moved == [b.grad is not None for b in B] == [False, True, True]  # nothing goes back through the first layer
    optimizer.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("name", FIELDS)
def test_a_parameter_without_a_gradient_stands_still(name: str) -> None:
    net, optimizer, _ = fitted(name)
    learn(net, optimizer, steps=1)  # there is momentum now, and decay
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    assert all(torch.equal(p, was) for p, was in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("name", FIELDS)
def test_noise_in_updates_is_of_the_rate_of_each_group(name: str) -> None:
    (noisy, optimizer, _), (plain, other, _) = fitted(name), fitted(name)
    noise = UpdateNoise(optimizer, 1.0)
    noise.seed(0)
    for group, rate in zip(optimizer.param_groups, (0.0, 0.0, 0.5), strict=True):
        group["lr"] = rate
    for group, rate in zip(other.param_groups, (0.0, 0.0, 0.5), strict=True):
        group["lr"] = rate
    learn(noisy, optimizer, steps=1)
    learn(plain, other, steps=1)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    noise.add()
    pairs = [(n, p - q) for (n, p), q in zip(noisy.named_parameters(), plain.parameters(), strict=True)]
    moved = torch.cat([d.flatten() for n, d in pairs if n.endswith("feedback")])
    assert moved.std().item() == pytest.approx(0.5, rel=0.2)
    assert all(not d.any() for n, d in pairs if not n.endswith("feedback"))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decoupled_decay_does_not_go_through_the_momentum(name: str) -> None:
    """The levels of update noise: in a weight that nothing else moves it adds up as this recursion says."""
    config = small(**{**FIELDS[name], "lr": 0.1, "weight_decay": 0.5, "schedule": "constant", "warmup_epochs": 0.0})
    p = nn.Parameter(torch.zeros(100, 100))
    group = {"name": "weights", "params": [p], "lr": 0.1, "weight_decay": 0.5}
    optimizer = make_optimizer(config, [group], CPU)
    noise = UpdateNoise(optimizer, sigma := update_levels(config, steps=20)[5])
    noise.seed(0)
    for _ in range(config.epochs * 20):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        noise.add()
    assert sigma > 0
    assert p.std().item() == pytest.approx(1.0, rel=0.1)  # bench.noise.ADDED_UP[5], the level in two digits


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_kolen_pollack_refuses_what_would_break_its_tie(name: str) -> None:
    with pytest.raises(UserError, match="needs optimizer 'sgd'"):
        prepare(small(rule="kolen-pollack", coefficients={}, **FIELDS[name]))


def test_a_torch_without_muon_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.optim._muon", None)
    with pytest.raises(UserError, match="'muon' is not in torch"):
        prepare(small(**FIELDS["muon"]))


# --- checkpoints -----------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of a worker between two epochs."""


@pytest.mark.parametrize("name", FIELDS)
def test_through_an_interruption_it_is_the_same_run_bit_for_bit(name: str, tmp_path: Path) -> None:
    config = small(arch="resnet20", epochs=3, update_noise=1e-3, **FIELDS[name])

    def dies(epoch: int, _: Any) -> None:
        if epoch == 2:
            raise Killed

    paths = [str(tmp_path / "whole.pt"), str(tmp_path / "parts.pt")]
    whole = run_trial(config, checkpoint=paths[0])
    with pytest.raises(Killed):
        run_trial(config, dies, checkpoint=paths[1])
    assert run_trial(config, checkpoint=paths[1]).metrics["val_loss"] == whole.metrics["val_loss"]
    ours, theirs = (torch.load(path, weights_only=True) for path in paths)
    assert all(torch.equal(ours["model"][k], theirs["model"][k]) for k in ours["model"])
    for index, kept in ours["optimizer"]["state"].items():
        assert all(torch.equal(v, theirs["optimizer"]["state"][index][k]) for k, v in kept.items())


@pytest.mark.parametrize("name", FIELDS)
def test_a_state_in_another_layout_goes_on(name: str) -> None:
    """A checkpoint of a GPU, where kernels are channels_last."""
    (net, optimizer, _), (other, fresh, _) = fitted(name), fitted(name)
    learn(net, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    for kept in state["state"].values():
        for key, value in kept.items():
            if value.dim() == 4:
                kept[key] = value.contiguous(memory_format=torch.channels_last)
    other.load_state_dict(net.state_dict())
    load_optimizer(Path("state.pt"), fresh, state)
    for a, b in zip(learn(net, optimizer, 2), learn(other, fresh, 2), strict=True):
        assert torch.equal(a, b)


DAMAGE: dict[str, Any] = {
    "no moment": lambda kept: kept.pop(next(iter(kept))),
    "another's shape": lambda kept: kept.update({k: torch.zeros(3) for k in kept}),
    "another type": lambda kept: kept.update({k: v.double() for k, v in kept.items()}),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FIELDS)
def test_a_damaged_state_is_refused_in_one_line(name: str, damage: str, tmp_path: Path) -> None:
    config, path = small(**FIELDS[name], epochs=1), tmp_path / "state.pt"
    run_trial(config, checkpoint=str(path))
    state = torch.load(path, weights_only=True)
    DAMAGE[damage](state["optimizer"]["state"][0])
    torch.save(state, path)
    with pytest.raises(UserError, match="does not fit its own configuration's optimizer"):
        run_trial(config, checkpoint=str(path))


@pytest.mark.parametrize("name", FIELDS)
def test_every_optimizer_learns(name: str) -> None:
    net, optimizer, _ = fitted(name)
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    before = net(x).square().mean().item()
    learn(net, optimizer, steps=60)
    assert net(x).square().mean().item() < 0.7 * before
