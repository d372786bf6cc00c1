"""Journals and rows with a fault in them: repaired and said, or refused in one line and left as they are."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution

from bench.config import StudyConfig, TrialConfig, TrialResult
from bench.files import read_yaml, write_yaml
from bench.journal import mend
from bench.rows import RowFile, row
from bench.study import Study
from malformed import damaged, examples, files, mutated, refused_in_one_line, run, said_in_one_line

PUBLISHED = Path(__file__).parents[2] / "results" / "published"
CONFIG = StudyConfig(name="s", rule="decay", arch="lenet", dataset="digits", trials=4, epochs=3, sampler="random")
SPACE = {"decay": FloatDistribution(1e-3, 1.0, log=True)}


# --- journals


def opened(folder: Path, said: list[str]) -> Study:
    return Study.open(folder, CONFIG, SPACE, say=said.append, chance=0.1)


def _journal() -> bytes:
    """Two finished trials, one under way."""
    with tempfile.TemporaryDirectory() as folder:
        with opened(Path(folder), []) as study:
            for i in range(3):
                asked = study.ask()
                assert asked is not None
                study.report(asked.uid, 1, 0.5)
                if i < 2:
                    trial = TrialConfig(rule="decay", coefficients={"decay": asked.params["decay"]})
                    study.tell(asked.uid, TrialResult(config=trial, status="finished", metrics={"val_acc": 0.5}))
        return (Path(folder) / "journal.log").read_bytes()


JOURNAL = _journal()
LINES = JOURNAL.splitlines(keepends=True)


def changed(operation: int, **values: Any) -> bytes:
    """The journal with other values in the first line of this operation of Optuna's."""
    at = next(i for i, line in enumerate(LINES) if json.loads(line)["op_code"] == operation)
    return b"".join([*LINES[:at], json.dumps({**json.loads(LINES[at]), **values}).encode() + b"\n", *LINES[at + 1 :]])


def ask_for_all(folder: Path, said: list[str]) -> None:
    with opened(folder, said) as study:
        uids = []
        while (asked := study.ask()) is not None:
            uids.append(asked.uid)
        assert len(uids) == len(set(uids)) <= CONFIG.trials
        study.counts()
        study.best(2)


def open_and_use(content: bytes) -> None:
    """Open a study with this journal, and ask for all its trials, each once; or it is refused, and as it was."""
    with tempfile.TemporaryDirectory() as name:
        folder, said, done = Path(name), list[str](), False
        (folder / "journal.log").write_bytes(content)
        with refused_in_one_line():
            ask_for_all(folder, said)
            done = True
        kept = (folder / "journal.log").read_bytes()
        if not done:
            assert kept == content or said, "a journal was changed, and nothing was said"
            assert content.startswith(kept)
        assert all(line.isprintable() for line in said)


@examples(120)
@given(damaged(JOURNAL))
@example(JOURNAL[:-1])
@example(JOURNAL + b"[" * 100_000 + b"\n")
@example(b"[" * 100_000 + b"\n" + JOURNAL)
@example(b"3\n")
@example(b'{"op_code": 99}\n' + JOURNAL)
@example(JOURNAL + b"{}\n")
@example(changed(4, state=1))  # complete, and without a time
@example(changed(6, values=[]))
def test_a_journal_with_damaged_bytes_is_opened_or_refused(content: bytes) -> None:
    open_and_use(content)


@examples(150)
@given(data=st.data())
def test_a_journal_with_a_wrong_value_is_opened_or_refused(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(LINES) - 1))
    bad = data.draw(mutated(json.loads(LINES[at])))
    open_and_use(b"".join([*LINES[:at], json.dumps(bad).encode() + b"\n", *LINES[at + 1 :]]))


