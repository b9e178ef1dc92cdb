"""Feature maps out of packed rows, images of one extent together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.extract.batch import Batch
from pipeline.extract.geometry import Geometry
from pipeline.train.features import Feature, Features


@dataclass(frozen=True)
class Group:
    """Images of one extent: their places in the batch, and their geometries."""

    places: list[int]
    geometries: list[Geometry]

    @property
    def extent(self) -> tuple[int, int]:
        return self.geometries[0].extent


def groups(batch: Batch) -> list[Group]:
    """The batch's images by extent, in the order in which extents come first."""

    def make(b: Batch) -> list[Group]:
        found: dict[tuple[int, int], Group] = {}
        for place, meta in enumerate(b.metas):
            geometry = Geometry.of(meta)
            group = found.setdefault(geometry.extent, Group([], []))
            group.places.append(place)
            group.geometries.append(geometry)
        return list(found.values())

    return batch.derive("groups of one extent", make)


def maps(features: Mapping[str, Feature], rows: Features, group: Group, batch: Batch) -> list[Tensor]:
    """The maps of a group's images, each (b, width, height / stride, width / stride), float32, finest first."""
    height, width = group.extent
    out = []
    for name, feature in sorted(features.items(), key=lambda item: item[1].stride):
        tall, wide = height // feature.stride, width // feature.stride
        if len(group.places) == len(batch):
            own = rows[name]
        else:
            parts = rows[name].split(batch.lengths[feature.stream].tolist())
            own = torch.cat([parts[place] for place in group.places])
        own = own.float().view(len(group.places), -1, feature.width)[:, feature.skip :]
        out.append(own.unflatten(1, (tall, wide)).permute(0, 3, 1, 2))
    return out
