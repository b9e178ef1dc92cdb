"""A copy is what the source has, checked, or says that it is not: manifests that change, listings cut short."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.store import Store, StoreError, TaskTable
from pipeline.store.files.local import Files
from pipeline.store.files.places import _remote
from pipeline.store.format.digest import digest_bytes
from pipeline.store.format.document import dump_document, load_document
from pipeline.store.upkeep.transfer import transfer
from tests.pipeline.test_errors import refused, run
from tests.store.helpers import key, sealed, space
from tests.store.test_places import NUMBERS, fill


def altered(data: bytes) -> bytes:
    """A manifest with sound digest and other sample keys: what it hands out would be another sample's states."""
    document = load_document(data, "manifest", "activation-segment")
    document["samples"]["keys"] = [digest_bytes(k.encode()) for k in document["samples"]["keys"]]
    return dump_document(document)


@pytest.mark.parametrize("end", ["on its way", "on the disk"])
def test_the_manifest_that_arrives_is_the_one_that_was_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    source = fill(tmp_path / "a")
    target = Store.create(tmp_path / "b" / "store")
    victim = source.spaces()[0].segments()[-1].id
    seen: list[str] = []
    read, publish = Files.read, Files.publish

    def read_again(self: Files, name: str, limit: int) -> bytes:
        data = read(self, name, limit)
        if victim in name and name.endswith("manifest.json") and self.root == source.where:
            seen.append(name)
            return altered(data) if len(seen) > 1 and end == "on its way" else data
        return data

    def publish_other(self: Files, name: str, data: bytes) -> None:
        wrong = victim in name and name.endswith("manifest.json") and end == "on the disk"
        publish(self, name, altered(data) if wrong else data)

    monkeypatch.setattr(Files, "read", read_again)
    monkeypatch.setattr(Files, "publish", publish_other)
    if end == "on the disk":
        with pytest.raises(StoreError, match="is not what was written there"):
            transfer(source, target)
    else:
        (problem,) = [p for p in transfer(source, target).problems if "manifest.json" in p]
        assert victim in problem and "its segment is left out" in problem
    (home,) = target.spaces()
    assert victim not in {s.id for s in home.segments()}
    assert home.stored().keys() <= {key(n) for n in NUMBERS}


@pytest.mark.parametrize("what", ["segment", "base", "table"])
def test_a_listing_that_lacks_what_others_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The page is whole, and a file is not on it."""
    source = fill(tmp_path / "a")
    (home,) = source.spaces()
    beside = {"train": 12, "validation": 3}
    for split, rows in beside.items():
        keys = [key(n) for n in NUMBERS[:rows]]
        home.save_table(TaskTable({"task": "sick", "split": split, "beside": beside}, keys, [0] * rows))
    segments = home.segments()
    hidden = {
        "segment": segments[-1].id,
        "base": segments[0].id,
        "table": next(t.path for t in home.tables() if t.split == "validation").rsplit("/", 1)[-1],
    }[what]
    names = Files.names
    monkeypatch.setattr(Files, "names", lambda self, folder: [n for n in names(self, folder) if n != hidden])
    said = transfer(source, Store.create(tmp_path / "b" / "store")).problems
    expected = {
        "segment": "no segment with 4 of the 12 samples",
        "base": f"but not its base {segments[0].id}",
        "table": "but not the table validation of 3 rows",
    }[what]
    assert any(expected in line for line in said) and all("\n" not in line for line in said)
    result = run("store", "pull", source.where, "--store", tmp_path / "c")
    assert result.exit_code == 1 and expected in result.stderr
    monkeypatch.undo()
    assert run("store", "pull", source.where, "--store", tmp_path / "c").exit_code == 0


class Cut(http.server.SimpleHTTPRequestHandler):
    """Lists folders without saying how long the page is, and stops in the middle of the one that ends in `cut`."""

    cut = ""

    def list_directory(self, path: Any) -> Any:
        file = super().list_directory(path)
        if file is not None and self.cut and str(path).rstrip("/").endswith(self.cut):
            data = file.read()
            file.seek(0)
            file.truncate()
            file.write(data[: data.rindex(b"<li>")])
            file.seek(0)
        return file

    def send_header(self, keyword: str, value: str) -> None:
        if keyword.lower() != "content-length" or not self.path.endswith("/"):
            super().send_header(keyword, value)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    fill(tmp_path / "a")
    monkeypatch.setenv("PIPELINE_CACHE_SIZE", "0")
    _remote.cache_clear()

    def handler(*args: Any) -> Cut:
        return Cut(*args, directory=str(tmp_path / "a" / "store"))

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("folder", ["segments", "rte", "spaces"])
def test_a_listing_that_breaks_off_is_not_a_shorter_one(
    tmp_path: Path, mirror: str, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.setattr("pipeline.store.files.remote.STRANGER_SECONDS", 0.0)
    monkeypatch.setattr("pipeline.store.files.remote._TRIES", 2)
    monkeypatch.setattr(Cut, "cut", folder)
    refused(run("store", "pull", mirror, "--store", tmp_path / "b"), "broke off", folder)
    monkeypatch.setattr(Cut, "cut", "")
    assert run("store", "pull", mirror, "--store", tmp_path / "b").exit_code == 0
    assert Store.open(tmp_path / "b").verify(deep=True) == []


def test_what_is_no_listing_is_not_an_empty_folder(
    tmp_path: Path, mirror: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as nginx with `autoindex_format json`."""

    def list_directory(self: Cut, path: Any) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'[{"name":"x"}]')

    monkeypatch.setattr(Cut, "list_directory", list_directory)
    refused(run("store", "pull", mirror, "--store", tmp_path / "b"), "application/json", "as HTML")


def test_names_that_need_quoting_are_listed(tmp_path: Path, mirror: str) -> None:
    home = space(tmp_path / "a", weights="ab" * 16)
    sealed(home, [50])
    home.save_table(TaskTable({"task": "a+b@c", "split": "train"}, [key(50)], [0]))
    (seen,) = Store.open(mirror).spaces()
    assert {t.task for t in seen.tables()} == {"rte", "a+b@c"} and seen.load_table("a+b@c", "train").keys == [key(50)]
