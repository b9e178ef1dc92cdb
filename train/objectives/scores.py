"""Objectives with one class or one number a sample: what they are judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from pipeline.extract.batch import Batch
from pipeline.train.metrics import CLASSES, NUMBERS, OF_TWO, RANKED, score
from pipeline.train.objectives.base import Objective, Outputs, Report, Scorer
from pipeline.train.objectives.reports import ConfusionReport, ResidualReport


class ScalarScorer(Scorer):
    """The metrics of `names` (see `train.metrics`), of predictions `label` against the targets `label`; `truth(labels)`
    (n,) is what these count as. `average`: their mean is told too, and selects the best epoch, else the first does.
    Keeps three numbers a sample, since rank correlations need them all, and for metrics of RANKED the probability of
    each class."""

    def __init__(
        self,
        names: Sequence[str],
        truth: Callable[[np.ndarray], Any] = lambda labels: labels,
        average: bool = True,
    ) -> None:
        self.names, self.truth, self.average = tuple(names), truth, average
        self._ranked = bool(RANKED.keys() & set(names))
        self._seen: list[tuple[np.ndarray, ...]] = []

    @property
    def first(self) -> str:
        return "average" if self.average else self.names[0]

    def update(self, out: Outputs, batch: Batch) -> None:
        assert batch.targets is not None
        seen = (batch.index, out["label"].double().numpy(), batch.targets["label"].cpu().double().numpy())
        self._seen.append((*seen, out["chances"].float().numpy()) if self._ranked else seen)

    def merge(self, other: ScalarScorer) -> None:
        self._seen += other._seen

    def compute(self) -> dict[str, float]:
        index, predicted, truth, *chances = (np.concatenate(column) for column in zip(*self._seen, strict=True))
        order = np.argsort(index, kind="stable")  # sums do not depend on how samples were batched
        ranked = chances[0][order] if chances else None
        return score(self.names, predicted[order], self.truth(truth[order]), ranked, self.average)


class ScalarObjective(Objective):
    """One class or one number a sample."""

    ranks: ClassVar[bool] = False  # whether its head measures `chances` (B, classes)

    @property
    def metric_names(self) -> tuple[str, ...]:
        if self.numbers:
            return tuple(NUMBERS)
        fitting = (*CLASSES, *RANKED) if self.ranks else tuple(CLASSES)
        # As in scikit-learn: of more than two classes it must be said how they are averaged.
        return fitting if len(self.answers.labels) == 2 else tuple(name for name in fitting if name not in OF_TWO)

    @property
    def numbers(self) -> bool:
        """Whether the targets are numbers."""
        return not self.answers.labels

    def truth(self, labels: np.ndarray) -> Any:
        """What targets count as when predictions are scored."""
        return labels

    def scorer(self) -> ScalarScorer:
        return ScalarScorer(self.metrics, self.truth, average=not self.config.metric)

    def report(self) -> Report:
        return ResidualReport(self.truth) if self.numbers else ConfusionReport(self.answers.labels)
