"""Asymmetric layers: the error goes back through B, and B's own gradient is made on the way.

One autograd function serves both layer types. In its backward pass, dx = transpose(delta, B), dW and db are
exact, and what the primitives that see the batch ask of B is computed by hand (no second graph).

B's gradient does not pass through the loss. So it is not left in ``B.grad``, where whatever scales, clips or
accumulates the loss's gradients would distort it, but on the layer, as a sum and a count, until
`bench.learning.learner.FeedbackLearner` hands the mean to the optimizer at its step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bench.config import UserError
from bench.learning.activity import Activity, energy_gradient
from bench.learning.activity import centered as without_mean
from bench.learning.ops import ConvMaps, LinearMaps, Maps
from bench.learning.primitives import activity_gradient, needs_z, sees_batch
from bench.learning.rules import Rule
from bench.learning.switch import Switch


class FeedbackState:
    """What an asymmetric layer has beside a plain one, apart from its parameters.

    ``total`` and ``batches``: the sum of B's activity gradients since the last step, over how many backward passes.
    A pass counts once W has received its gradient from it (`commit`): one that asks for something else (an attack,
    a saliency map) is no training. Until then what it brought is ``fresh``; ``begun`` says that it has come by,
    ``first`` that it found no gradient in W, ``last_pass`` which one it was. ``stepped``: none came since the last
    step. ``sends``: whether anybody needed dx, as far as is known. ``exact``: send the true gradient. ``switch``:
    None until a learner takes the layer, and in a copy of the network. ``activity``: what the primitives see.
    """

    def __init__(self, rule: Rule, coefficients: Mapping[str, float], activity: Activity | None = None) -> None:
        self.activity = activity or Activity()
        self.activity.check(rule)
        self.rule = rule
        self.coefficients = check_coefficients(rule, coefficients)
        self.exact = False
        self.switch: Switch | None = None
        self.sends: bool | None = None
        self.stepped = False
        self.last_pass = -1
        self.forget()

    def forget(self) -> None:
        """Drop all that was collected."""
        self.total: Tensor | None = None
        self.batches = 0
        self.drop_fresh()

    def drop_fresh(self) -> None:
        self.fresh: Tensor | None = None
        self.begun = self.first = False

    def add(self, grad: Tensor) -> None:
        """The uses of a layer in one pass add up, as they do in dW."""
        self.fresh = grad if self.fresh is None else self.fresh.add_(grad)

    def commit(self) -> None:
        """Count the pass. If it found no gradient in W, zero_grad came before: what a skipped step left is void."""
        if self.begun:
            if self.first:
                self.total, self.batches = None, 0
            self.batches += 1
            self.stepped = False
        if self.fresh is not None:
            self.total = self.fresh if self.total is None else self.total.add_(self.fresh)
        self.drop_fresh()

    def __deepcopy__(self, memo: dict[int, Any]) -> FeedbackState:
        # a copy's B is in no optimizer
        return FeedbackState(self.rule, self.coefficients, self.activity)

    @property
    def reads_batch(self) -> bool:
        """Whether B's gradient needs the batch's activations."""
        return sees_batch(self.coefficients) and not self.activity.is_noise


def check_coefficients(rule: Rule, coefficients: Mapping[str, float]) -> dict[str, float]:
    """The coefficients, if they are exactly those of the rule's primitives; a UserError otherwise."""
    if missing := [p for p in rule.primitives if p not in coefficients]:
        raise UserError(f"rule {rule.name!r} needs the coefficient{'s' * (len(missing) > 1)} {', '.join(missing)}.")
    if extra := [p for p in coefficients if p not in rule.primitives]:
        own = ", ".join(rule.primitives) or "none"
        raise UserError(f"coefficient {', '.join(extra)} has no effect in rule {rule.name!r} (its own: {own}).")
    return dict(coefficients)


