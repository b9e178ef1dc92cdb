"""Task tables of format 2: one Parquet file, the header as JSON in the metadata of the file.

Columns: `key` (16 bytes), `target` (of the type that the task says), `inputs` (texts or file names), `id` and `meta`
(JSON, what extraction knows of the sample), null where there is none. Of a task with several slots also `key/SLOT`
(16 bytes) for each slot but the table's own. No column has a dictionary, so that the sizes
that a file states bound what it unpacks to.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.store.format.digest import canonical_json
from pipeline.store.format.document import parse_json
from pipeline.store.format.keys import Keys
from pipeline.store.format.names import MAX_JSON, MAX_UNPACKED, MAX_UNPACKED_RATIO, UNPACKED_SLACK, is_stream
from pipeline.store.tables.texts import Texts

_HEADER = b"activation"
_BOX = [(name, pa.float64()) for name in ("left", "top", "width", "height", "area")]
_BOX += [("class", pa.int32()), ("crowd", pa.bool_()), ("difficult", pa.bool_())]
# Type of a task's targets → type of the column: an index or a number a sample, a list of indices, the bytes of a PNG
# file, a list of objects, or nothing.
TARGETS: dict[str, pa.DataType] = {
    "class": pa.int32(),
    "number": pa.float64(),
    "classes": pa.list_(pa.int32()),
    "tags": pa.list_(pa.int32()),
    "mask": pa.binary(),
    "boxes": pa.list_(pa.struct(_BOX)),
    "instances": pa.list_(pa.struct([*_BOX, ("outline", pa.string())])),
    "none": pa.null(),
}
_KEY, _TEXTS, _TEXT = pa.binary(16), pa.list_(pa.string()), pa.string()
_LONE = re.compile("[\ud800-\udfff]")

_MISMATCH, _MALFORMED = "its header does not match its rows", "a row is malformed"
_NAMES, _JOINED = ["key", "target", "inputs", "id", "meta"], "key/"

Columns = tuple[Keys, list[Any], Texts, list[str], list[dict[str, Any]], dict[str, Keys]]


def dump(
    header: Mapping[str, Any],
    keys: Sequence[str],
    targets: Sequence[Any],
    texts: Sequence[Sequence[str]],
    ids: Sequence[str],
    metas: Sequence[Mapping[str, Any]],
    joined: Mapping[str, Sequence[str]],
) -> bytes:
    """A table as the bytes of its file. Texts with halves of surrogate pairs, which names of files may hold and UTF-8
    may not, are escaped, and the header says so. Raises ValueError for targets that are not all of one type."""
    kind = _type_of(header.get("spec"), targets)
    if odd := next((repr(target)[:80] for target in targets if not _fits(target, kind)), None):
        raise ValueError(f"the target {odd} is not of the others' type, {kind}")
    escaped = any(_LONE.search(text) for row in texts for text in row)
    header = {**header, "escaped": True} if escaped else header
    fields = [
        pa.field("key", _KEY, nullable=False),
        pa.field("target", kind),
        *(pa.field("inputs", _TEXTS), pa.field("id", _TEXT), pa.field("meta", _TEXT)),
        *(pa.field(f"{_JOINED}{slot}", _KEY, nullable=False) for slot in joined),
    ]
    columns: list[list[Any]] = [
        [bytes.fromhex(key) for key in keys],
        list(targets),
        [[_escaped(text) if escaped else text for text in row] for row in texts],
        list(ids) or [None] * len(keys),
        [canonical_json(dict(meta)).decode("ascii") for meta in metas] or [None] * len(keys),
        *([bytes.fromhex(key) for key in others] for others in joined.values()),
    ]
    try:
        arrays = [pa.array(column, field.type) for column, field in zip(columns, fields, strict=True)]
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(f"a target does not fit its type: {_line(error)}") from error
    schema, out = pa.schema(fields), io.BytesIO()
    plain: dict[str, Any] = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
    with pq.ParquetWriter(out, schema, store_schema=False, **plain) as writer:
        writer.write_table(pa.table(arrays, schema))
        writer.add_key_value_metadata({_HEADER: canonical_json(dict(header))})
    return out.getvalue()


def read_header(data: bytes, where: str) -> dict[str, Any]:
    """The header of the table `data`. Raises StoreError or ValueError for one that cannot be read."""
    header = _header(_opened(data), where)
    header.pop("escaped", None)
    return header


def read_rows(data: bytes, rows: int, where: str) -> tuple[dict[str, Any], Columns]:
    """Header and columns (keys, targets, texts, ids, metas, keys of other slots) of the table `data` of `rows` rows;
    without ids, metas or other slots these are empty. Raises StoreError or ValueError for anything that no writer of
    ours makes."""
    file = _opened(data)
    header = _header(file, where)
    _bound(file, len(data), rows)
    # One column after the other: of millions of rows all of them together would fill a gigabyte.
    keys = _keys_of(_column(file, "key", rows))
    target = _column(file, "target", rows)
    if not _are_targets(target):
        raise ValueError(_MALFORMED)
    targets = target.to_pylist()
    del target
    texts, ids = _column(file, "inputs", rows), _column(file, "id", rows)
    if texts.null_count or pc.list_flatten(texts).null_count:
        raise ValueError(_MALFORMED)
    named = [] if ids.null_count == rows else [i or "" for i in ids.to_pylist()]
    del ids
    meta = _column(file, "meta", rows)
    metas: list[dict[str, Any]] = []
    if meta.null_count < rows:
        metas = [{} if text is None else parse_json(text.encode(), where) for text in meta.to_pylist()]
    others = [name for name in file.schema_arrow.names if name.startswith(_JOINED)]
    joined = {name.removeprefix(_JOINED): _keys_of(_column(file, name, rows)) for name in others}
    read = Texts(texts, bool(header.pop("escaped", False)))
    return header, (keys, targets, read, named, metas, joined)


def _column(file: pq.ParquetFile, name: str, rows: int) -> pa.ChunkedArray:
    """One column of `rows` rows. Raises ValueError for one that cannot be read."""
    try:
        # Nothing to share out, and a thread of Arrow's may abort the process when it ends (apache/arrow#34314).
        table = file.read(columns=[name], use_threads=False)
        table.validate(full=True)  # that texts are UTF-8, before one is looked at
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise ValueError(_line(error)) from error
    if len(table) != rows:
        raise ValueError(_MISMATCH)
    return table[name]


def _opened(data: bytes) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(pa.BufferReader(data), thrift_string_size_limit=MAX_JSON)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise ValueError(_line(error)) from error


def _header(file: pq.ParquetFile, where: str) -> dict[str, Any]:
    return parse_json((file.metadata.metadata or {}).get(_HEADER, b""), where)


def _bound(file: pq.ParquetFile, size: int, rows: int) -> None:
    """ValueError for columns that are not those of a table, and for a file that would fill the memory."""
    limit = min(MAX_UNPACKED_RATIO * size + UNPACKED_SLACK, MAX_UNPACKED)
    about, schema = file.metadata, file.schema_arrow
    others = schema.names[len(_NAMES) :]
    known = schema.names[: len(_NAMES)] == _NAMES and all(is_stream(name.removeprefix(_JOINED)) for name in others)
    known = known and all(name.startswith(_JOINED) for name in others) and len(set(others)) == len(others)
    target = schema.field("target").type if known else None
    types = [_KEY, target, _TEXTS, _TEXT, _TEXT, *[_KEY] * len(others)]
    if target not in TARGETS.values() or not all(a.equals(b) for a, b in zip(schema.types, types, strict=True)):
        raise ValueError("its columns are not those of a task table")
    if about.num_rows != rows:
        raise ValueError(_MISMATCH)
    parts = [about.row_group(g).column(c) for g in range(about.num_row_groups) for c in range(about.num_columns)]
    if any(part.has_dictionary_page or "DICTIONARY" in " ".join(part.encodings) for part in parts):
        raise ValueError("a column has a dictionary")
    if 16 * (1 + len(others)) * rows > limit or sum(part.total_uncompressed_size for part in parts) > limit:
        raise ValueError(f"it unpacks to more than {limit} bytes")


def _type_of(spec: Any, targets: Sequence[Any]) -> pa.DataType:
    """The column's type: what the task says, else what the targets are."""
    if isinstance(spec, dict) and spec.get("target") in TARGETS:
        return TARGETS[spec["target"]]
    some = [target for target in targets if target is not None]
    if not some:
        return TARGETS["none"]
    if any(isinstance(target, bytes) for target in some):
        return TARGETS["mask"]
    if any(isinstance(target, list) for target in some):
        first = next((one for target in some for one in target), None)
        return TARGETS["classes" if not isinstance(first, dict) else "instances" if "outline" in first else "boxes"]
    return TARGETS["class" if all(type(target) is int for target in some) else "number"]


