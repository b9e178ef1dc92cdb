"""`StoreSource`: shuffled, resumable batches from the store.

Blocks (runs of whole samples, tens of megabytes) are read by Dask tasks a bounded number of bytes ahead, batches are
gathered from the open blocks one batch ahead of the step, in background threads. Which samples stand in which batch
follows from (seed, epoch) and the blocks alone (`train.data.order`): not from the tier, the number of threads or ranks.

Memory: about 1.5 · `window` blocks (2 · `window` where one epoch passes into the next) plus `lookahead_bytes` as
stored, plus two batches; in the device or host tier, all blocks as stored. Nothing outlives an iterator but the blocks
of these tiers: no process, thread, lock or file.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from threading import Condition
from typing import Any

import numpy as np
import torch
from threadpoolctl import ThreadpoolController

from pipeline.extract.batch import Batch
from pipeline.extract.kernels.memory import keeps_freed_memory, return_freed_memory
from pipeline.store import SEGMENT_BYTES
from pipeline.store.errors import UserError
from pipeline.store.format.samples import Samples
from pipeline.store.format.sorting import distinct
from pipeline.train.data.assemble import BlockPart, Loaded, assemble
from pipeline.train.data.buffers import Buffers
from pipeline.train.data.lookahead import LookAhead
from pipeline.train.data.order import Order, rank_slice
from pipeline.train.data.readers import make_reader
from pipeline.train.data.source import Ordered, Share
from pipeline.train.data.targets import Targets
from pipeline.train.data.tiers import choose

_SOON = 4096  # batches whose blocks are looked up side by side


@dataclass(frozen=True)
class StreamOptions:
    """How samples become batches, and how blocks are read. Raises UserError naming an option that is wrong.

    `batch_size`: over all ranks; this `rank` of `world` gets its share of each batch. `seed`, `window` (blocks mixed
    with each other), `block_bytes` (at least a whole segment by default, since cutting one means reading the chunks at
    the cut twice) and `group_by_length` (batches of like length, see `Order`) decide the order. `lookahead_bytes`: read
    beyond the present batch. `host_bytes`: keep the blocks in memory if they take no more (None: half of the memory
    free at the first epoch; 0: never). `tier`: "device", "host" or "disk" instead of what fits; `device`: where the
    blocks of the device tier go, and then the batches are there, too. `scheduler`: address of a `distributed`
    scheduler, else `workers` threads. `ahead`: batches made before they are asked for, in a thread (0: none, no
    thread). `pin`: page-locked batches, for copies to a GPU. `dtype`: of the decoded states; None: as stored, but
    float32 where rows have scales. `check`: called with each block that was read, to refuse what is no input of the
    backbone.
    """

    batch_size: int
    seed: int = 0
    window: int = 4
    group_by_length: bool = False
    block_bytes: int = 3 * SEGMENT_BYTES // 2
    lookahead_bytes: int = 2 * SEGMENT_BYTES
    host_bytes: int | None = None
    tier: str = "auto"
    device: torch.device | str = "cpu"
    scheduler: str | None = None
    workers: int | None = None
    rank: int = 0
    world: int = 1
    ahead: int = 1
    pin: bool = False
    dtype: torch.dtype | None = torch.float32
    check: Callable[[Samples], None] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise UserError(f"rank must be in [0, {self.world}), got {self.rank}")
        for name, least in (("lookahead_bytes", 0), ("ahead", 0), ("block_bytes", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def order(self, block: np.ndarray, lengths: Callable[[], np.ndarray]) -> Order:
        """The order of samples that stand in the blocks `block` (n,) and have `lengths()` (n,) rows."""
        rows = lengths() if self.group_by_length else None
        try:
            return Order(block, self.batch_size, self.seed, self.window, rows)
        except ValueError as error:
            raise UserError(str(error)) from None


class StoreSlot:
    """The samples `keys` of a feature space by number, with `states` and `columns`, as batches of whatever numbers are
    asked for. Raises MissingStates if something is not stored, UserError where there are no samples."""

    def __init__(
        self, space: Any, keys: Sequence[str], states: Sequence[str], columns: Sequence[str], options: StreamOptions
    ) -> None:
        if not keys:
            raise UserError("there are no samples to stream: the split is empty, or the limit is 0")
        self.states, self.columns, self.options = list(states), list(columns), options
        self._plan = partial(space.plan, keys, self.states, self.columns, max_block_bytes=options.block_bytes)
        self.plan = self._plan()
        self.beside = 0  # bytes that other slots keep in the same memory
        self._device = torch.device(options.device)
        self._kept: dict[int, Loaded] = {}
        self._tier: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the blocks that are kept: another process keeps its own, where they fit there."""
        return {**self.__dict__, "_kept": {}, "_tier": None}

    @property
    def block(self) -> np.ndarray:
        """(n,) int64, the block of each sample."""
        return np.asarray(self.plan.block)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64, the rows of each sample over all streams."""
        return np.asarray(np.sum(list(self.plan.lengths.values()), axis=0))

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks as stored: what an epoch reads, and what the host tier keeps."""
        return sum(block.nbytes for block in self.plan.blocks)

    @property
    def tier(self) -> str:
        """ "device", "host" or "disk"; decided when first asked for, by the memory that is free then."""
        if self._tier is None:
            wanted = self.options.tier
            self._tier = choose(self.nbytes + self.beside, self.options.host_bytes, self._device, wanted)
        return self._tier

    def regroup(self, groups: np.ndarray) -> None:
        """Read each of the groups `groups`, (n,) int64, as one or a few blocks from now on."""
        self.forget()
        self.plan = self._plan(groups=groups)

    def forget(self) -> None:
        """Give back the memory of the device or host tier."""
        self._kept.clear()
        return_freed_memory()

    def gather(
        self, epochs: Iterator[list[Share]], count: int, finish: Callable[[Batch, np.ndarray], None] | None = None
    ) -> Iterator[Batch]:
        """The samples of each share, `count` batches in all, in a list for each epoch. `finish`: called with each batch
        and its numbers, in the thread that made it."""
        if count <= 0:
            return
        options = self.options
        begun = time.perf_counter()
        reader = make_reader(options.scheduler, options.workers)
        place = self._device if self.tier == "device" else None
        keep = self.tier in ("device", "host")
        shares: deque[np.ndarray] = deque()
        uses = self._uses(epochs, shares)
        ahead = options.lookahead_bytes
        blocks = LookAhead(uses, self.plan.blocks, reader, ahead, self._kept, keep, place, options.check)
        # Two, for a consumer that waits; one that computes for a while between two batches keeps but one of them busy.
        maker = ThreadPoolExecutor(2, "make-batch", _one_thread) if options.ahead else None
        # Of each state: what is being made, what waits, and what the consumer holds, two batches perhaps.
        buffers = Buffers(0 if keeps_freed_memory() else len(self.states) * (options.ahead + 4))
        make = partial(self._make_next, shares, blocks, buffers, _Turns(), finish)
        pending: deque[Future[Batch]] = deque()
        try:
            for number in range(count):
                if maker is None:
                    batch = make(number)
                else:
                    while len(pending) <= options.ahead and number + len(pending) < count:
                        pending.append(maker.submit(make, number + len(pending)))
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

    def _uses(self, epochs: Iterator[list[Share]], numbers: deque[np.ndarray]) -> Iterator[list[np.ndarray]]:
        """For each epoch the blocks of each batch; the samples of its share are added to `numbers`."""
        for shares in epochs:
            numbers.extend(share.numbers for share in shares)
            touched = [share.touched for share in shares]
            pieces = (touched[start : start + _SOON] for start in range(0, len(touched), _SOON))
            yield [uses for some in pieces for uses in distinct([self.plan.block[numbers] for numbers in some])]

    def _make_next(
        self,
        shares: deque[np.ndarray],
        blocks: LookAhead,
        buffers: Buffers,
        turns: _Turns,
        finish: Callable[[Batch, np.ndarray], None] | None,
        number: int,
    ) -> Batch:
        with turns.at(number):
            loaded = blocks.take(number)
            share = shares.popleft()
        batch = self._make(share, loaded, buffers)
        if finish is not None:
            finish(batch, share)
        return batch

    def _make(self, index: np.ndarray, blocks: dict[int, Loaded], buffers: Buffers) -> Batch:
        """The samples `index` (B,). They stand by block, or, where another layout is followed, in runs of a block."""
        runs = np.split(index, np.flatnonzero(np.diff(self.plan.block[index])) + 1)
        some = next(iter(blocks.values()))  # for a share without samples
        parts = [BlockPart(blocks[self.plan.block[r[0]]] if len(r) else some, self.plan.slot[r]) for r in runs]
        device = self._device if self.tier == "device" else "cpu"
        pin = self.options.pin and device == "cpu"
        return assemble(parts, self.states, self.columns, self.options.dtype, pin, device, buffers)


