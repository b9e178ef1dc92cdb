"""What heads that find boxes are made of, torchvision's parts on feature maps of one image and no pixels.

Coordinates are pixels of the view that the backbone saw. Anchors lie where their map's positions do, also on levels
that the head makes itself; boxes are cut at the edge of what the view shows of its image, not at the padding's.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import initLevelMapper

from pipeline.extract.geometry import Geometry

RATIOS = (0.5, 1.0, 2.0)
OCTAVES = tuple(2 ** (i / 3) for i in range(3))
COARSE = 4 * 2**0.5  # RetinaNet reads strides of about 8 and more
Levels = Sequence[tuple[int, float]]  # width and stride of each map, finest first
POOLED, MASK_POOLED = 7, 14


class Anchors(AnchorGenerator):
    """Anchors at the strides that maps have. The library divides the extent by the map's, which is wrong where a level
    of the head's own rounds up."""

    def __init__(self, sizes: Sequence[tuple[float, ...]], strides: Sequence[float]) -> None:
        super().__init__(tuple(sizes), (RATIOS,) * len(sizes))
        self.strides = list(strides)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        first = feature_maps[0]
        self.set_cell_anchors(first.dtype, first.device)
        steps = [[torch.tensor(s, device=first.device)] * 2 for s in self.strides]
        return [torch.cat(self.grid_anchors([list(m.shape[-2:]) for m in feature_maps], steps))]


class Pool(MultiScaleRoIAlign):
    """RoIAlign (two samples a bin and side) on maps of known strides, which the library would guess from sizes."""

    def __init__(self, names: Sequence[str], strides: Sequence[float], size: int) -> None:
        super().__init__(list(names), size, 2)
        self.scales = [1 / s for s in strides]
        levels = [round(math.log2(s)) for s in strides]
        self.map_levels = initLevelMapper(levels[0], levels[-1], self.canonical_scale, self.canonical_level)

    def made_up(self, maps: Mapping[str, Tensor], count: int) -> Tensor:
        """What `count` boxes on the finest of `maps` are pooled to; on the meta device too."""
        finest = maps[self.featmap_names[0]]
        corners = finest.new_tensor([0.0, 0.0, finest.shape[3], finest.shape[2]]).expand(count, 4)
        return roi_align(finest, [corners], self.output_size, 1.0, self.sampling_ratio)


class Neck(FeaturePyramidNetwork):
    """A feature pyramid over maps, finest first, and one or two levels beyond: dict of maps, float32."""

    def __init__(self, widths: Sequence[int], width: int, extra: nn.Module) -> None:
        super().__init__(list(widths), width, extra)
        self.out_channels = width

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        found = super().forward(OrderedDict((str(i), m) for i, m in enumerate(maps)))
        return {name: m.float() for name, m in found.items()}  # boxes in half precision would be off by pixels


class ProposalHead(RPNHead):
    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [t.float() for t in logits], [t.float() for t in deltas]


class BoxPredictor(FastRCNNPredictor):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, deltas = super().forward(x)
        return scores.float(), deltas.float()


class MaskPredictor(MaskRCNNPredictor):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


def image_list(geometry: Geometry) -> ImageList:
    """An image without pixels, for what reads sizes alone."""
    return ImageList(torch.empty(1, 3, *geometry.extent, device="meta"), [geometry.seen])


def mask_head(width: int) -> nn.Module:
    """Four convolutions."""
    return MaskRCNNHeads(width, (width,) * 4, 1)
