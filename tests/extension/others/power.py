"""A tuner with two options of its own: the last state to a power, with a scale for each channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.extract.options import option
from pipeline.train.tuners import Tuner, TunerConfig, register_tuner
from pipeline.train.tuners.base import rows_of


@dataclass(frozen=True)
class PowerConfig(TunerConfig):
    exponent: int = option(1, "Power that states are raised to.", least=1)
    seed: float = option(1.0, "Where the scales start.", above=0)  # a name that all runs have too


@register_tuner("power", PowerConfig)
class Power(Tuner):
    description = "the last state to a power, scaled"

    def __init__(self, config: Any, backbone: Any, tail: Any, wants: Any) -> None:
        super().__init__(config, backbone, tail, wants)
        self.stream = backbone.streams[0]
        self.features = {self.stream: rows_of(backbone, self.stream)}
        self.scale = nn.Parameter(torch.full((backbone.width,), config.seed))
        (self.state,) = self.states(config, backbone)

    @classmethod
    def states(cls, config: Any, backbone: Any) -> list[str]:
        stream = backbone.streams[0]
        return [f"{stream}.{(config.layers or (backbone.depth(stream) - 1,))[-1]}"]

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        return {self.stream: self.scale * batch.states[self.state].float() ** self.config.exponent}
