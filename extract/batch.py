"""`Batch`: named hidden states of a few samples, packed row after row, from the store or from the live backbone.

A *stream* is a sequence of positions of a sample: `encoder` (tokens or patches), `decoder` (positions of a text
decoder). A state or column is named `<stream>.<what>`: `encoder.3` is the output of encoder block 3, `decoder.ids` the
decoder's input ids. All arrays of one stream have the same rows, sample after sample, without padding; a tuner pads
only where attention needs it, and only at the width it works in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.extract.past import Past
from pipeline.extract.stackable import Stackable
from pipeline.store.errors import UserError
from pipeline.store.format.names import stream_of as stream_of
from pipeline.store.format.samples import offsets_of

T = TypeVar("T")


@dataclass
class Layout:
    """Where each packed row of a stream lies in the padded (batch, length) grid.

    `lengths`: (B,) int64 on the batch's device. `mask`: (B, L) bool, true at real positions. `flat`: (rows,) int64,
    the row's place in the flattened grid. `sample`: (rows,) int64, the sample each row belongs to. `first`: (B,) int64,
    the first row of each sample.
    """

    lengths: Tensor
    mask: Tensor
    flat: Tensor
    sample: Tensor
    first: Tensor

    @classmethod
    def of(cls, lengths: np.ndarray, device: torch.device | str = "cpu") -> Layout:
        """Built on the host from `lengths` (B,), so that no device synchronisation is needed."""
        lengths = np.asarray(lengths, dtype=np.int64)
        batch, longest = len(lengths), int(lengths.max(initial=0))
        first = offsets_of(lengths)[:-1]
        sample = np.repeat(np.arange(batch, dtype=np.int64), lengths)
        within = np.arange(int(lengths.sum()), dtype=np.int64) - first[sample]
        mask = np.arange(longest)[None, :] < lengths[:, None]

        def put(a: np.ndarray) -> Tensor:
            return torch.from_numpy(a).to(device, non_blocking=True)

        return cls(put(lengths), put(mask), put(sample * longest + within), put(sample), put(first))

    def pad(self, rows: Tensor, value: float = 0.0) -> Tensor:
        """(rows, …) → (B, L, …), the gaps filled with `value`."""
        batch, longest = self.mask.shape
        grid = _Spread.run(rows, self.flat, batch * longest, value)
        return grid.view(batch, longest, *rows.shape[1:])

    def mean(self, rows: Tensor) -> Tensor:
        """(rows, …) → (B, …), the mean of each sample's rows."""
        total = rows.new_zeros(len(self.lengths), *rows.shape[1:]).index_add(0, self.sample, rows)
        return total / self.lengths.clamp(min=1).to(rows.dtype).view(-1, *[1] * (rows.dim() - 1))

    def unpad(self, grid: Tensor) -> Tensor:
        """(B, L, …) → (rows, …)."""
        return grid.flatten(0, 1).index_select(0, self.flat)


class _Spread(Stackable):
    """Rows to the places `at` of `count`, which keeps no row for the backward pass, as `index_copy` would."""

    @staticmethod
    def forward(rows: Tensor, at: Tensor, count: int, value: float) -> Tensor:
        return rows.new_full((count, *rows.shape[1:]), value).index_copy_(0, at, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, float], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def vmap(info: Any, in_dims: Any, rows: Tensor, at: Tensor, count: int, value: float) -> tuple[Tensor, int]:
        """Of several models the rows of each go to places of its own."""
        n, rows = info.batch_size, rows.movedim(in_dims[0], 0)
        places = at + count * torch.arange(n, device=at.device)[:, None]
        grid = _Spread.run(rows.flatten(0, 1), places.flatten(), n * count, value)
        return grid.view(n, count, *rows.shape[2:]), 0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad.index_select(0, *ctx.saved_tensors), None, None, None


