"""`LiveSource`: the backbone in the loop. The parity reference, and the baseline of every speed claim."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from pipeline.extract.backbones.live import LiveBackbone
from pipeline.extract.batch import Batch
from pipeline.extract.inputs import Inputs
from pipeline.train.data.order import Order
from pipeline.train.data.source import Ordered, Share
from pipeline.train.data.targets import Targets


class LiveSlot:
    """The samples of `inputs` by number, their `states` computed when they are asked for, in float32."""

    def __init__(self, live: LiveBackbone, inputs: Inputs, states: Sequence[str]) -> None:
        self.live, self.inputs, self.states = live, inputs, list(states)

    @property
    def block(self) -> np.ndarray:
        """All are computed, none is read."""
        return np.zeros(len(self.inputs), np.int64)

    def regroup(self, groups: np.ndarray) -> None:
        """Nothing is read."""

    def gather(self, epochs: Iterator[list[Share]], count: int) -> Iterator[Batch]:
        """The samples of each share; `wait_seconds` of a batch is the time the backbone took."""
        for shares in epochs:
            for share in shares:
                began = time.perf_counter()
                batch = self.compute(share.numbers)
                batch.wait_seconds = time.perf_counter() - began
                yield batch

    def compute(self, index: np.ndarray) -> Batch:
        """The states of the samples `index`."""
        return self.live.states(self.inputs.take(index), self.states, torch.float32)


class LiveSource(Ordered, LiveSlot):
    """The batches a `StoreSource` of the same `order` hands out, their states computed now, in float32.

    `targets`: of the n samples, or None. `wait_seconds` of a batch is the time the backbone took.
    """

    def __init__(
        self, live: LiveBackbone, inputs: Inputs, targets: Targets | None, states: Sequence[str], order: Order
    ) -> None:
        super().__init__(live, inputs, states)
        self.targets, self.order = targets, order

    def follow(self, block: np.ndarray) -> None:
        self.order = replace(self.order, block=block)

    def epochs(self, first: int, end: int, start: int = 0) -> Iterator[Batch]:
        for epoch in range(first, end):
            for index in self.order.epoch(epoch)[start if epoch == first else 0 :]:
                yield self._batch(index)

    def sequential(self) -> Iterator[Batch]:
        for index in self.order.sequential():
            yield self._batch(index)

    def _batch(self, index: np.ndarray) -> Batch:
        began = time.perf_counter()
        batch = self.compute(index)
        batch.index = index
        if self.targets is not None:
            self.targets.fill(batch, index, self.live.device)
        batch.wait_seconds = time.perf_counter() - began
        return batch
