"""Head2Toe (Evci et al., ICML 2022): a linear head on the features of all layers that earn their place.

The states of every block are scaled so that the mean over a sample's positions has unit norm a layer (no layer wins by
its size). A linear head on pooled features learns on all of them under a group lasso, one group a channel; after
`select_after` training batches the channels with the largest weight norms stay and the head goes on with these alone.
The paper fits the head anew after selection, and averages maps to several cells where here it is one.

Under a language model's frozen head (ours) a linear map from the channels of all layers is added to the deepest state
before the final norm; each position is scaled by itself, since none may see a later one. The map starts at zero, which
is the frozen model.
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
    the head's linear map, so it takes one on pooled features; under a frozen head over those of its own map, of
    channels · D parameters."""

    description = "Head2Toe: a linear head on selected features of all layers"
    lr_pooled = 1e-2
    projects = True
    shapes = ("sequence", "pyramid")
    continues_text = True

    mask: Tensor
    seen: Tensor

    def __init__(self, config: Head2ToeConfig, backbone: Backbone, tail: Tail, wants: Want) -> None:
        super().__init__(config, backbone, tail, wants)
        self.names = self.states(config, backbone)
        streams = {n: stream_of(n) for n in self.names}
        widths = {n: backbone.state_width(n) for n in self.names}
        self.layers = {n: rows_of(backbone, s, widths[n]) for n, s in streams.items()}
        self.features = self.layers
        self.map: nn.Linear | None = None
        if wants.text_head:
            self.last = self.names[-1]
            stream = streams[self.last]
            self.features = {stream: rows_of(backbone, stream)}
            self.map = nn.Linear(sum(widths.values()), backbone.width, bias=False)
            nn.init.zeros_(self.map.weight)
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
        if self.map is not None:
            (stream,) = self.features
            states = torch.cat([_scaled(batch.states[name].float()) for name in self.names], dim=1)
            last = _scaled(batch.states[self.last].float())
            return {stream: self.tail.final_norm(last + self.map(states * self.mask), stream)}
        out: Features = {}
        masks = self.mask.split([f.width for f in self.layers.values()])
        for (name, feature), mask in zip(self.layers.items(), masks, strict=True):
            rows, layout = batch.states[name].float(), batch.layout(feature.stream)
            size = layout.mean(rows).norm(dim=1, keepdim=True).clamp(min=1e-12)
            out[name] = rows / size[layout.sample] * mask
        return out

    def penalty(self, head: nn.Module) -> Tensor | None:
        return self.config.lasso * self._columns(head).sum() if self._selecting() else None

    def _selecting(self) -> bool:
        return bool(self.seen < self.config.select_after)

    def stepped(self, head: nn.Module) -> None:
        if self._selecting():
            self.seen += 1
            if not self._selecting():
                self._select(self._columns(head).detach())

    def insights(self, batches: Iterable[Batch]) -> list[Learned]:
        widths = [f.width for f in self.layers.values()]
        kept = torch.stack([mask.mean() for mask in self.mask.split(widths)])
        about = "The share of each layer's channels that the selection has kept."
        return [Learned("Chosen features", about, list(self.layers), kept.cpu())]

    def remark(self) -> str:
        used = int(self.mask.sum())
        if used == len(self.mask):
            when = f"selection comes after {self.config.select_after} steps; train longer for Head2Toe proper"
            return f"no feature was left out: the best epoch came before the selection ({when})"
        return f"{used:,} of {len(self.mask):,} features are used"

    def _select(self, norms: Tensor) -> None:
        stay = norms.topk(max(1, round(self.config.features * len(norms)))).indices
        self.mask.zero_().index_fill_(0, stay, 1.0)

    def _columns(self, head: Any) -> Tensor:
        """(channels,) norms of what is done with each. UserError for a head that pools no features, without a map."""
        if self.map is not None:
            return self.map.weight.norm(dim=0)
        return _pooled(head)


def _scaled(rows: Tensor) -> Tensor:
    """Each row at a mean square of 1, which a final norm would not notice."""
    return rows * torch.rsqrt(rows.square().mean(1, keepdim=True) + 1e-6)


def _pooled(head: Any) -> Tensor:
    """(channels,) norms of what a head on pooled features does with each. UserError for any other head."""
    if not isinstance(head, PooledHead):
        raise UserError("tuner head2toe selects channels of pooled features; this objective's head pools none")
    return head.linear.weight.norm(dim=0)
