"""Heads from feature maps to boxes: RetinaNet, Faster and Mask R-CNN. They see maps of one image at a time and no
pixels, so a loss or a prediction does not depend on what an image is batched with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import sigmoid_focal_loss
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from pipeline.extract.geometry import Geometry
from pipeline.train.box_configs import DetectionConfig
from pipeline.train.objectives.boxparts import (
    COARSE,
    MASK_POOLED,
    OCTAVES,
    POOLED,
    RATIOS,
    Anchors,
    BoxPredictor,
    Levels,
    MaskPredictor,
    Neck,
    Pool,
    ProposalHead,
    image_list,
    mask_head,
)
from pipeline.train.objectives.cascade import CascadeHeads


class OneStage(nn.Module):
    """RetinaNet (Lin et al. 2017): on maps of stride 8 and coarser, and two levels of its own; nine anchors a position,
    the smallest four times the stride wide; focal loss, smooth L1 replaced by L1 as in the library."""

    def __init__(self, levels: Levels, classes: int, config: DetectionConfig) -> None:
        super().__init__()
        self.read = [i for i, (_, stride) in enumerate(levels) if stride > COARSE] or [len(levels) - 1]
        kept, width = [levels[i][0] for i in self.read], config.width
        strides = [levels[i][1] for i in self.read]
        strides += [2 * strides[-1], 4 * strides[-1]]
        anchors = Anchors([tuple(4 * s * o for o in OCTAVES) for s in strides], strides)
        self.net = RetinaNet(
            Neck(kept, width, LastLevelP6P7(width, width)), classes, anchor_generator=anchors,
            head=RetinaNetHead(width, len(RATIOS) * len(OCTAVES), classes), score_thresh=config.score_threshold,
            nms_thresh=config.nms, detections_per_img=config.detections,
        )  # fmt: skip

    def _raw(self, maps: Sequence[Tensor], geometry: Geometry) -> tuple[list[Tensor], dict[str, Tensor], list[Tensor]]:
        levels = list(self.net.backbone([maps[i] for i in self.read]).values())
        raw = {name: out.float() for name, out in self.net.head(levels).items()}
        return levels, raw, self.net.anchor_generator(image_list(geometry), levels)

    def losses(self, maps: Sequence[Tensor], geometry: Geometry, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of one image; `target`: `boxes` (n, 4), `labels` (n,) from 0."""
        _, raw, anchors = self._raw(maps, geometry)
        found = self.net.compute_loss([dict(target)], raw, anchors)
        return {"class": found["classification"], "box": found["bbox_regression"]}

    def outlined(self, maps: Sequence[Tensor], geometry: Geometry) -> Tensor:
        """What `losses` computes, of no targets."""
        raw = self.net.head(list(self.net.backbone([maps[i] for i in self.read]).values()))
        scores = raw["cls_logits"].float()
        return sigmoid_focal_loss(scores, torch.zeros_like(scores), reduction="sum") + raw["bbox_regression"].sum()

    def told(self, maps: Sequence[Tensor], geometry: Geometry) -> dict[str, Tensor]:
        """`boxes`, `scores` and `labels` of one image, best first."""
        levels, raw, anchors = self._raw(maps, geometry)
        each = len(RATIOS) * len(OCTAVES)
        counts = [each * m.shape[-2] * m.shape[-1] for m in levels]
        split = {name: list(out.split(counts, 1)) for name, out in raw.items()}
        (found,) = self.net.postprocess_detections(split, [list(a.split(counts)) for a in anchors], [geometry.seen])
        return dict(found)


