"""The kinds of search space: which is which, what of them has an effect, and how a search and its plan are named."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.campaign import trial_config
from bench.cli import main
from bench.config import PRIMITIVE_NAMES, StudyConfig, TrialConfig, UserError
from bench.files import read_yaml, write_yaml
from bench.learning.rules import ANY, RULES, parse_rule, subsets
from bench.place import Options
from bench.plans import Wanted, find_wanted, plan
from bench.reading import Found, find, read_search, search_summary
from bench.rows import RowFile
from bench.search import check, search
from bench.space import Range, Space
from bench.space_files import load_space
from bench.spaces import SETTINGS, SPACES, canonical_space, idle_settings, space_changes, space_of
from bench.summary import same_setting, table_rows
from bench.transfer import TransferConfig, prepare_transfer, transfer
from bench.verbs.common import BAD_INPUT
from rehearsal import Formula, Stage, rows, stage  # noqa: F401  (stage is a fixture)

FIXED = ("backprop", "feedback", "sign", "frozen", "kolen-pollack")
BUDGET = {"trials": 3, "epochs": 2, "scheduler": "none", "sampler": "random", "confirm_seeds": 2}
REPOSITORY = Path(__file__).parents[1]


# --- which is which --------------------------------------------------------------------------------------


def test_spaces_that_are_the_same_for_a_rule_are_one() -> None:
    assert [canonical_space("mirror", name) for name in SPACES] == list(SPACES)
    assert [canonical_space(ANY, name) for name in SPACES] == list(SPACES)
    of_self = {"default": "default", "adam": "adam"}
    assert [canonical_space("symmetric", name) for name in SPACES] == [of_self.get(n, "reference") for n in SPACES]
    for rule in FIXED:
        assert {canonical_space(rule, name) for name in SPACES} == {"default"}


@pytest.mark.parametrize("kind", sorted(set(SPACES) - {"adam"}))
@pytest.mark.parametrize("rule", [row.name for row in subsets()])
def test_every_subset_has_a_space_of_every_kind_and_tells_it(rule: str, kind: str) -> None:
    space = load_space(rule, "resnet18", space=kind)
    recipe = space_changes(space, rule, {})
    assert not set(recipe) & set(idle_settings(rule))
    for corner in space.corners():
        config = TrialConfig.from_dict({"rule": rule, **recipe, **space.changes(corner)})
        assert space_of(config.to_dict()) == canonical_space(rule, kind)


def test_an_older_row_is_of_the_reference_space() -> None:
    old = {"rule": "activation", "coefficients": {"amp": 1e-3, "sparse": 1e-3}}
    assert space_of(old) == "reference"
    assert space_of({**old, "centered": True}) == "reference-centered"
    assert space_of({**old, "scaling": "normalized", "centered": True}) == "normalized-centered"
    assert space_of({**old, "rule": "symmetric"}) == "reference"
    assert space_of({"rule": "sign"}) == "default"
    assert space_of({**old, "feedback_input": "normal"}) == "feedback_input normal"  # of no kind: what it has


# --- the default spaces ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["mirror", "symmetric", "activation", "information"])
@pytest.mark.parametrize("kind", ["default", "adam"])
def test_a_dimensionless_space_has_one_unit_ratios_around_it_and_a_rate(rule: str, kind: str) -> None:
    params = load_space(rule, "resnet18", space=kind).params
    assert set(params) == {*parse_rule(rule).primitives, "feedback_lr"}
    units = [name for name, entry in params.items() if entry.values() == (1.0,)]
    assert len(units) == 1
    ratio = params["self" if rule == "symmetric" else "amp"]
    assert isinstance(ratio, Range)
    assert ratio.min < 1 < ratio.max
    assert isinstance(params["feedback_lr"], Range)


@pytest.mark.parametrize("arch", ["resnet18", "lenet"])
def test_the_default_space_is_the_same_on_every_network(arch: str) -> None:
    for rule in [*(name for name, row in RULES.items() if row.learns), ANY]:
        assert load_space(rule, arch) == load_space(rule, "any")


def test_the_slow_half_of_activations_rates_is_stable_with_the_default_number_of_patches() -> None:
    """Mean-square stability of LMS with momentum: feedback_lr < 2 N / (n + 1) · (1 − μ); n = 4608 on resnet18."""
    rate = load_space("activation", "resnet18").params["feedback_lr"]
    assert isinstance(rate, Range)
    config = TrialConfig(rule="activation")
    limit = 2 * config.feedback_samples / (4608 + 1) * (1 - config.feedback_momentum)
    assert rate.min < math.sqrt(rate.min * rate.max) < limit < rate.max


# --- what has no effect ----------------------------------------------------------------------------------


def study(rule: str, kind: str = "default", **changes: Any) -> StudyConfig:
    space = load_space(rule, "lenet", space=kind)
    recipe = {"batch_size": 32, "lr": 0.02, **space_changes(space, rule, {})}
    given = {"name": "s", "rule": rule, "arch": "lenet", "dataset": "digits", "recipe": recipe}
    return StudyConfig.from_dict({**given, "space": space.to_dict(), **BUDGET, **changes})


@pytest.mark.parametrize("kind", sorted(set(SPACES) - {"adam"}))
def test_no_setting_without_effect_is_left_in_a_trial_of_any(kind: str) -> None:
    space, config = load_space(ANY, "lenet", space=kind), study(ANY, kind)
    for on in range(2 ** len(PRIMITIVE_NAMES)):
        chosen = [name for place, name in enumerate(PRIMITIVE_NAMES) if on >> place & 1]
        params: dict[str, Any] = {f"use_{name}": name in chosen for name in PRIMITIVE_NAMES}
        params |= {name: space.params[name].values()[0] for name in chosen}
        trial = trial_config(config, space.changes(params))
        assert set(trial.coefficients) == set(chosen)
        assert trial.rule == (parse_rule("+".join(chosen)).name if chosen else "feedback")
        assert not set(trial.identity()) & set(idle_settings(trial.rule))
        assert space_of(trial.to_dict()) == canonical_space(trial.rule, kind)


def test_controls_know_nothing_of_what_moves_b() -> None:
    for kind in SPACES:
        config = study("mirror", kind)
        for rule in FIXED:
            plain = TrialConfig(rule=rule, arch="lenet", dataset="digits", batch_size=32, lr=0.02, epochs=2)
            assert trial_config(config, {}, rule=rule).digest() == plain.digest()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mirror", "--set", "feedback_lr=0.1"], "--set feedback_lr has no effect: the space 'default' has ranges"),
        (["symmetric", "--set", "feedback_input=uniform"], "--set feedback_input: without effect on rule 'symmetric'"),
        (["sign", "--set", "feedback_lr=0.1"], "--set feedback_lr: without effect on rule 'sign'"),
        (["kolen-pollack", "--set", "feedback_optimizer=sgd"], "without effect on rule 'kolen-pollack'"),
        (["symmetric", "--space", "normalized"], "the same as reference; use --space reference."),
        (["sign", "--space", "reference"], "the same as default; use --space default."),
        (["amp", "--space", "adam"], "rule 'amp' has no search space: write"),
        (["amp", "--space", "refrence"], "unknown space 'refrence'. Did you mean 'reference'?"),
        (["amp", "--set", "scaling=normalized"], "--space says it."),
        (
            ["mirror", "--set", "feedback_optimizer=shared"],
            "feedback_lr has no effect with feedback_optimizer 'shared'",
        ),
    ],
)
def test_what_has_no_effect_is_refused_in_one_line(
    tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--results", str(tmp_path / "results"), "--arch", "lenet", "--device", "cpu"]
    assert main(["search", "--rule", *arguments, *where]) == BAD_INPUT
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_a_setting_of_a_file_gives_way_to_the_users() -> None:
    space = load_space("sparse", "lenet")
    assert space_changes(space, "sparse", {}) == {
        "feedback_input": "normal",
        "feedback_optimizer": "sgd",
        "feedback_lr": 0.01,
    }
    assert space_changes(space, "sparse", {"feedback_lr": 0.02, "lr": 1.0})["feedback_lr"] == 0.02


# --- a search, without training --------------------------------------------------------------------------


def flat(config: TrialConfig) -> float:
    """The nearer W's learning rate is to 0.005, the better."""
    return 0.9 - 0.1 * abs(math.log10(config.lr / 0.005))


