"""`Source`: what the loop asks of anything that hands out batches, be it the store or the live backbone. `Slot`: what a
source of several backbones asks of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipeline.extract.batch import Batch
from pipeline.store.errors import UserError
from pipeline.train.data.order import Order


class Ordered:
    """What is handed out in an `order`: how many samples, how many batches of an epoch."""

    order: Order

    @property
    def n(self) -> int:
        """Samples of the split."""
        return self.order.n

    def __len__(self) -> int:
        return len(self.order)

    def share_of(
        self, first: int, end: int, start: int = 0, share: tuple[int, int] = (0, 1)
    ) -> tuple[Callable[[], Iterator[list[np.ndarray]]], int]:
        """What gives, for each of the epochs `first` … `end` - 1, of the first one from batch `start` on, the samples
        of the batches i, i + k, … of a `share` (i, k) of k readers that take turns; epochs without any are left out.
        And how many batches these are. UserError for numbers that make no sense."""
        if not 0 <= start <= len(self):
            raise UserError(f"start must be in [0, {len(self)}], the batches of an epoch; got {start}")
        number, shares = share
        if not 0 <= number < shares:
            raise UserError(f"share must be (i, k) with i in [0, k), got {share}")

        def batches() -> Iterator[list[np.ndarray]]:
            done = 0
            for epoch in range(first, end):
                found = self.order.epoch(epoch)[start if epoch == first else 0 :]
                if mine := found[(number - done) % shares :: shares]:
                    yield mine
                done += len(found)

        return batches, len(range(number, (end - first) * len(self) - start, shares))


class Source(Protocol):
    """Samples of one split. Two sources with equal `Order`s hand out the same samples in the same batches."""

    @property
    def order(self) -> Order:
        """Which samples make up which batch."""
        ...

    @property
    def n(self) -> int:
        """Samples of the split."""
        ...

    def __len__(self) -> int:
        """Batches of an epoch."""
        ...

    def follow(self, block: np.ndarray) -> None:
        """Hand out the samples in the order that they have where they stand in the blocks `block`, (n,) int64: that of
        a run which began before the store was laid out anew."""
        ...

    def epochs(self, first: int, end: int, start: int = 0) -> Iterator[Batch]:
        """The shuffled batches of the epochs `first` (from 0) … `end` - 1, of the first one from batch `start` on;
        closing the iterator frees everything."""
        ...

    def sequential(self) -> Iterator[Batch]:
        """Every sample once, in an order that is always the same; `Batch.index` tells which."""
        ...


@dataclass(frozen=True)
class Share:
    """This rank's part of a batch: the samples `numbers` (k,) int64. `touched`: these, or a sample of the batch where
    there are none: a rank whose share of a last, small batch is empty still makes the step, and needs the widths."""

    numbers: np.ndarray
    touched: np.ndarray

    @classmethod
    def of(cls, numbers: np.ndarray, batch: np.ndarray) -> Share:
        return cls(numbers, numbers if len(numbers) else batch[:1])


class Slot(Protocol):
    """The distinct samples of one feature space, or of one live backbone, by number. `states`: their names. `block`:
    (m,) int64, which are read together."""

    states: list[str]

    @property
    def block(self) -> np.ndarray: ...

    def regroup(self, groups: np.ndarray) -> None:
        """Read each of the groups `groups`, (m,) int64, as one or a few blocks from now on."""
        ...

    def gather(self, epochs: Iterator[list[Share]], count: int) -> Iterator[Batch]:
        """The samples of each share, `count` batches in all, in a list for each epoch; closing the iterator frees
        everything."""
        ...
