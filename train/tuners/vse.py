"""SHERL and UniPT as released for image–text retrieval with VSE∞ (methods §1.4, §3): their side width is a share of the
joint space's, not of the backbone's.

SHERL on encoders: features at side width are LayerNorm(Linear(h)), without gate matrices; the blend goes up by
Dropout(LayerNorm(Linear(ReLU))) and into the live last layer; the head's map to the joint space follows. UniPT's last
map goes to the joint space itself. On staged backbones both have their CNN forms, and SHERL reads its taps already
pooled, which is exact: nothing is learned before the pooling.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.extract.backbones.base import Backbone
from pipeline.extract.backbones.capabilities import LiveLast
from pipeline.extract.backbones.tail import LiveTail, Tail
from pipeline.extract.batch import Batch
from pipeline.extract.kernels.dropout import Dropout
from pipeline.store.errors import UserError
from pipeline.train.configs import SherlVseConfig, VseConfig
from pipeline.train.features import Features, Want
from pipeline.train.tuners.base import Tuner, form, full_precision, register_tuner, rows_of
from pipeline.train.tuners.conv import SherlConv, UniptConv, no_live_block, taps
from pipeline.train.tuners.mtsa import mix
from pipeline.train.tuners.unipt import EPSILON, Down, Unipt

DROPOUT, LAYER_NORM = 0.1, 1e-12  # of the way up, as released


def widths(config: VseConfig, backbone: Backbone, wants: Want) -> tuple[int, int]:
    """The side width and the joint width (the backbone's where nothing is compared). UserError where the reduction does
    not divide it."""
    joint = wants.joint or backbone.width
    if joint % config.reduction:
        raise UserError(f"reduction: must be a divisor of the joint width {joint}, not {config.reduction}")
    return joint // config.reduction, joint


@register_tuner("sherl-vse", SherlVseConfig)
class SherlVse(Tuner):
    """Parameters with n sets of width D, embedding and guide counted: n (Dd + 3d) + (d + 1) + (dD + 3D) + 1, and the
    norm that the backbone puts after its last block, if any."""

    description = "SHERL in its form for image–text retrieval (VSE∞): side width from the joint space"
    lr_pooled = 5e-4
    needs = (LiveLast,)
    one_stream = True
    tail: LiveTail

    def __init__(self, config: SherlVseConfig, backbone: Any, tail: LiveTail, wants: Want) -> None:
        super().__init__(config, backbone, tail, wants)
        self.stream, width = backbone.streams[-1], backbone.width
        inner = widths(config, backbone, wants)[0]
        self.names = _before_live(config, backbone)
        self.down = nn.ModuleList(Down(width, inner) for _ in range(len(self.names) + 1))
        self.score = nn.Linear(inner, 1)
        self.up = nn.Sequential(nn.Linear(inner, width), nn.LayerNorm(width, eps=LAYER_NORM), Dropout(DROPOUT))
        self.gate = nn.Parameter(torch.full((), float(config.gate)))
        self.norm = backbone.norm(self.stream)
        self.features = {self.stream: rows_of(backbone, self.stream)}

    @classmethod
    def refuse(cls, config: SherlVseConfig, backbone: Backbone) -> str | None:
        if backbone.projection is not None:
            return "tuner sherl-vse reads full states; extract without --projection"
        return None if _before_live(config, backbone) else "layers: none of them is before the live one"

    @classmethod
    def states(cls, config: SherlVseConfig, backbone: Backbone) -> list[str]:
        return [*backbone.embedding(backbone.streams[-1]), *_before_live(config, backbone)]

    def forward(self, batch: Batch) -> Features:
        with full_precision(batch.device):
            rows = [self.tail.embed(batch, self.stream).float(), *(batch.states[n].float() for n in self.names)]
            low = [down(h) for down, h in zip(self.down, rows, strict=True)]
            blended = mix(torch.stack(low[:-1], 1), low[-1], self.score, "redundancy", epsilon=EPSILON)
            entering = self.up(F.relu(blended)) + torch.tanh(self.gate / self.config.temperature) * rows[-1]
        return {self.stream: self.norm(self.tail({self.stream: entering}, batch))}


def _before_live(config: VseConfig, backbone: Backbone) -> list[str]:
    stream = backbone.streams[-1]
    return [f"{stream}.{i}" for i in config.kept(backbone, stream) if i < backbone.depth(stream) - 1]


@form("sherl-vse", "pyramid")
class SherlVseConv(SherlConv):
    """`SherlConv` at the side width of the joint space, its taps stored pooled: 2 MB an image of a ResNet at 512²
    instead of 16."""

    description = "SHERL in its form for image–text retrieval, on staged backbones"
    lr_pooled = 5e-4

    @classmethod
    def side_width(cls, config: Any, backbone: Backbone, wants: Want) -> int:
        return widths(config, backbone, wants)[0]

    @classmethod
    def refuse(cls, config: Any, backbone: Backbone) -> str | None:
        return no_live_block(backbone)

    @classmethod
    def states(cls, config: Any, backbone: Backbone) -> list[str]:
        return [*backbone.made_states(), taps(config, backbone, "sherl-vse", live=True)[-1]]

    def pooled(self, batch: Batch) -> list[Tensor]:
        *finer, guide = (batch.states[name].float() for name in self.names)
        return [*finer, 2 * guide]


@register_tuner("unipt-vse", VseConfig)
class UniptVse(Unipt):
    """As `Unipt`, at the side width of the joint space, to which its last map goes. Parameters with n states of width
    D: n (Dd + 3d) + (d + 1) + (d² + 3d) + dJ + J."""

    description = "UniPT in its form for image–text retrieval (VSE∞): it maps to the joint space itself"
    lr_pooled = 5e-4
    projects = True

    def __init__(self, config: Any, backbone: Backbone, tail: Tail, wants: Want) -> None:
        super().__init__(config, backbone, tail, wants)
        self.features = _mapped(self, wants)

    @classmethod
    def states(cls, config: Any, backbone: Backbone) -> list[str]:
        return super().states(config, backbone)

    @classmethod
    def widths(cls, config: Any, backbone: Backbone, wants: Want) -> tuple[int, int]:
        return widths(config, backbone, wants)


@form("unipt-vse", "pyramid")
class UniptVseConv(UniptConv):
    """As `UniptConv`, likewise. Its taps are weighed by what is learned before they are pooled, and so stored whole."""

    description = "UniPT in its form for image–text retrieval, on staged backbones"
    lr_pooled = 5e-4

    def __init__(self, config: Any, backbone: Backbone, tail: Tail, wants: Want) -> None:
        super().__init__(config, backbone, tail, wants)
        self.features = _mapped(self, wants)

    @classmethod
    def widths(cls, config: Any, backbone: Backbone, wants: Want) -> tuple[int, int]:
        return widths(config, backbone, wants)


def _mapped(tuner: Unipt | UniptConv, wants: Want) -> dict[str, Any]:
    width = tuner.up.out_features
    return {name: replace(f, width=width, mapped=wants.joint is not None) for name, f in tuner.features.items()}
