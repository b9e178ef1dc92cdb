"""Backbones: one file a family. Import a family's module here to register it."""

from pipeline.extract.backbones import bert, clip_text, convnext, decoder, efficientnet, resnet, swin, t5, vit
from pipeline.extract.backbones.base import Backbone, TextOptions
from pipeline.extract.backbones.registry import backbone_classes, backbone_for, register_backbone
from pipeline.extract.backbones.tail import Tail
from pipeline.extract.batch import Batch, Layout, stream_of
from pipeline.extract.inputs import Inputs

__all__ = [
    "Backbone",
    "Batch",
    "Inputs",
    "Layout",
    "Tail",
    "TextOptions",
    "backbone_classes",
    "backbone_for",
    "bert",
    "clip_text",
    "convnext",
    "decoder",
    "efficientnet",
    "register_backbone",
    "resnet",
    "stream_of",
    "swin",
    "t5",
    "vit",
]
