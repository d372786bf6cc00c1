"""What a results folder holds, from files alone: the right rows and controls, and the numbers that were printed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.config import StudyConfig, TrialConfig, TrialResult, UserError
from bench.files import write_yaml
from bench.kinds import KINDS, StudyKind
from bench.reading import Found, config_of, find, pick, read_controls, read_search, search_summary
from bench.rows import Row, RowFile, row
from bench.summary import table_rows

REPOSITORY = Path(__file__).parents[1]
PUBLISHED = REPOSITORY / "results" / "published"
DATA = "0123456789abcdef"


def run(uid: str, kind: Any, seed: int = 0, *, status: Any = "finished", acc: float = 0.5, **changes: Any) -> Row:
    config = TrialConfig.from_dict({"rule": "symmetric", "arch": "resnet20", "epochs": 3, "seed": seed, **changes})
    metrics = {} if status == "failed" else {"val_acc": acc, "test_acc": acc, "train_seconds": 1.0}
    here = {"device": "cpu"} if status == "failed" else {"device": "cpu", "dataset_digest": DATA}
    result = TrialResult(config=config, status=status, metrics=metrics, provenance=here)
    return row(uid, "s", kind, result)


def confirmed(seed: int, **changes: Any) -> Row:
    changes = {"coefficients": {"decay": 1.0, "self": 1.0}, **changes}
    return run(f"s-confirm-{seed}-{changes['coefficients']['decay']:g}", "confirm", seed, **changes)


def control(seed: int, rule: str = "backprop", uid: str = "", **changes: Any) -> Row:
    return run(uid or f"control-{rule}-{seed}", "control", seed, rule=rule, **changes)


def file(path: Path, rows: list[Row]) -> Path:
    for each in rows:
        RowFile(path).append(each)
    return path


def study(results: Path, rows: list[Row], controls: list[Row], name: str = "s", **changes: Any) -> Found:
    settings = {"rule": "symmetric", "arch": "resnet20", "dataset": "digits", "epochs": 3, **changes}
    config = StudyConfig(name=name, **settings)
    write_yaml(results / name / "study.yaml", {"id": "1", "runs_on": f"cpu {DATA}", "config": config.to_dict()})
    file(results / name / "rows.jsonl", rows)
    file(results / "controls" / "rows.jsonl", controls)
    return next(found for found in find(results) if found.name == name)


def uids(rows: Any) -> list[str]:
    return [each["uid"] for each in rows]


# --- what there is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_has_all_its_functions(name: str) -> None:
    kind = KINDS[name]
    for part in ("read", "page", "line", "headline", *(("curves",) if kind.curves else ())):
        assert callable(kind.load(part)), part


def test_all_studies_are_found_by_name_and_nothing_else(tmp_path: Path) -> None:
    for name, book in (("b", "matrix.yaml"), ("a", "study.yaml"), ("d", "transfer.yaml"), ("c", "robustness.yaml")):
        write_yaml(tmp_path / name / book, {"id": "1"})
    for other in ("controls", "published"):
        (tmp_path / other).mkdir()
    (tmp_path / "mlflow.db").touch()
    assert [(found.name, found.kind) for found in find(tmp_path)] == [
        ("a", "search"),
        ("b", "matrix"),
        ("c", "robustness"),
        ("d", "transfer"),
    ]
    assert find(tmp_path / "nowhere") == []


def test_studies_are_picked_in_the_order_given_each_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_yaml(tmp_path / name / "study.yaml", {"id": "1"})
    file(tmp_path / "a" / "rows.jsonl", [run("a-0000", "search")])
    by_path = str(tmp_path / "a")
    assert [found.name for found in pick(tmp_path, ["b", "a", "b", by_path, f"{by_path}/rows.jsonl"])] == ["b", "a"]
    elsewhere = pick(tmp_path / "nowhere", [by_path])
    assert [(found.name, found.folder) for found in elsewhere] == [("a", tmp_path / "a")]


def test_a_file_of_rows_holds_a_study_or_several(tmp_path: Path) -> None:
    rows = [{**run("a-0000", "search"), "study": "a"}, {**run("b-1", "robustness"), "study": "b"}]
    found = pick(tmp_path, [str(file(tmp_path / "some.jsonl", [*rows, control(1000)]))])
    assert [(each.name, each.kind, each.folder.name) for each in found] == [
        ("a", "search", "some.jsonl"),
        ("b", "robustness", "some.jsonl"),
    ]
    assert uids(read_search(found[0]).searched) == ["a-0000"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("symetric", "unknown study 'symetric'. Did you mean 'symmetric'? Valid: other, symmetric."),
        ("{here}/symmetric/none.jsonl", "there is no file"),
        ("{here}/controls", "holds no study; name a folder that has one of study.yaml"),
        ("{here}/controls.jsonl", "holds no rows of a study"),
    ],
)
def test_what_is_not_there_is_one_line(tmp_path: Path, name: str, said: str) -> None:
    for known in ("symmetric", "other"):
        write_yaml(tmp_path / known / "study.yaml", {"id": "1"})
    (tmp_path / "controls").mkdir()
    file(tmp_path / "controls.jsonl", [control(1000)])
    with pytest.raises(UserError) as error:
        pick(tmp_path, [name.format(here=tmp_path)])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_folder_is_said_to_be_empty(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no study in .*; name another --results"):
        pick(tmp_path, ["a"])


# --- a search --------------------------------------------------------------------------------------------


def test_rows_are_told_apart_and_ordered_and_whole(tmp_path: Path) -> None:
    old = run("s-10000", "search")
    del old["config"]["scaling"], old["config"]["noise_levels"]
    rows = [old, confirmed(1001), run("s-0002", "search", status="stopped"), confirmed(1000)]
    found = read_search(study(tmp_path, rows, [control(1001), control(1001, "feedback"), control(1000)]))
    assert uids(found.searched) == ["s-0002", "s-10000"]
    assert [each["config"]["seed"] for each in found.confirmed] == [1000, 1001]
    assert uids(found.controls) == ["control-backprop-1000", "control-backprop-1001", "control-feedback-1001"]
    assert found.searched[1]["config"]["scaling"] == "reference"
    assert found.searched[1]["config"]["noise_levels"] == []
    assert (found.name, found.config and found.config.rule) == ("s", "symmetric")


def test_the_last_attempt_at_a_run_counts(tmp_path: Path) -> None:
    first, second = confirmed(1000, status="failed"), {**confirmed(1000, status="failed"), "uid": "s-confirm-1000-1.2"}
    third = {**confirmed(1000, acc=0.9), "uid": "s-confirm-1000-1.3"}
    again = control(1000, uid="control-backprop-1000.2", acc=0.8)
    found = read_search(study(tmp_path, [first, second, third], [control(1000, acc=0.7), again]))
    assert uids(found.confirmed) == ["s-confirm-1000-1.3"]
    assert uids(found.controls) == ["control-backprop-1000.2"]


def test_an_earlier_best_stays_after_the_budget_grew(tmp_path: Path) -> None:
    later = {"decay": 2.0, "self": 1.0}
    rows = [confirmed(s, acc=0.6) for s in (1000, 1001)]
    rows += [confirmed(s, acc=0.7, coefficients=later) for s in (1000, 1001)]
    entries = search_summary(read_search(study(tmp_path, rows, [])))["confirmed"]
    assert [(e["coefficients"]["decay"], e["val_acc"]["n"]) for e in entries] == [(2.0, 2), (1.0, 2)]


def with_provenance(each: Row, **changes: Any) -> Row:
    return {**each, "uid": "another", "provenance": {**each["provenance"], **changes}}


@pytest.mark.parametrize(
    "other",
    [
        control(1000, uid="another", lr=0.05),
        control(1000, uid="another", arch="lenet"),
        control(1000, uid="another", dataset="cifar10"),
        control(1000, uid="another", epochs=4),
        control(1000, uid="another", update_noise=1.0),
        control(7, uid="another"),
        control(1000, "symmetric", uid="another"),
        {**control(1000, uid="another"), "kind": "confirm"},
        with_provenance(control(1000), device="cuda:0"),
        with_provenance(control(1000), dataset_digest="another"),
    ],
    ids=["lr", "network", "data set", "epochs", "noise", "seed", "own rule", "kind", "device", "digest"],
)
def test_a_control_of_something_else_is_left_out(tmp_path: Path, other: Row) -> None:
    found = read_search(study(tmp_path, [confirmed(1000)], [control(1000), other], confirm_seeds=1))
    assert uids(found.controls) == ["control-backprop-1000"]


def test_what_is_the_rules_own_does_not_part_it_from_its_controls(tmp_path: Path) -> None:
    own = {"rule": "amp+decay", "coefficients": {"decay": 0.1, "amp": 0.1}, "scaling": "normalized", "centered": True}
    old = control(1000)
    for name in ("scaling", "centered", "noise_site", "update_noise", "update_noise_on"):
        del old["config"][name]
    rows = [confirmed(1000, **own, feedback_every=2)]
    assert uids(read_search(study(tmp_path, rows, [old], rule="mirror")).controls) == ["control-backprop-1000"]


def test_where_only_the_updates_of_b_are_noisy_the_controls_are_quiet(tmp_path: Path) -> None:
    rows = [confirmed(1000, update_noise=2.0, update_noise_on="feedback")]
    noisy = control(1000, uid="noisy", update_noise=2.0)
    assert uids(read_search(study(tmp_path, rows, [control(1000), noisy])).controls) == ["control-backprop-1000"]


def test_controls_of_seeds_to_come_are_shown_as_the_search_shows_them(tmp_path: Path) -> None:
    controls = [control(seed) for seed in (1000, 1001, 1002, 1003, 1004)]
    found = study(tmp_path, [confirmed(1000)], controls, confirm_seeds=3, seed=1001)
    assert [each["config"]["seed"] for each in read_search(found).controls] == [1000, 1002, 1003]


def test_a_control_that_failed_before_it_had_data_is_known_by_its_name() -> None:
    (found,) = pick(PUBLISHED / "matrix-resnet18-digits", ["symmetric-resnet18-digits"])
    known = read_controls(found)
    lost = {**known[0], "status": "failed", "metrics": {}, "provenance": {"device": "cpu"}}
    unknown = {**lost, "uid": f"control-{lost['config']['rule']}-{DATA}"}  # of other data, or of another device
    read = read_search(found, [lost, unknown, *known[1:]])
    assert sorted(uids(read.controls)) == sorted(uids(known))
    assert sum(entry["failed"] for entry in search_summary(read)["controls"]) == 1


def test_controls_that_were_read_before_are_not_read_again(tmp_path: Path) -> None:
    found = study(tmp_path, [confirmed(1000)], [control(1000)])
    known = read_controls(found)
    (tmp_path / "controls" / "rows.jsonl").unlink()
    assert uids(read_search(found, known).controls) == ["control-backprop-1000"]
    assert read_search(found).controls == []


def test_a_search_that_has_not_begun_has_no_rows(tmp_path: Path) -> None:
    found = read_search(study(tmp_path, [], [control(1000)]))
    assert (found.searched, found.confirmed, found.controls) == ([], [], [])
    assert search_summary(found)["trials"] == {"finished": 0, "stopped": 0, "diverged": 0, "failed": 0}


def test_a_line_that_is_being_written_is_no_row_yet_and_a_damaged_book_is_said(tmp_path: Path) -> None:
    found = study(tmp_path, [confirmed(1000)], [])
    with (tmp_path / "s" / "rows.jsonl").open("a") as writing:
        writing.write('{"uid": "s-conf')
    assert uids(read_search(found).confirmed) == ["s-confirm-1000-1"]
    write_yaml(tmp_path / "s" / "study.yaml", {"id": "1", "config": 3})
    with pytest.raises(UserError, match="is damaged: it has no config"):
        read_search(found)


@pytest.mark.parametrize("kind", [kind for name, kind in KINDS.items() if name != "search"])
def test_another_kind_of_study_is_sent_to_its_report(tmp_path: Path, kind: StudyKind) -> None:
    write_yaml(tmp_path / "a" / kind.manifest, {"id": "1"})
    (found,) = find(tmp_path)
    with pytest.raises(UserError, match=f"a is {kind.what}, not a search; bench report a makes its page"):
        read_search(found)


# --- rows without a book -----------------------------------------------------------------------------------


def test_rows_alone_tell_what_was_searched(tmp_path: Path) -> None:
    levels: dict[str, Any] = {"noise_site": "weight", "noise_levels": [0.1, 0.2], "noise_draws": 2}
    rows = [
        run("s-0000", "search", lr=0.05, rule="amp", coefficients={"amp": 1.0}, **levels),
        run("s-0001", "search", lr=0.05, rule="decay", coefficients={"decay": 1.0}, **levels),
        run("s-confirm-1", "confirm", 1000, lr=0.05, rule="amp", coefficients={"amp": 1.0}, **levels),
    ]
    (found,) = pick(tmp_path, [str(file(tmp_path / "s.jsonl", rows))])
    read = read_search(found)
    assert read.config is None
    config = config_of(read)
    assert (config.rule, config.arch, config.trials, config.epochs) == ("any", "resnet20", 2, 3)
    assert (config.objective, config.confirm_top, config.confirm_seeds) == ("both", 1, 1)
    assert config.recipe == {"lr": 0.05, **levels}


#: README, "What came out": rule, validation %, test %, n, and test − backprop; then those of backprop and feedback.
README = {
    "sparse-resnet50-digits": [
        ("sparse", "20.83 ± 2.78", "19.96 ± 4.34", "3", "-54.32 [-79.75, -28.88] worse"),
        ("backprop", "73.61 ± 5.93", "74.28 ± 8.01", "3", "–"),
        ("feedback", "19.68 ± 4.07", "20.52 ± 2.85", "3", "-53.76 [-73.86, -33.66] worse"),
    ],
    "symmetric-resnet18-digits": [
        ("symmetric", "99.31 ± 0.69", "98.89 ± 0.28", "3", "+0.37 [-1.37, +2.11] not distinguishable"),
        ("backprop", "96.76 ± 1.06", "98.51 ± 0.43", "3", "–"),
        ("feedback", "84.03 ± 2.08", "84.77 ± 2.09", "3", "-13.74 [-17.91, -9.57] worse"),
    ],
    "activation-resnet18-digits": [
        ("activation", "86.34 ± 0.80", "85.89 ± 1.81", "3", "-12.63 [-18.18, -7.08] worse"),
        ("backprop", "96.76 ± 1.06", "98.51 ± 0.43", "3", "–"),
        ("feedback", "84.03 ± 2.08", "84.77 ± 2.09", "3", "-13.74 [-17.91, -9.57] worse"),
    ],
    "mirror-lenet-fashion-mnist": [
        ("mirror", "45.93 ± 3.26", "45.57 ± 3.94", "3", "-39.91 [-49.29, -30.54] worse"),
        ("backprop", "85.69 ± 0.18", "85.48 ± 0.25", "3", "–"),
        ("feedback", "10.00 ± 0.00", "10.00 ± 0.00", "3, 3 diverged", "-75.48 [-76.11, -74.85] worse"),
    ],
    "information-lenet-imagefolder-cifar10": [
        ("information", "24.03 ± 0.80", "24.11 ± 1.35", "3", "-30.51 [-36.99, -24.04] worse"),
        ("backprop", "54.97 ± 3.88", "54.62 ± 3.66", "3", "–"),
        ("feedback", "10.00 ± 0.00", "10.00 ± 0.00", "3, 3 diverged", "-44.62 [-53.72, -35.52] worse"),
    ],
}


@pytest.mark.parametrize("name", sorted(README))
def test_published_rows_give_the_readmes_numbers(name: str) -> None:
    (found,) = pick(PUBLISHED, [str(PUBLISHED / f"{name}.jsonl")])
    cells = table_rows(search_summary(read_search(found)))
    assert [(rule, val, test, n, versus) for rule, _, val, test, n, *_, versus in cells] == README[name]


def test_reading_starts_no_machinery() -> None:
    absent = ("torch", "ray", "mlflow", "pandas")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import bench.reading; print('read')"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("read", "")
