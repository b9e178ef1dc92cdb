"""QST (Zhang et al., 2024): a ladder beside a frozen language model, its output blended with the backbone's own.

The ladder is LST's, but states come down through a low rank, an activation and a norm, and gates without a temperature
start at σ(0.5). What goes up is blended with the backbone's last state behind its final norm: out = (1 − σ(w)) up +
σ(w) h, w from 1 (as in the released code; the activation is ours, SiLU, and the backbone here is not quantised).
"""

from __future__ import annotations

import torch
from torch import nn

from pipeline.extract.backbones.base import Backbone
from pipeline.extract.backbones.capabilities import ContinuesText
from pipeline.extract.backbones.tail import Tail
from pipeline.extract.batch import Batch
from pipeline.extract.kernels.bylength import by_length
from pipeline.train.configs import QstConfig
from pipeline.train.features import Features, Want
from pipeline.train.tuners.base import StateLinear, Tuner, linear, register_tuner, rows_of
from pipeline.train.tuners.lst import Ladder


@register_tuner("qst", QstConfig)
class Qst(Tuner):
    """A ladder on the one stream, a map up, a blend. Rows have the backbone's width, whatever reads them."""

    description = "QST: a ladder beside a language model, its output blended with the backbone's"
    needs = (ContinuesText,)
    projects = True
    continues_text = True

    def __init__(self, config: QstConfig, backbone: Backbone, tail: Tail, wants: Want) -> None:
        super().__init__(config, backbone, tail, wants)
        (self.stream,) = backbone.streams

        def down(states: int, inner: int) -> nn.Module:
            low = nn.Linear(config.rank, inner)
            return nn.Sequential(StateLinear(states, config.rank), nn.SiLU(), low, nn.LayerNorm(inner))

        layers = config.kept(backbone, self.stream)
        self.ladder = Ladder(backbone, self.stream, layers, config.reduction, 1.0, 0.5, down)
        self.up = linear(backbone.width // config.reduction, backbone.width)
        self.blend = nn.Parameter(torch.ones(()))
        self.last = f"{self.stream}.{backbone.depth(self.stream) - 1}"
        self.features = {self.stream: rows_of(backbone, self.stream)}

    @classmethod
    def states(cls, config: QstConfig, backbone: Backbone) -> list[str]:
        (stream,) = backbone.streams
        layers = {*config.kept(backbone, stream), backbone.depth(stream) - 1}
        return [f"{stream}.{i}" for i in sorted(layers)]

    def forward(self, batch: Batch) -> Features:
        rungs = self.ladder.rungs(batch, self.tail.embed(batch, self.stream))
        rows = self.up(by_length(batch, self.stream, rungs, self.ladder))
        share = torch.sigmoid(self.blend)
        known = self.tail.final_norm(batch.states[self.last].float(), self.stream)
        return {self.stream: (1 - share) * rows + share * known}
