"""The command line as a user has it: one clear line for bad input, nothing half written, and quick help."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.cli import main
from bench.config import UserError
from bench.verbs.common import BAD_INPUT, parse_settings


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


SEARCH = ["search", "--rule", "symmetric", "--arch", "resnet20"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: VERB"),
        (["serach"], "invalid choice: 'serach'"),
        (["search"], "--rule"),
        (["search", "--rule", "symetric"], "Did you mean 'symmetric'?"),
        (["search", "--rule", "amp+amp"], "names a primitive twice"),
        ([*SEARCH[:3], "--arch", "resnet19"], "unknown arch 'resnet19'"),
        ([*SEARCH, "--dataset", "digit"], "Did you mean 'digits'?"),
        ([*SEARCH, "--dataset", "imagefolder:nowhere"], "nowhere"),
        ([*SEARCH, "--trials", "0"], "trials = 0 is out of range"),
        ([*SEARCH, "--trials", "many"], "invalid int value"),
        ([*SEARCH, "--concurrent", "0"], "concurrent = 0 is out of range"),
        ([*SEARCH, "--sampler", "gpp"], "unknown sampler 'gpp'"),
        ([*SEARCH, "--scheduler", "asah"], "unknown scheduler 'asah'"),
        ([*SEARCH, "--set", "lr"], "write KEY=VALUE"),
        ([*SEARCH, "--set", "lrr=1"], "Did you mean 'lr'?"),
        ([*SEARCH, "--set", "lr=-1"], "lr = -1.0 is out of range"),
        ([*SEARCH, "--set", "lr=fast"], "lr must be a valid number"),
        ([*SEARCH, "--set", "lr=[1"], "not a value that YAML knows"),
        ([*SEARCH, "--set", "lr=1", "--set", "lr=2"], "given twice"),
        ([*SEARCH, "--set", "epochs=3"], "not part of the recipe"),
        ([*SEARCH, "--name", "../up"], "--name"),
        ([*SEARCH, "--name", "controls"], "--name"),
        ([*SEARCH, "--name", "mlartifacts"], "--name"),
        ([*SEARCH, "--device", "tpu9"], "cannot be used here"),
        ([*SEARCH, "--tracking-uri", "ftp://x"], "unknown scheme"),
        ([*SEARCH, "--data-dir", "nowhere", "--dataset", "fashion-mnist"], "nowhere"),
        (["train"], "needs --rule"),
        (["train", "--config", "none.yaml"], "none.yaml"),
        (["train", "--rule", "symmetric"], "needs the coefficients decay, self"),
        (["train", "--rule", "feedback", "--set", "coefficients.amp=1"], "no effect in rule 'feedback'"),
        (["train", "--rule", "feedback", "--set", "nesterov=maybe"], "must be a valid boolean"),
        (["train", "--rule", "feedback", "--device", "meta"], "cannot be used here"),
        (["train", "--rule", "amp", "--set", "coefficients={amp: 1}"], "one by one"),
        (["train", "--rule", "feedback", "--set", "dataset=5"], "dataset must be text"),
        (["train", "--rule", "feedback", "--epochs", "3", "--set", "warmup_epochs=4"], "lower it"),
        (["train", "--rule", "feedback", "--set", "step_factor=0.5"], "no effect with schedule"),
        (["train", "--rule", "feedback", "--checkpoint", "/dev/null/x.pt"], "checkpoint"),
        (["evaluate", "none.pt"], "none.pt"),
        (["list", "ruls"], "Did you mean 'rules'?"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: list[str], said: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == BAD_INPUT
    out, err = capfd.readouterr()
    assert said in err
    assert err.count("\n") == 1
    assert out == ""
    left = [p for p in folder.rglob("*") if p.is_file()]
    assert left == []


def test_results_that_cannot_be_written_are_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "taken").write_text("a file")
    assert main([*SEARCH, "--results", "taken"]) == BAD_INPUT
    assert "choose a folder that can be written" in capfd.readouterr().err


def test_every_list_is_shown_and_is_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {
        *("rules", "primitives", "networks", "datasets", "spaces", "samplers", "schedulers"),
        *("objectives", "scalings", "sites", "attacks", "ranges"),
    }
    assert {"sparse", "kolen-pollack"} <= {r["name"] for r in found["rules"]}
    assert main(["list", "rules"]) == 0
    assert "weight mirror" in capsys.readouterr().out


def test_settings_are_yaml_values() -> None:
    assert parse_settings(["lr=1e-3", "nesterov=false", "step_epochs=[30, 60]", "stem=small", "clip_norm=null"]) == {
        "lr": 1e-3,
        "nesterov": False,
        "step_epochs": [30, 60],
        "stem": "small",
        "clip_norm": None,
    }
    with pytest.raises(UserError):
        parse_settings(["=3"])


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")  # MLflow's own use
def test_train_then_evaluate_then_train_from_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--set", "train_examples=64", "--set", "batch_size=32", "--epochs", "1", "--json"]
    rule = ["--rule", "mirror", "--set", "coefficients.amp=1e-4", "--set", "coefficients.decay=0.1"]
    assert main(["train", *rule, "--arch", "lenet", "--checkpoint", "net.pt", *quick]) == 0
    trained = json.loads(capsys.readouterr().out)
    assert trained["status"] == "finished"
    assert trained["test_read"] is False
    rows = (folder / "results" / "train" / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["uid"] for line in rows] == [trained["uid"]]
    assert main(["evaluate", "net.pt", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    for name in ("val_acc", "val_loss", "angle", "dx_angle", "floor_angle"):
        assert measured["metrics"][name] == pytest.approx(trained["metrics"][name], rel=1e-6)
    assert main(["evaluate", "net.pt"]) == 0
    said = capsys.readouterr().out
    for name in ("angle °", "floor °", "dx angle °"):
        assert name in said
    layers = [name.removeprefix("angle/") for name in trained["metrics"] if name.startswith("angle/")]
    for layer in layers:
        assert f"{trained['metrics'][f'angle/{layer}']:.2f}" in said
    from bench.files import write_yaml

    write_yaml(folder / "again.yaml", trained["config"])
    assert main(["train", "--config", "again.yaml", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["metrics"]["val_loss"] == trained["metrics"]["val_loss"]
