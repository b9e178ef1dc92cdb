"""Linear probe: a linear map on the mean of the backbone's last state. The floor every side network must beat.

Under a language model's frozen head it is a D × D map before the final norm, from the identity, or an MLP with a
residual connection, from zero: at its start the model is the frozen one.
"""

from __future__ import annotations

from torch import nn

from pipeline.extract.backbones.base import Backbone
from pipeline.extract.backbones.tail import Tail
from pipeline.extract.batch import Batch
from pipeline.train.baselines.adapters import Bottleneck
from pipeline.train.configs import ProbeConfig
from pipeline.train.features import Features, Want
from pipeline.train.tuners.base import Tuner, register_tuner, rows_of


@register_tuner("probe", ProbeConfig)
class Probe(Tuner):
    """No parameters of its own unless the head is frozen; then D². An MLP of width h has 2 D h + D + h. Reads a T5's
    encoder, the last stage of a staged backbone."""

    description = "linear probe on the mean of the last state: the floor"
    lr_pooled = 1e-2
    shapes = ("sequence", "pyramid")
    continues_text = True

    def __init__(self, config: ProbeConfig, backbone: Backbone, tail: Tail, wants: Want) -> None:
        super().__init__(config, backbone, tail, wants)
        self.stream = _stream(backbone)
        self.features = {self.stream: rows_of(backbone, self.stream)}
        (self.state,) = self.states(config, backbone)
        self.map: nn.Module = nn.Identity()
        if config.mlp is not None:
            self.map = Bottleneck(backbone.width_of(self.stream), config.mlp)
        elif wants.text_head:
            self.map = nn.Linear(backbone.width, backbone.width, bias=False)
            nn.init.eye_(self.map.weight)

    @classmethod
    def states(cls, config: ProbeConfig, backbone: Backbone) -> list[str]:
        stream = _stream(backbone)
        return [f"{stream}.{config.kept(backbone, stream)[-1]}"]

    def forward(self, batch: Batch) -> Features:
        return {self.stream: self.tail.final_norm(self.map(batch.states[self.state].float()), self.stream)}


def _stream(backbone: Backbone) -> str:
    # A text-to-text backbone is read at its encoder, a staged one at its last stage.
    return backbone.streams[-1 if backbone.shape == "pyramid" else 0]
