"""Pruning of vision transformers and of CLIP's text tower to the general side blocks, which are theirs too."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pipeline.extract.backbones.clip_text import ClipText
from pipeline.extract.backbones.vit import Vit
from pipeline.train.sideblocks.base import pruned
from pipeline.train.sideblocks.pruning import prune_vit


@pruned.register
def _(backbone: Vit, model: Any, importance: dict[str, Tensor], reduction: int, aligned: bool) -> dict[str, Tensor]:
    prefix = next(n for n, m in model.named_modules() if m is backbone.blocks(model))
    final = next(n for n, m in model.named_modules() if m is backbone.last_norm(model))
    own = dict(model.named_parameters())
    return prune_vit(own, importance, prefix, final, backbone.heads, reduction, aligned)


@pruned.register
def _(
    backbone: ClipText, model: Any, importance: dict[str, Tensor], reduction: int, aligned: bool
) -> dict[str, Tensor]:
    own = dict(model.named_parameters())
    return prune_vit(own, importance, "encoder.layers", "final_layer_norm", backbone.heads, reduction, aligned)
