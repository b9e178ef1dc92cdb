"""Side-Tuning (Zhang et al., ECCV 2020): the frozen last state blended with a small network on the input.

R = α B(x) + (1 − α) S(x), α = sigmoid(a), a learned from 0. S works on the backbone's own embedding output, one
position at a time: Linear, GELU, Linear through width D / r. The paper's S is a small convolutional or recurrent
network that it distils from the backbone; this one starts at random. With `network` blocks S is LST's side network
without its ladders, from a pruned backbone if asked for (LST's ablation of what ladders are worth).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.extract.backbones.base import Backbone
from pipeline.extract.backbones.tail import Tail
from pipeline.extract.batch import Batch
from pipeline.extract.kernels.bylength import by_length
from pipeline.train.configs import SideTuningConfig
from pipeline.train.features import Features, Want
from pipeline.train.tuners.base import Start, Tuner, checked_reduction, linear, register_tuner, rows_of
from pipeline.train.tuners.lst import Ladder, pruned_start, unprunable


@register_tuner("side-tuning", SideTuningConfig)
class SideTuning(Tuner):
    """Parameters of the mlp: 2 D d + d + D + 1. Reads the first stream (a T5's encoder)."""

    description = "Side-Tuning: the last state blended with a small network on the embedding"
    lr_pooled = 3e-3

    def __init__(self, config: SideTuningConfig, backbone: Backbone, tail: Tail, wants: Want) -> None:
        super().__init__(config, backbone, tail, wants)
        self.stream = backbone.streams[0]
        self.features = {self.stream: rows_of(backbone, self.stream)}
        self.state = self.states(config, backbone)[-1]
        inner = checked_reduction(config.reduction, backbone.width)
        self.side: nn.Module
        if config.network == "blocks":
            layers = list(range(backbone.depth(self.stream)))
            self.side = Ladder(backbone, self.stream, layers, config.reduction, 1.0, ladders=False)
            self.up = linear(inner, backbone.width)
        else:
            self.side = nn.Sequential(nn.Linear(backbone.width, inner), nn.GELU(), nn.Linear(inner, backbone.width))
        self.blend = nn.Parameter(torch.zeros(()))

    @classmethod
    def states(cls, config: SideTuningConfig, backbone: Backbone) -> list[str]:
        stream = backbone.streams[0]
        return [*backbone.embedding(stream), f"{stream}.{config.kept(backbone, stream)[-1]}"]

    def forward(self, batch: Batch) -> Features:
        base = self.tail.final_norm(batch.states[self.state].float(), self.stream)
        share, embedding = torch.sigmoid(self.blend), self.tail.embed(batch, self.stream)
        if isinstance(self.side, Ladder):
            rungs = self.side.rungs(batch, embedding)
            beside = self.up(by_length(batch, self.stream, rungs, self.side))
        else:
            beside = self.side(embedding.float())
        return {self.stream: share * base + (1 - share) * beside}

    @classmethod
    def refuse(cls, config: SideTuningConfig, backbone: Backbone) -> str | None:
        return unprunable(config, backbone) or super().refuse(config, backbone)

    @classmethod
    def start(cls, config: SideTuningConfig, backbone: Backbone) -> Start | None:
        return pruned_start(config, backbone)

    def begin(self, weights: dict[str, Tensor]) -> None:
        assert isinstance(self.side, Ladder)
        own = {k.removeprefix(f"{self.stream}."): v for k, v in weights.items() if k.startswith(f"{self.stream}.")}
        self.side.side.begin(own, self.side.layers)
