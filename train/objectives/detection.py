"""Objects in images: boxes (detection), and their outlines too (instances).

Targets are in the image's own pixels, metas say what a view shows of it: boxes and masks are carried into the view to
be learned, and what is found is carried back to be told and scored. The loss of a batch is the mean of its images'.
Crowds and difficult objects are not learned, nor is what a view shows less than a pixel of.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pipeline.extract.batch import Batch
from pipeline.extract.geometry import META, Geometry
from pipeline.extract.outlines import compressed, outline_mask
from pipeline.extract.tasks.objects import NUMBERS
from pipeline.store.errors import UserError
from pipeline.train.box_configs import DetectionConfig, InstancesConfig
from pipeline.train.features import Feature, Features, Want
from pipeline.train.fit.finite import refuse_nan
from pipeline.train.maps import groups, maps
from pipeline.train.necks import WIDTH, neck_for
from pipeline.train.objectives.base import Answers, Head, Objective, Outputs, Scorer, Vocabulary, register_objective
from pipeline.train.objectives.boxscores import BOXES, MASKS, VOC, ObjectReport, Objects, ObjectScorer

MADE_UP = 8  # objects an image that a step is counted and timed with; an image of COCO's has 7 on average
SMALLEST = 1.0  # pixels of a view, of the shorter side of a box that is learned


class BoxHead(Head):
    """Boxes, and masks with `masks`, from feature maps; `net` sees one image at a time."""

    def __init__(self, features: Mapping[str, Feature], classes: int, config: DetectionConfig, masks: bool) -> None:
        super().__init__()
        from pipeline.train.objectives import boxheads  # torchvision's models take a while to load

        self.features, self.masks = dict(features), masks
        levels: list[tuple[int, float]] = [
            (f.width, f.stride) for f in sorted(features.values(), key=lambda f: f.stride)
        ]
        width = min(WIDTH, config.width)
        self.neck = neck_for(features, width)
        if self.neck is not None:
            levels = [(width, stride) for stride in self.neck.strides]
        if config.chosen == "retinanet":
            self.net: Any = boxheads.OneStage(levels, classes, config)
        else:
            self.net = boxheads.TwoStage(levels, classes, config, masks)

    def each(self, features: Features, batch: Batch) -> Iterator[tuple[int, list[Tensor], Geometry]]:
        """(place in the batch, its maps, its geometry) of each image."""
        for group in groups(batch):
            read = maps(self.features, features, group, batch)
            read = read if self.neck is None else self.neck(read)
            for i, (place, geometry) in enumerate(zip(group.places, group.geometries, strict=True)):
                # In one memory layout, whichever a live backbone left: sums are then the same to the last digit, and
                # so is what is drawn by them.
                yield place, [m[i : i + 1].contiguous() for m in read], geometry

    def losses(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        assert batch.targets is not None
        boxes, labels = (batch.targets[n].split(batch.targets[f"{n}.n"].tolist()) for n in ("box", "label"))
        masks = batch.targets["mask"].split(batch.targets["mask.n"].tolist()) if self.masks else None
        found: dict[str, list[Tensor]] = {}
        for place, own, geometry in self.each(features, batch):
            target = {"boxes": boxes[place], "labels": labels[place]}
            if masks is not None:
                target["masks"] = masks[place].view(-1, *geometry.seen)
            for name, term in self.net.losses(own, geometry, target).items():
                found.setdefault(name, []).append(term)
        return {name: torch.stack(terms).sum() / len(batch) for name, terms in found.items()}

    def outlined(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        return {str(place): self.net.outlined(own, geometry) for place, own, geometry in self.each(features, batch)}

    def predict(self, features: Features, batch: Batch) -> Outputs:
        """`objects`: those found in each image, best first, in its own pixels (see `told_size`)."""
        found: dict[int, Objects] = {}
        for place, own, geometry in self.each(features, batch):
            told = self.net.told([refuse_nan(m) for m in own], geometry)
            host = {name: refuse_nan(value.detach()).cpu() for name, value in told.items()}
            found[place] = carried_back(host, geometry)
        return {"objects": [found[place] for place in range(len(batch))]}


def told_size(geometry: Geometry) -> tuple[int, int]:
    """(height, width) of the pixels that objects are told and scored in: the image's own where all of it is seen, else
    the view's."""
    return geometry.size if geometry.whole else geometry.seen


