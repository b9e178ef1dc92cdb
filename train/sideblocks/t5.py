"""Side blocks of T5."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5Stack

from pipeline.extract.backbones.masks import key_mask
from pipeline.extract.backbones.t5 import T5, decoder_config, decoder_context, run_decoder_block
from pipeline.extract.batch import Batch
from pipeline.extract.kernels.dropout import SIDE, Dropout, use_fast_dropout
from pipeline.train.sideblocks.base import SideStack, pruned, side_stack
from pipeline.train.sideblocks.pruning import prune_t5


class T5SideStack(SideStack):
    """T5 blocks with d_model, d_ff and d_kv over r and the number of heads unchanged; the first owns the relative
    position bias, a T5 norm ends the stack (LST §3.2).

    First weights are those of the released code, whose library initialises each missing module alone: a Linear is
    N(0, 0.01²), not what T5 gives it by its place, and the bias table N(0, 1), which is torch's own."""

    def __init__(self, config: Any, stream: str, layers: Sequence[int], reduction: int) -> None:
        super().__init__()
        side = decoder_config(config, SIDE) if stream == "decoder" else _encoder_config(config, SIDE)
        side.d_model, side.d_ff, side.d_kv = (n // reduction for n in (config.d_model, config.d_ff, config.d_kv))
        side.num_layers = len(layers)
        side.vocab_size = 1  # the stack's own embedding is thrown away below
        stack = T5Stack(side)
        self.width, self.config, self.stream = side.d_model, side, stream
        self.blocks, self.norm = use_fast_dropout(stack.block), stack.final_layer_norm
        self.dropout = Dropout(config.dropout_rate)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.01 if isinstance(module, nn.Linear) else 1.0)

    blocks: Any

    @property
    def _attention(self) -> Any:
        first: Any = self.blocks[0]
        return first.layer[0].SelfAttention

    def context(self, batch: Batch, stream: str, memory: Tensor | None) -> Any:
        table, layout = self._attention.relative_attention_bias, batch.layout(stream)
        if self.stream == "decoder":
            assert memory is not None
            context = decoder_context(batch, table, self.config, SIDE, torch.float32)
            return context, batch.layout("encoder").pad(memory)
        longest = layout.mask.shape[1]
        return key_mask(layout, SIDE, torch.float32), self._attention.compute_bias(longest, longest)

    def block(self, index: int, grid: Tensor, context: Any) -> Tensor:
        if self.stream == "decoder":
            return run_decoder_block(self.blocks[index], grid, context[1], context[0])
        return self.blocks[index](grid, context[0], context[1])[0]

    def final(self, rows: Tensor) -> Tensor:
        return self.dropout(self.norm(rows))


def _encoder_config(config: Any, attention: str) -> Any:
    out = copy.deepcopy(config)
    out.is_decoder, out.use_cache, out._attn_implementation = False, False, attention
    return out


@side_stack.register
def _(backbone: T5, stream: str, layers: Sequence[int], reduction: int) -> SideStack:
    return T5SideStack(backbone.config, stream, layers, reduction)


@pruned.register
def _(backbone: T5, model: Any, importance: dict[str, Tensor], reduction: int, aligned: bool) -> dict[str, Tensor]:
    return prune_t5(backbone.config, dict(model.named_parameters()), importance, reduction, aligned)
