"""Rows of all ranks in one loss, as of one process with the whole batch (CLIP's way); gradients go back to the rank
that made the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist


def several_ranks() -> bool:
    """Whether other processes train along."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def counts_of(count: int, device: torch.device) -> list[int]:
    """How many rows each rank has, of which this one has `count`."""
    counts = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([count], device=device))
    return [int(found) for found in counts]


def gathered(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """(n, …) of this rank → (Σ `counts`, …), those of all ranks in their order."""
    out: Tensor = _Gather.apply(rows, list(counts))
    return out


def gathered_numbers(numbers: np.ndarray, counts: Sequence[int], device: torch.device) -> np.ndarray:
    """(n,) int64 on the host → (Σ `counts`,)."""
    return gathered(torch.from_numpy(numbers).to(device), counts).cpu().numpy()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, counts: list[int]) -> Tensor:
        padded = rows.new_zeros(max(counts), *rows.shape[1:])  # all ranks must send alike
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, list[int]], output: Tensor) -> None:
        counts, rank = inputs[1], dist.get_rank()
        ctx.own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Every rank has the whole loss, and so the whole gradient of its rows. Of the parameters the sum over ranks is
        # meant, and what `Ranks.average` takes is the mean.
        return dist.get_world_size() * grad[ctx.own], None
