"""What files of a feature space name must be there: tables beside tables, samples of tables, bases of supplements, what
`compact` wrote anew.

A deleted folder leaves nothing damaged behind, so that only those who name its content can miss it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.store.errors import StoreError
from pipeline.store.files.local import Files
from pipeline.store.format.manifest import load_manifest
from pipeline.store.format.names import MAX_JSON, QUARANTINE, is_key, segment_path, space_path
from pipeline.store.segments.segment import Problem, Segment
from pipeline.store.tables.records import Record, list_records, read_record, record_path
from pipeline.store.tables.table import TableInfo, list_tables, read_table, version_of

if TYPE_CHECKING:
    from pipeline.store.space import Space


@dataclass(frozen=True)
class TableRows:
    """What a table says of its samples."""

    info: TableInfo
    header: Mapping[str, Any]
    keys: Sequence[str]

    @property
    def name(self) -> tuple[str, str, int, str]:
        """What records and other tables call it: task, split, rows, version."""
        return self.info.task, self.info.split, self.info.rows, version_of(self.header)


@dataclass
class Named:
    """The tables and the records of extractions of a feature space, and (path, what) of those that are `damaged`."""

    tables: list[TableRows] = field(default_factory=list)
    records: dict[str, Record] = field(default_factory=dict)
    damaged: list[tuple[str, str]] = field(default_factory=list)
    unread: list[TableInfo] = field(default_factory=list)


def read_named(files: Files, folder: str) -> Named:
    """Every byte of the tables and records below `folder`, each read once."""
    named = Named()
    for info in list_tables(files, folder):
        try:
            table = read_table(files, info)
            named.tables.append(TableRows(info, table.header, table.keys))
        except StoreError as error:
            named.damaged.append((info.path, str(error)))
            named.unread.append(info)
    for path in list_records(files, folder):
        try:
            named.records[path] = read_record(files, path)
        except StoreError as error:
            named.damaged.append((path, str(error)))
    return named


def missing_tables(files: Files, folder: str, named: Named) -> list[tuple[str, str]]:
    """Tables and records below `folder` that others name and that are gone: (path, what) each."""
    there = {rows.name for rows in named.tables}
    # What is damaged is not gone as well.
    damaged = {(t.task, t.split, t.rows) for t in named.unread}
    gone: dict[tuple[str, str], str] = {}

    def need(task: str, version: str, rows: Mapping[str, Any], by: str) -> None:
        for split, count in rows.items():
            known = (task, split, count, version) in there or (task, split, count) in damaged
            if type(count) is int and not known:
                path = f"{folder}/{task}/{str(split)[:80]}-{count}"
                gone[path, version] = f"is missing: it was written with {by}; extract again"

    for rows in named.tables:
        task, beside, record = rows.info.task, rows.header.get("beside"), rows.header.get("extracted")
        if isinstance(beside, dict):
            need(task, version_of(rows.header), beside, rows.info.path)
        if record is not None and (not is_key(record) or files.size(record_path(folder, task, record)) is None):
            path = f"{folder}/{task}/extracted-{str(record)[:32]}.json"
            gone[path, ""] = "is missing: tables name it; extract again, which writes it anew"
    for path, kept in named.records.items():
        need(kept.task, kept.version, kept.rows, path)
    found = [(path, what) for (path, _), what in gone.items()]
    tasks = {rows.info.task for rows in named.tables} | {t.task for t in named.unread}
    for task in files.names(folder):
        if task not in tasks and all(name[0] == "." for name in files.names(f"{folder}/{task}")):
            found.append((f"{folder}/{task}", "holds no table any more: extract again"))
    return found


def unfound(space: Space, named: Named) -> list[Problem]:
    """Samples and segments that are named and not stored. What is damaged, and what is missing of tables, is left to
    those who look for that. `named` must have been read before: the samples of a table are sealed before it is written,
    whoever writes at this moment."""
    try:
        segments, stored = space.segments(), space.stored()
    except StoreError:
        return []
    known = _put_aside(space)
    return _bases(segments) + _successors(space, segments, stored) + _samples(named, stored, known)


def _bases(segments: Sequence[Segment]) -> list[Problem]:
    there = {s.id for s in segments}
    what = "supplements {}, which is gone: restore that, or let `repair` put this aside"
    orphans = [s for s in segments if s.base is not None and s.base not in there]
    return [Problem(s.id, "manifest.json", what.format(s.base)) for s in orphans]


def _successors(space: Space, segments: Sequence[Segment], stored: Mapping[str, frozenset[str]]) -> list[Problem]:
    found, live = [], {s.id for s in segments}
    for name in space.superseded():
        try:
            gone = 0 if name in live else sum(k not in stored for k in Segment(space.files, space.id, name).keys)
        except StoreError:  # removed by now, or damaged
            continue
        if gone:
            what = f"{gone:,} of its samples were written anew in a segment that is gone: `repair` shows this one again"
            found.append(Problem(name, f"{space_path(space.id)}/superseded/{name}", what))
    return found


def _put_aside(space: Space) -> set[str]:
    """Samples of segments in quarantine: `repair` has said that they are gone."""
    files, known = space.files, set[str]()
    prefix = f"{QUARANTINE}/{segment_path(space.id, '').replace('/', '--')}"
    for name in files.names(QUARANTINE):
        path = f"{QUARANTINE}/{name}/manifest.json"
        if path.startswith(prefix):
            segment = path[len(prefix) :].rsplit("-", 1)[0]
            with suppress(StoreError, FileNotFoundError):
                known.update(load_manifest(files.read(path, MAX_JSON), files.where(path), space.id, segment).keys)
    return known


def _samples(named: Named, stored: Mapping[str, frozenset[str]], known: Collection[str]) -> list[Problem]:
    found, keys = [], {}
    for rows in named.tables:
        keys[rows.name] = rows.keys
        if gone := sum(key not in stored and key not in known for key in rows.keys):
            found.append(Problem("", rows.info.path, f"{gone:,} of its samples are not stored: extract again"))
    for path, record in named.records.items():
        states = frozenset(record.states)
        listed = [keys.get((record.task, split, rows, record.version), []) for split, rows in record.rows.items()]
        there = {key for part in listed for key in part if key in stored and key not in known}
        if gone := sum(not states <= stored[key] for key in there):
            found.append(Problem("", path, f"{gone:,} of its samples lack states stored with them: extract again"))
    return found
