"""The text tower of CLIP (transformers). One stream `encoder`; causal, pre-norm; a position sees those before it.

The tail is the embeddings, the last block and the final norm. The pooled token of CLIP is a sample's last one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel

from pipeline.extract.backbones.base import (
    Backbone,
    SideStack,
    Tail,
    TextOptions,
    attention_mask,
    collect,
    freeze,
    load_frozen,
    register,
)
from pipeline.extract.backbones.batch import Batch, Layout
from pipeline.extract.backbones.inputs import Inputs, ragged
from pipeline.extract.backbones.pruning import prune_vit
from pipeline.extract.backbones.text import tokenize, word_metas
from pipeline.extract.backbones.vision import fill, keep
from pipeline.extract.backbones.vit import VitSideStack


def causal_mask(layout: Layout, attention: str, dtype: torch.dtype) -> Tensor:
    """(1, 1, L, L). Padding comes last, so no real position sees it."""
    longest = layout.mask.shape[1]
    allowed = torch.ones(longest, longest, dtype=torch.bool, device=layout.mask.device).tril()
    return attention_mask(allowed[None, None], attention, dtype)


class CausalSideStack(VitSideStack):
    """A ViT's side blocks under a causal mask."""

    def context(self, batch: Batch, stream: str, memory: Tensor | None) -> Tensor:
        longest = batch.layout(stream).mask.shape[1]
        return torch.ones(longest, longest, dtype=torch.bool, device=batch.device).triu(1)

    def block(self, index: int, grid: Tensor, context: Tensor) -> Tensor:
        return self.blocks[index](grid, src_mask=context)


class ClipTextTail(Tail):
    """See the module's docstring."""

    def __init__(self, embeddings: nn.Module, block: nn.Module, norm: nn.Module, attention: str) -> None:
        super().__init__()
        self.embeddings, self.block, self.norm, self.attention = embeddings, block, norm, attention
        freeze(self)

    def embed(self, batch: Batch, stream: str = "encoder") -> Tensor:
        layout = batch.layout(stream)
        return layout.unpad(self.embeddings(layout.pad(batch.columns["encoder.ids"])))

    @property
    def last(self) -> nn.Module:
        return self.block

    def through(self, block: nn.Module, hidden: dict[str, Tensor], batch: Batch) -> Tensor:
        layout, rows = batch.layout("encoder"), hidden["encoder"]
        out = block(layout.pad(rows), causal_mask(layout, self.attention, rows.dtype))
        return layout.unpad(out[0] if isinstance(out, tuple) else out)

    def final_norm(self, rows: Tensor, stream: str) -> Tensor:
        return self.norm(rows)


@register
class ClipText(Backbone):
    """See the module's docstring."""

    name = "clip-text"
    model_types = ("clip_text_model",)
    description = "the text tower of CLIP (transformers)"
    streams = ("encoder",)

    @property
    def width(self) -> int:
        return self.config.hidden_size

    @property
    def dropout(self) -> float:
        return 0.0

    def depth(self, stream: str) -> int:
        return self.config.num_hidden_layers

    def prepare(
        self,
        tokenizer: Any,
        texts: Sequence[Sequence[str]],
        options: TextOptions,
        candidates: Sequence[Sequence[int]] = (),
        gold: Sequence[int] | None = None,
    ) -> Inputs:
        """Single texts, or pairs joined by the tokenizer's own way."""
        limit = min(options.max_length, self.config.max_position_embeddings)
        first = [t[0] for t in texts]
        second = [t[1] for t in texts] if texts and len(texts[0]) > 1 else None
        encoded, cut = tokenize(tokenizer, first, second, limit, options.truncation_side, options.words)
        metas = word_metas(texts, first, 0, encoded)
        ids, lengths = ragged(encoded["input_ids"])
        return Inputs({"encoder": lengths}, {"encoder.ids": ids}, cut, metas=metas)

    def load(self, folder: Path, dtype: torch.dtype, attention: str, device: torch.device | str) -> nn.Module:
        return load_frozen(CLIPTextModel, folder, dtype, attention, device)

    def run(self, model: Any, batch: Batch, states: Sequence[str]) -> dict[str, Tensor]:
        layout = batch.layout("encoder")
        out: dict[str, Tensor] = {}
        wanted = [int(s.split(".")[1]) for s in states]
        blocks = [(f"encoder.{i}", model.encoder.layers[i]) for i in wanted]
        with collect(blocks, lambda name, x: out.__setitem__(name, layout.unpad(x))):
            grid = model.embeddings(layout.pad(batch.columns["encoder.ids"]))
            mask = causal_mask(layout, model.config._attn_implementation, grid.dtype)
            for block in model.encoder.layers[: max(wanted, default=-1) + 1]:
                found = block(grid, mask)
                grid = found[0] if isinstance(found, tuple) else found
        return out

    def stack(self, model: Any, stream: str) -> Sequence[nn.Module]:
        return list(model.encoder.layers)

    def bare_block(self, attention: str) -> nn.Module:
        with torch.device("meta"):
            model = CLIPTextModel._from_config(copy.deepcopy(self.config), attn_implementation=attention)
        return model.encoder.layers[0].eval()

    def pruned(self, model: Any, importance: dict[str, Tensor], reduction: int, aligned: bool) -> dict[str, Tensor]:
        heads, own = self.config.num_attention_heads, dict(model.named_parameters())
        return prune_vit(own, importance, "encoder.layers", "final_layer_norm", heads, reduction, aligned)

    def finish(self, model: Any, rows: Tensor) -> Tensor:
        return model.final_layer_norm(rows)

    def tail_weights(self, model: Any) -> dict[str, Tensor]:
        return keep(_parts(model))

    def tail(self, weights: dict[str, Tensor] | None, attention: str) -> ClipTextTail:
        with torch.device("meta"):
            model = CLIPTextModel._from_config(copy.deepcopy(self.config), attn_implementation=attention).eval()
        parts = _parts(model)
        fill(parts, weights)
        return ClipTextTail(parts["embeddings"], parts["block"], parts["norm"], attention)

    def norm(self, stream: str) -> nn.Module:
        return nn.LayerNorm(self.width, eps=self.config.layer_norm_eps)

    def side_stack(self, stream: str, layers: Sequence[int], reduction: int) -> SideStack:
        return CausalSideStack(self.width // reduction, self.config.num_attention_heads, len(layers))


def _parts(model: Any) -> dict[str, nn.Module]:
    return {"embeddings": model.embeddings, "block": model.encoder.layers[-1], "norm": model.final_layer_norm}
