"""One class a sample: cross entropy on pooled features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from pipeline.extract.backbones.batch import Batch
from pipeline.train.configs import PooledConfig
from pipeline.train.features import Feature, Features
from pipeline.train.finite import refuse_nan
from pipeline.train.objectives.base import Objective, Outputs, Vocabulary, register
from pipeline.train.objectives.pooled import PooledHead
from pipeline.train.objectives.scores import ScalarScorer


class ClassHead(PooledHead):
    """Logits of the classes."""

    def losses(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        assert batch.targets is not None
        return {"class": F.cross_entropy(self.outputs(features, batch), batch.targets["label"])}

    def predict(self, features: Features, batch: Batch) -> Outputs:
        chance, label = refuse_nan(self.outputs(features, batch)).softmax(-1).max(-1)
        return {"label": label, "probability": chance}


@register("classification", PooledConfig)
class Classification(Objective):
    """Targets are class indices."""

    description = "one class a sample: a trainable linear map on pooled features"
    targets = ("class",)
    slots = True

    def encode(self, target: Any, meta: Mapping[str, Any]) -> dict[str, Any]:
        return {"label": np.int64(target)}

    def head(self, features: Mapping[str, Feature], vocabulary: Vocabulary) -> ClassHead:
        return ClassHead(features, len(self.answers.labels), self.config.pooling)

    def scorer(self) -> ScalarScorer:
        return ScalarScorer(self.answers.metrics)

    def entries(self, out: Outputs) -> list[dict[str, Any]]:
        pairs = zip(out["label"].tolist(), out["probability"].tolist(), strict=True)
        return [{"label": self.answers.labels[label], "probability": chance} for label, chance in pairs]
