"""Predictions for every sample of a source, and their score."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.extract.backbones.batch import Batch
from pipeline.store.errors import UserError
from pipeline.train.options import PRECISIONS
from pipeline.train.source import Source

Score = Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]


class Trainable(Protocol):
    """What the loop needs of a model; it must be an nn.Module as well."""

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of the batch, a scalar."""
        ...

    def stepped(self) -> None:
        """Called after each optimizer step."""
        ...

    def predict(self, batch: Batch) -> Tensor:
        """(B,) class indices or values."""
        ...

    def trainable_state(self) -> dict[str, Tensor]:
        """Everything that training changes, by name."""
        ...

    def load_trainable(self, state: dict[str, Tensor]) -> None: ...


@contextmanager
def closing(batches: Iterator[Batch]) -> Iterator[Iterator[Batch]]:
    """Close `batches` on the way out, where it can be closed: its threads and tasks end with it."""
    try:
        yield batches
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast to `precision` on `device`; off for float32."""
    dtype = PRECISIONS[precision]
    if dtype == torch.float32:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=dtype)


def predict(
    model: nn.Module,
    source: Source,
    device: torch.device | str = "cpu",
    precision: str = "float32",
    check: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Predictions and labels of all samples of `source`, both (n,) in the order of its task table.

    Labels are None where the source has none. `check` is called between batches and may raise to stop.
    """
    device, was_training = torch.device(device), model.training
    indices, predictions, labels = [], [], []
    model.eval()
    try:
        with torch.inference_mode(), autocast(device, precision), closing(source.sequential()) as batches:
            for batch in batches:
                check()
                predictions.append(model.predict(batch.to(device)).cpu().numpy())  # type: ignore[operator]
                indices.append(batch.index)
                if batch.labels is not None:
                    labels.append(batch.labels.cpu().numpy())
    finally:
        model.train(was_training)
    order = np.argsort(np.concatenate(indices), kind="stable")
    return np.concatenate(predictions)[order], np.concatenate(labels)[order] if labels else None


def evaluate(
    model: nn.Module,
    source: Source,
    score: Score,
    device: torch.device | str = "cpu",
    precision: str = "float32",
    check: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """`score(predictions, labels)` over `source`. Raises UserError where the split has no labels."""
    predictions, labels = predict(model, source, device, precision, check)
    if labels is None:
        raise UserError("this split has no labels to score against: use predict, or choose another split")
    return score(predictions.tolist(), labels.tolist())
