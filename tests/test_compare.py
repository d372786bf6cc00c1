"""`bench compare`: numbers by hand, each control once, what is unequal is said, and formats that programs read."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench.cli import main
from bench.compare import compare
from bench.compare_words import COLUMNS, TEXTS, csv_text, latex, latex_escape, table_rows
from bench.config import StudyConfig, TrialConfig, TrialResult, UserError
from bench.reading import SearchRows
from bench.rows import Row, row
from bench.terminal import Console
from bench.verbs.common import BAD_INPUT

PUBLISHED = Path(__file__).parents[1] / "results" / "published"
SPACE = {"decay": {"min": 0.1, "max": 1.0, "scale": "log"}, "self": {"min": 0.1, "max": 1.0, "scale": "log"}}


def run(kind: Any, seed: int, acc: float, *, status: Any = "finished", kept: Any = None, **changes: Any) -> Row:
    config = TrialConfig.from_dict({"rule": "symmetric", "arch": "resnet20", "epochs": 3, "seed": seed, **changes})
    metrics = {} if status == "failed" else {"val_acc": acc, "test_acc": acc, "angle": 9.0, "train_seconds": 2.0}
    here = {"device": "cpu", "device_name": "a CPU", "dataset_digest": "d", "examples": {"test": 100}, **(kept or {})}
    result = TrialResult(config=config, status=status, metrics=metrics, provenance=here)
    return row(f"{kind}-{config.digest()}", "s", kind, result)


def search(name: str, accuracies: dict[int, float], decay: float = 0.5, **changes: Any) -> SearchRows:
    """One trial, these confirmed accuracies by seed, and backprop at 0.90, 0.92, 0.94 for seeds 1, 2, 3."""
    rule = {"coefficients": {"decay": decay, "self": 0.25}, **changes}
    recipe = {k: v for k, v in changes.items() if k not in ("rule", "coefficients")}
    return SearchRows(
        name=name,
        config=None,
        searched=[run("search", 0, 0.5, **rule)],
        confirmed=[run("confirm", seed, acc, **rule) for seed, acc in accuracies.items()],
        controls=[run("control", s, a, rule="backprop", **recipe) for s, a in ((1, 0.90), (2, 0.92), (3, 0.94))],
    )


def with_settings(rows: SearchRows, **changes: Any) -> SearchRows:
    usual = {"rule": "symmetric", "arch": "resnet20", "dataset": "digits", "epochs": 3, "space": SPACE, "trials": 1}
    config = StudyConfig(name=rows.name, **{**usual, **changes})
    return SearchRows(
        name=rows.name, config=config, searched=rows.searched, confirmed=rows.confirmed, controls=rows.controls
    )


A = search("a", {1: 0.91, 2: 0.92, 3: 0.93})
B = search("b", {1: 0.80, 2: 0.82, 3: 0.81}, decay=0.1)


def notes(*studies: SearchRows) -> list[str]:
    found: list[str] = compare(studies)["notes"]
    return found


# --- numbers ---------------------------------------------------------------------------------------------


def test_the_differences_by_hand() -> None:
    first, second = compare([A, B])["studies"]
    assert (first["study"], first["test_acc"]["mean"]) == ("a", pytest.approx(0.92))
    assert first["test_acc"]["sd"] == pytest.approx(0.01)
    assert first["test_acc"]["high"] == pytest.approx(0.92 + 4.302653 * 0.01 / 3**0.5)  # t(2) = 4.302653
    assert first["test_acc_versus_first"] is None
    # a − backprop: 0.01, 0, −0.01; b − a: −0.11, −0.10, −0.12
    assert first["test_acc_versus_backprop"]["mean"] == pytest.approx(0, abs=1e-12)
    assert first["test_acc_versus_backprop"]["verdict"] == "not distinguishable"
    versus = second["test_acc_versus_first"]
    assert (versus["mean"], versus["n"], versus["verdict"]) == (pytest.approx(-0.11), 3, "worse")
    assert versus["low"] == pytest.approx(-0.11 - 4.302653 * 0.01 / 3**0.5)


def test_the_order_given_makes_the_first_and_turns_the_sign() -> None:
    found = compare([B, A])
    assert found["first"] == "b"
    assert found["studies"][1]["test_acc_versus_first"]["mean"] == pytest.approx(0.11)
    assert found["studies"][1]["test_acc_versus_first"]["verdict"] == "better"


def test_the_best_is_that_of_validation_and_others_are_counted() -> None:
    both = SearchRows(
        name="c", config=None, searched=A.searched, confirmed=[*B.confirmed, *A.confirmed], controls=A.controls
    )
    (line,) = compare([both])["studies"]
    assert (line["coefficients"]["decay"], line["test_acc"]["n"]) == (0.5, 3)
    assert "c: the best of 2 confirmed configurations" in notes(both)


def test_controls_stand_once_for_a_recipe_and_say_beside_whom() -> None:
    other = search("c", {1: 0.5, 2: 0.6}, lr=0.05)
    found = compare([A, B, other])
    assert [(line["rule"], line["beside"]) for line in found["controls"]] == [
        ("backprop", ["a", "b"]),
        ("backprop", ["c"]),
    ]
    line = found["controls"][0]
    assert (line["test_acc"]["mean"], line["test_acc"]["n"]) == (pytest.approx(0.92), 3)
    assert line["test_acc_versus_first"]["mean"] == pytest.approx(0, abs=1e-12)
    # alike but for the learning rate: the table must tell them apart
    assert [cells[0] for cells in table_rows(found)[3:]] == ["control of a, b", "control of c"]
    assert [cells[0] for cells in table_rows(compare([A, B]))[2:]] == ["control"]


def test_controls_of_several_studies_are_gathered_over_seeds() -> None:
    more = [*B.controls, run("control", 4, 0.96, rule="backprop")]
    wider = SearchRows(name="w", config=None, searched=B.searched, confirmed=B.confirmed, controls=more)
    (line,) = compare([A, wider])["controls"]
    assert (line["seeds"], line["test_acc"]["mean"]) == ([1, 2, 3, 4], pytest.approx(0.93))


def test_controls_that_disagree_are_said_to() -> None:
    others = [run("control", 1, 0.70, rule="backprop")]
    again = SearchRows(name="again", config=None, searched=B.searched, confirmed=B.confirmed, controls=others)
    assert any("backprop with seed 1 was run twice, with other results" in note for note in notes(A, again))
    assert not any("twice" in note for note in notes(A, B))


def test_diverged_and_failed_runs_are_counted() -> None:
    lost = search("c", {1: 0.9, 2: 0.8})
    lost.confirmed[1].update(status="diverged")
    rows = [*lost.confirmed, run("confirm", 3, 0, status="failed", coefficients={"decay": 0.5, "self": 0.25})]
    found = compare([SearchRows(name="c", config=None, searched=lost.searched, confirmed=rows, controls=lost.controls)])
    line = found["studies"][0]
    assert (line["diverged"], line["failed"], line["seeds"]) == (1, 1, [1, 2])
    assert line["test_acc"]["mean"] == pytest.approx(0.85)
    assert table_rows(found)[0][8:10] == ("2", "1/1")


def test_one_seed_has_no_interval() -> None:
    found = compare([A, search("one", {2: 0.5})])
    cells = table_rows(found)[1]
    assert cells[6:9] == ("50.00", "50.00", "1")
    assert cells[11] == "-42.00 not distinguishable"
    assert "$50.00$ & $50.00$ & 1" in latex(found)


# --- what is missing, and what is unequal ----------------------------------------------------------------


def test_equal_searches_are_not_said_to_differ() -> None:
    assert notes(A, B) == ["trials: 1 finished (a); 1 finished (b)"]


def test_other_data_has_a_dash_and_its_reason_once() -> None:
    other = search("c", {1: 0.5, 2: 0.6}, kept={"dataset_digest": "e"})
    found = compare([A, other])
    assert found["studies"][1]["test_acc_versus_first"] is None
    assert table_rows(found)[1][11] == "–"
    said = [note for note in found["notes"] if "no difference" in note]
    assert said == ["c: no difference to a: it was measured on other data"]
    assert found["controls"][1]["reasons"] == ["no difference to a: it was measured on other data"]
    assert "data sets differ: digits d (a), digits e (c)" in found["notes"]


def test_images_may_lie_elsewhere() -> None:
    there, here = (search(n, {1: a, 2: 0.7}, dataset=f"imagefolder:{n}") for n, a in (("x", 0.5), ("y", 0.6)))
    assert compare([there, here])["studies"][1]["test_acc_versus_first"]["mean"] == pytest.approx(0.05)


def test_without_a_common_seed_there_is_no_difference() -> None:
    found = compare([A, search("c", {8: 0.5, 9: 0.6})])
    assert found["studies"][1]["test_acc_versus_first"] is None
    assert found["studies"][1]["test_acc_versus_backprop"] is None
    assert "c: no difference to a: they have no seed in common" in found["notes"]
    assert "c: no run of backprop under its recipe has a seed in common with it" in found["notes"]


def test_a_difference_over_fewer_seeds_says_so() -> None:
    assert table_rows(compare([A, search("c", {2: 0.5, 3: 0.6, 9: 0.7})]))[1][11].endswith("(n 2)")


@pytest.mark.parametrize(
    ("settings", "status", "said"),
    [
        ({"trials": 20}, "finished", "c: nothing is confirmed yet; 1 of 20 trials are known"),
        ({"trials": 1}, "diverged", "c: nothing could be confirmed: no trial finished"),
        ({"trials": 1}, "finished", "c: nothing of it was confirmed (yet, or because --confirm-seeds is 0)"),
    ],
)
def test_a_study_without_confirmed_runs_has_its_line_and_a_reason(settings: Any, status: str, said: str) -> None:
    bare = with_settings(search("c", {}), **settings)
    bare.searched[0].update(status=status)
    found = compare([A, bare])
    assert said in found["notes"]
    assert table_rows(found)[1] == ("c", "symmetric", "resnet20", "digits", "–", "1 × 3", *"––", "0", "0/0", *"––")
    # and as the first: nobody has a difference to it
    turned = compare([bare, A])
    assert turned["studies"][1]["test_acc_versus_first"] is None
    assert "a: no difference to c: nothing of it was measured" in turned["notes"]


def test_a_study_all_of_whose_confirmed_runs_failed() -> None:
    failed = [run("confirm", s, 0, status="failed", coefficients={"decay": 0.5, "self": 0.25}) for s in (1, 2)]
    lost = SearchRows(name="c", config=None, searched=A.searched, confirmed=failed, controls=A.controls)
    found = compare([A, lost])
    assert "c: all of its 2 confirmed runs failed" in found["notes"]
    assert table_rows(found)[1][6:] == ("–", "–", "0", "0/2", "–", "–")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            search("c", {1: 0.5}, epochs=9),
            "numbers of epochs differ: 3 (a), 9 (c): this is a comparison across unequal",
        ),
        (search("c", {1: 0.5}, arch="lenet"), "networks differ: resnet20 (a), lenet (c)"),
        (search("c", {1: 0.5}, lr=0.05), "recipes differ: lr 0.1 (a), 0.05 (c)"),
        (search("c", {1: 0.5}, clip_norm=1.0), "recipes differ: clip_norm none (a), 1.0 (c)"),
        (search("c", {1: 0.5}, kept={"examples": {"test": 7}}), "numbers of test examples differ: 100 (a), 7 (c)"),
        (search("c", {1: 0.5}, kept={"device_name": "a GPU"}), "devices differ: a CPU (a), a GPU (c)"),
    ],
    ids=["epochs", "network", "lr", "clip", "test examples", "device"],
)
def test_what_is_unequal_is_said(other: SearchRows, said: str) -> None:
    assert any(note.startswith(said) for note in notes(A, other)), notes(A, other)


def test_unequal_budgets_of_trials_are_said_but_a_rule_without_coefficients_has_one() -> None:
    ten = with_settings(search("ten", {1: 0.5}), trials=1)
    more = with_settings(
        SearchRows(name="m", config=None, searched=[*A.searched] * 2, confirmed=A.confirmed, controls=A.controls),
        trials=2,
        sampler="random",
    )
    said = notes(ten, more)
    assert "numbers of trials differ: 1 (ten), 2 (m): this is a comparison across unequal budgets" in said
    assert "samplers differ: gp (ten), random (m)" in said
    fixed = with_settings(search("f", {1: 0.5}, rule="sign", coefficients={}), rule="sign", space={}, trials=20)
    assert not any(note.startswith("numbers of trials") or "of 20 trials" in note for note in notes(more, fixed))


def test_a_budget_that_is_not_used_up_is_said() -> None:
    assert "a: 1 of 20 trials are known" in notes(with_settings(A, trials=20))


def test_coefficients_of_another_space_are_said_to_mean_something_else() -> None:
    first = search("r", {1: 0.5}, rule="amp", coefficients={"amp": 1.0})
    second = search("n", {1: 0.5}, rule="amp", coefficients={"amp": 1.0}, scaling="normalized", centered=True)
    assert any(
        n.startswith("search spaces differ: reference (r), normalized-centered (n)") for n in notes(first, second)
    )


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(UserError, match="name a study"):
        compare([])


def test_studies_of_one_name_are_told_apart_by_their_place() -> None:
    here, there = (
        SearchRows(name="a", config=None, searched=[], confirmed=A.confirmed, controls=[], folder=Path(folder) / "a")
        for folder in ("x", "y")
    )
    assert [line["study"] for line in compare([here, there])["studies"]] == ["a in x/a", "a in y/a"]


# --- formats ---------------------------------------------------------------------------------------------


def test_csv_holds_the_numbers_of_json_in_full() -> None:
    found = json.loads(json.dumps(compare([A, search('c, "the" other', {1: 0.5, 2: 1 / 3}), with_settings(A)])))
    text = csv_text(found)
    assert text.count("\r\n") == text.count("\n") == 1 + 3 + len(found["controls"])
    lines = list(csv.DictReader(io.StringIO(text)))
    assert [line["study"] for line in lines] == ["a", 'c, "the" other', "a", ""]
    assert lines[3]["beside"] == 'a; c, "the" other; a'
    for line, its in zip(lines, [*found["studies"], *found["controls"]], strict=True):
        assert None not in line
        for name in ("mean", "sd", "n", "low", "high"):
            assert float(line[f"test_acc_{name}"]) == its["test_acc"][name]
    assert float(lines[1]["test_acc_versus_first_mean"]) == found["studies"][1]["test_acc_versus_first"]["mean"]
    assert (lines[0]["test_acc_versus_first_mean"], lines[0]["amp"], float(lines[0]["decay"])) == ("", "", 0.5)


def test_the_header_of_the_csv_is_always_the_same() -> None:
    one, other = (csv_text(compare(studies)) for studies in ([A], [search("c", {}), B]))
    assert one.splitlines()[0] == other.splitlines()[0]


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("a & b", r"a \& b"),
        ("5 %", r"5 \%"),
        ("$1", r"\$1"),
        ("#1", r"\#1"),
        ("a_b", r"a\_b"),
        ("{x}", r"\{x\}"),
        ("~", r"\textasciitilde{}"),
        ("x^2", r"x\textasciicircum{}2"),
        ("a\\b", r"a\textbackslash{}b"),
        ("[x", "{[}x"),
        ("2 × 3 − 1", r"2 $\times$ 3 $-$ 1"),
        ("a\nb", "a b"),
    ],
)
def test_text_is_escaped_for_latex(text: str, safe: str) -> None:
    assert latex_escape(text) == safe


def test_latex_is_well_formed_whatever_the_names() -> None:
    name = "[a&b%c_d#e{f}g~h^i\\j$k\n% \\end{tabular}"
    found = compare([A, search(name, {1: 0.5, 2: 0.6}, dataset="imagefolder:x_&_y"), B])
    text = latex(found)
    body = [line for line in text.splitlines() if not line.startswith("%")]
    assert body[0] == r"\begin{tabular}{" + "l" * TEXTS + "r" * (len(COLUMNS) - TEXTS) + "}"
    rows = [line for line in body if line.endswith(r" \\")]
    assert len(rows) == 1 + 3 + len(found["controls"])
    assert [line for line in body if line not in rows] == [
        body[0],
        r"\toprule",
        r"\midrule",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    for line in rows:
        bare = re.sub(r"\\[&%$#_{}\\]", "", line)
        assert bare.count("&") == len(COLUMNS) - 1
        assert bare.count("$") % 2 == 0
        assert bare.count("{") == bare.count("}")
        assert not set(bare) & set("%#_~^")
        assert not bare.startswith("[")
        assert "±" not in line
        assert all("[" in part for part in re.findall(r"\$[^$]*\]\$", line))  # an interval lies within its formula
    assert "$92.00 \\pm 1.00$ & $92.00 \\pm 1.00\\ [89.52, 94.48]$ & 3 & 0/0" in text
    assert "% a: trials 1, epochs 3, n 3" in text.splitlines()


def test_the_table_has_every_study_and_control() -> None:
    rows = table_rows(compare([A, B]))
    assert [cells[:2] for cells in rows] == [("a", "symmetric"), ("b", "symmetric"), ("control", "backprop")]
    assert rows[0][4:9] == (
        "decay 5.00e-01,\nself 2.50e-01",
        "1 × 3",
        "92.00 ± 1.00",
        "92.00 ± 1.00\n[89.52, 94.48]",
        "3",
    )
    assert rows[1][11] == "-11.00 [-13.48, -8.52]\nworse"
    assert rows[2][5] == "– × 3"
    assert {len(cells) for cells in rows} == {len(COLUMNS)}


# --- the command -----------------------------------------------------------------------------------------

STUDIES = [str(PUBLISHED / f"{rule}-resnet18-digits.jsonl") for rule in ("symmetric", "activation")]


def test_the_command_prints_a_table_and_the_readmes_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *STUDIES]) == 0
    said = capsys.readouterr().out
    for part in (
        "98.89 ± 0.28",
        "+0.37 [-1.37, +2.11]",
        "-13.00 [-16.81, -9.19]",
        "98.51 ± 0.43",
        "trials: 4 finished",
    ):
        assert part in said
    assert said.count("┏") == 1


def test_on_a_narrow_terminal_the_table_is_two(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.terminal.console", lambda stream: Console(file=stream, width=150))
    assert main(["compare", *STUDIES]) == 0
    said = capsys.readouterr().out
    assert said.count("┏") == 2
    for part in ("98.89 ± 0.28", "decay 1.13e-02", "-13.00 [-16.81, -9.19]"):
        assert part in said


@pytest.mark.parametrize("how", ["--json", "--csv", "--latex"])
def test_each_format_alone_is_printed_whole(capsys: pytest.CaptureFixture[str], how: str) -> None:
    assert main(["compare", *STUDIES, how]) == 0
    said = capsys.readouterr().out
    if how == "--json":
        found = json.loads(said)
        assert [line["rule"] for line in found["studies"]] == ["symmetric", "activation"]
        assert [line["rule"] for line in found["controls"]] == ["backprop", "feedback"]
    elif how == "--csv":
        assert len(list(csv.reader(io.StringIO(said)))) == 5
    else:
        assert said.endswith("\\end{tabular}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: STUDY"),
        ([*STUDIES, "--json", "--csv"], "not allowed with"),
        ([*STUDIES, "--latex", "--csv"], "not allowed with"),
        (["nothing", "--results", "nowhere"], "there is no study in nowhere"),
        ([str(PUBLISHED / "controls.jsonl")], "holds no rows of a study"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert main(["compare", *arguments]) == BAD_INPUT
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_what_is_no_search_is_sent_to_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "matrix.yaml").write_text("id: 1\n")
    assert main(["compare", "m", "--results", str(tmp_path)]) == BAD_INPUT
    assert "m is a matrix, not a search; bench report m makes its page." in capsys.readouterr().err
