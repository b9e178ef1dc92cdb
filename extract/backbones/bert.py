"""BERT-like encoders: BERT, RoBERTa, XLM-RoBERTa, CamemBERT, MiniLM. Post-norm blocks, one stream `encoder`.

The live layer is the last block. Its output is already normalised (post-LN), so there is no final norm.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models import bert, roberta  # each imports its modules when they are asked for

from pipeline.extract.backbones.base import Backbone, TextOptions
from pipeline.extract.backbones.capabilities import LateBlocks
from pipeline.extract.backbones.fill import filled
from pipeline.extract.backbones.loading import collect, freeze, load_frozen
from pipeline.extract.backbones.masks import key_mask
from pipeline.extract.backbones.registry import register_backbone
from pipeline.extract.backbones.tail import LiveTail
from pipeline.extract.backbones.text import encoder_inputs
from pipeline.extract.batch import Batch
from pipeline.extract.inputs import Inputs
from pipeline.extract.kernels.dropout import SIDE, use_fast_dropout

# model type → its class in transformers
_MODELS = {
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
    "camembert": "CamembertModel",
}


def bert_layer(config: Any) -> type[nn.Module]:
    """The class of a block of a model of `config`; BERT's, or RoBERTa's, which its kin share."""
    found: type[nn.Module] = _of(config)[1]
    return found


def _of(config: Any) -> tuple[Any, Any]:
    """The classes of the embeddings and of a block."""
    if config.model_type == "bert":
        return bert.modeling_bert.BertEmbeddings, bert.modeling_bert.BertLayer
    return roberta.modeling_roberta.RobertaEmbeddings, roberta.modeling_roberta.RobertaLayer


class BertTail(LiveTail):
    """Embeddings and the last block (SHERL on single-stream encoders: the live layer)."""

    def __init__(self, config: Any, attention: str) -> None:
        super().__init__()
        self.config = copy.deepcopy(config)
        self.attention = self.config._attn_implementation = attention
        embeddings, layer = _of(config)
        self.embeddings: nn.Module = embeddings(self.config)
        self.layer: nn.Module = layer(self.config)
        use_fast_dropout(freeze(self))

    def embed(self, batch: Batch, stream: str = "encoder") -> Tensor:
        return batch.layout(stream).unpad(self.embeddings(**_padded(self.config, batch)))

    @property
    def last(self) -> nn.Module:
        return self.layer

    def through(self, block: nn.Module, hidden: dict[str, Tensor], batch: Batch) -> Tensor:
        layout = batch.layout("encoder")
        rows = hidden["encoder"]
        # Evaluation computes as the backbone did, bit for bit. Training has attention dropout, which is slow in sdpa.
        attention = SIDE if self.training and rows.device.type == "cpu" else self.attention
        for module in block.modules():  # a copy of the block, or an earlier one, has a configuration of its own
            config: Any = getattr(module, "config", None)
            if hasattr(config, "_attn_implementation"):
                config._attn_implementation = attention
        mask = key_mask(layout, attention, rows.dtype)
        return layout.unpad(block(layout.pad(rows), mask))


def _padded(config: Any, batch: Batch) -> dict[str, Tensor]:
    layout = batch.layout("encoder")
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    inputs = {"input_ids": layout.pad(batch.columns["encoder.ids"], pad)}
    if "encoder.types" in batch.columns:
        inputs["token_type_ids"] = layout.pad(batch.columns["encoder.types"])
    return inputs


@register_backbone
class Bert(LateBlocks, Backbone):
    """See the module's docstring."""

    name = "bert"
    model_types = ("bert", "roberta", "xlm-roberta", "camembert")
    description = "BERT-like encoders: BERT, RoBERTa, XLM-R, CamemBERT, MiniLM"
    streams = ("encoder",)

    @property
    def width(self) -> int:
        return self.config.hidden_size

    def depth(self, stream: str) -> int:
        return self.config.num_hidden_layers

    @property
    def columns(self) -> tuple[str, ...]:
        return ("encoder.ids", "encoder.types") if self.config.type_vocab_size > 1 else ("encoder.ids",)

    def embedding(self, stream: str) -> list[str]:
        return []

    def tables(self) -> dict[str, int]:
        return {"encoder.ids": self.config.vocab_size, "encoder.types": self.config.type_vocab_size}

    def prepare(self, tokenizer: Any, texts: Sequence[Sequence[str]], options: TextOptions) -> Inputs:
        return encoder_inputs(tokenizer, texts, options, self._longest(), "encoder.types" in self.columns)

    def _longest(self) -> int:
        # RoBERTa keeps the first padding_idx + 1 positions for padding.
        reserved = 0 if self.config.model_type == "bert" else self.config.pad_token_id + 1
        return self.config.max_position_embeddings - reserved

    def stack(self, model: Any, stream: str) -> Sequence[nn.Module]:
        return list(model.encoder.layer)

    def bare_block(self, attention: str) -> nn.Module:
        config = copy.deepcopy(self.config)
        config._attn_implementation = attention
        return use_fast_dropout(bert_layer(config)(config))

    def load(self, folder: Path, dtype: torch.dtype, attention: str, device: torch.device | str) -> nn.Module:
        return load_frozen(getattr(transformers, _MODELS[self.config.model_type]), folder, dtype, attention, device)

    def run(self, model: Any, batch: Batch, states: Sequence[str]) -> dict[str, Tensor]:
        layout = batch.layout("encoder")
        out: dict[str, Tensor] = {}
        blocks = [(s, model.encoder.layer[int(s.split(".")[1])]) for s in states]
        with collect(blocks, lambda name, x: out.__setitem__(name, layout.unpad(x))):
            model(**_padded(self.config, batch), attention_mask=layout.mask.long())
        return out

    def tail_weights(self, model: Any) -> dict[str, Tensor]:
        last = f"encoder.layer.{self.config.num_hidden_layers - 1}."
        out = {}
        for name, tensor in model.state_dict().items():
            if name.startswith("embeddings."):
                out[name] = tensor
            elif name.startswith(last):
                out["layer." + name.removeprefix(last)] = tensor
        return {k: v.detach().float().cpu().contiguous() for k, v in out.items() if v.is_floating_point()}

    def tail(self, weights: dict[str, Tensor] | None, attention: str) -> BertTail:
        return filled(lambda: BertTail(self.config, attention), weights)

    def norm(self, stream: str) -> nn.Module:
        return nn.Identity()
