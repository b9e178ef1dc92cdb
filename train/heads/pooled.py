"""Pooled readout: the mean of a sample's rows, then a trainable linear map to classes or one value."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.extract.backbones.batch import Batch, Layout
from pipeline.train.finite import refuse_nan


def pool(rows: Tensor, layout: Layout, how: str = "mean") -> Tensor:
    """(rows, width) → (B, width): the mean over a sample's rows, or its first row."""
    if how == "first":
        return rows.index_select(0, layout.first)
    total = rows.new_zeros(len(layout.lengths), rows.shape[-1]).index_add(0, layout.sample, rows)
    return total / layout.lengths.clamp(min=1).to(rows.dtype).unsqueeze(1)


class PooledHead(nn.Module):
    """Classification (cross entropy over `outputs` classes) or regression (squared error, one output).
    `stream`: whose rows are pooled; "" where the tuner gives one row a sample already."""

    def __init__(
        self, width: int, outputs: int, kind: Literal["classification", "regression"], stream: str, pooling: str
    ) -> None:
        super().__init__()
        self.kind, self.stream, self.pooling = kind, stream, pooling
        self.linear = nn.Linear(width, outputs if kind == "classification" else 1)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def outputs(self, rows: Tensor, batch: Batch) -> Tensor:
        """(B, classes) logits, or (B,) values, float32 under autocast too: NumPy and labels have no bfloat16."""
        pooled = pool(rows.float(), batch.layout(self.stream), self.pooling) if self.stream else rows.float()
        out = self.linear(pooled).float()
        return out if self.kind == "classification" else out.squeeze(-1)

    def loss(self, rows: Tensor, batch: Batch) -> Tensor:
        assert batch.labels is not None
        out = self.outputs(rows, batch)
        if self.kind == "classification":
            return F.cross_entropy(out, batch.labels)
        return F.mse_loss(out, batch.labels.to(out.dtype))

    def predict(self, rows: Tensor, batch: Batch) -> Tensor:
        """(B,) class indices or values. Raises NotFinite for NaN."""
        out = refuse_nan(self.outputs(rows, batch))
        return out.argmax(-1) if self.kind == "classification" else out


def finite(values: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    return bool(torch.isfinite(values).all())
