"""UniPT (Diao et al., CVPR 2024): shallow layers are read through attention to the last one; nothing is live.

The last state is the anchor, every earlier one (the embedding included) a target. Each target is mixed by an
attention without parameters from the anchor, the mixes are weighted by a learned confidence a layer, and their sum is
added to the anchor. The form for encoders is that of the released BERT code (methods §3).

The authors give no form for encoder-decoders. On a T5 the tuner reads the encoder alone, for a trainable head:
ours, not theirs, and to be named as such beside published numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.extract.backbones.base import Backbone
from pipeline.extract.backbones.tail import Tail
from pipeline.extract.batch import Batch, Layout
from pipeline.train.configs import UniptConfig
from pipeline.train.features import Features, Want
from pipeline.train.learned import Learned, Mean
from pipeline.train.tuners.base import (
    StateLinear,
    Tuner,
    checked_reduction,
    full_precision,
    register_tuner,
    rows_of,
)

EPSILON = 1e-8  # added to l1 norms, as in the released BERT and CNN code


def attend(anchor: Tensor, target: Tensor) -> Tensor:
    """Mix `target` by rectified, l1-normalised products with `anchor`, plus itself (UniPT eq. 3 and 4).

    Both (B, L, d), zero at padding. Returns (B, L, d). A row whose products are all negative keeps itself alone.
    """
    weights = F.relu(anchor @ target.transpose(1, 2))
    weights = weights / (weights.sum(-1, keepdim=True) + EPSILON)
    return weights @ target + target


class Aggregate(nn.Module):
    """Targets and anchor at side width → the anchor with the confidence-weighted sum of mixed targets added to it.

    confᵢ = Lin(mean(anchor) ∘ mean(targetᵢ)), softmax over layers; the sum goes through `project`, d → d, a map and its
    norm: LayerNorm(Linear) where none is given. Everything is in float32. Parameters: d + 1 for the confidence, d² + 3d
    for the map and its norm.
    """

    def __init__(self, inner: int, project: nn.Module | None = None) -> None:
        super().__init__()
        self.confidence = nn.Linear(inner, 1)
        self.project = project or nn.Sequential(nn.Linear(inner, inner), nn.LayerNorm(inner))

    def forward(self, anchor: Tensor, targets: Sequence[Tensor], layout: Layout) -> Tensor:
        """`anchor` and each of `targets`: (rows, d). Returns (rows, d)."""
        with full_precision(anchor.device):
            anchor = anchor.float()
            targets = [t.float() for t in targets]
            share = self.shares(anchor, targets, layout)
            grid = layout.pad(anchor)
            mixed = anchor.new_zeros(grid.shape)
            for i, target in enumerate(targets):
                mixed = mixed + share[:, i, None, None] * attend(grid, layout.pad(target))
            return anchor + self.project(layout.unpad(mixed))

    def shares(self, anchor: Tensor, targets: Sequence[Tensor], layout: Layout) -> Tensor:
        """(B, targets), the confidence in each target."""
        summary = layout.mean(anchor)
        return torch.cat([self.confidence(summary * layout.mean(t)) for t in targets], dim=1).softmax(1)


class Down(nn.Sequential):
    """LayerNorm(Linear(h)), width → d."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__(StateLinear(width, inner), nn.LayerNorm(inner))


@register_tuner("unipt", UniptConfig)
class Unipt(Tuner):
    """Parameters with n states of width D, embedding and anchor counted: n (Dd + 3d) + (d + 1) + (d² + 3d) + dD + D."""

    description = "UniPT: parallel attention from the last state to all earlier ones; no live layer"
    lr_pooled = 3e-3
    projects = True

    def __init__(self, config: UniptConfig, backbone: Backbone, tail: Tail, wants: Want) -> None:
        super().__init__(config, backbone, tail, wants)
        self.stream = backbone.streams[0]
        self.features = {self.stream: rows_of(backbone, self.stream)}
        inner, out = self.widths(config, backbone, wants)
        self.names = [f"{self.stream}.{i}" for i in _layers(config, backbone)]
        self.down = nn.ModuleList(Down(w, inner) for w in (backbone.width, *map(backbone.state_width, self.names)))
        self.aggregate = Aggregate(inner)
        self.up = nn.Linear(inner, out)

    @classmethod
    def widths(cls, config: Any, backbone: Backbone, wants: Want) -> tuple[int, int]:
        """The side width, and that of what is handed out."""
        return checked_reduction(config.reduction, backbone.width), backbone.width

    @classmethod
    def states(cls, config: UniptConfig, backbone: Backbone) -> list[str]:
        stream = backbone.streams[0]
        return [*backbone.embedding(stream), *(f"{stream}.{i}" for i in _layers(config, backbone))]

    def insights(self, batches: Iterable[Batch]) -> list[Learned]:
        mean = Mean()
        for batch in batches:
            low = [rows.float() for rows in self._low(batch)]
            mean.add("share", self.aggregate.shares(low[-1], low[:-1], batch.layout(self.stream)))
        about = "The softmax over layers that weighs what each adds to the last one, mean over samples."
        names = [f"{self.stream}: embedding", *self.names[:-1]]
        return [Learned("Confidence in each layer", about, names, mean.of("share"))]

    def _low(self, batch: Batch) -> list[Tensor]:
        """Embedding and states at side width, (rows, d) each."""
        sources = [self.tail.embed(batch, self.stream), *(batch.states[n] for n in self.names)]
        return [down(h) for down, h in zip(self.down, sources, strict=True)]

    def forward(self, batch: Batch) -> Features:
        low = self._low(batch)
        rows = self.aggregate(low[-1], low[:-1], batch.layout(self.stream))
        return {self.stream: self.up(F.relu(rows))}


def _layers(config: UniptConfig, backbone: Backbone) -> list[int]:
    return config.kept(backbone, backbone.streams[0])
