"""`LookAhead`: the blocks a run of batches needs, read before they are needed and dropped after their last use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import torch

from pipeline.store.format.samples import Samples
from pipeline.train.data.assemble import Loaded
from pipeline.train.data.readers import BlockReader


class LookAhead:
    """Blocks in the order of first use. `take(0)`, `take(1)`, … must be called in turn.

    `epochs`: for each epoch, for each of its batches, the blocks it needs; the next epoch is asked for when all blocks
    of the present one have been, so that its first batches need not wait. `blocks`: block number → what the reader is
    given, with its `nbytes`. `limit`: bytes that may be read or waiting beyond the present batch (one block is always
    allowed). `kept`: blocks that are in memory already; with `keep`, those read are added to it and not dropped.
    `device`: where blocks are put, the host's memory if None. `check`: raises for a block that is no input of the
    backbone.
    """

    def __init__(
        self,
        epochs: Iterator[Sequence[np.ndarray]],
        blocks: Sequence[Any],
        reader: BlockReader,
        limit: int,
        kept: MutableMapping[int, Loaded],
        keep: bool,
        device: torch.device | None = None,
        check: Callable[[Samples], None] | None = None,
    ) -> None:
        self._epochs, self._blocks, self._reader, self._limit = epochs, blocks, reader, limit
        self._kept, self._keep, self._device, self._check = kept, keep, device, check
        self._uses: deque[np.ndarray] = deque()  # of the batches not yet taken
        self._known = 0  # batches of the epochs asked for so far
        self._begins = 0  # the first batch of the latest of them
        # A reading is a block in one epoch: `epoch · blocks + block`. Two epochs read a block twice,
        # unless the later one asks for it before the earlier one has taken it.
        self._queue: deque[int] = deque()  # readings to ask for
        self._first: dict[int, int] = {}  # the first batch that uses a reading, until it is dropped
        self._last: dict[int, int] = {}
        self._epoch = -1  # of the latest readings
        self._asked: dict[int, Any] = {}
        self._open: dict[int, Loaded] = {}
        self._cancelled = False
        self.most_open = 0  # blocks in memory or asked for at once, at most

    def take(self, batch: int) -> dict[int, Loaded]:
        """The blocks that `batch` needs, by number; waits for them. Raises what reading raised, CancelledError after
        `cancel`, IndexError after the last batch."""
        for reading in [r for r in self._open if self._last[r] < batch]:
            del self._open[reading], self._first[reading], self._last[reading]
        while batch >= self._known:
            if not self._another_epoch():
                raise IndexError(f"there are {self._known} batches, not {batch + 1}")
        self._ask(batch)
        epoch = self._epoch - (batch < self._begins)
        numbers = self._uses.popleft().tolist()
        for number in numbers:
            reading = epoch * len(self._blocks) + number
            if reading not in self._open:
                self._open[reading] = self._fetch(reading)
        return {number: self._open[epoch * len(self._blocks) + number] for number in numbers}

    def _another_epoch(self) -> bool:
        """Learn what the next epoch needs, if there is one."""
        uses = next(self._epochs, None)
        if uses is None:
            return False
        self._epoch, self._begins = self._epoch + 1, self._known
        self._known += len(uses)
        self._uses.extend(uses)
        batch = self._begins + np.repeat(np.arange(len(uses)), [len(u) for u in uses])
        reading = self._epoch * len(self._blocks) + np.concatenate([np.zeros(0, np.int64), *uses])
        numbers, first = np.unique(reading, return_index=True)
        _, last = np.unique(reading[::-1], return_index=True)
        self._queue.extend(numbers[np.argsort(first, kind="stable")].tolist())
        self._first.update(zip(numbers.tolist(), batch[first].tolist(), strict=True))
        self._last.update(zip(numbers.tolist(), batch[::-1][last].tolist(), strict=True))
        return True

    def _fetch(self, reading: int) -> Loaded:
        number = reading % len(self._blocks)
        if number in self._kept:
            return self._kept[number]
        samples = self._asked.pop(reading).result()
        if self._check is not None:
            self._check(samples)
        loaded = Loaded.of(samples)
        if self._device is not None:
            loaded = loaded.to(self._device)
        if self._keep:
            self._kept[number] = loaded
        return loaded

    def _ask(self, batch: int) -> None:
        if self._cancelled:
            raise CancelledError
        ahead = sum(self._nbytes(r) for r in self._asked if self._first[r] > batch)
        while self._queue or self._look_further(batch):
            reading = self._queue[0]
            number = reading % len(self._blocks)
            if number not in self._kept:
                size = self._nbytes(reading)
                needed = self._first[reading] <= batch
                if not needed and ahead and ahead + size > self._limit:
                    break
                # What the epoch before still waits for is not read twice at once: a cache would miss it twice.
                under_way = self._asked.get(reading - len(self._blocks))
                self._asked[reading] = under_way or self._reader.submit(self._blocks[number])
                ahead += 0 if needed else size
            self._queue.popleft()
        self.most_open = max(self.most_open, len(self._open) + len(self._asked))

    def _look_further(self, batch: int) -> bool:
        """Go on to the next epoch while the latest one's batches are taken. What is kept is not read again."""
        return not self._keep and batch >= self._begins and self._another_epoch()

    def _nbytes(self, reading: int) -> int:
        return int(self._blocks[reading % len(self._blocks)].nbytes)

    def cancel(self) -> None:
        """Cancel what was asked for and refuse the next `take`, from any thread; a `take` that waits ends soon."""
        self._cancelled = True
        for future in list(self._asked.values()):
            future.cancel()
