"""`TaskTable`: the ordered samples of one task and split, with targets and raw texts.

With a table and the store a teammate trains without the dataset. A table is one file, Parquet
(`store.tables.parquet`; in format 1 gzipped JSON lines, `store.tables.jsonlines`). Its name holds its digest: it never
changes, a damaged one is found.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from pipeline.store.errors import MissingStates, StoreError
from pipeline.store.files import derived
from pipeline.store.files.local import Files, explain
from pipeline.store.format.digest import canonical_json, digest_bytes, digest_json
from pipeline.store.format.keys import Keys
from pipeline.store.format.names import MAX_TABLE_BYTES, TABLE_FORMAT, are_keys, check_task, is_key, is_stream

OLD, NEW = ".jsonl.gz", ".parquet"
_NAME = re.compile(r"(?P<split>.+)-(?P<rows>[0-9]{1,12})-(?P<digest>[0-9a-f]{16})(\.jsonl\.gz|\.parquet)")
_KIND = "activation-task-table"


@dataclass
class TaskTable:
    """`header`: JSON with at least `task` and `split` (labels, metrics, … are the caller's). `keys`: n sample keys in
    task order. `labels`: the target of each, of the type that `header["spec"]["target"]` says: a class index, a number,
    a list of indices, or None. `texts`: raw fields of each. `ids`: what the user calls each; `metas`: what extraction
    knows of each (JSON). These may be empty.

    Of a task with several slots, each of a feature space of its own, every one of these spaces has a table, of the same
    rows: keys, texts and metas are those of its own slot (`header["slot"]`), and `joined` are the keys of the others,
    slot → n keys. {} for other tasks."""

    header: dict[str, Any]
    keys: Sequence[str]
    labels: list[Any]
    texts: Sequence[list[str]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    metas: list[dict[str, Any]] = field(default_factory=list)
    joined: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: Sequence[int]) -> TaskTable:
        """The rows `rows`, in that order."""

        def of(column: Sequence[Any]) -> list[Any]:
            return [column[i] for i in rows] if column else []

        joined = {slot: of(keys) for slot, keys in self.joined.items()}
        columns = (of(self.keys), of(self.labels), of(self.texts), of(self.ids), of(self.metas))
        return TaskTable(self.header, *columns, joined)

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
    """What tells tasks of one name apart: a digest of what the rows of a table were made of, its dataset and how
    targets and texts were read from it. A header that does not say it is known by its `spec` and `provenance`."""
    version = header.get("version")
    return str(version) if is_key(version) else digest_json([header.get("spec"), header.get("provenance")])


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
    from pipeline.store.tables import parquet

    task, split, n = check_task(table.task), check_task(table.split), len(table)
    texts: Sequence[list[str]] = table.texts or [[]] * n
    sized = all(len(column) in (0, n) for column in (table.ids, table.metas))
    columns = [table.keys, *table.joined.values()]
    sized = sized and all(len(column) == n for column in columns) and all(map(is_stream, table.joined))
    sound = all(isinstance(column, Keys) or are_keys(list(column)) for column in columns)
    if not sized or not n == len(table.labels) == len(texts) or not sound:
        raise ValueError("a task table needs as many labels and texts as keys, and keys that are sample keys")
    if not all(math.isfinite(label) for label in table.labels if isinstance(label, float)):
        raise ValueError("a label is a class index, a finite number, a list of indices or None")
    header = {**table.header, "kind_of_file": _KIND, "format": TABLE_FORMAT, "rows": n}
    data = parquet.dump(header, table.keys, table.labels, texts, table.ids, table.metas, table.joined)
    name = f"{folder}/{task}/{split}-{n}-{digest_bytes(data)[:16]}{NEW}"
    if files.size(name) is None:
        try:
            files.make(name.rsplit("/", 1)[0])
            files.publish(name, data)
        except OSError as error:
            raise explain(error, "writing a task table to", files.root, len(data), files.free) from error
    return name


def upgrade_tables(files: Files, folder: str, change: bool = True) -> list[tuple[TableInfo, str]]:
    """Rewrite every table of format 1 below `folder` as format 2; with `change` False only tell which. A table goes
    when the new one was read back equal, so that a kill leaves one of them or both, and readers take either.

    Returns each with "" or what is wrong with it, and then it is left as it is.
    """
    done = []
    for info in list_tables(files, folder):
        if not info.path.endswith(OLD):
            continue
        try:
            old = read_table(files, info)
            if change:
                path = save_table(files, folder, old)
                if read_table(files, replace(info, path=path)) != old:
                    raise StoreError(f"{files.where(path)} does not read back as {files.where(info.path)}")
                files.remove(info.path)
        except (StoreError, ValueError) as error:
            done.append((info, str(error)))
        else:
            done.append((info, ""))
    return done


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
    if len({t.path.endswith(NEW) for t in largest}) == len(largest) == 2:
        headers = [read_header(files, t) for t in largest]
        if headers[0] == headers[1]:  # one table, its rewriting stopped before the old file went
            largest = [t for t in largest if t.path.endswith(NEW)]
    if len(largest) > 1:
        raise StoreError(
            f"{len(largest)} tables of task {task!r}, split {split!r} have {largest[0].rows} rows, and their headers "
            "do not say which is the newest: say which by its path"
        )
    return read_table(files, largest[0])


def read_header(files: Files, info: TableInfo) -> dict[str, Any]:
    """The header of a listed table, without its rows, which are checked but not parsed; of a large table once, as long
    as it does not change. Raises StoreError if the table is damaged or gone."""
    from pipeline.store.tables import jsonlines, parquet

    known, name = derived.cache(), derived.header_name(files, info.path, files.size(info.path) or 0)
    if known is not None and name is not None and (kept := known.get(name)) is not None:
        return _header(files, info, json.loads(kept))
    data, where = _checked(files, info), f"task table {files.where(info.path)}"
    try:
        read = jsonlines.read_header if info.path.endswith(OLD) else parquet.read_header
        header = read(data, where)
    except ValueError as error:
        raise _bad(files, info, str(error)) from error
    if known is not None and name is not None:
        known.put(name, canonical_json(header))
    return _header(files, info, header)


def read_table(files: Files, info: TableInfo) -> TaskTable:
    """A listed table. Raises StoreError if it is damaged or gone."""
    from pipeline.store.tables import jsonlines, parquet

    data, where = _checked(files, info), f"task table {files.where(info.path)}"
    try:
        if info.path.endswith(OLD):
            header, keys, labels, texts = jsonlines.read_rows(data, info.rows, where)
            table = TaskTable(header, keys, labels, texts)
        else:
            header, columns = parquet.read_rows(data, info.rows, where)
            table = TaskTable(header, *columns)
    except ValueError as error:
        raise _bad(files, info, str(error)) from error
    return replace(table, header=_header(files, info, header))


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


def _header(files: Files, info: TableInfo, header: dict[str, Any]) -> dict[str, Any]:
    """`header` as a caller gets it, checked against the name of the file."""
    version, ours = header.pop("format", None), 1 if info.path.endswith(OLD) else TABLE_FORMAT
    if type(version) is int and version > ours:
        raise StoreError(
            f"task table {files.where(info.path)} is of format {version}, this version reads up to {TABLE_FORMAT}: "
            "install a newer one"
        )
    if header.pop("kind_of_file", None) != _KIND or header.pop("rows", None) != info.rows:
        raise _bad(files, info, "its header does not match its rows")
    if (header.get("task"), header.get("split")) != (info.task, info.split):
        raise _bad(files, info, "its header names another task or split")
    return header
