"""Results at a URI: machines in turn, outages, kills, whole commands; checkpoints there; and the real S3 protocol."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import remote_results
from bench.checkpoint import checkpoint_file, read_checkpoint, remove_checkpoint, sweep_checkpoints
from bench.cli import main
from bench.config import TrialConfig, UserError
from bench.director import Task
from bench.doctor import check_store
from bench.place import Options
from bench.probe import run_probe
from bench.remote_results import RemoteAwayError, RemotePath, is_uri, local_folder, settle, working_folder, write_later
from bench.robustness import Robustness, prepare_measurement
from bench.robustness_plan import RobustnessConfig
from bench.rows import RowFile
from bench.trial import run_trial
from rehearsal import Silent, Stage, stage

__all__ = ["stage"]  # a fixture

ROW, NEXT = '{"uid": "s-c1", "kind": "confirm"}\n', '{"uid": "s-c2", "kind": "confirm"}\n'

On = Callable[[str], None]


@pytest.fixture
def on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> On:
    """Work on this machine from now on."""
    return lambda name: monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))


@pytest.fixture(autouse=True)
def _quick(on: On, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_results, "PERIOD", 0.01)
    on("a")


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"file://{tmp_path}/lab"


@pytest.fixture
def said() -> list[str]:
    return []


class Away:
    """An outage, which can end: nothing can be written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch, self.tried = monkeypatch, 0
        self._real = RemotePath.write

    def begin(self) -> None:
        def refuse(path: RemotePath, _: Any) -> None:
            self.tried += 1
            raise RemoteAwayError(f"{path}: connection refused: check the network.")

        self._patch.setattr(RemotePath, "write", refuse)

    def end(self) -> None:
        self._patch.setattr(RemotePath, "write", self._real)


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Away:
    return Away(monkeypatch)


def until(true: Callable[[], Any], seconds: float = 20.0) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "it does not come about"
        time.sleep(0.01)


