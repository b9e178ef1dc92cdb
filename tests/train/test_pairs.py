"""Pairs of two slots from a store: every pair once an epoch over any number of ranks, each distinct sample gathered
once a batch, and a run that goes on where it was cut, also when the store was compacted since."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import store
from pipeline.extract.batch import Batch
from pipeline.extract.encoding import decode
from pipeline.store.errors import UserError
from pipeline.store.upkeep.rewrite import compact
from pipeline.train.data.pairs import PairSource, distinct
from pipeline.train.data.store_source import StoreSlot, StreamOptions
from pipeline.train.fit.loop import FitOptions, fit
from tests.train.test_loop import Killed, Stopping, course, kill, scorer
from tests.train.toys import COLUMNS, STATES, ToyModel, key, samples, targets

# An image each for three captions, which is the slot with more bytes; captions repeat, too.
IMAGES, CAPTIONS = 24, 40
PAIRS = [(i % IMAGES, 100 + (7 * i) % CAPTIONS) for i in range(72)]
SMALL: dict[str, Any] = {"seed": 1, "window": 2, "block_bytes": 900, "ahead": 0, "host_bytes": 0}
SLOTS = {"image": (STATES, 0), "text": (STATES[:1], 1)}  # states, place in a pair


@pytest.fixture
def spaces(tmp_path: Path) -> dict[str, store.Space]:
    made = {}
    for slot, parts in {"image": (range(10), range(10, IMAGES)), "text": (range(100, 120), range(120, 140))}.items():
        made[slot] = store.Store.create(tmp_path / slot).create_space({"format": "float32", "format_version": 1})
        for ids in parts:
            writer = made[slot].writer({})
            writer.add(samples(list(ids)))
            writer.seal()
    return made


def source(spaces: dict[str, store.Space], pairs: Any = PAIRS, size: int = 10, **options: Any) -> PairSource:
    chosen = StreamOptions(size, **{**SMALL, **options})
    slots, places = {}, {}
    for slot, (states, place) in SLOTS.items():
        keys, places[slot] = distinct([key(pair[place]) for pair in pairs])
        columns = COLUMNS if slot == "image" else COLUMNS[:1]
        slots[slot] = StoreSlot(spaces[slot], keys, states, columns, chosen)
    return PairSource.of_store(slots, places, targets([sum(pair) % 2 for pair in pairs]), chosen)


def test_a_batch_holds_each_sample_of_a_slot_once(spaces: dict[str, store.Space]) -> None:
    for batch in source(spaces).epochs(0, 1):
        assert len(batch) == len(batch.index) == len(batch.ids["text"]) and batch.targets is not None
        assert batch.targets["label"].tolist() == [sum(PAIRS[i]) % 2 for i in batch.index]
        for slot, (states, place) in SLOTS.items():
            part, named = batch.of(slot), [PAIRS[i][place] for i in batch.index]
            assert len(part) == len(set(named)) and part.states.keys() == set(states)
            ids = sorted(set(named), key=lambda i: batch.ids[slot].tolist()[named.index(i)])
            want = samples(ids)
            for name in states:
                assert torch.equal(part.states[name], decode(want.states[name]))
                assert part.states[name] is batch.states[f"{slot}/{name}"]
            mean = batch.spread(f"{slot}/x", part.mean("encoder.0"))
            rows = [samples([i]) for i in named]
            assert torch.allclose(mean, torch.stack([decode(r.states["encoder.0"]).mean(0) for r in rows]))
            assert torch.equal(batch.mean(f"{slot}/encoder.0"), part.mean("encoder.0"))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("grouped", [False, True])
def test_every_pair_once_an_epoch(spaces: dict[str, store.Space], world: int, grouped: bool) -> None:
    def epochs(rank: int, of: int) -> list[np.ndarray]:
        made = source(spaces, PAIRS[:71], 9, rank=rank, world=of, group_by_length=grouped)  # the last batch has 8
        return [batch.index for batch in made.epochs(0, 2)]

    alone, shares = epochs(0, 1), [epochs(rank, world) for rank in range(world)]
    for place, batch in enumerate(alone):
        assert np.concatenate([share[place] for share in shares]).tolist() == batch.tolist()
    half = len(alone) // 2
    first, second = np.concatenate(alone[:half]), np.concatenate(alone[half:])
    assert sorted(first) == sorted(second) == list(range(71)) and first.tolist() != second.tolist()
    assert sorted(np.concatenate([b.index for b in source(spaces).sequential()])) == list(range(72))


def test_a_rank_without_a_share_has_the_widths(spaces: dict[str, store.Space]) -> None:
    (batch,) = source(spaces, PAIRS[:1], rank=0, world=2).epochs(0, 1)
    assert len(batch) == 0 and {n: x.shape[1] for n, x in batch.states.items()}.keys() == {
        "text/encoder.0", *(f"image/{n}" for n in STATES)
    }  # fmt: skip


def test_the_dear_slot_is_read_in_blocks(spaces: dict[str, store.Space]) -> None:
    """The order follows its blocks: a batch touches few. The smaller slot stays where memory is for it alone."""
    made = source(spaces)
    dear = made.slots["image"]
    assert made.leading == "image" and isinstance(dear, StoreSlot) and len(dear.plan.blocks) > 4
    touched = [len(np.unique(dear.block[made.places["image"][b]])) for b in made.order.epoch(0)]
    assert max(touched) <= 2 * SMALL["window"] + 1
    room = sum(block.nbytes for block in made.slots["text"].plan.blocks)  # type: ignore[attr-defined]
    tiers = {n: s.tier for n, s in source(spaces, host_bytes=room).slots.items()}  # type: ignore[attr-defined]
    assert tiers == {"image": "disk", "text": "host"}


class Joined(ToyModel):
    """The toy, on both parts of the pairs."""

    def forward(self, batch: Batch) -> torch.Tensor:
        found = [batch.spread(f"{slot}/x", super(Joined, self).forward(batch.of(slot))) for slot in SLOTS]
        return found[0] + found[1]


def train(spaces: dict[str, store.Space], run: Path, stop: int | None = None, **options: Any) -> dict[str, Any]:
    first: Any = source(spaces, **options)
    first = first if stop is None else Stopping(first, stop, kill)
    held = [source(spaces, PAIRS[i : i + 9]) for i in (0, 20)]
    options_of = FitOptions(epochs=3, lr=1e-2, checkpoint_every=2)
    return fit(Joined(), first, held[0], held[1], options_of, run, scorer, progress=False)


@pytest.mark.parametrize("stop", [1, 5, 13])
@pytest.mark.parametrize("options", [{}, {"group_by_length": True, "ahead": 1}])
def test_a_run_goes_on(spaces: dict[str, store.Space], tmp_path: Path, stop: int, options: dict[str, Any]) -> None:
    """Bit for bit, though both spaces were compacted in between and the order's blocks are gone."""
    straight = train(spaces, tmp_path / "straight", **options)
    with pytest.raises(Killed):
        train(spaces, tmp_path / "cut", stop, **options)
    before = source(spaces, **options).order
    for space in spaces.values():
        compact(space)
    assert not np.array_equal(source(spaces, **options).order.block, before.block)
    found = train(spaces, tmp_path / "cut", **options)
    assert course(tmp_path / "cut") == course(tmp_path / "straight")
    assert found["test"] == straight["test"] and found["layout"] == straight["layout"] == before.layout()


def test_following_reads_each_block_of_then_on_its_own(spaces: dict[str, store.Space]) -> None:
    then, now = source(spaces), source(spaces, block_bytes=1 << 30)
    want = [b.index.tolist() for b in then.epochs(1, 2)]
    now.follow(then.order.block)
    got = list(now.epochs(1, 2))
    assert [b.index.tolist() for b in got] == want
    dear = now.slots["image"]
    place = now.places["image"]
    assert all(len(set(then.order.block[dear.block[place] == b])) == 1 for b in set(dear.block.tolist()))


def test_pairs_and_targets_are_as_many(spaces: dict[str, store.Space]) -> None:
    made = source(spaces)
    with pytest.raises(UserError, match="71 targets for 72 pairs"):
        PairSource(made.slots, made.places, made.leading, targets([0] * 71), made.order)


def test_closing_ends_the_readers_of_all_slots(spaces: dict[str, store.Space]) -> None:
    made = source(spaces, ahead=1)
    batches: Iterator[Batch] = made.epochs(0, 5)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not [t.name for t in threading.enumerate() if t.name.startswith("make-batch")]
    assert [len(b) for b in made.epochs(0, 1)] == [10] * 7 + [2]
