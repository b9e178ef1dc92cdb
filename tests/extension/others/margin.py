"""An objective: one class a sample by a multi-class hinge loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.nn import functional as F

from pipeline.extract.options import option
from pipeline.train.configs import PooledConfig
from pipeline.train.objectives import register_objective
from pipeline.train.objectives.classification import ClassHead, Classification


@dataclass(frozen=True)
class MarginConfig(PooledConfig):
    margin: float = option(1.0, "Distance that the right class must keep.", above=0)


class MarginHead(ClassHead):
    margin: float

    def losses(self, features: Any, batch: Any) -> dict[str, Any]:
        outputs = self.outputs(features, batch)
        return {"margin": F.multi_margin_loss(outputs, batch.targets["label"], margin=self.margin)}


@register_objective("margin", MarginConfig)
class Margin(Classification):
    description = "one class a sample: multi-class hinge loss on pooled features"

    def head(self, features: Any, vocabulary: Any) -> MarginHead:
        head = MarginHead(features, len(self.answers.labels), self.config.pooling)
        head.margin = self.config.margin
        return head
