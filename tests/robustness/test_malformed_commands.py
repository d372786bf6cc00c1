"""Command lines with odd words in them, up to the moment at which work would begin: one line, and nothing left."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.config import TrialResult
from bench.files import write_yaml
from bench.steps import Step
from malformed import ODD_TEXTS, examples, files, run, said_in_one_line
from rehearsal import Silent

BASE = {
    "search": ["--rule", "decay", "--arch", "lenet", "--trials", "2", "--epochs", "2"],
    "transfer": ["--rule", "decay", "--from", "lenet", "--to", "resnet20", "--trials", "2"],
    "matrix": ["--arch", "lenet", "--primitives", "decay", "--trials", "2"],
    "robustness": ["--rule", "feedback", "--arch", "lenet", "--site", "weight", "--seeds", "1"],
    "report": ["--out", "pages"],
    "compare": ["known"],
    "train": ["--rule", "feedback", "--arch", "lenet", "--epochs", "1"],
    "evaluate": ["known/best.yaml"],
    "list": ["rules"],
    "ui": [],
    "doctor": [],
    "sync": [],
    "cluster": [],
    "confirm": ["a=known/best.yaml", "b=known/other.yaml"],
    "speed steps": [],
    "speed trial": [],
}
_RUNS = {
    "--name": "mine",
    "--set": "lr=0.1",
    "--data-dir": ".",
    "--device": "cpu",
    "--concurrent": "1",
    "--gpus-per-trial": "0.5",
    "--workers-per-trial": "1",
    "--results": "results",
    "--json": None,
    "--address": "127.0.0.1:1",
    "--storage": "sqlite:///x.db",
    "--tracking-uri": "sqlite:///runs.db",
}
_BUDGET = {
    "--trials": "3",
    "--epochs": "2",
    "--confirm-seeds": "1",
    "--seed": "1",
    "--sampler": "random",
    "--scheduler": "none",
    "--space": "normalized",
    "--dataset": "digits",
}
_SPEED: dict[str, str | None] = {
    **{name: _RUNS[name] for name in ("--device", "--results", "--json", "--tracking-uri")},
    "--rule": "mirror",
    "--arch": "resnet20",
    "--fraction": "0.5",
    "--samples": "16",
    "--threads": "1",
}
OPTIONS: dict[str, dict[str, str | None]] = {
    "search": {
        **_RUNS,
        **_BUDGET,
        "--rule": "amp",
        "--arch": "resnet20",
        "--objective": "both",
        "--site": "input",
        "--sigma": "0.1,0.2",
        "--draws": "2",
        "--confirm-top": "2",
        "--warm-from": "known",
        "--tune-lr": None,
    },
    "transfer": {
        **_RUNS,
        **_BUDGET,
        "--rule": "amp,mirror",
        "--from": "resnet20",
        "--to": "lenet",
        "--configs": "2",
        "--both": None,
    },
    "matrix": {
        **_RUNS,
        **_BUDGET,
        "--arch": "lenet,resnet20",
        "--primitives": "amp",
        "--any": None,
        "--only": "amp",
        "--dry-run": None,
    },
    "robustness": {
        **_RUNS,
        "--rule": "sign",
        "--arch": "lenet",
        "--dataset": "digits",
        "--site": "update,input",
        "--sigma": "0.1,0.2",
        "--on": "forward",
        "--clip": None,
        "--draws": "2",
        "--attack": "fgsm",
        "--epsilon": "8/255",
        "--gradient": "feedback",
        "--attacked": "9",
        "--queries": "1000",
        "--first-seed": "3",
        "--seeds": "2",
        "--config": "known/best.yaml",
        "--study": "known",
        "--checkpoint": "known/best.yaml",
        "--epochs": "2",
        "--keep-networks": None,
    },
    "report": {"--out": "pages/one.html", "--results": "results", "--json": None},
    "compare": {"--results": "results", "--json": None, "--csv": None, "--latex": None},
    "train": {
        **{name: _RUNS[name] for name in ("--set", "--data-dir", "--device", "--results", "--json", "--tracking-uri")},
        "--config": "known/best.yaml",
        "--rule": "sign",
        "--arch": "lenet",
        "--dataset": "digits",
        "--epochs": "2",
        "--seed": "1",
        "--checkpoint": "net.pt",
        "--read-test": None,
    },
    "evaluate": {"--split": "val", "--data-dir": ".", "--device": "cpu", "--json": None},
    "list": {"--json": None},
    "ui": {
        "--host": "127.0.0.1",
        "--port": "0",
        "--optuna": None,
        "--results": "results",
        "--tracking-uri": "sqlite:///runs.db",
    },
    "doctor": {"--results": "results", "--json": None},
    "sync": {"--results": "results", "--tracking-uri": "sqlite:///runs.db", "--json": None},
    "cluster": {"--host": "10.0.0.1", "--port": "6379", "--results": "results", "--json": None},
    "confirm": {**{name: _RUNS[name] for name in _RUNS if name != "--set"}, "--seeds": "2"},
    "speed steps": {
        **_SPEED,
        "--batch-size": "9",
        "--image-size": "8",
        "--classes": "3",
        "--precision": "bf16",
        "--rounds": "5",
    },
    "speed trial": {**_SPEED, "--dataset": "digits", "--epochs": "1", "--data-dir": "."},
}
SECONDS: dict[str, Any] = {**dict.fromkeys(Step.field_names(), 1.0), "rounds": 4}
#: What no shell can pass on: a lone surrogate that is no byte.
WORDS = tuple(text.replace("\ud800", "\udcff") for text in ODD_TEXTS)
#: Names of things of another kind than the one asked for.
PLACES = (
    "folder",
    "file",
    "circle",
    "known",
    "known/rows.jsonl",
    "known/study.yaml",
    "file/below",
    "x" * 300,
    "results",
)
SETTINGS = ("lr", "seed", "rule", "step_epochs", "precision", "coefficients.decay", "image_size", "batch_size", "")


@st.composite
def command_lines(draw: Any) -> list[str]:
    """A verb with options, of which some have an odd value, or none, or stand where they do not belong."""
    name = draw(st.sampled_from(sorted(BASE)))
    line = [*name.split(), *BASE[name]]
    odd = st.sampled_from(WORDS) | st.sampled_from(PLACES) | st.text(st.characters(codec="utf-8"), max_size=6)
    odd = odd.filter(lambda word: "\0" not in word)
    own = sorted(OPTIONS[name])
    foreign = ["--help", "--version", "--nonsense", *OPTIONS["robustness"]]
    for _ in range(draw(st.integers(1, 3))):
        fault = draw(st.sampled_from(("value", "value", "option", "setting", "word", "leave out", "foreign")))
        option = draw(st.sampled_from(foreign if fault == "foreign" else own))
        usual = OPTIONS[name].get(option)
        if fault == "word":
            line.insert(draw(st.integers(0, len(line))), draw(odd))
        elif fault == "leave out":
            del line[draw(st.integers(0, len(line) - 1)) :][:1]
        elif fault == "setting":
            line += ["--set", f"{draw(st.sampled_from(SETTINGS))}={draw(odd)}"]
        else:
            value = draw(odd) if fault == "value" else usual
            line += [option, *([] if usual is None or value is None else [value])]
    return line


@contextlib.contextmanager
def folder_of_odd_things() -> Iterator[Path]:
    """A working folder with a search that was begun, and things that are not what they should be."""
    with tempfile.TemporaryDirectory() as made, contextlib.chdir(made):
        here = Path(made)
        (here / "folder").mkdir()
        (here / "file").write_text("text")
        (here / "circle").symlink_to("circle")
        for place in (here / "known", here / "results" / "known"):
            place.mkdir(parents=True)
            (place / "rows.jsonl").write_text("")
            write_yaml(place / "best.yaml", {"rule": "decay", "arch": "lenet", "coefficients": {"decay": 0.1}})
            write_yaml(place / "other.yaml", {"rule": "sign", "arch": "lenet"})
            (place / "study.yaml").write_text("config: {name: known, rule: decay, arch: lenet, dataset: digits}\n")
        yield here


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """No training, no MLflow, no servers: all before that is real."""

    class Unheard(Silent):
        def link(self) -> dict[str, Any]:
            return {"tracking_uri": "", "experiment_id": None, "parent_run_id": None}

    @contextlib.contextmanager
    def tracker(**_: Any) -> Iterator[Unheard]:
        yield Unheard()

    monkeypatch.setattr("bench.engine.run", lambda *_, **__: "done")
    monkeypatch.setattr("bench.ui.serve", lambda *_, **__: None)
    monkeypatch.setattr("bench.speed.measure", lambda *_, **__: [Step(**{**SECONDS, "rule": "sign", "way": "bench"})])
    monkeypatch.setattr("bench.speed.run_trial", lambda config, *_, **__: TrialResult(config=config, status="finished"))
    monkeypatch.setattr("bench.mlflow_store.Store.deliver", lambda *_: None)
    monkeypatch.setattr("bench.mlflow_store.Store.look", lambda *_: None)
    monkeypatch.setattr("bench.train.run_trial", lambda config, *_, **__: TrialResult(config=config, status="finished"))
    for module in ("search", "programme", "robustness", "train", "speed"):
        monkeypatch.setattr(f"bench.{module}.Tracker.open", tracker)


@pytest.mark.usefixtures("stage")
@examples(150)
@given(command_lines())
def test_odd_words_are_refused_in_one_line_and_leave_nothing(line: list[str]) -> None:
    with folder_of_odd_things() as here:
        before = files(here)
        status, _, err = run(line)
        said_in_one_line(status, err)
        if status == 2:
            assert files(here) == before


@pytest.mark.parametrize("verb", sorted(BASE))
def test_every_option_of_every_verb_takes_part(verb: str) -> None:
    status, out, _ = run([*verb.split(), "--help"])
    assert status == 0
    assert {*re.findall(r"^  (--[a-z-]+)", out, re.MULTILINE)} == set(OPTIONS[verb])


def test_every_verb_takes_part() -> None:
    _, out, _ = run(["--help"])
    assert {*re.findall(r"^    ([a-z]+)(?:  |$)", out, re.MULTILINE)} == {name.split()[0] for name in BASE}
