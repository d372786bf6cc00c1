"""Checkpoints with a fault in them: nothing in a file is run, and what does not fit is refused in one line."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from bench.checkpoint import read_checkpoint
from bench.config import TrialConfig
from bench.training import prepare
from bench.trial import resume, run_trial
from malformed import ODD_VALUES, damaged, examples, files, refused_in_one_line, run, said_in_one_line

CONFIG = TrialConfig(
    rule="decay",
    arch="lenet",
    coefficients={"decay": 0.1},
    epochs=1,
    train_examples=32,
    val_fraction=0.02,
    batch_size=32,
    measure_alignment=False,
)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "net.pt"
    run_trial(CONFIG, checkpoint=str(path))
    return path


def saved(state: Any) -> bytes:
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


def use(content: bytes) -> None:
    """Go on from it, as `bench train` does; then measure it, if that was possible."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.pt"
        path.write_bytes(content)
        with refused_in_one_line():
            resume(prepare(CONFIG), path)
        assert files(Path(folder)) == {"net.pt": content}


def evaluate(content: bytes) -> tuple[int, str, str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.pt"
        path.write_bytes(content)
        status, out, err = run(["evaluate", str(path), "--json"])
        said_in_one_line(status, err)
        assert files(Path(folder)) == {"net.pt": content}
        return status, out, err


def test_the_whole_one_is_taken(kept: Path) -> None:
    use(kept.read_bytes())
    status, out, _ = evaluate(kept.read_bytes())
    assert status == 0
    assert json.loads(out)["epoch"] == 1


@examples(80)
@given(data=st.data())
def test_damaged_bytes_are_refused_or_whole(kept: Path, data: st.DataObject) -> None:
    """Most of the file is numbers, so the faults are put into what says how to read them."""
    whole = kept.read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as packed:
        name = next(name for name in packed.namelist() if name.endswith("data.pkl"))
        members = {each: packed.read(each) for each in packed.namelist()}
    if data.draw(st.booleans()):
        use(data.draw(damaged(whole)))
        return
    members[name] = data.draw(damaged(members[name]))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as packed:
        for each, content in members.items():
            packed.writestr(each, content)
    use(out.getvalue())


ODD_TENSORS = (
    *(torch.tensor(float("nan")), torch.zeros(0), torch.zeros(3, 3), torch.zeros(6, 1, 5, 5, dtype=torch.complex64)),
    *(
        torch.zeros(6, 1, 5, 5, dtype=torch.int64),
        torch.zeros(6, 1, 5, 5).to_sparse(),
        torch.full((6, 1, 5, 5), torch.inf),
    ),
    *(torch.zeros(6, 1, 5, 5, dtype=torch.bool), torch.zeros(6, 1, 5, 5, device="meta"), torch.zeros(10)),
)


@st.composite
def states(draw: Any) -> tuple[tuple[Any, ...], Any]:
    """A place in a checkpoint, and what stands there instead."""
    places = (
        *(("config",), ("config", "rule"), ("config", "epochs"), ("epoch",), ("history",), ("history", 0)),
        *(("history", 0, "val_acc"), ("model",), ("model", "conv1.weight"), ("model", "fc2.bias"), ("optimizer",)),
        *(("optimizer", "state"), ("optimizer", "state", 0), ("optimizer", "state", 0, "momentum_buffer")),
        *(("optimizer", "param_groups"), ("optimizer", "param_groups", 0), ("optimizer", "param_groups", 0, "lr")),
        *(("optimizer", "param_groups", 0, name) for name in ("params", "momentum", "full_lr", "fused", "name")),
    )
    return draw(st.sampled_from(places)), draw(st.sampled_from(ODD_TENSORS) | st.sampled_from(ODD_VALUES))


def put(state: Any, at: tuple[Any, ...], value: Any) -> None:
    for key in at[:-1]:
        state = state[key]
    state[at[-1]] = value


@examples(150)
@given(states(), st.booleans())
@example((("model", "conv1.weight"), torch.full((6, 1, 5, 5), torch.nan)), False)
@example((("epoch",), True), True)
def test_a_state_with_another_value_is_refused_or_measured(
    kept: Path, changed: tuple[tuple[Any, ...], Any], going_on: bool
) -> None:
    state = torch.load(kept, weights_only=True)
    put(state, *changed)
    (use if going_on else evaluate)(saved(state))


@pytest.mark.parametrize("place", ["conv1.weight", "fc2.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_a_divergence_in_one_line(kept: Path, place: str, value: float) -> None:
    state = torch.load(kept, weights_only=True)
    state["model"][place].fill_(value)
    status, _, err = evaluate(saved(state))
    assert status == 2
    assert "has diverged" in err


class Harm:
    """What runs when it is unpickled by a reader that trusts it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("how", ["torch", "pickle", "in the model"])
def test_a_file_that_means_harm_is_refused_and_does_none(kept: Path, how: str, tmp_path: Path) -> None:
    marker = tmp_path / "harmed"
    state = torch.load(kept, weights_only=True)
    if how == "in the model":
        state["model"]["conv1.weight"] = Harm(marker)
    content = pickle.dumps(Harm(marker)) if how == "pickle" else saved(state if how == "in the model" else Harm(marker))
    (tmp_path / "net.pt").write_bytes(content)
    for arguments in (
        ["evaluate", str(tmp_path / "net.pt")],
        ["robustness", "--checkpoint", str(tmp_path / "net.pt"), "--results", str(tmp_path / "results")],
        [
            "train",
            "--rule",
            "backprop",
            "--checkpoint",
            str(tmp_path / "net.pt"),
            "--results",
            str(tmp_path / "results"),
        ],
    ):
        status, _, err = run(arguments)
        said_in_one_line(status, err)
        assert status == 2
        assert not marker.exists()
    assert list(files(tmp_path)) == ["net.pt"]
    if how == "pickle":
        pickle.loads(content)
    else:
        torch.load(tmp_path / "net.pt", weights_only=False)
    assert marker.exists(), "it would have done none anyway"


@pytest.mark.parametrize("other", ["rule", "network", "folder", "circle", "text", "nothing"])
def test_a_checkpoint_of_something_else_is_refused(kept: Path, other: str, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    if other == "folder":
        path.mkdir()
    elif other == "circle":
        path.symlink_to(path)
    elif other in ("text", "nothing"):
        path.write_text("no checkpoint" if other == "text" else "")
    else:
        state = read_checkpoint(kept)
        state["config"] |= {"rule": "backprop", "coefficients": {}} if other == "rule" else {"arch": "resnet20"}
        torch.save(state, path)
    status, _, err = run(["evaluate", str(path)])
    assert status == (0 if other == "rule" else 2) or other == "rule"
    said_in_one_line(status, err)


def test_what_a_killed_writer_left_is_no_checkpoint(kept: Path, tmp_path: Path) -> None:
    shutil.copy(kept, tmp_path / "net.pt.123.new")
    status, _, err = run(["evaluate", str(tmp_path / "net.pt")])
    assert status == 2
    assert "there is no checkpoint" in err