def carried_back(found: Mapping[str, Tensor], geometry: Geometry) -> Objects:
    """What was found in a view, in the pixels of `told_size`."""
    corners = found["boxes"].double().numpy()
    corners = geometry.back(corners) if geometry.whole else corners
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    runs: list[dict[str, Any]] = []
    if "masks" in found:
        masks = found["masks"].flip(-1) if geometry.whole and geometry.flip else found["masks"]
        for mask, corner in zip(masks, torch.from_numpy(corners).float(), strict=True):
            runs.append(compressed(pasted(mask, corner, told_size(geometry))))
    return Objects(boxes, found["labels"].numpy(), found["scores"].double().numpy(), runs=runs)


def pasted(chance: Tensor, corners: Tensor, size: tuple[int, int]) -> np.ndarray:
    """The chances (1, m, m) of a box's positions → a mask of an image of `size`, one at a time, for they are large."""
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    whole = paste_masks_in_image(chance[None], corners[None], size)[0, 0]
    found: np.ndarray = (whole >= 0.5).numpy().astype(np.uint8)
    return found


@register_objective("detection", DetectionConfig)
class Detection(Objective):
    """Boxes of objects, also where their outlines are known."""

    description = "boxes of objects: RetinaNet, Faster or Cascade R-CNN on feature maps"
    figures: ClassVar[tuple[str, ...]] = BOXES
    targets: ClassVar[tuple[str, ...]] = ("boxes", "instances")
    wants = Want(kinds=("map",))
    files = True
    writes = ("overlays/{}.jpg",)
    counted = True
    masks = False

    def __init__(self, config: DetectionConfig, answers: Answers) -> None:
        super().__init__(config, answers)
        numbers = answers.values or range(1, len(answers.labels) + 1)
        self.numbers = [int(n) for n in numbers]  # what files know the classes by

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (*self.figures, *VOC)

    @property
    def usual(self) -> tuple[str, ...]:
        return self.answers.metrics or self.figures

    def encode(self, target: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> dict[str, Any]:
        """What is learned, in the view's pixels: `box` (n, 4) float32 corners, `label` (n,), of instances `mask`
        (n · height · width,) of 0 and 1. What is scored (m objects), in those of `told_size`: `truth_box` (m, 4) left,
        top, width, height, `truth_class`, `truth_area`, `truth_crowd`, `truth_difficult` (m,), of instances
        `truth_size` (2,), `runs` (bytes,) and their `runs_length` (m,)."""
        geometry = Geometry.of(meta)
        sides = np.array([[o[n] for n in NUMBERS[:4]] for o in target], np.float64).reshape(-1, 4)
        corners = np.concatenate([sides[:, :2], sides[:, :2] + sides[:, 2:]], 1)
        corners = np.clip(corners, 0, np.array([geometry.size[1], geometry.size[0]] * 2))
        view = geometry.boxes(corners)
        classes, crowd, difficult, areas = (
            np.array([o[name] for o in target], kind)
            for name, kind in (("class", np.int64), ("crowd", bool), ("difficult", bool), ("area", np.float64))
        )
        shown = (view[:, 2:] - view[:, :2]).min(1, initial=np.inf) >= SMALLEST
        learned = shown & ~crowd & ~difficult
        out: dict[str, Any] = {"box": view[learned].astype(np.float32), "label": classes[learned]}
        if self.masks:
            own = [self._mask(o, geometry) for o in target]
            carried = [geometry.mask(mask, 0) for mask in own]
            kept = [mask for mask, keep in zip(carried, learned, strict=True) if keep]
            out["mask"] = np.concatenate([np.zeros(0, np.uint8), *(mask.reshape(-1) for mask in kept)])
            told = own if geometry.whole else [mask for mask, keep in zip(carried, shown, strict=True) if keep]
            runs = [compressed(mask)["counts"].encode() for mask in told]
            out["runs"] = np.frombuffer(b"".join(runs), np.uint8)
            out["runs_length"] = np.array([len(text) for text in runs], np.int64)
            out["truth_size"] = np.array(told_size(geometry), np.int64)
        if not geometry.whole:
            corners, classes, crowd, difficult = view[shown], classes[shown], crowd[shown], difficult[shown]
            areas = (corners[:, 2:] - corners[:, :2]).prod(1)
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
        return out | {
            "truth_box": boxes, "truth_class": classes, "truth_area": areas, "truth_crowd": crowd,
            "truth_difficult": difficult,
        }  # fmt: skip

    def made_up(self, batch: Batch) -> dict[str, Tensor]:
        """`MADE_UP` objects of the first class an image, side by side, each half as tall as it is."""
        extents, device = [picture.extent for picture in batch.pictures or ()], batch.device
        batch.metas = [{META: Geometry(extent, extent, extent).to_meta()} for extent in extents]
        boxes, masks = [], []
        for tall, wide in extents:
            left = [wide * i // MADE_UP for i in range(MADE_UP)]
            boxes += [[x, 0, x + wide // MADE_UP, tall // 2] for x in left]
            if self.masks:
                mask = torch.zeros(MADE_UP, tall, wide, dtype=torch.uint8, device=device)
                masks.append(mask.index_fill_(1, torch.arange(tall // 2, device=device), 1).view(-1))
        count = torch.full((len(extents),), MADE_UP)
        made = {
            "box": torch.tensor(boxes, dtype=torch.float32, device=device).view(-1, 4), "box.n": count,
            "label": torch.zeros(len(boxes), dtype=torch.long, device=device), "label.n": count,
        }  # fmt: skip
        if masks:
            made |= {"mask": torch.cat(masks), "mask.n": torch.tensor([len(mask) for mask in masks])}
        return made

    def _mask(self, found: Mapping[str, Any], geometry: Geometry) -> np.ndarray:
        try:
            return outline_mask(found["outline"], geometry.size)
        except ValueError as error:
            raise UserError(f"an outline of the task table is damaged ({error}): extract again") from None

    def head(self, features: Mapping[str, Feature], vocabulary: Vocabulary) -> BoxHead:
        return BoxHead(features, len(self.answers.labels), self.config, self.masks)

    def scorer(self) -> Scorer:
        return ObjectScorer(len(self.answers.labels), self.metrics)

    def report(self) -> ObjectReport:
        voc = [name for name in self.metrics if name in VOC]
        return ObjectReport(self.answers.labels, ("mask", "box") if self.masks else ("box",), voc)

    def entries(self, out: Outputs) -> list[dict[str, Any]]:
        """`objects` of each image, best first: `label`, `score`, `bbox` (left, top, width, height) in its own pixels,
        `category_id` as the task's files have it, and of instances `segmentation`, COCO's compressed run lengths."""
        return [{"objects": self._told(found)} for found in out["objects"]]

    def _told(self, found: Objects) -> list[dict[str, Any]]:
        told = []
        for i, (box, kind, score) in enumerate(zip(found.boxes, found.classes, found.scores, strict=True)):
            entry = {
                "label": self.answers.labels[kind], "category_id": self.numbers[kind], "score": float(score),
                "bbox": box.tolist(),
            }  # fmt: skip
            told.append({**entry, "segmentation": found.runs[i]} if self.masks else entry)
        return told

    def save(self, entry: Mapping[str, Any], image: Path, folder: Path, name: str) -> dict[str, Any]:
        from pipeline.train.objectives.boxoverlays import save_objects

        return {**save_objects(entry["objects"], self.answers.labels, image, folder, name), **entry}

    def save_all(self, entries: Sequence[Mapping[str, Any]], images: Sequence[str], folder: Path) -> None:
        """COCO's list of results: detections.json, and of instances segmentations.json (which has no boxes, so that
        sizes are those of masks). `image_id` is the number that a file is called by where all are called by numbers of
        their own, as COCO's are, else its name."""
        stems = [Path(image).stem for image in images]
        ids: list[Any] = [int(name) for name in stems] if all(name.isdecimal() for name in stems) else []
        if len(set(ids)) < len(set(images)):
            ids = list(images)
        parts = {"detections.json": ("bbox",), **({"segmentations.json": ("segmentation",)} if self.masks else {})}
        for file, fields in parts.items():
            rows = [
                {"image_id": number, **{k: found[k] for k in ("category_id", *fields, "score")}}
                for number, entry in zip(ids, entries, strict=True)
                for found in entry["objects"]
            ]
            try:
                (folder / file).write_text(json.dumps(rows) + "\n", encoding="utf-8")
            except OSError as error:
                raise UserError(f"--out-dir {folder}: cannot be written: {error.strerror or error}") from None


@register_objective("instances", InstancesConfig)
class Instances(Detection):
    """Boxes and outlines of objects."""

    description = "outlines of objects: Mask R-CNN or Cascade Mask R-CNN on feature maps"
    figures = (*MASKS, *BOXES)
    targets = ("instances",)
    masks = True
