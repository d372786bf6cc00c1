"""Configurations: whatever is accepted survives JSON, and whatever is not gets one line with its remedy."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.config import (
    PRIMITIVE_NAMES,
    StudyConfig,
    TrialConfig,
    TrialResult,
    UserError,
    check_range,
    digest,
    unknown,
)

SEEDS = st.integers(0, 2**31 - 1)
NAMES = st.text(min_size=1, max_size=8)
COEFFICIENTS = st.dictionaries(st.sampled_from(PRIMITIVE_NAMES), st.floats(0, 1e6))


@st.composite
def trial_configs(draw: st.DrawFn) -> TrialConfig:
    accumulate = draw(st.integers(1, 8))
    values: dict[str, Any] = {
        "rule": draw(NAMES),
        "seed": draw(SEEDS),
        "coefficients": draw(COEFFICIENTS),
        "feedback_lr_factor": draw(st.floats(0, 1e3)),
        "feedback_every": draw(st.integers(1, 9)),
        "stem": draw(st.sampled_from(["auto", "small", "imagenet"])),
        "image_size": draw(st.none() | st.integers(1, 4096)),
        "accumulate": accumulate,
        "batch_size": accumulate * draw(st.integers(1, 64)),
        "lr": draw(st.floats(1e-9, 10)),
        "nesterov": draw(st.booleans()),
        "momentum": draw(st.floats(0.1, 0.9999)),
        "clip_norm": draw(st.none() | st.floats(1e-3, 1e3)),
        "train_examples": draw(st.none() | st.integers(1, 10**6)),
        "augment": draw(st.booleans()),
    }
    if draw(st.booleans()):
        values |= {"schedule": "step", "step_epochs": sorted(draw(st.sets(st.floats(1, 300), min_size=1, max_size=3)))}
    return TrialConfig.from_dict(values)


METRICS = st.dictionaries(NAMES, st.floats(allow_nan=False, allow_infinity=False), max_size=4)


@st.composite
def trial_results(draw: st.DrawFn) -> TrialResult:
    return TrialResult(
        config=draw(trial_configs()),
        status=draw(st.sampled_from(["finished", "stopped", "diverged", "failed"])),
        reason=draw(st.none() | st.text()),
        metrics=draw(METRICS),
        history=draw(st.lists(METRICS, max_size=3)),
        provenance=draw(st.dictionaries(NAMES, st.none() | st.text() | st.booleans() | st.integers(), max_size=3)),
    )


# --- what is accepted ------------------------------------------------------------------------------------


@given(trial_configs())
def test_a_trial_survives_json(config: TrialConfig) -> None:
    plain = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    again = TrialConfig.from_dict(plain)
    assert again == config
    assert again.digest() == config.digest()
    assert config.replace() == config


@given(trial_results())
def test_a_result_survives_json(result: TrialResult) -> None:
    assert TrialResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


@given(st.integers(1, 10**6), SEEDS, st.dictionaries(NAMES, st.integers() | st.lists(st.text()), max_size=3))
def test_a_study_survives_json(trials: int, seed: int, recipe: dict[str, Any]) -> None:
    study = StudyConfig(name="s", rule="r", arch="a", dataset="d", trials=trials, seed=seed, recipe=recipe)
    assert StudyConfig.from_dict(json.loads(json.dumps(study.to_dict()))) == study


@given(st.permutations(sorted(TrialConfig(rule="mirror").to_dict())))
def test_the_order_of_keys_is_no_part_of_a_configuration(order: list[str]) -> None:
    plain = TrialConfig(rule="mirror", coefficients={"amp": 1.0, "decay": 2.0}).to_dict()
    shuffled = {name: plain[name] for name in order}
    assert digest(shuffled) == digest(plain)
    assert TrialConfig.from_dict(shuffled) == TrialConfig.from_dict(plain)


@given(st.permutations(PRIMITIVE_NAMES))
def test_coefficients_have_one_order(order: list[str]) -> None:
    config = TrialConfig(rule="r", coefficients=dict.fromkeys(order, 1.0))
    assert tuple(config.coefficients) == PRIMITIVE_NAMES


@given(trial_configs(), trial_configs())
def test_different_configurations_have_different_digests(first: TrialConfig, second: TrialConfig) -> None:
    assert (first == second) == (first.digest() == second.digest())


def test_the_digest_is_what_it_was() -> None:
    # It names files and groups rows of past studies: a change of it orphans them. (Value: sha256sum of the JSON.)
    assert digest({"b": [1, 2.5, None], "a": "å"}) == "e738fad95f9cad06"


def test_replace_is_checked_and_leaves_the_old_one() -> None:
    config = TrialConfig(rule="mirror", coefficients={"amp": 1.0})
    assert config.replace(epochs=3).epochs == 3
    assert config.epochs == TrialConfig(rule="x").epochs
    with pytest.raises(UserError, match="epochs must be a valid integer"):
        config.replace(epochs="3")
    with pytest.raises(UserError, match="unknown key"):
        config.replace(epoch=3)


def test_a_whole_number_passes_for_a_number_and_becomes_one() -> None:
    config = TrialConfig.from_dict({"rule": "r", "lr": 1, "coefficients": {"amp": 2}, "clip_norm": 3})
    assert [type(v) for v in (config.lr, config.coefficients["amp"], config.clip_norm)] == [float] * 3


# --- what is refused -------------------------------------------------------------------------------------


def refusal(kind: type[TrialConfig | StudyConfig | TrialResult], values: Any) -> str:
    """The one line."""
    with pytest.raises(UserError) as caught:
        kind.from_dict(values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"coeficients": {}},
            "unknown key of TrialConfig 'coeficients'. Did you mean 'coefficients'? Valid: accumulate,",
        ),
        ({"zzz": 1}, "unknown key of TrialConfig 'zzz'. Valid: "),
        ({3: 1}, "unknown key of TrialConfig '3'"),
        ({"coefficients": {"alpha": 1.0}}, "unknown coefficient 'alpha'. Valid: amp, decay, null, self, sparse."),
        ({"coefficients": {"ampp": 1.0}}, "Did you mean 'amp'?"),
        ({"coefficients": {"amp": "1"}}, "coefficients.amp must be a valid number, not '1'."),
        ({"coefficients": {None: 1.0}}, "coefficients.None.[key] must be a valid string"),
        ({"coefficients": [1.0]}, "coefficients must be a valid dictionary, not [1.0]."),
        ({"coefficients": {"amp": -1}}, "coefficients.amp = -1.0 is out of range; it must lie in [0, inf]."),
        ({"rule": None}, "rule must be a valid string, not None."),
        ({"epochs": 1.5}, "epochs must be a valid integer, not 1.5."),
        ({"epochs": True}, "epochs must be a valid integer, not True."),
        ({"lr": "0.1"}, "lr must be a valid number, not '0.1'."),
        ({"lr": False}, "lr must be a valid number, not False."),
        ({"augment": 1}, "augment must be a valid boolean, not 1."),
        ({"image_size": "32"}, "image_size must be a valid integer, not '32'."),
        ({"stem": "large"}, "stem must be 'auto', 'small' or 'imagenet', not 'large'."),
        ({"step_epochs": 3, "schedule": "step"}, "step_epochs must be a valid tuple, not 3."),
        ({"step_epochs": ["3"], "schedule": "step"}, "step_epochs.0 must be a valid number, not '3'."),
        ({"schedule": "step"}, "schedule 'step' needs step_epochs, e.g. step_epochs=[30,60,80]."),
        ({"schedule": "step", "step_epochs": [60, 30]}, "step_epochs [60.0, 30.0] must rise; write e.g. [30, 60, 80]."),
        ({"step_factor": 0.5}, "step_factor has no effect with schedule 'cosine'; remove it."),
        ({"epochs": 2, "warmup_epochs": 3}, "warmup_epochs = 3 is more than epochs = 2; lower it."),
        ({"step_epochs": [3]}, "step_epochs has no effect with schedule 'cosine'; remove it."),
        ({"momentum": 0}, "nesterov needs momentum > 0; set nesterov=false or momentum=0.9."),
        ({"batch_size": 10, "accumulate": 4}, "batch_size 10 is not a multiple of accumulate 4."),
    ],
)
def test_a_wrong_trial(values: dict[Any, Any], words: str) -> None:
    assert words in refusal(TrialConfig, {"rule": "mirror", **values})


@pytest.mark.parametrize("values", [None, [], "rule", 3])
def test_not_a_mapping(values: Any) -> None:
    assert "expected a mapping of keys to values" in refusal(TrialConfig, values)


LOWEST_REFUSED = {
    "seed": -1,
    "split_seed": -1,
    "epochs": 0,
    "batch_size": 0,
    "accumulate": 0,
    "feedback_every": 0,
    "feedback_fraction": 0.0,
    "image_size": 0,
    "train_examples": 0,
    "lr": 0.0,
    "step_factor": 0.0,
    "clip_norm": 0.0,
    "weight_decay": -1e-9,
    "feedback_lr_factor": -1e-9,
    "warmup_epochs": -1e-9,
    "feedback_warmup_epochs": -1e-9,
    "momentum": -0.1,
    "label_smoothing": -0.1,
    "val_fraction": 0.0,
    "update_noise": -1e-9,
    "noise_draws": 0,
    "feedback_samples": 0,
    "feedback_momentum": -1e-9,
    "feedback_lr_warmup_epochs": -1e-9,
}
HIGHEST_REFUSED = {
    "seed": 2**31,
    "split_seed": 2**31,
    "image_size": 4097,
    "momentum": 1.0,
    "label_smoothing": 1.0,
    "val_fraction": 0.91,
    "noise_draws": 10_001,
    "feedback_samples": 10**6 + 1,
    "feedback_momentum": 1.0,
}
FLOATS = sorted(name for name, value in TrialConfig(rule="r", clip_norm=1.0).to_dict().items() if type(value) is float)


@pytest.mark.parametrize(("name", "value"), [*LOWEST_REFUSED.items(), *HIGHEST_REFUSED.items()])
def test_out_of_range(name: str, value: float) -> None:
    words = refusal(TrialConfig, {"rule": "r", "nesterov": False, name: value})
    assert re.fullmatch(rf"configuration: {name} = {value} is out of range; it must lie in [\[(].*, .*\]\.", words)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", FLOATS)
def test_no_number_is_nan_or_infinite(name: str, value: float) -> None:
    assert f"{name} = {value} is out of range" in refusal(TrialConfig, {"rule": "r", name: value})


def test_every_number_of_a_trial_has_a_range() -> None:
    plain = TrialConfig(rule="r", clip_norm=1.0, image_size=8, train_examples=9).to_dict()
    assert set(LOWEST_REFUSED) == {name for name, value in plain.items() if type(value) in (int, float)}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"trials": 0}, "study: trials = 0 is out of range"),
        ({"epochs": 0}, "study: epochs = 0 is out of range"),
        ({"confirm_seeds": -1}, "study: confirm_seeds = -1 is out of range"),
        ({"confirm_top": 0}, "study: confirm_top = 0 is out of range"),
        ({"seed": 2**31}, "study: seed = 2147483648 is out of range"),
        ({"trial": 3}, "unknown key of StudyConfig 'trial'. Did you mean 'trials'?"),
        ({"recipe": 3}, "recipe must be a valid dictionary"),
    ],
)
def test_a_wrong_study(values: dict[str, Any], words: str) -> None:
    whole = {"name": "s", "rule": "r", "arch": "a", "dataset": "d"}
    assert words in refusal(StudyConfig, {**whole, **values})


def test_what_a_study_must_say() -> None:
    assert refusal(StudyConfig, {"name": "s"}) == "StudyConfig: missing rule, arch, dataset."


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"config": None}, "TrialConfig: expected a mapping of keys to values, not None."),
        ({"config": {"rule": 3}}, "rule must be a valid string, not 3."),
        ({"status": "done"}, "status must be 'finished', 'stopped', 'diverged' or 'failed', not 'done'."),
        ({"colour": 1}, "unknown key of TrialResult 'colour'."),
        ({"history": [{"loss": "low"}]}, "loss must be a valid number, not 'low'."),
        ({"metrics": {"loss": None}}, "metrics.loss must be a valid number, not None."),
    ],
)
def test_a_wrong_result(values: dict[str, Any], words: str) -> None:
    assert words in refusal(TrialResult, {"config": {"rule": "r"}, "status": "finished", **values})


@given(st.floats(allow_nan=True, allow_infinity=True), st.floats(-1e3, 1e3), st.floats(0, 1e3), st.booleans())
def test_check_range_is_the_interval(value: float, low: float, width: float, open_low: bool) -> None:
    high = low + width
    if math.isfinite(value) and value <= high and (value > low if open_low else value >= low):
        check_range("it", "x", value, low, high, open_low=open_low)
        return
    with pytest.raises(UserError) as caught:
        check_range("it", "x", value, low, high, open_low=open_low)
    assert f"{'(' if open_low else '['}{low:g}, {high:g}]" in str(caught.value)


def test_no_value_is_in_every_range() -> None:
    check_range("it", "x", None, 1, 2)


def test_unknown_lists_what_there_is() -> None:
    assert str(unknown("fruit", "aple", ["pear", "apple"])) == (
        "unknown fruit 'aple'. Did you mean 'apple'? Valid: apple, pear."
    )
    assert str(unknown("fruit", "brick", ["pear"])) == "unknown fruit 'brick'. Valid: pear."


def test_a_digest_is_of_what_differs_from_the_defaults() -> None:
    """A release with one more field gives the runs of the release before the names that they had."""
    config = TrialConfig(rule="sparse", coefficients={"sparse": 0.1}, epochs=3)
    assert config.identity() == {"rule": "sparse", "coefficients": {"sparse": 0.1}, "epochs": 3}
    assert TrialConfig.from_dict(config.identity()) == config


def test_published_runs_keep_their_digests() -> None:
    """A confirmation's uid ends in the digest of its configuration: a new field must not change an old name."""
    published = Path(__file__).parents[1] / "results" / "published"
    paths = published.glob("*/*/*.jsonl")  # the older rows beside these folders were named by another rule
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    confirmed = [row for row in rows if "-confirm-" in row["uid"]]
    assert len(confirmed) > 100
    for row in confirmed:
        assert row["uid"].endswith(TrialConfig.from_dict(row["config"]).digest()), row["uid"]


def test_every_published_configuration_keeps_its_digest() -> None:
    """Of each file of rows, as the release before pydantic had them."""
    published, expected = Path(__file__).parents[1] / "results" / "published", Path(__file__).parent
    for name, known in json.loads((expected / "published_digests.json").read_text()).items():
        rows = [json.loads(line) for line in (published / name).read_text().splitlines()]
        assert digest([TrialConfig.from_dict(row["config"]).digest() for row in rows]) == known, name


def test_a_long_wrong_value_is_cut() -> None:
    with pytest.raises(UserError, match="epochs must be a valid integer, not 'aaa") as caught:
        TrialConfig.from_dict({"rule": "sign", "arch": "lenet", "dataset": "digits", "epochs": "a" * 10**6})
    assert len(str(caught.value)) < 300
