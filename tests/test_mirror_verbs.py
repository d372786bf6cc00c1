"""Whole verbs, and what their workers keep, with results on an object store."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.cli import main
from bench.config import TrialConfig
from bench.director import Task
from bench.doctor import check_store
from bench.mirror import working_copy
from bench.objects import Store
from bench.place import Options
from bench.probe import run_probe
from bench.robustness import Robustness, prepare_measurement
from bench.robustness_plan import RobustnessConfig
from bench.rows import RowFile
from flaky_store import Flaky, away, on, quick, said
from rehearsal import Silent, Stage, stage

__all__ = ["on", "quick", "said", "stage"]  # fixtures

URI = "fsspec+flaky://lab/x"
STORE = Store(URI)


SEARCH = ["search", "--rule", "sparse", "--arch", "lenet", "--epochs", "2", "--sampler", "random", "--results"]


@pytest.mark.slow
def test_a_search_goes_on_from_an_empty_copy_and_reports_are_read_from_the_store(
    tmp_path: Path,
    on: Callable[[str], None],
    stage: Callable[..., Stage],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bench.present.study_link", lambda *_: None)  # on the stage there is no MLflow
    played = stage(lambda _: 0.5)
    played.stop_after = 3
    on("a")
    assert main([*SEARCH, URI, "--trials", "6", "--concurrent", "1"]) == 130
    said = capfd.readouterr().err
    assert "its working copy is" in said
    assert "MLflow's SQLite store cannot lie there" in said
    assert f"results: {URI}" in said
    played.stop_after = None
    on("b")
    assert main([*SEARCH, URI, "--trials", "6", "--concurrent", "1"]) == 0
    uids = [uid for uid, _ in played.runs]
    assert len(uids) == len(set(uids)) == 6 + 3 * 3  # trials; the best, and two controls, with three seeds
    assert "checkpoints" not in " ".join(STORE.listing())
    capfd.readouterr()

    on("c")
    assert main(["compare", "sparse-lenet-digits", "--results", URI, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["studies"][0]["trials"] == 6
    assert main(["report", "--results", URI, "--out", "pages"]) == 0
    assert (tmp_path / "pages" / "sparse-lenet-digits.html").exists()
    assert not (tmp_path / "fsspec+flaky:").exists()
    before = STORE.listing()
    assert main(["report", "nothing", "--results", URI]) == 2
    assert STORE.listing() == before


def test_workers_are_given_checkpoints_on_the_store(
    on: Callable[[str], None], stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []
    played = stage(lambda _: 0.5)
    begin = played.play

    def play(source: Any, **options: Any) -> str:
        following = source.next
        monkeypatch.setattr(source, "next", lambda: seen(following()))
        return begin(source, **options)

    def seen(task: Any) -> Any:
        if isinstance(task, Task):
            given.append(task.options["checkpoint"])
            STORE.put(task.options["checkpoint"].removeprefix(f"{URI}/"), b"")
        return task

    monkeypatch.setattr("bench.engine.run", play)
    monkeypatch.setattr("bench.present.study_link", lambda *_: None)
    on("a")
    assert main([*SEARCH, URI, "--trials", "2"]) == 0
    assert f"{URI}/sparse-lenet-digits/checkpoints/sparse-lenet-digits-0000.pt" in given
    assert len(given) == 2 + 9
    assert not [name for name in STORE.listing() if name.endswith(".pt")]  # removed, each after its run


@pytest.mark.parametrize("verb", [SEARCH[:-1], ["report"], ["compare", "x"], ["ui"], ["train", "--rule", "backprop"]])
def test_every_verb_refuses_a_store_that_is_none(
    verb: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*verb, "--results", "s4://b/x"]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "write s3://BUCKET/PATH" in said
    assert list(tmp_path.iterdir()) == []


def test_a_network_to_be_measured_as_it_is_must_be_here(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["robustness", "--checkpoint", "s3://b/x.pt"]) == 2
    assert "s3://b/x.pt: that must be a file on this machine; download it first; see" in capfd.readouterr().err


@pytest.mark.slow
def test_networks_are_trained_to_the_store_and_measured_from_it(on: Callable[[str], None], said: list[str]) -> None:
    """By workers that share nothing but the store; afterwards they are removed there."""
    on("a")
    config = TrialConfig(rule="backprop", arch="lenet", epochs=1)
    rules = {"backprop": config.to_dict()}
    wanted = RobustnessConfig(name="m", rules=rules, levels={"weight": (0.2, 0.5)}, seeds=2, draws=1)
    with working_copy(URI, "writes", say=said.append) as copy:
        options = Options(results=copy.folder, store=URI, device="cpu")
        ready = prepare_measurement(wanted, options)
        rows = RowFile(copy.folder / "m" / "rows.jsonl")
        source = Robustness(ready, Silent(), rows)  # type: ignore[arg-type]
        kept: set[str] = set()
        while isinstance(task := source.next(), Task):
            source.started(task.uid)
            source.completed(task.uid, run_probe(task.config, **task.options))
            kept |= {name for name in STORE.listing() if name.endswith(".pt")}
        assert kept == {f"m/networks/{network.uid}.pt" for network in ready.plan.networks}
        assert {row["status"] for row in rows.read()} == {"finished"}
        assert len(rows.read()) == 2 + 2 * 3
        assert source.repeated() == []  # each was trained once, and measured as it was
        assert not list(copy.folder.rglob("*.pt"))
        source.remove_networks()
    assert not [name for name in STORE.listing() if name.endswith(".pt")]


def test_the_doctor_tries_a_store_out(on: Callable[[str], None]) -> None:
    on("a")
    assert check_store(URI).status == "ok"
    assert STORE.listing() == {}
    Flaky.fault = staticmethod(away)
    found = check_store(URI)
    assert (found.status, "connection refused" in found.detail) == ("fail", True)
    assert found.remedy.startswith("check its address")
