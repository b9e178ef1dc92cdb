"""A tuner as small as they come: the last state scaled, channel by channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from pipeline.extract.backbones.base import Backbone
from pipeline.extract.backbones.tail import Tail
from pipeline.extract.batch import Batch
from pipeline.train.features import Features, Want
from pipeline.train.tuners import Tuner, TunerConfig, register_tuner
from pipeline.train.tuners.base import rows_of


@dataclass(frozen=True)
class ToyConfig(TunerConfig):
    """No options of its own."""


@register_tuner("toy", ToyConfig)
class Toy(Tuner):
    description = "the last state, scaled"

    def __init__(self, config: ToyConfig, backbone: Backbone, tail: Tail, wants: Want) -> None:
        super().__init__(config, backbone, tail, wants)
        self.stream = backbone.streams[0]
        self.features = {self.stream: rows_of(backbone, self.stream)}
        self.scale = nn.Parameter(torch.ones(backbone.width))
        (self.state,) = self.states(config, backbone)

    @classmethod
    def states(cls, config: ToyConfig, backbone: Backbone) -> list[str]:
        stream = backbone.streams[0]
        return [f"{stream}.{backbone.depth(stream) - 1}"]

    def forward(self, batch: Batch) -> Features:
        return {self.stream: self.scale * batch.states[self.state].float()}
