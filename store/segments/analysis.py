"""One state of all samples, for analysis: its rows as a lazy Dask array, and its samples one after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.store.errors import MissingStates, StoreError
from pipeline.store.format.formats import decode
from pipeline.store.format.names import is_state, stream_of
from pipeline.store.format.samples import Samples, offsets_of
from pipeline.store.segments.blocks import Block, cuts_of, parts_of, read_block, runs_of
from pipeline.store.segments.index import Index

if TYPE_CHECKING:
    from pipeline.store.space import Space

BLOCK_BYTES = 32 << 20


class StateRows:
    """The rows of `state` in the order of `blocks`, read when it is sliced: an array as Dask understands them.

    `ends`: (blocks + 1,) int64 row offsets of the blocks, the first 0. `shape` (rows, width). It can be pickled.
    """

    ndim = 2

    def __init__(self, state: str, blocks: Sequence[Block], ends: np.ndarray, width: int, dtype: np.dtype) -> None:
        self.state, self.blocks, self.ends, self.dtype = state, list(blocks), ends, dtype
        self.shape = (int(ends[-1]), width)

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        """Sealed segments never change: blocks name what is read."""
        return "StateRows", self.state, str(self.dtype), self.blocks

    def __getitem__(self, index: Any) -> np.ndarray:
        """As of a NumPy array, for integers and slices along the rows; reads the blocks that hold them."""
        first, *rest = index if isinstance(index, tuple) else (index,)
        wanted = range(self.shape[0])[first]
        if isinstance(wanted, int):
            return self._read(wanted, wanted + 1)[(0, *rest)]
        if not wanted:
            return np.empty((0, self.shape[1]), self.dtype)[(slice(None), *rest)]
        low = min(wanted[0], wanted[-1])
        rows = self._read(low, max(wanted[0], wanted[-1]) + 1)
        if wanted.step != 1:
            rows = rows[np.arange(wanted.start, wanted.stop, wanted.step) - low]
        return rows[(slice(None), *rest)]

    def _read(self, low: int, high: int) -> np.ndarray:
        first, last = np.searchsorted(self.ends, low, "right") - 1, np.searchsorted(self.ends, high, "left")
        pieces = []
        for number in range(int(first), int(last)):
            begin = int(self.ends[number])
            piece = self._rows(read_block(self.blocks[number]))
            pieces.append(piece[max(0, low - begin) : high - begin])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _rows(self, samples: Samples) -> np.ndarray:
        return np.asarray(decode(samples.states[self.state])).astype(self.dtype, copy=False)

    def samples(self) -> Iterator[tuple[str, np.ndarray]]:
        """Key and (rows, width) of each sample."""
        for block in self.blocks:
            samples = read_block(block)
            rows, offsets = self._rows(samples), samples.offsets(stream_of(self.state))
            for key, begin, end in zip(samples.keys, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
                yield key, rows[begin:end]

    def to_dask(self) -> Any:
        """A `dask.array.Array` (rows, width), one chunk a block."""
        import dask.array as da

        heights = np.diff(self.ends)
        chunks = (tuple(heights[heights > 0].tolist()) or (0,), (self.shape[1],))
        return da.from_array(self, chunks=chunks, fancy=False, meta=np.empty((0, 0), self.dtype))


def rows_of_state(space: Space, state: str, keys: Sequence[str] | None, block_bytes: int, dtype: str) -> StateRows:
    """`state` of the samples `keys`, or of all that have it, in blocks of at most `block_bytes` as stored."""
    if not is_state(state):
        raise MissingStates(f"{state!r} cannot name a hidden state: `pipeline store status` lists those there are")
    index = space.index()
    holding = [f for f in index.bundles if state in f.holder and state in f.holder[state].states]
    if not holding:
        raise MissingStates(f"{space}: no sample has {state}: `pipeline store status` lists the states", 0, (state,))
    widths = {bundle.holder[state].states[state].width for bundle in holding}
    if len(widths) > 1:
        raise StoreError(f"{space}: {state} has rows of widths {sorted(widths)}: verify the store")
    if keys is None:
        blocks, heights = _all_blocks(space, index, state, block_bytes)
    else:
        keys = list(dict.fromkeys(keys))  # a sample that stands in several rows of a task counts once
        plan = space.plan(keys, [state], max_block_bytes=block_bytes)
        blocks = plan.blocks
        heights = np.zeros(len(blocks), np.int64)
        np.add.at(heights, plan.block, plan.lengths[stream_of(state)])
    return StateRows(state, blocks, offsets_of(heights), widths.pop(), np.dtype(dtype))


def _all_blocks(space: Space, index: Index, state: str, block_bytes: int) -> tuple[list[Block], np.ndarray]:
    """Blocks of all samples that have `state`, each sample once, and how many rows each block has."""
    blocks: list[Block] = []
    heights: list[int] = []
    for number, bundle in enumerate(index.bundles):
        if state not in bundle.holder:
            continue
        # A sample that stands in several bundles is read where a plan would read it.
        chosen, position = index.locate(bundle.base.keys, [state])
        mine = np.flatnonzero((chosen == number) & (position == np.arange(len(position))))
        if not len(mine):
            continue
        lengths = bundle.lengths(stream_of(state))[mine]
        sizes = lengths * bundle.holder[state].row_bytes(state)
        parts = parts_of(bundle, [state], [])
        for a, b in pairwise(cuts_of(sizes, block_bytes)):
            runs, nbytes = runs_of(mine[a:b]), int(sizes[a:b].sum())
            blocks.append(Block(space.files.root, space.id, parts, runs, b - a, nbytes))
            heights.append(int(lengths[a:b].sum()))
    return blocks, np.array(heights, np.int64)
