"""Scores of one number a sample: what classification and regression are judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pipeline.extract.backbones.batch import Batch
from pipeline.train.metrics import score
from pipeline.train.objectives.base import Outputs, Scorer


class ScalarScorer(Scorer):
    """The metrics of `names` (see `train.metrics`) and their average, of predictions `label` against the targets
    `label`; `truth(labels)` (n,) is what these count as. Keeps three numbers a sample: rank correlations need them
    all."""

    def __init__(self, names: Sequence[str], truth: Callable[[np.ndarray], Any] = lambda labels: labels) -> None:
        self.names, self.truth = tuple(names), truth
        self._seen: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def update(self, out: Outputs, batch: Batch) -> None:
        assert batch.targets is not None
        predicted = out["label"].double().numpy()
        self._seen.append((batch.index, predicted, batch.targets["label"].cpu().double().numpy()))

    def merge(self, other: ScalarScorer) -> None:
        self._seen += other._seen

    def compute(self) -> dict[str, float]:
        index, predicted, truth = (np.concatenate(column) for column in zip(*self._seen, strict=True))
        order = np.argsort(index, kind="stable")  # sums do not depend on how samples were batched
        return score(self.names, predicted[order], self.truth(truth[order]))
