"""The text tower of CLIP (transformers). One stream `encoder`; causal, pre-norm; a position sees those before it.

The tail is the embeddings, the last block and the final norm. The pooled token of CLIP is a sample's last one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from pipeline.extract.backbones.base import Backbone, TextOptions
from pipeline.extract.backbones.capabilities import ClassToken, LateBlocks
from pipeline.extract.backbones.loading import (
    JOINT,
    collect,
    freeze,
    joint_part,
    joint_width,
    load_frozen,
    with_projection,
)
from pipeline.extract.backbones.masks import attention_mask, earlier
from pipeline.extract.backbones.registry import register_backbone
from pipeline.extract.backbones.tail import LiveTail
from pipeline.extract.backbones.text import encoder_inputs
from pipeline.extract.backbones.vision import fill, keep
from pipeline.extract.batch import Batch, Layout
from pipeline.extract.inputs import Inputs


def causal_mask(layout: Layout, attention: str, dtype: torch.dtype) -> Tensor:
    """(1, 1, L, L), see `earlier`."""
    return attention_mask(earlier(layout)[None, None], attention, dtype)


class ClipTextTail(LiveTail):
    """See the module's docstring."""

    def __init__(
        self, embeddings: nn.Module, block: nn.Module, norm: nn.Module, attention: str, joint: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.embeddings, self.block, self.norm, self.attention = embeddings, block, norm, attention
        self.joint = joint
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

    def projected(self, rows: Tensor) -> Tensor:
        return super().projected(rows) if self.joint is None else self.joint(rows)


@register_backbone
class ClipText(LateBlocks, ClassToken, Backbone):
    """See the module's docstring."""

    name = "clip-text"
    model_types = ("clip_text_model",)
    description = "the text tower of CLIP (transformers)"
    streams = ("encoder",)
    causal = ("encoder",)

    @property
    def width(self) -> int:
        return self.config.hidden_size

    def depth(self, stream: str) -> int:
        return self.config.num_hidden_layers

    def embedding(self, stream: str) -> list[str]:
        return []

    def prepare(self, tokenizer: Any, texts: Sequence[Sequence[str]], options: TextOptions) -> Inputs:
        return encoder_inputs(tokenizer, texts, options, self.config.max_position_embeddings)

    def load(self, folder: Path, dtype: torch.dtype, attention: str, device: torch.device | str) -> nn.Module:
        model = load_frozen(transformers.CLIPTextModel, folder, dtype, attention, device)
        return with_projection(model, folder, self.config, "text_projection.weight")

    @property
    def projected_width(self) -> int | None:
        return joint_width(self.config)

    def class_rows(self, batch: Batch) -> Tensor:
        """The end of each text: its largest id, as CLIP4Clip and the first CLIP find it."""
        layout = batch.layout("encoder")
        return layout.first + layout.pad(batch.columns["encoder.ids"], -1).argmax(1)

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
            model = transformers.CLIPTextModel._from_config(copy.deepcopy(self.config), attn_implementation=attention)
        return model.encoder.layers[0].eval()

    def finish(self, model: Any, rows: Tensor) -> Tensor:
        return model.final_layer_norm(rows)

    def tail_weights(self, model: Any) -> dict[str, Tensor]:
        return keep(_parts(model))

    def tail(self, weights: dict[str, Tensor] | None, attention: str) -> ClipTextTail:
        with torch.device("meta"):
            model = transformers.CLIPTextModel._from_config(
                copy.deepcopy(self.config), attn_implementation=attention
            ).eval()
        parts = {**_parts(model), **joint_part(self.config, weights)}
        fill(parts, weights)
        return ClipTextTail(parts["embeddings"], parts["block"], parts["norm"], attention, parts.get(JOINT))

    def norm(self, stream: str) -> nn.Module:
        return nn.LayerNorm(self.width, eps=self.config.layer_norm_eps)


def _parts(model: Any) -> dict[str, nn.Module]:
    own = {"embeddings": model.embeddings, "block": model.encoder.layers[-1], "norm": model.final_layer_norm}
    return {**own, JOINT: model.joint} if hasattr(model, JOINT) else own
