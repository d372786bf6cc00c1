"""Configurations, search spaces and books with a fault in them: refused in one line, or whole."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bench.config import Strict, StudyConfig, TrialConfig, TrialResult, UserError
from bench.files import parse_scalar, read_yaml, write_yaml
from bench.learning.rules import RULES
from bench.matrix import MatrixConfig
from bench.robustness_plan import RobustnessConfig
from bench.space import Space
from bench.space_files import load_space, space_folder, space_names
from bench.spaces import SPACES as KINDS
from bench.transfer import TransferConfig
from malformed import ODD_TEXTS, damaged, examples, mutated, nested, refused_in_one_line

TRIAL = TrialConfig(
    rule="mirror", coefficients={"amp": 0.5, "decay": 1e-3}, schedule="step", step_epochs=(3.0, 5.0), clip_norm=1.0
)
STUDY = StudyConfig(
    name="s",
    rule="mirror",
    arch="lenet",
    dataset="digits",
    warm_from="other",
    warm=({"amp": 1.0},),
    recipe={"lr": 0.1, "step_epochs": [3, 5]},
    space=load_space("mirror", "lenet", space="reference").to_dict(),
)
RESULT = TrialResult(
    config=TRIAL,
    status="finished",
    metrics={"val_acc": 0.5},
    history=[{"epoch": 1.0, "val_acc": 0.5}],
    evaluation={"site": "weight", "level": 0.1},
    provenance={"versions": {"torch": "2"}, "examples": {"train": 5}},
)
TRANSFER = TransferConfig(name="t", rules=("mirror",), source="lenet", targets=("resnet20",), dataset="digits")
MATRIX = MatrixConfig(name="m", archs=("lenet",), dataset="digits")
ROBUSTNESS = RobustnessConfig(name="r", rules={"mirror": TRIAL.to_dict()}, levels={"weight": (0.1, 0.2)})
ALL: tuple[Strict, ...] = (TRIAL, STUDY, RESULT, TRANSFER, MATRIX, ROBUSTNESS)


def plain(value: Any) -> str:
    """As text, in which a number that is none is equal to itself."""
    return json.dumps(value, sort_keys=True)


@pytest.mark.parametrize("config", ALL, ids=lambda config: type(config).__name__)
@examples(120)
@given(data=st.data())
def test_a_mapping_with_a_fault_is_refused_or_survives_json(config: Strict, data: st.DataObject) -> None:
    bad = data.draw(mutated(config.to_dict()))
    with refused_in_one_line():
        read = type(config).from_dict(bad)
        again = type(config).from_dict(json.loads(plain(read.to_dict())))
        assert plain(again.to_dict()) == plain(read.to_dict())


@pytest.mark.parametrize("config", ALL, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("bad", [None, 3, "text", [], [["rule", "mirror"]], {3: 4}, {"rule": nested(900)}])
def test_what_is_no_mapping_is_refused(config: Strict, bad: Any) -> None:
    with pytest.raises(UserError) as caught:
        type(config).from_dict(bad)
    assert str(caught.value).isprintable()


@examples(120)
@given(mutated(load_space("any", "lenet").to_dict()))
def test_a_space_with_a_fault_is_refused_or_survives_json(bad: Any) -> None:
    with refused_in_one_line():
        space = Space.from_dict(bad)
        assert Space.from_dict(json.loads(plain(space.to_dict()))) == space
        space.distributions()


SPACES = {
    (kind.folder, name): (space_folder() / kind.folder / f"{name}.yaml").read_bytes()
    for kind in KINDS.values()
    for name in space_names(kind.name)
}


def read_space(folder_of: str, name: str, content: bytes) -> None:
    """As a search reads it, in each of its sections."""
    with tempfile.TemporaryDirectory() as folder, refused_in_one_line():
        (Path(folder) / folder_of).mkdir(exist_ok=True)
        (Path(folder) / folder_of / f"{name}.yaml").write_bytes(content)
        for kind in KINDS.values():
            if kind.folder == folder_of:
                space = load_space(name, "lenet", Path(folder), space=kind.name)
                space.distributions()
                for corner in space.corners():
                    TrialConfig.from_dict({"rule": name, **space.settings, **space.changes(corner)})


@examples(80)
@given(data=st.data())
def test_a_file_of_a_space_with_damaged_bytes(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(SPACES)))
    read_space(*name, data.draw(damaged(SPACES[name])))


@examples(80)
@given(data=st.data())
def test_a_file_of_a_space_with_a_wrong_value(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(SPACES)))
    with tempfile.TemporaryDirectory() as folder:
        whole = read_yaml(space_folder() / name[0] / f"{name[1]}.yaml")
        bad = data.draw(mutated(whole).filter(lambda value: isinstance(value, dict)))
        path = Path(folder) / "written.yaml"
        try:
            write_yaml(path, bad)
        except UnicodeEncodeError:  # a lone surrogate is no text, in any file
            return
        read_space(*name, path.read_bytes())


BOOK = b"""# a book
id: abc
runs_on: cpu 0123456789abcdef
config:
  name: &name s
  rule: mirror
  recipe: {lr: 1e-2, step_epochs: [1, 2], null: ~}
  other: [*name, 2.5, true, 'quoted "text"']
  text: |
    several
    lines
"""


@examples(120)
@given(damaged(BOOK))
@example(b"a: 2020-01-01")
@example(b"a: 2020-01-01 00:00:00")
@example(b"a: &a [*a]")
@example(b"a: &a {b: *a}")
@example(b"a: &a {<<: *a}")
@example(
    b"a0: &a0 [1]\n" + b"".join(b"a%d: &a%d [%s]\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 12))
)
@example(b"a: &a {k: 1}\nb: {<<: [*a, *a]}")
@example(b"a: 0b_")
@example(b"a: 1:2:3")
@example(b"a: =")
@example(b"<<: 3")
@example(b"a: " + b"9" * 5000)
@example(b"a: .inf\nb: -.INF\nc: .nan")
def test_yaml_with_damaged_bytes_is_refused_or_plain(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "book.yaml"
        path.write_bytes(content)
        with refused_in_one_line():
            read = read_yaml(path)
            assert isinstance(read, dict)
            plain(read)  # numbers, text, lists and mappings, and not without end
        assert [p.name for p in Path(folder).iterdir()] == ["book.yaml"]


@examples(120)
@given(st.sampled_from(ODD_TEXTS) | st.text(max_size=12))
@example("2020-01-01")
@example("&a [*a]")
def test_a_value_on_the_command_line_is_refused_or_plain(text: str) -> None:
    with refused_in_one_line():
        plain(parse_scalar("lr", text))


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_with_a_space_takes_part(rule: str) -> None:
    assert (("", rule) in SPACES) == (RULES[rule].learns)
