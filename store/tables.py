"""`TaskTable`: the ordered samples of one task and split, with labels and raw texts.

With a table and the store a teammate trains without the dataset. A table is one gzipped file of JSON lines, the header
first, then `[key, label, [texts…]]` a row. Its name holds its digest: it never changes, and a damaged one is found.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pipeline.store.digest import canonical_json, digest_bytes, digest_json
from pipeline.store.document import parse_json
from pipeline.store.errors import MissingStates, StoreError
from pipeline.store.files import Files, explain
from pipeline.store.names import FORMAT, MAX_JSON, MAX_TABLE_BYTES, are_keys, check_task

_NAME = re.compile(r"(?P<split>.+)-(?P<rows>[0-9]{1,12})-(?P<digest>[0-9a-f]{16})\.jsonl\.gz")
_KIND = "activation-task-table"
# Text seldom compresses more than twentyfold; what does more than this is a decompression bomb.
_MAX_RATIO, _SLACK, _MAX_PLAIN = 400, 16 << 20, 8 << 30


@dataclass
class TaskTable:
    """`header`: JSON with at least `task` and `split` (kind, labels, metrics, … are the caller's).
    `keys`: n sample keys in task order. `labels`: class index, value or None. `texts`: raw fields of each."""

    header: dict[str, Any]
    keys: list[str]
    labels: list[int | float | None]
    texts: list[list[str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def task(self) -> str:
        return str(self.header["task"])

    @property
    def split(self) -> str:
        return str(self.header["split"])


@dataclass(frozen=True)
class TableInfo:
    """One stored table: `path` relative to the store, and `rows`."""

    task: str
    split: str
    rows: int
    path: str


def version_of(header: Mapping[str, Any]) -> str:
    """Digest of what the rows of a table were made of: its dataset and how labels and texts were read from it. It
    tells tasks of one name apart."""
    return digest_json([header.get("spec"), header.get("provenance")])


def created_of(header: Mapping[str, Any]) -> str:
    """When a table was made, as its header says, in a form that sorts: ISO 8601, in UTC; "" where it does not say."""
    created = header.get("created")
    try:
        when = datetime.fromisoformat(created) if isinstance(created, str) else None
    except ValueError:
        when = None
    return "" if when is None or when.tzinfo is None else when.astimezone(UTC).isoformat(timespec="microseconds")


def save_table(files: Files, folder: str, table: TaskTable) -> str:
    """Store `table` below `folder`, atomically; returns its path relative to the store. An equal one is not rewritten.

    Raises ValueError if its columns do not fit together, StoreError if it cannot be written.
    """
    task, split = check_task(table.task), check_task(table.split)
    texts: list[list[str]] = table.texts or [[]] * len(table)
    if not len(table.keys) == len(table.labels) == len(texts) or not are_keys(table.keys):
        raise ValueError("a task table needs as many labels and texts as keys, and keys that are sample keys")
    if not all(label is None or math.isfinite(label) for label in table.labels):
        raise ValueError("a label is a class index, a finite number or None")
    head = {**table.header, "kind_of_file": _KIND, "format": FORMAT, "rows": len(table)}
    lines = [canonical_json(head)]
    lines += [
        json.dumps([key, label, list(text)], ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
        for key, label, text in zip(table.keys, table.labels, texts, strict=True)
    ]
    data = gzip.compress(b"\n".join(lines) + b"\n", compresslevel=6, mtime=0)
    name = f"{folder}/{task}/{split}-{len(table)}-{digest_bytes(data)[:16]}.jsonl.gz"
    if files.size(name) is None:
        try:
            files.make(name.rsplit("/", 1)[0])
            files.publish(name, data)
        except OSError as error:
            raise explain(error, "writing a task table to", files.root, len(data), files.free) from error
    return name


def list_tables(files: Files, folder: str) -> list[TableInfo]:
    """Every table below `folder`, by task, split and rows."""
    found = []
    for task in files.names(folder):
        for name in files.names(f"{folder}/{task}"):
            match = _NAME.fullmatch(name)
            if match:
                path = f"{folder}/{task}/{name}"
                found.append(TableInfo(task, match["split"], int(match["rows"]), path))
    return sorted(found, key=lambda t: (t.task, t.split, t.rows, t.path))


def load_table(
    files: Files, folder: str, task: str, split: str, rows: int | None = None, path: str | None = None
) -> TaskTable:
    """The table of `task` and `split` with `rows` rows, or the largest, of equals the newest by its header; or the one
    at `path`.

    Raises MissingStates if there is none (it lists what there is), StoreError if it is damaged, or if headers do not
    say which of several is the newest.
    """
    stored = list_tables(files, folder)
    same = [t for t in stored if t.task == task and t.split == split]
    fitting = [t for t in same if (rows is None or t.rows == rows) and (path is None or t.path == path)]
    if not fitting:
        if same:
            what = f"with {rows} rows: stored are {', '.join(str(t.rows) for t in same)}"
        else:
            names = ", ".join(dict.fromkeys(f"{t.task}/{t.split}" for t in stored))
            what = f"in this feature space: {'stored are ' + names if names else 'no task is stored yet'}"
        raise MissingStates(f"there is no table of task {task!r}, split {split!r} {what}; extract it first")
    largest = [t for t in fitting if t.rows == fitting[-1].rows]
    if len(largest) > 1:
        written = {t.path: created_of(read_header(files, t)) for t in largest}
        largest = [t for t in largest if written[t.path] in (max(written.values()), "")]
    if len(largest) > 1:
        raise StoreError(
            f"{len(largest)} tables of task {task!r}, split {split!r} have {largest[0].rows} rows, and their headers "
            "do not say which is the newest: say which by its path"
        )
    return read_table(files, largest[0])


def read_header(files: Files, info: TableInfo) -> dict[str, Any]:
    """The header of a listed table, without its rows, which are checked but not parsed. Raises StoreError if the table
    is damaged or gone."""
    data = _checked(files, info)
    try:
        first = gzip.GzipFile(fileobj=io.BytesIO(data)).readline(MAX_JSON)
    except (OSError, EOFError, ValueError, MemoryError, zlib.error) as error:
        raise _bad(files, info, str(error) or "it does not fit in memory") from error
    return _header(files, info, first)


def read_table(files: Files, info: TableInfo) -> TaskTable:
    """A listed table. Raises StoreError if it is damaged or gone."""

    def bad(what: str) -> StoreError:
        return _bad(files, info, what)

    data = _checked(files, info)
    size = len(data)
    limit = min(_MAX_RATIO * size + _SLACK, _MAX_PLAIN)
    try:
        plain = gzip.GzipFile(fileobj=io.BytesIO(data)).read(limit + 1)
    except (OSError, EOFError, ValueError, MemoryError, zlib.error) as error:
        raise bad(str(error) or "it does not fit in memory") from error
    if len(plain) > limit:
        raise bad(f"it unpacks to more than {limit} bytes")
    first, *lines = plain.split(b"\n")[:-1] or [b""]
    header = _header(files, info, first)
    if len(lines) != info.rows:
        raise bad("its header does not match its rows")
    try:
        found = json.loads(b"[" + b",".join(lines) + b"]")
        keys = [row[0] for row in found]
        labels = [row[1] for row in found]
        texts = [row[2] for row in found]
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        raise bad("a row is malformed") from error
    sound = len(found) == info.rows and are_keys(keys) and all(map(_is_label, labels))
    if not sound or not all(isinstance(t, list) and all(isinstance(s, str) for s in t) for t in texts):
        raise bad("a row is malformed")
    return TaskTable(header, keys, labels, texts)


def _bad(files: Files, info: TableInfo, what: str) -> StoreError:
    where = files.where(info.path)
    return StoreError(f"task table {where} is damaged: {what}; restore it from another copy, or delete and extract")


def _checked(files: Files, info: TableInfo) -> bytes:
    """The table's file, whose digest is the one in its name."""
    size = files.size(info.path)
    if size is None:
        raise _bad(files, info, "it is missing")
    if size > MAX_TABLE_BYTES:
        raise _bad(files, info, f"it has {size} bytes, more than the {MAX_TABLE_BYTES} allowed")
    data = files.read(info.path, size)
    if digest_bytes(data)[:16] != info.path.rsplit("-", 1)[1][:16] and files.forget(info.path):
        data = files.read(info.path, size)
    if digest_bytes(data)[:16] != info.path.rsplit("-", 1)[1][:16]:
        raise _bad(files, info, "its digest does not match its name")
    return data


def _header(files: Files, info: TableInfo, first: bytes) -> dict[str, Any]:
    """The header of a table from its first line."""
    where = files.where(info.path)
    header = parse_json(first, f"task table {where}")
    version = header.pop("format", None)
    if type(version) is int and version > FORMAT:
        raise StoreError(
            f"task table {where} is of format {version}, this version reads up to {FORMAT}: install a newer one"
        )
    if header.pop("kind_of_file", None) != _KIND or header.pop("rows", None) != info.rows:
        raise _bad(files, info, "its header does not match its rows")
    if (header.get("task"), header.get("split")) != (info.task, info.split):
        raise _bad(files, info, "its header names another task or split")
    return header


def _is_label(value: object) -> bool:
    """Whether a tensor can hold it: a class index, a finite number, or None."""
    if type(value) is int:
        return abs(value) < 1 << 63
    return value is None or (type(value) is float and math.isfinite(value))
