"""Turn any network's Conv2d and Linear into asymmetric layers, and say what was done and what was not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from bench.config import UserError
from bench.learning.activity import Activity
from bench.learning.layers import AsymmetricLayer, asymmetric_from, check_coefficients, conv_maps
from bench.learning.rules import Rule, parse_rule

_CANDIDATES = (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear)


@dataclass
class Conversion:
    """What `convert` did, by module name. ``kept`` gives the reason why a layer with weights was left as it is.

    ``frozen``: the parameters that were told not to learn (the control ``frozen``).
    """

    rule: Rule
    swapped: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)


def convert(
    model: nn.Module,
    rule: Rule | str,
    coefficients: Mapping[str, float] | None = None,
    *,
    activity: Activity | None = None,
    seed: int = 0,
) -> Conversion:
    """Replace, in place, every Conv2d and Linear of exactly that type by its asymmetric layer.

    The parameters stay the same objects (an optimizer made before still holds W), a module that stands in
    several places stays one module, and B is drawn from ``seed``: W's entries in random order. ``backprop``
    swaps nothing, because its B is W; ``frozen`` stops all parameters but those of the last layer.

    ``activity``: what B's gradient sees; None: the batch's activations (`bench.learning.activity`).

    UserError if the rule and the rest do not fit, or if nothing could be swapped.
    """
    rule = parse_rule(rule) if isinstance(rule, str) else rule
    coefficients = check_coefficients(rule, coefficients or {})
    activity = activity or Activity()
    activity.check(rule)
    report = Conversion(rule)
    if rule.feedback == "weight":
        _keep_all(model, report)
        return report
    if isinstance(model, (nn.Linear, nn.Conv2d)):
        raise UserError("the network is a single layer, which has no place to be swapped in: wrap it in nn.Sequential.")
    generator = torch.Generator().manual_seed(seed)
    owners = _weight_owners(model)
    made: dict[nn.Module, AsymmetricLayer] = {}
    for parent_name, parent in list(model.named_modules()):
        for child_name, child in list(parent._modules.items()):  # named_children() skips repetitions
            name = f"{parent_name}.{child_name}" if parent_name else child_name
            if isinstance(child, AsymmetricLayer) or not isinstance(child, _CANDIDATES):
                continue
            if reason := _why_not(child, owners):
                report.kept[name] = reason
                continue
            if child not in made:
                assert isinstance(child, (nn.Linear, nn.Conv2d))
                made[child] = asymmetric_from(child, rule, coefficients, generator, activity=activity)
            setattr(parent, child_name, made[child])
            report.swapped.append(name)
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{kept}.") for kept in report.kept)
        if not inside and not isinstance(module, (AsymmetricLayer, *_CANDIDATES)) and _has_weights(module):
            report.kept[name] = f"{type(module).__name__} has weights that are no Linear or Conv2d"
    if not report.swapped:
        reasons = "; ".join(f"{name}: {why}" for name, why in report.kept.items()) or "it has no Conv2d and no Linear"
        raise UserError(f"nothing in this network could be made asymmetric ({reasons}).")
    return report


def _has_weights(module: nn.Module) -> bool:
    """Whether the module itself holds a weight matrix: an attention's in_proj_weight, an LSTM's, an Embedding's."""
    return any(p.dim() > 1 for p in module.parameters(recurse=False))


def _keep_all(model: nn.Module, report: Conversion) -> None:
    """``backprop`` and ``frozen``: plain layers, whose B is W. (The running statistics of norms go on moving.)"""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, _CANDIDATES)}
    report.kept.update(dict.fromkeys(layers, f"rule {report.rule.name!r}: B is W"))
    if report.rule.trains == "last":
        if not layers:
            raise UserError("rule 'frozen' trains the last Linear or Conv2d, and this network has none.")
        last = list(layers)[-1]
        for name, p in model.named_parameters():
            if not name.startswith(f"{last}."):
                p.requires_grad_(False)
                report.frozen.append(name)


def _weight_owners(model: nn.Module) -> dict[int, int]:
    """How many distinct modules hold each weight, by the parameter's id."""
    owners: dict[int, int] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            owners[id(weight)] = owners.get(id(weight), 0) + 1
    return owners


def _why_not(layer: nn.Module, owners: Mapping[int, int]) -> str | None:
    """The reason for leaving this layer as it is, or None."""
    kind = type(layer)
    if kind not in (nn.Linear, nn.Conv2d):
        return f"{kind.__name__} is not exactly Linear or Conv2d: its forward may be another"
    if not isinstance(layer.weight, nn.Parameter):
        return "its weight is computed (a parametrization or a weight norm), not a parameter"
    if owners[id(layer.weight)] > 1:
        return "its weight belongs to another layer too, and one B cannot serve both"
    if any((layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)):
        return "it has hooks, which a swap would lose; register them after convert()"
    if bool((layer.weight == layer.weight.flatten()[0]).all()):
        return "its weight is constant, so that B would carry no signal"
    if isinstance(layer, nn.Conv2d):
        try:
            conv_maps(layer)
        except UserError as error:
            return str(error)
    return None
