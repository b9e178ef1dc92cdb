"""Any number of classes a sample: a binary cross entropy for each on pooled features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score, f1_score
from torch import Tensor
from torch.nn import functional as F

from pipeline.extract.backbones.batch import Batch
from pipeline.train.configs import MultilabelConfig
from pipeline.train.features import Feature, Features
from pipeline.train.finite import refuse_nan
from pipeline.train.objectives.base import Objective, Outputs, Scorer, Vocabulary, register
from pipeline.train.objectives.pooled import PooledHead


class MultilabelHead(PooledHead):
    """A logit for each label."""

    def losses(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        assert batch.targets is not None
        logits = self.outputs(features, batch)
        return {"labels": F.binary_cross_entropy_with_logits(logits, batch.targets["labels"])}

    def predict(self, features: Features, batch: Batch) -> Outputs:
        return {"chances": refuse_nan(self.outputs(features, batch)).sigmoid()}


class MultilabelScorer(Scorer):
    """F1 over all decisions (micro), its mean over labels (macro), and the mean average precision over labels that
    occur (map). Keeps a byte and a float a sample and label: average precision ranks them all."""

    chosen = "micro_f1"

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._seen: list[tuple[np.ndarray, np.ndarray]] = []

    def update(self, out: Outputs, batch: Batch) -> None:
        assert batch.targets is not None
        self._seen.append((out["chances"].float().numpy(), batch.targets["labels"].cpu().numpy() > 0.5))

    def merge(self, other: MultilabelScorer) -> None:
        self._seen += other._seen

    def compute(self) -> dict[str, float]:
        chances, truth = (np.concatenate(column) for column in zip(*self._seen, strict=True))
        told, there = chances >= self.threshold, truth.any(0)
        precise = average_precision_score(truth[:, there], chances[:, there], average="macro") if there.any() else 0.0
        return {
            "micro_f1": float(f1_score(truth, told, average="micro", zero_division=0.0)),
            "macro_f1": float(f1_score(truth, told, average="macro", zero_division=0.0)),
            "map": float(precise),
        }


@register("multilabel", MultilabelConfig)
class Multilabel(Objective):
    """Targets are lists of class indices, empty ones too."""

    description = "any number of labels a sample: a trainable linear map on pooled features"
    targets = ("classes",)

    def encode(self, target: Sequence[int], meta: Mapping[str, Any]) -> dict[str, Any]:
        labels = np.zeros(len(self.answers.labels), np.float32)
        labels[list(target)] = 1.0
        return {"labels": labels}

    def collate(self, items: Sequence[Mapping[str, Any]], batch: Batch) -> dict[str, Tensor]:
        """`labels` (B, classes)."""
        return {"labels": torch.from_numpy(np.stack([item["labels"] for item in items]))} if items else {}

    def head(self, features: Mapping[str, Feature], vocabulary: Vocabulary) -> MultilabelHead:
        return MultilabelHead(features, len(self.answers.labels), self.config.pooling)

    def scorer(self) -> MultilabelScorer:
        return MultilabelScorer(self.config.threshold)

    def entries(self, out: Outputs) -> list[dict[str, Any]]:
        told = []
        for chances in out["chances"].tolist():
            found = [i for i, chance in enumerate(chances) if chance >= self.config.threshold]
            told.append(
                {"labels": [self.answers.labels[i] for i in found], "probabilities": [chances[i] for i in found]}
            )
        return told
