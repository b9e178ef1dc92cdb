"""`Backbone`: a family's frozen module on a device, loaded when first used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.extract.backbones.base import Family
from pipeline.extract.backbones.batch import Batch
from pipeline.extract.backbones.inputs import Inputs


@dataclass
class Backbone:
    """A backbone ready to run. `load` is called once, at the first use of `model`."""

    family: Family
    load: Callable[[], Any]
    device: torch.device
    _model: Any = None

    @property
    def model(self) -> Any:
        if self._model is None:
            self._model = self.load()
        return self._model

    def states(self, inputs: Inputs, states: Sequence[str], dtype: torch.dtype | None = None) -> Batch:
        """Run `inputs` and collect `states`, projected as the family's feature space is, in `dtype` if given; no
        labels."""
        return self.filled(inputs.batch(self.device), states, dtype)

    def filled(self, batch: Batch, states: Sequence[str], dtype: torch.dtype | None = None) -> Batch:
        """`batch`, which has its columns, with `states`, as `states` gives them."""
        with torch.no_grad():
            rows = self.family.run(self.model, batch, states)
            if self.family.projection is not None:
                rows = self.family.projection.apply(rows)
        batch.states = {k: rows[k] if dtype is None else rows[k].to(dtype) for k in states}
        return batch
