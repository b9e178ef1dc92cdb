"""SHERL and UniPT in the form of CLIP4Clip: a correction of the pooled embedding, no live layer (methods §1.5, §3).

    f: the normalised class token;  g = Lin(ReLU f);  Tᵢ = Linᵢ(ReLU hᵢ) for the embedding and every block
    pᵢ = Σ weights · Tᵢ + Tᵢ[class token];  out = f + Lin(ReLU(blend of the pᵢ))

The released code works on both towers of CLIP at the joint width 512 after CLIP's projection (`Tower(768, 512, 13)` and
`Tower(512, 512, 13)`: 9,597,980 parameters for SHERL and 9,584,642 for UniPT, which are the published 9.6 M); so do
these tuners where two slots are compared and the checkpoint has the projection. The text's token is its last, that of
the largest id. Elsewhere they work at the backbone's own width, for classes or values. The released code takes id 0 for
padding, a real one too; here padding is what stands behind a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.extract.backbones.base import Backbone
from pipeline.extract.backbones.capabilities import ClassToken
from pipeline.extract.backbones.tail import Tail
from pipeline.extract.batch import Batch, Layout
from pipeline.train.configs import ClipConfig, SherlClipConfig
from pipeline.train.features import Feature, Features, Want
from pipeline.train.tuners.base import StateLinear, Tuner, checked_reduction, full_precision, register_tuner
from pipeline.train.tuners.mtsa import EPSILON, mix

TEMPERATURE = 0.1  # of the gates


class Tower(nn.Module):
    """One tower: `states` states of `width` and a pooled embedding of `joint` → a corrected embedding.

    Parameters: states (width · d + d) + 2 (joint · d) + d + joint + what a subclass adds, with d the side width.
    """

    def __init__(self, width: int, joint: int, states: int, inner: int) -> None:
        super().__init__()
        self.guide = nn.Linear(joint, inner)
        self.down = nn.ModuleList(StateLinear(width, inner) for _ in range(states))
        self.score = nn.Linear(inner, 1)
        self.up = nn.Linear(inner, joint)

    def forward(self, pooled: Tensor, states: Sequence[Tensor], layout: Layout, base: Tensor) -> Tensor:
        """`pooled` (B, joint), each of `states` (rows, width), `base` (B,): the row of each sample's pooled token."""
        with full_precision(pooled.device):
            pooled = pooled.float()
            guide = self.guide(F.relu(pooled))
            low = [down(F.relu(h)) for down, h in zip(self.down, states, strict=True)]
            return pooled + self.up(F.relu(self.blend(guide, low, layout, base)))

    def blend(self, guide: Tensor, low: list[Tensor], layout: Layout, base: Tensor) -> Tensor:
        raise NotImplementedError


class SherlTower(Tower):
    """SHERL: learned scores within each state, then redundancy and layer attention. Adds states (d + 1) + (d + 1).
    `gated`: the base row of each state counts sigmoid(γ / 0.1), from γ = 1, as the released code has it on MSR-VTT;
    that adds a γ a state."""

    def __init__(self, width: int, joint: int, states: int, inner: int, gated: bool = False) -> None:
        super().__init__(width, joint, states, inner)
        self.spatial = nn.ModuleList(nn.Linear(inner, 1) for _ in range(states))
        self.gates = nn.Parameter(torch.ones(states)) if gated else None

    def blend(self, guide: Tensor, low: list[Tensor], layout: Layout, base: Tensor) -> Tensor:
        around = guide[layout.sample]
        gates: Any = [None] * len(low) if self.gates is None else torch.sigmoid(self.gates / TEMPERATURE)
        tokens = [
            _gather(F.relu(s(around * t)), t, layout, base, share=share)
            for s, t, share in zip(self.spatial, low, gates, strict=True)
        ]
        return mix(torch.stack(tokens, 1), guide, self.score, "redundancy")


