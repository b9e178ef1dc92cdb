"""Stores made to cost memory or time: refused before they do."""

from __future__ import annotations

import gzip
import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest

from pipeline.store import Segment, Store, StoreError
from pipeline.store.format.digest import digest_bytes
from pipeline.store.format.document import dump_document
from pipeline.store.format.foreign import zstd_size
from tests.store.helpers import sealed, space
from tests.store.test_damage import reopened, rewrite_manifest, rewrite_metadata

BOMB = 256 << 20  # bytes that one chunk of some bytes or kilobytes unpacks to


def zeros_gzip() -> bytes:
    """256 MB of zeros as 256 kB of gzip, in many members, which costs no time to make."""
    return gzip.compress(bytes(1 << 20), 9) * (BOMB >> 20)


def frame(descriptor: int, *fields: bytes) -> bytes:
    return b"\x28\xb5\x2f\xfd" + bytes([descriptor]) + b"".join(fields)


# A zstd frame that states 256 MB, of run-length blocks of 128 kB each (RFC 8878, 3.1.1.2).
ZSTD = frame(0xA0, BOMB.to_bytes(4, "little"), (((128 << 10) << 3) | 2).to_bytes(3, "little") + b"\0") + b"".join(
    ((((128 << 10) << 3) | 2 | (n == BOMB // (128 << 10) - 2)).to_bytes(3, "little") + b"\0")
    for n in range(BOMB // (128 << 10) - 1)
)


def compressed(segment: Segment, codecs: list[dict[str, Any]], chunk: bytes) -> None:
    """Put `chunk` in place of the values of `encoder.3`, to be decoded by `codecs`."""
    (segment.path / "encoder.3" / "c.0.0").write_bytes(chunk)
    document = json.loads((segment.path / "encoder.3" / "zarr.json").read_text())
    document["codecs"] = codecs
    (segment.path / "encoder.3" / "zarr.json").write_text(json.dumps(document))
    rewrite_metadata(segment.path, lambda arrays: arrays["encoder.3"].update(codecs=codecs))


BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
GZIP = {"name": "gzip", "configuration": {"level": 9}}
BLOSC = {
    "name": "blosc",
    "configuration": {"typesize": 2, "cname": "zstd", "clevel": 9, "shuffle": "noshuffle", "blocksize": 0},
}


def blosc_bomb() -> bytes:
    return bytes(numcodecs.Blosc("zstd", 9).encode(np.zeros(BOMB, np.uint8)))


@pytest.mark.parametrize("codec", ["gzip", "zstd", "blosc", "twice"])
def test_a_chunk_that_unpacks_beyond_its_size_is_refused(tmp_path: Path, codec: str) -> None:
    home = space(tmp_path)
    segment = sealed(home, [1, 2, 3], large=False)
    codecs, chunk = {
        "gzip": ([BYTES, GZIP], zeros_gzip()),
        "zstd": ([BYTES, {"name": "zstd", "configuration": {"level": 9, "checksum": False}}], ZSTD),
        "blosc": ([BYTES, BLOSC], blosc_bomb()),
        "twice": ([BYTES, GZIP, GZIP], gzip.compress(zeros_gzip(), 9)),
    }[codec]
    compressed(segment, codecs, chunk)
    tracemalloc.start()
    with pytest.raises(StoreError, match=r"unpacks to more than the [0-9]+ bytes it may have"):
        reopened(home).read(["encoder.3"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20, f"{peak >> 20} MB"


def test_honest_compression_is_read(tmp_path: Path) -> None:
    home = space(tmp_path)
    segment = sealed(home, [1, 2, 3], large=False)
    expected = segment.read(["encoder.3"]).states["encoder.3"].values
    plain = (segment.path / "encoder.3" / "c.0.0").read_bytes()[:-4]
    for codecs, chunk in (
        ([BYTES, GZIP], gzip.compress(plain[:10]) + gzip.compress(plain[10:])),
        ([BYTES, BLOSC], bytes(numcodecs.Blosc("zstd", 9).encode(plain))),
        ([BYTES, {"name": "zstd", "configuration": {"level": 3, "checksum": False}}], numcodecs.Zstd(3).encode(plain)),
    ):
        compressed(segment, codecs, chunk)
        assert (reopened(home).read(["encoder.3"]).states["encoder.3"].values == expected).all()


def test_an_array_far_larger_than_its_files_is_refused(tmp_path: Path) -> None:
    """Shapes may agree everywhere: 4 GB of zeros as some kB of gzip are no states."""
    home = space(tmp_path)
    segment = sealed(home, [1, 2, 3], large=False)
    rows = segment.arrays["encoder.3"].shape[0]
    compressed(segment, [BYTES, GZIP], gzip.compress(bytes(1024)))
    rewrite_metadata(
        segment.path,
        lambda a: a["encoder.3"]["chunk_grid"]["configuration"].update(chunk_shape=[(128 << 20) // 16, 8]),
    )
    assert rows < 100
    with pytest.raises(StoreError, match="far more than real states do"):
        reopened(home).read(["encoder.3"])


def test_zstd_frames_state_their_size() -> None:
    for size in (0, 1, 255, 256, 65_791, 65_792, 1 << 20):
        assert zstd_size(numcodecs.Zstd(1).encode(bytes(size) or b"")) == size or size == 0
    assert zstd_size(ZSTD) == BOMB
    assert zstd_size(b"\x50\x2a\x4d\x18" + bytes(20)) is None  # a skippable frame
    assert zstd_size(b"") is None


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (
            lambda d: d["files"].extend({"name": f"a{i}", "size": 1, "xxh3": "0" * 32} for i in range(70_000)),
            "lists more",
        ),
        (lambda d: d["files"].append(d["files"][0]), "listed twice"),
        (
            lambda d: d["states"].update(
                {
                    f"encoder.x{i}": {"stream": "encoder", "width": 8, "format": "float16", "scale": False}
                    for i in range(5000)
                }
            ),
            "states and columns",
        ),
        (lambda d: d["columns"].extend(f"encoder.x{i}" for i in range(5000)), "states and columns"),
        (lambda d: d["columns"].append(d["columns"][0]), "columns is malformed"),
        (lambda d: d["samples"]["lengths"].update({f"s{i}": [1, 1, 1] for i in range(300)}), "streams"),
    ],
)
def test_manifests_of_more_than_a_segment_has(tmp_path: Path, add: Any, message: str) -> None:
    home = space(tmp_path)
    segment = sealed(home, [1, 2, 3])
    rewrite_manifest(segment.path, add)
    begun = time.perf_counter()
    with pytest.raises(StoreError, match=message):
        reopened(home)
    assert [p.what for p in Store.open(home.files.root).verify(deep=True)]
    assert time.perf_counter() - begun < 5


def test_kept_json_is_small(tmp_path: Path) -> None:
    """A configuration is read whole: what the manifest may say of it is bounded as other headers are."""
    store, digest = Store.create(tmp_path / "store"), "ab" * 16
    store.save_weights(digest, {"config.json": {"a": 1}})
    folder = tmp_path / "store" / "weights" / digest
    data = b'{"a": "' + b"x" * (5 << 20) + b'"}'
    (folder / "config.json").write_bytes(data)
    entry = {"name": "config.json", "size": len(data), "xxh3": digest_bytes(data)}
    document = {"kind": "activation-weights", "format": 1, "digest": digest, "files": [entry]}
    (folder / "manifest.json").write_bytes(dump_document(document))
    with pytest.raises(StoreError, match="malformed"):
        store.load_json(digest, "config.json")
