"""`Space`: one feature space of a store. States of two spaces never mix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.store.errors import StoreError
from pipeline.store.files.local import Files
from pipeline.store.files.places import open_files
from pipeline.store.format.digest import digest_json
from pipeline.store.format.document import load_document
from pipeline.store.format.names import (
    FORMAT,
    MAX_JSON,
    MAX_SMALL_JSON,
    SEGMENT_BYTES,
    is_key,
    is_segment,
    is_temporary,
    segment_path,
    space_path,
)
from pipeline.store.segments.analysis import BLOCK_BYTES, rows_of_state
from pipeline.store.segments.blocks import BlockPlan, plan_blocks
from pipeline.store.segments.index import Index, Lookup
from pipeline.store.segments.segment import NotSealed, Problem, Segment
from pipeline.store.segments.unsealed import lost_manifest, sweep
from pipeline.store.segments.writer import SegmentWriter
from pipeline.store.tables.records import Record, list_records, read_record, save_record
from pipeline.store.tables.table import (
    TableInfo,
    TaskTable,
    list_tables,
    load_table,
    read_header,
    read_table,
    save_table,
    upgrade_tables,
)
from pipeline.store.upkeep.references import missing_tables, read_named, unfound

KIND = "activation-space"
REMOVING = "removing.json"  # a note of who is removing the space; from then on it is not there
LOST = "is missing: it was deleted, or not all of the segment has been copied; restore it, or extract again"


def has_space(files: Files, space: str) -> bool:
    """Whether there is a feature space `space`, and nobody has begun to remove it."""
    home = space_path(space)
    return files.size(f"{home}/space.json") is not None and files.size(f"{home}/{REMOVING}") is None


def lost_identity(files: Files, space: str) -> bool:
    """Whether there are files of a feature space, but no `space.json`; False where one is being made or removed."""
    home = space_path(space)
    inside = files.names(home)
    if {"space.json", REMOVING} & set(inside):
        return False
    held = files.walk(home) if files.searchable else [n for name in inside for n in files.names(f"{home}/{name}")]
    whole = [name for name in held if not is_temporary(name)]
    return bool(whole) and all(files.size(f"{home}/{name}") is None for name in ("space.json", REMOVING))


def still_sealed(files: Files, space: str, segment: str, problems: list[Problem]) -> list[Problem]:
    """`problems`; none if the segment has lost its seal since, to a `gc` or `repair` that runs at this moment."""
    there = not problems or files.size(f"{segment_path(space, segment)}/manifest.json") is not None
    return problems if there else []


def _reopened(root: str, space: str) -> Space:
    return Space(open_files(root), space)


class Space:
    """An opened feature space: `id`, the `identity` it is the digest of, and its folder `path`.

    Raises StoreError if it is damaged, or its identity is not the one its id names.
    """

    def __init__(self, files: Files, space: str) -> None:
        self.files, self.id = files, space
        name = f"{space_path(space)}/space.json"
        where = files.where(name)
        if not is_key(space) or not has_space(files, space):
            raise StoreError(f"there is no feature space {space} in {files.root}")
        document = load_document(files.read(name, MAX_SMALL_JSON), where, KIND)
        identity = document.get("identity")
        if not isinstance(identity, dict) or document.get("id") != space or digest_json(identity) != space:
            raise StoreError(f"{where} is damaged or foreign: its identity is not that of {space}; restore it")
        version = identity.get("format_version")
        if type(version) is int and version > FORMAT:
            raise StoreError(
                f"{where} is of format {version}, this version reads up to {FORMAT}: install a newer version"
            )
        self.identity: dict[str, Any] = identity
        self._opened: dict[str, Segment] = {}
        self._index: tuple[tuple[str, ...], Index] | None = None

    def __repr__(self) -> str:
        return f"Space({self.id[:12]}, {self.format}, in {self.files.root})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens it by its place: what was read of it is not carried along."""
        return _reopened, (self.files.root, self.id)

    @property
    def path(self) -> Path:
        return Path(self.files.where(space_path(self.id)))

    @property
    def format(self) -> str | None:
        """The number format of its states."""
        value = self.identity.get("format")
        return value if isinstance(value, str) else None

    def segments(self) -> list[Segment]:
        """Sealed segments by id, which sorts by time. Asks the disk each time; an opened segment is kept.

        Raises StoreError for a sealed segment whose manifest is damaged.
        """
        opened = {}
        names = self._segment_names()
        fresh = [name for name in names if name not in self._opened]
        new = dict(zip(fresh, self.files.each(self._open, fresh), strict=True))
        for name in names:
            segment = self._opened.get(name) or new[name]
            if segment is not None:
                opened[name] = segment
        self._opened = opened
        hidden = set(self.superseded())
        # A supplement sealed while its base was being compacted still needs it.
        hidden -= {s.base for s in opened.values() if s.base in hidden and s.id not in hidden}
        return [segment for name, segment in opened.items() if name not in hidden]

    def superseded(self) -> list[str]:
        """Segments whose samples `compact` has written anew; still there for those who read them now."""
        names = self.files.names(f"{space_path(self.id)}/superseded")
        return [name for name in names if is_segment(name)]

    def successors(self, segment: str) -> list[str]:
        """The segments that hold the samples of a superseded one. Raises StoreError if its marker is damaged."""
        name = self._marker(segment)
        try:
            by = load_document(self.files.read(name, MAX_JSON), self.files.where(name), "activation-superseded")["by"]
        except (FileNotFoundError, KeyError):
            by = None
        if not isinstance(by, list) or not all(is_segment(s) for s in by):
            raise StoreError(f"{self.files.where(name)} is malformed: delete it")
        return by

    def _marker(self, segment: str) -> str:
        return f"{space_path(self.id)}/superseded/{segment}"

    def _open(self, name: str) -> Segment | None:
        """The segment `name` if it is sealed."""
        try:
            return self._segment(name)
        except NotSealed:
            return None

    def _segment(self, name: str) -> Segment:
        segment = Segment(self.files, self.id, name)
        for state, info in segment.states.items():
            if self.format is not None and info.format != self.format:
                raise StoreError(
                    f"segment {name}: {state} is {info.format}, this feature space holds {self.format}: delete it"
                )
        return segment

    def writer(self, provenance: dict[str, Any], base: Segment | None = None) -> SegmentWriter:
        """A writer for one segment after another; with `base`, for a supplement of that segment."""
        return SegmentWriter(self.files, self.id, self.format, provenance, base)

    def sweep(self, older_than: float | None = None) -> int:
        """Remove unsealed segments whose writer is dead on this host; returns how many.

        With `older_than` (seconds) also those that nothing was written to for so long, of whatever host.
        """
        return sweep(self.files, self.id, self._segment_names(), older_than)

    def index(self) -> Index:
        """The key index over the segments sealed now."""
        segments = self.segments()
        ids = tuple(segment.id for segment in segments)
        if self._index is None or self._index[0] != ids:
            self._index = (ids, Index(segments))
        return self._index[1]

    def stored(self) -> dict[str, frozenset[str]]:
        """Sample key → states and columns stored of it."""
        return self.index().states()

    def lookup(self, keys: Sequence[str], states: Sequence[str], columns: Sequence[str] = ()) -> Lookup:
        """Which of `keys` are stored with all `states` and `columns`, which not at all, and what the others lack."""
        return self.index().lookup(keys, [*states, *columns])

    def plan(
        self,
        keys: Sequence[str],
        states: Sequence[str],
        columns: Sequence[str] = (),
        max_block_bytes: int = SEGMENT_BYTES,
        groups: np.ndarray | None = None,
    ) -> BlockPlan:
        """Blocks that cover `keys`, those of two `groups` (n,) apart. Raises MissingStates if a sample or a state of
        one is not stored."""
        return plan_blocks(self.files, self.id, self.index(), keys, states, columns, max_block_bytes, groups)

    def to_dask(
        self, state: str, keys: Sequence[str] | None = None, dtype: str = "float32", block_bytes: int = BLOCK_BYTES
    ) -> Any:
        """State `state` of every sample that has it as a lazy Dask array (rows, width), one chunk a block of about
        `block_bytes` as stored; nothing is read before something is computed, and every chunk is checked then.

        `keys`: only these samples, a task table's say. Rows stand sample after sample, as `samples` gives them. Runs on
        this machine or on a `distributed` cluster whose workers see the store under the same path. Raises MissingStates
        where no sample, or not every one of `keys`, has the state.
        """
        return rows_of_state(self, state, keys, block_bytes, dtype).to_dask()

    def samples(
        self, state: str, keys: Sequence[str] | None = None, dtype: str = "float32", block_bytes: int = BLOCK_BYTES
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Key and (rows, width) of each sample, in the order of `to_dask`; one block is in memory at a time."""
        return rows_of_state(self, state, keys, block_bytes, dtype).samples()

    def verify(self, deep: bool = False) -> list[Problem]:
        """What is wrong with any sealed segment or table: names and sizes, with `deep` every digest, and whether all
        that something names is there. Nothing is believed of a copy in the cache: all is read where the store is."""
        if (files := self.files.fresh()) is not self.files:
            return Space(files, self.id).verify(deep)
        names = self._segment_names()
        if not deep:
            listed = self.files.listed(f"{space_path(self.id)}/segments")
            doubtful = names if listed is None else self._doubtful(names, listed)
            return [problem for some in self.files.each(self._verify_segment, doubtful) for problem in some]
        found = [problem for name in names for problem in self._verify_segment(name, deep)]
        for name in self.superseded():
            try:
                self.successors(name)
            except StoreError as error:
                found.append(Problem("", self._marker(name), str(error)))
        named = read_named(self.files, self._tasks)
        tables = [*named.damaged, *missing_tables(self.files, self._tasks, named)]
        return found + [Problem("", path, what) for path, what in tables] + unfound(self, named)

    def _doubtful(self, names: Sequence[str], listed: Mapping[str, int]) -> list[str]:
        """The segments `names` but those that are sealed and whole by what is `listed`."""

        def whole(name: str) -> bool:
            try:
                segment = self._segment(name)
            except StoreError:
                return False
            files = {"manifest.json": segment.seal[0]} | {n: size for n, (size, _) in segment.contents.items()}
            return all(listed.get(f"{name}/{n}") == size for n, size in files.items())

        sealed = [name for name in names if f"{name}/manifest.json" in listed]
        good = {name for name, fine in zip(sealed, self.files.each(whole, sealed), strict=True) if fine}
        return [name for name in names if name not in good]

    def _verify_segment(self, name: str, deep: bool = False) -> list[Problem]:
        folder = segment_path(self.id, name)
        try:
            # Far away it may be gone, and a copy of it be here.
            if not self.files.local and self.files.size(f"{folder}/manifest.json") is None:
                raise NotSealed
            return still_sealed(self.files, self.id, name, self._segment(name).verify(deep))
        except NotSealed:
            return [Problem(name, "manifest.json", LOST)] if lost_manifest(self.files, folder) else []
        except StoreError as error:
            return [Problem(name, "manifest.json", str(error))]

    def save_table(self, table: TaskTable) -> Path:
        """Store a task table; returns its path. Never changes or removes another."""
        return Path(self.files.where(save_table(self.files, self._tasks, table)))

    def upgrade_tables(self, change: bool = True) -> list[tuple[TableInfo, str]]:
        """Rewrite tables of format 1 as format 2, see `store.tables.table.upgrade_tables`."""
        return upgrade_tables(self.files, self._tasks, change)

    def tables(self) -> list[TableInfo]:
        """Every stored task table, by task, split and rows."""
        return list_tables(self.files, self._tasks)

    def load_table(self, task: str, split: str, rows: int | None = None, path: str | None = None) -> TaskTable:
        """The table with `rows` rows, or the largest, of equals the newest; or the one at `path` (a TableInfo's).

        Raises MissingStates if there is none, StoreError if it is damaged or headers do not say which is the newest.
        """
        return load_table(self.files, self._tasks, task, split, rows, path)

    def read_table(self, info: TableInfo) -> TaskTable:
        """A table that `tables` listed. Raises StoreError if it is damaged or gone."""
        return read_table(self.files, info)

    def read_header(self, info: TableInfo) -> dict[str, Any]:
        """The header of a table that `tables` listed. Raises StoreError if the table is damaged or gone."""
        return read_header(self.files, info)

    def save_record(self, record: Record) -> None:
        """Store the record of an extraction; never changes or removes another."""
        save_record(self.files, self._tasks, record)

    def records(self) -> list[Record]:
        """The records of extractions, those that can be read."""
        found = []
        for path in list_records(self.files, self._tasks):
            with suppress(StoreError):
                found.append(read_record(self.files, path))
        return found

    @cached_property
    def _tasks(self) -> str:
        return f"{space_path(self.id)}/tasks"

    def _segment_names(self) -> list[str]:
        return [name for name in self.files.names(f"{space_path(self.id)}/segments") if is_segment(name)]
