"""Predictions for every sample of a source, and their score."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.extract.batch import Batch
from pipeline.store.errors import UserError
from pipeline.train.data.pairs import PairSource
from pipeline.train.data.source import Source
from pipeline.train.fit.finite import NotFinite
from pipeline.train.fit.options import PRECISIONS
from pipeline.train.objectives.base import Outputs, Report, Scorer


class Trainable(Protocol):
    """What the loop needs of a model; it must be an nn.Module as well."""

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of the batch, a scalar."""
        ...

    def weight(self, batch: Batch) -> float:
        """What the batch's loss counts for beside others of a step."""
        ...

    def begin_step(self, step: int, steps: int, an_epoch: int) -> None:
        """Called before each optimizer step."""
        ...

    def stepped(self) -> None:
        """Called after each optimizer step. Parameters of runs that step as one have no `grad`."""
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
        told = model.objective.entries(model.predict(batch))
        entries.extend(keep(place, entry) for place, entry in zip(batch.index.tolist(), told, strict=True))
        indices.append(batch.index)

    _visit([Visit(model, precision, take)], source, device, check)
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
    (figures,) = evaluate_all([Scoring(model, scorer, precision, report=report)], source, device, check)
    if isinstance(figures, NotFinite):
        raise figures
    return figures


class Together(Protocol):
    """Models that measure as one."""

    def measured(self, model: Any, batch: Batch) -> Outputs | None:
        """What `model.measure` gives or raises, found for all of them once; None where they measure in turn."""
        ...


@dataclass
class Scoring:
    """A model, and the scorer and report that are told of its predictions. `view`: the batch as it is to see it.
    `stacked`: what measures the model together with those of other scorings, until that fails."""

    model: Any
    scorer: Scorer
    precision: str = "float32"
    view: Callable[[Batch], Batch] = lambda batch: batch
    report: Report | None = None
    failed: NotFinite | None = None
    stacked: Together | None = None

    def take(self, batch: Batch) -> None:
        if self.failed is not None:
            return
        batch = self.view(batch)
        if batch.targets is None:
            raise UserError("this split has no labels to score against: use predict, or choose another split")
        try:
            out = None if self.stacked is None else self.stacked.measured(self.model, batch)
            out = self.model.measure(batch) if out is None else out
        except NotFinite as error:
            self.failed = error
            return
        self.scorer.update(out, batch)
        if self.report is not None:
            self.report.update(out, batch)


def evaluate_all(
    scorings: Sequence[Scoring],
    source: Source,
    device: torch.device | str = "cpu",
    check: Callable[[], None] = lambda: None,
) -> list[dict[str, float] | NotFinite]:
    """The figures of each scoring over `source`, which is read once; NotFinite for a model whose output is not."""
    _visit([Visit(s.model, s.precision, s.take, s.scorer.each) for s in scorings], source, device, check)
    return [s.scorer.compute() if s.failed is None else s.failed for s in scorings]


def _batches(source: Source, each: bool) -> Iterator[Batch]:
    if not each:
        return source.sequential()
    assert isinstance(source, PairSource)  # what ranks reads several slots
    return source.each()


class Visit(NamedTuple):
    """`take` is called with every batch, `model` in eval mode, under autocast to `precision`. `each`: with batches of
    the distinct samples of each slot instead."""

    model: nn.Module
    precision: str
    take: Callable[[Batch], None]
    each: bool = False


def _visit(visits: Sequence[Visit], source: Source, device: torch.device | str, check: Callable[[], None]) -> None:
    """Every batch of the split once, on `device`, in inference mode. `check` is called before each and may raise."""
    device, were_training = torch.device(device), [visit.model.training for visit in visits]
    for visit in visits:
        visit.model.eval()
    try:
        for each in {visit.each for visit in visits}:
            here = [visit for visit in visits if visit.each == each]
            with torch.inference_mode(), closing(_batches(source, each)) as batches:
                for batch in batches:
                    check()
                    on_device = batch.to(device)
                    for visit in here:
                        with autocast(device, visit.precision):
                            visit.take(on_device)
    finally:
        for visit, was_training in zip(visits, were_training, strict=True):
            visit.model.train(was_training)
