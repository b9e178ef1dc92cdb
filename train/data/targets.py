"""`Targets`: what is known of a split's samples beside their states, put into a batch when it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.extract.batch import Batch, moved
from pipeline.store.errors import UserError
from pipeline.train.objectives.base import Objective


class Targets:
    """Targets and metas of n samples. `values`: the raw target of each, or None where the split has none. `metas`: what
    extraction knows of each (word boundaries and the like), or None where no objective needs it.

    Raises UserError naming the first sample without a target where others have one.
    """

    def __init__(
        self,
        objective: Objective,
        values: Sequence[Any] | None,
        metas: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.objective, self.values, self.metas = objective, values, metas
        needed = values is not None and not objective.unlabelled
        missing = [i for i, value in enumerate(values or ()) if value is None] if needed else []
        if values is not None and missing:
            raise UserError(
                f"{len(missing)} of {len(values)} samples have no target, the first is row {missing[0]}: drop or "
                "label them"
            )

    def __len__(self) -> int:
        known = self.values if self.values is not None else self.metas
        return len(known) if known is not None else 0

    def fill(self, batch: Batch, index: np.ndarray, device: torch.device | str, pin: bool = False) -> None:
        """Give `batch`, which holds the samples `index` (B,), their metas and what the objective makes of their
        targets, on `device`, page-locked with `pin`."""
        metas = [self.metas[i] if self.metas is not None else {} for i in index.tolist()]
        batch.metas = metas
        if self.values is None:
            return
        items = [self.objective.encode(self.values[i], meta) for i, meta in zip(index.tolist(), metas, strict=True)]
        found = moved(self.objective.collate(items, batch), device)
        batch.targets = {k: v.pin_memory() for k, v in found.items()} if pin else found
