"""One class a sample: cross entropy on pooled features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.extract.batch import Batch
from pipeline.train.features import Feature, Features
from pipeline.train.fit.finite import refuse_nan
from pipeline.train.objective_configs import ClassificationConfig, named_weights
from pipeline.train.objectives.base import Outputs, Vocabulary, register_objective
from pipeline.train.objectives.pooled import PooledHead
from pipeline.train.objectives.scores import ScalarObjective


class ClassHead(PooledHead):
    """Logits of the classes. `weights`: what a sample of each class counts, () for alike."""

    def losses(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        """Σ w_y · cross entropy / Σ w_y, torch's weighted mean."""
        assert batch.targets is not None
        return {"class": F.cross_entropy(self.outputs(features, batch), batch.targets["label"], self.weights)}

    def weight(self, batch: Batch) -> float:
        """The sum of the samples' weights, so that batches of a step and ranks add up to one weighted mean."""
        if self.weights is None:
            return super().weight(batch)
        assert batch.targets is not None
        return float(self.weights[batch.targets["label"].to(self.weights.device)].sum(dtype=torch.float64))

    def predict(self, features: Features, batch: Batch) -> Outputs:
        chance, label = refuse_nan(self.outputs(features, batch)).softmax(-1).max(-1)
        return {"label": label, "probability": chance}

    def measure(self, features: Features, batch: Batch) -> Outputs:
        """`label` (B,), and `chances` (B, classes)."""
        chances = refuse_nan(self.outputs(features, batch)).softmax(-1)
        return {"label": chances.max(-1).indices, "chances": chances}


@register_objective("classification", ClassificationConfig)
class Classification(ScalarObjective):
    """Targets are class indices."""

    description = "one class a sample: a trainable linear map on pooled features"
    targets = ("class",)
    ranks = True
    slots = True

    def encode(self, target: Any, meta: Mapping[str, Any]) -> dict[str, Any]:
        return {"label": np.int64(target)}

    def head(self, features: Mapping[str, Feature], vocabulary: Vocabulary) -> ClassHead:
        labels, config = self.answers.labels, self.config
        weights = named_weights("class_weights", config.class_weights, labels)
        return ClassHead(features, len(labels), config.pooling, weights)

    def entries(self, out: Outputs) -> list[dict[str, Any]]:
        pairs = zip(out["label"].tolist(), out["probability"].tolist(), strict=True)
        return [{"label": self.answers.labels[label], "probability": chance} for label, chance in pairs]
