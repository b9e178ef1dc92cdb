"""Numbers that are not numbers: no step, no prediction and no score is made of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from pipeline.store.errors import UserError


class NotFinite(UserError):
    """A loss, a gradient or a prediction became NaN or infinite; all ranks stop together."""

    everywhere = True


_COUNTS: ContextVar[list[Tensor] | None] = ContextVar("counts of NaN rows", default=None)


@contextmanager
def counting_nan() -> Iterator[list[Tensor]]:
    """Within it `refuse_nan` does not raise but adds how many rows are NaN: where several models are computed as one
    (`torch.func.vmap`), each has a number of its own."""
    counts: list[Tensor] = []
    token = _COUNTS.set(counts)
    try:
        yield counts
    finally:
        _COUNTS.reset(token)


def nan_told(count: int, rows: int) -> str:
    """What is said of `count` of `rows` outputs that are NaN."""
    return (
        f"the model's output is NaN in {count:,} of {rows:,} rows of a batch, so there is no prediction: "
        "its weights have diverged; train again with a smaller lr, or in float32"
    )


def refuse_nan(scores: Tensor) -> Tensor:
    """`scores` (rows, …) of classes, tokens or values as they are. Raises NotFinite where one is NaN: its `argmax`
    would be a class like any other."""
    bad = torch.isnan(scores).flatten(1).any(1) if scores.ndim > 1 else torch.isnan(scores)
    if (counts := _COUNTS.get()) is not None:
        counts.append(bad.sum())
    elif count := int(bad.sum()):
        raise NotFinite(nan_told(count, len(scores)))
    return scores
