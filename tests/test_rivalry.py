"""`bench speed --search`: what is counted, and by whom; the real thing, for some seconds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import rivalry
from bench.cli import main
from bench.config import UserError

#: In place of tests/rivals.py: notes its trials, and waits to be interrupted; or fails.
SCRIPT = """
import json, sys, time
from pathlib import Path
way, folder, trial = sys.argv[1:]
if json.loads(trial)["rule"] == "fails":
    sys.exit("no such thing")
(Path(__file__).parents[1] / "seeds.jsonl").open("a").write(trial + chr(10))
began = time.time()
ends = [(began + 0.2, began + 0.6, 0.5), (None, began + 0.7, 0.1), (began + 0.8, began + 100, 0.9)]
for first, end, acc in ends[: 0 if way == "optuna" else 3]:
    with (Path(folder) / "ends.jsonl").open("a") as file:
        file.write(json.dumps({"first": first, "end": end, "val_acc": acc}) + chr(10))
time.sleep(600)
"""


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "rivals.py").write_text(SCRIPT)
    monkeypatch.setattr(rivalry.bench, "__file__", str(tmp_path / "bench" / "__init__.py"))


@pytest.mark.usefixtures("scripted")
def test_trials_that_end_in_time_are_counted_from_the_first_step_on() -> None:
    said: list[str] = []
    bench, optuna, ray = rivalry.compared({"rule": "sparse"}, 3.0, rounds=1, say=said.append)
    assert [search.way for search in (bench, optuna, ray)] == list(rivalry.WAYS)
    assert (bench.trials, bench.best) == (2, 0.5)  # the third ends later
    assert bench.first_step is not None
    assert 0.2 < bench.first_step < 2.0
    assert bench.per_hour == pytest.approx(2 / (3.0 - bench.first_step) * 3600)
    assert (optuna.trials, optuna.best, optuna.first_step, optuna.per_hour) == (0, None, None, 0.0)
    if sys.platform == "linux":
        assert bench.idle is not None
        assert 0.0 <= bench.idle <= 1.0
    assert len(said) == 3


def test_rounds_are_summed_up_way_by_way() -> None:
    def found(way: str, best: float | None, trials: int) -> rivalry.Search:
        return rivalry.Search(
            way=way, seconds=9.0, first_step=None, trials=trials, per_hour=2.0 * trials, best=best, idle=0.25
        )

    known = rivalry.over_rounds([found("bench", 0.5, 2), found("bench", 0.7, 4), found("ray", None, 0)])
    assert known["bench"]["best"] is not None
    assert (known["bench"]["best"]["mean"], known["bench"]["best"]["n"]) == (pytest.approx(0.6), 2)
    assert known["bench"]["trials"] is not None
    assert known["bench"]["trials"]["sd"] == pytest.approx(2**0.5)
    assert known["ray"]["best"] is None
    assert set(known) == set(rivalry.WAYS)
    assert all(each is None for each in known["optuna"].values())


@pytest.mark.usefixtures("scripted")
def test_each_round_has_a_seed_of_its_own(tmp_path: Path) -> None:
    rivalry.compared({"rule": "sparse"}, 1.0, rounds=2, say=lambda _: None)
    seeds = [json.loads(line)["seed"] for line in (tmp_path / "seeds.jsonl").read_text().splitlines()]
    assert sorted(seeds) == [0, 0, 0, 1, 1, 1]


@pytest.mark.usefixtures("scripted")
def test_one_that_fails_says_why() -> None:
    with pytest.raises(UserError, match=r"[a-z]+ ended before its time: no such thing"):
        rivalry.compared({"rule": "fails"}, 20.0, rounds=1, say=lambda _: None)


def test_without_the_tests_there_is_nothing_to_compare_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivalry.bench, "__file__", str(tmp_path / "bench" / "__init__.py"))
    with pytest.raises(UserError, match="in a checkout"):
        rivalry.compared({"rule": "sparse"}, 20.0, rounds=1, say=lambda _: None)


def test_a_rule_without_coefficients_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speed", "--search", "60", "--rule", "feedback"]) == 2
    assert "'feedback' has no coefficients to search for" in capsys.readouterr().err


@pytest.mark.faults
def test_all_ways_really_search(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--arch", "lenet", "--rule", "mirror", "--epochs", "1", "--rounds", "1"]
    assert main(["speed", "--search", "90", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {search["way"]: search["trials"] > 0 for search in found["searches"]} == dict.fromkeys(rivalry.WAYS, True)
