"""Options of the objectives that find objects; without torch, as `train.configs`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.extract.options import option
from pipeline.train.configs import ObjectiveConfig

WIDTH = 256  # channels of the published heads
_READS = "What reads the maps. Default: retinanet of detection, mask-rcnn of instances, upernet of segmentation."


@dataclass(frozen=True)
class DetectionConfig(ObjectiveConfig):
    """`head`: "retinanet" (Lin et al. 2017), "faster-rcnn" (Ren et al. 2015, with Lin et al.'s pyramid) or
    "cascade-rcnn" (Cai and Vasconcelos 2018). `head_width`: channels of the pyramid and of all that reads it; layers
    of the box heads have four times as many. `box_head`: of the cascade, "conv" (four convolutions and one layer, a box
    a class, GIoU on decoded boxes: Swin's configuration) or "fc" (two layers, one box for all classes, smooth L1:
    the paper's). `proposals`: of an image that a training step samples, 512 as published. `score_threshold`, `nms`,
    `detections`: what is told."""

    head: str | None = option(
        None,
        _READS,
        choices=("retinanet", "faster-rcnn", "cascade-rcnn"),
    )
    head_width: int | None = option(None, "Channels of the head. Default: 256; 512 of upernet.", least=1)
    box_head: str | None = option(
        None,
        "Of a cascade: conv, four convolutions and a layer, GIoU on decoded boxes, as in Swin's configuration; fc, two "
        "layers and smooth L1, as in its paper. Default: conv.",
        choices=("conv", "fc"),
    )
    proposals: int | None = option(None, "Proposals of an image that a training step samples. Default: 512.", least=1)
    score_threshold: float = option(0.05, "Score from which an object is told.", least=0, below=1)
    nms: float = option(
        0.5, "Overlap (IoU) above which the weaker of two boxes of a class is dropped.", above=0, most=1
    )
    detections: int = option(100, "Objects that are told of an image, at most.", least=1)

    usual: ClassVar[str] = "retinanet"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chosen == "retinanet" and self.proposals is not None:
            raise ValueError("proposals: retinanet has anchors alone and samples none")
        if "cascade" not in self.chosen and self.box_head is not None:
            raise ValueError(f"box_head: a cascade has the choice, {self.chosen} has none")

    @property
    def chosen(self) -> str:
        """The head."""
        return self.head or self.usual

    @property
    def width(self) -> int:
        """Channels of the head."""
        return self.head_width or WIDTH


@dataclass(frozen=True)
class InstancesConfig(DetectionConfig):
    """`head`: "mask-rcnn" (He et al. 2017), or "cascade-mask-rcnn", which has a mask branch a stage."""

    head: str | None = option(
        None,
        _READS,
        choices=("mask-rcnn", "cascade-mask-rcnn"),
    )

    usual: ClassVar[str] = "mask-rcnn"
