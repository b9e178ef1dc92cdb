"""The order of samples in an epoch: a stateless function of (seed, epoch) and of the blocks they stand in.

Blocks are permuted, then every block's samples are scattered over the stretch of the epoch that `window` blocks take:
the block at place p gives each of its samples the key `low(p) + u · window`, u uniform in [0, 1), and the keys are
sorted. With no more blocks than the window that is a uniform permutation. With more, reading is even (one block is
opened about every time one is finished) and about 1.5 · `window` blocks are open at once, never over 2 · `window` + 1
(where there are only twice as many), so memory is bounded by the window and not by the task.

Batches are cut from this one global order; inside a batch samples stand by block, so that a rank's contiguous slice
touches few blocks and gathering reads forward. The number of ranks changes neither the batches nor their samples.
Price: one sort of n keys an epoch (about 0.1 s for a million samples).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.store.format.digest import digest_bytes
from pipeline.store.format.sorting import stable_order

GROUP = 16  # batches sorted by length together: enough to lose nearly all padding, few enough to touch few blocks


def ranks_of(block: np.ndarray) -> np.ndarray:
    """(n,) int64: the place of each of `block` (n,), numbers from 0 that are not many more than n, among those that
    occur."""
    return (np.cumsum(np.bincount(block) > 0) - 1)[block].astype(np.int64, copy=False)


def epoch_order(block: np.ndarray, seed: int, epoch: int, window: int) -> np.ndarray:
    """A permutation of the n samples, (n,) int64. `block`: (n,) the block of each sample. `window`: in blocks."""
    draws = np.random.Generator(np.random.PCG64([seed, epoch]))
    block = ranks_of(block)
    count = int(block.max(initial=-1)) + 1
    # Only `random` is drawn and sorted here: unlike `permutation`, its stream is stable over NumPy releases.
    place = np.empty(count, np.int64)
    place[np.argsort(draws.random(count), kind="stable")] = np.arange(count)
    width = min(window, count)
    low = np.clip(np.arange(count) + 0.5 - window / 2, 0, count - width)
    key = draws.random(len(block))
    key *= width
    key += low[place][block]
    del block  # of a sample each, as is what follows
    return stable_order(key)


@dataclass(frozen=True)
class Order:
    """Which samples make up each batch of each epoch.

    `block`: (n,) int, the block of each sample (all zeros where there are no blocks: a uniform permutation).
    `batch_size`: samples of a batch over all ranks. `window`: blocks mixed with each other. `lengths`: (n,) int rows of
    each sample; where given, every `GROUP` batches are sorted by length among themselves, so that a batch holds samples
    of like length and little padding, and the batches of a group come in random order.
    """

    block: np.ndarray
    batch_size: int
    seed: int = 0
    window: int = 4
    lengths: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if self.lengths is not None and len(self.lengths) != self.n:
            raise ValueError(f"{len(self.lengths)} lengths for {self.n} samples")

    @property
    def n(self) -> int:
        return len(self.block)

    def __len__(self) -> int:
        """Batches of an epoch; the last may be smaller than `batch_size`."""
        return -(-self.n // self.batch_size)

    def layout(self) -> dict[str, Any]:
        """Which samples stand in which block, in short: how many `blocks`, and the `xxh3` of `block`."""
        blocks = len(np.unique(self.block))
        return {"blocks": blocks, "xxh3": digest_bytes(np.ascontiguousarray(self.block, dtype="<i8"))}

    def digest(self) -> str:
        """Equal for orders that are equal in every epoch; a resumed run checks it."""
        facts = f"{self.n} {self.batch_size} {self.seed} {self.window}".encode()
        lengths = b"" if self.lengths is None else np.ascontiguousarray(self.lengths, dtype="<i8")
        return digest_bytes(facts, np.ascontiguousarray(self.block, dtype="<i8"), lengths)

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The global batches of `epoch`: every sample exactly once."""
        order = epoch_order(self.block, self.seed, epoch, self.window)
        return self._cut(order) if self.lengths is None else self._grouped(order, self.lengths, epoch)

    def sequential(self) -> list[np.ndarray]:
        """Block after block, the same for every seed; for evaluation."""
        order = np.argsort(self.block, kind="stable").astype(np.int64)
        return self._cut(order if self.lengths is None else self._by_length(order, self.lengths))

    def _by_length(self, order: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        group = np.arange(len(order)) // (GROUP * self.batch_size)
        return order[np.lexsort((lengths[order], group))]

    def _grouped(self, order: np.ndarray, lengths: np.ndarray, epoch: int) -> list[np.ndarray]:
        batches = self._cut(self._by_length(order, lengths))
        # A stream of its own, so that grouping does not change which samples meet in a group.
        draws = np.random.Generator(np.random.PCG64([self.seed, epoch, 1]))
        whole = len(order) // self.batch_size  # a smaller last batch stays last: its gradient is the noisiest
        place = np.arange(whole) // GROUP + draws.random(whole)
        return [batches[i] for i in np.argsort(place, kind="stable")] + batches[whole:]

    def _cut(self, order: np.ndarray) -> list[np.ndarray]:
        """Batches in `order`, the samples of each by block and number."""
        size, n = self.batch_size, len(order)
        whole = n // size * size
        # One number for block and sample, so that all batches are sorted at once: a tenth of the time of a lexsort.
        joined = self._ranks[order]
        joined *= n
        joined += order
        parts = joined[:whole].reshape(-1, size), joined[whole:][None]
        for part in parts:
            part.sort(axis=1)
        joined %= n
        return [batch for part in parts for batch in part if len(batch)]

    @cached_property
    def _ranks(self) -> np.ndarray:
        """(n,) int64: the place of each sample's block among those that occur."""
        return ranks_of(self.block)


def rank_slice(batch: np.ndarray, rank: int, world: int) -> np.ndarray:
    """Rank `rank`'s contiguous share of a global batch; the shares of all ranks are disjoint and make up the batch."""
    return batch[len(batch) * rank // world : len(batch) * (rank + 1) // world]
