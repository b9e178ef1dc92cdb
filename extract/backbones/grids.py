"""Feature maps as packed rows: where the rows of a small image's coarse map lie under those of a fine one.

Each stream of a backbone with feature maps holds its maps row by row, sample after sample. Their heights and widths are
kept beside them as the column `grid.sizes` of a stream `grid`: for each sample two numbers a stream, in the family's
order of streams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pipeline.extract.batch import Batch

COLUMN = "grid.sizes"
SIZES = "sizes of maps"  # what a batch derives from the column, (B, streams, 2)
EXTENT = ("height", "width")  # of an image in pixels, beside its lengths where a batch is only made up


def sizes(batch: Batch, streams: Sequence[str], stream: str) -> np.ndarray:
    """(B, 2) int64 height and width of each sample's map of `stream`."""
    found = batch.derive(
        SIZES, lambda b: b.columns[COLUMN].cpu().numpy().reshape(len(b), len(streams), 2)
    )  # once a batch: on a GPU it waits for the device
    return found[:, list(streams).index(stream)]


def per_size(rows: Tensor, shapes: np.ndarray, run: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `run` to maps: packed `rows` (rows, C) of maps of `shapes` (B, 2) → packed rows of what it gives.

    `run` takes (b, H, W, C) and returns (b, H', W', C'); samples of equal size go together.
    """
    alike, which = np.unique(shapes, axis=0, return_inverse=True)
    which = which.reshape(-1)
    if len(alike) == 1:
        height, width = (int(n) for n in alike[0])
        return run(rows.view(len(shapes), height, width, rows.shape[-1])).flatten(0, 2)
    starts = np.concatenate([[0], np.cumsum(shapes.prod(1))])
    done: dict[int, Tensor] = {}
    for number, (height, width) in enumerate(alike.tolist()):
        members = np.flatnonzero(which == number)
        maps = torch.stack([rows[starts[i] : starts[i + 1]].view(height, width, -1) for i in members])
        done.update(zip(members.tolist(), run(maps), strict=True))
    return torch.cat([done[i].flatten(0, 1) for i in range(len(shapes))])


@lru_cache(maxsize=256)
def _under(fine: tuple[int, int], coarse: tuple[int, int]) -> np.ndarray:
    rows = np.arange(fine[0]) * coarse[0] // fine[0]
    columns = np.arange(fine[1]) * coarse[1] // fine[1]
    return (rows[:, None] * coarse[1] + columns[None, :]).reshape(-1)


def cells(fine: np.ndarray, coarse: np.ndarray, device: torch.device) -> Tensor:
    """(fine rows,) int64: the packed row of the coarse map that each fine position lies under (nearest). Shapes (B, 2).

    A coarse map must not be larger than the fine one; where it is, some of its rows have no fine position.
    """
    first = np.concatenate([[0], np.cumsum(coarse.prod(1))[:-1]])
    parts = [
        _under(tuple(f), tuple(c)) + at for f, c, at in zip(fine.tolist(), coarse.tolist(), first.tolist(), strict=True)
    ]
    return torch.from_numpy(np.concatenate(parts)).to(device)


def sum_cells(rows: Tensor, cell: Tensor, count: int) -> Tensor:
    """(fine rows, C) → (count, C): the sum over each cell."""
    return rows.new_zeros(count, *rows.shape[1:]).index_add(0, cell, rows)


def mean_cells(rows: Tensor, cell: Tensor, count: int) -> Tensor:
    """The mean over each cell."""
    return sum_cells(rows, cell, count) / cell_counts(cell, count).to(rows.dtype)[:, None]


def cell_counts(cell: Tensor, count: int) -> Tensor:
    """(count,) float32: how many fine positions each cell has, at least 1. On the meta device too, unlike bincount."""
    ones = torch.ones(len(cell), device=cell.device)
    return sum_cells(ones, cell, count).clamp(min=1)


def max_cells(rows: Tensor, cell: Tensor, count: int) -> Tensor:
    """The largest value in each cell, by channel; 0 in a cell without rows."""
    out = rows.new_zeros(count, rows.shape[1])
    return out.scatter_reduce(0, cell[:, None].expand_as(rows), rows, "amax", include_self=False)
