"""B's gradient under everything that people do to gradients: accumulate, scale, clip, distribute, skip."""

from __future__ import annotations

import copy
import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from bench.config import UserError
from bench.learning.convert import convert
from bench.learning.layers import AsymmetricLayer, asymmetric_layers
from bench.learning.learner import FeedbackLearner, parameter_groups
from bench.learning.primitives import PRIMITIVES
from bench.learning.rules import parse_rule

COEFFICIENTS = {"decay": 0.3, "amp": 0.2, "null": 0.1, "sparse": 0.4, "self": 0.5}
EVERYTHING = "+".join(COEFFICIENTS)


def network(rule: str = EVERYTHING, dtype: torch.dtype = torch.float64, *, inplace: bool = False) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1),
            nn.ReLU(inplace=inplace),
            nn.Conv2d(6, 6, 3, stride=2, padding=1),
            nn.ReLU(inplace=inplace),
            nn.Flatten(),
            nn.Linear(54, 5),
        ).to(dtype)
    coefficients = {name: COEFFICIENTS[name] for name in parse_rule(rule).primitives}
    convert(model, rule, coefficients, seed=5)
    return model


def data(n: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    return torch.randn(n, 2, 6, 6, dtype=dtype, generator=g), torch.randint(5, (n,), generator=g)


def learner_of(model: nn.Module, lr: float = 0.0, **options: bool) -> tuple[torch.optim.SGD, FeedbackLearner]:
    optimizer = torch.optim.SGD(parameter_groups(model, lr=lr, weight_decay=0.0), lr=lr, **options)
    return optimizer, FeedbackLearner(model, optimizer)


def feedback_grads(model: nn.Module) -> list[Tensor | None]:
    return [None if (g := m.feedback.grad) is None else g.clone() for m in asymmetric_layers(model).values()]


def loss_of(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), labels)


def one_step(model: nn.Module, **options: bool) -> list[Tensor | None]:
    optimizer, _ = learner_of(model, **options)
    loss_of(model, *data()).backward()
    optimizer.step()
    return feedback_grads(model)


def same(left: list[Tensor | None], right: list[Tensor | None], tolerance: float = 1e-12) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        if a is None or b is None:
            assert a is b is None
        else:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_the_first_layer_has_no_gradient_of_B_and_does_not_move() -> None:
    grads = one_step(network())
    assert grads[0] is None
    assert all(g is not None for g in grads[1:])


@pytest.mark.parametrize("rule", [EVERYTHING, "kolen-pollack", "symmetric"])
def test_accumulation_is_the_mean_over_the_micro_batches(rule: str) -> None:
    whole, parts = network(rule), network(rule)
    expected = one_step(whole)
    optimizer, _ = learner_of(parts)
    x, labels = data()
    for i in range(0, 8, 2):
        (loss_of(parts, x[i : i + 2], labels[i : i + 2]) / 4).backward()
    optimizer.step()
    same(feedback_grads(parts), expected)
    same(
        [p.grad for p in parts.parameters() if p.requires_grad], [p.grad for p in whole.parameters() if p.requires_grad]
    )


@pytest.mark.parametrize("rule", [EVERYTHING, "kolen-pollack"])
def test_a_scaled_loss_and_a_grad_scaler_do_not_distort_it(rule: str) -> None:
    expected = one_step(network(rule))
    model = network(rule)
    optimizer, _ = learner_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(model, *data())).backward()
    scaler.step(optimizer)
    same(feedback_grads(model), expected)


