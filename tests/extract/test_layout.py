"""Packed rows and the padded grid: each row at its place, gradients back to the rows, nothing kept."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.extract.batch import Layout


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(1, 3), st.floats(-2, 2))
def test_rows_come_back_from_the_grid(lengths: list[int], width: int, value: float) -> None:
    layout = Layout.of(np.array(lengths))
    rows = torch.arange(sum(lengths) * width, dtype=torch.float64).view(-1, width)
    grid = layout.pad(rows, value)
    assert grid.shape == (len(lengths), max(lengths), width)
    start = 0
    for sample, length in enumerate(lengths):
        assert torch.equal(grid[sample, :length], rows[start : start + length])
        assert (grid[sample, length:] == value).all()
        start += length
    assert torch.equal(layout.unpad(grid), rows)


def test_gradients_reach_the_rows() -> None:
    layout = Layout.of(np.array([2, 0, 3]))
    rows = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layout.pad(x, 1.5).square() + layout.pad(x), rows)


def test_padding_keeps_no_row_for_the_backward_pass() -> None:
    layout = Layout.of(np.array([3, 1]))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layout.pad(torch.randn(4, 8, requires_grad=True))
    assert [t.dtype for t in kept] == [torch.int64]
