"""Cross-attention of few queries over many positions, without projecting the positions.

A key is W_k m and a score q · W_k m = (W_kᵀ q) · m; a head's output Σ a W_v m = W_v Σ a m. Moving the maps to the side
of the queries turns two products of (positions × width × width) into products of (queries · heads × width) with the
positions: 32 times fewer operations for a T5-base decoder that reads a class label (2 queries · 12 heads for 768
channels), forward and backward. The same function; only the rounding differs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.extract.batch import Layout
from pipeline.extract.kernels import enabled
from pipeline.extract.kernels.dropout import kept, masked


def is_cheaper(layer: Any, queries: int) -> bool:
    """Whether `queries` a sample are few enough: the products shrink by width / (queries · heads). Never where
    something was put on the maps (LoRA, biases): their weights are read here."""
    attention = layer.EncDecAttention
    plain = all(type(map_) is nn.Linear and map_.bias is None for map_ in (attention.k, attention.v))
    return enabled() and plain and 2 * queries * attention.n_heads <= attention.d_model


def cross_attend(layer: Any, grid: Tensor, memory: Tensor, layout: Layout, lengths: np.ndarray) -> Tensor:
    """A `T5LayerCrossAttention` on `grid` (B, P, width) over `memory` (rows, width), packed as `layout` says; `lengths`
    (B,) are its on the host."""
    attention = layer.EncDecAttention
    batch, queries, width = grid.shape
    heads, head = attention.n_heads, attention.key_value_proj_dim
    asked = attention.q(layer.layer_norm(grid)).view(batch, queries, heads, head)
    towards = torch.einsum("bphk,hkw->bphw", asked, attention.k.weight.view(heads, head, width))
    towards = towards.reshape(batch, queries * heads, width)
    p = attention.dropout if layer.training else 0.0
    on_host = memory.device.type in ("cpu", "meta") and towards.dtype == memory.dtype == torch.float32
    if on_host and not torch.is_autocast_enabled("cpu"):
        mixed = _Attend.apply(towards, memory, lengths.tolist(), p)
    else:
        padded = layout.pad(memory)
        scores = torch.bmm(towards, padded.transpose(1, 2)).masked_fill(~layout.mask[:, None], -torch.inf)
        mixed = torch.bmm(F.dropout(scores.softmax(-1), p), padded)
    mixed = mixed.view(batch, queries, heads, width)
    found = torch.einsum("bphw,hkw->bphk", mixed, attention.v.weight.view(heads, head, width))
    return grid + layer.dropout(attention.o(found.reshape(batch, queries, heads * head)))


class _Attend(torch.autograd.Function):
    """softmax(Q Mᵀ) M of each sample, dropout p on the weights: (B, Q, width) over (rows, width) → (B, Q, width).

    A product a sample, on its own rows: nothing is padded but the weights, and the rows' gradient, to which both
    products with them add, is one product. A GPU would wait for so many small kernels.
    """

    @staticmethod
    def forward(ctx: Any, asked: Tensor, rows: Tensor, lengths: list[int], p: float) -> Tensor:
        own = rows.split(lengths)
        scores = asked.new_full((*asked.shape[:2], max(lengths)), -torch.inf)
        for q, m, s in zip(asked, own, scores, strict=True):
            torch.mm(q, m.t(), out=s[:, : len(m)])
        weights = scores.softmax(-1)
        mask, ctx.factor = kept(weights.shape, p, weights.device) if p else (None, 1.0)
        mixed = torch.empty_like(asked)
        for w, m, o in zip(_masked(weights, mask, ctx.factor), own, mixed, strict=True):
            torch.mm(w[:, : len(m)], m, out=o)
        ctx.lengths = lengths
        ctx.save_for_backward(asked, rows, weights, mask)
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        asked, rows, weights, mask = ctx.saved_tensors
        own = rows.split(ctx.lengths)
        of_used = torch.zeros_like(weights)
        for g, m, w in zip(grad, own, of_used, strict=True):
            torch.mm(g, m.t(), out=w[:, : len(m)])
        of_scores = torch._softmax_backward_data(_masked(of_used, mask, ctx.factor), weights, -1, weights.dtype)
        both = torch.cat([of_scores, _masked(weights, mask, ctx.factor)], 1)
        beside = torch.cat([asked, grad], 1)
        of_asked, of_rows = torch.empty_like(asked), torch.empty_like(rows)
        for s, m, b, c, a, r in zip(of_scores, own, both, beside, of_asked, of_rows.split(ctx.lengths), strict=True):
            torch.mm(s[:, : len(m)], m, out=a)
            torch.mm(b[:, : len(m)].t(), c, out=r)
        return of_asked, of_rows, None, None


def _masked(values: Tensor, mask: Tensor | None, factor: float) -> Tensor:
    return values if mask is None else masked(values, mask, factor)