class StoreSource(Ordered, StoreSlot):
    """The samples `keys` of a feature space, with `states` and `columns`, as the batches of an order of their own.

    `targets`: of the samples, in the order of `keys`; None for none. Raises MissingStates if something is not stored,
    UserError for wrong options or targets.
    """

    def __init__(
        self,
        space: Any,
        keys: Sequence[str],
        targets: Targets | None,
        states: Sequence[str],
        columns: Sequence[str],
        options: StreamOptions,
    ) -> None:
        super().__init__(space, keys, states, columns, options)
        if targets is not None and len(targets) != len(keys):
            raise UserError(f"{len(targets)} targets for {len(keys)} samples: one each is needed")
        self.targets = targets
        self.order = options.order(self.block, lambda: self.lengths)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from batch `start` on; close the iterator to stop early."""
        return self.epochs(epoch, epoch + 1, start)

    def epochs(self, first: int, end: int, start: int = 0, share: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """The batches of the epochs `first` … `end` - 1, of the first one from batch `start` on. While one epoch ends
        the next one's first blocks are read. `share`: (i, k) hands out the batches i, i + k, … of these, for k readers
        that take turns. Close the iterator to stop early."""
        batches, count = self.share_of(first, end, start, share)
        return self._run(batches(), count)

    def follow(self, block: np.ndarray) -> None:
        """Hand out the samples in the order that they have where they stand in the blocks `block`, (n,) int64, wherever
        they stand now. Each block of then is read as one or a few of now, so memory stays bounded by the window."""
        self.regroup(block)
        self.order = replace(self.order, block=block)

    def sequential(self) -> Iterator[Batch]:
        """Every sample once, block after block."""
        return self._run(iter([self.order.sequential()]), len(self))

    def _run(self, epochs: Iterator[list[np.ndarray]], count: int) -> Iterator[Batch]:
        rank, world = self.options.rank, self.options.world
        shares = ([Share.of(rank_slice(b, rank, world), b) for b in batches] for batches in epochs)
        return self.gather(shares, count, self._finish)

    def _finish(self, batch: Batch, index: np.ndarray) -> None:
        batch.index = index
        if self.targets is not None:
            device = self._device if self.tier == "device" else "cpu"
            self.targets.fill(batch, index, device, self.options.pin and device == "cpu")


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
    _pools().limit(limits=1, user_api="openmp")  # of the calling thread; that of no other is touched


@cache
def _pools() -> ThreadpoolController:
    """Torch's thread pool among them. Finding them takes milliseconds, which each epoch need not pay again."""
    return ThreadpoolController()
