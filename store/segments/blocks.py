"""Blocks: runs of whole samples that are read together, the unit of streaming.

A plan says for each wanted sample which block holds it and where. A block is small and can be pickled: a Dask task
carries it to a worker, which opens the segment (kept open from then on) and reads only the chunks it needs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from pipeline.store.errors import MissingStates
from pipeline.store.files.local import Files
from pipeline.store.files.places import open_files
from pipeline.store.format.names import SEGMENT_BYTES, stream_of
from pipeline.store.format.samples import Samples, side_by_side
from pipeline.store.format.sorting import sorted_places
from pipeline.store.segments.index import Bundle, Index
from pipeline.store.segments.segment import Segment


@dataclass(frozen=True)
class SegmentPart:
    """What a block takes from one segment."""

    segment: str
    states: tuple[str, ...]
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """A run of wanted samples of one base segment and its supplements.

    `runs`: sample ranges (start, stop) in the segment, ascending; the samples between them are neither returned nor
    counted. `samples`: how many there are in all. `nbytes`: their stored bytes over the wanted states and columns.
    """

    store: str
    space: str
    parts: tuple[SegmentPart, ...]
    runs: tuple[tuple[int, int], ...]
    samples: int
    nbytes: int


@dataclass
class BlockPlan:
    """Where the n wanted samples are. `block`: (n,) int64 into `blocks`. `slot`: (n,) int64, the sample's place among
    the samples of its block. `lengths`: stream → (n,) int64. `nbytes`: stored bytes of all blocks."""

    blocks: list[Block]
    block: np.ndarray
    slot: np.ndarray
    lengths: dict[str, np.ndarray]
    nbytes: int


def plan_blocks(
    files: Files,
    space: str,
    index: Index,
    keys: Sequence[str],
    states: Sequence[str],
    columns: Sequence[str] = (),
    max_block_bytes: int = SEGMENT_BYTES,
    groups: np.ndarray | None = None,
) -> BlockPlan:
    """Blocks of at most `max_block_bytes` that cover `keys`; only a single larger sample exceeds it.

    `groups`: (n,) int64; samples of two groups share no block. A key that occurs twice (in a group) is read once.
    Raises MissingStates if a sample or a state of one is not stored.
    """
    names = [*dict.fromkeys((*states, *columns))]
    bundle, position = index.locate(keys, names)
    _refuse_missing(index, bundle, names)
    streams = [*dict.fromkeys(stream_of(name) for name in names)]
    apart = bundle
    if groups is not None:
        apart = np.unique(np.stack([bundle, groups], 1), axis=0, return_inverse=True)[1].ravel()
    ordered, order = sorted_places(apart)
    starts_anew = ordered[1:] != ordered[:-1]
    borders = [0, *(np.flatnonzero(starts_anew) + 1).tolist(), len(ordered)] if len(ordered) else []
    members = bundle[order[borders[:-1]]].tolist()
    del bundle, apart, ordered, starts_anew  # of a sample each, as is what follows
    plan = BlockPlan([], np.zeros(len(keys), np.int64), np.zeros(len(keys), np.int64), {}, 0)
    plan.lengths = {stream: np.zeros(len(keys), np.int64) for stream in streams}
    for number, (low, high) in zip(members, pairwise(borders), strict=True):
        where = order[low:high]
        member = index.bundles[number]
        wanted, place = np.unique(position[where], return_inverse=True)
        sizes = np.zeros(len(wanted), np.int64)
        for stream in streams:
            lengths = member.lengths(stream)[wanted]
            plan.lengths[stream][where] = lengths[place]
            row = sum(member.holder[n].row_bytes(n) for n in names if stream_of(n) == stream)
            sizes += lengths * row
        parts = parts_of(member, states, columns)
        cuts = cuts_of(sizes, max_block_bytes)
        starts = np.array(cuts[:-1], np.int64)
        within = np.searchsorted(starts, place, "right") - 1
        plan.block[where] = len(plan.blocks) + within
        plan.slot[where] = place - starts[within]
        for a, b in pairwise(cuts):
            nbytes = int(sizes[a:b].sum())
            plan.blocks.append(Block(files.root, space, parts, runs_of(wanted[a:b]), b - a, nbytes))
            plan.nbytes += nbytes
    return plan


def read_block(block: Block) -> Samples:
    """The samples of `block`, in segment order, as stored. Raises StoreError naming segment and state for damage."""

    def read(part: SegmentPart) -> Samples:
        segment = _segment(block.store, block.space, part.segment, os.getpid())
        return segment.read(part.states, part.columns, block.runs)

    return side_by_side(read(part) for part in block.parts)


@lru_cache(maxsize=4096)
def _segment(store: str, space: str, segment: str, process: int) -> Segment:
    """Sealed segments never change, so an opened one is good for as long as the process lives; `process`: a fork must
    not share its connections."""
    return Segment(open_files(store), space, segment)


def parts_of(bundle: Bundle, states: Sequence[str], columns: Sequence[str]) -> tuple[SegmentPart, ...]:
    """What a block of `bundle` takes from each of its segments."""
    segments = {bundle.base.id: bundle.base} | {s.id: s for s in (bundle.holder[n] for n in (*states, *columns))}
    parts = []
    for segment in segments.values():
        mine = tuple(n for n in dict.fromkeys(states) if bundle.holder[n] is segment)
        sides = tuple(n for n in dict.fromkeys(columns) if bundle.holder[n] is segment)
        if mine or sides:
            parts.append(SegmentPart(segment.id, mine, sides))
    return tuple(parts) or (SegmentPart(bundle.base.id, (), ()),)


def cuts_of(sizes: np.ndarray, limit: int) -> list[int]:
    """Cuts [0, …, n] into pieces of about equal size, none above `limit` unless it is one sample."""
    ends = np.cumsum(sizes)
    total = int(ends[-1])
    pieces = max(1, -(-total // limit))
    target = min(limit, -(-total // pieces) + int(sizes.max()))
    cuts = [0]
    while cuts[-1] < len(sizes):
        before = int(ends[cuts[-1] - 1]) if cuts[-1] else 0
        cuts.append(max(cuts[-1] + 1, int(np.searchsorted(ends, before + target, "right"))))
    return cuts


def runs_of(positions: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Ascending positions → ranges of consecutive ones."""
    breaks = np.flatnonzero(np.diff(positions) != 1)
    starts = positions[np.concatenate([[0], breaks + 1])]
    stops = positions[np.concatenate([breaks, [len(positions) - 1]])] + 1
    return tuple(zip(starts.tolist(), stops.tolist(), strict=True))


def _refuse_missing(index: Index, bundle: np.ndarray, names: Sequence[str]) -> None:
    absent = int((bundle < 0).sum())
    lacking: dict[str, None] = {}
    partial = 0
    for number, count in zip(*np.unique(bundle[bundle >= 0], return_counts=True), strict=True):
        missing = index.bundles[number].missing(names)
        lacking |= dict.fromkeys(missing)
        partial += int(count) if missing else 0
    states = tuple(name for name in names if name in lacking)
    if not absent and not states:
        return
    said = [f"{absent:,} of {len(bundle):,} samples are not in this feature space"] if absent else []
    said += [f"{', '.join(states)} not stored for {partial:,} of {len(bundle):,} samples"] if states else []
    raise MissingStates(f"{' and '.join(said)}: extract them first", absent, states)
