"""Numbers that are not numbers: no step, no prediction and no score is made of them."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.store.errors import UserError


class NotFinite(UserError):
    """A loss, a gradient or a prediction became NaN or infinite; all ranks stop together."""

    everywhere = True


def refuse_nan(scores: Tensor) -> Tensor:
    """`scores` (rows, …) of classes, tokens or values as they are. Raises NotFinite where one is NaN: its `argmax`
    would be a class like any other."""
    bad = torch.isnan(scores).flatten(1).any(1) if scores.ndim > 1 else torch.isnan(scores)
    if count := int(bad.sum()):
        raise NotFinite(
            f"the model's output is NaN in {count:,} of {len(scores):,} rows of a batch, so there is no prediction: "
            "its weights have diverged; train again with a smaller lr, or in float32"
        )
    return scores
