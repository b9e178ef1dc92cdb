"""How answers are scored, as the papers' code does it: what a label counts as, and what a written text means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.extract.tasks.base import TaskSpec
from pipeline.train.evaluate import Score
from pipeline.train.metrics import score


def scorer(spec: TaskSpec, readout: str) -> Score:
    """The task's metrics of predictions against labels.

    A text-to-text model ("lm") is scored against the texts it is taught: a regression's labels are rounded to the grid.
    """

    def metrics(predictions: Sequence[Any], labels: Sequence[Any]) -> dict[str, float]:
        if readout == "lm" and spec.kind == "regression":
            labels = [spec.values[spec.target_index(label)] for label in labels]
        return score(spec.metrics, predictions, labels)

    return metrics


def meaning(spec: TaskSpec, text: str) -> int | float | None:
    """What a freely written answer says: the class whose target it is, or any number, on the grid or not; else None."""
    if spec.kind == "classification":
        return spec.targets.index(text.strip()) if text.strip() in spec.targets else None
    try:
        return float(text)
    except ValueError:
        return None
