"""Backbones: one file a family. Import a family's module here to register it."""

from pipeline.extract.backbones import bert, clip_text, convnext, efficientnet, resnet, swin, t5, vit
from pipeline.extract.backbones.base import Family, SideStack, Tail, TextOptions, families, family_for, register
from pipeline.extract.backbones.batch import Batch, Layout, stream_of
from pipeline.extract.backbones.inputs import Inputs

__all__ = [
    "Batch",
    "Family",
    "Inputs",
    "Layout",
    "SideStack",
    "Tail",
    "TextOptions",
    "bert",
    "clip_text",
    "convnext",
    "efficientnet",
    "families",
    "family_for",
    "register",
    "resnet",
    "stream_of",
    "swin",
    "t5",
    "vit",
]
