"""Which positions of a padded grid may attend to which."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.extract.batch import Batch, Layout


def attention_mask(allowed: Tensor, attention: str, dtype: torch.dtype) -> Tensor:
    """Bool (…, L) mask in the form the attention implementation takes: bool for sdpa, additive for eager."""
    if attention == "sdpa":
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)


def key_mask(layout: Layout, attention: str, dtype: torch.dtype) -> Tensor:
    """(B, 1, 1, L): every position may attend to every real position."""
    return attention_mask(layout.mask[:, None, None, :], attention, dtype)


def earlier(layout: Layout) -> Tensor:
    """(L, L) bool: each position sees itself and those before it. Padding comes last, so no real position sees it."""
    longest = layout.mask.shape[1]
    return torch.ones(longest, longest, dtype=torch.bool, device=layout.mask.device).tril()


def ancestors(parent: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`parent` (B, P) places within the sample, -1 at roots → (B, P, P) bool self-or-ancestor, (B, P) int64 depth."""
    batch, length = parent.shape
    seen = torch.eye(length, dtype=torch.bool, device=parent.device).expand(batch, -1, -1).clone()
    current = parent.masked_fill(~mask, -1)
    for _ in range(length - 1):
        live = current >= 0
        seen |= torch.zeros_like(seen).scatter_(2, current.clamp(min=0)[..., None], live[..., None])
        current = torch.where(live, parent.gather(1, current.clamp(min=0)), current)
    return seen, seen.sum(-1) - 1


def tree(batch: Batch, stream: str) -> tuple[Tensor, Tensor]:
    """`ancestors` of the positions of `stream`, whose column `<stream>.parent` says which comes before each."""
    layout = batch.layout(stream)
    return ancestors(layout.pad(batch.columns[f"{stream}.parent"], -1), layout.mask)
