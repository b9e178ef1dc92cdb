"""Several tasks in one run: one tuner, a head and a score for each task.

Every batch is of one task. An epoch has every batch of every task once, and which task comes next is drawn in
proportion to the batches that are left of each (proportional mixing): a task of twice the rows has twice the steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from pipeline.extract.batch import Batch
from pipeline.store.errors import UserError, within
from pipeline.store.format.digest import digest_bytes
from pipeline.train.data.order import Order
from pipeline.train.data.source import Ordered, Source
from pipeline.train.evaluate import closing
from pipeline.train.features import Features
from pipeline.train.model import Model, Reader, refuse_features
from pipeline.train.objectives.base import Head, Objective, Outputs, Scorer, Vocabulary
from pipeline.train.tuners.base import Tuner


@dataclass(frozen=True)
class MixedOrder(Order):
    """The order of several tasks, their samples numbered one task after the other. `parts`: that of each task, in
    blocks that `block` may have replaced since."""

    parts: tuple[Order, ...] = ()

    @classmethod
    def of(cls, parts: Sequence[Order]) -> MixedOrder:
        first = parts[0]
        return cls(np.concatenate([p.block for p in parts]), first.batch_size, first.seed, parts=tuple(parts))

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def firsts(self) -> np.ndarray:
        """(tasks + 1,) the number of each task's first sample."""
        return np.cumsum([0, *(part.n for part in self.parts)])

    def each(self) -> list[Order]:
        """The order of each task."""
        cut = np.split(self.block, self.firsts[1:-1])
        return [replace(part, block=block) for part, block in zip(self.parts, cut, strict=True)]

    def turns(self, epoch: int) -> np.ndarray:
        """(batches,) the task that each batch of `epoch` is of: a function of (seed, epoch) alone."""
        draws = np.random.Generator(np.random.PCG64([self.seed, epoch, 2]))  # a stream that no task's order draws from
        task = np.repeat(np.arange(len(self.parts)), [len(part) for part in self.parts])
        return task[np.argsort(draws.random(len(task)), kind="stable")]

    def layout(self) -> dict[str, Any]:
        return {**super().layout(), "blocks": sum(part.layout()["blocks"] for part in self.each())}

    def digest(self) -> str:
        return digest_bytes(*(part.digest().encode() for part in self.each()))

    def epoch(self, epoch: int) -> list[np.ndarray]:
        left = [iter(part.epoch(epoch)) for part in self.each()]
        return [next(left[task]) + self.firsts[task] for task in self.turns(epoch).tolist()]

    def sequential(self) -> list[np.ndarray]:
        parts = zip(self.firsts[:-1], self.each(), strict=True)
        return [batch + first for first, part in parts for batch in part.sequential()]


class MixedSource(Ordered):
    """The batches of several tasks' sources; `Batch.task` says whose each is, `Batch.index` is its place there."""

    order: MixedOrder

    def __init__(self, parts: Mapping[str, Source]) -> None:
        self.parts = dict(parts)
        self.order = MixedOrder.of([part.order for part in self.parts.values()])

    def follow(self, block: np.ndarray) -> None:
        self.order = replace(self.order, block=block)
        for part, order in zip(self.parts.values(), self.order.each(), strict=True):
            if not np.array_equal(part.order.block, order.block):
                part.follow(order.block)

    def epochs(self, first: int, end: int, start: int = 0) -> Iterator[Batch]:
        done = np.bincount(self.order.turns(first)[:start], minlength=len(self.parts)).tolist()
        names = list(self.parts)
        with ExitStack() as stack:
            left = [
                stack.enter_context(closing(part.epochs(first, end, past)))
                for part, past in zip(self.parts.values(), done, strict=True)
            ]
            for epoch in range(first, end):
                for task in self.order.turns(epoch)[start if epoch == first else 0 :].tolist():
                    yield _of(next(left[task]), names[task])

    def sequential(self) -> Iterator[Batch]:
        for name, part in self.parts.items():
            with closing(part.sequential()) as batches:
                for batch in batches:
                    yield _of(batch, name)


def _of(batch: Batch, task: str) -> Batch:
    batch.task = task
    return batch


class MixedHead(Head):
    """A head for each task, `parts`: task → head. A batch goes to that of its task."""

    def __init__(self, parts: Mapping[str, Head]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({f"of_{task}": head for task, head in parts.items()})

    def of(self, task: str) -> Any:
        return self.parts[f"of_{task}"]

    def begin_step(self, step: int, steps: int, an_epoch: int) -> None:
        for head in self.parts.values():
            head.begin_step(step, steps, an_epoch)  # type: ignore[operator]

    def losses(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = self.of(batch.task).losses(features, batch)
        return losses

    def weight(self, batch: Batch) -> float:
        return float(self.of(batch.task).weight(batch))

    def predict(self, features: Features, batch: Batch) -> Outputs:
        found: Outputs = self.of(batch.task).predict(features, batch)
        return found

    def measure(self, features: Features, batch: Batch) -> Outputs:
        found: Outputs = self.of(batch.task).measure(features, batch)
        return found


class MixedScorer(Scorer):
    """The figures of each task, `<task>.<name>`, and `average`, the mean of what selects the best epoch of each."""

    def __init__(self, parts: Mapping[str, Scorer]) -> None:
        self.parts, self.seen = dict(parts), set[str]()

    def update(self, out: Outputs, batch: Batch) -> None:
        self.seen.add(batch.task)
        self.parts[batch.task].update(out, batch)

    def merge(self, other: Any) -> None:
        self.seen |= other.seen
        for task in other.seen:
            self.parts[task].merge(other.parts[task])

    def compute(self) -> dict[str, float]:
        found = {task: scorer.compute() for task, scorer in self.parts.items() if task in self.seen}
        figures = {f"{task}.{name}": x for task, of in found.items() for name, x in of.items() if name != "average"}
        return figures | {"average": float(np.mean([self.parts[task].value(of) for task, of in found.items()]))}


class MixedModel(Model):
    """A tuner and a head for each task. Raises UserError for a tuner that works on the weights of one head, naming the
    task where an objective cannot read it."""

    head: MixedHead

    def __init__(self, tuner: Tuner, objectives: Mapping[str, Objective]) -> None:
        Reader.__init__(self)
        if reason := tuner.needs_one_head(tuner.config):
            raise UserError(reason)
        self.tuner, self.objectives = tuner, dict(objectives)
        heads = {}
        for task, objective in self.objectives.items():
            with within(f"task {task}"):
                refuse_features(tuner, objective)
                heads[task] = objective.head(tuner.features, cast(Vocabulary, tuner.tail))
        self.head = MixedHead(heads)

    def of(self, task: str) -> Model:
        """What tells of one task alone."""
        return _One(self, task)


class _One(Model):
    """A mixed model as one task has it: the same tuner, the head of the task."""

    def __init__(self, model: MixedModel, task: str) -> None:
        Reader.__init__(self)
        self.tuner, self.objective, self.head = model.tuner, model.objectives[task], model.head.of(task)
