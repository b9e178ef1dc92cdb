"""Batches from blocks: the rows of the wanted samples, gathered and, where wanted, decoded.

Long samples are copied whole, from the block into the batch's own memory, converted on the way: each value is read once
and written once. Short ones (a decoder's few positions) are gathered by row and then decoded, since a copy a sample
would cost more than what it moves. Python runs once per block and state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.extract.batch import Batch, stream_of
from pipeline.extract.encoding import EncodedTensor, decode, rescale
from pipeline.store.format.samples import Samples, rows_of
from pipeline.train.data.buffers import Buffers

LONG = 8192  # bytes a sample on average, from which on samples are copied one by one


@dataclass(frozen=True)
class Loaded:
    """A block in memory. `offsets`: stream → (samples + 1,) int64 row offsets. `states` and `columns`, (rows,) int32,
    as tensors."""

    samples: Samples
    states: dict[str, EncodedTensor]
    offsets: dict[str, np.ndarray]
    columns: dict[str, Tensor]

    @classmethod
    def of(cls, samples: Samples) -> Loaded:
        return cls(
            samples,
            {name: EncodedTensor.of(encoded) for name, encoded in samples.states.items()},
            {stream: samples.offsets(stream) for stream in samples.lengths},
            {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in samples.columns.items()},
        )

    def to(self, device: torch.device) -> Loaded:
        """The same with states and columns on `device`."""
        states = {n: e.to(device) for n, e in self.states.items()}
        columns = {n: c.to(device) for n, c in self.columns.items()}
        return Loaded(replace(self.samples, states={}), states, self.offsets, columns)

    def pick(self, name: str, slot: np.ndarray) -> list[Tensor]:
        """The rows of state `name` of the samples `slot`, as stored: views, not copies."""
        offsets, values = self.offsets[stream_of(name)], self.states[name].values
        return [values[a:b] for a, b in zip(offsets[slot].tolist(), offsets[slot + 1].tolist(), strict=True)]


@dataclass(frozen=True)
class BlockPart:
    """The samples of a batch that lie in one block: its samples `slot` (m,) int64."""

    block: Loaded
    slot: np.ndarray


@dataclass(frozen=True)
class RowRuns:
    """Which rows of each of several sources follow each other: `begin`, `end` in the result, and the rows, int64."""

    runs: list[tuple[int, int, Tensor]]

    @classmethod
    def of(cls, rows: Sequence[np.ndarray], device: torch.device | str = "cpu") -> RowRuns:
        runs, at = [], 0
        for wanted in rows:
            runs.append((at, at + len(wanted), torch.from_numpy(wanted).to(device)))
            at += len(wanted)
        return cls(runs)

    @property
    def total(self) -> int:
        return self.runs[-1][1] if self.runs else 0

    def take(self, sources: Sequence[Tensor]) -> Tensor:
        """The rows of all sources, copied once into one tensor."""
        if len(sources) == 1:
            return sources[0].index_select(0, self.runs[0][2])
        out = sources[0].new_empty(self.runs[-1][1], *sources[0].shape[1:])
        for source, (begin, end, wanted) in zip(sources, self.runs, strict=True):
            torch.index_select(source, 0, wanted, out=out[begin:end])
        return out


def assemble(
    parts: Sequence[BlockPart],
    states: Sequence[str],
    columns: Sequence[str],
    dtype: torch.dtype | None = torch.float32,
    pin: bool = False,
    device: torch.device | str = "cpu",
    buffers: Buffers | None = None,
) -> Batch:
    """The samples of all `parts`, in their order, as a Batch without labels and index. At least one part is needed;
    its slot may be empty. States are decoded to `dtype`; with None they stay as stored, but float32 where rows have
    scales. `pin` puts them in page-locked memory. `device`: where the blocks are. `buffers`: memory for what is large
    and neither on another device nor page-locked."""
    streams = list(dict.fromkeys(stream_of(name) for name in (*states, *columns))) or list(parts[0].block.offsets)
    rows = {s: RowRuns.of([rows_of(p.block.offsets[s], p.slot) for p in parts], device) for s in streams}
    lengths = {s: np.concatenate([p.block.samples.lengths[s][p.slot] for p in parts]).astype(np.int64) for s in streams}

    def place(tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if pin else tensor

    out: dict[str, Tensor] = {}
    for name in states:
        stream, values = stream_of(name), parts[0].block.states[name].values
        if rows[stream].total * values.shape[1] * values.itemsize > LONG * len(lengths[stream]):
            out[name] = copied(parts, name, lengths[stream], rows[stream], dtype, pin, buffers)
        else:
            picked = gather([p.block.states[name] for p in parts], rows[stream])
            out[name] = place(decode(picked, dtype))
    side: dict[str, Tensor] = {}
    for name in columns:
        side[name] = place(rows[stream_of(name)].take([p.block.columns[name] for p in parts]).long())
    return Batch(out, side, lengths)


def copied(
    parts: Sequence[BlockPart],
    name: str,
    lengths: np.ndarray,
    rows: RowRuns,
    dtype: torch.dtype | None,
    pin: bool,
    buffers: Buffers | None,
) -> Tensor:
    """The state `name` of the samples of all parts: a copy a sample, all made in one call."""
    sources = [p.block.states[name] for p in parts]
    scale = scales(sources, rows)
    # Scaled rows are rebuilt in float32, as `decode` does.
    kind = (dtype or sources[0].values.dtype) if scale is None else torch.float32
    shape, device = (rows.total, sources[0].width), sources[0].values.device
    if buffers is None or pin or device.type != "cpu":
        out = torch.empty(shape, dtype=kind, device=device, pin_memory=pin)
    else:
        out = buffers.empty(*shape, kind)
    torch._foreach_copy_(out.split(lengths.tolist()), [v for p in parts for v in p.block.pick(name, p.slot)])
    return out if scale is None else rescale(out, scale).to(dtype or torch.float32)


def scales(sources: Sequence[EncodedTensor], rows: RowRuns) -> Tensor | None:
    """The scales of the given rows, None where no source has any."""
    found = [e.scale for e in sources]
    known = next((s for s in found if s is not None), None)
    if known is None:
        return None
    # A block in which no float16 row needed scaling has no exponents; beside one that has, they are 0.
    return rows.take([known.new_zeros(e.rows) if s is None else s for e, s in zip(sources, found, strict=True)])


def gather(sources: Sequence[EncodedTensor], rows: RowRuns) -> EncodedTensor:
    """The given rows of each source, one source after another, copied once. Sources share one number format."""
    return EncodedTensor(rows.take([e.values for e in sources]), scales(sources, rows))