@dataclass(repr=False)
class Batch:
    """States of B samples. Nothing in it says whether they came from the store or from the backbone.

    `states`: name → (rows of its stream, width), in float32 or, for training, in the floating-point numbers of the
    store: `StateLinear` takes either, anything else wants `.float()`. `columns`: name → (rows,) int64 side inputs
    (token ids and the like). `lengths`: stream → (B,) int64 on the host. `targets`: what an objective made of the
    samples' targets, by name (`label` (B,) for one class or number a sample); None where there are none. `metas`: what
    extraction knows of each sample (word boundaries and the like). `index`:
    (B,) int64, the place of each sample in its split's task table. `wait_seconds`: how long the consumer waited for
    this batch. `pictures`: what a live image backbone reads pixels from; None from the store. `past`: what was run of
    the samples before these positions, while text is written; then all samples have equally many. `task`: whose samples
    these are, in a run with several.

    Of a task with several slots: names are `<slot>/<stream>.<what>`, and states, columns and lengths are of the
    distinct samples of each slot, gathered once however many samples of the batch share them. `ids`: slot → (B,) int64
    on the host, which of them each sample has; `of` is the part of one slot, `spread` goes back to B rows. A meta is
    then slot → what is known of that slot's sample; `shown`: slot → its `pictures`; `numbers`: slot → (B,)
    int64 on the host, which of the split's distinct samples each has. {} for one backbone.
    """

    states: dict[str, Tensor]
    columns: dict[str, Tensor]
    lengths: dict[str, np.ndarray]
    targets: dict[str, Tensor] | None = None
    metas: Sequence[Mapping[str, Any]] = ()
    index: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    wait_seconds: float = 0.0
    pictures: Sequence[Any] | None = None
    past: Past | None = None
    ids: dict[str, np.ndarray] = field(default_factory=dict)
    shown: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    task: str = ""
    _derived: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def joined(cls, parts: Mapping[str, Batch], ids: Mapping[str, np.ndarray]) -> Batch:
        """The batch of several slots; `parts`: slot → its distinct samples."""

        def named(of: Callable[[Batch], Mapping[str, T]]) -> dict[str, T]:
            return {f"{slot}/{name}": value for slot, part in parts.items() for name, value in of(part).items()}

        shown = {slot: part.pictures for slot, part in parts.items() if part.pictures is not None}
        states, columns, lengths = named(lambda b: b.states), named(lambda b: b.columns), named(lambda b: b.lengths)
        return cls(states, columns, lengths, ids=dict(ids), shown=shown)

    def of(self, slot: str) -> Batch:
        """The distinct samples of one slot, as a batch of one backbone; the batch itself for ""."""
        return self.derive(f"part {slot}", lambda batch: batch._part(slot)) if slot else self

    def _part(self, slot: str) -> Batch:
        def cut(named: Mapping[str, T]) -> dict[str, T]:
            return {k.removeprefix(f"{slot}/"): v for k, v in named.items() if k.startswith(f"{slot}/")}

        firsts = np.unique(self.ids[slot], return_index=True)[1].tolist() if self.metas else []
        metas = [self.metas[i].get(slot, {}) for i in firsts]
        shown = self.shown.get(slot)
        return Batch(cut(self.states), cut(self.columns), cut(self.lengths), metas=metas, pictures=shown)

    def spread(self, feature: str, rows: Tensor) -> Tensor:
        """Rows of the distinct samples of the slot that the feature `<slot>/<name>` is of → (B, …), one for each sample
        of the batch; as they are where there is one backbone."""
        ids = self.ids.get(feature.partition("/")[0])
        if ids is None or (len(ids) == len(rows) and bool((ids == np.arange(len(ids))).all())):
            return rows
        return rows.index_select(0, torch.from_numpy(ids).to(rows.device, non_blocking=True))

    def __len__(self) -> int:
        return len(next(iter((self.ids or self.lengths).values())))

    def __repr__(self) -> str:
        shapes = [f"{n} {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for n, x in self.states.items()]
        found = {"states": shapes, "columns": list(self.columns), "targets": list(self.targets or {})}
        parts = [f"{what} {', '.join(names)}" for what, names in found.items() if names]
        return f"Batch({'; '.join([f'{len(self)} samples', *parts, f'on {self.device}'])})"

    @property
    def device(self) -> torch.device:
        for tensor in (*self.states.values(), *self.columns.values()):
            return tensor.device
        return torch.device("cpu")

    def layout(self, stream: str) -> Layout:
        """The padded grid of `stream`, made once a batch."""
        return self.derive(f"layout of {stream}", lambda batch: Layout.of(batch.lengths[stream], batch.device))

    def derive(self, name: str, make: Callable[[Batch], T]) -> T:
        """What `make` makes of this batch's lengths and columns; under one name it is made once."""
        if name not in self._derived:
            self._derived[name] = make(self)
        return self._derived[name]

    def rows(self, name: str) -> Tensor:
        """State `name` (rows, width) float32. UserError naming the states there are for one that is not among them."""
        if name not in self.states:
            raise UserError(f"the batch has no state {name!r}; it has: {', '.join(self.states) or 'none'}")
        return self.states[name].float()

    def mean(self, name: str) -> Tensor:
        """(B, width) float32, the mean of state `name` over the rows of each sample; 0 for a sample without rows."""
        return self.layout(stream_of(name)).mean(self.rows(name))

    def max(self, name: str) -> Tensor:
        """(B, width) float32, the largest value of each channel in each sample; 0 for a sample without rows."""
        rows, sample = self.rows(name), self.layout(stream_of(name)).sample
        out = rows.new_zeros(len(self.lengths[stream_of(name)]), rows.shape[1])
        return out.scatter_reduce(0, sample[:, None].expand_as(rows), rows, "amax", include_self=False)

    def first(self, name: str) -> Tensor:
        """(B, width) float32, the first row of each sample (BERT's [CLS]); 0 for a sample without rows."""
        return self._at(name, offsets_of(self.lengths[stream_of(name)])[:-1])

    def last(self, name: str) -> Tensor:
        """(B, width) float32, the last row of each sample; 0 for a sample without rows."""
        return self._at(name, offsets_of(self.lengths[stream_of(name)])[1:] - 1)

    def _at(self, name: str, at: np.ndarray) -> Tensor:
        """Row `at` (B,) of each sample, 0 where a sample has none."""
        rows, held = self.rows(name), np.asarray(self.lengths[stream_of(name)]) > 0
        if not held.all():
            rows, at = torch.cat([rows, rows.new_zeros(1, rows.shape[1])]), np.where(held, at, len(rows))
        return rows.index_select(0, torch.from_numpy(at).to(rows.device, non_blocking=True))

    def pad(self, name: str, value: float = 0.0) -> tuple[Tensor, Tensor]:
        """State `name` as (B, L, width) float32, short samples filled up with `value`, and the mask (B, L) bool, true
        where a sample has rows."""
        layout = self.layout(stream_of(name))
        return layout.pad(self.rows(name), value), layout.mask

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`; copies are asynchronous where the memory is pinned."""
        if torch.device(device) == self.device:
            return self
        return replace(
            self,
            states=moved(self.states, device),
            columns=moved(self.columns, device),
            targets=None if self.targets is None else moved(self.targets, device),
            _derived={},
        )


def moved(tensors: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """Named tensors on `device`; copies are asynchronous where the memory is pinned."""
    return {k: v.to(device, non_blocking=True) for k, v in tensors.items()}
