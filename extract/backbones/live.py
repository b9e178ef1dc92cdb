"""`LiveBackbone`: a backbone's frozen model on a device, loaded when first used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline.extract.backbones.base import Backbone
from pipeline.extract.batch import Batch
from pipeline.extract.inputs import Inputs
from pipeline.extract.projection import Projection


@dataclass
class LiveBackbone:
    """A backbone ready to run. `load` is called once, at the first use of `model`."""

    backbone: Backbone
    load: Callable[[], Any]
    device: torch.device
    _model: Any = None

    @property
    def model(self) -> Any:
        if self._model is None:
            self._model = self.load()
        return self._model

    def projected(self, projection: Projection) -> LiveBackbone:
        """The same one, handing out the states of a feature space with `projection`. What is loaded is shared."""
        return replace(self, backbone=self.backbone.projected(projection))

    def states(self, inputs: Inputs, states: Sequence[str], dtype: torch.dtype | None = None) -> Batch:
        """Run `inputs` and collect `states`, projected as the feature space is, in `dtype` if given; no
        labels."""
        return self.filled(inputs.batch(self.device), states, dtype)

    def filled(self, batch: Batch, states: Sequence[str], dtype: torch.dtype | None = None) -> Batch:
        """`batch`, which has its columns, with `states`, as `states` gives them."""
        with torch.no_grad():
            rows = self.backbone.run(self.model, batch, states)
            if self.backbone.projection is not None:
                rows = self.backbone.projection.apply(rows)
        batch.states = {k: rows[k] if dtype is None else rows[k].to(dtype) for k in states}
        return batch
