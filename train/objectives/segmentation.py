"""A class for each pixel: UPerNet, FCN or a linear head on feature maps, mean intersection over union of a data set.

The loss is the mean cross entropy of the pixels that have a class, at the resolution of the view that the backbone saw;
a score is of the image's own pixels. Images of one extent go through the head together, others apart, so that no image
is padded to its neighbour's size: a prediction never depends on what it is batched with.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.extract.batch import Batch
from pipeline.extract.geometry import META, Geometry
from pipeline.extract.tasks.masks import VOID, read_mask
from pipeline.store.errors import Notice, UserError
from pipeline.train.features import Feature, Features, Want
from pipeline.train.fit.finite import refuse_nan
from pipeline.train.maps import Group, groups, maps
from pipeline.train.necks import WIDTH, neck_for
from pipeline.train.objective_configs import SegmentationConfig
from pipeline.train.objectives.base import (
    Answers,
    Head,
    Objective,
    Outputs,
    Report,
    Scorer,
    Vocabulary,
    register_objective,
)
from pipeline.train.objectives.maskheads import auxiliary_head, map_head

USUAL = ("miou", "pixel_accuracy")


class MaskHead(Head):
    """Logits of the classes on the finest map, brought to pixels by bilinear interpolation."""

    training_only = ("auxiliary",)

    def __init__(self, features: Mapping[str, Feature], classes: int, config: SegmentationConfig) -> None:
        super().__init__()
        self.features, self.classes, self.share = dict(features), classes, config.auxiliary
        widths = [f.width for f in sorted(features.values(), key=lambda f: f.stride)]
        # One map is enough for the other heads.
        self.neck = neck_for(features, min(WIDTH, config.width)) if config.head == "upernet" else None
        if self.neck is not None:
            widths = [min(WIDTH, config.width)] * len(self.neck.levels)
        self.main = map_head(widths, classes, config)
        self.auxiliary = auxiliary_head(widths, classes, config) if config.auxiliary else None

    def read(self, features: Features, group: Group, batch: Batch) -> list[Tensor]:
        """The maps of a group's images, finest first."""
        found = maps(self.features, features, group, batch)
        return found if self.neck is None else self.neck(found)

    def losses(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        assert batch.targets is not None
        masks, total = split_masks(batch.targets["mask"], batch), float(max(1.0, self.weight(batch)))
        heads = {"pixel": (self.main, 1.0)}
        if self.auxiliary is not None and self.training:
            heads["auxiliary"] = (self.auxiliary, self.share)
        found: dict[str, list[Tensor]] = {name: [] for name in heads}
        for group in groups(batch):
            read = self.read(features, group, batch)
            truth = torch.stack([padded(masks[place], group.extent) for place in group.places]).long()
            for name, (head, _) in heads.items():
                logits = F.interpolate(head(read).float(), group.extent, mode="bilinear", align_corners=False)
                found[name].append(F.cross_entropy(logits, truth, ignore_index=VOID, reduction="sum"))
        return {name: heads[name][1] * torch.stack(terms).sum() / total for name, terms in found.items()}

    def weight(self, batch: Batch) -> float:
        """Pixels that have a class, not samples."""
        assert batch.targets is not None
        return float((batch.targets["mask"] != VOID).sum())

    def images(self, features: Features, batch: Batch) -> Iterator[tuple[int, Tensor]]:
        """(place in the batch, class of each pixel as scored, (height, width) uint8), one image at a time: logits at
        full resolution are large."""
        for group in groups(batch):
            logits = refuse_nan(self.main(self.read(features, group, batch)).float())
            for place, geometry, own in zip(group.places, group.geometries, logits, strict=True):
                yield place, own_pixels(own, group, geometry).argmax(0).to(torch.uint8)

    def predict(self, features: Features, batch: Batch) -> Outputs:
        found = {place: mask.cpu() for place, mask in self.images(features, batch)}
        return {"mask": [found[place] for place in range(len(batch))]}

    def measure(self, features: Features, batch: Batch) -> Outputs:
        """`confusion` (classes, classes) int64: pixels of each class (row) taken for each (column)."""
        assert batch.targets is not None
        masks, total = split_masks(batch.targets["own"], batch, own=True), None
        for place, told in self.images(features, batch):
            truth, n = masks[place], self.classes
            known = truth != VOID
            pairs = n * truth[known].long() + told[known].long()
            counts = torch.bincount(pairs, minlength=n * n).view(n, n)
            total = counts if total is None else total + counts
        return {"confusion": total}


def scored_size(geometry: Geometry) -> tuple[int, int]:
    """(height, width) at which a view is told and scored: the image's where all of it is seen, else the view's."""
    return geometry.size if geometry.whole else geometry.seen


def split_masks(packed: Tensor, batch: Batch, own: bool = False) -> list[Tensor]:
    """Packed masks (pixels,) of a batch's images → each (height, width), at the view's resolution or, `own`, as
    scored."""
    sizes = [scored_size(g) if own else g.seen for g in map(Geometry.of, batch.metas)]
    return [part.view(size) for part, size in zip(packed.split([h * w for h, w in sizes]), sizes, strict=True)]


def padded(mask: Tensor, extent: tuple[int, int]) -> Tensor:
    """A view's mask with void where the backbone sees padding."""
    return F.pad(mask, (0, extent[1] - mask.shape[1], 0, extent[0] - mask.shape[0]), value=VOID)


def own_pixels(logits: Tensor, group: Group, geometry: Geometry) -> Tensor:
    """(classes, h, w) of a map → (classes, height, width) as scored."""
    full = F.interpolate(logits[None], group.extent, mode="bilinear", align_corners=False)
    full = full[..., : geometry.seen[0], : geometry.seen[1]]
    if not geometry.whole:
        return full[0]
    full = full.flip(-1) if geometry.flip else full
    if geometry.seen != geometry.size:
        full = F.interpolate(full, geometry.size, mode="bilinear", align_corners=False)
    return full[0]


class MaskScorer(Scorer):
    """Mean over classes of intersection over union, as torchmetrics' JaccardIndex has it: over the pixels of the data
    set, without those that have no class, without classes that are neither there nor told; and the share of pixels that
    are right: those of `names`, the first of which selects the best epoch. NaN where no pixel has a class. Keeps one
    matrix."""

    def __init__(self, classes: int, names: Sequence[str] = USUAL) -> None:
        self.counts, self.names = np.zeros((classes, classes), np.int64), tuple(names)

    @property
    def first(self) -> str:
        return self.names[0]

    def update(self, out: Outputs, batch: Batch) -> None:
        self.counts += out["confusion"].numpy()

    def merge(self, other: MaskScorer) -> None:
        self.counts += other.counts

    def compute(self) -> dict[str, float]:
        right = np.diag(self.counts)
        union = self.counts.sum(0) + self.counts.sum(1) - right
        there = union > 0
        if not there.any():
            warnings.warn("the figures of masks are undefined: no pixel of these has a class", Notice, stacklevel=2)
            return dict.fromkeys(self.names, math.nan)
        mean = float((right[there] / union[there]).mean())
        figures = {"miou": mean, "pixel_accuracy": float(right.sum() / self.counts.sum())}
        return {name: figures[name] for name in self.names}


class MaskReport(MaskScorer, Report):
    """Intersection over union of each class, the shares of what is told and of what is there that are right (precision,
    recall), and its pixels; a share of nothing is None. Then their means over the classes that are there or told, and
    the confusion matrix in pixels."""

    def __init__(self, labels: Sequence[str]) -> None:
        super().__init__(len(labels))
        self.labels = tuple(labels)

    def compute(self) -> dict[str, Any]:
        right, there, told = self.counts.diagonal(), self.counts.sum(1), self.counts.sum(0)
        columns = {"iou": there + told - right, "precision": told, "recall": there}
        rows: list[dict[str, Any]] = []
        for i, name in enumerate(self.labels):
            shares = {k: float(right[i] / of[i]) if of[i] else None for k, of in columns.items()}
            rows.append({"name": name, **shares, "pixels": int(there[i])})
        means: dict[str, float | None] = {}
        for column in columns:
            known = [row[column] for row in rows if row[column] is not None]
            means[column] = float(np.mean(known)) if known else None
        rows.append({"name": "mean", **means, "pixels": int(there.sum())})
        return {"rows": rows, "labels": list(self.labels), "confusion": self.counts.tolist()}


@register_objective("segmentation", SegmentationConfig)
class Segmentation(Objective):
    """Targets are masks, PNG files whose numbers are those that the task gives its classes; others are no class.
    Metas say where the view shows what."""

    description = "a class for each pixel: UPerNet or FCN on feature maps"
    figures = USUAL
    targets = ("mask",)
    wants = Want(kinds=("map",))
    files = True
    writes = ("{}.png", "overlays/{}.jpg")
    counts = "pixels"
    counted = True

    def __init__(self, config: SegmentationConfig, answers: Answers) -> None:
        super().__init__(config, answers)
        numbers = [int(n) for n in answers.values] or range(len(answers.labels))  # of the classes in masks
        kept = {n: name for n, name in zip(numbers, answers.labels, strict=True) if n != config.ignore_index}
        self.numbers, self.names = np.array(list(kept), np.uint8), tuple(kept.values())
        if len(self.numbers) < 2:
            raise UserError(f"ignore-index: without class {config.ignore_index} less than two classes are left")
        self.index = np.full(256, VOID, np.uint8)
        self.index[self.numbers] = np.arange(len(self.numbers), dtype=np.uint8)

    def encode(self, target: bytes, meta: Mapping[str, Any]) -> dict[str, Any]:
        """`mask`: (pixels,) uint8, classes of the view's pixels, `VOID` for none; `own`: of the pixels that are scored,
        the same array where they are the same pixels."""
        geometry = Geometry.of(meta)
        values = read_mask(target, "a mask of the task table")
        if values.shape != geometry.size:
            mask, image = ("x".join(map(str, size)) for size in (values.shape, geometry.size))
            raise UserError(f"a mask of the task table has {mask} pixels, its image {image}: extract again")
        own = self.index[values]
        view = geometry.mask(own, VOID)
        return {"mask": view.reshape(-1), "own": (own if geometry.whole else view).reshape(-1)}

    def collate(self, items: Sequence[Mapping[str, Any]], batch: Batch) -> dict[str, Tensor]:
        """`mask` and `own`, packed; their sizes follow from the metas."""
        if not items:
            return {}
        mask = torch.from_numpy(np.concatenate([item["mask"] for item in items]))
        if all(np.shares_memory(item["mask"], item["own"]) for item in items):
            return {"mask": mask, "own": mask}
        return {"mask": mask, "own": torch.from_numpy(np.concatenate([item["own"] for item in items]))}

    def made_up(self, batch: Batch) -> dict[str, Tensor]:
        """Masks of the first class, over all that the backbone sees."""
        extents = [picture.extent for picture in batch.pictures or ()]
        batch.metas = [{META: Geometry(extent, extent, extent).to_meta()} for extent in extents]
        mask = torch.zeros(sum(tall * wide for tall, wide in extents), dtype=torch.uint8, device=batch.device)
        return {"mask": mask, "own": mask}

    def head(self, features: Mapping[str, Feature], vocabulary: Vocabulary) -> MaskHead:
        return MaskHead(features, len(self.numbers), self.config)

    def scorer(self) -> MaskScorer:
        return MaskScorer(len(self.numbers), self.metrics)

    def report(self) -> MaskReport:
        return MaskReport(self.names)

    def entries(self, out: Outputs) -> list[dict[str, Any]]:
        """`mask` (height, width) uint8 in the task's own numbers, and the share of pixels of each class."""
        told = []
        for mask in out["mask"]:
            counts = np.bincount(mask.numpy().reshape(-1), minlength=len(self.numbers)) / max(1, mask.numel())
            named = {name: round(float(c), 6) for name, c in zip(self.names, counts, strict=True) if c}
            told.append({"mask": self.numbers[mask.numpy()], "shares": named})
        return told

    def save(self, entry: Mapping[str, Any], image: Path, folder: Path, name: str) -> dict[str, Any]:
        from pipeline.train.objectives.overlays import save_mask

        files = save_mask(entry["mask"], int(self.numbers.max()) + 1, image, folder, name)
        return {**files, "shares": entry["shares"]}
