"""Samples of like length together: nothing but the padding changes."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.extract.batch import Batch
from pipeline.extract.kernels import bylength
from pipeline.extract.kernels.bylength import Parts, by_length, groups


def batch_of(lengths: list[int], width: int = 3) -> tuple[Batch, torch.Tensor]:
    rows = sum(lengths)
    short = np.full(len(lengths), 2)
    columns = {"encoder.ids": torch.arange(rows), "decoder.ids": torch.arange(2 * len(lengths))}
    batch = Batch({}, columns, {"encoder": np.array(lengths), "decoder": short})
    return batch, torch.randn(rows, width, dtype=torch.float64)


def mixing(rows: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Every row sees its own sample alone, as attention under a mask does, and its id."""
    layout = batch.layout("encoder")
    grid = layout.pad(rows)
    scores = (grid @ grid.transpose(1, 2)).masked_fill(~layout.mask[:, None, :], -torch.inf)
    return layout.unpad(scores.softmax(-1).nan_to_num() @ grid) + batch.columns["encoder.ids"][:, None]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=40).filter(any))
def test_parts_give_the_rows_and_gradients_of_the_whole(lengths: list[int]) -> None:
    batch, rows = batch_of(lengths)
    one, other = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    whole, parts = mixing(one, batch), by_length(batch, "encoder", other, mixing)
    torch.testing.assert_close(parts, whole)
    towards = torch.randn_like(rows)
    (whole * towards).sum().backward()
    (parts * towards).sum().backward()
    torch.testing.assert_close(other.grad, one.grad)


@given(st.lists(st.integers(0, 512), min_size=1, max_size=130).filter(any))
def test_each_sample_is_in_one_part_and_padding_is_saved(lengths: list[int]) -> None:
    numbers = np.array(lengths)
    parts = groups(numbers)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
    assert len(parts) == 1 or min(map(len, parts)) >= bylength.SAMPLES
    grid = sum(len(p) * numbers[p].max() for p in parts)
    assert grid <= (1 if len(parts) == 1 else 1 - bylength.SAVED) * len(lengths) * numbers.max()


def test_a_batch_is_cut_once_and_not_where_it_does_not_pay() -> None:
    batch, _ = batch_of([3, 90, 5, 88, 4, 91, 3, 80])
    parts = batch.derive("parts by encoder", lambda b: Parts.of(b, "encoder"))
    assert parts is not None and [sorted(b.lengths["encoder"]) for b in parts.batches] == [
        [3, 3, 4, 5],
        [80, 88, 90, 91],
    ]
    assert batch.derive("parts by encoder", lambda b: Parts.of(b, "encoder")) is parts
    assert Parts.of(batch, "decoder") is None  # all of one length
    assert Parts.of(batch_of([9] * 64)[0], "encoder") is None
    assert Parts.of(batch_of([1, 2, 90])[0], "encoder") is None  # too few
