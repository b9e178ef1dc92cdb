"""Linear probe: a linear map on the mean of the backbone's last state. The floor every side network must beat.

Under a language model's frozen head it is a D × D map before the final norm, from the identity, or an MLP with a
residual connection, from zero: at its start the model is the frozen one.
"""

from __future__ import annotations

from torch import nn

from pipeline.extract.backbones.base import Family, Tail
from pipeline.extract.backbones.batch import Batch
from pipeline.train.adapters import Bottleneck
from pipeline.train.configs import ProbeConfig
from pipeline.train.features import Features, Want
from pipeline.train.tuners.base import Tuner, register, rows_of


@register("probe", ProbeConfig)
class Probe(Tuner):
    """No parameters of its own unless the head is frozen; then D². An MLP of width h has 2 D h + D + h. Reads a T5's
    encoder, the last stage of a staged backbone."""

    description = "linear probe on the mean of the last state: the floor"
    lr_pooled = 1e-2
    shapes = ("sequence", "pyramid")
    continues_text = True

    def __init__(self, config: ProbeConfig, family: Family, tail: Tail, wants: Want) -> None:
        super().__init__(config, family, tail, wants)
        self.stream = _stream(family)
        self.features = {self.stream: rows_of(family, self.stream)}
        (self.state,) = self.states(config, family)
        self.map: nn.Module = nn.Identity()
        if config.mlp is not None:
            self.map = Bottleneck(family.width_of(self.stream), config.mlp)
        elif wants.text_head:
            self.map = nn.Linear(family.width, family.width, bias=False)
            nn.init.eye_(self.map.weight)

    @classmethod
    def states(cls, config: ProbeConfig, family: Family) -> list[str]:
        stream = _stream(family)
        layer = config.kept(family, "probe", stream)[0] if config.layers else family.depth(stream) - 1
        return [f"{stream}.{layer}"]

    def forward(self, batch: Batch) -> Features:
        return {self.stream: self.tail.final_norm(self.map(batch.states[self.state].float()), self.stream)}


def _stream(family: Family) -> str:
    # A text-to-text backbone is read at its encoder, a staged one at its last stage.
    return family.streams[-1 if family.shape == "pyramid" else 0]
