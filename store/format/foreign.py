"""Arrays of a segment that another program wrote, with compressors or shards, read through zarr within bounds.

zarr's own decompressors make whatever a chunk says: 3 MB of gzip are 3 GB of zeros. Those here give the size of the
chunk at most and refuse the rest, also within shards and where one is put behind another.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from itertools import product
from math import prod
from threading import Lock
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec
from zarr.registry import register_codec
from zarr.storage import LocalStore

# Real states shrink at most about twofold and columns seldom more than this; small arrays may, an all-zero column say.
_MAX_RATIO, _SLACK = 64, 64 << 20
_INDEX = 64 << 10  # what a chunk may have beyond its values: checksums, a shard's index
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_opening = Lock()


def largest_chunk(spec: Any) -> int:
    """Bytes that a chunk of the Zarr array spec `spec` may unpack to."""
    return 2 * prod(spec.shape) * int(spec.dtype.to_native_dtype().itemsize) + _INDEX


def too_large(limit: int) -> ValueError:
    return ValueError(f"a chunk unpacks to more than the {limit} bytes it may have: refused")


class BoundedGzip(GzipCodec):
    """gzip that stops at the chunk's size."""

    def _decode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        data, limit = chunk_bytes.to_bytes(), largest_chunk(chunk_spec)
        parts: list[bytes] = []
        while data:  # a file may hold several members
            member = zlib.decompressobj(wbits=31)
            parts.append(member.decompress(data, limit + 1))
            limit -= len(parts[-1])
            if limit < 0:
                raise too_large(largest_chunk(chunk_spec))
            if not member.eof:
                raise ValueError("the gzip stream ends early")
            data = member.unused_data
        return chunk_spec.prototype.buffer.from_bytes(b"".join(parts))


class BoundedZstd(ZstdCodec):
    """zstd of one frame that states its size and keeps to the chunk's."""

    def _decode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        size, limit = zstd_size(chunk_bytes.to_bytes()), largest_chunk(chunk_spec)
        if size is None:
            raise ValueError("the zstd frame does not state its size: refused")
        if size > limit:
            raise too_large(limit)
        return super()._decode_sync(chunk_bytes, chunk_spec)


class BoundedBlosc(BloscCodec):
    """blosc whose header keeps to the chunk's size."""

    def _decode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        size, limit = int.from_bytes(chunk_bytes.to_bytes()[4:8], "little"), largest_chunk(chunk_spec)
        if size > limit:
            raise too_large(limit)
        return super()._decode_sync(chunk_bytes, chunk_spec)


_BOUNDED = {"gzip": BoundedGzip, "zstd": BoundedZstd, "blosc": BoundedBlosc}
for _name, _codec in _BOUNDED.items():
    register_codec(_name, _codec)


def zstd_size(data: bytes) -> int | None:
    """The content size in a zstd frame's header (RFC 8878, 3.1.1.1); None where it has none or this is no frame."""
    if data[:4] != _ZSTD_MAGIC or len(data) < 5:
        return None
    descriptor = data[4]
    single, flag = descriptor >> 5 & 1, descriptor >> 6
    width = (single, 2, 4, 8)[flag]
    if not width:
        return None
    start = 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3]
    return int.from_bytes(data[start : start + width], "little") + (256 if width == 2 else 0)


def open_array(folder: str, name: str) -> zarr.Array:
    """The array `name` of the group in `folder`, with bounded decompressors."""
    chosen = {f"codecs.{key}": f"{codec.__module__}.{codec.__qualname__}" for key, codec in _BOUNDED.items()}
    # zarr chooses codecs by a setting of the whole process, when it reads an array's metadata.
    with _opening, zarr.config.set(chosen):
        opened = zarr.open_group(LocalStore(folder, read_only=True), mode="r", use_consolidated=True)[name]
    if not isinstance(opened, zarr.Array):
        raise ValueError("is not an array")
    return opened


def read_array(
    array: zarr.Array, grid: tuple[int, ...], check: Callable[[str], int], runs: list[tuple[int, int]]
) -> np.ndarray:
    """The rows of `runs` of an array in chunks of `grid`. `check(chunk key)` verifies the file and gives its size.

    Raises ValueError for what unpacks to far more than it takes on the disk, before it is unpacked.
    """
    stored = chunks = 0
    # Ends at the first absent file, so an absurd shape costs nothing.
    for index in product(*(range(-(-n // c)) for n, c in zip(array.shape, grid, strict=True))):
        stored += check(array.metadata.encode_chunk_key(index))
        chunks += 1
    if chunks * prod(grid) * array.dtype.itemsize > _MAX_RATIO * stored + _SLACK:
        raise ValueError("it unpacks to far more than real states do: refused")
    parts = [np.asarray(array[a:b]) for a, b in runs]
    return np.concatenate(parts) if parts else np.empty((0, *array.shape[1:]), array.dtype)