def test_a_step_that_the_scaler_skips_leaves_nothing_behind() -> None:
    expected = one_step(network())
    model = network()
    optimizer, _ = learner_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = [m.feedback.clone() for m in asymmetric_layers(model).values()]
    x, labels = data()
    (scaler.scale(loss_of(model, 3 * x, labels)) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    same([m.feedback for m in asymmetric_layers(model).values()], before, 0)
    optimizer.zero_grad()
    scaler.scale(loss_of(model, x, labels)).backward()
    scaler.step(optimizer)
    same(feedback_grads(model), expected)


def test_a_fused_optimizer_that_unscales_by_itself_is_refused() -> None:
    model = network(dtype=torch.float32)
    optimizer, _ = learner_of(model, fused=True)
    optimizer.grad_scale = torch.tensor(1024.0)  # what GradScaler.step sets on such an optimizer
    loss_of(model, *data(dtype=torch.float32)).backward()
    with pytest.raises(RuntimeError, match="unscale_"):
        optimizer.step()


def test_clipping_neither_sees_nor_touches_what_B_learns_by_itself() -> None:
    expected = one_step(network())
    model = network()
    optimizer, _ = learner_of(model)
    loss_of(model, *data()).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    own = torch.stack([p.grad.norm() for p in model.parameters() if p.requires_grad]).norm()
    torch.testing.assert_close(own, torch.tensor(1e-3, dtype=torch.float64), rtol=1e-3, atol=0)
    assert norm > 1e-3
    optimizer.step()
    same(feedback_grads(model), expected)


def test_kolen_pollack_is_clipped_as_W_is() -> None:
    model = network("kolen-pollack")
    optimizer, _ = learner_of(model)
    loss_of(model, *data()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    for layer in list(asymmetric_layers(model).values())[1:]:
        torch.testing.assert_close(layer.feedback.grad, layer.weight.grad + 0.3 * layer.feedback.detach())


def test_the_gradients_of_the_last_step_must_be_set_to_none() -> None:
    model = network()
    optimizer, _ = learner_of(model)
    loss_of(model, *data()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    with pytest.raises(RuntimeError, match="set_to_none=True"):
        loss_of(model, *data()).backward()


def test_without_a_learner_training_is_refused_and_evaluation_is_not() -> None:
    model = network()
    with pytest.raises(RuntimeError, match="FeedbackLearner"):
        loss_of(model, *data()).backward()
    loss_of(model.eval(), *data()).backward()


def test_switched_off_B_costs_nothing_and_stays() -> None:
    model = network()
    optimizer, learner = learner_of(model, lr=0.1)
    learner.on = False
    before = [m.feedback.clone() for m in asymmetric_layers(model).values()]
    loss_of(model, *data()).backward()
    assert all(m.state.total is None for m in asymmetric_layers(model).values())
    optimizer.step()
    same([m.feedback for m in asymmetric_layers(model).values()], before, 0)


def test_an_activation_in_place_on_the_layers_output_changes_nothing() -> None:
    same(one_step(network(inplace=True)), one_step(network(inplace=False)))


def test_backward_twice_through_one_graph() -> None:
    once, twice = network(), network()
    expected = one_step(once)
    optimizer, _ = learner_of(twice)
    loss = loss_of(twice, *data())
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    same(feedback_grads(twice), expected)


class Twice(nn.Module):
    """One layer, used twice in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.first, self.inner = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.inner(torch.tanh(self.first(x)))))


def test_a_layer_used_twice_sums_its_uses_as_dW_does() -> None:
    model = Twice()
    convert(model, "amp", {"amp": 0.5})
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    optimizer, _ = learner_of(model)
    model(x).sum().backward()
    optimizer.step()
    inner = model.inner
    W, B = inner.weight.detach(), inner.feedback.detach()
    a = torch.tanh(model.first(x)).detach()
    b = torch.tanh(inner(a)).detach()
    expected = sum(0.5 * PRIMITIVES["amp"].gradient(inner.maps, v, v @ W.t(), W, B) for v in (a, b))
    torch.testing.assert_close(inner.feedback.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", [EVERYTHING, "kolen-pollack", "sign"])
def test_channels_last_and_autocast(rule: str) -> None:
    reference = network(rule, torch.float32)
    learner = (lambda m: learner_of(m)[0]) if rule != "sign" else (lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    runs = []
    x, labels = data(dtype=torch.float32)
    for prepare, bf16 in (
        (lambda m: m, False),
        (lambda m: m.to(memory_format=torch.channels_last), False),
        (lambda m: m, True),
    ):
        model = prepare(copy.deepcopy(reference))
        optimizer = learner(model)
        here = x.contiguous(memory_format=torch.channels_last) if prepare(model) is not model else x
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(model, here, labels)
        loss.backward()
        optimizer.step()
        layers = list(asymmetric_layers(model).values())[1:]
        runs.append([m.weight.grad for m in layers] + ([m.feedback.grad for m in layers] if rule != "sign" else []))
        assert all(g.dtype == torch.float32 for g in runs[-1])
    same(runs[1], runs[0], 1e-4)
    for low, full in zip(runs[2], runs[0], strict=True):
        assert torch.nn.functional.cosine_similarity(low.flatten(), full.flatten(), dim=0) > 0.99
        assert 0.98 < low.norm() / full.norm() < 1.02


def test_under_autocast_B_equal_to_W_is_backprop_bit_for_bit() -> None:
    plain, ours = (nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5)) for _ in "ab")
    ours.load_state_dict(plain.state_dict())
    convert(ours, "feedback")
    x, labels = data(dtype=torch.float32)
    for layer in asymmetric_layers(ours).values():
        layer.feedback.data.copy_(layer.weight.data)
    for model in (plain, ours):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, x, labels)
        loss.backward()
    for (name, p), q in zip(plain.named_parameters(), (p for p in ours.parameters() if p.requires_grad), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_optimizer_without_B_or_with_its_decay_is_refused() -> None:
    model = network()
    with pytest.raises(UserError, match="not in the optimizer"):
        FeedbackLearner(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    with pytest.raises(UserError, match="weight decay"):
        FeedbackLearner(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4))


def test_groups_hold_each_parameter_once_with_its_own_rate_and_decay() -> None:
    model = network()
    model.insert(1, nn.BatchNorm2d(6))
    groups = {g["name"]: g for g in parameter_groups(model, lr=0.1, weight_decay=1e-4, feedback_lr_factor=3.0)}
    assert {n: (round(g["lr"], 9), g["weight_decay"]) for n, g in groups.items()} == {
        "weights": (0.1, 1e-4),
        "plain": (0.1, 0.0),
        "feedback": (0.3, 0.0),
    }
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))
    assert {id(p) for p in groups["feedback"]["params"]} == {id(m.feedback) for m in asymmetric_layers(model).values()}
    with pytest.raises(UserError, match="no effect"):
        parameter_groups(network("feedback"), lr=0.1, weight_decay=0.0, feedback_lr_factor=3.0)


def _leave() -> None:
    """End this rank, once both have got so far, without Python's finalisation.

    DDP keeps the process group, and with it gloo's threads, alive until then; one that wants the interpreter
    lock by that time aborts the process ("terminate called without an active exception", once in some hundred).
    """
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)


def _rank(rank: int, ranks: int, rendezvous: str, out: str, rule: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    model = network(rule)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.1, weight_decay=1e-4), lr=0.1, momentum=0.9)
    FeedbackLearner(wrapped, optimizer)
    x, labels = data()
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(wrapped, x[rank::ranks], labels[rank::ranks]).backward()
        optimizer.step()
    torch.save({k: v.clone() for k, v in model.state_dict().items()}, f"{out}/{rank}.pt")
    _leave()


@pytest.mark.slow
@pytest.mark.parametrize("rule", [EVERYTHING, "kolen-pollack"])
def test_two_ranks_train_as_one_process_does(rule: str, tmp_path: Path) -> None:
    multiprocessing.spawn(_rank, (2, str(tmp_path / "meet"), str(tmp_path), rule), nprocs=2)
    alone = network(rule)
    optimizer = torch.optim.SGD(parameter_groups(alone, lr=0.1, weight_decay=1e-4), lr=0.1, momentum=0.9)
    FeedbackLearner(alone, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(alone, *data()).backward()
        optimizer.step()
    for rank in (0, 1):
        for name, value in torch.load(tmp_path / f"{rank}.pt", weights_only=True).items():
            torch.testing.assert_close(value, alone.state_dict()[name], rtol=1e-9, atol=1e-12)


class Branches(nn.Module):
    """Rank 0 uses the layers a and c, rank 1 a and b: the unused of a rank has no gradient there."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.a, self.b, self.c, self.d = (nn.Linear(4, 4).double() for _ in range(4))

    def forward(self, x: Tensor, rank: int) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.d(torch.tanh(self.c(h) if rank == 0 else self.b(h)))


def _uneven_rank(rank: int, rendezvous: str, out: str, rule: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    model = Branches()
    convert(model, rule, dict.fromkeys(parse_rule(rule).primitives, 0.2), seed=3)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.1, weight_decay=0.0), lr=0.1)
    FeedbackLearner(wrapped, optimizer)
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    z = model.c(torch.tanh(model.a(x))).detach()
    before = model.b.feedback.clone()
    wrapped(x, rank).square().mean().backward()
    optimizer.step()
    torch.save({"state": model.state_dict(), "z": z, "db": model.b.feedback - before}, f"{out}/{rank}.pt")
    _leave()


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["amp", "symmetric"])
def test_ranks_that_use_different_layers_still_agree_on_B(rule: str, tmp_path: Path) -> None:
    multiprocessing.spawn(_uneven_rank, (str(tmp_path / "meet"), str(tmp_path), rule), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
    assert first["db"].abs().max() > 0  # the layer that only rank 1 used has learned on both


def test_an_unwrapped_model_among_several_processes_is_refused(tmp_path: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match="DDP-wrapped"):
            learner_of(network())
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("rule", [EVERYTHING, "kolen-pollack", "feedback"])
def test_a_network_that_nobody_holds_is_gone(rule: str) -> None:
    """A worker trains one after the other: what a hook of autograd keeps alive, no collector finds."""
    model = network(rule)
    optimizer, learner = learner_of(model)
    loss_of(model, *data()).backward()
    optimizer.step()
    watched = [weakref.ref(model), weakref.ref(next(model.parameters()))]
    del model, optimizer, learner
    gc.collect()
    assert [ref() for ref in watched] == [None, None]


def test_step_with_a_closure_is_refused() -> None:
    model = network()
    optimizer, _ = learner_of(model)
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step(lambda: 0.0)


def test_a_second_learner_takes_over_from_the_first() -> None:
    expected = one_step(network())
    model = network()
    optimizer, _ = learner_of(model)
    FeedbackLearner(model, optimizer)
    loss_of(model, *data()).backward()
    optimizer.step()
    same(feedback_grads(model), expected)


def test_a_pass_for_the_input_alone_is_no_training() -> None:
    expected = one_step(network())
    model = network()
    optimizer, _ = learner_of(model)
    x, labels = data()
    loss_of(model, x, labels).backward()
    attacked = (100 * x).requires_grad_()
    torch.autograd.grad(loss_of(model, attacked, labels), attacked)
    optimizer.step()
    same(feedback_grads(model), expected)


def test_training_by_autograd_grad_is_refused() -> None:
    model = network()
    optimizer, _ = learner_of(model)
    x, labels = data()
    weights = [p for p in model.parameters() if p.requires_grad]
    for p, grad in zip(weights, torch.autograd.grad(loss_of(model, x, labels), weights), strict=True):
        p.grad = grad
    with pytest.raises(RuntimeError, match=r"loss\.backward"):
        optimizer.step()


def test_with_W_frozen_B_still_learns_the_mean() -> None:
    expected = one_step(network())
    model = network()
    for layer in list(asymmetric_layers(model).values())[1:]:
        layer.weight.requires_grad_(False)
    optimizer, _ = learner_of(model)
    x, labels = data()
    for i in range(0, 8, 4):
        (loss_of(model, x[i : i + 4], labels[i : i + 4]) / 2).backward()
    optimizer.step()
    same(feedback_grads(model), expected)


def test_what_was_collected_can_be_forgotten() -> None:
    model = network()
    optimizer, learner = learner_of(model)
    loss_of(model, *data()).backward()
    learner.discard()
    optimizer.step()
    assert feedback_grads(model) == [None] * 3


def test_a_copy_of_the_network_has_no_learner() -> None:
    model = network()
    learner_of(model)
    with pytest.raises(RuntimeError, match="FeedbackLearner"):
        loss_of(copy.deepcopy(model), *data()).backward()


def test_float16_is_refused_where_it_cannot_hold_the_gradient() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    convert(model, "amp", {"amp": 1.0})
    learner_of(model)
    with torch.autocast("cpu", torch.float16):
        out = model(torch.randn(3, 4))
    with pytest.raises(RuntimeError, match="bfloat16"):
        out.float().sum().backward()


def test_optimizers_that_would_break_a_rule_are_refused() -> None:
    model = network("kolen-pollack")
    with pytest.raises(UserError, match="needs SGD"):
        FeedbackLearner(model, torch.optim.Adam(parameter_groups(model, lr=0.1, weight_decay=0.0), lr=0.1))
    with pytest.raises(UserError, match="maximizes"):
        learner_of(network(), maximize=True)


@pytest.mark.parametrize("fused", [False, True])
def test_a_fused_optimizer_reads_B_in_its_own_layout(fused: bool) -> None:
    """Activations in channels_last give kernel gradients in that layout, whatever the weights have."""
    model = network("mirror", torch.float32)
    before = [m.feedback.clone() for m in asymmetric_layers(model).values()]
    optimizer, _ = learner_of(model, lr=0.1, fused=fused)
    x, labels = data(dtype=torch.float32)
    loss_of(model, x.contiguous(memory_format=torch.channels_last), labels).backward()
    optimizer.step()
    for was, layer in zip(before[1:], list(asymmetric_layers(model).values())[1:], strict=True):
        torch.testing.assert_close(layer.feedback.detach(), was - 0.1 * layer.feedback.grad)
        assert layer.feedback.grad.stride() == layer.feedback.stride()


def test_what_is_kept_for_the_backward_pass_is_what_a_plain_layer_keeps() -> None:
    """Bytes held between forward and backward, by autograd and by the layer, for a convolution under a norm."""

    def held(rule: str) -> int:
        model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
        if rule != "backprop":
            coefficients = {} if rule == "feedback" else {"amp": 1.0, "null": 1.0, "sparse": 1.0}
            convert(model, rule, coefficients)
        storages: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        hooks: list[Callable[[Tensor], Tensor]] = [pack, lambda t: t]
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            out = model(torch.randn(16, 4, 12, 12))
        node = out.grad_fn
        stack, seen = [node], set()
        while stack:
            current = stack.pop()
            if current is None or current in seen:
                continue
            seen.add(current)
            y = getattr(current, "y", None)
            if isinstance(y, Tensor):
                storages[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
            stack.extend(parent for parent, _ in current.next_functions)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(size for pointer, size in storages.items() if pointer not in weights)

    assert held("feedback") == held("backprop")
    assert held("amp+null+sparse") == held("backprop")


def test_layers_are_found_by_name() -> None:
    model = network()
    assert list(asymmetric_layers(model)) == ["0", "2", "5"]
    assert all(isinstance(m, AsymmetricLayer) for m in asymmetric_layers(model).values())
