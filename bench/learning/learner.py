"""From the layers to the optimizer: B's whole gradient, undistorted, at the optimizer's step."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from bench.config import UserError
from bench.group import Group
from bench.learning.activity import noise_gradient, noise_patches
from bench.learning.layers import AsymmetricLayer, asymmetric_layers, check_coefficients
from bench.learning.primitives import sees_batch
from bench.learning.switch import Switch


class FeedbackLearner:
    """Gives B its gradient when it is due, so that nothing meant for the loss's gradients touches it.

    B is moved by W's optimizer, together with W and from the W before the step; or, with ``feedback_optimizer``, by
    that one, when `step` is called after the step of W: then ``self`` and noise patches see the new W. (A B that
    follows W one step late makes a network without norms diverge.) That optimizer holds the feedback weights alone.

    ``B.grad = mean over the accumulated batches of the activity gradient + decay·B − self·W``, and for
    ``kolen-pollack`` + W.grad as it then is: accumulated, unscaled and clipped as W's own. Layers whose
    backward pass did not ask for B (evaluation, ``on`` false, the first layer) get no gradient and are not
    stepped.

    The feedback weights must be in the optimizer that moves them, in groups without weight decay (a rule's own decay is
    its ``decay``); UserError otherwise. Under DistributedDataParallel give the wrapped model: the mean is then
    also taken over the ranks, each counting as one batch. With ``group`` each batch is divided among its processes, and
    what the layers collect is of the whole; give the bare model, whose other gradients are for the caller to add up
    before the step. RuntimeError at the step where a GradScaler would divide B's gradient too (a
    fused optimizer that unscales by itself): call ``scaler.unscale_(optimizer)`` first; and at
    ``step(closure)``. A second learner takes over from the first. A layer that is used several times in one
    pass adds its uses up, as dW does (under reentrant checkpointing they count as passes of their own).

    ``fraction``: the share of each batch's examples, the first ones, that amp, sparse and null see: what they cost is
    as much less. In a shuffled batch these are a random sample, so that (with scaling ``reference``, not centred) B's
    gradient has the whole batch's as its expectation; the other scalings see a batch of that size. ValueError for a
    share outside (0, 1].

    ``seed``: of the noise patches, where B learns from noise (`bench.learning.activity`); see `seed`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        group: Group | None = None,
        *,
        feedback_optimizer: torch.optim.Optimizer | None = None,
        fraction: float = 1.0,
        seed: int = 0,
    ) -> None:
        if not 0.0 < fraction <= 1.0:
            raise ValueError(f"fraction = {fraction} is out of range; it must lie in (0, 1].")
        self._ddp = model.process_group if isinstance(model, DistributedDataParallel) else None
        self._layers = [m for m in asymmetric_layers(model).values() if m.state.rule.learns]
        self._own = feedback_optimizer
        _check_optimizer(self._layers, optimizer, feedback_optimizer)
        self._group, self._due = group, False
        self._generator = torch.Generator()
        self.seed(seed)
        if group is None and self._ddp is None and distributed.is_available() and distributed.is_initialized():
            raise UserError("several processes train together: give FeedbackLearner the DDP-wrapped model, or a group.")
        for switch in {id(s): s for layer in self._layers if (s := layer.state.switch) is not None}.values():
            switch.release()  # two learners would undo each other's work
        hooks = [optimizer.register_step_pre_hook(self._before_step)]
        hooks += [_commit_with(layer) for layer in self._layers if layer.weight.requires_grad]

        def release() -> None:
            for hook in hooks:
                hook.remove()

        self._switch = Switch(release, group, fraction)
        for layer in self._layers:
            layer.state.switch = self._switch
            layer.state.forget()

    @property
    def on(self) -> bool:
        """Whether the layers collect B's gradient now; while they do not, B costs nothing and does not move."""
        return self._switch.on

    @on.setter
    def on(self, value: bool) -> None:
        self._switch.on = value

    def set_coefficients(self, coefficients: Mapping[str, float]) -> None:
        """Take these coefficients from here on; UserError unless they are those of the rule's primitives."""
        for layer in self._layers:
            layer.state.coefficients = check_coefficients(layer.state.rule, coefficients)

    def seed(self, seed: int) -> None:
        """Start the noise patches anew: the same seed, the same patches in each layer and step from here on."""
        self._generator.manual_seed(seed)

    def discard(self) -> None:
        """Forget what was collected since the last step, as zero_grad does for the loss's gradients."""
        for layer in self._layers:
            layer.state.forget()

    def step(self) -> None:
        """Move B by its own optimizer; call it after each step of W's. Does nothing where W's optimizer moves B.

        Does nothing either if W's step did not come, as when a GradScaler skipped it.
        """
        if self._own is None or not self._due:
            return
        self._due = False
        self._deliver()
        self._own.step()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(callable(a) for a in args[1:]) or kwargs.get("closure") is not None:
            raise RuntimeError("step(closure) runs the backward pass after B's gradient is due: call it before step().")
        if getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                "this optimizer divides all gradients by the loss scale, B's too, which never had it: call "
                "scaler.unscale_(optimizer) before scaler.step(optimizer)."
            )
        states = [layer.state for layer in self._layers]
        if any(s.begun for s in states) and not any(s.batches for s in states):
            raise RuntimeError(
                "B's gradient came with autograd.grad, which does not say what is training: use loss.backward()."
            )
        if self._own is None:
            self._deliver()
        elif self._due:
            raise RuntimeError(
                "B has an optimizer of its own: call FeedbackLearner.step() after each optimizer.step()."
            )
        self._due = self._own is not None

    def _deliver(self) -> None:
        """Set B.grad, and forget what it was made of."""
        for layer in self._layers:
            layer.state.drop_fresh()
            if layer.feedback is not None:
                layer.feedback.grad = None
        with torch.no_grad():
            if self._ddp is not None:
                self._add_up_ranks(self._ddp)
            active = [layer for layer in self._layers if layer.state.batches]
            if self._group is not None:
                self._group.add_up(total for layer in active if (total := layer.state.total) is not None)
            if active:
                self._set_gradients(active)
        for layer in active:
            layer.state.forget()
            layer.state.stepped = True

    def _set_gradients(self, active: list[AsymmetricLayer]) -> None:
        pairs = [(layer, layer.feedback) for layer in active if layer.feedback is not None]
        means = self._activity_means(active)
        state = active[0].state  # one rule and one set of coefficients for the network
        decay = state.coefficients.get("decay", 0.0)
        if not means and decay:  # one pass over B, where adding to zeros would take three
            filled = list(torch._foreach_mul([B.detach() for _, B in pairs], decay))
        else:
            filled = [means[id(layer)] if id(layer) in means else torch.zeros_like(B) for layer, B in pairs]
            if decay:
                torch._foreach_add_(filled, [B for _, B in pairs], alpha=decay)
        if pull := state.coefficients.get("self"):
            torch._foreach_add_(filled, [layer.weight for layer, _ in pairs], alpha=-pull)
        if state.rule.task_gradient:
            # W.grad is None in a step of B alone
            task = [(g, layer.weight.grad) for g, (layer, _) in zip(filled, pairs, strict=True)]
            torch._foreach_add_([g for g, dW in task if dW is not None], [dW for _, dW in task if dW is not None])
        for (_, B), grad in zip(pairs, filled, strict=True):
            B.grad = grad

    def _activity_means(self, active: list[AsymmetricLayer]) -> dict[int, Tensor]:
        """The mean of what each layer collected, or what noise gives; by the layer's id."""
        state = active[0].state
        if state.activity.is_noise and sees_batch(state.coefficients):
            weights = [(layer.maps, layer.weight.detach()) for layer in self._layers]  # all: a draw is one of the step
            drawn = noise_patches(state.activity, weights, self._generator)
            return {
                id(layer): noise_gradient(
                    layer.maps, state.activity, state.coefficients, patches, W, layer.feedback_weight()
                )
                for layer, patches, (_, W) in zip(self._layers, drawn, weights, strict=True)
                if layer in active
            }
        found = {id(layer): total for layer in active if (total := layer.state.total) is not None}
        shares = [1.0 / layer.state.batches for layer in active if layer.state.total is not None]
        if any(share != 1.0 for share in shares):  # most steps have one batch: save a pass over all of B
            torch._foreach_mul_(list(found.values()), shares)
        return found

    def _add_up_ranks(self, group: distributed.ProcessGroup) -> None:
        """Sums and counts over all ranks, so that each then has the same mean.

        Over every layer in one order, whatever a rank has used of the network: ranks must agree on the sizes.
        """
        states = [layer.state for layer in self._layers]
        if not states:
            return
        device, dtype = self._layers[0].weight.device, self._layers[0].weight.dtype
        counts = torch.tensor([float(s.batches) for s in states], device=device, dtype=dtype)
        parts = [counts]
        if states[0].reads_batch:
            for layer in self._layers:
                total = layer.state.total
                layer.state.total = torch.zeros_like(layer.weight) if total is None else total
                parts.append(layer.state.total.reshape(-1))
        whole = torch.cat(parts)
        distributed.all_reduce(whole, group=group)
        sums = torch.split(whole, [part.numel() for part in parts])
        for state, count in zip(states, sums[0].tolist(), strict=True):
            state.batches = round(count)
        for state, summed in zip(states, sums[1:], strict=False):
            assert state.total is not None
            state.total.copy_(summed.view(state.total.shape))
            if not state.batches:
                state.forget()


