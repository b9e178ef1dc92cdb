"""What is derived from a store's files is kept on this machine, and never stands in for a file that has changed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.store import Space, Store, TaskTable
from pipeline.store.errors import StoreError
from pipeline.store.files import derived
from pipeline.store.files.places import cache_folder
from pipeline.store.format import manifest
from pipeline.store.format.document import dump_document, parse_json
from pipeline.store.format.manifest import load_manifest
from tests.store.helpers import key, sealed, space

MANY = 2000  # samples: a manifest large enough to be kept


@pytest.fixture
def home(tmp_path: Path) -> Space:
    home = space(tmp_path)
    sealed(home, range(MANY))
    return home


def opened(home: Space) -> Space:
    return Store.open(home.files.root).space(home.id)


def facts(home: Space) -> list[object]:
    (segment,) = opened(home).segments()
    told = {name: value for name, value in vars(segment).items() if name not in ("files", "lengths", "seal")}
    return [told, {s: n.tolist() for s, n in segment.lengths.items()}, segment.seal]


def kept() -> list[Path]:
    return [path for path in cache_folder().rglob("*") if path.is_file()]


def no_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("parsed again")

    monkeypatch.setattr(derived, "load_manifest", refuse)


def test_a_manifest_is_parsed_once(home: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    first = facts(home)
    assert len(kept()) == 1
    no_parsing(monkeypatch)
    assert facts(home) == first


def test_the_cache_can_be_off(home: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in kept():
        path.unlink()
    monkeypatch.setenv("PIPELINE_CACHE_SIZE", "0")
    assert facts(home) == facts(home) and not kept()


def test_a_damaged_copy_is_made_again(home: Space) -> None:
    first = facts(home)
    (copy,) = kept()
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    assert facts(home) == first


def test_a_rewritten_or_damaged_manifest_does_not_hide(home: Space) -> None:
    """Of the same size and the same time as the one that was kept."""
    facts(home)
    (segment,) = home.segments()
    path = Path(home.files.root) / segment.folder / "manifest.json"
    data, times = path.read_bytes(), path.stat()
    body = data.replace(key(5).encode(), key(MANY + 5).encode())
    other = dump_document({k: v for k, v in parse_json(body, "").items() if k != "xxh3"})
    assert len(other) == len(data)
    path.write_bytes(other)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    (found,) = opened(home).segments()
    assert key(MANY + 5) in found.keys and key(5) not in found.keys
    path.write_bytes(body)  # its digest no longer fits
    with pytest.raises(StoreError, match="damaged"):
        opened(home).segments()


def test_the_header_of_a_large_table_is_read_once_while_it_does_not_change(home: Space, tmp_path: Path) -> None:
    header = {"task": "t", "split": "train", "note": "x"}
    texts = np.random.default_rng(0).integers(0, 1 << 60, MANY).astype(str)
    home.save_table(TaskTable(header, [key(i) for i in range(MANY)], [0] * MANY, [[t] for t in texts.tolist()]))
    (info,) = home.tables()
    path, before = Path(home.files.root) / info.path, len(kept())
    home.read_header(info)
    assert len(kept()) == before  # written just now: another change may bear the same time
    os.utime(path, (1, 1))
    assert path.stat().st_size > derived.WORTH
    assert home.read_header(info) == home.read_header(info) == header
    assert len(kept()) == before + 1
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="damaged"):
        home.read_header(info)
    path.unlink()
    with pytest.raises(StoreError, match="missing"):
        home.read_header(info)


def test_two_stores_of_one_segment_share_what_was_derived(home: Space, tmp_path: Path) -> None:
    first = facts(home)
    shutil.copytree(home.files.root, tmp_path / "copy")
    assert facts(Store.open(tmp_path / "copy").space(home.id)) == first and len(kept()) == 1


@given(
    st.lists(st.text('0123456789abcdefA ]"é', min_size=31, max_size=33), max_size=4),
    st.sampled_from([{}, {"samples": {"keys": []}}, {"samples": {"keys": [key(1)]}}, {"note": '"samples":{"keys":['}]),
)
def test_keys_are_read_as_json_reads_them(keys: list[str], provenance: dict[str, object]) -> None:
    """The quick way through a manifest and the plain one agree, refusals included."""
    keys = [*keys, key(7)]
    about = {"kind": manifest.KIND, "format": 1, "id": "a", "space": "b", "base": None, "states": {}, "columns": []}
    samples = {"keys": keys, "lengths": {"encoder": [1] * len(keys)}}
    data = dump_document({**about, "samples": samples, "files": [], "provenance": provenance, "created": ""})
    plain = all(len(k) == 32 and set(k) <= set("0123456789abcdef") for k in keys) and len({*keys}) == len(keys)
    try:
        assert list(load_manifest(data, "here", "b", "a").keys) == keys
    except StoreError:
        assert not plain
    else:
        assert plain
