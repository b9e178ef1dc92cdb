"""`LookAhead`: the blocks a run of batches needs, read before they are needed and dropped after their last use."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import torch

from train.assemble import Loaded
from train.readers import Reader


class LookAhead:
    """Blocks in the order of first use. `take(0)`, `take(1)`, … must be called in turn.

    `uses`: for each batch the blocks it needs. `blocks`: block number → what the reader is given, with its `nbytes`.
    `limit`: bytes that may be read or waiting beyond the present batch (one block is always allowed). `kept`: blocks
    that are in memory already; with `keep`, those read are added to it and not dropped. `device`: where blocks are put,
    the host's memory if None.
    """

    def __init__(
        self,
        uses: Sequence[np.ndarray],
        blocks: Sequence[Any],
        reader: Reader,
        limit: int,
        kept: MutableMapping[int, Loaded],
        keep: bool,
        device: torch.device | None = None,
    ) -> None:
        self._uses, self._blocks, self._reader, self._limit = uses, blocks, reader, limit
        self._kept, self._keep, self._device = kept, keep, device
        batch = np.repeat(np.arange(len(uses)), [len(u) for u in uses])
        block = np.concatenate(uses) if len(uses) else np.zeros(0, np.int64)
        numbers, first = np.unique(block, return_index=True)
        _, last = np.unique(block[::-1], return_index=True)
        by_first = np.argsort(first, kind="stable")
        self._queue = numbers[by_first].tolist()
        self._first = dict(zip(numbers.tolist(), batch[first].tolist(), strict=True))
        self._last = dict(zip(numbers.tolist(), batch[::-1][last].tolist(), strict=True))
        self._next = 0  # place in the queue of the next block to ask for
        self._asked: dict[int, Any] = {}
        self._open: dict[int, Loaded] = {}
        self._cancelled = False
        self.most_open = 0  # blocks in memory or asked for at once, at most

    def take(self, batch: int) -> dict[int, Loaded]:
        """The blocks that `batch` needs; waits for them. Raises what reading raised, CancelledError after `cancel`."""
        for number in [n for n in self._open if self._last[n] < batch]:
            del self._open[number]
        self._ask(batch)
        for number in self._uses[batch].tolist():
            if number not in self._open:
                self._open[number] = self._fetch(number)
        return {number: self._open[number] for number in self._uses[batch].tolist()}

    def _fetch(self, number: int) -> Loaded:
        if number in self._kept:
            return self._kept[number]
        loaded = Loaded.of(self._asked.pop(number).result())
        if self._device is not None:
            loaded = loaded.to(self._device)
        if self._keep:
            self._kept[number] = loaded
        return loaded

    def _ask(self, batch: int) -> None:
        if self._cancelled:
            raise CancelledError
        ahead = sum(self._blocks[n].nbytes for n in self._asked if self._first[n] > batch)
        while self._next < len(self._queue):
            number = self._queue[self._next]
            if number not in self._kept:
                size = self._blocks[number].nbytes
                needed = self._first[number] <= batch
                if not needed and ahead and ahead + size > self._limit:
                    break
                self._asked[number] = self._reader.submit(self._blocks[number])
                ahead += 0 if needed else size
            self._next += 1
        self.most_open = max(self.most_open, len(self._open) + len(self._asked))

    def cancel(self) -> None:
        """Cancel what was asked for and refuse the next `take`, from any thread; a `take` that waits ends soon."""
        self._cancelled = True
        for future in list(self._asked.values()):
            future.cancel()
