"""Head2Toe (Evci et al., ICML 2022): a linear head on the features of all layers that earn their place.

The states of every block are averaged over a sample's positions, scaled to unit norm a layer (so that no layer wins by
its size) and concatenated. A linear head learns on all of them under a group lasso, one group a feature; after
`select_after` training batches the features with the largest weight norms stay and the head goes on with these alone.
The paper fits the head anew after selection, and averages maps to several cells where here it is one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.extract.backbones.base import Family, Tail
from pipeline.extract.backbones.batch import Batch
from pipeline.store.errors import UserError
from pipeline.train.heads.pooled import PooledHead, pool
from pipeline.train.tuners.base import Tuner, TunerConfig, register


@dataclass(frozen=True)
class Head2ToeConfig(TunerConfig):
    """`features`: share of all features that stay. `lasso`: weight of the group lasso, Σ over features of the norm of
    the head's weights on it. `select_after`: training batches before the selection."""

    features: float = 0.1
    lasso: float = 1e-4
    select_after: int = 100

    def __post_init__(self) -> None:
        if not 0 < self.features <= 1:
            raise ValueError(f"features: a share above 0 and at most 1, not {self.features}")
        if self.lasso < 0:
            raise ValueError(f"lasso: not below 0, was {self.lasso}")
        if self.select_after < 1:
            raise ValueError(f"select_after: at least 1, not {self.select_after}")


@register("head2toe", Head2ToeConfig)
class Head2Toe(Tuner):
    """No parameters but the head's: (features + 1) · classes. Reads a T5's encoder."""

    description = "Head2Toe: a linear head on selected features of all layers"
    lr_pooled = 1e-2
    pooled = True
    projects = True
    shapes = ("sequence", "pyramid")

    mask: Tensor
    seen: Tensor

    def __init__(self, config: Head2ToeConfig, family: Family, tail: Tail) -> None:
        super().__init__(config, family, tail)
        self.names = self.states(config, family)
        self.stream, self.output_width = "", sum(map(family.state_width, self.names))
        self.register_buffer("mask", torch.ones(self.output_width))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    @classmethod
    def states(cls, config: Head2ToeConfig, family: Family) -> list[str]:
        if family.shape == "pyramid":
            if config.layers:
                raise UserError(f"layers: head2toe on {family.name} backbones reads every block")
            return [f"{s}.{i}" for s in family.streams for i in range(family.depth(s))]
        stream = family.streams[0]  # a decoder's states in training would tell the label
        chosen = config.kept(family, "head2toe", stream) if config.layers else range(family.depth(stream))
        return [f"{stream}.{i}" for i in chosen]

    def forward(self, batch: Batch) -> Tensor:
        """(B, features), zero where a feature was not selected."""
        pooled = [pool(batch.states[n].float(), batch.layout(n.split(".")[0])) for n in self.names]
        return torch.cat([F.normalize(p, dim=1) for p in pooled], dim=1) * self.mask

    def penalty(self, head: nn.Module) -> Tensor | None:
        assert isinstance(head, PooledHead)
        return self.config.lasso * head.linear.weight.norm(dim=0).sum() if self._selecting() else None

    def _selecting(self) -> bool:
        return bool(self.seen < self.config.select_after)

    def stepped(self, head: nn.Module) -> None:
        assert isinstance(head, PooledHead)
        if self._selecting():
            self.seen += 1
            if not self._selecting():
                self._select(head.linear.weight.detach().norm(dim=0))

    def remark(self) -> str:
        used = int(self.mask.sum())
        if used == len(self.mask):
            when = f"selection comes after {self.config.select_after} steps; train longer for Head2Toe proper"
            return f"no feature was left out: the best epoch came before the selection ({when})"
        return f"{used:,} of {len(self.mask):,} features are used"

    def _select(self, norms: Tensor) -> None:
        stay = norms.topk(max(1, round(self.config.features * len(norms)))).indices
        self.mask.zero_().index_fill_(0, stay, 1.0)