@pytest.mark.parametrize("rule", ["mirror", "backprop", "feedback", ANY])
def test_the_learning_rate_of_w_is_searched_and_its_controls_keep_the_recipes(
    tmp_path: Path,
    stage: Callable[[Formula], Stage],  # noqa: F811
    rule: str,
) -> None:
    made = stage(flat)
    space = load_space(rule, "lenet").with_lr(0.02)
    config = study(rule, space=space.to_dict(), trials=6, **({"sampler": "tpe"} if rule == ANY else {}))
    _, summary = search(check(config, space, Options(results=tmp_path)), say=print)
    ran = [c for uid, c in made.runs if not uid.startswith("control")]
    assert len({c.lr for c in ran}) == 6
    assert all(0.0002 <= c.lr <= 0.04 for c in ran)
    controls = [c for uid, c in made.runs if uid.startswith("control")]
    assert {c.rule for c in controls} == {"backprop", "feedback"} - {rule}
    assert {c.lr for c in controls} == {0.02}
    # the best is confirmed at its own rate, which the table says; all is in the rows and in the study
    best = summary["confirmed"][0]
    assert best["config"]["lr"] == max(ran, key=flat).lr
    assert f"lr {best['config']['lr']:.2g}" in table_rows(summary)[0][1]
    assert summary["complete"]
    assert read_yaml(tmp_path / "s" / "study.yaml")["config"]["space"]["lr"] == {
        "min": pytest.approx(0.0002),
        "max": 0.04,
        "scale": "log",
    }
    # read again: with the study, and from the rows alone
    device, data = read_yaml(tmp_path / "s" / "study.yaml")["runs_on"].split()
    for path in (tmp_path / "s" / "rows.jsonl", tmp_path / "controls" / "rows.jsonl"):
        known = rows(path)
        path.unlink()
        for row in known:  # as real runs leave them
            RowFile(path).append({**row, "provenance": {"device": device, "dataset_digest": data}})  # type: ignore[arg-type]
    (found,) = find(tmp_path)
    assert len(read_search(found).controls) == len(controls)
    alone = Found(name="s", folder=tmp_path / "alone" / "s.jsonl", kind="search")
    for source, target in ((tmp_path / "s", alone.folder), (tmp_path / "controls", alone.folder.parent / "controls")):
        target = target.with_suffix(".jsonl")
        target.parent.mkdir(exist_ok=True)
        target.write_text((source / "rows.jsonl").read_text())
    again = search_summary(read_search(alone))
    assert len(read_search(alone).controls) == len(controls)
    assert again["confirmed"][0]["updates"]["lr"] == best["config"]["lr"]


