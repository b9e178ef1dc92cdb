"""Stores, feature spaces and their differences, task tables, weights."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.store import MissingStates, SpaceMismatch, Store, StoreError, TaskTable, weights
from pipeline.store.files.local import Files
from pipeline.store.format.digest import digest_bytes
from pipeline.store.format.document import dump_document
from pipeline.store.select import choose_space
from tests.store.helpers import IDENTITY, key, sealed, snapshot, space


def test_create_and_open(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "a" / "b")
    assert Store.create(tmp_path / "a" / "b").path == store.path == Store.open(tmp_path / "a" / "b").path
    assert store.spaces() == []
    assert Store.open(tmp_path / "c", create=True).path == tmp_path / "c"


def test_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no store at"):
        Store.open(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    for create in (False, True):
        with pytest.raises(StoreError, match="is a file, not a store"):
            Store.open(tmp_path / "file", create)
    with pytest.raises(StoreError, match=r"not a store \(it has no store.json\)"):
        Store.open(tmp_path)
    with pytest.raises(StoreError, match="not empty and not a store"):
        Store.create(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
    (tmp_path / "store.json").write_text("{}")
    with pytest.raises(StoreError, match="is not an activation store"):
        Store.open(tmp_path)


def test_newer_formats(tmp_path: Path) -> None:
    home = space(tmp_path)
    newer = home.path / "space.json"
    newer.write_text('{"kind": "activation-space", "format": 7, "sealed": "in another way"}')
    with pytest.raises(StoreError, match="of format 7, this version reads up to 1: install a newer version"):
        Store.open(tmp_path / "store").spaces()
    (tmp_path / "store" / "store.json").write_bytes(dump_document({"kind": "activation-store", "format": 2}))
    with pytest.raises(StoreError, match="of format 2"):
        Store.open(tmp_path / "store")
    with pytest.raises(StoreError, match="of format 3"):
        space(tmp_path / "other", format_version=3)


def test_spaces(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store")
    one = store.create_space({**IDENTITY, "layers": (1, 2), "name": "Zoë"})
    assert store.create_space({"layers": [1, 2], "name": "Zoë", **IDENTITY}).id == one.id
    two = store.create_space({**IDENTITY, "max_length": 64})
    assert {s.id for s in store.spaces()} == {one.id, two.id} and one.id != two.id
    assert store.space(one.id[:8]).identity == one.identity and one.identity["layers"] == [1, 2]
    assert one.format == "float16" and one.path.name == one.id
    with pytest.raises(StoreError, match="there is no feature space"):
        store.space("0" * 32)
    with pytest.raises(StoreError, match="there is no feature space 'xyz'"):
        store.space("xyz")
    with pytest.raises((TypeError, ValueError)):
        store.create_space({"x": float("nan")})


def test_a_space_under_another_name_is_refused(tmp_path: Path) -> None:
    """Renaming a folder must not turn one feature space into another."""
    home = space(tmp_path)
    home.path.replace(home.path.parent / ("0" * 32))
    with pytest.raises(StoreError, match="its identity is not that of"):
        Store.open(tmp_path / "store").spaces()


def test_a_segment_in_another_space_is_refused(tmp_path: Path) -> None:
    home, other = space(tmp_path), space(tmp_path, max_length=64)
    segment = sealed(home, [1])
    segment.path.replace(other.path / "segments" / segment.id)
    with pytest.raises(StoreError, match="another feature space"):
        other.segments()
    renamed = sealed(home, [1]).path
    renamed.replace(renamed.with_name(f"20200101T000000000-{'0' * 16}"))
    with pytest.raises(StoreError, match="its id is not"):
        home.segments()


def test_resolve(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store")
    with pytest.raises(StoreError, match="no feature space yet"):
        store.find(format="float16")
    half = store.create_space(IDENTITY)
    byte = store.create_space({**IDENTITY, "format": "int8"})
    assert store.find(format="int8").id == byte.id
    assert store.find({"backbone.family": "t5"}, format="float16").id == half.id
    with pytest.raises(SpaceMismatch) as caught:
        store.find({"format": "bfloat16", "max_length": 128})
    said = str(caught.value)
    assert 'asked for "bfloat16"' in said and "max_length" not in said and "\n" not in said
    assert ('format is "float16"' in said) or ('format is "int8"' in said)
    with pytest.raises(SpaceMismatch) as caught:
        store.find({"format": "int8", "max_length": 64, "backbone.family": "bert", "projection": "none"})
    said = str(caught.value)
    assert byte.id[:8] in said and "max_length is 128, asked for 64" in said
    assert 'backbone.family is "t5", asked for "bert"' in said and 'projection is absent, asked for "none"' in said
    with pytest.raises(SpaceMismatch, match="2 feature spaces fit, say which one") as caught:
        store.find(max_length=128)
    said = str(caught.value)
    assert f'"float16" ({half.id[:8]})' in said and f'"int8" ({byte.id[:8]})' in said and "backbone" not in said
    assert choose_space([half], {}).id == half.id
    with pytest.raises(SpaceMismatch, match=r"max_length is 128, asked for 128\.0"):
        store.find(max_length=128.0)


def test_reading_writes_nothing(tmp_path: Path) -> None:
    home = space(tmp_path)
    segment = sealed(home, [1, 2])
    home.save_table(TaskTable({"task": "t", "split": "train"}, [key(1)], [0]))
    Store(home.files).save_weights("ab" * 16, {"a.json": {}})
    before = snapshot(tmp_path / "store")
    store = Store.open(tmp_path / "store")
    (again,) = store.spaces()
    again.plan([key(1)], ["encoder.3"])
    again.segments()[0].read(["encoder.3"])
    again.load_table("t", "train")
    store.load_json("ab" * 16, "a.json")
    assert store.verify(deep=True) == [] and again.sweep() == 0
    again.writer({})
    assert snapshot(tmp_path / "store") == before and segment.id


def test_files_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        segment = sealed(space(tmp_path), [1])
    finally:
        os.umask(old)
    for path in (segment.path, segment.path / "manifest.json", segment.path / "encoder.3" / "c.0.0"):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)


@given(
    rows=st.lists(
        st.tuples(
            st.one_of(st.none(), st.integers(-5, 99), st.floats(allow_nan=False, allow_infinity=False)),
            st.lists(TEXTS, max_size=2),
        ),
        max_size=8,
    )
)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_tables_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[Any, list[str]]]) -> None:
    home = space(tmp_path_factory.mktemp("t"))
    header = {"task": "rte", "split": "train", "labels": ["ja", "nein\n"], "total": 5}
    table = TaskTable(header, [key(i) for i in range(len(rows))], [r[0] for r in rows], [r[1] for r in rows])
    path = home.save_table(table)
    assert home.save_table(table) == path and path.exists() and len(home.tables()) == 1
    found = home.load_table("rte", "train")
    assert (found.header, found.keys, found.labels, found.texts) == (header, table.keys, table.labels, table.texts)
    assert (found.task, found.split, len(found)) == ("rte", "train", len(rows))


def test_which_table(tmp_path: Path) -> None:
    home = space(tmp_path)

    def put(count: int, note: str, split: str = "train", day: int = 1) -> Path:
        created = f"2026-11-{day:02d}T12:00:00.000+00:00"
        header = {"task": "sst2", "split": split, "note": note, "created": created}
        return home.save_table(TaskTable(header, KEYS[:count], [0] * count))

    with pytest.raises(MissingStates, match="no task is stored yet"):
        home.load_table("sst2", "train")
    put(10, "ten")
    new, old = put(20, "new", day=9), put(20, "old", day=8)
    os.utime(new, (1, 1))  # copying changes the time of a file
    os.utime(old, (2, 2))
    put(30, "other split", "validation-mismatched")
    assert home.load_table("sst2", "train").header["note"] == "new"
    assert home.load_table("sst2", "train", rows=10).header["note"] == "ten"
    assert [t.rows for t in home.tables()] == [10, 20, 20, 30]
    path = old.relative_to(tmp_path / "store").as_posix()
    assert home.load_table("sst2", "train", path=path).header["note"] == "old"
    assert home.load_table("sst2", "validation-mismatched").keys == KEYS[:30]
    with pytest.raises(MissingStates, match="with 15 rows: stored are 10, 20, 20"):
        home.load_table("sst2", "train", rows=15)
    with pytest.raises(MissingStates, match="stored are sst2/train, sst2/validation-mismatched"):
        home.load_table("cola", "train")


KEYS = [key(i) for i in range(30)]


HEADER = b'{"kind_of_file":"activation-task-table","rows":1,"task":"t","split":"s"}\n'


def test_bad_tables(tmp_path: Path) -> None:
    home = space(tmp_path)
    for header in ({"task": "../x", "split": "train"}, {"task": "t", "split": "a/b"}, {"task": "", "split": "train"}):
        with pytest.raises(StoreError, match="cannot name a task"):
            home.save_table(TaskTable(header, [], []))
    with pytest.raises(ValueError, match="as many labels"):
        home.save_table(TaskTable({"task": "t", "split": "s"}, KEYS[:2], [1]))
    with pytest.raises(ValueError, match="finite"):
        home.save_table(TaskTable({"task": "t", "split": "s"}, KEYS[:1], [float("nan")]))
    path = home.save_table(TaskTable({"task": "t", "split": "s"}, KEYS[:2], [1, 2]))
    data = path.read_bytes()
    for number, plain in enumerate(
        [
            b"",
            b"{}\n",
            b'{"kind_of_file":"activation-task-table","rows":1,"task":"t","split":"s"}\n[1]\n',
            b'{"kind_of_file":"activation-task-table","rows":1,"task":"t","split":"s"}\n[[[[\n',
            b'{"kind_of_file":"activation-task-table","rows":1,"task":"u","split":"s"}\n["",1,[]]\n',
            *(HEADER + b'["%s",%s,[]]\n' % (key(1).encode(), n) for n in (b"NaN", b"1e999", b"9" * 40, b"true")),
            b"\0" * (64 << 20),
        ]
    ):
        path.unlink()
        packed = gzip.compress(plain, mtime=0)
        path = path.with_name(f"s-1-{digest_bytes(packed)[:16]}.jsonl.gz")
        path.write_bytes(packed)
        with pytest.raises(StoreError, match="task table"):
            home.load_table("t", "s")
        assert number < 10 and len(home.verify(deep=True)) == 1
    path.unlink()
    path = path.with_name(f"s-2-{digest_bytes(data)[:16]}.parquet")
    path.write_bytes(data[:-1] + b"?")
    with pytest.raises(StoreError, match="digest does not match its name"):
        home.load_table("t", "s")


def test_weights(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store")
    digest = "cd" * 16
    tied = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    assert not store.has_weights(digest)
    store.save_weights(digest, {"tail.safetensors": {"a": tied, "b": tied, "c": tied.T}, "config.json": {"n": [1]}})
    assert store.has_weights(digest, "config.json") and not store.has_weights(digest, "other.json")
    found = store.load_tensors(digest, "tail.safetensors")
    assert all(np.array_equal(found[name], value) for name, value in {"a": tied, "b": tied, "c": tied.T}.items())
    assert store.load_json(digest, "config.json") == {"n": [1]}
    before = snapshot(store.path)
    store.save_weights(digest, {"config.json": {"n": [2]}})
    assert snapshot(store.path) == before
    store.save_weights(digest, {"more.json": {}})
    assert store.has_weights(digest, "config.json", "more.json")
    with pytest.raises(MissingStates, match=r"other.json is not in the store"):
        store.load_json(digest, "other.json")
    with pytest.raises(ValueError, match=r"NAME\.safetensors or NAME\.json"):
        store.save_weights(digest, {"../evil.json": {}})
    with pytest.raises(ValueError, match="32 lower hex"):
        store.has_weights("../..")
    path = store.path / "weights" / digest / "tail.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(StoreError, match="differs from its digest"):
        store.load_tensors(digest, "tail.safetensors")
    assert [p.file for p in store.verify(deep=True)] == [f"weights/{digest}/tail.safetensors"]
    path.unlink()
    with pytest.raises(StoreError, match="is missing"):
        store.load_tensors(digest, "tail.safetensors")


def test_a_kill_while_weights_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the manifest they are not there; writing them again makes it good."""
    store = Store.create(tmp_path / "store")
    digest = "cd" * 16
    original = store.files.publish

    def publish(name: str, data: bytes) -> None:
        if name.endswith("manifest.json"):
            raise KeyboardInterrupt
        original(name, data)

    monkeypatch.setattr(store.files, "publish", publish)
    with pytest.raises(KeyboardInterrupt):
        store.save_weights(digest, {"config.json": {"n": 1}})
    monkeypatch.undo()
    assert not store.has_weights(digest)
    store.save_weights(digest, {"config.json": {"n": 1}})
    assert store.load_json(digest, "config.json") == {"n": 1}


