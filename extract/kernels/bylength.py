"""Samples of like length together, so that a grid holds less padding.

A batch's grid is as wide as its longest text; of RTE's 32 texts nearly half of the positions are padding, and of the
products of attention two thirds. On a CPU, where time goes with the products, a batch is cut into a few parts of like
length. On a GPU a part's kernels are too small to pay, and the grid stays whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.extract.batch import Batch, stream_of
from pipeline.extract.kernels import enabled
from pipeline.extract.stackable import Stackable
from pipeline.store.format.samples import offsets_of, rows_of

PARTS = 4  # more would cut little more padding, and each costs the same kernel calls again
SAMPLES = 4  # in a part at least
SAVED = 0.1  # of the grid's positions; for less it stays whole


@dataclass(frozen=True)
class Parts:
    """`batches`: of some samples each, one stream alone, without states. `order` (rows,): the place in the whole batch
    of each row of the parts in turn; `back`: the inverse; `sizes`: rows of each part."""

    batches: list[Batch]
    order: Tensor
    back: Tensor
    sizes: list[int]

    @classmethod
    def of(cls, batch: Batch, stream: str) -> Parts | None:
        """None where cutting does not pay."""
        if batch.device.type == "cuda":
            return None
        lengths = batch.lengths[stream]
        samples = groups(lengths)
        if len(samples) < 2:
            return None
        place = rows_of(offsets_of(lengths), np.concatenate(samples))
        sizes = [int(lengths[part].sum()) for part in samples]
        order = torch.from_numpy(place).to(batch.device)
        own = {n: c[order].split(sizes) for n, c in batch.columns.items() if stream_of(n) == stream}
        batches = [
            Batch({}, {name: column[k] for name, column in own.items()}, {stream: lengths[part]})
            for k, part in enumerate(samples)
        ]
        return cls(batches, order, torch.from_numpy(np.argsort(place)).to(batch.device), sizes)


def groups(lengths: np.ndarray) -> list[np.ndarray]:
    """Sample numbers of each part; a single part where cutting saves little."""
    count = max(1, min(PARTS, len(lengths) // SAMPLES))
    samples = np.array_split(np.argsort(lengths, kind="stable"), count)
    positions = sum(len(part) * int(lengths[part].max(initial=0)) for part in samples)
    if positions > (1 - SAVED) * len(lengths) * int(lengths.max(initial=0)):
        return [np.arange(len(lengths))]
    return samples


def by_length(batch: Batch, stream: str, rows: Tensor, run: Callable[[Tensor, Batch], Tensor]) -> Tensor:
    """`run(rows, batch)`, which reads nothing of the batch but `stream`, on its parts in turn. Both `rows` (rows, …)
    and the result stand in the order of the whole batch."""
    parts = batch.derive(f"parts by {stream}", lambda whole: Parts.of(whole, stream)) if enabled() else None
    if parts is None:
        return run(rows, batch)
    cut = _Reorder.run(rows, parts.order, parts.back).split(parts.sizes)
    out = [run(own, part) for own, part in zip(cut, parts.batches, strict=True)]
    return _Reorder.run(torch.cat(out), parts.back, parts.order)


class _Reorder(Stackable):
    """`rows[to]`, whose gradient is gathered by the inverse `back`: faster than adding into zeros."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, to: Tensor, back: Tensor) -> Tensor:
        return rows.index_select(0, to)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, *ctx.saved_tensors), None, None
