"""One number a sample: squared error on pooled features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from pipeline.extract.batch import Batch
from pipeline.train.configs import PooledConfig
from pipeline.train.features import Feature, Features
from pipeline.train.fit.finite import refuse_nan
from pipeline.train.objectives.base import Outputs, Vocabulary, register_objective
from pipeline.train.objectives.pooled import PooledHead
from pipeline.train.objectives.scores import ScalarObjective


class NumberHead(PooledHead):
    """One output."""

    def losses(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        assert batch.targets is not None
        out = self.outputs(features, batch).squeeze(-1)
        return {"number": F.mse_loss(out, batch.targets["label"].float())}

    def predict(self, features: Features, batch: Batch) -> Outputs:
        return {"label": refuse_nan(self.outputs(features, batch)).squeeze(-1)}


@register_objective("regression", PooledConfig)
class Regression(ScalarObjective):
    """Targets are numbers."""

    description = "one number a sample: a trainable linear map on pooled features"
    targets = ("number",)
    slots = True

    def encode(self, target: Any, meta: Mapping[str, Any]) -> dict[str, Any]:
        return {"label": np.float64(target)}

    def head(self, features: Mapping[str, Feature], vocabulary: Vocabulary) -> NumberHead:
        return NumberHead(features, 1, self.config.pooling)

    def entries(self, out: Outputs) -> list[dict[str, Any]]:
        return [{"label": value} for value in out["label"].tolist()]
