"""The real protocol of S3, spoken by a server of its own process: errors, checkpoints, outages, a killed search."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench import lease, mirror
from bench.checkpoint import checkpoint_file, read_checkpoint, remove_checkpoint
from bench.config import TrialConfig, UserError
from bench.mirror import working_copy
from bench.objects import ObjectFile, Store, remove_discarded
from bench.trial import run_trial

SERVER = """
import time
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
while True:
    time.sleep(60)
"""


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[str]
    port: int

    def uri(self, path: str) -> str:
        return f"s3://{path}?endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1"


@pytest.fixture(scope="module")
def s3() -> Iterator[Server]:
    """With one bucket, lab."""
    command = [sys.executable, "-W", "ignore", "-c", SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        server = Server(process, int(process.stdout.readline()))
        _make_bucket(server)
        yield server
        process.send_signal(signal.SIGCONT)
        process.kill()


def _make_bucket(server: Server) -> None:
    from pyarrow import fs

    made, _ = fs.FileSystem.from_uri(f"{server.uri('lab')}&allow_bucket_creation=true")
    made.create_dir("lab")


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a"))


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "it does not come about"
        time.sleep(0.05)


@pytest.mark.slow
def test_objects_of_all_sizes(s3: Server) -> None:
    store = Store(s3.uri("lab/sizes"))
    for size in (0, 1, 21 * 2**20):  # the last in parts
        data = os.urandom(size)
        store.put("deep/x", data)
        assert store.listing() == {"deep/x": store.version("deep/x")}
        assert hashlib.sha256(store.read("deep/x")).hexdigest() == hashlib.sha256(data).hexdigest()
    store.remove("deep/x")
    store.remove("deep/x")
    assert store.listing() == {}
    with pytest.raises(FileNotFoundError):
        store.read("deep/x")


@pytest.mark.slow
def test_what_cannot_work_is_refused_in_one_line_and_in_time(s3: Server, tmp_path: Path) -> None:
    nobody = s3.uri("lab/x").replace(str(s3.port), "1")
    for uri, said in ((s3.uri("nobucket/x"), "make the bucket first"), (nobody, "check its address")):
        began = time.monotonic()
        with pytest.raises(UserError, match=said) as raised, working_copy(uri, "writes"):
            pass
        assert "\n" not in str(raised.value)
        assert time.monotonic() - began < 30  # not the quarter of an hour for which some clients try
    assert list(tmp_path.glob("a/bench/results/*/s")) == []


CONFIG = TrialConfig(rule="symmetric", arch="lenet", epochs=2, coefficients={"decay": 1e-3, "self": 1e-3})


class Killed(BaseException):
    """What a process that is killed does not survive."""


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint_on_the_store_to_the_same_result(
    s3: Server, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_trial(CONFIG, device="cpu")
    uri = s3.uri("lab/s/checkpoints/s-0001.pt")

    def ends(epoch: int, _: object) -> None:
        if epoch == 1:
            raise Killed

    with pytest.raises(Killed):
        run_trial(CONFIG, ends, device="cpu", checkpoint=uri)
    assert read_checkpoint(checkpoint_file(uri))["epoch"] == 1
    trained: list[int] = []
    monkeypatch.setattr("bench.trial.train_epoch", lambda trial: trained.append(trial.epoch) or train(trial))
    from bench.training import train_epoch as train

    again = run_trial(CONFIG, device="cpu", checkpoint=uri)
    assert trained == [1]  # the second epoch alone
    for name in ("val_acc", "val_loss", "angle"):
        assert again.metrics[name] == whole.metrics[name]
    with pytest.raises(UserError, match="another configuration"):
        run_trial(CONFIG.replace(seed=1), device="cpu", checkpoint=uri)
    remove_checkpoint(ObjectFile(uri))
    remove_discarded()
    assert Store(s3.uri("lab/s")).listing() == {}
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_a_checkpoint_that_is_damaged_or_of_no_store_is_refused(s3: Server) -> None:
    Store(s3.uri("lab/s")).put("bad.pt", b"no checkpoint")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        read_checkpoint(checkpoint_file(s3.uri("lab/s/bad.pt")))
    with pytest.raises(UserError, match="there is no checkpoint"):
        read_checkpoint(checkpoint_file(s3.uri("lab/s/none.pt")))
    with pytest.raises(UserError, match="make the bucket first"):
        run_trial(CONFIG, device="cpu", checkpoint=s3.uri("nobucket/x.pt"))


@pytest.mark.slow
def test_a_run_whose_store_is_away_trains_and_says_so(s3: Server, capfd: pytest.CaptureFixture[str]) -> None:
    nobody = s3.uri("lab/x.pt").replace(str(s3.port), "1")
    result = run_trial(CONFIG.replace(epochs=1), device="cpu", checkpoint=nobody)
    assert result.status == "finished"
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2
    assert "so it begins anew" in said[0]
    assert "epoch 1 of this run is not saved" in said[1]


@pytest.mark.faults
def test_a_server_that_stands_still_holds_nothing_up(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "BEAT", 0.1)
    monkeypatch.setattr(mirror, "REST", 0.0)
    monkeypatch.setattr(lease, "SETTLE", 0.0)
    said: list[str] = []
    uri = s3.uri("lab/still")
    with working_copy(uri, "writes", say=said.append) as copy:
        (copy.folder / "s").mkdir()
        s3.process.send_signal(signal.SIGSTOP)
        try:
            began = time.monotonic()
            (copy.folder / "s" / "rows.jsonl").write_text('{"uid": "s-c1", "kind": "confirm"}\n')
            assert time.monotonic() - began < 1
            until(lambda: len(said) == 2, 300)  # a request is given up after 30 s, three times
        finally:
            s3.process.send_signal(signal.SIGCONT)
        assert "uploaded later" in said[1]
        until(lambda: len(said) == 3)
    assert said[-1] == f"results: {uri}"
    assert Store(uri).read("s/rows.jsonl").startswith(b'{"uid"')


@pytest.mark.faults
def test_a_killed_search_goes_on_from_an_empty_copy(s3: Server, tmp_path: Path) -> None:
    """Real Ray, MLflow and S3: what was uploaded is not run again, and every trial ends once."""
    uri, trials = s3.uri("lab/search"), 4
    command = [sys.executable, "-m", "bench.cli", "search", "--rule", "sparse", "--arch", "lenet", "--json"]
    command += ["--trials", str(trials), "--epochs", "3", "--confirm-seeds", "1", "--concurrent", "2"]
    command += ["--sampler", "random", "--scheduler", "none", "--results", uri, "--name", "s"]

    def started(home: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / home)}
        return subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )

    store = Store(uri)

    def rows(name: str) -> list[dict[str, object]]:
        return [json.loads(line) for line in store.read(name).splitlines()] if store.version(name) else []

    first = started("a")
    try:
        until(lambda: bool(rows("s/rows.jsonl")) or first.poll() is not None, 600)
        assert first.poll() is None, first.communicate()[1]
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
    known = {row["uid"]: row for row in rows("s/rows.jsonl")}
    assert 0 < len(known) < trials + 1
    store.remove(lease.NAME)  # as if its three minutes were over
    second = started("b")
    out, err = second.communicate(timeout=900)
    assert second.returncode == 0, err
    assert f"results: {uri}" in err
    done = rows("s/rows.jsonl")
    assert sorted(str(row["uid"]) for row in done if row["kind"] == "search") == [f"s-{n:04d}" for n in range(trials)]
    assert all(known[row["uid"]] == row for row in done if row["uid"] in known)
    assert json.loads(out)["trials"]["finished"] == trials
    assert not [name for name in store.listing() if name.endswith((".pt", ".part")) or name == lease.NAME]