def _fits(target: Any, kind: pa.DataType) -> bool:
    """Whether `target` is a value of the column; Arrow itself would cut a fraction off."""
    if pa.types.is_list(kind) and pa.types.is_struct(kind.value_type):
        names = {field.name for field in kind.value_type}
        return target is None or all(isinstance(one, dict) and one.keys() == names for one in target)
    if target is None or pa.types.is_list(kind):
        return target is None or (isinstance(target, list) and all(type(i) is int for i in target))
    if pa.types.is_binary(kind):
        return isinstance(target, bytes)
    if pa.types.is_floating(kind):
        return type(target) in (int, float)
    return pa.types.is_integer(kind) and type(target) is int


def _are_targets(column: pa.ChunkedArray) -> bool:
    """Whether all numbers are finite and no list holds a null, nor an object in one."""
    if pa.types.is_list(column.type):
        held = pc.list_flatten(column)
        within = range(held.type.num_fields) if pa.types.is_struct(held.type) else ()
        parts = [held, *(pc.struct_field(held, i) for i in within)]
        return all(not part.null_count and _are_finite(part) for part in parts)
    return _are_finite(column)


def _are_finite(column: pa.ChunkedArray | pa.Array) -> bool:
    return not pa.types.is_floating(column.type) or pc.all(pc.is_finite(column)).as_py() is not False


def _keys_of(column: pa.ChunkedArray) -> Keys:
    """What a column of 16 bytes a row holds. Raises ValueError for a null in it."""
    if column.null_count:
        raise ValueError(_MISMATCH)
    keys, start = Keys(*np.empty((2, len(column)), np.uint64)), 0
    for chunk in filter(len, column.chunks):
        words = np.frombuffer(chunk.buffers()[1], ">u8", 2 * len(chunk), 16 * chunk.offset).reshape(-1, 2)
        keys.high[start : start + len(chunk)], keys.low[start : start + len(chunk)] = words.T
        start += len(chunk)
    return keys


def _escaped(text: str) -> str:
    return _LONE.sub(lambda m: f"\\u{ord(m[0]):04x}", text.replace("\\", "\\\\"))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or "it does not fit in memory"
