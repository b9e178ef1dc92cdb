"""Cross-attention without padding: the padded one's values, and its own gradients with dropout, too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.extract.batch import Layout
from pipeline.extract.kernels.t5_attention import _Attend

LENGTHS = [3, 1, 7, 4]


@pytest.fixture
def given() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    asked = torch.randn(len(LENGTHS), 5, 6, dtype=torch.float64, requires_grad=True)
    return asked, torch.randn(sum(LENGTHS), 6, dtype=torch.float64, requires_grad=True)


def test_samples_on_their_own_rows_are_the_padded_grid(given: tuple[torch.Tensor, torch.Tensor]) -> None:
    asked, rows = given
    layout = Layout.of(np.array(LENGTHS))
    padded = layout.pad(rows)
    scores = torch.bmm(asked, padded.transpose(1, 2)).masked_fill(~layout.mask[:, None], -torch.inf)
    torch.testing.assert_close(_Attend.apply(asked, rows, LENGTHS, 0.0), torch.bmm(scores.softmax(-1), padded))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradients(given: tuple[torch.Tensor, torch.Tensor], p: float) -> None:
    def seeded(asked: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)  # the same mask in every call
        return _Attend.apply(asked, rows, LENGTHS, p)

    assert torch.autograd.gradcheck(seeded, given)


def test_dropout_falls_on_the_weights(given: tuple[torch.Tensor, torch.Tensor]) -> None:
    asked, rows = (x.detach() for x in given)
    torch.manual_seed(0)
    mean = torch.stack([_Attend.apply(asked, rows, LENGTHS, 0.5) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, _Attend.apply(asked, rows, LENGTHS, 0.0), rtol=0, atol=0.12)
    alone = _Attend.apply(asked, rows, LENGTHS, 0.5)[1]  # of one row the weight is 1: dropped or doubled
    doubled = torch.isclose(alone, 2 * rows[3].expand_as(alone)).all(-1)
    assert (doubled | (alone == 0).all(-1)).all()
