"""`StoreSource`: shuffled, resumable batches from the store.

Blocks (runs of whole samples, tens of megabytes) are read by Dask tasks a bounded number of bytes ahead, batches are
gathered from the open blocks one batch ahead of the step, in background threads. Which samples stand in which batch
follows from (seed, epoch) alone (`train.order`): not from the tier, the number of threads or ranks.

Memory: about 1.5 · `window` blocks (2 · `window` where one epoch passes into the next) plus `lookahead_bytes` as
stored, plus two batches; in the device or host tier, all blocks as stored. Nothing outlives an iterator but the blocks
of these tiers: no process, thread, lock or file.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Condition
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from extract.backbones.batch import Batch
from store import SEGMENT_BYTES
from store.errors import UserError
from store.malloc import keep_freed_memory, return_freed_memory
from train.assemble import Loaded, Part, assemble
from train.lookahead import LookAhead
from train.order import Order, rank_slice
from train.readers import make_reader
from train.targets import Targets
from train.tiers import choose


class StoreSource:
    """The samples `keys` of a feature space, with `states` and `columns`, as batches of `batch_size`.

    `targets`: of the samples, in the order of `keys`; None for none. `batch_size`: over all
    ranks; this rank gets its share of each batch. `seed`, `window` (blocks mixed with each other), `block_bytes` (at
    least a whole segment by default, since cutting one means reading the chunks at the cut twice) and
    `group_by_length` (batches of like length, see `Order`) decide the order. `lookahead_bytes`: read beyond the present
    batch. `host_bytes`: keep the blocks in memory if they take no more (None: half of the memory free at the first
    epoch; 0: never). `tier`: "device", "host" or "disk" instead of what fits; `device`: where the blocks of the device
    tier go, and then the batches are there, too. `scheduler`: address of a `distributed` scheduler, else `workers`
    threads. `ahead`: batches made before they are asked for, in a thread (0: none, no thread). `pin`: page-locked
    batches, for copies to a GPU.
    `dtype`: of the decoded states; None: as stored, but float32 where rows have scales.

    Raises MissingStates if something is not stored, UserError for wrong options or targets.
    """

    def __init__(
        self,
        space: Any,
        keys: Sequence[str],
        targets: Targets | None,
        states: Sequence[str],
        columns: Sequence[str] = (),
        *,
        batch_size: int,
        seed: int = 0,
        window: int = 4,
        group_by_length: bool = False,
        block_bytes: int = 3 * SEGMENT_BYTES // 2,
        lookahead_bytes: int = 2 * SEGMENT_BYTES,
        host_bytes: int | None = None,
        tier: str = "auto",
        device: torch.device | str = "cpu",
        scheduler: str | None = None,
        workers: int | None = None,
        rank: int = 0,
        world: int = 1,
        ahead: int = 1,
        pin: bool = False,
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        if not 0 <= rank < world:
            raise UserError(f"rank must be in [0, {world}), got {rank}")
        for name, value, least in (
            ("lookahead_bytes", lookahead_bytes, 0),
            ("ahead", ahead, 0),
            ("block_bytes", block_bytes, 1),
        ):
            if value < least:
                raise UserError(f"{name} must be at least {least}, got {value}")
        if not keys:
            raise UserError("there are no samples to stream: the split is empty, or the limit is 0")
        if targets is not None and len(targets) != len(keys):
            raise UserError(f"{len(targets)} targets for {len(keys)} samples: one each is needed")
        self.targets = targets
        self.states, self.columns = list(states), list(columns)
        self.plan = space.plan(keys, self.states, self.columns, max_block_bytes=block_bytes)
        try:
            rows = np.sum(list(self.plan.lengths.values()), axis=0) if group_by_length else None
            self.order = Order(np.asarray(self.plan.block), batch_size, seed, window, rows)
        except ValueError as error:
            raise UserError(str(error)) from None
        self._slot = np.asarray(self.plan.slot)
        self._rank, self._world = rank, world
        self._lookahead, self._host_bytes = lookahead_bytes, host_bytes
        self._wanted_tier, self._device = tier, torch.device(device)
        self._scheduler, self._workers = scheduler, workers
        self._ahead, self._pin, self._dtype = ahead, pin, dtype
        self._kept: dict[int, Loaded] = {}
        self._tier: str | None = None

    @property
    def n(self) -> int:
        return self.order.n

    def __len__(self) -> int:
        return len(self.order)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks as stored: what an epoch reads, and what the host tier keeps."""
        return sum(block.nbytes for block in self.plan.blocks)

    @property
    def tier(self) -> str:
        """ "device", "host" or "disk"; decided when first asked for, by the memory that is free then."""
        if self._tier is None:
            self._tier = choose(self.nbytes, self._host_bytes, self._device, self._wanted_tier)
        return self._tier

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from batch `start` on; close the iterator to stop early."""
        return self.epochs(epoch, epoch + 1, start)

    def epochs(self, first: int, end: int, start: int = 0) -> Iterator[Batch]:
        """The batches of the epochs `first` … `end` - 1, of the first one from batch `start` on. While one epoch ends
        the next one's first blocks are read. Close the iterator to stop early."""
        if not 0 <= start <= len(self):
            raise UserError(f"start must be in [0, {len(self)}], the batches of an epoch; got {start}")
        batches = (self.order.epoch(e)[start if e == first else 0 :] for e in range(first, end))
        return self._run(batches, max(0, end - first) * len(self) - start)

    def sequential(self) -> Iterator[Batch]:
        """Every sample once, block after block."""
        return self._run(iter([self.order.sequential()]), len(self))

    def forget(self) -> None:
        """Give back the memory of the device or host tier."""
        self._kept.clear()
        return_freed_memory()

    def _run(self, epochs: Iterator[list[np.ndarray]], count: int) -> Iterator[Batch]:
        """`count` batches in all, in a list for each epoch."""
        if count <= 0:
            return
        keep_freed_memory()
        begun = time.perf_counter()
        reader = make_reader(self._scheduler, self._workers)
        place = self._device if self.tier == "device" else None
        keep = self.tier in ("device", "host")
        shares: deque[np.ndarray] = deque()
        uses = self._uses(epochs, shares)
        blocks = LookAhead(uses, self.plan.blocks, reader, self._lookahead, self._kept, keep, place)
        # Two, for a consumer that waits; one that computes for a while between two batches keeps but one of them busy.
        maker = ThreadPoolExecutor(2, "make-batch", _one_thread) if self._ahead else None
        turns = _Turns()
        pending: deque[Future[Batch]] = deque()
        try:
            for number in range(count):
                if maker is None:
                    batch = self._make_next(shares, blocks, turns, number)
                else:
                    while len(pending) <= self._ahead and number + len(pending) < count:
                        coming = number + len(pending)
                        pending.append(maker.submit(self._make_next, shares, blocks, turns, coming))
                    batch = pending.popleft().result()
                batch.wait_seconds = time.perf_counter() - begun
                yield batch
                del batch
                begun = time.perf_counter()
        finally:
            for future in pending:
                future.cancel()
            blocks.cancel()
            if maker is not None:
                maker.shutdown(wait=True, cancel_futures=True)
            reader.close()

    def _uses(self, epochs: Iterator[list[np.ndarray]], shares: deque[np.ndarray]) -> Iterator[list[np.ndarray]]:
        """For each epoch the blocks of each batch; this rank's samples of the batches are added to `shares`."""
        for batches in epochs:
            mine = [rank_slice(b, self._rank, self._world) for b in batches]
            shares.extend(mine)
            # A rank whose share of a last, small batch is empty still makes the step: it needs a block for the widths.
            yield [
                np.unique(self.order.block[share if len(share) else batch[:1]])
                for share, batch in zip(mine, batches, strict=True)
            ]

    def _make_next(self, shares: deque[np.ndarray], blocks: LookAhead, turns: _Turns, number: int) -> Batch:
        with turns.at(number):
            loaded = blocks.take(number)
            share = shares.popleft()
        return self._make(share, loaded)

    def _make(self, index: np.ndarray, blocks: dict[int, Loaded]) -> Batch:
        """The samples `index` (B,), which stand by block."""
        block = self.order.block[index]
        parts = [Part(loaded, self._slot[index[block == number]]) for number, loaded in blocks.items()]
        device = self._device if self.tier == "device" else "cpu"
        pin = self._pin and device == "cpu"
        batch = assemble(parts, self.states, self.columns, self._dtype, pin, device)
        batch.index = index
        if self.targets is not None:
            self.targets.fill(batch, index, device, pin)
        return batch


class _Turns:
    """Lets threads pass in the order of their numbers 0, 1, …"""

    def __init__(self) -> None:
        self._next, self._changed = 0, Condition()

    @contextmanager
    def at(self, number: int) -> Iterator[None]:
        """Wait until all smaller numbers have left; errors inside pass through and let the next one in."""
        with self._changed:
            self._changed.wait_for(lambda: self._next == number)
            try:
                yield
            finally:
                self._next += 1
                self._changed.notify_all()


def _one_thread() -> None:
    """A thread that makes batches computes alone: a second team of threads would fight that of the step."""
    torch.get_num_threads()  # at its first use in a thread torch sets the thread's number of them, so that comes first
    threadpool_limits(1, "openmp")  # of the calling thread; that of no other is touched