@examples(150)
@given(st.integers(0, len(JOURNAL)), st.sampled_from((b"", b"\0\0\0", b'{"op', b"\xff\n", b"{]\n")))
def test_a_torn_end_costs_its_line_and_is_said(cut: int, tail: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, said = Path(folder) / "journal.log", list[str]()
        content = JOURNAL[:cut] + tail
        path.write_bytes(content)
        mend(path, said.append)
        whole = JOURNAL[: JOURNAL.rfind(b"\n", 0, cut) + 1]
        assert path.read_bytes() == whole
        assert len(said) == (content != whole)


# --- rows


def _rows() -> list[dict[str, Any]]:
    file = PUBLISHED / "transfer-resnet18-resnet50-digits" / "symmetric-resnet18-digits" / "rows.jsonl"
    found: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    for each in found:
        each["metrics"] = {k: v for k, v in each["metrics"].items() if "/" not in k}
        each["history"] = [{k: v for k, v in h.items() if "/" not in k} for h in each["history"]]
    return found


ROWS = _rows()
CONTENT = b"".join(json.dumps(each).encode() + b"\n" for each in ROWS[:3])
FRESH = row("fresh", "s", "search", TrialResult(config=TrialConfig(rule="decay"), status="finished"))


def read_and_append(content: bytes) -> None:
    """Read a file of rows, then append to it: no row twice, none lost, and nothing is changed where it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        path, said = Path(folder) / "rows.jsonl", list[str]()
        path.write_bytes(content)
        read, appended = None, False
        with refused_in_one_line():
            read = RowFile(path, say=said.append).read()
            uids = [each["uid"] for each in read]
            assert len(set(uids)) == len(uids)
        assert path.read_bytes() == content, "reading changed the file"
        with refused_in_one_line():
            RowFile(path, say=said.append).append(FRESH)
            appended = True
        if not appended:
            assert files(Path(folder)) == {"rows.jsonl": content}
            assert read is None or "fresh" in {each["uid"] for each in read}
            return
        assert read is not None, "what cannot be read was appended to"
        assert RowFile(path).read() == [*read, json.loads(json.dumps(FRESH))]
        kept = (Path(folder) / "rows.jsonl.torn").read_bytes()[:-1] if said else b""
        assert content.endswith(kept), "what was cut off is not kept"


@examples(150)
@given(damaged(CONTENT))
@example(CONTENT + b"[" * 100_000 + b"\n")
@example(b"[" * 100_000 + b"\n" + CONTENT)
@example(CONTENT + b'{"uid": "x"}\n')
@example(CONTENT.replace(b'"uid": "', b'"uid": "\\ud800'))
@example(CONTENT + b"\n")
def test_rows_with_damaged_bytes_are_read_or_refused(content: bytes) -> None:
    read_and_append(content)


@examples(150)
@given(data=st.data())
def test_rows_with_a_wrong_value_are_read_or_refused(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, 2))
    bad = data.draw(mutated(ROWS[at]))
    lines = [json.dumps(bad if i == at else each).encode() + b"\n" for i, each in enumerate(ROWS[:3])]
    read_and_append(b"".join(lines))


# --- what is made of them

STUDIES = {
    "search": (PUBLISHED / "transfer-resnet18-resnet50-digits", "symmetric-resnet18-digits"),
    "transfer": (PUBLISHED / "transfer-resnet18-resnet50-digits", "transfer-resnet18-to-resnet50-digits"),
    "matrix": (PUBLISHED / "matrix-resnet18-digits", "matrix-resnet18-digits-normalized-centered"),
    "robustness": (PUBLISHED / "robustness-resnet18-digits", "robustness-resnet18-digits"),
    "confirmation": (PUBLISHED / "fractions", "fractions-mirror-lenet-fashion-mnist"),
}
#: Beside the study itself, and what its book is narrowed to.
SEARCHES = {
    "search": (),
    "transfer": ("symmetric-resnet18-digits", "symmetric-resnet50-digits"),
    "matrix": ("decay-resnet18-digits", "self-resnet18-digits", "symmetric-resnet18-digits"),
    "robustness": (),
    "confirmation": (),
}
NARROWED = {"transfer": {"rules": ["symmetric"]}, "matrix": {"primitives": ["decay", "self"], "any": False}}


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A part of the published results, so small that a page takes a moment."""
    found = {}
    for kind, (results, name) in STUDIES.items():
        found[kind] = tmp_path_factory.mktemp(kind) / "results"
        for part in {"controls", name, *SEARCHES[kind]}:
            if (results / part).exists():
                shutil.copytree(results / part, found[kind] / part)
        if kind in NARROWED:
            book = read_yaml(found[kind] / name / f"{kind}.yaml")
            write_yaml(found[kind] / name / f"{kind}.yaml", {**book, "config": {**book["config"], **NARROWED[kind]}})
        if kind == "confirmation":  # of one rule with several shares of a batch, as an earlier release trained it
            book = read_yaml(found[kind] / name / "fractions.yaml")
            (rule,) = book["config"]["rules"].values()
            shares = {f"share-{share}": {**rule, "feedback_fraction": share} for share in (1.0, 0.25, 0.125)}
            config = {"name": name, "configs": shares, "seeds": book["config"]["seeds"]}
            write_yaml(found[kind] / name / "confirmation.yaml", {**book, "config": config})
        for file in found[kind].glob("*/rows.jsonl"):
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            for each in lines:
                each["metrics"] = {k: v for k, v in each["metrics"].items() if "/" not in k}
                each["history"] = [{k: v for k, v in h.items() if "/" not in k} for h in each["history"]]
            file.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return found


def test_the_copies_are_whole(copies: dict[str, Path], tmp_path: Path) -> None:
    for kind, (_, name) in STUDIES.items():
        status, _, err = run(["report", name, "--results", str(copies[kind]), "--out", str(tmp_path)])
        assert (status, err) == (0, "")


def report_of(results: Path, name: str) -> None:
    """`bench report` and `bench compare`: a page, or one line; nothing of the results is changed."""
    with tempfile.TemporaryDirectory() as out:
        pages = Path(out) / "pages"
        status, _, err = run(["report", name, "--results", str(results), "--out", str(pages), "--json"])
        said_in_one_line(status, err)
        assert pages.exists() == (status == 0)
        assert {p.parent for p in Path(out).rglob("*.*")} <= {pages}, "written elsewhere"
        for form in ("--csv", "--latex"):
            status, _, err = run(["compare", name, "--results", str(results), form])
            said_in_one_line(status, err)


@pytest.mark.parametrize("kind", STUDIES)
@examples(12)
@given(data=st.data())
def test_a_report_of_rows_with_a_wrong_value(kind: str, copies: dict[str, Path], data: st.DataObject) -> None:
    results, name = copies[kind], STUDIES[kind][1]
    file = data.draw(st.sampled_from(sorted(results.glob("*/rows.jsonl"))))
    whole = file.read_text()
    lines = whole.splitlines()
    at = data.draw(st.integers(0, len(lines) - 1))
    lines[at] = json.dumps(data.draw(mutated(json.loads(lines[at]))))
    try:
        file.write_text("\n".join(lines) + "\n")
        report_of(results, name)
    finally:
        file.write_text(whole)


@pytest.mark.parametrize("kind", STUDIES)
@examples(12)
@given(data=st.data())
def test_a_report_of_a_book_with_a_wrong_value(kind: str, copies: dict[str, Path], data: st.DataObject) -> None:
    results, name = copies[kind], STUDIES[kind][1]
    books = [results / name / f"{kind}.yaml", *sorted(results.glob("*/study.yaml"))[:4]]
    file = data.draw(st.sampled_from([book for book in books if book.exists()]))
    whole = file.read_text()
    bad = data.draw(mutated(read_yaml(file)).filter(lambda value: isinstance(value, dict)))
    try:
        try:
            write_yaml(file, bad)
        except UnicodeEncodeError:  # half of a character is no text, in any file
            return
        report_of(results, name)
    finally:
        file.write_text(whole)


def test_a_study_in_a_copied_file_cannot_lead_out_of_the_folder_of_pages(tmp_path: Path) -> None:
    file = tmp_path / "copied.jsonl"
    file.write_text("".join(json.dumps({**each, "study": "../outside"}) + "\n" for each in ROWS))
    status, _, err = run(["report", str(file), "--out", str(tmp_path / "pages")])
    assert status == 2
    assert "study must match pattern" in err
    assert list(files(tmp_path)) == ["copied.jsonl"]
