"""`train.data.buffers`: memory is used again when nothing holds it, and never before."""

from __future__ import annotations

import gc
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.train.data.buffers import SMALL, Buffers

ROWS = SMALL // 4 // 8  # of width 8 in float32: the fewest that come from a buffer


def test_what_is_dropped_is_used_again() -> None:
    buffers = Buffers(2)
    first = buffers.empty(ROWS, 8, torch.float32)
    place = first.data_ptr()
    del first
    assert buffers.empty(ROWS, 8, torch.float32).data_ptr() == place


def test_views_arrays_and_graphs_hold_memory() -> None:
    buffers = Buffers(8)
    weight = torch.ones(8, 1, requires_grad=True)
    holders = [
        buffers.empty(ROWS, 8, torch.float32)[3:5],
        buffers.empty(ROWS, 8, torch.float32).numpy()[2],
        buffers.empty(ROWS, 8, torch.float32) @ weight,
        buffers.empty(ROWS, 8, torch.bfloat16).view(torch.int16),
    ]
    gc.collect()
    fresh = [buffers.empty(ROWS, 8, torch.float32) for _ in range(3)]
    for tensor in fresh:
        tensor.fill_(1.0)
    assert len({t.data_ptr() for t in fresh} | {holders[0].untyped_storage().data_ptr()}) == 4
    holders[2].sum().backward()  # reads the batch that the graph has saved


def test_a_tensor_stores_no_more_than_its_own_bytes() -> None:
    buffers = Buffers(1)
    del_me = buffers.empty(4 * ROWS, 8, torch.float32)
    del del_me
    assert buffers.empty(ROWS, 8, torch.float32).untyped_storage().nbytes() == ROWS * 8 * 4


def test_beyond_the_most_memory_is_new() -> None:
    buffers = Buffers(1)
    held = [buffers.empty(ROWS, 8, torch.float32) for _ in range(3)]
    assert len({t.data_ptr() for t in held}) == 3
    assert Buffers(0).empty(ROWS, 8, torch.float32).shape == (ROWS, 8)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3 * ROWS), st.integers(0, 3)), max_size=30), st.integers(0, 5))
def test_nothing_that_is_held_is_overwritten(steps: list[tuple[int, int]], most: int) -> None:
    buffers, held = Buffers(most), []
    for number, (rows, dropped) in enumerate(steps):
        tensor = buffers.empty(rows, 8, torch.float32)
        tensor.fill_(number)
        held.append((number, tensor))
        del tensor
        held = held[dropped:] if dropped < len(held) else held[-1:]
        for number_of, kept in held:
            assert (kept == number_of).all()


def test_no_count_of_references_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    # From Python 3.14 on a local name may count for nothing, which made a tensor in use look like none.
    monkeypatch.setattr(sys, "getrefcount", lambda thing: 2)
    buffers = Buffers(4)
    held = buffers.empty(ROWS, 8, torch.float32).fill_(1.0)
    buffers.empty(ROWS, 8, torch.float32).fill_(2.0)
    assert (held == 1.0).all()
