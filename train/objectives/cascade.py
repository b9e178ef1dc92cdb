"""Cascade R-CNN (Cai and Vasconcelos 2018), with a mask branch a stage (their 2019 paper): three heads, each trained on
the boxes of the one before at a stricter overlap.

    stage      1                2                3
    IoU        0.5              0.6              0.7
    deltas     10, 10, 5, 5     20, 20, 10, 10   30, 30, 15, 15      what they are multiplied by
    loss       1                0.5              0.25

In test the boxes go through all stages and a box's score is the mean of the three (each on its own boxes, of the class
that it takes for the likeliest), a mask's chance the mean of the three branches.

`box_head` conv is Swin's configuration: four convolutions with batch norm and a layer (torchvision's
FastRCNNConvFCHead), deltas for each class, 10 × GIoU of the decoded boxes. fc is the paper's: two layers, one box for
all classes, smooth L1. Box losses are sums over the positives divided by all that was sampled.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import box_iou, clip_boxes_to_image, generalized_box_iou_loss

from pipeline.train.box_configs import DetectionConfig
from pipeline.train.objectives.boxparts import POOLED, MaskPredictor, Pool, mask_head
from pipeline.train.objectives.maskheads import SteadyNorm

OVERLAPS = (0.5, 0.6, 0.7)
DELTAS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
SHARES = (1.0, 0.5, 0.25)
GIOU = 10.0


class Predictor(nn.Module):
    """(n, width) → scores (n, classes + 1), the background first, and deltas (n, classes + 1, 4). `each`: deltas for
    each class, else the same for all."""

    def __init__(self, width: int, classes: int, each: bool) -> None:
        super().__init__()
        self.classes = classes
        self.cls_score = nn.Linear(width, classes + 1)
        self.bbox_pred = nn.Linear(width, 4 * (classes + 1) if each else 4)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        deltas = self.bbox_pred(x).float().view(len(x), -1, 4)
        return self.cls_score(x).float(), deltas.expand(len(x), self.classes + 1, 4)


class CascadeHeads(RoIHeads):
    """Three of each head, in place of one; images one at a time."""

    def __init__(self, box_pool: Pool, mask_pool: Pool | None, classes: int, config: DetectionConfig) -> None:
        width, stages = config.width, range(len(OVERLAPS))
        self.conv = (config.box_head or "conv") == "conv"
        boxes = nn.ModuleList(box_head(width, self.conv) for _ in stages)
        predictors = nn.ModuleList(Predictor(4 * width, classes, self.conv) for _ in stages)
        masks = mask_predictors = None
        if mask_pool is not None:
            masks = nn.ModuleList(mask_head(width) for _ in stages)
            mask_predictors = nn.ModuleList(MaskPredictor(width, width, classes + 1) for _ in stages)
        super().__init__(
            box_pool, boxes, predictors, 0.5, 0.5, config.proposals or 512, 0.25, DELTAS[-1], config.score_threshold,
            config.nms, config.detections, mask_pool, masks, mask_predictors,
        )  # fmt: skip
        self.coders = [BoxCoder(weights) for weights in DELTAS]
        self.matchers = [Matcher(overlap, overlap, allow_low_quality_matches=False) for overlap in OVERLAPS]
        self.sampler = BalancedPositiveNegativeSampler(config.proposals or 512, 0.25)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        (boxes,) = proposals
        if self.training:
            assert targets is not None
            return [], self._learn(features, boxes, image_shapes, targets[0])
        return [self._tell(features, boxes, image_shapes)], {}

    def _read(self, stage: int, features: dict[str, Tensor], boxes: Tensor, shapes: list[tuple[int, int]]) -> tuple[
        Tensor, Tensor
    ]:  # fmt: skip
        pooled = self.box_roi_pool(features, [boxes], shapes)
        scores, deltas = self.box_predictor[stage](self.box_head[stage](pooled))
        return scores, deltas

    def _learn(
        self, features: dict[str, Tensor], boxes: Tensor, shapes: list[tuple[int, int]], target: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for stage, share in enumerate(SHARES):
            count = len(boxes)
            boxes = torch.cat([boxes, target["boxes"].to(boxes)])
            matched, labels = self._match(stage, boxes, target)
            drawn = self._draw(labels)
            boxes, matched, labels = boxes[drawn], matched[drawn], labels[drawn]
            if not len(boxes):  # an image without objects, and no proposal in it
                break
            scores, deltas = self._read(stage, features, boxes, shapes)
            losses[f"loss_class{stage + 1}"] = share * F.cross_entropy(scores, labels)
            losses[f"loss_box{stage + 1}"] = share * self._box_loss(stage, deltas, boxes, matched, labels, target)
            if self.mask_roi_pool is not None:
                losses[f"loss_mask{stage + 1}"] = share * self._mask_loss(
                    stage, features, boxes, matched, labels, shapes, target
                )
            likeliest = scores[:, 1:].argmax(1) + 1  # of a background box, which deltas move it
            moved = self._moved(stage, deltas, boxes, torch.where(labels > 0, labels, likeliest), shapes)
            boxes = moved[drawn < count]  # true boxes are added anew
        return losses

    def _match(self, stage: int, boxes: Tensor, target: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Which true box each of `boxes` (n, 4) overlaps most, and its class, 0 where none enough."""
        if not len(target["boxes"]):
            nothing = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
            return nothing, nothing
        matched = self.matchers[stage](box_iou(target["boxes"].to(boxes), boxes))
        labels = target["labels"][matched.clamp(min=0)]
        return matched.clamp(min=0), torch.where(matched < 0, 0, labels)

    def _draw(self, labels: Tensor) -> Tensor:
        (positive,), (negative,) = self.sampler([labels])
        return torch.where((positive | negative).bool())[0]

    def _box_loss(
        self, stage: int, deltas: Tensor, boxes: Tensor, matched: Tensor, labels: Tensor, target: Mapping[str, Tensor]
    ) -> Tensor:
        own = torch.where(labels > 0)[0]
        if not len(own):
            return deltas.sum() * 0
        told, true, start = deltas[own, labels[own]], target["boxes"].to(boxes)[matched[own]], boxes[own]
        if self.conv:
            decoded = self.coders[stage].decode_single(told, start)
            return GIOU * generalized_box_iou_loss(decoded, true, reduction="sum") / len(boxes)
        wanted = self.coders[stage].encode_single(true, start)
        return F.smooth_l1_loss(told, wanted, reduction="sum") / len(boxes)

    def _mask_loss(
        self,
        stage: int,
        features: dict[str, Tensor],
        boxes: Tensor,
        matched: Tensor,
        labels: Tensor,
        shapes: list[tuple[int, int]],
        target: Mapping[str, Tensor],
    ) -> Tensor:
        own = torch.where(labels > 0)[0]
        logits = self._mask_logits(stage, features, boxes[own], shapes)
        loss: Tensor = maskrcnn_loss(logits, [boxes[own]], [target["masks"]], [target["labels"]], [matched[own]])
        return loss

    def _mask_logits(
        self, stage: int, features: dict[str, Tensor], boxes: Tensor, shapes: list[tuple[int, int]]
    ) -> Tensor:
        assert self.mask_roi_pool is not None
        pooled = self.mask_roi_pool(features, [boxes], shapes)
        logits: Tensor = self.mask_predictor[stage](self.mask_head[stage](pooled))
        return logits

    def _moved(
        self, stage: int, deltas: Tensor, boxes: Tensor, labels: Tensor, shapes: list[tuple[int, int]]
    ) -> Tensor:
        """`boxes` by the deltas of their classes, cut at the image's edge; nothing is learned through them."""
        at = torch.arange(len(boxes), device=boxes.device)
        return clip_boxes_to_image(self.coders[stage].decode_single(deltas.detach()[at, labels], boxes), shapes[0])

    def _tell(self, features: dict[str, Tensor], boxes: Tensor, shapes: list[tuple[int, int]]) -> dict[str, Tensor]:
        chances, last = [], len(SHARES) - 1
        for stage in range(len(SHARES)):
            scores, deltas = self._read(stage, features, boxes, shapes)
            chances.append(scores.softmax(1))
            if stage < last:
                boxes = self._moved(stage, deltas, boxes, scores[:, 1:].argmax(1) + 1, shapes)
        mean = torch.stack(chances).mean(0)
        found = self.postprocess_detections(mean.log(), deltas.flatten(1), [boxes], shapes)
        own = dict(zip(("boxes", "scores", "labels"), (part[0] for part in found), strict=True))
        if self.mask_roi_pool is not None:
            logits = [self._mask_logits(stage, features, own["boxes"], shapes) for stage in range(len(SHARES))]
            own["masks"] = torch.stack([maskrcnn_inference(x, [own["labels"]])[0] for x in logits]).mean(0)
        return own


def box_head(width: int, conv: bool) -> nn.Module:
    """(n, width, 7, 7) → (n, 4 width)."""
    if conv:
        return FastRCNNConvFCHead((width, POOLED, POOLED), [width] * 4, [4 * width], norm_layer=SteadyNorm)
    return TwoMLPHead(width * POOLED**2, 4 * width)
