"""Side blocks of BERT-like encoders."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.extract.backbones.bert import Bert, bert_layer
from pipeline.extract.backbones.masks import key_mask
from pipeline.extract.batch import Batch
from pipeline.extract.kernels.dropout import SIDE, use_fast_dropout
from pipeline.train.sideblocks.base import SideStack, pruned, side_stack
from pipeline.train.sideblocks.pruning import prune_bert


class BertSideStack(SideStack):
    """Post-norm encoder blocks of width D / r, intermediate size / r, the backbone's number of heads; a final
    LayerNorm. Initialised as BERT is, N(0, 0.02²)."""

    def __init__(self, config: Any, layers: Sequence[int], reduction: int) -> None:
        super().__init__()
        self.width = config.hidden_size // reduction
        side = copy.deepcopy(config)
        side.hidden_size = self.width
        side.intermediate_size = config.intermediate_size // reduction
        side._attn_implementation = SIDE
        block = bert_layer(config)
        self.blocks = nn.ModuleList(use_fast_dropout(block(side)) for _ in layers)
        self.norm = nn.LayerNorm(self.width, eps=config.layer_norm_eps)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.initializer_range)
                nn.init.zeros_(module.bias)

    def context(self, batch: Batch, stream: str, memory: Tensor | None) -> Tensor:
        return key_mask(batch.layout(stream), SIDE, torch.float32)

    def block(self, index: int, grid: Tensor, context: Tensor) -> Tensor:
        return self.blocks[index](grid, context)

    def final(self, rows: Tensor) -> Tensor:
        return self.norm(rows)


@side_stack.register
def _(backbone: Bert, stream: str, layers: Sequence[int], reduction: int) -> SideStack:
    return BertSideStack(backbone.config, layers, reduction)


@pruned.register
def _(backbone: Bert, model: Any, importance: dict[str, Tensor], reduction: int, aligned: bool) -> dict[str, Tensor]:
    return prune_bert(backbone.config, dict(model.named_parameters()), importance, reduction, aligned)
