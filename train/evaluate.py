"""Predictions for every sample of a source, and their score."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.extract.backbones.batch import Batch
from pipeline.store.errors import UserError
from pipeline.train.objectives.base import Outputs, Report, Scorer
from pipeline.train.options import PRECISIONS
from pipeline.train.source import Source


class Trainable(Protocol):
    """What the loop needs of a model; it must be an nn.Module as well."""

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of the batch, a scalar."""
        ...

    def weight(self, batch: Batch) -> float:
        """What the batch's loss counts for beside others of a step."""
        ...

    def begin_step(self, step: int, steps: int) -> None:
        """Called before each optimizer step."""
        ...

    def stepped(self) -> None:
        """Called after each optimizer step."""
        ...

    def measure(self, batch: Batch) -> Outputs:
        """What the scorer reads of the batch, on the host."""
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
    model: Any,
    source: Source,
    device: torch.device | str = "cpu",
    precision: str = "float32",
    check: Callable[[], None] = lambda: None,
    keep: Callable[[int, dict[str, Any]], dict[str, Any]] = lambda place, entry: entry,
) -> list[dict[str, Any]]:
    """What `model.objective` tells of each sample of `source`, in the order of its task table. `check` is called
    between batches and may raise to stop. `keep(place, entry)`: what is to stay in memory of each."""
    indices: list[np.ndarray] = []
    entries: list[dict[str, Any]] = []

    def take(batch: Batch) -> None:
        check()
        told = model.objective.entries(model.predict(batch))
        entries.extend(keep(place, entry) for place, entry in zip(batch.index.tolist(), told, strict=True))
        indices.append(batch.index)

    _visit(model, source, device, precision, take)
    return [entries[i] for i in np.argsort(np.concatenate(indices), kind="stable")]


def evaluate(
    model: Any,
    source: Source,
    scorer: Scorer,
    device: torch.device | str = "cpu",
    precision: str = "float32",
    check: Callable[[], None] = lambda: None,
    report: Report | None = None,
) -> dict[str, float]:
    """The figures of `scorer` over `source`, of whose batches `report` is told too. Raises UserError where the split
    has no targets."""

    def take(batch: Batch) -> None:
        check()
        if batch.targets is None:
            raise UserError("this split has no labels to score against: use predict, or choose another split")
        out = model.measure(batch)
        scorer.update(out, batch)
        if report is not None:
            report.update(out, batch)

    _visit(model, source, device, precision, take)
    return scorer.compute()


def _visit(
    model: nn.Module, source: Source, device: torch.device | str, precision: str, take: Callable[[Batch], None]
) -> None:
    """`take` every batch of the split once, on `device`, the model in eval mode, in inference mode under autocast."""
    device, was_training = torch.device(device), model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast(device, precision), closing(source.sequential()) as batches:
            for batch in batches:
                take(batch.to(device))
    finally:
        model.train(was_training)
