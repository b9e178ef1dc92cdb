"""`Targets`: a split's targets, encoded for a batch when it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from extract.backbones.batch import Batch
from store.errors import UserError
from train.objectives.base import Objective


class Targets:
    """`targets(index, batch)` → what `objective` makes of the targets of the samples `index` (B,), by name.

    `values`: the raw target of each of n samples. `metas`: what extraction knows of each beside it. Raises UserError
    naming the first sample without a target.
    """

    def __init__(
        self, objective: Objective, values: Sequence[Any], metas: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        self.objective, self.values, self.metas = objective, values, metas
        missing = [i for i, value in enumerate(values) if value is None]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(values)} samples have no target, the first is row {missing[0]}: drop or "
                "label them"
            )

    def __len__(self) -> int:
        return len(self.values)

    def __call__(self, index: np.ndarray, batch: Batch) -> dict[str, Tensor]:
        items = [self.objective.encode(self.values[i], self.metas[i] if self.metas else {}) for i in index.tolist()]
        return self.objective.collate(items, batch)
