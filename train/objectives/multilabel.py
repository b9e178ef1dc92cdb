"""Any number of classes a sample: a binary cross entropy for each on pooled features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.extract.batch import Batch
from pipeline.train.features import Feature, Features
from pipeline.train.fit.finite import refuse_nan
from pipeline.train.metrics import LABELS
from pipeline.train.objective_configs import MultilabelConfig, named_weights
from pipeline.train.objectives.base import Objective, Outputs, Report, Scorer, Vocabulary, register_objective
from pipeline.train.objectives.pooled import PooledHead
from pipeline.train.objectives.reports import shares

USUAL = ("micro_f1", "macro_f1", "map")


class MultilabelHead(PooledHead):
    """A logit for each label. `weights`: what a sample with each label counts beside one without, () for alike."""

    def losses(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        assert batch.targets is not None
        logits = self.outputs(features, batch)
        loss = F.binary_cross_entropy_with_logits(logits, batch.targets["labels"], pos_weight=self.weights)
        return {"labels": loss}

    def predict(self, features: Features, batch: Batch) -> Outputs:
        return {"chances": refuse_nan(self.outputs(features, batch)).sigmoid()}


class MultilabelScorer(Scorer):
    """Metrics `names` of LABELS (see `train.metrics`), the first of which selects the best epoch. Keeps a byte and a
    float a sample and label: average precision ranks them all."""

    def __init__(self, names: Sequence[str], threshold: float) -> None:
        self.names, self.threshold = tuple(names), threshold
        self._seen: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    @property
    def first(self) -> str:
        return self.names[0]

    def update(self, out: Outputs, batch: Batch) -> None:
        chances, there = labels_of(out, batch)
        self._seen.append((batch.index, chances, there))

    def merge(self, other: MultilabelScorer) -> None:
        self._seen += other._seen

    def compute(self) -> dict[str, float]:
        index, chances, there = (np.concatenate(column) for column in zip(*self._seen, strict=True))
        order = np.argsort(index, kind="stable")
        chances, there = chances[order], there[order]
        return {name: LABELS[name](there, chances >= self.threshold, chances) for name in self.names}


class LabelReport(Report):
    """Precision, recall, F1 and support of each label and the means over them, and for each label how many rows without
    and with it (rows) are told without and with it (columns)."""

    def __init__(self, labels: Sequence[str], threshold: float) -> None:
        self.labels, self.threshold = tuple(labels), threshold
        self.counts = np.zeros((len(labels), 2, 2), np.int64)  # label, there, told

    def update(self, out: Outputs, batch: Batch) -> None:
        from sklearn.metrics import multilabel_confusion_matrix  # see `train.metrics`

        chances, there = labels_of(out, batch)
        self.counts += multilabel_confusion_matrix(there, chances >= self.threshold)

    def compute(self) -> dict[str, Any]:
        matrices = dict(zip(self.labels, self.counts.tolist(), strict=True))
        return {**shares(self.labels, self.counts), "confusion": matrices}


def labels_of(out: Outputs, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """(B, labels) probabilities, and whether each is there."""
    assert batch.targets is not None
    return out["chances"].float().numpy(), batch.targets["labels"].cpu().numpy() > 0.5


@register_objective("multilabel", MultilabelConfig)
class Multilabel(Objective):
    """Targets are lists of class indices, empty ones too."""

    description = "any number of labels a sample: a trainable linear map on pooled features"
    figures = USUAL
    targets = ("classes",)
    slots = True

    def encode(self, target: Sequence[int], meta: Mapping[str, Any]) -> dict[str, Any]:
        labels = np.zeros(len(self.answers.labels), np.float32)
        labels[list(target)] = 1.0
        return {"labels": labels}

    def collate(self, items: Sequence[Mapping[str, Any]], batch: Batch) -> dict[str, Tensor]:
        """`labels` (B, classes)."""
        return {"labels": torch.from_numpy(np.stack([item["labels"] for item in items]))} if items else {}

    def head(self, features: Mapping[str, Feature], vocabulary: Vocabulary) -> MultilabelHead:
        labels, config = self.answers.labels, self.config
        weights = named_weights("positive_weights", config.positive_weights, labels)
        return MultilabelHead(features, len(labels), config.pooling, weights)

    @property
    def metric_names(self) -> tuple[str, ...]:
        return tuple(LABELS)

    def scorer(self) -> MultilabelScorer:
        return MultilabelScorer(self.metrics, self.config.threshold)

    def report(self) -> LabelReport:
        return LabelReport(self.answers.labels, self.config.threshold)

    def entries(self, out: Outputs) -> list[dict[str, Any]]:
        told = []
        for chances in out["chances"].tolist():
            found = [i for i, chance in enumerate(chances) if chance >= self.config.threshold]
            told.append(
                {"labels": [self.answers.labels[i] for i in found], "probabilities": [chances[i] for i in found]}
            )
        return told
