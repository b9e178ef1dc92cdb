"""Decoder-only language models: Llama, Mistral, Qwen, Gemma, Phi, OLMo, Granite, GPT-2, GPT-NeoX, gpt-oss and kin.

One stream `decoder`; `decoder.i` is the output of block i before any later norm (the library's `hidden_states[-1]` is
behind the final one). A position sees those before it, so every state is a constant of its text. The live layer is the
library's own model cut to its last layer, see `shell`: masks, windows, rotary angles, sinks, experts are its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache

from pipeline.extract.backbones.base import Backbone, TextOptions
from pipeline.extract.backbones.capabilities import Blocks, ContinuesText
from pipeline.extract.backbones.fill import filled
from pipeline.extract.backbones.loading import collect, freeze, load_frozen
from pipeline.extract.backbones.registry import register_backbone
from pipeline.extract.backbones.shell import Shell, cache_option, cut, is_tied, layers_of, norm_of, places
from pipeline.extract.backbones.tail import TextTail
from pipeline.extract.backbones.text import tokenize, word_metas
from pipeline.extract.batch import Batch
from pipeline.extract.completion import Encoded, encode_answers, encode_rows
from pipeline.extract.inputs import Inputs, ragged
from pipeline.store.errors import UserError

LONGEST = 1024  # tokens of a text where nothing is said, or what the model takes
_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")
# Fields of a configuration that make the head more than a product with its table.
_HEAD = ("logits_scaling", "logit_scale", "final_logit_softcapping")


def head_logits(config: Any, rows: Tensor, table: Tensor, bias: Tensor | None, tokens: Tensor | None) -> Tensor:
    """(rows, width) behind the final norm → (rows, vocabulary), or only the columns `tokens`: a product with `table`,
    divided (Granite) or multiplied (Cohere) by a constant, soft-capped (Gemma 2)."""
    if tokens is not None:
        table, bias = table[tokens], None if bias is None else bias[tokens]
    logits = F.linear(rows, table.to(rows.dtype), None if bias is None else bias.to(rows.dtype))
    divisor, factor, cap = (getattr(config, name, None) for name in _HEAD)
    logits = logits / divisor if divisor else logits
    logits = logits * factor if factor else logits
    return cap * torch.tanh(logits / cap) if cap else logits


class DecoderTail(TextTail):
    """Embedding, the last block, the final norm and the head, all frozen."""

    def __init__(self, config: Any, attention: str) -> None:
        super().__init__()
        self.config = config
        self.shell = Shell(cut(config, [config.num_hidden_layers - 1], attention))
        (self.block,), self.norm, self.head = self.shell.parts()
        freeze(self)

    def embed(self, batch: Batch, stream: str = "decoder") -> Tensor:
        layout = batch.layout(stream)
        start = 0 if batch.past is None else batch.past.length
        return layout.unpad(self.shell.embed(layout.pad(batch.columns["decoder.ids"]), start))

    @property
    def last(self) -> nn.Module:
        return self.block

    def through(self, block: nn.Module, hidden: dict[str, Tensor], batch: Batch) -> Tensor:
        layout = batch.layout("decoder")
        grid = layout.pad(hidden["decoder"])
        ((args, kwargs),) = self.shell.given(grid, cache_of(batch, self, self.shell))
        return layout.unpad(block(grid, *args, **kwargs))

    def final_norm(self, rows: Tensor, stream: str) -> Tensor:
        normed: Tensor = self.norm(rows)
        return normed

    def logits(self, rows: Tensor, tokens: Tensor | None = None) -> Tensor:
        if self.head is None:
            return head_logits(self.config, rows, self.shell.table, None, tokens)
        return head_logits(self.config, rows, self.head.weight, self.head.bias, tokens)


def cache_of(batch: Batch, owner: nn.Module, shell: Shell) -> Any:
    return None if batch.past is None else batch.past.cache(owner, shell.new_cache)


def attentions_of(config: Any) -> tuple[str, ...]:
    model: Any = AutoModelForCausalLM._model_mapping[type(config)]
    return ("sdpa", "eager") if model._supports_sdpa else ("eager",)


def _inputs(found: Encoded, rows: int) -> Inputs:
    ids, lengths = ragged(found.ids)
    of = np.asarray(found.of if len(found.of) > rows else (), np.int64)
    cut = np.asarray(found.truncated, bool)
    return Inputs({"decoder": lengths}, {"decoder.ids": ids}, cut, metas=found.metas, of=of)


@register_backbone
class Decoder(ContinuesText, Blocks, Backbone):
    """See the module's docstring. Raises UserError for layers that carry a state from position to position in place of
    attention, and for scores scaled by a layer's number."""

    name = "decoder"
    # Each is compared with the library's own model, see tests/extract/test_decoder.py.
    model_types = (
        "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma", "gemma2", "gemma3_text",
        "phi", "phi3", "olmo", "olmo2", "olmo3", "olmoe", "smollm3", "granite", "granitemoe", "gpt2", "gpt_bigcode",
        "gpt_neox", "gpt_oss", "stablelm", "starcoder2", "cohere", "cohere2", "glm", "glm4", "helium", "nemotron",
        "ministral", "exaone4", "ernie4_5", "seed_oss", "arcee", "apertus", "hunyuan_v1_dense",
    )  # fmt: skip
    description = "decoder-only language models: Llama, Mistral, Qwen, Gemma, Phi, OLMo, GPT-2, GPT-NeoX, gpt-oss"
    streams = ("decoder",)
    causal = ("decoder",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        other = [kind for kind in getattr(config, "layer_types", None) or () if kind not in _ATTENTION]
        if other:
            raise UserError(f"{config.model_type}: layers of type {other[0]} have no attention that could be run alone")
        if getattr(config, "scale_attn_by_inverse_layer_idx", False):
            raise UserError(f"{config.model_type}: scale_attn_by_inverse_layer_idx: a layer depends on its number")

    @property
    def attentions(self) -> tuple[str, ...]:  # type: ignore[override]
        return attentions_of(self.config)

    @property
    def width(self) -> int:
        return self.config.hidden_size

    @property
    def usual_precision(self) -> str:
        return "bfloat16" if str(self.config.dtype).endswith("bfloat16") else "float32"

    @property
    def usual_length(self) -> int:
        return min(LONGEST, self._longest())

    def _longest(self) -> int:
        return getattr(self.config, "max_position_embeddings", None) or LONGEST

    def depth(self, stream: str) -> int:
        return self.config.num_hidden_layers

    def embedding(self, stream: str) -> list[str]:
        return []

    def prepare(
        self,
        tokenizer: Any,
        texts: Sequence[Sequence[str]],
        options: TextOptions,
        candidates: Sequence[Sequence[int]] = (),
        gold: Sequence[int] | None = None,
    ) -> Inputs:
        """Rows of a completion task become what `encode_rows` makes of them, those that are answered what
        `encode_answers` does; the fields of any other stand a line each, in the tokenizer's own way."""
        limit, side = min(options.max_length, self._longest()), options.truncation_side
        if options.form != "plain":
            return _inputs(encode_rows(tokenizer, texts, options.form, limit, side, options.stride), len(texts))
        if options.stride is not None:
            raise UserError("--stride is for texts that are gone on with: one that is judged as a whole is one sample")
        if candidates:
            sources = [options.prompt.format(*fields) for fields in texts]
            return _inputs(encode_answers(tokenizer, sources, candidates, gold, limit, side), len(texts))
        joined = ["\n".join(fields) for fields in texts]
        encoded, truncated = tokenize(tokenizer, joined, None, limit, options.truncation_side, options.words)
        ids, lengths = ragged(encoded["input_ids"])
        if not lengths.all():
            raise UserError(f"row {int((lengths == 0).argmax()) + 1}: the text is empty, which is no token here")
        return Inputs(
            {"decoder": lengths}, {"decoder.ids": ids}, truncated, metas=word_metas(texts, joined, 0, encoded)
        )

    def load(self, folder: Path, dtype: torch.dtype, attention: str, device: torch.device | str) -> nn.Module:
        return load_frozen(AutoModelForCausalLM, folder, dtype, attention, device)

    def make(self, attention: str = "sdpa") -> Any:
        return AutoModelForCausalLM.from_config(self.config, attn_implementation=attention)

    def stack(self, model: Any, stream: str) -> Sequence[nn.Module]:
        return list(layers_of(model, self.config))

    def run(self, model: Any, batch: Batch, states: Sequence[str]) -> dict[str, Tensor]:
        layout = batch.layout("decoder")
        out: dict[str, Tensor] = {}
        stack = self.stack(model, "decoder")
        blocks = [(s, stack[int(s.split(".")[1])]) for s in states]
        cache = None
        if batch.past is not None:
            cache = batch.past.cache(model, lambda: DynamicCache(config=self.config))
        # Samples are padded on the right and attention is causal: no real position sees padding.
        with collect(blocks, lambda name, x: out.__setitem__(name, layout.unpad(x))):
            ids = layout.pad(batch.columns["decoder.ids"])
            model.base_model(input_ids=ids, **cache_option(model.base_model, cache))
        return out

    def finish(self, model: Any, rows: Tensor) -> Tensor:
        normed: Tensor = norm_of(model, self.config)(rows)
        return normed

    def logits(self, model: Any, rows: Tensor, tokens: Tensor | None = None) -> Tensor:
        head = model.get_output_embeddings()
        return head_logits(self.config, rows, head.weight, head.bias, tokens)

    def tail_weights(self, model: Any) -> dict[str, Tensor]:
        layers, norm = places(self.config)
        frame = model.base_model.state_dict()
        out = {f"shell.model.{k}": v for k, v in frame.items() if not k.startswith((f"{layers}.", f"{norm}."))}
        out |= {f"block.{k}": v for k, v in self.stack(model, "decoder")[-1].state_dict().items()}
        out |= {f"norm.{k}": v for k, v in norm_of(model, self.config).state_dict().items()}
        if not is_tied(model):
            out |= {f"head.{k}": v for k, v in model.get_output_embeddings().state_dict().items()}
        return {k: v.detach().float().cpu().contiguous() for k, v in out.items()}

    def tail(self, weights: dict[str, Tensor] | None, attention: str) -> DecoderTail:
        return filled(lambda: DecoderTail(self.config, attention), weights)

    def norm(self, stream: str) -> nn.Module:
        config = cut(self.config, [0], self.attentions[0])
        with torch.device("meta"):
            shell = Shell(config)
        _, norm, _ = shell.parts()
        norm = norm.to_empty(device=torch.get_default_device())
        shell.model._init_weights(norm)
        return norm.requires_grad_(True)
