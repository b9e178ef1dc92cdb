"""Every family of the tests and every tuner that works on it, known without making a checkpoint."""

from __future__ import annotations

from pipeline.extract.backbones.base import Backbone
from pipeline.extract.backbones.bert import Bert
from pipeline.extract.backbones.clip_text import ClipText
from pipeline.extract.backbones.convnext import ConvNeXt
from pipeline.extract.backbones.decoder import Decoder
from pipeline.extract.backbones.resnet import ResNet
from pipeline.extract.backbones.swin import Swin
from pipeline.extract.backbones.t5 import T5
from pipeline.extract.backbones.vit import Vit
from pipeline.train.tuners import tuner_names

TEXT: dict[str, type[Backbone]] = {"t5": T5, "bert": Bert, "roberta": Bert, "clip_text": ClipText, "decoder": Decoder}
IMAGES: dict[str, type[Backbone]] = {
    "vit": Vit, "vit_hf": Vit, "clip": Vit, "resnet": ResNet, "resnext": ResNet, "resnet_hf": ResNet, "cifar": ResNet,
    "swin": Swin, "convnext": ConvNeXt, "swin_hf": Swin, "dinov2": Vit, "dinov3": Vit, "dinov3_timm": Vit,
}  # fmt: skip

# What goes through the long suites: each family, each library and each kind of block once.
SUITE = {**TEXT, **{name: IMAGES[name] for name in ("vit", "clip", "resnext", "cifar", "swin")}}


def pairs(families: dict[str, type[Backbone]]) -> list[tuple[str, str]]:
    """(family, tuner) for every tuner registered now."""
    return [(name, tuner) for name, cls in families.items() for tuner in tuner_names(cls)]
