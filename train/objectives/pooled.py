"""Heads on pooled features: one row a sample, then a trainable linear map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline.extract.batch import Batch
from pipeline.train.features import Feature, Features
from pipeline.train.objectives.base import Head


class PooledHead(Head):
    """All features, of all slots, pooled, joined and mapped to `outputs` numbers a sample. `weights`: of each output in
    the loss, for losses that have some. Parameters: (Σ widths + 1) · outputs."""

    weights: Tensor | None

    def __init__(
        self, features: Mapping[str, Feature], outputs: int, pooling: str, weights: Sequence[float] = ()
    ) -> None:
        super().__init__()
        given = torch.tensor(weights, dtype=torch.float32) if weights else None
        self.register_buffer("weights", given, persistent=False)  # a run's recipe has them
        self.features, self.pooling = dict(features), pooling
        self.linear = nn.Linear(sum(f.width for f in features.values()), outputs)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def outputs(self, features: Features, batch: Batch) -> Tensor:
        """(B, outputs), float32 under autocast too: labels and NumPy have no bfloat16."""
        pooled = []
        for name, feature in self.features.items():
            rows = features[name].float()
            if feature.stream:
                layout = batch.layout(feature.stream)
                if self.pooling == "mean":
                    rows = layout.mean(rows)
                else:
                    end = layout.lengths - 1 if self.pooling == "last" else 0
                    rows = rows.index_select(0, layout.first + end)
            pooled.append(batch.spread(name, rows))
        return self.linear(pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)).float()
