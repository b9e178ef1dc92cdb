"""Trainable side blocks, one file a kind of backbone; the general ones serve every other (`base`)."""

from pipeline.train.sideblocks import bert, t5, vit
from pipeline.train.sideblocks.base import SideStack, TransformerStack, prunable, pruned, side_stack

__all__ = ["SideStack", "TransformerStack", "bert", "prunable", "pruned", "side_stack", "t5", "vit"]
