"""`Segment`: a sealed segment, opened for reading. It never changes, so one may be kept and shared between threads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from pipeline.store.errors import MissingStates, StoreError
from pipeline.store.files.derived import manifest_of
from pipeline.store.files.local import Files
from pipeline.store.format.arrays import ArraySpec, Runs, check_file, damaged, parse_group, read_rows, wanted_chunks
from pipeline.store.format.digest import digest_bytes
from pipeline.store.format.document import parse_json
from pipeline.store.format.formats import Encoded
from pipeline.store.format.keys import Keys
from pipeline.store.format.manifest import StateInfo
from pipeline.store.format.names import MAX_JSON, MAX_SMALL_JSON, is_temporary, segment_path, stream_of
from pipeline.store.format.samples import Samples, offsets_of

STORED_DTYPES = {"float32": "float32", "bfloat16": "uint16", "float16": "float16", "int8": "int8"}


class NotSealed(StoreError):
    """The segment has no manifest."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a store: which `segment`, which `file` in it, and `what` is wrong."""

    segment: str
    file: str
    what: str


class Segment:
    """A sealed segment of a feature space. Raises StoreError if its manifest is damaged, foreign or newer.

    `keys`: n sample keys. `lengths`: stream → (n,) int64. `states`: name → StateInfo. `columns`: names. `base`: id of
    the segment that this one supplements, or None. `contents`: path below it → (size, xxh3-128) of each file.
    `nbytes`: bytes of all of them. `seal`: size and xxh3-128 of the manifest.json that was read.
    """

    def __init__(self, files: Files, space: str, segment: str) -> None:
        self.files, self.space, self.id = files, space, segment
        self.folder = segment_path(space, segment)
        where = files.where(f"{self.folder}/manifest.json")
        name = f"{self.folder}/manifest.json"
        try:
            data = files.read(name, MAX_JSON)
            digest = digest_bytes(data)
            try:
                manifest = manifest_of(data, digest, where, space, segment)
            except StoreError:
                if not files.forget(name):
                    raise
                data = files.read(name, MAX_JSON)
                digest = digest_bytes(data)
                manifest = manifest_of(data, digest, where, space, segment)
        except FileNotFoundError:
            raise NotSealed(f"segment {segment} is not there or not sealed: {where} is missing") from None
        self.contents = manifest.files
        self.seal = len(data), digest
        self.base, self.keys, self.lengths = manifest.base, manifest.keys, manifest.lengths
        self.states: dict[str, StateInfo] = manifest.states
        self.columns = manifest.columns
        self.provenance: dict[str, Any] = manifest.provenance
        self.created = manifest.created
        self.nbytes = sum(size for size, _ in manifest.files.values())

    def __repr__(self) -> str:
        return f"Segment({self.id}, {len(self.keys)} samples, {', '.join(self.states)})"

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def path(self) -> Path:
        """Its folder, a Zarr v3 group."""
        return Path(self.files.where(self.folder))

    @cached_property
    def offsets(self) -> dict[str, np.ndarray]:
        """stream → (n + 1,) int64 row offsets."""
        return {stream: offsets_of(lengths) for stream, lengths in self.lengths.items()}

    def row_bytes(self, name: str) -> int:
        """Bytes one row of a state (with its scale) or column takes."""
        return self.states[name].row_bytes if name in self.states else 4

    @cached_property
    def arrays(self) -> dict[str, ArraySpec]:
        """The segment's arrays, after all files were found with their sizes and the shapes agree with the manifest.

        Raises StoreError. Reads one small file and asks for the size of the others, once.
        """
        # Far away, asking costs more than it finds: every chunk is checked when it is read anyway.
        found = self._wrong_sizes() if self.files.local else []
        if found:
            raise damaged(self.folder, found[0].file, found[0].what)
        if "zarr.json" not in self.contents:
            raise damaged(self.folder, "zarr.json", "is not in the manifest")
        check_file(self.files, self.folder, "zarr.json", self.contents)
        where = f"{self.folder}/zarr.json"
        arrays = parse_group(parse_json(self.files.read(where, MAX_SMALL_JSON), where), where)
        for name, shape, dtype in self.expected():
            array = arrays.get(name)
            if array is None or array.shape != shape or array.dtype != dtype:
                raise damaged(
                    self.folder, f"{name}/zarr.json", f"does not say {dtype} {list(shape)}, the manifest does"
                )
            for index in range(0 if array.foreign_grid else array.chunks):
                # Ends at the first absent chunk, so an absurd shape costs nothing.
                file = array.chunk_file(index)
                if self.contents.get(file, (0, ""))[0] != array.chunk_size:
                    raise damaged(self.folder, file, "is not in the manifest with the size its shape demands")
        return arrays

    def read(
        self, states: Iterable[str] = (), columns: Iterable[str] = (), samples: Sequence[tuple[int, int]] | None = None
    ) -> Samples:
        """The samples of the runs `samples` (start, stop), all by default, with the states and columns asked for.

        Reads only the chunks that hold them; every chunk is checked against its digest. Raises MissingStates, or
        StoreError naming segment and state for anything damaged.
        """
        runs = [(0, len(self))] if samples is None else list(samples)
        if any(not 0 <= a <= b <= len(self) for a, b in runs):
            raise ValueError(f"samples {runs} are not within the {len(self)} of segment {self.id}")
        states, columns = list(states), list(columns)
        absent = tuple(n for n in states if n not in self.states) + tuple(n for n in columns if n not in self.columns)
        if absent:
            raise MissingStates(f"segment {self.id} does not hold {', '.join(absent)}", 0, absent)
        rows = {stream: [(int(o[a]), int(o[b])) for a, b in runs] for stream, o in self.offsets.items()}
        if self.files.local:
            arrays = [(self.arrays[name], rows[stream_of(name)]) for name in states]
            self.files.will_need(
                f"{self.folder}/{array.chunk_file(i)}"
                for array, wanted in arrays
                if not array.foreign_grid
                for i in wanted_chunks(array, wanted)
            )
        return Samples(
            Keys.joined(self.keys[a:b] for a, b in runs),
            {s: np.concatenate([v[a:b] for a, b in runs] or [v[:0]]) for s, v in self.lengths.items()},
            {name: self._state(name, rows[stream_of(name)]) for name in states},
            {name: self._rows(name, rows[stream_of(name)]) for name in columns},
        )

    def verify(self, deep: bool = False) -> list[Problem]:
        """What is wrong: names and sizes, and with `deep` every digest and the agreement of metadata. Never raises
        for damage."""
        if (files := self.files.fresh()) is not self.files:
            try:
                return Segment(files, self.space, self.id).verify(deep)
            except StoreError as error:
                return [Problem(self.id, "manifest.json", str(error))]
        found = self._wrong_sizes()
        if not deep:
            return found
        known = {p.file for p in found}
        for name in self.contents:
            if name not in known:
                try:
                    check_file(self.files, self.folder, name, self.contents)
                except (StoreError, OSError) as error:
                    found.append(Problem(self.id, name, str(error)))
        # A web server lists no folder of any depth; what it has beyond the manifest is never read.
        there = set(self.files.walk(self.folder)) if self.files.searchable else set()
        extra = {n for n in there - set(self.contents) - {"manifest.json", "writer.json"} if not is_temporary(n)}
        found += [Problem(self.id, name, "is not in the manifest") for name in sorted(extra)]
        if not found:
            try:
                for stream, lengths in self.lengths.items():
                    whole = [(0, len(self))]
                    if not np.array_equal(self._rows(f"{stream}.lengths", whole), lengths):
                        found.append(Problem(self.id, f"{stream}.lengths", "differs from the manifest"))
            except StoreError as error:
                found.append(Problem(self.id, "zarr.json", str(error)))
        return found

    def _wrong_sizes(self) -> list[Problem]:
        found = []
        sizes = self.files.sizes(self.folder, self.contents)
        for name, (size, _) in self.contents.items():
            actual = sizes[name]
            if actual is None:
                found.append(Problem(self.id, name, "is missing"))
            elif actual != size:
                found.append(Problem(self.id, name, f"has {actual} bytes instead of {size}"))
        return found

    def expected(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Name, shape and stored type of every array that the manifest implies."""
        rows = {stream: int(o[-1]) for stream, o in self.offsets.items()}
        out: list[tuple[str, tuple[int, ...], str]] = []
        for name, info in self.states.items():
            out.append((name, (rows[stream_of(name)], info.width), STORED_DTYPES[info.format]))
            if info.scale:
                kind = "float32" if info.format == "int8" else "int8"
                out.append((f"{name}.scale", (rows[stream_of(name)],), kind))
        out += [(name, (rows[stream_of(name)],), "int32") for name in self.columns]
        out += [(f"{stream}.lengths", (len(self),), "int32") for stream in self.lengths]
        return out

    def _rows(self, name: str, runs: Runs) -> np.ndarray:
        return read_rows(self.files, self.folder, self.arrays[name], runs, self.contents)

    def _state(self, name: str, runs: Runs) -> Encoded:
        info = self.states[name]
        values = self._rows(name, runs)
        if info.format == "bfloat16":
            values = values.view(bfloat16)
        return Encoded(values, self._rows(f"{name}.scale", runs) if info.scale else None)
