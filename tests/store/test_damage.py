"""Nothing damaged, missing, misplaced or hostile is ever handed out as data; `verify` names it."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

from pipeline.store import Samples, Segment, Space, Store, StoreError, TaskTable, read_block
from pipeline.store.files.local import Files
from pipeline.store.format.digest import digest_bytes
from pipeline.store.format.document import dump_document, load_document
from pipeline.store.segments.blocks import _segment
from tests.store.helpers import assert_equal, key, samples, sealed, space

# Zarr warns of the files that are not its own, and that consolidated metadata is not yet in the specification.
pytestmark = pytest.mark.filterwarnings("ignore:Object at:UserWarning", "ignore:Consolidated metadata:UserWarning")
STATES, COLUMNS = ["encoder.3", "decoder.1"], ["encoder.ids", "decoder.ids"]


def reopened(home: Space) -> Segment:
    """The only segment, opened anew: nothing remembered of what it was."""
    _segment.cache_clear()
    (segment,) = Store.open(home.files.root).space(home.id).segments()
    return segment


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and seal it again, as an attacker would; what files there are is listed anew."""
    document = load_document((folder / "manifest.json").read_bytes(), "", "activation-segment")
    entries = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            data = path.read_bytes()
            name = path.relative_to(folder).as_posix()
            entries.append({"name": name, "size": len(data), "xxh3": digest_bytes(data)})
    document["files"] = entries
    change(document)
    (folder / "manifest.json").write_bytes(dump_document(document))


def test_every_single_byte_flip_is_found(tmp_path: Path) -> None:
    """Any byte of any file: `verify(deep)` finds it, and reading gives the true data or a StoreError."""
    home = space(tmp_path)
    home.save_table(TaskTable({"task": "t", "split": "train"}, [key(1)], [1], [["text"]]))
    Store(home.files).save_weights("ab" * 16, {"tail.safetensors": {"w": torch.ones(3)}, "config.json": {"a": 1}})
    segment = sealed(home, [1, 2, 3])
    expected = segment.read(STATES, COLUMNS)
    pick = random.Random(0)
    for path in sorted(p for p in home.path.parents[1].rglob("*") if p.is_file()):
        data = path.read_bytes()
        for _ in range(4):
            place, bit = pick.randrange(len(data)), 1 << pick.randrange(8)
            path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
            _assert_found(home, expected, f"{path.name} byte {place}")
        path.write_bytes(data[: pick.randrange(len(data))])
        _assert_found(home, expected, f"{path.name} truncated")
        path.write_bytes(data + b"\0")
        _assert_found(home, expected, f"{path.name} lengthened")
        path.unlink()
        _assert_found(home, expected, f"{path.name} missing")
        path.write_bytes(data)
    assert Store.open(home.files.root).verify(deep=True) == []
    assert_equal(reopened(home).read(STATES, COLUMNS), expected)


def _assert_found(home: Space, expected: Samples, what: str) -> None:
    try:
        store = Store.open(home.files.root)
        assert store.verify(deep=True), what
        if not store.space(home.id).segments():
            return
        found = reopened(home).read(STATES, COLUMNS)
    except StoreError as error:
        assert "\n" not in str(error)
    else:
        assert_equal(found, expected)


