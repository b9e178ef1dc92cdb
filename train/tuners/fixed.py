"""The frozen backbone's feature pyramid as it is: what trains is the objective's head alone."""

from __future__ import annotations

from torch import nn

from pipeline.extract.backbones.base import Backbone
from pipeline.extract.backbones.capabilities import Levels, LiveLast, Patches
from pipeline.extract.backbones.tail import Tail
from pipeline.extract.batch import Batch
from pipeline.train.configs import FixedConfig
from pipeline.train.features import Features, Want
from pipeline.train.tuners.base import Tuner, form, register_tuner, rows_of


@register_tuner("fixed", FixedConfig)
class Fixed(Tuner):
    """No parameters. One map a level, the output of the last block of each (`Levels.levels`); where the backbone is one
    of layer norms (Swin), normalised before the neck as there, with nothing to train: where E³VA starts, too."""

    description = "the head alone on the frozen backbone's feature pyramid: the floor of dense tasks"
    shapes = ("pyramid",)
    needs = (Levels,)
    widens = True
    lr_pooled = 3e-3

    def __init__(self, config: FixedConfig, backbone: Backbone, tail: Tail, wants: Want) -> None:
        super().__init__(config, backbone, tail, wants)
        self.names = self.states(config, backbone)
        self.norms = nn.ModuleDict({s: before_neck(backbone, s) for s in levels(backbone)}).requires_grad_(False)
        self.features = {s: rows_of(backbone, s) for s in levels(backbone)}

    @classmethod
    def states(cls, config: FixedConfig, backbone: Backbone) -> list[str]:
        return [f"{s}.{backbone.depth(s) - 1}" for s in levels(backbone)]

    def forward(self, batch: Batch) -> Features:
        named = zip(self.features, self.names, strict=True)
        return {s: self.norms[s](self.backbone.widened(n, batch.states[n])) for s, n in named}


@form("fixed", "sequence")
class FixedPatches(Tuner):
    """No parameters. The patches of a plain vision transformer behind its own final norm, one map."""

    description = Fixed.description
    needs = (Patches,)
    widens = True
    lr_pooled = Fixed.lr_pooled

    def __init__(self, config: FixedConfig, backbone: Backbone, tail: Tail, wants: Want) -> None:
        super().__init__(config, backbone, tail, wants)
        (self.state,) = self.states(config, backbone)
        self.features = {backbone.streams[-1]: rows_of(backbone, backbone.streams[-1])}

    @classmethod
    def states(cls, config: FixedConfig, backbone: Backbone) -> list[str]:
        stream = backbone.streams[-1]
        return [f"{stream}.{backbone.depth(stream) - 1}"]

    def forward(self, batch: Batch) -> Features:
        stream = self.backbone.streams[-1]
        return {stream: self.tail.final_norm(self.backbone.widened(self.state, batch.states[self.state]), stream)}


def levels(backbone: Backbone) -> tuple[str, ...]:
    """The streams of a staged backbone's feature pyramid."""
    assert isinstance(backbone, Levels)
    return backbone.levels


def before_neck(backbone: Backbone, stream: str) -> nn.Module:
    """A fresh norm for a level before a neck reads it, of the kind the backbone has; Identity where it has none."""
    return backbone.norm(stream) if isinstance(backbone, LiveLast) else nn.Identity()