def test_the_best_of_a_searched_rate_is_its_own_and_not_one_of_equal_coefficients(
    tmp_path: Path,
    stage: Callable[[Formula], Stage],  # noqa: F811
) -> None:
    """Backprop has no coefficients: only the rate tells its trials apart."""
    stage(flat)
    space = load_space("backprop", "lenet").with_lr(0.02)
    config = study("backprop", space=space.to_dict(), trials=3)
    ready = check(config, space, Options(results=tmp_path))
    search(ready, say=print)
    first = {r["config"]["lr"] for r in rows(tmp_path / "s" / "rows.jsonl") if r["kind"] == "confirm"}
    longer = config.replace(trials=12)
    search(check(longer, space, Options(results=tmp_path)), say=print)
    found = [r for r in rows(tmp_path / "s" / "rows.jsonl") if r["kind"] == "confirm"]
    assert len({r["config"]["lr"] for r in found} - first) == 1
    assert len(found) == 4


# --- plans -----------------------------------------------------------------------------------------------


def test_a_search_is_named_by_its_space() -> None:
    names = {kind: Wanted.of("amp", "lenet", "digits", kind).name for kind in SPACES}
    assert names.pop("default") == "amp-lenet-digits"
    assert names == {kind: f"amp-lenet-digits-{kind}" for kind in names}
    assert {Wanted.of("sign", "lenet", "digits", kind).name for kind in SPACES} == {"sign-lenet-digits"}


def begun(results: Path, config: StudyConfig) -> None:
    write_yaml(results / config.name / "study.yaml", {"id": "1", "runs_on": "cpu 0", "config": config.to_dict()})


