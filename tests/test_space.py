"""Search spaces: every shipped file at both of its corners, composition, and what is refused, in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import bench
from bench.config import ACTIVITY_PRIMITIVES, PRIMITIVE_NAMES, StudyConfig, TrialConfig, UserError
from bench.files import read_yaml, write_yaml
from bench.learning.rules import RULES, parse_rule, subsets
from bench.models import check_arch
from bench.space import (
    PARAMETERS,
    UPDATE_FIELDS,
    Choices,
    Fixed,
    Parameter,
    Range,
    Space,
)
from bench.space_files import load_space, space_folder, space_names
from bench.spaces import SPACES, canonical_space, space_of
from bench.trial import run_trial

REPOSITORY = Path(__file__).parents[1]
#: Each file in each space that it serves, for any network and for each that it has a section for.
CASES = [
    (name, arch, row.name)
    for row in SPACES.values()
    for name in space_names(row.name)
    for arch in ("any", *read_yaml(space_folder() / row.folder / f"{name}.yaml").get("arch", {}))
]

ENTRY = "{min: 1e-5, max: 1e-2, scale: log, source: here}"
GOOD = f"rule: symmetric\nsource: here\nsettings: {{feedback_lr: 0.1}}\nspace:\n  decay: {ENTRY}\n  self: {ENTRY}\n"


def finite(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_subnormal=False)


@st.composite
def parameters(draw: st.DrawFn, name: str) -> Parameter:
    whole = UPDATE_FIELDS.get(name) is int
    number = st.integers(1, 1000).map(float) if whole else finite(1e-9, 1e3)
    shape = draw(st.sampled_from([Range, Choices, Fixed]))
    if shape is Fixed:
        return Fixed(value=draw(number))
    if shape is Choices:
        return Choices(choices=tuple(draw(st.lists(number, min_size=2, max_size=4, unique=True))))
    low, high = sorted((draw(number), draw(number)))
    assume(low < high)
    return Range(min=low, max=high, scale=draw(st.sampled_from(["log", "linear"])))


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    names = draw(st.lists(st.sampled_from(PARAMETERS), unique=True))
    return Space({name: draw(parameters(name)) for name in names})


# --- what a space does -----------------------------------------------------------------------------------


@given(spaces())
def test_a_space_survives_json_and_a_study(space: Space) -> None:
    plain = json.loads(json.dumps(space.to_dict()))
    study = StudyConfig(name="s", rule="r", arch="a", dataset="d", space=plain)
    assert Space.from_dict(StudyConfig.from_dict(study.to_dict()).space) == space


@given(spaces(), st.integers(0, 2**31 - 1))
def test_what_optuna_proposes_is_a_configuration_within_the_space(space: Space, seed: int) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    params = study.ask(space.distributions()).params
    changes = space.changes(params)
    if "feedback_lr" in changes:  # in a space that has it, B has its own optimizer, without a factor
        changes |= {"feedback_optimizer": "sgd", "feedback_lr_factor": 1.0}
    config = TrialConfig(rule="r").replace(**changes)
    assert set(params) == set(space.searched)
    for name, parameter in space.params.items():
        value = config.coefficients[name] if name in PRIMITIVE_NAMES else getattr(config, name)
        if name == "feedback_lr_factor" and "feedback_lr" in changes:
            continue
        if isinstance(parameter, Range):
            assert parameter.min <= value <= parameter.max
        else:
            assert value in parameter.values()


def test_scales_and_whole_numbers_reach_optuna() -> None:
    space = Space(
        {
            "feedback_every": Range(min=1, max=8, scale="log"),
            "decay": Range(min=1e-3, max=1, scale="log"),
            "self": Range(min=0, max=1, scale="linear"),
            "amp": Choices(choices=(0.0, 0.5)),
            "null": Fixed(value=2),
        }
    )
    assert space.distributions() == {
        "decay": optuna.distributions.FloatDistribution(1e-3, 1, log=True),
        "self": optuna.distributions.FloatDistribution(0, 1),
        "amp": optuna.distributions.CategoricalDistribution([0.0, 0.5]),
        "feedback_every": optuna.distributions.IntDistribution(1, 8, log=True),
    }
    changes = space.changes({"decay": 0.1, "self": 0.2, "amp": 0.5, "feedback_every": 3})
    assert changes == {"coefficients": {"decay": 0.1, "amp": 0.5, "null": 2.0, "self": 0.2}, "feedback_every": 3}


def test_corners() -> None:
    space = Space(
        {
            "self": Choices(choices=(1, 2, 3)),
            "decay": Range(min=0.1, max=10, scale="log"),
            "amp": Fixed(value=7),
        }
    )
    assert space.corners() == ({"decay": 0.1, "self": 1}, {"decay": 10, "self": 3}, {"decay": 0.1, "self": 2})
    assert Space().corners() == ({},)
    assert Space().changes({}) == {}


def test_values_for_other_parameters_are_refused() -> None:
    space = load_space("symmetric", "resnet18", space="reference")
    with pytest.raises(UserError, match="searches decay, self, not decay"):
        space.changes({"decay": 1})
    with pytest.raises(UserError, match="searches decay, self, not decay, self, amp"):
        space.changes({"decay": 1, "self": 1, "amp": 1})


def test_prose_is_no_part_of_a_study(tmp_path: Path) -> None:
    (tmp_path / "symmetric.yaml").write_text(GOOD)
    first = load_space("symmetric", "any", tmp_path)
    (tmp_path / "symmetric.yaml").write_text(GOOD.replace("here", "elsewhere"))
    second = load_space("symmetric", "any", tmp_path)
    assert first == second
    assert first.to_dict() == second.to_dict()
    assert second.params["decay"].source == "elsewhere"


# --- the files -------------------------------------------------------------------------------------------


def test_every_rule_with_something_to_search_has_a_file() -> None:
    assert set(space_names()) == {name for name, rule in RULES.items() if rule.learns}


@pytest.mark.parametrize(("rule", "arch", "kind"), CASES)
def test_every_file_holds_at_its_corners(rule: str, arch: str, kind: str) -> None:
    space = load_space(rule, arch, space=kind)
    assert space.searched
    assert all(entry.source for entry in space.params.values())
    row = parse_rule(rule)
    for params in space.corners():
        config = TrialConfig(rule=rule).replace(**space.settings, **space.changes(params))
        assert set(config.coefficients) == (set() if row.task_gradient else set(row.primitives))
        assert space_of(config.to_dict()) == canonical_space(rule, kind)


@pytest.mark.parametrize(("rule", "kind"), sorted({(rule, kind) for rule, _, kind in CASES}))
def test_every_file_runs_at_its_corners(rule: str, kind: str) -> None:
    space = load_space(rule, "lenet", space=kind)
    small = TrialConfig(rule=rule, arch="lenet", epochs=1, batch_size=16, train_examples=32, measure_alignment=False)
    for params in space.corners():
        result = run_trial(small.replace(**space.settings, **space.changes(params)), device="cpu")
        assert result.status in ("finished", "diverged")
        assert 0 <= result.metrics["val_acc"] <= 1


@pytest.mark.parametrize("arch", sorted({arch for _, arch, _ in CASES} - {"any"}))
def test_every_section_is_of_a_network_that_exists(arch: str) -> None:
    check_arch(arch)


@pytest.mark.parametrize("rule", ["backprop", "feedback", "sign", "frozen"])
def test_a_rule_whose_feedback_does_not_learn_has_nothing_to_search(rule: str) -> None:
    assert load_space(rule, "resnet18") == Space()


def test_a_section_replaces_what_it_names(tmp_path: Path) -> None:
    text = (
        GOOD
        + "arch:\n  lenet:\n    self: {value: 0.5, source: here}\n    feedback_every: {choices: [1, 4], source: here}\n"
    )
    (tmp_path / "symmetric.yaml").write_text(text)
    base = load_space("symmetric", "resnet18", tmp_path)
    lenet = load_space("symmetric", "lenet", tmp_path)
    assert base.searched == ("decay", "self")
    assert lenet.params == {
        "decay": base.params["decay"],
        "self": Fixed(value=0.5),
        "feedback_every": Choices(choices=(1, 4)),
    }


def test_a_subset_without_a_file_is_composed_and_with_one_is_read(tmp_path: Path) -> None:
    shutil.copytree(space_folder(), tmp_path / "spaces")
    folder = tmp_path / "spaces"
    composed = load_space("sparse+decay+null", "lenet", folder)
    alone = {name: load_space(name, "lenet", folder) for name in ("decay", "null", "sparse")}
    parts = {name: space.params[name] for name, space in alone.items()}
    assert composed.params == parts
    assert composed.settings == alone["null"].settings
    assert "feedback_input" not in alone["decay"].settings  # it sees none
    entry = {"value": 1.0, "source": "here"}
    own = {"rule": "decay+null+sparse", "source": "here", "space": dict.fromkeys(parts, entry)}
    own["settings"] = {"feedback_lr": 0.5}
    write_yaml(folder / "decay+null+sparse.yaml", own)
    read = load_space("sparse+decay+null", "lenet", folder)
    assert read.params == dict.fromkeys(parts, Fixed(value=1))
    assert read.settings == {"feedback_input": "normal", "feedback_optimizer": "sgd", "feedback_lr": 0.5}


def test_a_named_subset_is_its_rule() -> None:
    assert load_space("amp+decay", "resnet18") == load_space("mirror", "resnet18")


def test_files_that_would_compose_to_two_things_are_refused(tmp_path: Path) -> None:
    for name, lr in (("sparse", 1), ("decay", 2)):
        text = f"rule: {name}\nsource: here\nspace:\n  {name}: {ENTRY}\n  feedback_lr: {{value: {lr}, source: here}}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(UserError, match=r"differ in feedback_lr; write .*decay\+sparse\.yaml"):
        load_space("sparse+decay", "any", tmp_path)
    for name, lr in (("sparse", 1), ("decay", 2)):
        text = f"rule: {name}\nsource: here\nsettings: {{feedback_lr: {lr}}}\nspace:\n  {name}: {ENTRY}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(UserError, match=r"differ in feedback_lr; write .*decay\+sparse\.yaml"):
        load_space("sparse+decay", "any", tmp_path)


def test_a_file_in_another_order_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "sparse+decay.yaml").write_text("rule: sparse+decay")
    with pytest.raises(UserError, match=r"rename it to decay\+sparse\.yaml"):
        load_space("sparse+decay", "any", tmp_path)
    (tmp_path / "sparse+decay.yaml").rename(tmp_path / "decay+amp.yaml")
    with pytest.raises(UserError, match=r"rename it to mirror\.yaml"):
        load_space("mirror", "any", tmp_path)


def test_the_folder_is_found_in_a_checkout_and_in_an_installed_package(tmp_path: Path) -> None:
    assert space_folder() == REPOSITORY / "search_spaces"
    package = tmp_path / "site-packages" / "bench"
    shutil.copytree(Path(bench.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY / "search_spaces", package / "search_spaces")
    load = "(load_space('sparse', 'x').searched, load_space('sparse', 'x', space='reference').searched, space_folder())"
    code = f"from bench.space_files import load_space, space_folder; print(*{load})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=package.parent,
        env={"PYTHONPATH": str(package.parent)},
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode().strip() == f"('sparse',) ('sparse',) {package / 'search_spaces'}"


# --- scalings --------------------------------------------------------------------------------------------

#: 1.36 / lr is the limit of stability of a normalized coefficient, with Nesterov momentum 0.9.
LIMIT = 1.36 / 0.1


@pytest.mark.parametrize("arch", ["resnet18", "lenet", "any"])
@pytest.mark.parametrize("rule", [row.name for row in subsets()])
def test_every_subset_has_a_normalized_space_that_is_stable_and_the_same_for_all_networks(rule: str, arch: str) -> None:
    space = load_space(rule, arch, space="normalized")
    row = parse_rule(rule)
    assert set(space.params) == set(row.primitives)
    assert space == load_space(rule, "resnet18", space="normalized")
    for name in set(row.primitives) & set(ACTIVITY_PRIMITIVES):
        found = space.params[name]
        assert isinstance(found, Range)
        assert 1e-2 <= found.min <= 0.1
        assert 5 < found.max < LIMIT
    if not row.sees_activity:
        assert space == load_space(rule, arch, space="reference")


PAPER = GOOD.replace("settings: {feedback_lr: 0.1}\n", "")


def in_reference(folder: Path, rule: str) -> Path:
    (folder / "reference").mkdir(exist_ok=True)
    return folder / "reference" / f"{rule}.yaml"


SPARSE = f"rule: sparse\nsource: here\nspace:\n  sparse: {ENTRY}\n  feedback_every: {{value: 1, source: here}}\n"
LENET = "arch:\n  lenet:\n    sparse: {value: 2, source: here}\n    feedback_every: {value: 4, source: here}\n"
NORMALIZED = "scaling:\n  normalized:\n    sparse: {value: 3, source: here}\n"


def test_a_normalized_coefficient_goes_before_the_networks_own_and_leaves_it_the_rest(tmp_path: Path) -> None:
    in_reference(tmp_path, "sparse").write_text(SPARSE + LENET + NORMALIZED)

    def values(arch: str, space: str = "reference") -> list[tuple[float, ...]]:
        return [p.values() for p in load_space("sparse", arch, tmp_path, space=space).params.values()]

    assert values("resnet18") == [(1e-5, 1e-2), (1,)]
    assert values("lenet") == [(2,), (4,)]
    assert values("resnet18", "normalized") == [(3,), (1,)]
    assert values("lenet", "normalized") == [(3,), (4,)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (NORMALIZED.replace("normalized", "normalised"), "unknown scaling 'normalised'. Did you mean 'normalized'?"),
        (NORMALIZED.replace("normalized", "reference"), "unknown scaling 'reference'."),
        (NORMALIZED.replace("sparse", "null"), "scaling.normalized.null has no effect on rule 'sparse'; remove it."),
        (NORMALIZED.replace("sparse", "sparce"), "scaling.normalized.sparce: unknown parameter 'sparce'."),
        (NORMALIZED.replace(", source: here", ""), "scaling.normalized.sparse needs a source"),
        (NORMALIZED.replace("sparse", "feedback_every"), "scaling.normalized lacks sparse; add {min, max,"),
        (NORMALIZED.replace("value: 3", "value: -3"), "scaling.normalized.sparse: coefficients.sparse = -3.0"),
        ("scaling: [normalized]\n", "scaling must map names of scalings to parameters"),
        ("scaling: {normalized: [sparse]}\n", "scaling.normalized must map parameters to"),
    ],
)
@pytest.mark.parametrize("kind", ["reference", "normalized"])
def test_a_wrong_section_is_refused_whatever_is_asked_for(tmp_path: Path, text: str, words: str, kind: str) -> None:
    path = in_reference(tmp_path, "sparse")
    path.write_text(SPARSE + text)
    with pytest.raises(UserError) as caught:
        load_space("sparse", "resnet18", tmp_path, space=kind)
    message = str(caught.value)
    assert words in message
    assert message.startswith(str(path))
    assert "\n" not in message


def test_a_scaling_without_ranges_is_refused_when_it_is_asked_for(tmp_path: Path) -> None:
    in_reference(tmp_path, "sparse").write_text(SPARSE)
    assert load_space("sparse", "resnet18", tmp_path, space="reference").searched == ("sparse",)
    with pytest.raises(UserError, match=r"no ranges for scaling 'normalized'; add a section scaling\.normalized\."):
        load_space("sparse", "resnet18", tmp_path, space="normalized")
    with pytest.raises(UserError, match=r"unknown space 'normal'\. Did you mean 'normalized'\?"):
        load_space("sparse", "resnet18", tmp_path, space="normal")


def test_a_rule_that_sees_no_activity_has_no_such_section(tmp_path: Path) -> None:
    in_reference(tmp_path, "symmetric").write_text(PAPER + f"scaling:\n  normalized:\n    decay: {ENTRY}\n")
    with pytest.raises(UserError, match=r"scaling\.normalized has no effect on rule 'symmetric'; remove it"):
        load_space("symmetric", "resnet18", tmp_path, space="reference")


# --- what is refused -------------------------------------------------------------------------------------


def bad(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (bad("1e-5", "1e-1"), "space.decay: min = 0.1 is not below max = 0.01; swap them."),
        (bad("1e-5", "1e-2"), "min = 0.01 is not below max = 0.01; write {value: 0.01} for a fixed value."),
        (bad("1e-5", "0"), "space.decay: scale log needs min > 0, not 0; raise min, or write scale: linear."),
        (bad("1e-5", "little"), "space.decay: Range: min must be a valid number, not 'little'."),
        (bad("1e-5", "true"), "min must be a valid number, not True."),
        (bad("1e-2", ".inf"), "must be finite numbers."),
        (bad("1e-2", ".nan"), "must be finite numbers."),
        (bad("scale: log", "scale: cubic"), "scale must be 'log' or 'linear', not 'cubic'."),
        (bad("scale: log, ", ""), "Range: missing scale."),
        (bad("min: 1e-5", "mn: 1e-5"), "unknown key of Range 'mn'. Did you mean 'min'?"),
        (bad("min: 1e-5, ", ""), "Range: missing min."),
        (bad("scale: log", "scale: log, choices: [1, 2]"), "unknown key of Choices 'min'. Valid: choices, source."),
        (bad(ENTRY, "{choices: [1], source: x}"), "choices [1.0] must be two or more different numbers"),
        (bad(ENTRY, "{choices: [1, 1.0], source: x}"), "must be two or more different numbers"),
        (bad(ENTRY, "{choices: 3, source: x}"), "choices must be a valid tuple"),
        (bad(ENTRY, "{value: -1, source: x}"), "space.decay: coefficients.decay = -1.0 is out of range"),
        (
            bad("min: 1e-5, max: 1e-2, scale: log", "min: -1, max: 1, scale: linear"),
            "coefficients.decay = -1.0 is out of range",
        ),
        (bad(ENTRY, "0.1"), "space.decay: expected {min, max, scale, source}, {choices, source} or {value, source}"),
        (bad(", source: here", ""), "space.decay needs a source"),
        (bad(", source: here", ", source: ' '"), "space.decay needs a source"),
        (bad("  self", "  selv"), "space.selv: unknown parameter 'selv'. Did you mean 'self'?"),
        (bad("  self", "  amp"), "space.amp has no effect on rule 'symmetric'; remove it."),
        (bad("  self", "  feedback_warmup_epochs"), "space lacks self; add"),
        (bad("  self", "  decay"), "the key 'decay' stands twice"),
        (
            GOOD + "  feedback_every: {choices: [1, 1.5], source: x}\n",
            "feedback_every must be a valid integer, not 1.5.",
        ),
        (GOOD + "  feedback_every: {choices: [0, 1], source: x}\n", "feedback_every = 0 is out of range"),
        (GOOD + "  rate: {value: 1, source: x}\n", "unknown parameter 'rate'"),
        (GOOD + "  feedback_lr: {value: 1, source: x}\n", "settings.feedback_lr has no effect, for it has ranges here"),
        (bad("settings: {feedback_lr: 0.1}\n", ""), "feedback_optimizer 'sgd' needs feedback_lr"),
        (bad("{feedback_lr: 0.1}", "[feedback_lr]"), "settings must map fields to values"),
        (bad("feedback_lr: 0.1", "feedback_rl: 0.1"), "unknown field 'feedback_rl'. Did you mean 'feedback_lr'?"),
        (bad("feedback_lr: 0.1", "lr: 0.1"), "unknown field 'lr'"),
        (bad("feedback_lr: 0.1", "centered: true"), "settings.centered has no effect on rule 'symmetric'; remove it."),
        (bad("feedback_lr: 0.1", "feedback_lr: -1"), "feedback_lr = -1.0 is out of range"),
        (bad("rule: symmetric", "rule: mirror"), "rule is 'mirror'; write rule: 'symmetric', in quotes."),
        (bad("rule: symmetric\n", ""), "rule is None; write rule: 'symmetric'"),
        (bad("source: here\n", ""), "source is missing"),
        (bad("space:", "spaces:"), "unknown key 'spaces'. Did you mean 'space'?"),
        ("rule: symmetric\nsource: here\n", "space must map parameters to"),
        (GOOD + "arch: [resnet18]\n", "arch must map names of networks to parameters"),
        (GOOD + "arch: {resnet50: {decay: 3}}\n", "arch.resnet50.decay: expected {min, max, scale, source}"),
        (GOOD + "arch: {resnet50: [decay]}\n", "arch.resnet50 must map parameters to"),
        (GOOD + "  : :\n", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_whole_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "symmetric.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_space("symmetric", "resnet18", tmp_path)
    message = str(caught.value)
    assert words in message
    assert message.startswith(str(path))
    assert "\n" not in message


@pytest.mark.parametrize(
    ("rule", "parameter", "words"),
    [
        ("kolen-pollack", "decay", "space.decay has no effect on rule 'kolen-pollack'; remove it."),
        ("backprop", "feedback_lr_factor", "space.feedback_lr_factor has no effect on rule 'backprop'; remove it."),
        ("kolen-pollack", "feedback_lr", "space.feedback_lr has no effect on rule 'kolen-pollack'; remove it."),
        ("null", "null", "write rule: 'null', in quotes."),
    ],
)
def test_what_has_no_effect_on_a_rule(tmp_path: Path, rule: str, parameter: str, words: str) -> None:
    (tmp_path / f"{rule}.yaml").write_text(f"rule: {rule}\nsource: here\nspace:\n  {parameter}: {ENTRY}\n")
    with pytest.raises(UserError, match=words):
        load_space(rule, "any", tmp_path)


def test_missing_folder_file_and_rule(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder of search spaces at .*nowhere"):
        load_space("sparse", "any", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"rule 'sparse' has no search space: write .*sparse\.yaml\."):
        load_space("sparse", "any", tmp_path)
    with pytest.raises(UserError, match=r"unknown rule 'spars'\. Did you mean 'sparse'\?"):
        load_space("spars", "any")


@pytest.mark.parametrize(
    "plain",
    [
        {"decay": {"min": 1, "max": 0, "scale": "log"}},
        {"decay": [1, 2]},
        {"colour": {"value": 1}},
        {"decay": {"value": float("nan")}},
    ],
)
def test_a_wrong_space_in_a_study_is_refused(plain: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^space\."):
        Space.from_dict(plain)
