"""`Towers`: a tuner a slot, where a task has several backbones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from pipeline.extract.backbones.videos import frames_of
from pipeline.extract.batch import Batch
from pipeline.store.errors import UserError
from pipeline.train.features import Features
from pipeline.train.tuners.base import Tuner


class Towers(Tuner):
    """The tuners `parts`, slot → tuner, side by side. The features of each are called `<slot>/<name>`, and are rows of
    the distinct samples of its slot in the batch (see `Batch.of`); of slots that the batch has not there are none. A
    tuner gets the frames of videos as images. `tail`: all their tails.

    Raises UserError for a tuner that works on the weights of the head, which is of all slots.
    """

    def __init__(self, parts: Mapping[str, Tuner]) -> None:
        nn.Module.__init__(self)  # of no single backbone
        for slot, tuner in parts.items():
            if reason := tuner.needs_one_head(tuner.config):
                raise UserError(f"slot {slot}: {reason}")
        # With a prefix, for a slot may be called as a method is.
        self.parts = nn.ModuleDict({f"of_{slot}": tuner for slot, tuner in parts.items()})
        # Of images, the maps that a frame has: one a stream.
        images = {slot for slot, tuner in parts.items() if tuner.backbone.modality == "image"}
        self.maps = {slot: len(tuner.backbone.streams) if slot in images else 0 for slot, tuner in parts.items()}
        self.features = {
            f"{slot}/{name}": replace(
                feature, stream=f"{slot}/{feature.stream}" if feature.stream else "", maps=self.maps[slot]
            )
            for slot, tuner in parts.items()
            for name, feature in tuner.features.items()
        }
        object.__setattr__(self, "tail", nn.ModuleDict({f"of_{slot}": tuner.tail for slot, tuner in parts.items()}))

    def each(self) -> dict[str, Tuner]:
        """Slot → its tuner."""
        return {name.removeprefix("of_"): tuner for name, tuner in self.parts.items()}  # type: ignore[misc]

    def forward(self, batch: Batch) -> Features:
        here = {slot: tuner for slot, tuner in self.each().items() if slot in batch.ids}
        found: Features = {}
        for slot, tuner in here.items():
            part = batch.of(slot)
            frames = frames_of(part, self.maps[slot])
            found |= {f"{slot}/{k}": rows for k, rows in tuner(part if frames is None else frames.batch).items()}
        return found

    def remark(self) -> str:
        return "; ".join(f"{slot}: {said}" for slot, tuner in self.each().items() if (said := tuner.remark()))

    def default_lr(self) -> float:
        """The smallest that a tuner asks for."""
        return min(tuner.default_lr() for tuner in self.each().values())
