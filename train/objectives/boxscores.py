"""How well objects were found: COCO's average precision by pycocotools, and VOC's.

COCO (Lin et al. 2014): the mean over ten overlaps (IoU) from 0.5 to 0.95 and over classes of the area under the
precision at 101 recalls, at most 100 detections an image; also at 0.5, at 0.75, and of small, medium and large objects
by the area that their files say. VOC (Everingham et al. 2010): at an overlap of 0.5, the area under the precision made
monotonous (`voc_ap50`), or its mean at eleven recalls, as for VOC 2007 (`voc07_ap50`); a second detection of an object
is wrong, one of a difficult object does not count.

What is kept is how the detections of each image matched, not boxes or masks; figures do not depend on batches.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.extract.batch import Batch
from pipeline.extract.outlines import mask_library
from pipeline.store.errors import Notice
from pipeline.train.fit.log import finite
from pipeline.train.objectives.base import Outputs, Report, Scorer

# Where pycocotools puts each in its list of figures.
COCO = {"map": 0, "ap50": 1, "ap75": 2, "map_small": 3, "map_medium": 4, "map_large": 5}
VOC = ("voc07_ap50", "voc_ap50")
BOXES = tuple(f"box_{name}" for name in COCO)
MASKS = tuple(f"mask_{name}" for name in COCO)
_KEPT = ("dtScores", "dtMatches", "dtIgnore", "gtIgnore")


@dataclass
class Objects:
    """Objects of one image. `boxes`: (n, 4) left, top, width, height; `classes`: (n,). Of those found `scores`: (n,);
    of those there `areas`, `crowd` and `difficult`: (n,). `runs`: an outline each as COCO's compressed run lengths, ()
    where there are none."""

    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))
    areas: np.ndarray = field(default_factory=lambda: np.zeros(0))
    crowd: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    difficult: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    runs: Sequence[Mapping[str, Any]] = ()


class ObjectScorer(Scorer):
    """The figures `names` over a split, the first of which selects the best epoch. NaN where nothing is there to be
    found."""

    def __init__(self, classes: int, names: Sequence[str]) -> None:
        self.classes, self.names = classes, tuple(names)
        self.parts = {part: CocoMatches(part, classes) for part in ("box", "mask") if self._wants(part)}
        self.voc = VocMatches(classes) if set(VOC) & set(self.names) else None

    def _wants(self, part: str) -> bool:
        return any(name.startswith(f"{part}_") for name in self.names)

    @property
    def first(self) -> str:
        return self.names[0]

    def update(self, out: Outputs, batch: Batch) -> None:
        there = objects_there(batch)
        for place, true, found in zip(batch.index.tolist(), there, out["objects"], strict=True):
            for part in self.parts.values():
                part.take(place, true, found)
            if self.voc is not None:
                self.voc.take(place, true, found)

    def merge(self, other: ObjectScorer) -> None:
        for name, part in self.parts.items():
            part.images |= other.parts[name].images
        if self.voc is not None and other.voc is not None:
            self.voc.images |= other.voc.images

    def compute(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        for name, part in self.parts.items():
            figures |= {f"{name}_{figure}": value for figure, value in part.compute().items()}
        if self.voc is not None:
            figures |= self.voc.compute()
        if math.isnan(figures[self.first]):
            warnings.warn(f"{self.first} is undefined: none of these images has an object to be found", Notice)
        return {name: figures[name] for name in self.names}


def objects_there(batch: Batch) -> list[Objects]:
    """The objects of each image of a batch, as its targets say."""
    assert batch.targets is not None
    host = {name: value.cpu() for name, value in batch.targets.items() if name.startswith(("truth", "runs"))}
    counts = host["truth_class.n"].tolist()
    columns = {
        name: [part.numpy() for part in host[f"truth_{name}"].split(counts)]
        for name in ("box", "class", "area", "crowd", "difficult")
    }
    runs: list[list[dict[str, Any]]] = [[] for _ in counts]
    if "runs_length" in host:
        text, at = host["runs"].numpy().tobytes(), 0
        sizes = host["truth_size"].view(-1, 2).tolist()
        for image, lengths in enumerate(host["runs_length"].split(counts)):
            for length in lengths.tolist():
                runs[image].append({"size": sizes[image], "counts": text[at : at + length].decode("ascii")})
                at += length
    return [
        Objects(
            columns["box"][i], columns["class"][i], areas=columns["area"][i], crowd=columns["crowd"][i],
            difficult=columns["difficult"][i], runs=runs[i],
        )
        for i in range(len(counts))
    ]  # fmt: skip


class CocoMatches:
    """How detections matched, by image; `part`: "box" or "mask"."""

    def __init__(self, part: str, classes: int) -> None:
        mask_library()  # says so where pycocotools is not installed
        self.kind, self.classes = {"box": "bbox", "mask": "segm"}[part], classes
        self.images: dict[int, list[Any]] = {}

    def take(self, image: int, true: Objects, found: Objects) -> None:
        """What was found in an image, beside what is there."""
        evaluation = self._evaluation([image])
        evaluation.cocoGt, evaluation.cocoDt = (
            _index(self._entries(o, image), image, self.classes) for o in (true, found)
        )
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.evaluate()
        self.images[image] = [e and {k: e[k] for k in _KEPT} for e in evaluation.evalImgs]

    def _entries(self, objects: Objects, image: int) -> list[dict[str, Any]]:
        from pycocotools import mask

        out = []
        for i, (box, kind) in enumerate(zip(objects.boxes.tolist(), objects.classes.tolist(), strict=True)):
            entry: dict[str, Any] = {"id": i + 1, "image_id": image, "category_id": kind, "bbox": box, "iscrowd": 0}
            if self.kind == "segm":
                entry["segmentation"] = objects.runs[i]
            if len(objects.scores):
                area = box[2] * box[3] if self.kind == "bbox" else float(mask.area(objects.runs[i]))
                entry |= {"score": float(objects.scores[i]), "area": area}
            else:
                apart = bool(objects.crowd[i] or objects.difficult[i])
                entry |= {"area": float(objects.areas[i]), "iscrowd": int(apart)}
            out.append(entry)
        return out

    def _evaluation(self, images: Sequence[int]) -> Any:
        from pycocotools.cocoeval import COCOeval

        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(iouType=self.kind)
        evaluation.params.imgIds, evaluation.params.catIds = list(images), list(range(self.classes))
        return evaluation

    def accumulated(self) -> Any:
        """pycocotools' evaluation of all images taken, one at least."""
        images = sorted(self.images)
        evaluation = self._evaluation(images)
        # By class and size, then by image.
        evaluation.evalImgs = [entry for row in zip(*(self.images[i] for i in images), strict=True) for entry in row]
        evaluation._paramsEval = deepcopy(evaluation.params)
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.accumulate()
        return evaluation

    def compute(self) -> dict[str, float]:
        """Figure → value, NaN where nothing is to be found."""
        if not self.images:
            return dict.fromkeys(COCO, math.nan)
        evaluation = self.accumulated()
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.summarize()
        figures = {name: float(evaluation.stats[place]) for name, place in COCO.items()}
        return {name: math.nan if value < 0 else value for name, value in figures.items()}

    def by_class(self) -> dict[str, list[float]]:
        """`map` and `ap50` of each class, whose means over the classes that have an object are the figures; NaN of a
        class without one."""
        # (overlaps, recalls, classes, sizes, most detections), -1 where a class has no object; all sizes stand first.
        precision = self.accumulated().eval["precision"][..., 0, -1]
        each = np.where(precision < 0, math.nan, precision).mean(1)
        return {"map": each.mean(0).tolist(), "ap50": each[0].tolist()}


