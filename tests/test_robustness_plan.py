"""What a measurement of robustness runs, where its coefficients come from, and what it refuses."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.cli import _parser, main
from bench.config import TrialConfig, UserError
from bench.files import write_yaml
from bench.noise import CORRUPTION_SEVERITIES, SITES
from bench.place import Options
from bench.robustness_plan import Plan, RobustnessConfig, rules_of
from bench.verbs.common import BAD_INPUT
from bench.verbs.robustness import _levels

MIRROR = {"amp": 0.1, "decay": 0.01}
ALL = {
    "update": (0.1, 0.3),
    "weight": (0.1, 0.2),
    "input": (0.1, 0.2),
    "fgsm": (0.01, 0.02),
    "square": (0.01, 0.02),
}


def rules(*names: str, **changes: Any) -> dict[str, Any]:
    own = {"mirror": {"coefficients": MIRROR}, "sparse": {"coefficients": {"sparse": 0.1}}}
    return {n: TrialConfig(rule=n, **{**own.get(n, {}), **changes}).to_dict() for n in ("backprop", *names)}


def config(**changes: Any) -> RobustnessConfig:
    values = {"name": "m", "rules": rules("mirror"), "levels": ALL, "seeds": 2, "gradients": ("true", "feedback")}
    return RobustnessConfig(**{**values, **changes})


def plan(key: str = "cpu 0", **changes: Any) -> Plan:
    return Plan(config(**changes), key=key, folder=Path("results/m"))


def named(made: Plan) -> dict[str, str]:
    """What each uid is of."""
    trainings = {uid: "update" if p.config.update_noise else "network" for uid, p in made.trainings().items()}
    return trainings | {uid: p.evaluation["site"] for uid, p in made.probes().items()}


# --- uids ------------------------------------------------------------------------------------------------

GROWN: list[dict[str, Any]] = [
    {"rules": rules("mirror", "feedback")},
    {"seeds": 3},
    {"levels": {**ALL, "weight": (0.05, 0.1, 0.2, 0.4), "update": (0.1, 0.2, 0.3)}},
    {"levels": {**ALL, "activation": (0.1, 0.2)}},
]


@pytest.mark.parametrize("more", GROWN)
def test_a_plan_that_grows_holds_all_that_it_held(more: dict[str, Any]) -> None:
    before, after = named(plan()), named(plan(**more))
    assert before == named(plan())  # and is the same each time
    assert before.items() < after.items()


EVERYTHING = {"network", *ALL}
ANOTHER: list[tuple[dict[str, Any], set[str]]] = [
    ({"key": "cuda 0"}, EVERYTHING),
    ({"key": "cpu 1"}, EVERYTHING),
    ({"rules": rules("mirror", epochs=11)}, EVERYTHING),
    ({"draws": 4}, {"weight", "input"}),
    ({"clip": True}, {"input"}),
    ({"attacked": 100}, {"fgsm", "square"}),
    ({"queries": 2000}, {"square"}),
]


@pytest.mark.parametrize(("changes", "renamed"), ANOTHER)
def test_another_setting_is_another_run_where_it_matters_and_there_alone(
    changes: dict[str, Any], renamed: set[str]
) -> None:
    before, after = named(plan()), named(plan(**changes))
    assert {what for uid, what in before.items() if uid not in after} == renamed
    assert {what for uid, what in before.items() if uid in after} == EVERYTHING - renamed
    assert sorted(before.values()) == sorted(after.values())


def test_every_run_says_what_it_is_of() -> None:
    """Two runs that differ in any of rule, seed, site, gradient and level have two uids."""
    made = plan()
    assert len(made.trainings()) == 2 * 2 * (1 + 2)
    through_b = 2 * 3  # mirror's own, of two seeds: backprop's are the true ones
    assert len(made.probes()) == 2 * 2 * 4 * 3 + through_b


def test_level_zero_is_in_every_curve_and_seeds_are_paired() -> None:
    made = plan()
    curves: dict[tuple[str, str, int], list[float]] = {}
    for probe in made.probes().values():
        for curve in probe.curves:
            curves.setdefault((curve, probe.network.config.rule, probe.network.config.seed), []).append(probe.level)
    names = {"weight", "input", "fgsm", "fgsm through B", "square"}
    assert set(curves) == {(c, rule, seed) for c in names for rule in ("backprop", "mirror") for seed in (2000, 2001)}
    for (curve, _, _), levels in curves.items():
        assert levels == [0.0, *ALL[curve.removesuffix(" through B")]]
    order = [(p.config.seed, p.config.rule, p.config.update_noise) for p in made.trainings().values()]
    first = [(seed, rule, 0.0) for seed in (2000, 2001) for rule in ("backprop", "mirror")]
    assert order[:4] == first  # networks before noise, seeds outermost
    assert order[4:] == [(seed, rule, level) for seed, rule, _ in first for level in (0.1, 0.3)]


def test_noise_in_a_b_that_does_not_learn_is_nowhere() -> None:
    on_b = {"update_on": "feedback", "gradients": ("true",)}
    made = plan(rules=rules("feedback", "mirror"), seeds=1, levels={"update": (0.1, 0.3)}, **on_b)
    of = {network.config.rule: network for network in made.networks}
    assert [made.config.unaffected(rule) for rule in ("backprop", "feedback", "mirror")] == [True, True, False]
    noisy = made.noisy(of["mirror"], 0.1)
    assert (noisy[1].update_noise, noisy[1].update_noise_on) == (0.1, "feedback")
    assert noisy[0] != made.noisy(of["mirror"], 0.0)[0] == of["mirror"].uid
    assert [p.config.rule for p in made.trainings().values()] == ["backprop", "feedback", "mirror", "mirror", "mirror"]


def test_where_no_b_learns_noise_in_forward_is_noise_in_both() -> None:
    def noisy(on: str, rule: str) -> str:
        made = plan(rules=rules("mirror"), seeds=1, levels={"update": (0.1, 0.3)}, update_on=on, gradients=("true",))
        return made.noisy(next(n for n in made.networks if n.config.rule == rule), 0.1)[0]

    assert noisy("forward", "backprop") == noisy("both", "backprop")
    assert noisy("forward", "mirror") != noisy("both", "mirror")


def test_where_b_is_w_an_attack_through_b_is_the_true_one() -> None:
    made = plan(rules=rules("frozen", "mirror"), seeds=1, levels={"fgsm": (0.01, 0.02), "square": (0.01, 0.02)})
    found = {
        (probe.network.config.rule, probe.curves, probe.evaluation["gradient"]) for probe in made.probes().values()
    }
    both = ("fgsm", "fgsm through B")
    assert found == {
        ("backprop", both, "true"),
        ("frozen", both, "true"),
        ("mirror", ("fgsm",), "true"),
        ("mirror", ("fgsm through B",), "feedback"),
        *((rule, ("square",), "true") for rule in ("backprop", "frozen", "mirror")),
    }


# --- what a configuration refuses ------------------------------------------------------------------------

WEIGHT, UPDATE, FGSM, SQUARE = ({site: (0.1, 0.2)} for site in ("weight", "update", "fgsm", "square"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"levels": {}}, "nothing to measure"),
        ({"levels": {"wieght": (0.1, 0.2)}}, "Did you mean 'weight'"),
        ({"levels": {"weight": (0.1,)}}, "two or more"),
        ({"levels": {"weight": (0.2, 0.1)}}, "rising"),
        ({"levels": {"weight": (0.1, 0.1)}}, "rising"),
        ({"levels": {"weight": (0.0, 0.1)}}, "out of range"),
        ({"levels": {"weight": (0.1, float("inf"))}}, "out of range"),
        ({"levels": {"weight": (1e-8, 0.1)}}, "closer than 1e-06"),
        ({"levels": {"weight": (0.1, 0.1 + 1e-9)}}, "closer than 1e-06"),
        ({"levels": {"fgsm": (8, 16)}}, "8 is 0.03137"),
        ({"seeds": 0}, "seeds = 0"),
        ({"draws": 0}, "draws = 0"),
        ({"gradients": ("true", "true")}, "--gradient true,true"),
        ({"gradients": ("sign",)}, "'true' or 'feedback'"),
        ({"levels": UPDATE, "draws": 3}, "--draws has no effect"),
        ({"levels": FGSM, "draws": 3}, "--draws has no effect"),
        ({"levels": WEIGHT, "update_on": "forward"}, "--on has no effect without site update"),
        ({"levels": UPDATE, "update_on": "feedback", "rules": rules("sign")}, "--on feedback has no effect"),
        ({"levels": WEIGHT, "clip": True}, "--clip has no effect without site input"),
        ({"levels": SQUARE, "gradients": ("feedback",)}, "--gradient has no effect"),
        ({"levels": WEIGHT, "gradients": ("true", "feedback")}, "--gradient has no effect"),
        ({"levels": WEIGHT, "attacked": 10}, "--attacked has no effect"),
        ({"levels": FGSM, "queries": 2000}, "--queries has no effect"),
        ({"levels": SQUARE, "queries": 10}, "queries = 10"),
    ],
)
def test_a_setting_out_of_range_or_without_effect_is_refused(changes: dict[str, Any], said: str) -> None:
    plain = {"gradients": ("true",)}
    RobustnessConfig(**{"name": "m", "rules": rules("mirror"), "levels": WEIGHT, **plain})
    with pytest.raises(UserError, match=re.escape(said)):
        config(**{**plain, **changes})


def test_the_defaults_of_the_command_line_are_those_of_the_configuration() -> None:
    given = _parser().parse_args(["robustness"])
    assert (given.seeds, given.draws, given.on) == (
        RobustnessConfig.seeds,
        RobustnessConfig.draws,
        RobustnessConfig.update_on,
    )
    assert (given.clip, given.attacked, given.queries) == (
        RobustnessConfig.clip,
        RobustnessConfig.attacked,
        RobustnessConfig.queries,
    )
    assert (given.gradient,) == RobustnessConfig.gradients


# --- where coefficients and the recipe come from ---------------------------------------------------------


@pytest.fixture
def best(tmp_path: Path) -> Callable[..., Path]:
    """Writes a configuration as a search leaves it."""

    def write(rule: str, where: str = "file", **changes: Any) -> Path:
        values = {"epochs": 30, "lr": 0.05, "arch": "resnet20", **changes}
        path = tmp_path / where / "best.yaml"
        write_yaml(path, TrialConfig(rule=rule, **values).to_dict())
        return path

    return write


def found(tmp_path: Path, names: str = "", **more: Any) -> dict[str, TrialConfig]:
    return rules_of([n for n in names.split(",") if n], **{"changes": {}, "options": Options(results=tmp_path), **more})


def test_a_rule_without_coefficients_and_without_a_study_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bench search --rule mirror --arch resnet18 --dataset digits"):
        found(tmp_path, "amp+decay")


def test_coefficients_from_the_rules_own_study_and_its_recipe_for_all(
    tmp_path: Path, best: Callable[..., Path]
) -> None:
    best("mirror", "mirror-resnet20-digits", coefficients=MIRROR)
    made = found(tmp_path, "feedback,mirror,kolen-pollack", arch="resnet20")
    assert list(made) == ["backprop", "feedback", "mirror", "kolen-pollack"]
    assert made["mirror"].coefficients == {"decay": 0.01, "amp": 0.1}
    assert {(c.epochs, c.lr, c.arch, c.seed) for c in made.values()} == {(30, 0.05, "resnet20", 0)}
    longer = found(tmp_path, "mirror", arch="resnet20", changes={"epochs": 40, "lr": 0.2})
    assert {(c.epochs, c.lr) for c in longer.values()} == {(40, 0.2)}


def test_a_rule_in_rule_and_in_config_is_one_rule_and_no_study_is_asked_for(
    tmp_path: Path, best: Callable[..., Path]
) -> None:
    path = best("mirror", coefficients=MIRROR, feedback_lr_factor=2.0)
    made = found(tmp_path, "amp+decay", files=[path])
    assert list(made) == ["backprop", "mirror"]
    assert made["mirror"] == TrialConfig(
        rule="mirror", coefficients=MIRROR, feedback_lr_factor=2.0, epochs=30, lr=0.05, arch="resnet20"
    )
    assert made["backprop"] == TrialConfig(rule="backprop", epochs=30, lr=0.05, arch="resnet20")
    with pytest.raises(UserError, match="given twice"):
        found(tmp_path, files=[path, path])


def test_the_network_is_the_files_unless_another_is_named(tmp_path: Path, best: Callable[..., Path]) -> None:
    path = best("mirror", coefficients=MIRROR)
    assert {c.arch for c in found(tmp_path, "sign", files=[path]).values()} == {"resnet20"}
    assert {c.arch for c in found(tmp_path, "sign", files=[path], arch="lenet").values()} == {"lenet"}


def test_backprop_alone_has_the_recipe_of_the_data_set(tmp_path: Path, best: Callable[..., Path]) -> None:
    assert found(tmp_path, "backprop") == {"backprop": TrialConfig(rule="backprop", batch_size=32, lr=0.02)}
    path = best("backprop")
    assert found(tmp_path, "sign", files=[path])["sign"].lr == 0.05


def test_what_a_search_for_robustness_measured_is_no_part_of_the_network(
    tmp_path: Path, best: Callable[..., Path]
) -> None:
    noisy = {"noise_site": "weight", "noise_levels": (0.1, 0.2), "noise_draws": 3}
    made = found(tmp_path, files=[best("mirror", coefficients=MIRROR, **noisy)])
    assert {(c.noise_site, c.noise_levels, c.noise_draws) for c in made.values()} == {(None, (), 1)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 20}, r"differ in epochs \(epochs is 20 for 'sparse' and 30 .* \(--epochs …\)"),
        ({"lr": 0.1}, r"differ in lr \(lr is 0\.1 for 'sparse' and 0\.05 .* \(--set lr=…\)"),
        ({"arch": "lenet"}, r"differ in arch .* \(--arch …\)"),
    ],
)
def test_different_recipes_are_refused_and_the_key_is_named(
    tmp_path: Path, best: Callable[..., Path], changes: dict[str, Any], said: str
) -> None:
    one = best("mirror", coefficients=MIRROR)
    other = best("sparse", "other", coefficients={"sparse": 0.1}, **changes)
    with pytest.raises(UserError, match=said):
        found(tmp_path, files=[one, other])


def test_files_that_are_no_configuration_are_refused(tmp_path: Path, best: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="name the rules to measure"):
        found(tmp_path)
    write_yaml(tmp_path / "x.yaml", {"lr": 0.1})
    with pytest.raises(UserError, match="names no rule"):
        found(tmp_path, files=[tmp_path / "x.yaml"])
    with pytest.raises(UserError, match="set update_noise=0"):
        found(tmp_path, files=[best("mirror", coefficients=MIRROR, update_noise=0.1)])


def test_checkpoints_of_a_rule_are_seeds_of_one_configuration(tmp_path: Path) -> None:
    def trained(seed: int, **changes: Any) -> TrialConfig:
        values = {"rule": "mirror", "coefficients": MIRROR, "arch": "lenet", **changes}
        return TrialConfig(seed=seed, **values)

    made = found(tmp_path, "sign", given=[trained(3), trained(5)])
    assert list(made) == ["backprop", "sign", "mirror"]
    assert {c.arch for c in made.values()} == {"lenet"}
    for other in ({"lr": 0.3}, {"coefficients": {"amp": 0.2, "decay": 0.01}}):
        with pytest.raises(UserError, match=f"differ in {next(iter(other))}"):
            found(tmp_path, given=[trained(3), trained(5, **other)])
    with pytest.raises(UserError, match="recipes differ in lr"):
        found(tmp_path, given=[trained(3), trained(3, rule="sign", coefficients={}, lr=0.3)])
    with pytest.raises(UserError, match="leave out --arch"):
        found(tmp_path, given=[trained(3)], arch="resnet18")


# --- the command line ------------------------------------------------------------------------------------


def levels(*arguments: str) -> dict[str, tuple[float, ...]]:
    given: argparse.Namespace = _parser().parse_args(["robustness", "--rule", "sign", *arguments])
    return _levels(given)


def test_sites_attacks_and_their_levels() -> None:
    assert levels() == dict.fromkeys(SITES, ())  # their own
    assert list(levels("--attack", "pgd,fgsm,pgd")) == ["pgd", "fgsm"]
    assert levels("--site", "weight, update") == {"weight": (), "update": ()}
    assert levels("--site", "input", "--sigma", "0.1,0.2,3") == {"input": (0.1, 0.2, 3.0)}
    assert levels("--site", "input", "--sigma", "imagenet-c") == {"input": CORRUPTION_SEVERITIES["ImageNet-C"]}
    assert levels("--attack", "fgsm", "--epsilon", "4/255, 8/255") == {"fgsm": (4 / 255, 8 / 255)}
    assert levels("--site", "input", "--sigma", "CIFAR10-C") == {"input": CORRUPTION_SEVERITIES["CIFAR-10-C"]}
    found = levels("--site", "weight", "--sigma", "1,2", "--attack", "fgsm,square", "--epsilon", "0.1,0.2")
    assert found == {"weight": (1.0, 2.0), "fgsm": (0.1, 0.2), "square": (0.1, 0.2)}


R = ["robustness", "--rule", "sign", "--arch", "lenet"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["robustness"], "name the rules"),
        (["robustness", "--rule", "sgin"], "Did you mean 'sign'"),
        (["robustness", "--rule", "mirror"], "bench search --rule mirror"),
        (["robustness", "--rule", "sign", "--arch", "lenett"], "Did you mean 'lenet'"),
        ([*R, "--dataset", "digit"], "Did you mean 'digits'"),
        ([*R, "--site", "wieght"], "Did you mean 'weight'"),
        ([*R, "--site", ""], "--site '' names none"),
        ([*R, "--attack", "fgms"], "Did you mean 'fgsm'"),
        ([*R, "--attack", ","], "names none"),
        ([*R, "--attack", "fgsm", "--gradient", "fedback"], "Did you mean 'feedback'"),
        ([*R, "--gradient", "feedback"], "--gradient has no effect"),
        ([*R, "--attacked", "5"], "--attacked has no effect"),
        ([*R, "--queries", "5000"], "--queries has no effect"),
        ([*R, "--site", "update", "--draws", "3"], "--draws has no effect"),
        ([*R, "--site", "weight", "--on", "forward"], "--on has no effect"),
        ([*R, "--site", "update", "--on", "W"], "'both', 'forward' or 'feedback'"),
        ([*R, "--site", "update", "--keep-networks"], "--keep-networks has no effect"),
        ([*R, "--site", "weight", "--clip"], "--clip has no effect"),
        ([*R, "--sigma", "0.1,0.2"], "--sigma is in the unit of one site"),
        ([*R, "--site", "weight,input", "--sigma", "0.1,0.2"], "--sigma is in the unit of one site"),
        ([*R, "--site", "weight", "--sigma", "imagenet-c"], "belongs to --site input"),
        ([*R, "--site", "weight", "--sigma", "0.1;0.2"], "write numbers with commas"),
        ([*R, "--site", "weight", "--sigma", ""], "write numbers with commas"),
        ([*R, "--site", "weight", "--sigma", "0.2,0.1"], "rising"),
        ([*R, "--site", "weight", "--sigma", "0.2"], "two or more"),
        ([*R, "--epsilon", "0.1,0.2"], "--epsilon is of attacks"),
        ([*R, "--attack", "fgsm", "--epsilon", "8,16"], "pixel values of [0, 1]"),
        ([*R, "--epochs", "0"], "epochs = 0"),
        ([*R, "--seeds", "0"], "seeds = 0"),
        ([*R, "--concurrent", "0"], "concurrent = 0"),
        ([*R, "--set", "epochs=3"], "not part of the recipe"),
        ([*R, "--set", "update_noise=0.1"], "set update_noise=0"),
        ([*R, "--study", "none"], "--study none: there is no"),
        ([*R, "--config", "none.yaml"], "none.yaml"),
        ([*R, "--name", "controls"], "--name"),
        ([*R, "--device", "tpu9"], "cannot be used here"),
        (["robustness", "--checkpoint", "none.pt"], "none.pt"),
        (["robustness", "--checkpoint", "none.pt", "--epochs", "3"], "brings its configuration"),
        (["robustness", "--checkpoint", "none.pt", "--seeds", "3"], "brings its seed"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == BAD_INPUT
    out, err = capfd.readouterr()
    assert said in err
    assert (err.count("\n"), out) == (1, "")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
