"""Zarr v3 arrays of a segment: their metadata, and direct reading and writing of their chunks.

Every array is plain Zarr v3: regular chunks along the rows, about 8 MB each, codecs `bytes` (little-endian) and
`crc32c`, nothing else. A chunk file is therefore the rows as they lie in memory and four bytes of checksum, which are
read straight into the result, at the speed of the disk; zarr-python itself reads such a chunk with three copies. An
array whose metadata is anything else (another program compressed it, say) is read through zarr.

Each chunk is checked against the xxh3-128 in the segment's manifest before a row of it is handed out. That finds all
that crc32c finds, and a chunk that belongs elsewhere too; crc32c stays for those who read with zarr alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import google_crc32c
import numpy as np

from pipeline.store.errors import StoreError
from pipeline.store.files.local import Files
from pipeline.store.format.digest import digest_bytes
from pipeline.store.format.names import CHUNK_BYTES, MAX_CHUNK_BYTES, MAX_ROWS, MAX_WIDTH

_DTYPES = {"float32": "<f4", "float16": "<f2", "uint16": "<u2", "int32": "<i4", "int8": "|i1"}
# What another program may have put in place of our own two codecs; nothing here can run code.
_CODECS = {"blosc", "bytes", "crc32c", "gzip", "sharding_indexed", "transpose", "zstd"}
_MAX_CODECS = 8
Digests = Mapping[str, tuple[int, str]]
Runs = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class ArraySpec:
    """One array: `shape` (rows,) or (rows, width), `dtype` as Zarr names it, `chunk_rows` rows a chunk.

    `foreign_grid` is the chunk shape of an array that only zarr can read, whose `chunk_rows` says nothing; else ().
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunk_rows: int
    attributes: dict[str, Any] = field(default_factory=dict, compare=False)
    foreign_grid: tuple[int, ...] = ()

    @classmethod
    def new(cls, name: str, shape: tuple[int, ...], dtype: str, attributes: dict[str, Any] | None = None) -> ArraySpec:
        """Chunks of about 8 MB which divide the rows evenly, since Zarr pads the last chunk to full size."""
        row_bytes = np.dtype(_DTYPES[dtype]).itemsize * prod(shape[1:])
        count = max(1, round(shape[0] * row_bytes / CHUNK_BYTES))
        return cls(name, shape, dtype, max(1, -(-shape[0] // count)), attributes or {})

    @property
    def numpy(self) -> np.dtype:
        return np.dtype(_DTYPES[self.dtype])

    @property
    def row_bytes(self) -> int:
        return self.numpy.itemsize * (self.shape[1] if len(self.shape) == 2 else 1)

    @property
    def chunks(self) -> int:
        return -(-self.shape[0] // self.chunk_rows)

    @property
    def chunk_size(self) -> int:
        """Bytes of a chunk file: full chunks, and the checksum."""
        return self.chunk_rows * self.row_bytes + 4

    def chunk_file(self, index: int) -> str:
        """Path of a chunk below the segment's folder."""
        return f"{self.name}/c.{index}" + ".0" * (len(self.shape) - 1)


def group_files(arrays: Sequence[ArraySpec], attributes: dict[str, Any]) -> dict[str, bytes]:
    """The `zarr.json` files of a group of `arrays`, made by zarr itself, consolidated. Path → content."""
    import zarr  # a third of a second, which those who only read do not need
    from zarr.codecs import BytesCodec, Crc32cCodec
    from zarr.storage import MemoryStore

    memory = MemoryStore()
    group = zarr.create_group(memory, attributes=attributes)
    for array in arrays:
        group.create_array(
            array.name,
            shape=array.shape,
            chunks=(array.chunk_rows, *array.shape[1:]),
            dtype=array.dtype,
            filters=None,
            serializer=BytesCodec(endian="little"),
            compressors=[Crc32cCodec()],
            fill_value=0,
            chunk_key_encoding={"name": "default", "separator": "."},
            attributes=array.attributes,
            dimension_names=("row", "channel")[: len(array.shape)],
        )
    found = {name: json.loads(value.to_bytes()) for name, value in memory._store_dict.items()}
    # What zarr.consolidate_metadata would write, without its warning that other readers ignore this; they may.
    members = {array.name: found[f"{array.name}/zarr.json"] for array in arrays}
    found["zarr.json"]["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": members}
    return {name: json.dumps(document, indent=2).encode() for name, document in found.items()}


def parse_group(document: Mapping[str, Any], where: str) -> dict[str, ArraySpec]:
    """The arrays in a consolidated group's `zarr.json`. Raises StoreError for shapes and types out of bounds."""
    held = document.get("consolidated_metadata")
    found = held.get("metadata") if isinstance(held, dict) else None
    if document.get("zarr_format") != 3 or document.get("node_type") != "group" or not isinstance(found, dict):
        raise StoreError(f"{where} is not a consolidated Zarr v3 group")
    return {name: _parse_array(name, meta, where) for name, meta in found.items()}


def _parse_array(name: str, meta: Any, where: str) -> ArraySpec:
    try:
        shape, dtype = tuple(meta["shape"]), meta["data_type"]
        grid = meta["chunk_grid"]["configuration"]["chunk_shape"]
        sound = meta["zarr_format"] == 3 and meta["node_type"] == "array" and dtype in _DTYPES
        sound = sound and 1 <= len(shape) <= 2 and all(type(n) is int for n in (*shape, *grid))
        sound = sound and 0 <= shape[0] <= MAX_ROWS and all(1 <= n <= MAX_WIDTH for n in shape[1:])
        sound = sound and len(grid) == len(shape) and all(1 <= n <= MAX_ROWS for n in grid)
        sound = sound and np.dtype(_DTYPES[dtype]).itemsize * prod(grid) <= MAX_CHUNK_BYTES
        sound = sound and _known_codecs(meta["codecs"]) and not meta.get("storage_transformers")
    except (KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise StoreError(f"{where}: the metadata of array {name!r} is malformed or out of bounds")
    endian = {} if dtype == "int8" else {"configuration": {"endian": "little"}}
    plain = {
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [grid[0], *shape[1:]]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [{"name": "bytes", **endian}, {"name": "crc32c"}],
    }
    is_plain = all(meta.get(key) == value for key, value in plain.items()) and grid[0] <= max(1, shape[0])
    return ArraySpec(name, shape, dtype, grid[0], {}, () if is_plain else tuple(grid))


def _known_codecs(codecs: list[dict[str, Any]]) -> bool:
    """Whether only codecs of Zarr's own specification occur, and few, those within shards included."""
    if len(codecs) > _MAX_CODECS:
        return False
    for codec in codecs:
        if codec["name"] not in _CODECS:
            return False
        inner = codec.get("configuration", {})
        if not _known_codecs([*inner.get("codecs", []), *inner.get("index_codecs", [])]):
            return False
    return True


def chunk_buffers(array: ArraySpec, data: np.ndarray) -> Iterator[tuple[str, list[np.ndarray]]]:
    """The chunk files of `data`, each as path and buffers to write one after the other. No copy unless padded."""
    for index in range(array.chunks):
        rows = data[index * array.chunk_rows : (index + 1) * array.chunk_rows]
        short = array.chunk_rows - len(rows)
        if short:
            rows = np.concatenate([rows, np.zeros((short, *array.shape[1:]), rows.dtype)])
        flat = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
        crc = np.frombuffer(np.uint32(google_crc32c.value(flat)).astype("<u4").tobytes(), np.uint8)
        yield array.chunk_file(index), [flat, crc]


def wanted_chunks(array: ArraySpec, runs: Runs) -> list[int]:
    """The chunks that hold the rows of `runs`, ascending."""
    step = array.chunk_rows
    return sorted({c for a, b in runs if b > a for c in range(a // step, -(-b // step))})


def read_rows(files: Files, folder: str, array: ArraySpec, runs: Runs, digests: Digests) -> np.ndarray:
    """The rows of `runs` (ascending, disjoint), back to back. Reads only the chunks that hold them.

    Raises StoreError naming the array and segment for a chunk that is missing or differs from its digest.
    """
    if array.foreign_grid:
        return _read_with_zarr(files, folder, array, runs, digests)
    starts = np.array([r[0] for r in runs], np.int64)
    stops = np.array([r[1] for r in runs], np.int64)
    at = np.concatenate([np.zeros(1, np.int64), np.cumsum(stops - starts)])
    out = np.empty((int(at[-1]), *array.shape[1:]), array.numpy)
    scratch: np.ndarray | None = None
    step = array.chunk_rows
    for index in wanted_chunks(array, runs):
        low, high = index * step, min((index + 1) * step, array.shape[0])
        first = int(np.searchsorted(stops, low, "right"))
        last = int(np.searchsorted(starts, high, "left"))
        if first + 1 == last and starts[first] <= low and stops[first] >= high:
            begin = int(at[first] + low - starts[first])
            _read_chunk(files, folder, array, index, out[begin : begin + high - low], digests)
            continue
        if scratch is None:
            scratch = np.empty((step, *array.shape[1:]), array.numpy)
        _read_chunk(files, folder, array, index, scratch[: high - low], digests)
        for run in range(first, last):
            a, b = max(int(starts[run]), low), min(int(stops[run]), high)
            begin = int(at[run] + a - starts[run])
            out[begin : begin + b - a] = scratch[a - low : b - low]
    return out


def _read_chunk(files: Files, folder: str, array: ArraySpec, index: int, rows: np.ndarray, digests: Digests) -> None:
    name = array.chunk_file(index)
    rest = np.empty(array.chunk_size - rows.nbytes, np.uint8)
    buffers = [rows.reshape(-1).view(np.uint8), rest]
    for _ in range(2):
        what = "differs from the digest in the manifest"
        try:
            digest = files.read_into(f"{folder}/{name}", buffers)
        except FileNotFoundError:
            raise damaged(folder, name, "is missing") from None
        except EOFError as error:
            what = str(error)
        else:
            if digests.get(name, (0, ""))[1] == digest:
                return
        if not files.forget(f"{folder}/{name}"):  # A byte may have changed on the way here: ask once more.
            break
    raise damaged(folder, name, what)


def damaged(folder: str, name: str, what: str) -> StoreError:
    """The one line for a damaged file of a segment; names segment, state and file."""
    state = name.split("/", 1)[0]
    return StoreError(
        f"segment {folder.rsplit('/', 1)[-1]} is damaged: {name} ({state}) {what}; "
        f"restore the folder {folder} from another copy, or delete it and extract again"
    )


def _read_with_zarr(files: Files, folder: str, array: ArraySpec, runs: Runs, digests: Digests) -> np.ndarray:
    """Through zarr, after every file of the array was checked: zarr alone reads a missing chunk as zeros."""
    if not files.local:
        raise damaged(folder, array.name, "was written by another program; pull the store to read it")
    try:
        return _through_zarr(files, folder, array, runs, digests)
    except (StoreError, OSError):
        raise
    except Exception as error:  # Whatever zarr and its codecs make of foreign metadata.
        what = " ".join(str(error).split())[:200]
        raise damaged(folder, array.name, f"cannot be read with zarr ({what})") from error


def _through_zarr(files: Files, folder: str, array: ArraySpec, runs: Runs, digests: Digests) -> np.ndarray:
    from pipeline.store.format.foreign import open_array, read_array

    def check(chunk: str) -> int:
        name = f"{array.name}/{chunk}"
        if name not in digests:
            raise damaged(folder, name, "is not in the manifest")
        check_file(files, folder, name, digests)
        return digests[name][0]

    opened = open_array(str(files.path(folder)), array.name)
    return read_array(opened, array.foreign_grid, check, list(runs)).astype(array.numpy, copy=False)


def check_file(files: Files, folder: str, name: str, digests: Digests) -> None:
    """Raises StoreError if the file's size or digest differs from the manifest's."""
    size, digest = digests[name]
    if files.local:
        found = files.size(f"{folder}/{name}")
        if found is None:
            raise damaged(folder, name, "is missing")
        if found != size:
            raise damaged(folder, name, f"has {found} bytes instead of {size}")
    for _ in range(2):
        try:
            data = files.read(f"{folder}/{name}", size)
        except FileNotFoundError:
            raise damaged(folder, name, "is missing") from None
        if digest_bytes(data) == digest:
            return
        if not files.forget(f"{folder}/{name}"):
            break
    raise damaged(folder, name, "differs from the digest in the manifest")