def _index(entries: Sequence[dict[str, Any]], image: int, classes: int) -> Any:
    """Objects of one image as pycocotools has a data set."""
    from pycocotools.coco import COCO as Coco

    data = Coco()
    size = entries[0].get("segmentation", {}).get("size", (0, 0)) if entries else (0, 0)
    data.dataset = {
        "images": [{"id": image, "height": size[0], "width": size[1]}],
        "annotations": list(entries),
        "categories": [{"id": i} for i in range(classes)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        data.createIndex()
    return data


class VocMatches:
    """Scores and rights of detections, and how many objects there are, by image and class."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.images: dict[int, dict[int, tuple[int, np.ndarray, np.ndarray]]] = {}

    def take(self, image: int, true: Objects, found: Objects) -> None:
        """As the devkit has it: by score, a detection is of the object that it overlaps most."""
        own = self.images[image] = {}
        for kind in {*true.classes.tolist(), *found.classes.tolist()}:
            there, told = true.classes == kind, found.classes == kind
            apart = true.difficult[there] | true.crowd[there]
            scores = found.scores[told]
            order = np.argsort(-scores, kind="stable")
            overlaps = iou(found.boxes[told][order], true.boxes[there])
            right, taken = np.zeros(len(order), np.int8), np.zeros(len(apart), bool)  # -1: does not count
            for i, row in enumerate(overlaps):
                best = int(row.argmax()) if len(row) else -1
                if best >= 0 and row[best] >= 0.5:
                    right[i] = -1 if apart[best] else int(not taken[best])
                    taken[best] = True
            own[kind] = int((~apart).sum()), scores[order], right

    def by_class(self) -> dict[str, list[float]]:
        """Both forms of each class, NaN of one without an object."""
        by_form: dict[str, list[float]] = {name: [] for name in VOC}
        for kind in range(self.classes):
            parts = [self.images[i][kind] for i in sorted(self.images) if kind in self.images[i]]
            total = sum(count for count, _, _ in parts)
            if not total:
                for values in by_form.values():
                    values.append(math.nan)
                continue
            scores, right = (np.concatenate([part[k] for part in parts]) for k in (1, 2))
            right = right[np.argsort(-scores, kind="stable")]
            hits = (right[right >= 0] == 1).cumsum()
            recall, precision = hits / total, hits / np.arange(1, len(hits) + 1)
            by_form["voc07_ap50"].append(eleven_points(recall, precision))
            by_form["voc_ap50"].append(area_under(recall, precision))
        return by_form

    def compute(self) -> dict[str, float]:
        """The mean over classes that have an object, of both forms."""
        found = {name: [v for v in values if not math.isnan(v)] for name, values in self.by_class().items()}
        return {name: float(np.mean(values)) if values else math.nan for name, values in found.items()}


class ObjectReport(Report):
    """How well the objects of each class were found: how many there are, without crowds and difficult ones, and average
    precision at an overlap of 0.5 and over overlaps as COCO has it, of each of `parts` ("box", "mask"); of a task that
    is scored as VOC's, its `voc` figures. None where a class has no object."""

    def __init__(self, labels: Sequence[str], parts: Sequence[str], voc: Sequence[str] = ()) -> None:
        self.labels, self.voc = tuple(labels), tuple(voc)
        names = [*self.voc, *(f"{part}_{figure}" for part in parts for figure in ("ap50", "map"))]
        self.scorer, self.names = ObjectScorer(len(labels), names), names
        self.counts = np.zeros(len(labels), np.int64)

    def update(self, out: Outputs, batch: Batch) -> None:
        self.scorer.update(out, batch)
        for true in objects_there(batch):
            np.add.at(self.counts, true.classes[~(true.crowd | true.difficult)], 1)

    def compute(self) -> dict[str, Any]:
        each = {} if self.scorer.voc is None else dict(self.scorer.voc.by_class())
        for part, matches in self.scorer.parts.items():
            each |= {f"{part}_{figure}": values for figure, values in matches.by_class().items()}
        rows = [
            {"name": name, "objects": int(self.counts[i]), **{n: finite(each[n][i]) for n in self.names}}
            for i, name in enumerate(self.labels)
        ]
        return {"rows": rows}


def iou(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(n, m) overlaps of boxes (n, 4) and (m, 4), left, top, width, height."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, :2] + one[:, None, 2:], other[None, :, :2] + other[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(-1)
    return common / (one[:, 2:].prod(-1)[:, None] + other[:, 2:].prod(-1)[None] - common)


def eleven_points(recall: np.ndarray, precision: np.ndarray) -> float:
    """The mean over recalls 0, 0.1, …, 1 of the best precision from there on."""
    return float(np.mean([precision[recall >= at].max(initial=0.0) for at in np.linspace(0, 1, 11)]))


def area_under(recall: np.ndarray, precision: np.ndarray) -> float:
    """The area under the precision, which no later point exceeds."""
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * best).sum())
