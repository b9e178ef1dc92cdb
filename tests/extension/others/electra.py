"""A backbone: ELECTRA's discriminator whose embeddings have the width of its blocks, as BERT is but for the names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, ElectraModel

from pipeline.extract.backbones import register
from pipeline.extract.backbones.bert import Bert
from pipeline.extract.backbones.loading import load_frozen
from pipeline.store import UserError


@register
class Electra(Bert):
    name = "electra"
    model_types = ("electra",)
    description = "ELECTRA, discriminators with embeddings of full width"

    def __init__(self, config: Any) -> None:
        if config.embedding_size != config.hidden_size:
            raise UserError("electra: embeddings narrower than the blocks are not supported")
        super().__init__(BertConfig(**{k: v for k, v in config.to_dict().items() if k != "model_type"}))

    def load(self, folder: Path, dtype: torch.dtype, attention: str, device: torch.device | str) -> torch.nn.Module:
        return load_frozen(ElectraModel, folder, dtype, attention, device)
