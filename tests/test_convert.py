"""Conversion is strict: the same parameters, nothing lost, and a reason for everything left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bench.config import UserError
from bench.learning.convert import convert
from bench.learning.layers import AsymmetricConv2d, AsymmetricLinear, asymmetric_layers
from bench.learning.rules import RULES, parse_rule


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5))


def test_parameters_stay_the_same_objects_and_the_output_the_same() -> None:
    model = small().eval()
    x = torch.randn(2, 2, 6, 6)
    before, out = dict(model.named_parameters()), model(x)
    report = convert(model, "mirror", {"amp": 0.1, "decay": 0.2})
    after = dict(model.named_parameters())
    assert report.swapped == ["0", "4"]
    assert report.kept == {}
    assert type(model[0]) is AsymmetricConv2d
    assert type(model[4]) is AsymmetricLinear
    assert all(after[name] is p for name, p in before.items())
    assert set(after) - set(before) == {"0.feedback", "4.feedback"}
    assert torch.equal(model(x), out)
    assert not model[0].training


def test_B_depends_on_the_seed_alone_and_is_uncorrelated_with_W() -> None:
    base = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 2))
    models = [copy.deepcopy(base) for _ in range(3)]
    state = torch.get_rng_state()
    for model, seed in zip(models, (1, 1, 2), strict=True):
        convert(model, "feedback", seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    a, b, c = (m[0].feedback for m in models)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    cosine = nn.functional.cosine_similarity(a.flatten(), base[0].weight.flatten(), dim=0)
    assert abs(cosine) < 5 / 300  # 90,000 entries: one standard deviation is 1/300


def test_a_module_that_stands_in_two_places_stays_one() -> None:
    inner = nn.Linear(4, 4)
    model = nn.Sequential(inner, nn.ReLU(), inner)
    report = convert(model, "feedback")
    assert model[0] is model[2]
    assert report.swapped == ["0", "2"]


class Odd(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def test_what_is_left_alone_has_its_reason() -> None:
    tied = nn.Linear(4, 4)
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 4),
            "odd": Odd(4, 4),
            "circular": nn.Conv2d(2, 2, 3, padding_mode="circular"),
            "conv1d": nn.Conv1d(2, 2, 3),
            "tied": tied,
            "tied_too": nn.Linear(4, 4),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "hooked": nn.Linear(4, 4),
            "constant": nn.Linear(4, 4),
            "attention": nn.MultiheadAttention(4, 1),
        }
    )
    model["tied_too"].weight = tied.weight
    model["hooked"].register_forward_hook(lambda *_: None)
    nn.init.zeros_(model["constant"].weight)
    report = convert(model, "feedback")
    assert report.swapped == ["plain"]
    said = {
        "odd": "Odd is not exactly",
        "circular": "padding_mode 'circular' is not supported",
        "conv1d": "Conv1d is not exactly",
        "tied": "belongs to another layer too",
        "tied_too": "belongs to another layer too",
        "normed": "not exactly Linear",
        "hooked": "hooks",
        "constant": "constant",
        "attention": "MultiheadAttention has weights that are no Linear or Conv2d",
        "attention.out_proj": "NonDynamicallyQuantizableLinear is not exactly",
    }
    assert set(report.kept) == set(said)
    for name, reason in said.items():
        assert reason in report.kept[name]


def test_nothing_to_swap_is_an_error() -> None:
    with pytest.raises(UserError, match="nothing in this network"):
        convert(nn.Sequential(nn.ReLU()), "feedback")
    with pytest.raises(UserError, match=r"wrap it in nn\.Sequential"):
        convert(nn.Linear(2, 2), "feedback")


def test_coefficients_must_be_those_of_the_rule() -> None:
    with pytest.raises(UserError, match="needs the coefficient amp"):
        convert(small(), "mirror", {"decay": 1.0})
    with pytest.raises(UserError, match=r"sparse has no effect in rule 'mirror'"):
        convert(small(), "mirror", {"decay": 1.0, "amp": 1.0, "sparse": 1.0})
    with pytest.raises(UserError, match="has no effect in rule 'backprop'"):
        convert(small(), "backprop", {"decay": 1.0})


def test_an_unsupported_layer_is_refused_when_it_is_built() -> None:
    with pytest.raises(UserError, match="padding_mode='zeros'"):
        AsymmetricConv2d(2, 2, 3, padding_mode="reflect", rule=RULES["feedback"])
    with pytest.raises(UserError, match="its B is W"):
        AsymmetricLinear(2, 2, rule=RULES["backprop"])


def test_layers_can_be_built_by_hand() -> None:
    layer = AsymmetricConv2d(
        2, 4, 3, stride=2, padding="valid", rule=RULES["symmetric"], coefficients={"decay": 1, "self": 1}
    )
    assert layer(torch.randn(1, 2, 7, 7)).shape == (1, 4, 3, 3)


def test_backprop_swaps_nothing_and_frozen_trains_the_last_layer_only() -> None:
    plain, frozen = small(), small()
    assert convert(plain, "backprop").swapped == []
    assert all(p.requires_grad for p in plain.parameters())
    report = convert(frozen, "frozen")
    assert not asymmetric_layers(frozen)
    assert [n for n, p in frozen.named_parameters() if p.requires_grad] == ["4.weight", "4.bias"]
    assert report.frozen == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_converted_network_saves_and_loads() -> None:
    first, second = small(), small()
    for seed, model in enumerate((first, second)):
        convert(model, "sign" if seed > 9 else "feedback", seed=seed)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first[0].feedback, second[0].feedback)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("amp+decay", "mirror"),
        ("decay+amp", "mirror"),
        ("self+decay", "symmetric"),
        ("sparse+amp", "activation"),
        ("null+decay+amp", "information"),
        ("self+null", "null+self"),
        ("self+sparse+null+amp+decay", "decay+amp+null+sparse+self"),
        ("kolen-pollack", "kolen-pollack"),
    ],
)
def test_every_spelling_has_one_canonical_name(text: str, name: str) -> None:
    rule = parse_rule(text)
    assert rule.name == name
    assert parse_rule(rule.name) == rule


@pytest.mark.parametrize(
    "text", ["", "symetric", "amp+", "amp+amp", "amp+mirror", "amp + decay", "backprop+amp", "AMP"]
)
def test_an_unknown_rule_lists_the_valid_ones(text: str) -> None:
    with pytest.raises(UserError) as error:
        parse_rule(text)
    assert "\n" not in str(error.value)
    if text == "symetric":
        assert "Did you mean 'symmetric'?" in str(error.value)
        assert all(name in str(error.value) for name in RULES)