@pytest.mark.parametrize("damage", ["flip", "missing", "truncated", "swapped", "zeros"])
def test_a_damaged_chunk_raises_and_is_named(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.store.format.arrays.CHUNK_BYTES", 64)
    home = space(tmp_path)
    expected = samples(list(range(12)))
    segment = sealed(home, list(range(12)))
    plan = home.plan(expected.keys, STATES, COLUMNS)
    assert_equal(read_block(plan.blocks[0]), expected)
    assert_equal(segment.read(STATES, COLUMNS), expected)
    victim, other = segment.path / "encoder.3" / "c.1.0", segment.path / "encoder.3" / "c.2.0"
    data = victim.read_bytes()
    if damage == "flip":
        victim.write_bytes(data[:5] + bytes([data[5] ^ 16]) + data[6:])
    elif damage == "missing":
        victim.unlink()
    elif damage == "truncated":
        victim.write_bytes(data[:-1])
    elif damage == "zeros":
        victim.write_bytes(b"\0" * len(data))
    else:
        # A whole chunk with a good crc32c, in the wrong place: only the manifest's digest tells.
        victim.write_bytes(other.read_bytes())
    # Also a segment that was opened, and its sizes checked, before the damage.
    for opened in (segment, reopened(home)):
        with pytest.raises(StoreError, match=rf"segment {segment.id} is damaged: encoder.3/c.1.0 \(encoder.3\)"):
            opened.read(STATES)
    with pytest.raises(StoreError, match=r"encoder\.3"):
        read_block(plan.blocks[0])
    (problem,) = reopened(home).verify(deep=True)
    assert (problem.segment, problem.file) == (segment.id, "encoder.3/c.1.0")
    assert len(segment.verify()) == (damage in ("missing", "truncated"))
    # The other states are still good for a segment that is open.
    assert segment.read(["decoder.1"]).keys == expected.keys


def test_verify_reports_strangers_and_bad_manifests(tmp_path: Path) -> None:
    home = space(tmp_path)
    segment = sealed(home, [1, 2])
    (segment.path / "note.txt").write_text("hello")
    assert [p.file for p in home.verify(deep=True)] == ["note.txt"]
    (segment.path / "manifest.json").write_text("{}")
    assert [p.file for p in home.verify()] == ["manifest.json"]
    with pytest.raises(StoreError, match=r"manifest\.json is not an activation segment"):
        Store.open(home.files.root).space(home.id).segments()


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    *way, last, value = path

    def change(document: dict[str, Any]) -> None:
        for step in way:
            document = document[step]
        document[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("id", "20200101T000000000-0000000000000000"), "its id is not"),
        (_set("space", "0" * 32), "another feature space"),
        (_set("base", "../../../etc"), "base is not a segment id"),
        (_set("samples", None), "samples is missing"),
        (_set("samples", "keys", 0, "../../x"), "samples.keys"),
        (_set("samples", "keys", 1, key(1)), "occurs twice"),
        (_set("samples", "keys", 7), "samples.keys"),
        (_set("samples", "lengths", "encoder", 0, -1), "lengths.encoder"),
        (_set("samples", "lengths", "encoder", 0, 1 << 40), "lengths.encoder"),
        (_set("samples", "lengths", "encoder", 0, 2.5), "lengths.encoder"),
        (_set("samples", "lengths", "encoder", 0, True), "lengths.encoder"),
        (_set("samples", "lengths", "encoder", [1]), "lengths.encoder"),
        (_set("samples", "lengths", "../x", [1, 2, 3]), "samples.lengths"),
        (_set("samples", "lengths", "encoder", 0, 1_000_000_000), "does not say"),
        (_set("states", "../../passwd", {"width": 1, "format": "int8", "scale": False}), "states"),
        (_set("states", "encoder.9", {"width": 8, "format": "float16", "scale": False}), "does not say"),
        (_set("states", "encoder.3", "width", 1 << 50), "states"),
        (_set("states", "encoder.3", "width", 16), "does not say"),
        (_set("states", "encoder.3", "format", "pickle"), "states"),
        (_set("states", "encoder.3", "format", "float32"), "this feature space holds float16"),
        (_set("columns", ["encoder.3/../../x"]), "columns"),
        (_set("columns", 3), "columns is missing"),
        (_set("files", 0, "name", "../../../../etc/passwd"), "files is malformed"),
        (_set("files", 0, "name", "/etc/passwd"), "files is malformed"),
        (_set("files", 0, "size", -1), "files is malformed"),
        (_set("files", []), "zarr.json"),
        (_set("files", {}), "files is missing"),
        (_set("provenance", []), "provenance"),
        (_set("format", 2), "of format 2, this version reads up to 1"),
        (_set("kind", "other"), "is not a"),
    ],
)
def test_hostile_manifests(tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    home = space(tmp_path)
    segment = sealed(home, [1, 2, 3])
    rewrite_manifest(segment.path, change)
    with pytest.raises(StoreError, match=message):
        reopened(home).read(STATES, COLUMNS)


def rewrite_metadata(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads((folder / "zarr.json").read_text())
    change(document["consolidated_metadata"]["metadata"])
    (folder / "zarr.json").write_text(json.dumps(document))
    rewrite_manifest(folder, lambda d: None)


@pytest.mark.parametrize(
    "change",
    [
        _set("encoder.3", "shape", [1 << 39, 1 << 19]),
        _set("encoder.3", "shape", [-1, 8]),
        _set("encoder.3", "shape", 3),
        _set("encoder.3", "data_type", "object"),
        _set("encoder.3", "chunk_grid", None),
        _set("encoder.3", "chunk_grid", "configuration", "chunk_shape", [0, 8]),
        _set("encoder.3", "chunk_grid", "configuration", "chunk_shape", [1 << 39, 8]),
        _set("encoder.3", "chunk_grid", "configuration", "chunk_shape", [3, 8]),
        _set("encoder.3", "codecs", [{"name": "numcodecs.pickle"}]),
        _set("encoder.3", "codecs", [{"name": "sharding_indexed", "configuration": {"codecs": [{"name": "evil"}]}}]),
        _set("encoder.3", "codecs", 5),
        _set("encoder.3", "codecs", []),
        _set("encoder.3", "storage_transformers", [{"name": "evil"}]),
        _set("encoder.3", "chunk_key_encoding", {"name": "default", "configuration": {"separator": "/"}}),
        _set("encoder.3", None),
    ],
)
def test_hostile_metadata(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    home = space(tmp_path)
    segment = sealed(home, [1, 2, 3])
    rewrite_metadata(segment.path, change)
    with pytest.raises(StoreError):
        reopened(home).read(STATES, COLUMNS)


@pytest.mark.parametrize("held", ["5", "[]", '{"metadata": [1]}', '{"metadata": {"encoder.3": null}}'])
def test_hostile_consolidated_metadata(tmp_path: Path, held: str) -> None:
    home = space(tmp_path)
    segment = sealed(home, [1, 2, 3])
    (segment.path / "zarr.json").write_text(
        '{"zarr_format": 3, "node_type": "group", "consolidated_metadata": ' + held + "}"
    )
    rewrite_manifest(segment.path, lambda d: None)
    with pytest.raises(StoreError):
        reopened(home).read(STATES)


def test_a_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    """One reader would take the first keys and another the last."""
    home = space(tmp_path)
    path = sealed(home, [1, 2]).path / "manifest.json"
    body = b"{" + path.read_bytes()[43:-1] + b',"provenance":{}}'
    path.write_bytes(b'{"xxh3":"' + digest_bytes(body).encode() + b'",' + body[1:])
    with pytest.raises(StoreError, match="not readable JSON"):
        reopened(home)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
@pytest.mark.parametrize("name", ["store.json", "spaces/*/space.json", "spaces/*/segments/*/manifest.json"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    home = space(tmp_path)
    sealed(home, [1, 2])
    (victim,) = (tmp_path / "store").glob(name)
    victim.unlink()
    os.mkfifo(victim)
    with pytest.raises(StoreError, match="not a regular file"):
        reopened(home)


def test_missing_consolidated_metadata(tmp_path: Path) -> None:
    home = space(tmp_path)
    segment = sealed(home, [1, 2, 3])
    (segment.path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    rewrite_manifest(segment.path, lambda d: None)
    with pytest.raises(StoreError, match="consolidated"):
        reopened(home).read(STATES)


@pytest.mark.parametrize("shards", [None, (16, 8)])
def test_arrays_written_by_others_are_read_through_zarr(tmp_path: Path, shards: tuple[int, int] | None) -> None:
    """The direct reader and zarr agree; a missing chunk of a foreign array is an error too, not zeros."""
    home = space(tmp_path)
    segment = sealed(home, list(range(12)))
    expected = segment.read(STATES, COLUMNS)
    values = expected.states["encoder.3"].values
    _replace_array(segment.path, values, shards)
    rewrite_manifest(segment.path, lambda d: None)
    foreign = reopened(home)
    assert foreign.arrays["encoder.3"].foreign_grid and not foreign.arrays["decoder.1"].foreign_grid
    assert_equal(foreign.read(STATES, COLUMNS), expected)
    part = foreign.read(["encoder.3"], (), [(1, 3), (7, 12)])
    assert part.keys == [*expected.keys[1:3], *expected.keys[7:]]
    offsets = expected.offsets("encoder")
    rows = np.r_[offsets[1] : offsets[3], offsets[7] : offsets[12]]
    assert np.array_equal(part.states["encoder.3"].values, values[rows])
    victim = next(p for p in sorted((segment.path / "encoder.3").rglob("*")) if p.is_file() and p.name != "zarr.json")
    data = victim.read_bytes()
    victim.write_bytes(data[:-6] + bytes([data[-6] ^ 1]) + data[-5:])
    with pytest.raises(StoreError, match=r"damaged: encoder\.3/"):
        reopened(home).read(STATES)
    victim.unlink()
    rewrite_manifest(segment.path, lambda d: None)
    with pytest.raises(StoreError, match="is not in the manifest"):
        reopened(home).read(STATES)


@pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning")
def _replace_array(folder: Path, values: np.ndarray, shards: tuple[int, int] | None) -> None:
    shutil.rmtree(folder / "encoder.3")
    group = zarr.open_group(str(folder), mode="r+", use_consolidated=False)
    array = group.create_array(
        "encoder.3",
        shape=values.shape,
        chunks=(4, 8),
        shards=shards,
        dtype=values.dtype,
        serializer=BytesCodec(endian="little"),
        compressors=[ZstdCodec(), Crc32cCodec()],
        fill_value=7,
    )
    array[:] = values
    zarr.consolidate_metadata(str(folder))


def test_symbolic_links_out_of_the_store_are_refused(tmp_path: Path) -> None:
    home = space(tmp_path)
    segment = sealed(home, [1, 2])
    for victim in (segment.path / "encoder.3" / "c.0.0", segment.path / "encoder.3", segment.path):
        outside = tmp_path / "outside"
        victim.replace(outside)
        victim.symlink_to(outside)
        with pytest.raises(StoreError, match="symbolic link out of the store"):
            reopened(home).read(STATES)
        victim.unlink()
        outside.replace(victim)
    assert reopened(home).verify(deep=True) == []
    # The store itself may well be reached through a link.
    (tmp_path / "link").symlink_to(tmp_path / "store")
    assert len(Store.open(tmp_path / "link").spaces()[0].segments()) == 1


def test_removing_never_follows_links(tmp_path: Path) -> None:
    files = Files(tmp_path / "store")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    files.make("folder")
    (tmp_path / "store" / "folder" / "link").symlink_to(tmp_path / "precious")
    (tmp_path / "store" / "folder" / "file").symlink_to(tmp_path / "precious" / "file")
    files.remove_tree("folder")
    assert not (tmp_path / "store" / "folder").exists() and (tmp_path / "precious" / "file").read_text() == "x"


@pytest.mark.parametrize(
    "text",
    [b"", b"[" * 100_000, b'{"a": ' * 100_000, b"\xff\xfe", b"9" * 10_000, b'{"a": NaN}', b"[]", b'"text"', b"null"],
)
def test_json_bombs(tmp_path: Path, text: bytes) -> None:
    home = space(tmp_path)
    segment = sealed(home, [1, 2])
    (segment.path / "manifest.json").write_bytes(text)
    with pytest.raises(StoreError, match=r"manifest\.json is "):
        reopened(home)


def test_enormous_headers(tmp_path: Path) -> None:
    home = space(tmp_path)
    segment = sealed(home, [1, 2])
    for name in ("manifest.json", "../../space.json", "../../../../store.json"):
        path = (segment.path / name).resolve()
        data = path.read_bytes()
        with path.open("r+b") as file:
            file.truncate(1 << 40)
        with pytest.raises(StoreError, match="more than the"):
            reopened(home)
        path.write_bytes(data)
    assert reopened(home).verify(deep=True) == []
