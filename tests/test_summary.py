"""From rows to the table: numbers computed by hand, and nothing dropped."""

from __future__ import annotations

from typing import Any

import pytest

from bench.config import StudyConfig, TrialConfig, TrialResult
from bench.rows import Row, row
from bench.summary import columns, floor_words, headline, summarize, table_rows

STUDY = StudyConfig(name="s", rule="symmetric", arch="resnet20", dataset="digits", epochs=3)


def run(rule: str, seed: int, val: float, test: float, status: Any = "finished", **coefficients: float) -> Row:
    config = TrialConfig(rule=rule, seed=seed, epochs=3, coefficients=coefficients)
    metrics = {} if status == "failed" else {"val_acc": val, "test_acc": test, "angle": 10.0, "train_seconds": 2.0}
    return row(
        f"{rule}-{coefficients}-{seed}", "s", "confirm", TrialResult(config=config, status=status, metrics=metrics)
    )


def test_the_paired_difference_and_its_interval_by_hand() -> None:
    ours = [run("symmetric", s, 0.9, t, decay=1.0, self=1.0) for s, t in ((1, 0.90), (2, 0.92), (3, 0.94))]
    controls = [run("backprop", s, 0.9, t) for s, t in ((1, 0.91), (2, 0.91), (3, 0.94))]
    found = summarize(STUDY, [], ours, controls)
    versus = found["confirmed"][0]["test_acc_versus_backprop"]
    # differences −0.01, 0.01, 0: mean 0, sd 0.01, half width 4.302653·0.01/√3
    assert versus["mean"] == pytest.approx(0, abs=1e-12)
    assert versus["high"] == pytest.approx(4.302653 * 0.01 / 3**0.5, rel=1e-6)
    assert versus["verdict"] == "not distinguishable"
    assert found["confirmed"][0]["test_acc"]["mean"] == pytest.approx(0.92)
    assert found["confirmed"][0]["test_acc"]["sd"] == pytest.approx(0.02)
    assert found["controls"][0]["rule"] == "backprop"


def test_the_best_is_chosen_by_validation_never_by_test() -> None:
    one = [run("symmetric", s, 0.80, 0.99, decay=1.0, self=1.0) for s in (1, 2)]
    two = [run("symmetric", s, 0.81, 0.10, decay=2.0, self=2.0) for s in (1, 2)]
    found = summarize(STUDY, [], one + two, [])
    assert found["confirmed"][0]["coefficients"] == {"decay": 2.0, "self": 2.0}
    assert found["confirmed"][0]["test_acc_versus_backprop"] is None


def test_diverged_and_failed_runs_are_counted_and_shown() -> None:
    rows = [
        run("symmetric", 1, 0.9, 0.9, decay=1.0, self=1.0),
        run("symmetric", 2, 0.1, 0.1, "diverged", decay=1.0, self=1.0),
        run("symmetric", 3, 0, 0, "failed", decay=1.0, self=1.0),
    ]
    found = summarize(STUDY, rows, rows, [])
    entry = found["confirmed"][0]
    assert (entry["diverged"], entry["failed"]) == (1, 1)
    assert entry["val_acc"]["mean"] == pytest.approx(0.5)  # the diverged run counts at chance
    assert found["trials"] == {"finished": 1, "stopped": 0, "diverged": 1, "failed": 1}
    cells = table_rows(found)[0]
    assert "1 diverged, 1 failed" in cells[4]
    assert cells[2] == "50.00 ± 56.57"


def test_the_floor_is_beside_the_angle_where_there_is_one() -> None:
    rows = [run("mirror", s, 0.9, 0.8, decay=1.0, amp=1.0) for s in (1, 2)]
    plain = summarize(STUDY, rows, rows, [])
    assert columns(plain)[5:7] == ("angle °", "dx angle °")
    assert table_rows(plain)[0][5:7] == ("10.00 ± 0.00", "–")
    assert floor_words(plain) == ""
    for one, floor in zip(rows, (7.0, 8.0), strict=True):
        one["metrics"] |= {"floor_angle": floor, "dx_angle": 20.0}
    found = summarize(STUDY, rows, rows, [run("backprop", s, 0.9, 0.9) for s in (1, 2)])
    assert columns(found)[5:7] == ("angle ° (floor)", "dx angle °")
    assert [cells[5:7] for cells in table_rows(found)] == [
        ("10.00 ± 0.00 (7.50)", "20.00 ± 0.00"),
        ("10.00 ± 0.00", "–"),
    ]
    assert all(len(cells) == len(columns(found)) for cells in table_rows(found))
    assert headline(found)["floor_angle"] == 7.5


def test_the_headline_has_the_numbers_of_the_first_and_their_n() -> None:
    rows = [run("symmetric", s, 0.9, 0.8, decay=1.0, self=1.0) for s in (1, 2)]
    found = headline(summarize(STUDY, rows, rows, [run("backprop", s, 0.9, 0.9) for s in (1, 2)]))
    assert found["val_acc"] == pytest.approx(0.9)
    assert found["test_acc_n"] == 2
    assert found["test_acc_versus_backprop"] == pytest.approx(-0.1)
    assert found["search_best_val_acc"] == 0.9
    assert headline(summarize(STUDY, [], [], [])) == {
        "trials_finished": 0.0,
        "trials_stopped": 0.0,
        "trials_diverged": 0.0,
        "trials_failed": 0.0,
    }
