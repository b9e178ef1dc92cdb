"""What files of a feature space name must be there: samples of tables, bases of supplements, what `compact` wrote anew.

A deleted folder leaves nothing damaged behind, so that only those who name its content can miss it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from pipeline.store.errors import StoreError
from pipeline.store.manifest import load_manifest
from pipeline.store.names import MAX_JSON, QUARANTINE, segment_path, space_path
from pipeline.store.records import Record, record_path
from pipeline.store.segment import Problem, Segment
from pipeline.store.tables import version_of

if TYPE_CHECKING:
    from pipeline.store.space import Space


Tables = Mapping[str, tuple[tuple[str, str, int, str], list[str]]]


def unfound(space: Space) -> list[Problem]:
    """Samples and segments that are named and not stored. What is damaged, and what is missing of tables, is left to
    those who look for that. Reads all tables."""
    # Tables first: their samples are sealed before they are written, whoever writes at this moment.
    tables, records = _tables(space), space.records()
    try:
        segments, stored = space.segments(), space.stored()
    except StoreError:
        return []
    known = _put_aside(space)
    return _bases(segments) + _successors(space, segments, stored) + _samples(space, tables, records, stored, known)


def _tables(space: Space) -> Tables:
    """Path → (task, split, rows, version), sample keys."""
    found = {}
    for info in space.tables():
        with suppress(StoreError):
            table = space.read_table(info)
            found[info.path] = (info.task, info.split, info.rows, version_of(table.header)), table.keys
    return found


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


def _samples(
    space: Space,
    tables: Tables,
    records: Sequence[Record],
    stored: Mapping[str, frozenset[str]],
    known: Collection[str],
) -> list[Problem]:
    found, keys = [], {}
    for path, (name, listed) in tables.items():
        keys[name] = listed
        if gone := sum(key not in stored and key not in known for key in listed):
            found.append(Problem("", path, f"{gone:,} of its samples are not stored: extract again"))
    for record in records:
        states = frozenset(record.states)
        named = [keys.get((record.task, split, rows, record.version), []) for split, rows in record.rows.items()]
        there = {key for part in named for key in part if key in stored and key not in known}
        if gone := sum(not states <= stored[key] for key in there):
            path = record_path(f"{space_path(space.id)}/tasks", record.task, record.id)
            found.append(Problem("", path, f"{gone:,} of its samples lack states stored with them: extract again"))
    return found
