"""The frozen backbone's feature pyramid as it is: what trains is the objective's head alone."""

from __future__ import annotations

from pipeline.extract.backbones.base import Family, Tail
from pipeline.extract.backbones.batch import Batch
from pipeline.extract.backbones.pyramid import Pyramid
from pipeline.train.configs import FixedConfig
from pipeline.train.features import Features, Want
from pipeline.train.tuners.base import Tuner, register, rows_of


@register("fixed", FixedConfig)
class Fixed(Tuner):
    """No parameters. One map a level, the output of the last block of each (`Pyramid.levels`)."""

    description = "the head alone on the frozen backbone's feature pyramid: the floor of dense tasks"
    shapes = ("pyramid",)
    lr_pooled = 3e-3

    def __init__(self, config: FixedConfig, family: Family, tail: Tail, wants: Want) -> None:
        super().__init__(config, family, tail, wants)
        self.names = self.states(config, family)
        self.features = {s: rows_of(family, s) for s in levels(family)}

    @classmethod
    def states(cls, config: FixedConfig, family: Family) -> list[str]:
        return [f"{s}.{family.depth(s) - 1}" for s in levels(family)]

    def forward(self, batch: Batch) -> Features:
        return {s: batch.states[n].float() for s, n in zip(self.features, self.names, strict=True)}


def levels(family: Family) -> tuple[str, ...]:
    """The streams of a staged backbone's feature pyramid."""
    assert isinstance(family, Pyramid)
    return family.levels
