"""What `evaluate --report` says of a split beside its figures. Counts and a number a sample stand in memory, no logits.

A report is JSON: `rows`, a table with a mapping for each row, and a confusion matrix where there is one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pipeline.extract.batch import Batch
from pipeline.train.objectives.base import Outputs, Report

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


class ConfusionReport(Report):
    """Precision, recall, F1 and support of each class, their means, and the confusion matrix: rows are the classes of
    the samples, columns what is told of them."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        self.pairs: Counter[tuple[int, int]] = Counter()

    def update(self, out: Outputs, batch: Batch) -> None:
        assert batch.targets is not None
        there, told = batch.targets["label"].tolist(), out["label"].tolist()
        self.pairs.update((int(t), int(g)) for t, g in zip(there, told, strict=True))

    def compute(self) -> dict[str, Any]:
        matrix = np.zeros((len(self.labels), len(self.labels)), np.int64)
        for (there, told), count in self.pairs.items():
            matrix[there, told] = count
        right = matrix.diagonal()
        missed, wrong = matrix.sum(1) - right, matrix.sum(0) - right
        counts = np.stack([matrix.sum() - right - missed - wrong, wrong, missed, right], axis=1).reshape(-1, 2, 2)
        return {**shares(self.labels, counts), "labels": list(self.labels), "confusion": matrix.tolist()}


class ResidualReport(Report):
    """Told minus true: mean, standard deviation, mean of the absolute and root of the mean square, and quantiles."""

    def __init__(self, truth: Callable[[np.ndarray], Any]) -> None:
        self.truth = truth
        self.residuals: list[np.ndarray] = []

    def update(self, out: Outputs, batch: Batch) -> None:
        assert batch.targets is not None
        truth = self.truth(batch.targets["label"].cpu().double().numpy())
        self.residuals.append(out["label"].double().numpy() - np.asarray(truth, np.float64))

    def compute(self) -> dict[str, Any]:
        found = np.concatenate(self.residuals)
        figures = {
            "samples": len(found),
            "mean": found.mean(),
            "standard deviation": found.std(),
            "mean absolute": np.abs(found).mean(),
            "root mean square": np.sqrt(np.square(found).mean()),
            **{f"quantile {q:g}": value for q, value in zip(QUANTILES, np.quantile(found, QUANTILES), strict=True)},
        }
        return {"rows": [{"residual": name, "value": np.asarray(value).item()} for name, value in figures.items()]}


def shares(labels: Sequence[str], counts: np.ndarray) -> dict[str, Any]:
    """Precision, recall, F1 and support of each label, then over all decisions (micro) and the means over labels, plain
    (macro) and by support (weighted); a share of nothing is 0. `counts` (labels, 2, 2): samples without and with the
    label that are told without and with it."""
    support = counts[:, 1].sum(1)
    each = _shares(counts)
    macro = each.mean(0) if len(labels) else np.zeros(3)
    weighted = support @ each / support.sum() if support.sum() else np.zeros(3)
    lines = [*each, _shares(counts.sum(0, keepdims=True))[0], macro, weighted]
    rows = []
    for name, line, n in zip(
        [*labels, "micro mean", "macro mean", "weighted mean"], lines, [*support, *[support.sum()] * 3], strict=True
    ):
        precision, recall, f1 = line.tolist()
        rows.append({"name": name, "precision": precision, "recall": recall, "f1": f1, "support": int(n)})
    return {"rows": rows}


def _shares(counts: np.ndarray) -> np.ndarray:
    """(n, 2, 2) → (n, 3) precision, recall, F1."""
    right, wrong, missed = counts[:, 1, 1], counts[:, 0, 1], counts[:, 1, 0]
    pairs = ((right, right + wrong), (right, right + missed), (2 * right, 2 * right + wrong + missed))
    return np.stack([np.divide(a, b, out=np.zeros(len(a)), where=b > 0) for a, b in pairs], axis=1)