def _commit_with(layer: AsymmetricLayer) -> RemovableHandle:
    """Let what a backward pass brought for B count when W receives its gradient from that pass."""
    # W keeps its hook, and the layer keeps W: a circle through autograd, which Python's collector does not see into
    owner = weakref.ref(layer)

    def commit(_: Tensor) -> None:
        if (alive := owner()) is not None:
            alive.state.commit()

    handle: RemovableHandle = layer.weight.register_post_accumulate_grad_hook(commit)  # type: ignore[no-untyped-call]
    return handle


def _check_optimizer(
    layers: list[AsymmetricLayer], optimizer: torch.optim.Optimizer, own: torch.optim.Optimizer | None
) -> None:
    group_of = {id(p): group for group in (own or optimizer).param_groups for p in group["params"]}
    if own is not None:
        if not layers:
            raise UserError("an optimizer of B's own has no effect: no B learns here; leave it out.")
        if layers[0].state.rule.task_gradient:
            raise UserError(
                f"rule {layers[0].state.rule.name!r} ties B to W: an optimizer of B's own would make other steps; "
                "use the shared one."
            )
        ours = {id(layer.feedback) for layer in layers}
        if any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
            raise UserError("the feedback weights are in both optimizers; leave them out of the one that moves W.")
    for layer in layers:
        group = group_of.get(id(layer.feedback))
        if group is None:
            raise UserError(
                "the feedback weights are not in the optimizer: make it after convert(), from model.parameters() "
                "or from parameter_groups()."
            )
        if group.get("weight_decay"):
            raise UserError(
                "the feedback weights have a weight decay in the optimizer; B's decay is the rule's coefficient "
                "'decay'. Give them a group with weight_decay=0, as parameter_groups() does."
            )
        if group.get("maximize"):
            raise UserError("the optimizer maximizes; B's energy is to be minimized: negate the loss instead.")
        if layer.state.rule.task_gradient and not isinstance(optimizer, torch.optim.SGD):
            raise UserError(
                f"rule {layer.state.rule.name!r} needs SGD: W and B draw together only if equal gradients make "
                "equal steps."
            )


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float, feedback_lr_factor: float = 1.0
) -> list[dict[str, Any]]:
    """Optimizer groups by name: ``weights`` (decayed), ``plain`` (norms and biases: no decay), ``feedback``.

    ``feedback`` has lr·feedback_lr_factor and no weight decay; without learned B there is no such group.
    Parameters that do not require a gradient (``frozen``) are left out. UserError for a factor that has no effect.
    """
    layers = asymmetric_layers(model).values()
    feedback = {id(m.feedback): m.feedback for m in layers if m.feedback is not None and m.state.rule.learns}
    groups: dict[str, dict[str, Any]] = {
        "weights": {"params": [], "lr": lr, "weight_decay": weight_decay},
        "plain": {"params": [], "lr": lr, "weight_decay": 0.0},
        "feedback": {"params": list(feedback.values()), "lr": lr * feedback_lr_factor, "weight_decay": 0.0},
    }
    for p in model.parameters():
        if p.requires_grad:
            groups["weights" if p.dim() > 1 else "plain"]["params"].append(p)
    if not feedback and feedback_lr_factor != 1.0:
        raise UserError(f"feedback_lr_factor={feedback_lr_factor:g} has no effect: this rule's B does not learn.")
    return [{"name": name, **group} for name, group in groups.items() if group["params"]]