class UniptTower(Tower):
    """UniPT: products with the guide within each state, softmax confidence over states. Adds d + 1."""

    def blend(self, guide: Tensor, low: list[Tensor], layout: Layout, base: Tensor) -> Tensor:
        around = guide[layout.sample]
        products = [F.relu((around * t).sum(-1, keepdim=True)) for t in low]
        tokens = torch.stack([_gather(p, t, layout, base, True) for p, t in zip(products, low, strict=True)], 1)
        scores = torch.cat([self.score(guide * layout.mean(t)) for t in low], dim=1)
        return (scores.softmax(1).unsqueeze(-1) * tokens).sum(1)


def _gather(
    weights: Tensor, rows: Tensor, layout: Layout, base: Tensor, clamped: bool = False, share: Tensor | None = None
) -> Tensor:
    """(rows, 1) weights ≥ 0, l1-normalised within each sample; their weighted sum of rows and the base row, or a
    `share` of it. (B, d).

    The released SHERL adds 1e-6 to a sum of weights, the released UniPT makes it 1e-6 at least (`clamped`)."""
    zero = rows.new_zeros(len(layout.lengths), 1)
    total = zero.index_add(0, layout.sample, weights)
    total = total.clamp(min=EPSILON) if clamped else total + EPSILON
    own = rows[base] if share is None else share * rows[base]
    return (
        rows.new_zeros(len(base), rows.shape[1]).index_add(0, layout.sample, weights / total[layout.sample] * rows)
        + own
    )


class ClipTuner(Tuner):
    """What the two forms share."""

    needs = (ClassToken,)
    tower: type[Tower]

    def __init__(self, config: ClipConfig, backbone: Backbone, tail: Tail, wants: Want) -> None:
        super().__init__(config, backbone, tail, wants)
        assert isinstance(backbone, ClassToken)
        self.names = _names(config, backbone)
        # Where samples are compared, in the space of CLIP's own projection, which then is the joint one.
        joint = backbone.projected_width if wants.joint else None
        width = joint or backbone.width
        inner = checked_reduction(config.reduction, width)
        states = len(self.names) + (not backbone.embedding("encoder"))  # of texts it is looked up
        self.side = self._tower(config, backbone.width, width, states, inner)
        self.features = {"class token": Feature(width, mapped=joint is not None)}

    def _tower(self, config: Any, width: int, joint: int, states: int, inner: int) -> Tower:
        return self.tower(width, joint, states, inner)

    def forward(self, batch: Batch) -> Features:
        """(B, width): one row a sample."""
        layout, last = batch.layout("encoder"), f"encoder.{self.backbone.depth('encoder') - 1}"
        assert isinstance(self.backbone, ClassToken)
        at = self.backbone.class_rows(batch)
        pooled = self.tail.final_norm(batch.states[last].index_select(0, at).float(), "encoder")
        if self.features["class token"].mapped:
            pooled = self.tail.projected(pooled)
        embedding = [self.tail.embed(batch, "encoder")] if not self.backbone.embedding("encoder") else []
        return {"class token": self.side(pooled, [*embedding, *(batch.states[n] for n in self.names)], layout, at)}


def _names(config: ClipConfig, backbone: Backbone) -> list[str]:
    layers = [f"encoder.{i}" for i in config.kept(backbone, "encoder")]
    return [*backbone.embedding("encoder"), *layers]


def _read(config: ClipConfig, backbone: Backbone) -> list[str]:
    last = f"encoder.{backbone.depth('encoder') - 1}"
    names = _names(config, backbone)
    return names if last in names else [*names, last]


@register_tuner("sherl-clip", SherlClipConfig)
class SherlClip(ClipTuner):
    description = "SHERL as on CLIP4Clip: a correction of the class token, no live layer"
    tower = SherlTower

    def _tower(self, config: Any, width: int, joint: int, states: int, inner: int) -> Tower:
        return SherlTower(width, joint, states, inner, config.base_gate)

    @classmethod
    def states(cls, config: ClipConfig, backbone: Backbone) -> list[str]:
        return _read(config, backbone)


@register_tuner("unipt-clip", ClipConfig)
class UniptClip(ClipTuner):
    description = "UniPT as on CLIP4Clip: a correction of the class token"
    tower = UniptTower

    @classmethod
    def states(cls, config: ClipConfig, backbone: Backbone) -> list[str]:
        return _read(config, backbone)
