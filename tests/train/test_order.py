"""Order: exact cover, independence of the number of ranks, bounded number of open blocks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.train.data.order import Order, epoch_order, rank_slice
from tests.store.helpers import most_memory


@st.composite
def orders(draw: st.DrawFn) -> Order:
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=30))
    block = np.repeat(np.arange(len(sizes)) * 3, sizes)  # block numbers need not be consecutive
    np.random.default_rng(draw(st.integers(0, 99))).shuffle(block)
    return Order(block, draw(st.integers(1, 50)), draw(st.integers(0, 2**40)), draw(st.integers(1, 10)))


@settings(max_examples=60, deadline=None)
@given(orders(), st.integers(0, 1000))
def test_every_sample_once_an_epoch(order: Order, epoch: int) -> None:
    batches = order.epoch(epoch)
    assert len(batches) == len(order)
    assert all(len(b) == order.batch_size for b in batches[:-1])
    assert sorted(np.concatenate(batches)) == list(range(order.n))
    again = order.epoch(epoch)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


@settings(max_examples=60, deadline=None)
@given(orders(), st.sampled_from([1, 2, 4, 8]))
def test_ranks_share_the_same_batches(order: Order, world: int) -> None:
    for batch in order.epoch(0):
        shares = [rank_slice(batch, rank, world) for rank in range(world)]
        assert np.array_equal(np.concatenate(shares), batch)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@settings(max_examples=60, deadline=None)
@given(orders(), st.integers(0, 50))
def test_open_blocks_are_bounded_by_the_window(order: Order, epoch: int) -> None:
    uses = order.block[epoch_order(order.block, order.seed, epoch, order.window)]
    first = {b: i for i, b in reversed(list(enumerate(uses)))}
    last = {b: i for i, b in enumerate(uses)}
    open_at = max(sum(first[b] <= i <= last[b] for b in first) for i in range(len(uses)))
    # window + 1 in the middle, half a window more at each end of the epoch; where there are few blocks the ends meet.
    assert open_at <= 2 * order.window + 1


@settings(max_examples=30, deadline=None)
@given(orders())
def test_batches_stand_by_block(order: Order) -> None:
    for batch in order.epoch(3):
        assert np.all(np.diff(order.block[batch]) >= 0)


def test_sequential_covers_and_ignores_the_seed() -> None:
    block = np.array([2, 0, 1, 0, 2, 1, 1])
    a, b = Order(block, 3, seed=1).sequential(), Order(block, 3, seed=2).sequential()
    assert [x.tolist() for x in a] == [x.tolist() for x in b] == [[1, 3, 2], [5, 6, 0], [4]]


def test_epochs_and_seeds_differ() -> None:
    block = np.repeat(np.arange(10), 20)
    seen = {tuple(epoch_order(block, seed, epoch, 4)) for seed in range(3) for epoch in range(3)}
    assert len(seen) == 9


def test_one_window_is_a_uniform_permutation() -> None:
    """Each of the 24 orders of four samples in two blocks comes equally often (chi-square, 23 degrees of freedom)."""
    block = np.array([0, 0, 1, 1])
    orders = [tuple(epoch_order(block, 7, epoch, 4)) for epoch in range(4800)]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 60


def test_the_order_is_pinned() -> None:
    """Resuming a run under another NumPy must give the same order: these numbers never change."""
    block = np.repeat(np.arange(6), 3)
    assert epoch_order(block, 5, 2, 2).tolist() == [14, 1, 13, 0, 2, 3, 12, 5, 4, 17, 15, 16, 10, 6, 7, 9, 8, 11]


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"window": 0}, {"seed": -1}])
def test_wrong_options_are_named(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Order(**{"block": np.zeros(3, np.int64), "batch_size": 2, **wrong})  # type: ignore[arg-type]


@given(orders(), st.integers(0, 3), st.randoms())
def test_grouping_by_length_keeps_every_sample_once(order: Order, epoch: int, random) -> None:
    lengths = np.asarray([random.randint(1, 50) for _ in range(order.n)], np.int64)
    grouped = Order(order.block, order.batch_size, order.seed, order.window, lengths)
    batches = grouped.epoch(epoch)
    assert len(batches) == len(grouped)
    assert sorted(np.concatenate(batches).tolist()) == list(range(order.n))
    assert all(len(b) == order.batch_size for b in batches[:-1])
    assert sorted(np.concatenate(grouped.sequential()).tolist()) == list(range(order.n))
    assert [b.tolist() for b in grouped.epoch(epoch)] == [b.tolist() for b in batches]


def test_grouping_by_length_loses_the_padding() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, 4096)
    plain = Order(np.zeros(4096, np.int64), 32, 0, 4)
    grouped = Order(np.zeros(4096, np.int64), 32, 0, 4, lengths)

    def padded(order: Order) -> int:
        return sum(len(b) * int(lengths[b].max()) for b in order.epoch(0))

    assert padded(grouped) < 1.06 * lengths.sum() < 1.7 * lengths.sum() < padded(plain)


def test_an_order_takes_little_beside_what_it_gives() -> None:
    order = Order(np.random.default_rng(0).integers(0, 50, 1_000_000), 64)
    batches, peak = most_memory(lambda: order.epoch(0))
    assert len(batches) == len(order) and peak < 30 * order.n  # 8 of them given; 40 with a copy for each step