class TwoStage(nn.Module):
    """A region proposal network on all maps and a coarser one, and heads on what is pooled of its proposals."""

    def __init__(self, levels: Levels, classes: int, config: DetectionConfig, masks: bool) -> None:
        super().__init__()
        strides, width = [stride for _, stride in levels], config.width
        self.neck = Neck([w for w, _ in levels], width, LastLevelMaxPool())
        own = [*strides, 2 * strides[-1]]
        self.rpn = RegionProposalNetwork(
            Anchors([(8.0 * s,) for s in own], own), ProposalHead(width, len(RATIOS)), 0.7, 0.3, 256, 0.5,
            {"training": 2000, "testing": 1000}, {"training": 2000, "testing": 1000}, 0.7,
        )  # fmt: skip
        names = [str(i) for i in range(len(levels))]
        pools = Pool(names, strides, POOLED), Pool(names, strides, MASK_POOLED) if masks else None
        if "cascade" in config.chosen:
            self.heads: RoIHeads = CascadeHeads(*pools, classes, config)
        else:
            self.heads = plain_heads(*pools, classes, config)

    def losses(self, maps: Sequence[Tensor], geometry: Geometry, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of one image; `target`: `boxes` (n, 4), `labels` (n,) from 0, of instances `masks` (n, height, width)."""
        targets = [{**target, "labels": target["labels"] + 1}]  # 0 is the background
        levels = self.neck(maps)
        proposals, found = self.rpn(image_list(geometry), levels, targets)
        _, more = self.heads(levels, [in_place(p) for p in proposals], [geometry.seen], targets)
        return {name.removeprefix("loss_"): term for name, term in {**found, **more}.items()}

    def outlined(self, maps: Sequence[Tensor], geometry: Geometry) -> Tensor:
        """What `losses` computes with as many proposals, and among them objects, as it draws at most; all lie on the
        finest map, for which map it is that is pooled changes no product."""
        levels, heads = self.neck(maps), self.heads
        logits, deltas = self.rpn.head(list(levels.values()))
        terms = [t.sum() for t in (*logits, *deltas)]
        drawn = heads.fg_bg_sampler.batch_size_per_image
        objects = int(drawn * heads.fg_bg_sampler.positive_fraction)
        for head, predictor in zip(stages(heads.box_head), stages(heads.box_predictor), strict=True):
            scores, deltas = predictor(head(heads.box_roi_pool.made_up(levels, drawn)))
            nothing = torch.zeros(drawn, dtype=torch.long, device=scores.device)
            terms += [F.cross_entropy(scores, nothing), deltas.sum()]
        for head, predictor in zip(stages(heads.mask_head), stages(heads.mask_predictor), strict=True):
            chances = predictor(head(heads.mask_roi_pool.made_up(levels, objects)))[:, 0]
            terms.append(F.binary_cross_entropy_with_logits(chances, torch.zeros_like(chances)))
        return torch.stack(terms).sum()

    def told(self, maps: Sequence[Tensor], geometry: Geometry) -> dict[str, Tensor]:
        """`boxes`, `scores` and `labels` of one image, best first, and of instances `masks` (n, 1, m, m), the chance of
        each position of a box to be the object's."""
        levels = self.neck(maps)
        proposals, _ = self.rpn(image_list(geometry), levels)
        (found,), _ = self.heads(levels, proposals, [geometry.seen])
        return {**found, "labels": found["labels"] - 1}


def stages(heads: nn.Module | None) -> list[Any]:
    """The heads of a cascade, the one of any other form, none where there is no such branch."""
    return [] if heads is None else list(heads) if isinstance(heads, nn.ModuleList) else [heads]


def in_place(boxes: Tensor) -> Tensor:
    """Boxes ordered by where they lie. Which of them a step draws then does not hang on the last digit of a score,
    which a live backbone and a stored state may differ in."""
    for column in (3, 2, 1, 0):
        boxes = boxes[torch.argsort(boxes[:, column], stable=True)]
    return boxes


def plain_heads(box_pool: Pool, mask_pool: Pool | None, classes: int, config: DetectionConfig) -> RoIHeads:
    """Those of Faster R-CNN, or Mask R-CNN where masks are pooled too: torchvision's."""
    width = config.width
    branch: dict[str, Any] = {}
    if mask_pool is not None:
        branch = {"mask_roi_pool": mask_pool, "mask_head": mask_head(width),
                  "mask_predictor": MaskPredictor(width, width, classes + 1)}  # fmt: skip
    return RoIHeads(
        box_pool, TwoMLPHead(width * POOLED**2, 4 * width), BoxPredictor(4 * width, classes + 1),
        0.5, 0.5, config.proposals or 512, 0.25, None, config.score_threshold, config.nms, config.detections, **branch,
    )  # fmt: skip