def append(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a") as file:
        file.write(text)


def there(uri: str, name: str = "s/rows.jsonl") -> str:
    return ((RemotePath(uri) / name).read() or b"").decode()


def names(uri: str) -> set[str]:
    return {name for name in RemotePath(uri).files() if name != ".bench-upload"}


def work(
    uri: str,
    text: str = "",
    name: str = "s/rows.jsonl",
    *,
    before: Callable[[], Any] = lambda: None,
    after: Callable[[], Any] = lambda: None,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """A command that appends to a file."""
    with working_folder(uri, writes=True, say=say) as results:
        before()
        append(results.folder, name, text)
        after()


def read(uri: str, name: str = "s/rows.jsonl") -> str:
    """A command that reads a file."""
    with working_folder(uri, writes=False) as results:
        return (results.folder / name).read_text()


def raises(error: BaseException) -> None:
    raise error


# --- files on a store ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_what_is_written_is_listed_read_replaced_and_deleted(kind: str, uri: str, tmp_path: Path) -> None:
    folder = RemotePath(uri if kind == "file" else f"fsspec+memory://{tmp_path.name}/x")
    assert folder.files() == {}
    for name, data in (("s/x.pt", b"one\n"), ("s/x.pt.1", b""), ("s/x.ptx", b""), ("s/x.pt", memoryview(b"two"))):
        (folder / name).write(data)
    assert (folder / "s/x.pt").read() == b"two"
    assert {name: size for name, (size, _) in folder.files().items()} == {"s/x.pt": 3, "s/x.pt.1": 0, "s/x.ptx": 0}
    (folder / "s/x.pt").delete()
    (folder / "s/x.pt").delete()
    assert set(folder.files()) == {"s/x.ptx"}
    assert (folder / "s/x.pt").read() is None
    assert not (folder / "s").exists()


def test_a_uri_is_told_from_a_path_and_keeps_its_options_at_its_end() -> None:
    assert [is_uri(text) for text in ("s3://b/lab", "s3:/b", "file:///x", "fsspec+memory://x")] == [True] * 4
    assert not any(map(is_uri, ("results", "/data/s3", "../a:b/c", "c:/x")))
    assert (RemotePath("s3://b/lab/?scheme=http") / "s/x.pt").uri == "s3://b/lab/s/x.pt?scheme=http"
    assert str(checkpoint_file("s3://b/x.pt?scheme=http", 2)) == "s3://b/x.pt.2?scheme=http"
    assert local_folder("s3://b/lab") == local_folder("s3://b/lab/") != local_folder("s3://b/lab?scheme=http")


@pytest.mark.parametrize(
    ("uri", "remedy"),
    [
        ("nosuch://x/y", "write s3://BUCKET/PATH"),
        ("s3:/lab", "write s3://BUCKET/PATH"),
        ("file:///", "names no bucket"),
        ("fsspec+nosuch://x", "write s3://BUCKET/PATH"),
        ("s3://key:secret@lab/x", "set it in the environment"),
    ],
)
def test_a_uri_that_cannot_work_is_refused_in_one_line(uri: str, remedy: str) -> None:
    with pytest.raises(UserError, match=remedy) as raised, working_folder(uri, writes=True):
        pass
    assert not isinstance(raised.value, RemoteAwayError)
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)


def test_where_no_folder_can_be_kept(tmp_path: Path, uri: str, on: On) -> None:
    (tmp_path / "file").write_text("")
    on("file")
    with pytest.raises(UserError, match="XDG_CACHE_HOME"), working_folder(uri, writes=True):
        pass


# --- one machine after the other -------------------------------------------------------------------------


def test_what_changes_is_uploaded_while_work_goes_on_and_downloaded_elsewhere(
    uri: str, on: On, said: list[str]
) -> None:
    with working_folder(uri, writes=True, say=said.append) as results:
        for local in (
            "s/lock",
            "s/ray.log",
            "s/x.yaml.tmp",
            "s/checkpoints/x.pt",
            "mlartifacts/x",
            "mlflow.db",
            ".x/y",
        ):
            append(results.folder, local, "stays here")
        append(results.folder, "s/rows.jsonl", ROW)
        until(lambda: there(uri) == ROW)
        append(results.folder, "s/rows.jsonl", NEXT)
        until(lambda: there(uri) == ROW + NEXT)
        append(results.folder, "networks/deep/best.yaml", "at the end")
    assert names(uri) == {"s/rows.jsonl", "networks/deep/best.yaml"}
    assert said == [f"{uri}: this machine works in {results.folder}.", f"results: {uri}"]
    on("b")
    with working_folder(uri, writes=False, say=said.append) as results:
        assert (results.folder / "networks/deep/best.yaml").read_text() == "at the end"
    work(uri, NEXT)
    on("a")
    with working_folder(uri, writes=False) as results:
        assert (results.folder / "s/rows.jsonl").read_text() == ROW + NEXT + NEXT
        assert (results.folder / "s/ray.log").exists()
    assert len(said) == 2


@pytest.mark.parametrize("end", [UserError, KeyboardInterrupt, SystemExit])
def test_all_is_uploaded_however_the_command_ends(
    end: type[BaseException], uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_results, "PERIOD", 60.0)
    with pytest.raises(end):
        work(uri, ROW, after=lambda: raises(end("as told")))
    assert there(uri) == ROW


def test_what_others_put_there_is_downloaded(uri: str) -> None:
    """By an older bench, or by hand: without a mark."""
    (RemotePath(uri) / "s/rows.jsonl").write(ROW.encode())
    work(uri, NEXT)
    assert there(uri) == ROW + NEXT


def test_what_was_tidied_away_here_is_downloaded_again(uri: str) -> None:
    work(uri, ROW)
    (local_folder(uri) / "s/rows.jsonl").unlink()
    work(uri, NEXT)
    assert there(uri) == ROW + NEXT


# --- outages ---------------------------------------------------------------------------------------------


def test_an_outage_is_said_once_and_retried(uri: str, said: list[str], away: Away) -> None:
    with working_folder(uri, writes=True, say=said.append) as results:
        away.begin()
        append(results.folder, "s/rows.jsonl", ROW)
        until(lambda: away.tried > 3)
        away.end()
        until(lambda: there(uri) == ROW)
    assert len(said) == 3
    assert "connection refused" in said[1]
    assert f"The run goes on in {results.folder}, and uploads are tried again." in said[1]


def test_a_store_that_stands_still_does_not_hold_the_run_up(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on, write = threading.Event(), RemotePath.write
    with working_folder(uri, writes=True) as results:
        monkeypatch.setattr(RemotePath, "write", lambda path, data: goes_on.wait(30) and write(path, data))
        began = time.monotonic()
        append(results.folder, "s/rows.jsonl", ROW)
        time.sleep(0.1)
        append(results.folder, "s/rows.jsonl", NEXT)
        assert time.monotonic() - began < 5
        assert there(uri) == ""
        goes_on.set()
    assert there(uri) == ROW + NEXT


def test_an_end_without_upload_is_an_error_that_names_the_folder_and_the_next_start_goes_on(
    uri: str, said: list[str], away: Away
) -> None:
    with pytest.raises(UserError, match="not everything is uploaded") as raised:
        work(uri, ROW, before=away.begin, say=said.append)
    folder = local_folder(uri)
    assert str(raised.value).endswith(f"connection refused: check the network); all results are in {folder}.")
    assert read(uri) == ROW
    away.end()
    work(uri, NEXT)
    assert there(uri) == ROW + NEXT


def test_an_error_of_the_run_is_not_hidden_by_that_of_the_upload(uri: str, said: list[str], away: Away) -> None:
    with pytest.raises(KeyboardInterrupt):
        work(uri, ROW, before=away.begin, after=lambda: raises(KeyboardInterrupt()), say=said.append)
    assert said[-1].startswith(f"not everything is uploaded to {uri} (")
    assert said[-1].endswith(f"all results are in {local_folder(uri)}.")


def test_a_start_that_cannot_write_there_is_refused(uri: str, said: list[str], away: Away) -> None:
    away.begin()
    with pytest.raises(UserError, match="connection refused"):
        work(uri, ROW, say=said.append)
    with working_folder(uri, writes=False, say=said.append):  # that is enough for a report
        pass
    assert said == []


def test_rows_that_a_broken_upload_sent_without_their_journal_are_dropped_elsewhere(uri: str, on: On) -> None:
    known, lost = (f'{{"uid": "s-000{n}", "kind": "search"}}\n' for n in (0, 1))
    with working_folder(uri, writes=True) as results:
        append(results.folder, "s/rows.jsonl", known + lost)
        append(results.folder, "s/journal.log", '{"uid": "s-0000"}\n')
    on("b")
    assert read(uri) == known
    work(uri, lost)  # run again there
    assert there(uri) == known + lost


# --- two at once -----------------------------------------------------------------------------------------


def test_a_copy_made_during_an_upload_is_not_taken_for_the_whole(
    uri: str, on: On, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RemotePath.write

    def write(path: RemotePath, data: Any) -> None:
        if path.uri.endswith("rows.jsonl"):  # the mark is there, and these are not yet
            monkeypatch.setattr(RemotePath, "write", real)
            on("b")
            with working_folder(uri, writes=False) as results:
                assert not (results.folder / "s/rows.jsonl").exists()
            on("a")
        real(path, data)

    monkeypatch.setattr(RemotePath, "write", write)
    work(uri, ROW)
    on("b")
    assert read(uri) == ROW


def test_what_another_machine_wrote_meanwhile_is_not_overwritten(uri: str, on: On, said: list[str]) -> None:
    def another() -> None:
        on("b")
        work(uri, NEXT)
        on("a")

    work(uri, ROW)
    with pytest.raises(UserError, match="written by another machine") as raised:
        work(uri, ROW, before=another, after=lambda: until(lambda: len(said) == 2), say=said.append)
    folder = local_folder(uri)
    assert str(folder) in str(raised.value)
    assert "written by another machine" in said[1]
    assert there(uri) == ROW + NEXT
    for command in (work, read):
        with pytest.raises(UserError, match=r"move that folder away .* --results FOLDER") as raised:
            command(uri)
        assert "\n" not in str(raised.value)
    assert (folder / "s/rows.jsonl").read_text() == ROW + ROW
    folder.rename(folder.with_name("away"))
    work(uri, ROW)
    assert there(uri) == ROW + NEXT + ROW


def test_a_uri_that_was_emptied_takes_nothing_from_here(uri: str, tmp_path: Path) -> None:
    work(uri, ROW)
    (tmp_path / "lab").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"has lost its \.bench-upload"):
        work(uri)
    assert (local_folder(uri) / "s/rows.jsonl").read_text() == ROW


def test_of_two_commands_on_one_machine_the_second_may_only_read(uri: str) -> None:
    with working_folder(uri, writes=True) as first:
        append(first.folder, "s/rows.jsonl", ROW)
        with pytest.raises(UserError, match="another bench on this machine works with"):
            work(uri, NEXT)
        with working_folder(uri, writes=False) as reader:
            assert (reader.folder / "s/rows.jsonl").read_text() == ROW
    work(uri, NEXT)
    assert there(uri) == ROW + NEXT


# --- killed ----------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What a process that is killed does not survive."""


def killed_at(name: str, what: str) -> pytest.MonkeyPatch:
    """Reading or writing this file at the URI is where the process is killed."""
    real, patch = getattr(RemotePath, what), pytest.MonkeyPatch()

    def killed(path: RemotePath, *data: Any) -> Any:
        if path.uri.endswith(name):
            raise Killed
        return real(path, *data)

    patch.setattr(RemotePath, what, killed)
    return patch


def test_after_a_kill_during_an_upload_the_same_machine_goes_on(uri: str) -> None:
    work(uri, ROW)
    append(local_folder(uri), "s/rows.jsonl", NEXT)
    for _ in range(2):
        patch = killed_at("rows.jsonl", "write")
        with pytest.raises(Killed):
            remote_results.RemoteResults(uri, print).upload()
        patch.undo()
    assert there(uri) == ROW
    work(uri)
    assert there(uri) == ROW + NEXT


def test_a_download_that_was_cut_off_goes_on(uri: str, on: On) -> None:
    work(uri, ROW)
    work(uri, "x", "s/study.yaml")
    on("b")
    patch = killed_at("study.yaml", "read")
    with pytest.raises(Killed):
        read(uri)
    patch.undo()
    work(uri, NEXT)
    assert there(uri) == ROW + NEXT


WRITER = """
import json, sys, time
from bench import remote_results
remote_results.PERIOD = 0.005
def append(name, line):
    with (folder / name).open("a") as file:
        file.write(json.dumps(line) + "\\n")
with remote_results.working_folder(sys.argv[1], writes=True) as results:
    folder = results.folder / "s"
    folder.mkdir(exist_ok=True)
    rows = folder / "rows.jsonl"
    begin = rows.read_text().count("\\n") if rows.exists() else 0
    for number in range(begin, 10**6):
        append("journal.log", {"ask": number})
        time.sleep(0.002)
        append("rows.jsonl", {"uid": number})
        append("journal.log", {"tell": number})
        print(number, flush=True)
"""


def whole(path: Path) -> list[dict[str, int]]:
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def test_killed_at_any_moment_this_machine_loses_nothing_and_another_has_the_rows_of_what_ended(
    uri: str, on: On
) -> None:
    made = 0
    for kill in range(3):
        with subprocess.Popen([sys.executable, "-c", WRITER, uri], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(20 + 7 * kill):
                assert writer.stdout.readline()
            writer.send_signal(signal.SIGKILL)
        rows = whole(local_folder(uri) / "s/rows.jsonl")
        assert [row["uid"] for row in rows] == list(range(len(rows)))
        assert len(rows) >= made + 20
        made = len(rows)
        on(f"other-{kill}")
        with working_folder(uri, writes=False) as results:
            known = {row["uid"] for row in whole(results.folder / "s/rows.jsonl")}
            told = {line["tell"] for line in whole(results.folder / "s/journal.log") if "tell" in line}
        assert told <= known
        assert known
        on("a")
    work(uri)
    assert len(there(uri).splitlines()) == made


# --- checkpoints -----------------------------------------------------------------------------------------


def test_of_states_that_wait_only_the_last_is_written_and_what_fails_is_logged(
    uri: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], away: Away
) -> None:
    goes_on, write, written = threading.Event(), RemotePath.write, list[bytes]()

    def slow(path: RemotePath, data: bytes) -> None:
        goes_on.wait(30)
        written.append(data)
        write(path, data)

    monkeypatch.setattr(RemotePath, "write", slow)
    file = RemotePath(uri) / "x.pt"
    for epoch in range(1, 6):
        write_later(file, str(epoch).encode(), f"epoch {epoch}")
    monkeypatch.setattr(remote_results, "PATIENCE", 0.05)
    settle()
    assert "takes longer than" in capfd.readouterr().err
    write_later(file, b"6", "epoch 6")
    goes_on.set()
    monkeypatch.setattr(remote_results, "PATIENCE", 30.0)
    settle()
    assert written[-1] == b"6" == file.read()
    assert len(written) <= 2
    away.begin()
    write_later(file, b"7", "epoch 7")
    settle()
    assert "epoch 7 is not saved: " in capfd.readouterr().err
    assert file.read() == b"6"


def test_the_end_of_a_process_waits_for_no_store(uri: str) -> None:
    code = "import sys, time; from bench.remote_results import *; RemotePath.write = lambda *_: time.sleep(60)"
    code += "; write_later(RemotePath(sys.argv[1]), b'', 'x')"
    subprocess.run([sys.executable, "-c", code, uri], check=True, timeout=30)


def test_checkpoints_of_runs_that_are_over_are_removed(uri: str) -> None:
    folder = RemotePath(uri)
    for name in ("s-1.pt", "s-1.pt.1", "s-1.pt.part", "s-10.pt", "s-2.pt", "s-3.pt"):
        (folder / name).write(b"")
    remove_checkpoint(folder / "s-1.pt")
    sweep_checkpoints(folder, lambda uid: uid == "s-2")
    settle()
    assert names(uri) == {"s-10.pt", "s-3.pt"}


# --- whole commands --------------------------------------------------------------------------------------

SEARCH = ["search", "--rule", "sparse", "--arch", "lenet", "--epochs", "2", "--sampler", "random"]


@pytest.fixture
def played(stage: Callable[..., Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bench.present.study_link", lambda *_: None)  # on the stage there is no MLflow
    return stage(lambda _: 0.5)


@pytest.mark.slow
def test_a_search_goes_on_from_an_empty_machine_and_reports_are_read_from_the_store(
    uri: str, on: On, played: Stage, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [*SEARCH, "--results", uri, "--trials", "6", "--concurrent", "1"]
    played.stop_after = 3
    assert main(command) == 130
    err = capfd.readouterr().err
    assert "MLflow's SQLite store cannot lie there" in err
    assert f"results: {uri}" in err
    played.stop_after = None
    on("b")
    assert main(command) == 0
    uids = [uid for uid, _ in played.runs]
    assert len(uids) == len(set(uids)) == 6 + 3 * 3  # trials; the best, and two controls, with three seeds
    assert "checkpoints" not in " ".join(names(uri))
    capfd.readouterr()
    on("c")
    assert main(["compare", "sparse-lenet-digits", "--results", uri, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["studies"][0]["trials"] == 6
    before = RemotePath(uri).files()
    assert main(["report", "--results", uri, "--out", "pages"]) == 0
    assert (tmp_path / "pages/sparse-lenet-digits.html").exists()
    assert main(["report", "nothing", "--results", uri]) == 2
    assert RemotePath(uri).files() == before


def test_workers_are_given_checkpoints_on_the_store_and_a_failed_upload_is_a_failed_command(
    uri: str, played: Stage, away: Away, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given: list[str] = []
    begin = played.play

    def play(source: Any, **options: Any) -> str:
        following = source.next
        monkeypatch.setattr(source, "next", lambda: seen(following()))
        return begin(source, **options)

    def seen(task: Any) -> Any:
        if isinstance(task, Task):
            given.append(task.options["checkpoint"])
            RemotePath(given[-1]).write(b"")
        return task

    monkeypatch.setattr("bench.engine.run", play)
    command = [*SEARCH, "--results", uri, "--trials"]
    assert main([*command, "2"]) == 0
    assert f"{uri}/sparse-lenet-digits/checkpoints/sparse-lenet-digits-0000.pt" in given
    assert len(given) == 2 + 9
    assert not [name for name in names(uri) if name.endswith(".pt")]  # removed, each after its run
    monkeypatch.setattr("bench.engine.run", lambda *a, **o: (away.begin(), begin(*a, **o))[1])
    capfd.readouterr()
    assert main([*command, "3", "--name", "other"]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("bench: not everything is uploaded")
    assert last.endswith(f"all results are in {local_folder(uri)}.")


@pytest.mark.parametrize("verb", [SEARCH, ["report"], ["compare", "x"], ["ui"], ["train", "--rule", "backprop"]])
def test_every_verb_refuses_a_store_that_is_none(
    verb: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main([*verb, "--results", "s4://b/x"]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "write s3://BUCKET/PATH" in said
    assert list((tmp_path / "here").iterdir()) == []


def test_a_network_to_be_measured_as_it_is_must_be_here(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["robustness", "--checkpoint", "s3://b/x.pt"]) == 2
    assert "s3://b/x.pt: that must be a file on this machine; download it first; see" in capfd.readouterr().err


@pytest.mark.slow
def test_networks_are_trained_to_the_store_and_measured_from_it(uri: str) -> None:
    """By workers that share nothing but the store; afterwards they are removed there."""
    rules = {"backprop": TrialConfig(rule="backprop", arch="lenet", epochs=1).to_dict()}
    wanted = RobustnessConfig(name="m", rules=rules, levels={"weight": (0.2, 0.5)}, seeds=2, draws=1)
    with working_folder(uri, writes=True) as results:
        ready = prepare_measurement(wanted, Options(results=results.folder, store=uri, device="cpu"))
        rows = RowFile(results.folder / "m" / "rows.jsonl")
        source = Robustness(ready, Silent(), rows)  # type: ignore[arg-type]
        kept: set[str] = set()
        while isinstance(task := source.next(), Task):
            source.started(task.uid)
            source.completed(task.uid, run_probe(task.config, **task.options))
            kept |= {name for name in names(uri) if name.endswith(".pt")}
        assert kept == {f"m/networks/{network.uid}.pt" for network in ready.plan.networks}
        assert {row["status"] for row in rows.read()} == {"finished"}
        assert len(rows.read()) == 2 + 2 * 3
        assert source.repeated() == []  # each was trained once, and measured as it was
        assert not list(results.folder.rglob("*.pt"))
        source.remove_networks()
    assert not [name for name in names(uri) if name.endswith(".pt")]


def test_the_doctor_tries_a_store_out(uri: str, away: Away) -> None:
    assert check_store(uri).status == "ok"
    assert names(uri) == set()
    away.begin()
    found = check_store(uri)
    assert (found.status, "connection refused" in found.detail) == ("fail", True)
    assert found.remedy == "check the network"


# --- the protocol of S3, spoken by a server of its own process -------------------------------------------

SERVER = """
import time
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
while True:
    time.sleep(60)
"""


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of a folder in a new bucket."""
    from pyarrow import fs

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    command = [sys.executable, "-W", "ignore", "-c", SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        options = f"?endpoint_override=127.0.0.1:{int(process.stdout.readline())}&scheme=http&region=us-east-1"
        made, _ = fs.FileSystem.from_uri(f"s3://lab{options}&allow_bucket_creation=true")
        made.create_dir("lab")
        yield f"s3://lab/x{options}"
        process.kill()


CONFIG = TrialConfig(rule="symmetric", arch="lenet", epochs=2, coefficients={"decay": 1e-3, "self": 1e-3})


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint_on_s3_and_trains_where_that_is_away(
    s3: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = RemotePath(s3) / "s/checkpoints/s-0001.pt"
    uninterrupted = run_trial(CONFIG, device="cpu")

    def ends(epoch: int, _: object) -> None:
        if epoch == 1:
            raise Killed

    with pytest.raises(Killed):
        run_trial(CONFIG, ends, device="cpu", checkpoint=path.uri)
    assert read_checkpoint(path)["epoch"] == 1
    again = run_trial(CONFIG, device="cpu", checkpoint=path.uri)
    assert again.history[0] == read_checkpoint(path)["history"][0]
    for name in ("val_acc", "val_loss", "angle"):
        assert again.metrics[name] == uninterrupted.metrics[name]
    with pytest.raises(UserError, match="another configuration"):
        run_trial(CONFIG.replace(seed=1), device="cpu", checkpoint=path.uri)
    path.write(b"no checkpoint" + bytes(21 * 2**20))  # in parts
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        read_checkpoint(path)
    remove_checkpoint(path)
    settle()
    assert RemotePath(s3).files() == {}
    with pytest.raises(UserError, match="there is no checkpoint"):
        read_checkpoint(path)
    with pytest.raises(UserError, match="make the bucket first"):
        run_trial(CONFIG, device="cpu", checkpoint=path.uri.replace("//lab", "//nobucket"))
    assert capfd.readouterr().err == ""
    port = s3.partition("127.0.0.1:")[2].partition("&")[0]
    nobody = path.uri.replace(port, "1")
    assert run_trial(CONFIG.replace(epochs=1), device="cpu", checkpoint=nobody).status == "finished"
    begins, saves = capfd.readouterr().err.splitlines()
    assert "so it begins anew" in begins
    assert "epoch 1 of this run is not saved" in saves
    began = time.monotonic()
    with pytest.raises(RemoteAwayError, match="check its address"), working_folder(nobody, writes=True):
        pass
    assert time.monotonic() - began < 30  # not the minutes for which some clients try


@pytest.mark.faults
def test_a_killed_search_goes_on_from_s3_on_another_machine(s3: str, tmp_path: Path) -> None:
    """Real Ray, MLflow and S3: what was uploaded is not run again, and every trial ends once."""
    trials = 4
    command = [sys.executable, "-c", "import sys; from bench import cli, remote_results"]
    command[-1] += "; remote_results.PERIOD = 0.5; sys.exit(cli.main())"
    command += ["search", "--rule", "sparse", "--arch", "lenet", "--json", "--trials", str(trials), "--epochs", "3"]
    command += ["--confirm-seeds", "1", "--concurrent", "2", "--sampler", "random", "--scheduler", "none"]
    command += ["--results", s3, "--name", "s"]

    def started(home: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / home)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def rows() -> list[dict[str, Any]]:
        return [json.loads(line) for line in there(s3).splitlines()]

    first = started("a")
    try:
        until(lambda: rows() or first.poll() is not None, 600)
        assert first.poll() is None, first.communicate()[1]
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
    known = {row["uid"]: row for row in rows()}
    assert 0 < len(known) < trials + 1
    second = started("b")
    out, err = second.communicate(timeout=900)
    assert second.returncode == 0, err
    assert f"results: {s3}" in err
    done = rows()
    assert sorted(row["uid"] for row in done if row["kind"] == "search") == [f"s-{n:04d}" for n in range(trials)]
    assert all(known[row["uid"]] == row for row in done if row["uid"] in known)
    assert json.loads(out)["trials"]["finished"] == trials
    assert not [name for name in names(s3) if name.endswith((".pt", ".part"))]
