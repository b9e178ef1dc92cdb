"""Writing samples anew in other segments: what is sound of a damaged bundle, and many small bundles as few large ones.

New segments are sealed before the old ones are put aside, so a kill in between leaves duplicates and never a hole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.store.errors import StoreError
from pipeline.store.format.arrays import ArraySpec, check_file
from pipeline.store.format.document import dump_document
from pipeline.store.format.keys import Keys
from pipeline.store.format.names import SEGMENT_BYTES, space_path, stream_of
from pipeline.store.format.samples import Samples, side_by_side
from pipeline.store.segments.blocks import runs_of
from pipeline.store.segments.index import Bundle, bundles
from pipeline.store.segments.segment import Segment
from pipeline.store.space import Space

KIND = "activation-superseded"


def read_bundle(bundle: Bundle, names: Sequence[str], positions: np.ndarray) -> Samples:
    """The samples at `positions` (ascending) with the states and columns `names`."""
    runs = runs_of(positions) if len(positions) else ()

    def read(segment: Segment) -> Samples:
        mine = [n for n in names if bundle.holder[n] is segment]
        return segment.read([n for n in mine if n in segment.states], [n for n in mine if n in segment.columns], runs)

    out = side_by_side(read(s) for s in dict.fromkeys([bundle.base, *(bundle.holder[n] for n in names)]))
    streams = {stream_of(name) for name in names}
    out.lengths = {stream: v for stream, v in out.lengths.items() if stream in streams}
    return out


def sound(bundle: Bundle) -> np.ndarray:
    """(samples, names) bool over the names of `bundle.holder`: what can be read. Reads every byte."""
    out = np.ones((len(bundle.base), len(bundle.holder)), bool)
    for place, (name, segment) in enumerate(bundle.holder.items()):
        specs = _specs(segment)
        offsets = segment.offsets[stream_of(name)]
        arrays = [name, f"{name}.scale"] if name in segment.states and segment.states[name].scale else [name]
        for array in arrays:
            if array not in specs:
                out[:, place] = False
                continue
            spec = specs[array]
            for index in range(spec.chunks):
                try:
                    check_file(segment.files, segment.folder, spec.chunk_file(index), segment.contents)
                except (StoreError, OSError, KeyError):
                    low, high = index * spec.chunk_rows, (index + 1) * spec.chunk_rows
                    out[(offsets[:-1] < high) & (offsets[1:] > low), place] = False
    return out


def _specs(segment: Segment) -> dict[str, ArraySpec]:
    """The segment's arrays; where its metadata is damaged, those that its manifest and our own chunking imply."""
    try:
        return segment.arrays
    except (StoreError, OSError):
        specs = {}
        for name, shape, dtype in segment.expected():
            spec = ArraySpec.new(name, shape, dtype)
            listed = segment.contents
            if all(listed.get(spec.chunk_file(i), (0, ""))[0] == spec.chunk_size for i in range(spec.chunks)):
                specs[name] = spec
        segment.__dict__["arrays"] = specs
        return specs


def salvage(space: Space, bundle: Bundle) -> tuple[list[Segment], int, int]:
    """Write what is sound of a damaged bundle as new segments, one for each set of states that samples still have.

    Returns them, how many samples lost something and how many lost everything. The old segments stay.
    """
    names = list(bundle.holder)
    intact = sound(bundle)
    columns = [i for i, n in enumerate(names) if n not in bundle.holder[n].states]
    whole = intact.all(axis=1)
    # Without its inputs a sample could not be completed: it is extracted again as if it were new.
    intact &= np.all(intact[:, columns], axis=1, keepdims=True)
    written = []
    for pattern in np.unique(intact, axis=0):
        kept = [n for n, good in zip(names, pattern, strict=True) if good]
        if not any(n in bundle.holder[n].states for n in kept):
            continue
        positions = np.flatnonzero((intact == pattern).all(axis=1))
        writer = space.writer(_provenance([bundle], "repair"))
        writer.add(read_bundle(bundle, kept, positions))
        if writer.samples:
            written.append(writer.seal())
    rescued = sum(len(s) for s in written)
    return written, int((~whole).sum()), len(bundle.base) - rescued


