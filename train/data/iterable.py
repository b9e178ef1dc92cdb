"""`Stream`: batches from the store as PyTorch knows data sets, for loops, loaders and trainers that are not ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.extract.batch import Batch
from pipeline.store.errors import UserError
from pipeline.train.data.pairs import PairSource
from pipeline.train.data.store_source import StoreSource


class Stream(IterableDataset[Batch]):
    """Shuffled batches, each sample exactly once an epoch; `len` is how many batches one iteration has.

    The order follows from (seed, epoch). An iteration whose last batch was taken is followed by the next epoch, one
    that is broken off begins again where it began; `set_epoch` chooses. Give a `DataLoader` `batch_size=None`: its
    workers take turns, so that it hands out the batches of one process in their order. Workers know of epochs only what
    `set_epoch` says, as with PyTorch's own samplers: without it every epoch has the same order.

    `source`: where the batches come from. `epochs`: that one iteration passes through. `device`: where the batches are.
    `name`: of the rows, for people.
    """

    def __init__(
        self,
        source: StoreSource | PairSource,
        epochs: int = 1,
        device: torch.device | str = "cpu",
        name: str = "samples",
    ) -> None:
        if epochs < 1:
            raise UserError(f"epochs must be at least 1, got {epochs}")
        self._source, self._epochs, self._device, self._name = source, epochs, torch.device(device), name
        # Where the next iteration begins and ends: epoch, batch, epoch after the last; and whether workers hand out the
        # present one. In shared memory, since the workers of a loader may live through several epochs.
        self._next = torch.tensor([0, 0, epochs, 0]).share_memory_()
        self._stands = (0, 0, epochs)  # the same of the latest iteration in this process
        self._own: tuple[int, int, int] | None = None  # of the next one of this worker, which has loaded a state

    def __len__(self) -> int:
        return self._epochs * len(self._source)

    def __repr__(self) -> str:
        source = self._source
        return (
            f"Stream({self._name}: {source.n:,} samples in {len(source):,} batches of {source.order.batch_size}, "
            f"{', '.join(source.states)})"
        )

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        if worker is not None and self._device.type == "cuda":
            raise UserError(
                "a stream on a GPU cannot be read by the workers of a DataLoader: leave device out and move the "
                "batches with .to(), or use num_workers=0 (batches are made ahead in threads anyway)"
            )
        epoch, batch, end = self._own or self._next[:3].tolist()
        self._own, self._next[3] = None, worker is not None
        self._stands = (epoch, batch, end)
        return self._batches(epoch, batch, end, (worker.id, worker.num_workers) if worker else (0, 1))

    def _batches(self, epoch: int, batch: int, end: int, share: tuple[int, int]) -> Iterator[Batch]:
        """From `batch` of `epoch` on until `end`, those of one `share` (i, k)."""
        count, taken = len(self._source), epoch * len(self._source) + batch
        with closing(self._source.epochs(epoch, end, batch, share)) as batches:  # type: ignore[type-var]
            for made in batches:
                taken += share[1]
                if taken < end * count or get_worker_info() is not None:
                    self._stands = (*divmod(taken, count), end)
                else:  # now, not when it is asked for one more: who knows `len` does not ask
                    self._begin(end)
                yield made.to(self._device)
                del made

    def set_epoch(self, epoch: int) -> None:
        """Begin the next iteration with `epoch`, from 0. The epoch that `load_state_dict` stands in goes on where it
        stood."""
        if epoch < 0:
            raise UserError(f"epoch must not be negative, got {epoch}")
        begin, batch, end, _ = self._next.tolist()
        self._begin(epoch, *((batch, end) if epoch == begin else ()))

    def _begin(self, epoch: int, batch: int = 0, end: int | None = None) -> None:
        self._stands = (epoch, batch, epoch + self._epochs if end is None else end)
        self._next.copy_(torch.tensor([*self._stands, 0]))

    def state_dict(self, batch: int | None = None) -> dict[str, Any]:
        """Where the latest iteration stands, for `load_state_dict` of the same stream in another process.

        `batch`: how many batches have been taken since the beginning of the epoch; must be given where the workers of a
        loader hand them out, since these run ahead.
        """
        epoch, taken, end = self._stands
        if batch is None and bool(self._next[3]) and get_worker_info() is None:
            raise UserError(
                "the workers of a DataLoader run ahead of you: say how many batches of the epoch you have taken, "
                "state_dict(batch=…)"
            )
        if batch is not None:
            if not 0 <= batch <= len(self):
                raise UserError(f"batch must be in [0, {len(self)}], the batches of an iteration; got {batch}")
            epoch, taken = epoch + batch // len(self._source), batch % len(self._source)
        return {"epoch": epoch, "batch": taken, "end": end, "order": self._order}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next iteration where `state` stood; in a worker of a loader that keeps states, that of the worker.
        UserError for the state of another stream: its samples, batch size, seed, window or blocks differ."""
        epoch, batch, end = (n if type(n := state.get(name)) is int else -1 for name in ("epoch", "batch", "end"))
        if min(epoch, batch, end) < 0:
            raise UserError("this is not the state of a stream: give what state_dict() returned")
        if state.get("order") != self._order:
            raise UserError(
                "this is the state of a stream with other samples, batch size, seed, window or blocks: open the stream "
                "with the same options, on the store as it was; after `pipeline store compact` begin the epoch anew"
            )
        if batch >= len(self._source):
            raise UserError(f"the state stands at batch {batch}, an epoch has {len(self._source)}")
        if get_worker_info() is None:
            self._begin(epoch, batch, end if epoch < end else None)
        else:  # the others may stand a turn before or after this one, and still have batches where it has none left
            self._own = (epoch, batch, end)

    @cached_property
    def _order(self) -> str:
        """What the order of every epoch follows from."""
        return self._source.order.digest()
