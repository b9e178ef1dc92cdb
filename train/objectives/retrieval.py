"""What objectives that rank one slot against another share: the head that embeds both, the score, what is predicted.

Each slot's features are mapped to one width, pooled over their positions and normalised; the similarity of two samples
is the product of these. A batch holds pairs; samples of two pairs that share a sample of either slot (two captions of
one image) belong to each other too and are no negatives: `Batch.ids` tells, which follows from keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.extract.backbones.grids import COLUMN, cells, max_cells, mean_cells
from pipeline.extract.backbones.videos import frames_of
from pipeline.extract.batch import Batch, Layout
from pipeline.store.errors import UserError
from pipeline.train.features import Feature, Features, Want
from pipeline.train.fit.finite import refuse_nan
from pipeline.train.gathered import counts_of, gathered, gathered_numbers, several_ranks
from pipeline.train.objective_configs import RetrievalConfig
from pipeline.train.objectives.base import Answers, Head, Objective, Outputs, Scorer
from pipeline.train.objectives.gpo import Gpo
from pipeline.train.objectives.ranking import RankScorer, figures_of

EPSILON = 1e-8  # added to l2 norms, as in the released code of VSE∞


def normalised(rows: Tensor) -> Tensor:
    """(m, D) rows over their l2 norms."""
    return rows / (rows.norm(dim=-1, keepdim=True) + EPSILON)


def frames_mean(embedded: Tensor, layout: Layout) -> Tensor:
    """(frames, D) of length 1 → (videos, D), their means over the frames of each, of length 1 again."""
    return normalised(layout.mean(embedded))


class RetrievalHead(Head):
    """Embeds the samples of two slots. Parameters: of each feature of width C a linear map to the joint width D, C · D
    + D, unless the tuner has mapped it (`Feature.mapped`); of GPO 12,704 a slot (see `Gpo`)."""

    def __init__(self, features: Mapping[str, Feature], config: RetrievalConfig) -> None:
        super().__init__()
        self.features, self.config = dict(features), config
        self.slots = tuple(dict.fromkeys(name.partition("/")[0] for name in features))
        self.maps = nn.ModuleDict()
        for name, feature in features.items():
            if not feature.mapped:
                self.maps[name] = drawn(nn.Linear(feature.width, config.joint_width))
            elif feature.width != config.joint_width:
                raise UserError(
                    f"--joint-width {config.joint_width}: the tuner of slot {name.partition('/')[0]} maps to "
                    f"{feature.width}; give both the same"
                )
        if config.pooling == "gpo":
            self.pools = nn.ModuleDict({slot: Gpo() for slot in self.slots})

    def embed(self, slot: str, features: Features, batch: Batch) -> Tensor:
        """(m, D) float32 of length 1, the distinct samples of `slot`; of videos the mean of their frames, each of
        length 1 before (CLIP4Clip's mean pooling)."""
        named = [(name, feature) for name, feature in self.features.items() if name.partition("/")[0] == slot]
        part = batch.of(slot)
        frames = frames_of(part, named[0][1].maps)
        seen = part if frames is None else frames.batch
        parts = [self._pooled(slot, name, feature, features[name].float(), seen) for name, feature in named]
        embedded = normalised(torch.stack(parts).sum(0) if len(parts) > 1 else parts[0])
        return embedded if frames is None else frames_mean(embedded, frames.layout)

    def _pooled(self, slot: str, name: str, feature: Feature, rows: Tensor, batch: Batch) -> Tensor:
        """`batch`: the part of `slot`, of videos its frames."""
        mapped = self.maps[name] if name in self.maps else nn.Identity()
        if not feature.stream:
            return mapped(rows).float()
        layout = batch.layout(feature.stream.partition("/")[2])
        if self.config.cells > 1 and feature.kind == "map":
            rows, layout = in_cells(rows, batch, feature, self.config.cells)
        if self.training and self.config.drop_cells and feature.kind == "map":
            rows, layout = dropped(rows, layout, self.config.drop_cells)
        pooling = self.config.pooling
        if pooling == "gpo":
            return self.pools[slot](mapped(rows).float(), layout)
        if pooling == "max":
            return layout.pad(mapped(rows).float(), -math.inf).amax(1)
        # A linear map of a mean is the mean of the mapped rows.
        if pooling == "mean":
            return mapped(layout.mean(rows)).float()
        return mapped(rows.index_select(0, layout.first + (layout.lengths - 1 if pooling == "last" else 0))).float()

    def paired(self, features: Features, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, B) similarity of each pair's sample of the first slot to each pair's of the second; and (B, B) bool,
        which are no negatives of each other, the diagonal among them. With several ranks the pairs are those of all."""
        first, second = (batch.spread(f"{slot}/", self.embed(slot, features, batch)) for slot in self.slots)
        numbers = [batch.numbers.get(slot, batch.ids[slot]) for slot in self.slots]
        if several_ranks():
            counts = counts_of(len(batch), first.device)
            first, second = gathered(first, counts), gathered(second, counts)
            numbers = [gathered_numbers(own, counts, first.device) for own in numbers]
        alike = np.zeros((len(first), len(first)), bool)
        for own in numbers:
            alike |= own[:, None] == own[None]
        return first @ second.t(), torch.from_numpy(alike).to(first.device)

    def weight(self, batch: Batch) -> float:
        """With several ranks each has the loss of all pairs, whatever its share of them."""
        return 1.0 if several_ranks() else super().weight(batch)

    def predict(self, features: Features, batch: Batch) -> Outputs:
        """`similarity` (B,) of what each pair is made of, from -1 to 1."""
        first, second = (batch.spread(f"{slot}/", self.embed(slot, features, batch)) for slot in self.slots)
        return {"similarity": refuse_nan((first * second).sum(1))}

    def measure(self, features: Features, batch: Batch) -> Outputs:
        """`embedding` (m, D), of a batch that holds a single slot."""
        (slot,) = batch.ids
        return {"embedding": refuse_nan(self.embed(slot, features, batch))}


def drawn(linear: nn.Linear) -> nn.Linear:
    """Weights drawn uniformly as Glorot and Bengio (2010) say, no bias at first: as in VSE∞."""
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def in_cells(rows: Tensor, batch: Batch, feature: Feature, cell: int) -> tuple[Tensor, Layout]:
    """Maps brought to cells of `cell` × `cell` positions: the largest and the mean value of each channel, summed."""
    fine = batch.columns[COLUMN].cpu().numpy().reshape(len(batch), -1, 2)[:, feature.place]
    coarse = -(-fine // cell)
    count = coarse.prod(1)
    under = cells(fine, coarse, rows.device)
    pooled = max_cells(rows, under, int(count.sum())) + mean_cells(rows, under, int(count.sum()))
    return pooled, Layout.of(count, rows.device)


def dropped(rows: Tensor, layout: Layout, share: float) -> tuple[Tensor, Layout]:
    """`rows` without about `share` of each sample's, drawn now; every sample keeps one at least."""
    keep = torch.rand(len(rows), device=rows.device) >= share
    left = torch.zeros(len(layout.lengths), dtype=torch.long, device=rows.device).index_add(
        0, layout.sample, keep.long()
    )
    keep[layout.first[left == 0]] = True
    return rows[keep], Layout.of(left.clamp(min=1).cpu().numpy(), rows.device)


class Retrieval(Objective):
    """Pairs of two slots; what belongs together is to be more similar than what does not."""

    targets = ("pair",)
    unlabelled = True
    slots = True
    coupled = gathers = True
    usual_lr = 5e-4  # VSE∞'s

    def __init__(self, config: Any, answers: Answers) -> None:
        if len(answers.slots) != 2:
            raise UserError(f"objective {self.name} compares two slots, not {len(answers.slots)}")
        super().__init__(config, answers)
        self.wants = Want(joint=config.joint_width)  # type: ignore[misc]

    @property
    def metric_names(self) -> tuple[str, ...]:
        return figures_of(self.answers.slots, self.config.eval_folds)

    @property
    def usual(self) -> tuple[str, ...]:
        return self.metric_names

    def encode(self, target: Any, meta: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def scorer(self) -> Scorer:
        first = self.config.metric[0] if self.config.metric else "rsum"
        return RankScorer(self.answers.slots, self.config.eval_folds, self.metrics, first)

    def entries(self, out: Outputs) -> list[dict[str, Any]]:
        return [{"similarity": value} for value in out["similarity"].tolist()]