def compact(space: Space, segment_bytes: int = SEGMENT_BYTES) -> dict[str, int]:
    """Write duplicates, supplements and small segments anew as few segments in which every sample stands once.

    The old segments are marked as superseded: no new reader sees them, those who read them now may go on, and `gc`
    removes them later. Returns counts of samples, old and new segments.
    """
    found = bundles(space.segments())
    count: dict[str, int] = {}
    for bundle in found:
        for key in bundle.base.keys:
            count[key] = count.get(key, 0) + 1
    doubled = [f for f in found if f.supplements or any(count[k] > 1 for k in f.base.keys)]
    small = [f for f in found if f.base.nbytes < segment_bytes // 2 and f not in doubled]
    chosen = sorted(doubled + (small if len(small) > 1 or doubled else []), key=lambda f: f.base.id)
    done: dict[str, int] = {"old": 0, "new": 0, "samples": 0}
    if not chosen:
        return done
    where: dict[str, list[tuple[int, int]]] = {}
    for number, bundle in enumerate(chosen):
        for position, key in enumerate(bundle.base.keys):
            where.setdefault(key, []).append((number, position))
    # Samples that come from the same bundles in the same way are read and written together.
    groups: dict[tuple[tuple[int, tuple[str, ...]], ...], list[list[int]]] = {}
    for places in where.values():
        have: set[str] = set()
        parts, positions = [], []
        for number, position in sorted(places, key=lambda p: -len(chosen[p[0]].holder)):
            fresh = tuple(sorted(set(chosen[number].holder) - have))
            if fresh:
                parts.append((number, fresh))
                positions.append(position)
                have |= set(fresh)
        groups.setdefault(tuple(parts), []).append(positions)
    written: list[Segment] = []
    writers: dict[tuple[Any, ...], Any] = {}
    for parts_of, rows in groups.items():
        for piece in _pieces(chosen, parts_of, rows, segment_bytes):
            merged = _merge(chosen, parts_of, piece)
            shape = (
                tuple(sorted(merged.states)),
                tuple(sorted(merged.columns)),
                tuple(sorted((n, e.width) for n, e in merged.states.items())),
            )
            writer = writers.setdefault(shape, space.writer(_provenance(chosen, "compact")))
            writer.add(merged)
            if writer.nbytes >= segment_bytes:
                written.append(writer.seal())
    written += [writer.seal() for writer in writers.values() if writer.samples]
    old = [segment for bundle in chosen for segment in (bundle.base, *bundle.supplements)]
    supersede(space, [s.id for s in old], [s.id for s in written])
    return {"old": len(old), "new": len(written), "samples": len(where)}


def supersede(space: Space, old: Sequence[str], new: Sequence[str]) -> None:
    """Mark segments as written anew in `new`. Supplements first: a base is hidden only when they are."""
    folder = f"{space_path(space.id)}/superseded"
    space.files.make(folder)
    for segment in sorted(old, reverse=True):
        document = {"kind": KIND, "format": 1, "by": list(new)}
        space.files.publish(f"{folder}/{segment}", dump_document(document))


def _pieces(
    chosen: Sequence[Bundle], parts: Sequence[tuple[int, tuple[str, ...]]], rows: list[list[int]], limit: int
) -> list[list[list[int]]]:
    """`rows` cut into runs of about `limit` bytes, so that memory stays bounded."""
    size = sum(chosen[n].holder[name].nbytes / max(1, len(chosen[n].base)) for n, names in parts for name in names[:1])
    step = max(1, int(limit / max(1.0, size)))
    return [rows[i : i + step] for i in range(0, len(rows), step)]


def _merge(
    chosen: Sequence[Bundle], parts: Sequence[tuple[int, tuple[str, ...]]], rows: Sequence[Sequence[int]]
) -> Samples:
    """Samples put together from several bundles, in the order of `rows`."""
    out: Samples | None = None
    for column, (number, names) in enumerate(parts):
        positions = np.array([row[column] for row in rows], np.int64)
        order = np.argsort(positions, kind="stable")
        read = read_bundle(chosen[number], names, positions[order])
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        read = take(read, back)
        if out is None:
            out = read
        else:
            for stream in set(out.lengths) & set(read.lengths):
                if not np.array_equal(out.lengths[stream], read.lengths[stream]):
                    raise StoreError(f"one sample has different lengths of {stream} in two segments: not compacted")
            out.lengths |= read.lengths
            out.states |= read.states
            out.columns |= read.columns
    assert out is not None
    return out


def take(samples: Samples, order: np.ndarray) -> Samples:
    """The samples at `order`, in that order."""
    rows: dict[str, np.ndarray] = {}
    for stream, lengths in samples.lengths.items():
        starts, counts = samples.offsets(stream)[order], lengths[order]
        ends = np.cumsum(counts)
        rows[stream] = np.arange(int(counts.sum())) + np.repeat(starts - (ends - counts), counts)
    states = {name: e.take(rows[stream_of(name)]) for name, e in samples.states.items()}
    return Samples(
        Keys.of(samples.keys).take(order),
        {stream: v[order] for stream, v in samples.lengths.items()},
        states,
        {name: column[rows[stream_of(name)]] for name, column in samples.columns.items()},
    )


def _provenance(chosen: Sequence[Bundle], why: str) -> dict[str, Any]:
    """The provenance of the old segments, which the new ones keep."""
    old = [s for bundle in chosen for s in (bundle.base, *bundle.supplements)]
    distinct: list[dict[str, Any]] = []
    for segment in old:
        plain = {k: v for k, v in segment.provenance.items() if k != "rewritten"}
        if plain not in distinct:
            distinct.append(plain)
    first = distinct[0] if distinct else {}
    return {**first, "rewritten": {"why": why, "from": [s.id for s in old], "others": distinct[1:]}}
