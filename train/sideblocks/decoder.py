"""Side blocks of decoder-only language models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.extract.backbones.decoder import Decoder, attentions_of, cache_of
from pipeline.extract.backbones.loading import freeze
from pipeline.extract.backbones.shell import Given, Shell, narrow
from pipeline.extract.batch import Batch
from pipeline.train.sideblocks.base import SideStack, side_stack


class DecoderSideStack(SideStack):
    """The backbone's own layers at 1 / r of its width, see `narrow`, and a norm of its kind; drawn as the library draws
    them. They stand under the library's masks, those of sliding windows too."""

    def __init__(self, config: Any, layers: Sequence[int], reduction: int) -> None:
        super().__init__()
        self.width = config.hidden_size // reduction
        self.shell = Shell(narrow(config, layers, reduction, attentions_of(config)[0]), drawn=True)
        self.blocks, self.norm, _ = self.shell.parts()
        freeze(self.shell)  # it is run for its masks alone

    def context(self, batch: Batch, stream: str, memory: Tensor | None) -> list[Given]:
        mask = batch.layout(stream).mask
        grid = torch.zeros(*mask.shape, self.width, device=mask.device)
        return self.shell.given(grid, cache_of(batch, self, self.shell))

    def block(self, index: int, grid: Tensor, context: list[Given]) -> Tensor:
        args, kwargs = context[index]
        out: Tensor = self.blocks[index](grid, *args, **kwargs)
        return out

    def final(self, rows: Tensor) -> Tensor:
        normed: Tensor = self.norm(rows)
        return normed


@side_stack.register
def _(backbone: Decoder, stream: str, layers: Sequence[int], reduction: int) -> SideStack:
    return DecoderSideStack(backbone.config, layers, reduction)
