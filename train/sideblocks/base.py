"""Side blocks: what a ladder trains beside each kept layer of a frozen backbone, at a fraction of its width.

`side_stack(backbone, stream, layers, reduction)` gives those of a backbone's own kind where somebody wrote them, else
transformer blocks that fit any backbone with sequences. Own ones are a function under `@side_stack.register`, whose
first argument's type says for which backbones, those derived from it too; `pruned` is extended in the same way.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.extract.backbones.base import Backbone
from pipeline.extract.backbones.masks import earlier, tree
from pipeline.extract.batch import Batch
from pipeline.store.errors import UserError


class SideStack(nn.Module, ABC):
    """Trainable blocks at a fraction of the backbone's width, one for each kept layer (LST §3)."""

    width: int

    @abstractmethod
    def context(self, batch: Batch, stream: str, memory: Tensor | None) -> Any:
        """Masks and position biases, made once a forward pass. `memory`: (rows, width) of the stream before."""

    @abstractmethod
    def block(self, index: int, grid: Tensor, context: Any) -> Tensor:
        """Block number `index` of the kept ones on a padded grid (B, L, width)."""

    @abstractmethod
    def final(self, rows: Tensor) -> Tensor:
        """The norm after the last block."""

    def begin(self, weights: dict[str, Tensor], layers: Sequence[int]) -> None:
        """Start from pruned blocks of the backbone, of which side block k is number `layers[k]`. `weights`: of one
        stream, see `pruned`. What is shared by all blocks is looked for in block 0; a norm that the backbone does not
        have stays fresh."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                kind, _, rest = name.partition(".")
                if kind != "blocks":
                    if name in weights:
                        parameter.copy_(weights[name])
                    continue
                number, _, rest = rest.partition(".")
                own = f"{layers[int(number)]}.{rest}"
                parameter.copy_(weights[own if own in weights else f"0.{rest}"])


class TransformerStack(SideStack):
    """Pre-norm transformer blocks of width D / r, MLP four times that, as many heads of the backbone as divide it; a
    final LayerNorm. A position sees what it sees in the backbone: those on its path where a stream is a tree, those
    before it where the stream is `causal`, else all of its sample. They read no other stream: the states that the
    ladder adds have seen it."""

    def __init__(self, width: int, heads: int, blocks: int, causal: bool = False) -> None:
        super().__init__()
        self.width, self.heads, self.causal = width, math.gcd(width, heads), causal
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, self.heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def context(self, batch: Batch, stream: str, memory: Tensor | None) -> dict[str, Tensor]:
        if batch.past is not None:  # they keep no keys and values of what came before
            raise UserError("side blocks of the general kind cannot write text a token at a time; choose another tuner")
        if f"{stream}.parent" in batch.columns:
            return {"src_mask": ~tree(batch, stream)[0].repeat_interleave(self.heads, 0)}
        layout = batch.layout(stream)
        return {"src_mask": ~earlier(layout)} if self.causal else {"src_key_padding_mask": ~layout.mask}

    def block(self, index: int, grid: Tensor, context: dict[str, Tensor]) -> Tensor:
        return self.blocks[index](grid, **context)

    def final(self, rows: Tensor) -> Tensor:
        return self.norm(rows)


@singledispatch
def side_stack(backbone: Backbone, stream: str, layers: Sequence[int], reduction: int) -> SideStack:
    """Fresh side blocks for the kept `layers` of `stream`, of width D / `reduction`."""
    return TransformerStack(backbone.width // reduction, backbone.heads, len(layers), stream in backbone.causal)


@singledispatch
def pruned(
    backbone: Backbone, model: Any, importance: dict[str, Tensor], reduction: int, aligned: bool
) -> dict[str, Tensor]:
    """Every block of a loaded `model` cut to the shapes of `side_stack`, `<stream>.<block>.<name>` → tensor (LST §3.3).

    `importance`: parameter name → non-negative tensor of its shape. See `train.sideblocks.pruning`."""
    raise UserError(f"init: {backbone.name} backbones have no pruning yet; use random")


def prunable(backbone: Backbone) -> bool:
    """Whether `pruned` knows the backbone's blocks."""
    return pruned.dispatch(type(backbone)) is not pruned.dispatch(object)
