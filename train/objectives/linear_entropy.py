"""Cross entropy of a large vocabulary, a few rows at a time: the logits of a batch never stand in memory at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_VALUES = 1 << 24  # logits at once: 64 MB in float32

Logits = Callable[[Tensor], Tensor]


def chunk_rows(vocabulary: int) -> int:
    """Rows whose logits are made at once."""
    return max(1, CHUNK_VALUES // vocabulary)


def summed_entropy(rows: Tensor, tokens: Tensor, logits: Logits, vocabulary: int, frozen: bool) -> Tensor:
    """Σ −log p(token | row), a scalar float32. `rows`: (n, width); `tokens`: (n,); `logits`: (k, width) → (k,
    vocabulary). With `frozen` nothing but `rows` has a gradient: it is found along with the loss, and kept; else
    logits are made again in the backward pass."""
    size = chunk_rows(vocabulary)
    if frozen and torch.is_grad_enabled() and rows.requires_grad:
        total: Tensor = _Frozen.apply(rows, tokens, logits, size)
        return total
    parts = zip(rows.split(size), tokens.split(size), strict=True)
    if not torch.is_grad_enabled():
        return torch.stack([_entropy(r, t, logits) for r, t in parts]).sum()
    return torch.stack([checkpoint(_entropy, r, t, logits, use_reentrant=False) for r, t in parts]).sum()


@torch.no_grad()
def entropy_and_hits(rows: Tensor, tokens: Tensor, logits: Logits, vocabulary: int) -> tuple[Tensor, Tensor]:
    """(n,) float32 −log p of each token, and (n,) bool whether it is the most likely one."""
    entropies, hits = [], []
    size = chunk_rows(vocabulary)
    for part, wanted in zip(rows.split(size), tokens.split(size), strict=True):
        out = logits(part).float()
        entropies.append(F.cross_entropy(out, wanted, reduction="none"))
        hits.append(out.argmax(-1) == wanted)
    return torch.cat(entropies), torch.cat(hits)


def _entropy(rows: Tensor, tokens: Tensor, logits: Logits) -> Tensor:
    return F.cross_entropy(logits(rows).float(), tokens, reduction="sum")


class _Frozen(torch.autograd.Function):
    """Two products a row, logits and gradient, where logits made again would be a third."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, tokens: Tensor, logits: Logits, size: int) -> Tensor:
        grad, total = torch.empty_like(rows), torch.zeros((), device=rows.device)
        for own, wanted, out in zip(rows.split(size), tokens.split(size), grad.split(size), strict=True):
            with torch.enable_grad():
                part = own.detach().requires_grad_()
                loss = _entropy(part, wanted, logits)
                out.copy_(torch.autograd.grad(loss, part)[0])
            total += loss.detach()
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * outer, None, None, None