def test_no_permission_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = space(tmp_path)
    sealed(home, [1])

    def refuse(self: Path, *args: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(StoreError, match="no permission while reading"):
        Store.open(tmp_path / "store")
    with pytest.raises(StoreError, match="no permission while reading"):
        home.plan([], [])
    with pytest.raises(StoreError, match="no permission while making a store"):
        Store.create(tmp_path / "new")


@pytest.mark.parametrize("shape", [[1 << 40, 1 << 40], [0, 1 << 63], [-1]])
def test_hostile_tensor_shapes_are_one_line(tmp_path: Path, shape: list[int]) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    _put_weights(tmp_path, len(header).to_bytes(8, "little") + header)
    with pytest.raises(StoreError, match="is not a safetensors file") as caught:
        Store.open(tmp_path / "store").load_tensors("cd" * 16, "tail.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [-1, 1 << 40])
def test_absurd_sizes_of_weights_are_refused(tmp_path: Path, size: int) -> None:
    file = _put_weights(tmp_path, b"", size)
    if size > 0:
        os.truncate(file, size)
    with pytest.raises(StoreError, match="malformed"):
        Store.open(tmp_path / "store").load_tensors("cd" * 16, "tail.safetensors")


def _put_weights(path: Path, data: bytes, size: int | None = None) -> Path:
    """Weights whose manifest agrees with `data`, but for a `size` of its own."""
    folder = Store.create(path / "store").path / "weights" / ("cd" * 16)
    folder.mkdir(parents=True)
    entry = {"name": "tail.safetensors", "size": len(data) if size is None else size, "xxh3": digest_bytes(data)}
    document = {"kind": "activation-weights", "format": 1, "digest": "cd" * 16, "files": [entry]}
    (folder / "manifest.json").write_bytes(dump_document(document))
    (folder / "tail.safetensors").write_bytes(data)
    return folder / "tail.safetensors"


def test_an_absurd_table_is_refused_before_it_is_read(tmp_path: Path) -> None:
    home = space(tmp_path)
    path = home.save_table(TaskTable({"task": "t", "split": "s"}, KEYS[:1], [1]))
    os.truncate(path, 1 << 40)
    with pytest.raises(StoreError, match="more than the"):
        home.load_table("t", "s")


def test_writers_of_different_weights_files_lose_none(tmp_path: Path) -> None:
    store, digest = Store.create(tmp_path / "store"), "a" * 32
    with ThreadPoolExecutor(4) as pool:
        names = [f"file{i}.json" for i in range(16)]
        list(pool.map(lambda name: store.save_weights(digest, {name: {"name": name}}), names))
    assert store.has_weights(digest, *names)
    assert [store.load_json(digest, name)["name"] for name in names] == names


def test_a_writer_that_lists_late_undoes_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One reads the manifest, waits long, and writes what it made of it: the other, done meanwhile, must be listed."""
    store, digest = Store.create(tmp_path / "store"), "a" * 32
    publish, waits = weights.publish_manifest, Event()

    def late(files: Files, digest: str, there: Mapping[str, tuple[int, str]]) -> None:
        if "slow.json" in there and not waits.is_set():
            waits.set()
            time.sleep(0.3)
        publish(files, digest, there)

    monkeypatch.setattr(weights, "publish_manifest", late)
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(store.save_weights, digest, {"slow.json": {"name": "slow"}})
        assert waits.wait(10)
        pool.submit(store.save_weights, digest, {"fast.json": {"name": "fast"}}).result()
        slow.result()
    assert store.has_weights(digest, "slow.json", "fast.json")
    assert not store.verify(deep=True)
