"""A backbone: DistilBERT, by the small contract alone. It has no live block and needs no side blocks of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DistilBertModel

from pipeline.extract.backbones import Backbone, Batch, Inputs, TextOptions, register_backbone
from pipeline.extract.backbones.loading import collect, load_frozen
from pipeline.extract.backbones.text import encoder_inputs


@register_backbone
class DistilBert(Backbone):
    name = "distilbert"
    model_types = ("distilbert",)
    description = "DistilBERT, an encoder of texts"
    streams = ("encoder",)

    @property
    def width(self) -> int:
        return self.config.dim

    def depth(self, stream: str) -> int:
        return self.config.n_layers

    def prepare(self, tokenizer: Any, texts: Sequence[Sequence[str]], options: TextOptions) -> Inputs:
        return encoder_inputs(tokenizer, texts, options, self.config.max_position_embeddings)

    def load(self, folder: Path, dtype: torch.dtype, attention: str, device: torch.device | str) -> torch.nn.Module:
        return load_frozen(DistilBertModel, folder, dtype, attention, device)

    def run(self, model: Any, batch: Batch, states: Sequence[str]) -> dict[str, torch.Tensor]:
        layout, out = batch.layout("encoder"), {}
        modules = {"embed": model.embeddings} | {str(i): b for i, b in enumerate(model.transformer.layer)}
        wanted = [(s, modules[s.removeprefix("encoder.")]) for s in states]
        with collect(wanted, lambda name, grid: out.__setitem__(name, layout.unpad(grid))):
            model(input_ids=layout.pad(batch.columns["encoder.ids"]), attention_mask=layout.mask.long())
        return out
