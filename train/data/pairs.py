"""`PairSource`: batches of a task with several slots, each of a backbone of its own, under one order.

A pair (a sample of the task) names a sample of each slot, and several pairs may name the same one: an image with five
captions is stored once. Every batch gathers the distinct samples of each slot once; `Batch.ids` says which pair has
which. The order follows the blocks of one slot, the one with most bytes, which are read as those of a `StoreSource`
are. The samples of the others are asked for at random: they stay in memory for an epoch, and between epochs where they
fit there, the smaller slot first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import chain

import numpy as np
import torch

from pipeline.extract.batch import Batch
from pipeline.store.errors import UserError
from pipeline.train.data.order import Order, rank_slice
from pipeline.train.data.source import Ordered, Share, Slot
from pipeline.train.data.store_source import StoreSlot, StreamOptions
from pipeline.train.data.targets import Targets

Batches = Iterator[list[np.ndarray]]  # for each epoch the samples of each batch, over all ranks


def distinct(keys: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """(n,) keys → the m distinct ones in order of first appearance, and (n,) int64, which of them each is."""
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return list(number), np.fromiter((number[key] for key in keys), np.int64, len(keys))


class PairSource(Ordered):
    """Batches of n pairs. `slots`: the distinct samples of each; `places`: slot → (n,) int64, the number that each
    pair's sample has there. `leading`: the slot whose blocks the order follows. `targets`: of the pairs, None for none;
    metas are slot → meta. This `rank` of `world` gets its share of each batch."""

    def __init__(
        self,
        slots: Mapping[str, Slot],
        places: Mapping[str, np.ndarray],
        leading: str,
        targets: Targets | None,
        order: Order,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if targets is not None and len(targets) != order.n:
            raise UserError(f"{len(targets)} targets for {order.n} pairs: one each is needed")
        self.slots, self.places, self.leading = dict(slots), dict(places), leading
        self.targets, self._rank, self._world = targets, rank, world
        self._follow(order)

    @classmethod
    def of_store(
        cls,
        slots: Mapping[str, StoreSlot],
        places: Mapping[str, np.ndarray],
        targets: Targets | None,
        options: StreamOptions,
    ) -> PairSource:
        """From the store: the order follows the blocks of the slot with most bytes. A smaller slot has the first claim
        on the memory that keeps blocks."""
        taken = 0
        ascending = sorted(slots, key=lambda name: slots[name].nbytes)
        for name in ascending:
            slots[name].beside = taken
            taken += slots[name].nbytes
        leading = ascending[-1]

        def rows() -> np.ndarray:
            return np.asarray(np.sum([slots[name].lengths[place] for name, place in places.items()], axis=0))

        order = options.order(slots[leading].block[places[leading]], rows)
        return cls(slots, places, leading, targets, order, options.rank, options.world)

    def follow(self, block: np.ndarray) -> None:
        """Hand out the pairs in the order that they have where the leading slot's samples of the pairs stand in the
        blocks `block`, (n,) int64."""
        self._follow(replace(self.order, block=block))
        # Where another slot led then the order holds, and reading is less even.
        if self.leading in self._groups:
            self.slots[self.leading].regroup(self._groups[self.leading])

    def _follow(self, order: Order) -> None:
        """`_groups`: slot → (m,) int64, by what its samples stand in a batch before their numbers. It follows from the
        order alone and never from where samples lie now, for what drops out of a batch depends on their places."""
        self.order, self._groups = order, dict[str, np.ndarray]()
        for name in (self.leading, *(name for name in self.slots if name != self.leading)):
            place = self.places[name]
            groups = np.zeros(int(place.max(initial=-1)) + 1, np.int64)
            groups[place] = order.block
            if np.array_equal(groups[place], order.block):  # the slot whose blocks these are
                self._groups[name] = groups
                return

    @property
    def states(self) -> list[str]:
        """The states of all slots, as they are called in a batch."""
        return [f"{name}/{state}" for name, slot in self.slots.items() for state in slot.states]

    def epochs(self, first: int, end: int, start: int = 0, share: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """The shuffled batches, see `Source.epochs` and `StoreSource.epochs`."""
        return self._run(*self.share_of(first, end, start, share))

    def sequential(self) -> Iterator[Batch]:
        """Every pair once, block after block of the leading slot."""
        return self._run(lambda: iter([self.order.sequential()]), len(self))

    def each(self, slots: Sequence[str] = ()) -> Iterator[Batch]:
        """Every distinct sample of each slot (of `slots` where given) once, slot after slot, in batches that hold a
        single slot: what ranking needs. `Batch.index`: the number that each sample has in its slot; `targets`: `row`,
        the pairs that it stands in, sample after sample, and `row.n` (B,), how many these are."""
        for name in slots or self.slots:
            place, slot = self.places[name], self.slots[name]
            count = int(place.max(initial=-1)) + 1
            rows, size = (
                np.split(np.argsort(place, kind="stable"), np.cumsum(np.bincount(place))[:-1]),
                self.order.batch_size,
            )
            found = np.argsort(slot.block[:count], kind="stable").astype(np.int64)
            batches = [found[at : at + size] for at in range(0, count, size)]
            shares = iter([[Share.of(batch, batch) for batch in batches]])
            with ExitStack() as stack:
                parts = stack.enter_context(closing(slot.gather(shares, len(batches))))  # type: ignore[type-var]
                for numbers, part in zip(batches, parts, strict=True):
                    batch = Batch.joined({name: part}, {name: np.arange(len(numbers))})
                    batch.index, batch.wait_seconds = numbers, part.wait_seconds
                    own = [rows[number] for number in numbers.tolist()]
                    batch.targets = {
                        "row": torch.from_numpy(np.concatenate(own)),
                        "row.n": torch.tensor([len(of) for of in own]),
                    }
                    yield batch

    def _run(self, batches: Callable[[], Batches], count: int) -> Iterator[Batch]:
        """`batches`: begins anew for each slot, since they read ahead of each other."""
        with ExitStack() as stack:
            parts = {
                name: stack.enter_context(closing(slot.gather(self._shares(name, batches()), count)))  # type: ignore[type-var]
                for name, slot in self.slots.items()
            }
            for batch in chain.from_iterable(batches()):
                mine = rank_slice(batch, self._rank, self._world)
                yield self._pairs(mine, {name: next(part) for name, part in parts.items()})

    def _shares(self, slot: str, batches: Batches) -> Iterator[list[Share]]:
        for epoch in batches:
            yield [
                Share.of(
                    self._numbers(slot, rank_slice(batch, self._rank, self._world))[0], self.places[slot][batch[:1]]
                )
                for batch in epoch
            ]

    def _numbers(self, slot: str, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The distinct samples (k,) that `pairs` (B,) name, by `_groups` and number, and which of them each pair has,
        (B,)."""
        found, which = np.unique(self.places[slot][pairs], return_inverse=True)
        if slot not in self._groups:
            return found, which
        by_group = np.argsort(self._groups[slot][found], kind="stable")
        return found[by_group], np.argsort(by_group, kind="stable")[which]

    def _pairs(self, pairs: np.ndarray, parts: Mapping[str, Batch]) -> Batch:
        # Where only some slots fit on the device, the others' parts follow them.
        device = next((part.device for part in parts.values() if part.device.type != "cpu"), torch.device("cpu"))
        parts = {name: part.to(device) for name, part in parts.items()}
        batch = Batch.joined(parts, {name: self._numbers(name, pairs)[1] for name in parts})
        batch.index, batch.numbers = pairs, {name: place[pairs] for name, place in self.places.items()}
        batch.wait_seconds = sum(part.wait_seconds for part in parts.values())
        if self.targets is not None:
            self.targets.fill(batch, pairs, device)
        return batch