class _Asymmetric(torch.autograd.Function):
    """y = forward(x, W) + bias; dx = transpose(delta, B); dW = kernel_grad(x, delta); db = Σ delta."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, B: Tensor | None, bias: Tensor | None, layer: AsymmetricLayer
    ) -> Tensor:
        state, kind, K, b = layer.state, x.device.type, W, bias
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            low = torch.get_autocast_dtype(kind)
            x, K, b = x.to(low), W.to(low), None if bias is None else bias.to(low)
        y = layer.maps.forward(x, K, b)
        ctx.layer = layer
        # a plain layer keeps x and W (as autocast made it); this one keeps x and B, and refers to W
        ctx.save_for_backward(x, W, None if B is None else B.to(K.dtype), bias)
        # z is y less the bias. Held by reference, not through save_for_backward: the next layer may
        # overwrite y in place, which is legal for a plain layer; then z is computed again.
        learns = layer.training and state.rule.learns and ctx.needs_input_grad[0]
        ctx.y = y.detach() if learns and state.reads_batch and needs_z(state.coefficients) else None
        ctx.version = y._version if ctx.y is not None else None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        x, W, B, bias = ctx.saved_tensors
        layer: AsymmetricLayer = ctx.layer
        state, maps = layer.state, layer.maps
        wants_dx, wants_dW, _, wants_db, _ = ctx.needs_input_grad
        if state.exact:
            K = W.to(x.dtype)
        elif B is None:
            K = layer.feedback_weight().to(x.dtype)
        else:
            K = B
        dx, dW, db = maps.backward(x, delta, K, (wants_dx, wants_dW, wants_db))
        if layer.training:
            state.sends = wants_dx
        # the first layer sends nothing down, so its B has no effect and is not worth any work
        if wants_dx and layer.training and state.rule.learns and not state.exact:
            _collect(ctx, x, W, K, bias)
        return dx, dW if dW is None else dW.to(W.dtype), None, db if db is None else db.to(bias.dtype), None


def _collect(ctx: Any, x: Tensor, W: Tensor, B: Tensor, bias: Tensor | None) -> None:
    """Add this batch's gradient of B to the layer's sum."""
    layer: AsymmetricLayer = ctx.layer
    state = layer.state
    if state.switch is None:
        raise RuntimeError(
            "the feedback weights of this network learn, but no optimizer moves them: make "
            "FeedbackLearner(model, optimizer) before training, or call model.eval()."
        )
    if not state.switch.on or not len(x):
        return
    _begin(layer)
    if state.reads_batch:
        if x.dtype == torch.float16:
            raise RuntimeError(
                "float16 cannot hold the gradient of B: sums overflow and small coefficients vanish, and no loss scale "
                "reaches it. Use bfloat16."
            )
        grad = _activity_gradient(ctx, layer, x, W, B, bias)
        # in B's own layout: a fused optimizer reads memory as it lies
        same = grad.dtype == W.dtype and grad.stride() == W.stride()
        state.add(grad if same else torch.empty_like(W).copy_(grad))
    if not W.requires_grad:  # nothing will come to W that could commit it
        state.commit()


def _activity_gradient(
    ctx: Any, layer: AsymmetricLayer, x: Tensor, W: Tensor, B: Tensor, bias: Tensor | None
) -> Tensor:
    """This batch's gradient of B from the primitives that see it."""
    state, activity = layer.state, layer.state.activity
    assert state.switch is not None
    x, group = state.switch.seen(x)
    if activity.has_own_energies:
        n = len(x) if group is None else len(x) / group.share
        return energy_gradient(layer.maps, activity, state.coefficients, x, W, B, n)
    z = _reuse_z(ctx, x, W, bias) if needs_z(state.coefficients) else None
    if activity.centered:
        x, z = without_mean(layer.maps, x, z, W, group)
    normalized = activity.scaling == "normalized"
    return activity_gradient(layer.maps, state.coefficients, x, z, B, normalized=normalized, group=group)


def _begin(layer: AsymmetricLayer) -> None:
    """The layer's first use in a backward pass: note how it found W."""
    state, this_pass = layer.state, torch._C._current_graph_task_id()
    if this_pass == state.last_pass:
        return
    state.drop_fresh()
    if layer.feedback is not None:
        layer.feedback.grad = None  # of the last step: clipping by the norm of all gradients must not see it
    if state.stepped and layer.weight.grad is not None:
        raise RuntimeError(
            "the gradients of the last step are still there: call optimizer.zero_grad(set_to_none=True) after each "
            "step, or the mean of B's gradient over the accumulated batches is not defined."
        )
    state.last_pass, state.begun = this_pass, True
    state.first = layer.weight.requires_grad and layer.weight.grad is None


