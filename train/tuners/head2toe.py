"""Head2Toe (Evci et al., ICML 2022): a linear head on the features of all layers that earn their place.

The states of every block are scaled so that the mean over a sample's positions has unit norm a layer (no layer wins by
its size). A linear head on pooled features learns on all of them under a group lasso, one group a channel; after
`select_after` training batches the channels with the largest weight norms stay and the head goes on with these alone.
The paper fits the head anew after selection, and averages maps to several cells where here it is one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.extract.backbones.base import Backbone
from pipeline.extract.backbones.tail import Tail
from pipeline.extract.batch import Batch, stream_of
from pipeline.store.errors import UserError
from pipeline.train.configs import Head2ToeConfig
from pipeline.train.features import Features, Want
from pipeline.train.learned import Learned
from pipeline.train.objectives.pooled import PooledHead
from pipeline.train.tuners.base import Tuner, register_tuner, rows_of


@register_tuner("head2toe", Head2ToeConfig)
class Head2Toe(Tuner):
    """No parameters but the head's: (channels + 1) · classes. Reads a T5's encoder. Selection is over the columns of
    the head's linear map, so it takes one on pooled features."""

    description = "Head2Toe: a linear head on selected features of all layers"
    lr_pooled = 1e-2
    projects = True
    shapes = ("sequence", "pyramid")

    mask: Tensor
    seen: Tensor

    def __init__(self, config: Head2ToeConfig, backbone: Backbone, tail: Tail, wants: Want) -> None:
        super().__init__(config, backbone, tail, wants)
        self.names = self.states(config, backbone)
        streams = {n: stream_of(n) for n in self.names}
        widths = {n: backbone.state_width(n) for n in self.names}
        self.features = {n: rows_of(backbone, s, widths[n]) for n, s in streams.items()}
        self.register_buffer("mask", torch.ones(sum(widths.values())))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    @classmethod
    def states(cls, config: Head2ToeConfig, backbone: Backbone) -> list[str]:
        if backbone.shape == "pyramid":
            if config.layers:
                raise UserError(f"layers: head2toe on {backbone.name} backbones reads every block")
            return [f"{s}.{i}" for s in backbone.streams for i in range(backbone.depth(s))]
        stream = backbone.streams[0]  # a decoder's states in training would tell the label
        return [f"{stream}.{i}" for i in config.kept(backbone, stream)]

    def forward(self, batch: Batch) -> Features:
        """Every state's rows, scaled; zero in channels that were not selected."""
        out: Features = {}
        masks = self.mask.split([f.width for f in self.features.values()])
        for (name, feature), mask in zip(self.features.items(), masks, strict=True):
            rows, layout = batch.states[name].float(), batch.layout(feature.stream)
            size = layout.mean(rows).norm(dim=1, keepdim=True).clamp(min=1e-12)
            out[name] = rows / size[layout.sample] * mask
        return out

    def penalty(self, head: nn.Module) -> Tensor | None:
        return self.config.lasso * _columns(head).sum() if self._selecting() else None

    def _selecting(self) -> bool:
        return bool(self.seen < self.config.select_after)

    def stepped(self, head: nn.Module) -> None:
        if self._selecting():
            self.seen += 1
            if not self._selecting():
                self._select(_columns(head).detach())

    def insights(self, batches: Iterable[Batch]) -> list[Learned]:
        widths = [f.width for f in self.features.values()]
        kept = torch.stack([mask.mean() for mask in self.mask.split(widths)])
        about = "The share of each layer's channels that the selection has kept."
        return [Learned("Chosen features", about, list(self.features), kept.cpu())]

    def remark(self) -> str:
        used = int(self.mask.sum())
        if used == len(self.mask):
            when = f"selection comes after {self.config.select_after} steps; train longer for Head2Toe proper"
            return f"no feature was left out: the best epoch came before the selection ({when})"
        return f"{used:,} of {len(self.mask):,} features are used"

    def _select(self, norms: Tensor) -> None:
        stay = norms.topk(max(1, round(self.config.features * len(norms)))).indices
        self.mask.zero_().index_fill_(0, stay, 1.0)


def _columns(head: Any) -> Tensor:
    """(channels,) norms of what a head on pooled features does with each. UserError for any other head."""
    if not isinstance(head, PooledHead):
        raise UserError("tuner head2toe selects channels of pooled features; this objective's head pools none")
    return head.linear.weight.norm(dim=0)