def test_an_older_search_is_found_as_the_reference(tmp_path: Path) -> None:
    old = study("mirror", "reference", name="mirror-lenet-digits")
    begun(tmp_path, old)
    assert find_wanted(tmp_path, Wanted.of("mirror", "lenet", "digits", "reference")) == old
    assert find_wanted(tmp_path, Wanted.of("mirror", "lenet", "digits", "normalized")) is None
    begun(tmp_path, study("mirror", name="mirror-lenet-digits"))  # one of today
    assert find_wanted(tmp_path, Wanted.of("mirror", "lenet", "digits", "reference")) is None


def test_a_default_search_does_not_go_on_with_an_older_one(tmp_path: Path) -> None:
    begun(tmp_path, study("mirror", "reference", name="mirror-lenet-digits"))
    wanted = [Wanted.of("mirror", "lenet", "digits", "default")]
    with pytest.raises(UserError, match="another recipe \\(feedback_input not set, here normal, feedback_optimizer"):
        plan(wanted, given=BUDGET, changes={}, options=Options(results=tmp_path))


def test_a_plan_refuses_a_setting_that_its_spaces_search(tmp_path: Path) -> None:
    wanted = [Wanted.of("mirror", "lenet", "digits", "default")]
    with pytest.raises(UserError, match="--set feedback_lr has no effect: the space 'default' has ranges of it"):
        plan(wanted, given=BUDGET, changes={"feedback_lr": 0.1}, options=Options(results=tmp_path))


def test_what_a_plan_sets_is_in_the_recipes_of_those_rules_on_which_it_has_an_effect(tmp_path: Path) -> None:
    wanted = [Wanted.of(rule, "lenet", "digits", "default") for rule in ("amp", "self", "sign")]
    changes = {"feedback_samples": 128, "feedback_lr": 0.02}
    found = plan(wanted, given=BUDGET, changes=changes, options=Options(results=tmp_path))
    recipes = {w.rule: {k: v for k, v in r.config.recipe.items() if k in SETTINGS} for w, r in found.items()}
    assert recipes == {
        "amp": {"feedback_input": "normal", "feedback_optimizer": "sgd", **changes},
        "self": {"feedback_optimizer": "sgd", "feedback_lr": 0.02},
        "sign": {},
    }


def test_on_two_networks_a_setting_is_the_same_whatever_the_rates_of_their_recipes() -> None:
    def row(arch: str, lr: float) -> dict[str, Any]:
        config = TrialConfig(rule="mirror", arch=arch, lr=lr, coefficients={"amp": 1.0})
        return {"config": config.to_dict()}

    assert same_setting(row("resnet20", 0.05), row("resnet18", 0.02))
    assert not same_setting(row("resnet20", 0.05), row("resnet20", 0.02))


def test_a_transfer_moves_the_rate_of_b_and_leaves_each_network_that_of_w(
    tmp_path: Path,
    stage: Callable[[Formula], Stage],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from bench.recipes import RECIPES

    def load(rule: str, arch: str, *, space: str) -> Space:
        """Not the same on both networks: with one seed their searches would draw the same trials."""
        own = load_space(rule, arch, space=space)
        return replace(own, params={**own.params, "amp": Range(min=1, max=2, scale="log")}) if arch == "lenet" else own

    monkeypatch.setattr("bench.plans.load_space", load)
    monkeypatch.setitem(RECIPES["digits"]["sgd"].archs, "lenet", {"lr": 0.007})
    stage(lambda config: 0.5 + 0.1 * config.coefficients.get("amp", 0))
    config = TransferConfig(
        name="t", rules=("mirror",), source="resnet20", targets=("lenet",), dataset="digits", spaces=("default", "adam")
    )
    _, summary = transfer(
        prepare_transfer(config, given=BUDGET, changes={}, options=Options(results=tmp_path)), say=print
    )
    assert [(p["rule"], p["space"]) for p in summary["pairs"]] == [("mirror", "default"), ("mirror", "adam")]
    moved = [r["config"] for r in rows(tmp_path / "t" / "rows.jsonl")]
    assert {c["lr"] for c in moved if c["arch"] == "lenet"} == {0.007}
    for kind, suffix in (("default", ""), ("adam", "-adam")):
        own = {
            r["config"]["feedback_lr"]
            for arch in ("resnet20", "lenet")
            for r in rows(tmp_path / f"mirror-{arch}-digits{suffix}" / "rows.jsonl")
        }
        assert {c["feedback_lr"] for c in moved if space_of(c) == kind} <= own