def _reuse_z(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """z of these examples, the first ones of those that the layer was given."""
    maps: Maps = ctx.layer.maps
    y, ctx.y = ctx.y, None
    if y is None or y._version != ctx.version:
        return maps.forward(x, W.to(x.dtype))
    y = y[: len(x)]
    z: Tensor = y if bias is None else y - maps.channelwise(bias.to(y.dtype))
    return z


class AsymmetricLayer(nn.Module):
    """What the two layer types share.

    ``feedback`` is B; for ``sign``, whose B is made from W, it is None and the buffer ``feedback_scale`` is s.

    B does not require a gradient in autograd's sense: it gets one from its learner.
    """

    weight: Tensor
    bias: Any  # a parameter or None; torch declares it differently in its two classes
    feedback: nn.Parameter | None
    feedback_scale: Tensor
    state: FeedbackState
    maps: Maps

    def _equip(self, maps: Maps, state: FeedbackState, generator: torch.Generator | None) -> None:
        rule = state.rule
        if rule.feedback == "weight":
            raise UserError(f"rule {rule.name!r} needs no asymmetric layer: its B is W. Use the plain layer.")
        W = self.weight.detach()
        self.maps, self.state = maps, state
        if rule.feedback == "sign":
            self.register_parameter("feedback", None)
            self.register_buffer("feedback_scale", W.std(correction=0))
        else:
            self.register_parameter("feedback", nn.Parameter(shuffled(W, generator), requires_grad=False))

    def feedback_weight(self) -> Tensor:
        """B as it is now, shaped like W; for ``sign`` it is made from W."""
        if self.feedback is None:
            return self.weight.detach().sign().mul_(self.feedback_scale)
        return self.feedback.detach()

    def _send(self, x: Tensor) -> Tensor:
        return cast(Tensor, _Asymmetric.apply(x, self.weight, self.feedback, self.bias, self))  # type: ignore[no-untyped-call]


def shuffled(W: Tensor, generator: torch.Generator | None) -> Tensor:
    """A random initial B: the entries of W in random order.

    For independent entries this is a draw from W's own distribution, whatever the initialiser was, and it
    is uncorrelated with W. Drawn on the CPU, so that a seed means the same on every device.
    """
    order = torch.randperm(W.numel(), generator=generator).to(W.device)
    return torch.empty_like(W).copy_(W.reshape(-1)[order].view(W.shape))


class AsymmetricLinear(AsymmetricLayer, nn.Linear):
    """``nn.Linear`` whose error goes back through B. Any leading dimensions: x is (n, *, in)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rule: Rule,
        coefficients: Mapping[str, float] | None = None,
        activity: Activity | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        self._equip(LinearMaps(), FeedbackState(rule, coefficients or {}, activity), generator)

    def forward(self, input: Tensor) -> Tensor:
        """y = x·Wᵀ + b; an input (in,) without a batch is a batch of one."""
        return self._send(input[None])[0] if input.dim() == 1 else self._send(input)


class AsymmetricConv2d(AsymmetricLayer, nn.Conv2d):
    """``nn.Conv2d`` whose error goes back through B: stride, padding (numbers, "same", "valid"), dilation, groups.

    UserError for a padding mode other than zeros: its transpose is another map.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        rule: Rule,
        coefficients: Mapping[str, float] | None = None,
        activity: Activity | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Conv2d.__init__(
            self,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        self._equip(conv_maps(self), FeedbackState(rule, coefficients or {}, activity), generator)

    def forward(self, input: Tensor) -> Tensor:
        """The convolution; an input (in, h, w) without a batch is a batch of one."""
        return self._send(input[None])[0] if input.dim() == 3 else self._send(input)


def conv_maps(layer: nn.Conv2d) -> ConvMaps:
    """The maps of this convolution; a UserError with the reason for what they do not cover."""
    if layer.padding_mode != "zeros":
        raise UserError(
            f"padding_mode {layer.padding_mode!r} is not supported by an asymmetric convolution: the way back "
            "would not be the transpose of the way there. Use padding_mode='zeros'."
        )
    stride, dilation = (cast(tuple[int, int], v) for v in (layer.stride, layer.dilation))
    if isinstance(layer.padding, str):
        same = layer.padding == "same"
        whole = [d * (k - 1) if same else 0 for d, k in zip(dilation, layer.kernel_size, strict=True)]
        padding, extra = (whole[0] // 2, whole[1] // 2), (whole[0] % 2, whole[1] % 2)
    else:
        padding, extra = cast(tuple[int, int], layer.padding), (0, 0)
    return ConvMaps(stride, padding, dilation, layer.groups, extra)


def asymmetric_from(
    layer: nn.Linear | nn.Conv2d,
    rule: Rule,
    coefficients: Mapping[str, float],
    generator: torch.Generator | None,
    *,
    activity: Activity | None = None,
) -> AsymmetricLinear | AsymmetricConv2d:
    """The asymmetric layer that can take this one's place, with the same parameter objects."""
    kind: type[AsymmetricLinear | AsymmetricConv2d]
    kind, maps = (
        (AsymmetricLinear, LinearMaps()) if isinstance(layer, nn.Linear) else (AsymmetricConv2d, conv_maps(layer))
    )
    new = kind.__new__(kind)
    new.__dict__.update(layer.__dict__)
    new.__dict__.update(_parameters=dict(layer._parameters), _buffers=dict(layer._buffers))
    new._equip(maps, FeedbackState(rule, coefficients, activity), generator)
    return new


def asymmetric_layers(model: nn.Module) -> dict[str, AsymmetricLayer]:
    """The asymmetric layers of a network by name, in the order of `nn.Module.named_modules`."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AsymmetricLayer)}


@contextmanager
def exact_gradients(model: nn.Module) -> Iterator[None]:
    """Within, the layers send the true gradient (dx = Wᵀ·delta) and B learns nothing.

    For attacks and for measuring angles. It holds for the backward passes that run within.
    """
    layers = list(asymmetric_layers(model).values())
    before = [layer.state.exact for layer in layers]
    for layer in layers:
        layer.state.exact = True
    try:
        yield
    finally:
        for layer, exact in zip(layers, before, strict=True):
            layer.state.exact = exact
