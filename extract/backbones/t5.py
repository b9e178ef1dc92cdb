"""T5 encoder-decoders: v1.0, v1.1 and flan, tied and untied heads. Streams `encoder` and `decoder`.

Feature i is the output of block i before any final norm. The tail is the last decoder block, the relative position
bias of decoder block 0, the encoder's final norm, the embedding table and the language-model head.

Decoder positions of a sample form a trie (`decoder.parent`: the position before, -1 at the root): a plain chain when
training on a target, the prefixes where targets part when scoring. A position attends to its ancestors and has their
count as its place, so a chain is exactly the causal decoder.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.t5.modeling_t5 import T5Attention, T5Block, T5ForConditionalGeneration, T5LayerNorm

from pipeline.extract.backbones.base import Backbone, TextOptions
from pipeline.extract.backbones.capabilities import LateBlocks, WritesText
from pipeline.extract.backbones.fill import filled
from pipeline.extract.backbones.loading import collect, freeze, load_frozen
from pipeline.extract.backbones.masks import attention_mask, key_mask, tree
from pipeline.extract.backbones.registry import register_backbone
from pipeline.extract.backbones.tail import TextTail
from pipeline.extract.backbones.text import decision_trie, field_start, gold_chain, tokenize, word_metas
from pipeline.extract.batch import Batch
from pipeline.extract.inputs import Inputs, ragged
from pipeline.extract.kernels.dropout import Dropout, use_fast_dropout
from pipeline.extract.kernels.t5_attention import cross_attend, is_cheaper
from pipeline.store.errors import UserError


def tree_bias(table: nn.Embedding, depth: Tensor, config: Any) -> Tensor:
    """Relative position bias of decoder positions at the given depths: (B, P) → (B, heads, P, P)."""
    bucket = T5Attention._relative_position_bucket(
        depth[:, None, :] - depth[:, :, None],
        bidirectional=False,
        num_buckets=config.relative_attention_num_buckets,
        max_distance=config.relative_attention_max_distance,
    )
    return table(bucket).permute(0, 3, 1, 2)


def decoder_context(batch: Batch, table: nn.Embedding, config: Any, attention: str, dtype: torch.dtype) -> Any:
    """(self mask, self bias, cross mask, cross bias) for decoder blocks over the batch's tries."""
    seen, depth = tree(batch, "decoder")
    cross = key_mask(batch.layout("encoder"), attention, dtype)
    zero = torch.zeros((1, config.num_heads, 1, cross.shape[-1]), dtype=dtype, device=cross.device)
    own = attention_mask(seen[:, None], attention, dtype)
    return own, tree_bias(table, depth, config).to(dtype), cross, zero.expand(-1, -1, depth.shape[1], -1)


def run_decoder_block(block: nn.Module, grid: Tensor, memory: Tensor, context: Any) -> Tensor:
    """One decoder block on padded grids (B, P, width), attending to `memory` (B, L, width)."""
    own_mask, own_bias, cross_mask, cross_bias = context
    return block(grid, own_mask, own_bias, memory, cross_mask, cross_bias)[0]


class T5Tail(TextTail):
    """See the module's docstring."""

    def __init__(self, config: Any, attention: str, tied: bool, tokens: int) -> None:
        super().__init__()
        self.config = decoder_config(config, attention)
        self.scale = config.d_model**-0.5 if _scales_outputs(config) else 1.0
        self.shared = nn.Embedding(tokens, config.d_model)
        self.block = T5Block(self.config, has_relative_attention_bias=False, layer_idx=config.num_decoder_layers - 1)
        self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)
        self.encoder_norm = T5LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.decoder_norm = T5LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        use_fast_dropout(self)
        self.lm_head = None if tied else nn.Linear(config.d_model, tokens, bias=False)
        self.dropout = Dropout(config.dropout_rate)
        freeze(self)

    def embed(self, batch: Batch, stream: str) -> Tensor:
        return self.dropout(self.shared(batch.columns[f"{stream}.ids"]))

    @property
    def last(self) -> nn.Module:
        return self.block

    def through(self, block: Any, hidden: dict[str, Tensor], batch: Batch) -> Tensor:
        rows, memory = hidden["decoder"], hidden["encoder"]
        attention = self.config._attn_implementation
        context = decoder_context(batch, self.relative_attention_bias, self.config, attention, rows.dtype)
        layout, encoder = batch.layout("decoder"), batch.layout("encoder")
        grid = layout.pad(rows)
        # Evaluation runs the block as it is, so that it equals the backbone bit for bit.
        if self.training and is_cheaper(block.layer[1], grid.shape[1]):
            grid = block.layer[0](grid, context[0], context[1])[0]
            grid = cross_attend(block.layer[1], grid, memory, encoder, batch.lengths["encoder"])
            return layout.unpad(block.layer[2](grid))
        return layout.unpad(run_decoder_block(block, grid, encoder.pad(memory), context))

    def final_norm(self, rows: Tensor, stream: str) -> Tensor:
        return (self.encoder_norm if stream == "encoder" else self.decoder_norm)(rows)

    def logits(self, rows: Tensor, tokens: Tensor | None = None) -> Tensor:
        table = self.shared.weight if self.lm_head is None else self.lm_head.weight
        return (rows * self.scale) @ (table if tokens is None else table[tokens]).t()


@register_backbone
class T5(WritesText, LateBlocks, Backbone):
    """See the module's docstring."""

    name = "t5"
    model_types = ("t5",)
    description = "T5 encoder-decoders: v1.0, v1.1, flan"
    streams = ("encoder", "decoder")

    @property
    def width(self) -> int:
        return self.config.d_model

    def depth(self, stream: str) -> int:
        return self.config.num_layers if stream == "encoder" else self.config.num_decoder_layers

    def embedding(self, stream: str) -> list[str]:
        return []

    def full_states(self) -> list[str]:
        # The encoder's last state is SHERL's guide; the decoder's guide is what enters its last block.
        encoder, decoder = self.depth("encoder") - 1, self.depth("decoder") - 1
        return [f"encoder.{encoder}", f"decoder.{decoder - 1}", f"decoder.{decoder}"]

    @property
    def columns(self) -> tuple[str, ...]:
        return ("encoder.ids", "decoder.ids", "decoder.parent")

    def refuse_columns(self, lengths: Mapping[str, np.ndarray], columns: Mapping[str, np.ndarray]) -> str | None:
        if (parent := columns.get("decoder.parent")) is not None:
            count = np.asarray(lengths["decoder"], np.int64)
            place = np.arange(len(parent)) - np.repeat(np.cumsum(count) - count, count)
            if bool(((parent < -1) | (parent >= place)).any()):
                return "decoder.parent names positions that are not before their own"
        return super().refuse_columns(lengths, columns)

    def candidates(self, tokenizer: Any, targets: Sequence[str]) -> list[list[int]]:
        return [list(ids) for ids in tokenizer(list(targets))["input_ids"]] if targets else []

    def prepare(
        self,
        tokenizer: Any,
        texts: Sequence[Sequence[str]],
        options: TextOptions,
        candidates: Sequence[Sequence[int]] = (),
        gold: Sequence[int] | None = None,
    ) -> Inputs:
        """Source text from the prompt; decoder positions from the sample's own target or, without `gold`, from the
        trie of all candidates."""
        sources = [options.prompt.format(*t) for t in texts]
        encoded, cut = tokenize(tokenizer, sources, None, options.max_length, options.truncation_side, options.words)
        metas = word_metas(texts, sources, field_start(options.prompt), encoded) if options.words else []
        ids, lengths = ragged(encoded["input_ids"])
        if gold is None:
            tries = [decision_trie(candidates, self.start_id)] * len(texts)
        else:
            chains = [gold_chain(c, self.start_id) for c in candidates]
            tries = [chains[g] for g in gold]
        columns = {"encoder.ids": ids, **_columns(tries)}
        return Inputs({"encoder": lengths, **_lengths(tries)}, columns, cut, metas=metas)

    @property
    def start_id(self) -> int:
        """The id every decoder input begins with."""
        start = self.config.decoder_start_token_id
        return int(self.config.pad_token_id if start is None else start)

    def with_decoder(self, inputs: Inputs, chains: Sequence[Sequence[int]]) -> Inputs:
        tries = [(list(c), list(range(-1, len(c) - 1))) for c in chains]
        return Inputs(
            {"encoder": inputs.lengths["encoder"], **_lengths(tries)},
            {"encoder.ids": inputs.columns["encoder.ids"], **_columns(tries)},
            inputs.truncated,
        )

    def load(self, folder: Path, dtype: torch.dtype, attention: str, device: torch.device | str) -> nn.Module:
        model: Any = load_frozen(T5ForConditionalGeneration, folder, dtype, attention, device)
        # transformers 5 ties the head of every T5 that comes without one, also where it is not that of the embedding.
        said = json.loads((folder / "config.json").read_text()).get("tie_word_embeddings", True)
        if not said and model.lm_head.weight is model.shared.weight:
            raise UserError(
                f"checkpoint {folder}: config.json says that the head is not the embedding (tie_word_embeddings: "
                "false), but the weights hold no lm_head.weight: save the whole T5ForConditionalGeneration, or correct "
                "config.json"
            )
        return model

    def make(self, attention: str = "sdpa") -> Any:
        return T5ForConditionalGeneration._from_config(self.config, attn_implementation=attention)

    def keep_tokens(self, model: Any, tokens: int) -> None:
        """As the official code does: of T5's 32,128 rows 28 are no token's and take no part in the softmax."""
        holders = (model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens, model.lm_head)
        tables = list({id(h.weight): h.weight for h in holders}.values())
        for table in tables if tokens < self.config.vocab_size else ():
            # Tied tables stay one, a head of its own stays its own.
            cut = nn.Parameter(table.detach()[:tokens].clone(), requires_grad=False)
            for holder in holders:
                if holder.weight is table:
                    holder.weight = cut
                    setattr(holder, "num_embeddings" if isinstance(holder, nn.Embedding) else "out_features", tokens)

    def run(self, model: Any, batch: Batch, states: Sequence[str]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        encoder, decoder = batch.layout("encoder"), batch.layout("decoder")
        layers: dict[str, list[int]] = {
            s: sorted(int(n.split(".")[1]) for n in states if n.startswith(s)) for s in self.streams
        }
        blocks = [(f"encoder.{i}", model.encoder.block[i]) for i in layers["encoder"]]
        with collect(blocks, lambda name, x: out.__setitem__(name, encoder.unpad(x))):
            memory = model.encoder(
                input_ids=encoder.pad(batch.columns["encoder.ids"], self.config.pad_token_id),
                attention_mask=encoder.mask.long(),
            ).last_hidden_state
        if not layers["decoder"]:
            return out
        stack = model.decoder
        table = stack.block[0].layer[0].SelfAttention.relative_attention_bias
        attention = stack.config._attn_implementation
        context = decoder_context(batch, table, self.config, attention, memory.dtype)
        grid = stack.dropout(stack.embed_tokens(decoder.pad(batch.columns["decoder.ids"], self.config.pad_token_id)))
        blocks = [(f"decoder.{i}", stack.block[i]) for i in layers["decoder"]]
        with collect(blocks, lambda name, x: out.__setitem__(name, decoder.unpad(x))):
            for block in stack.block[: layers["decoder"][-1] + 1]:
                grid = run_decoder_block(block, grid, memory, context)
        return out

    def stack(self, model: Any, stream: str) -> Sequence[nn.Module]:
        return list((model.encoder if stream == "encoder" else model.decoder).block)

    def finish(self, model: Any, rows: Tensor) -> Tensor:
        return model.decoder.dropout(model.decoder.final_layer_norm(rows))

    def logits(self, model: Any, rows: Tensor, tokens: Tensor | None = None) -> Tensor:
        table, bias = model.lm_head.weight, model.lm_head.bias  # a bias where BitFit gave it one
        scale = self.config.d_model**-0.5 if _scales_outputs(self.config) else 1.0
        if tokens is not None:
            table, bias = table[tokens], None if bias is None else bias[tokens]
        return F.linear(rows * scale, table, bias)

    def bare_block(self, attention: str) -> nn.Module:
        block = T5Block(decoder_config(self.config, attention), has_relative_attention_bias=False, layer_idx=1)
        return use_fast_dropout(block)

    def tail_weights(self, model: Any) -> dict[str, Tensor]:
        weights = {
            "shared.weight": model.shared.weight,
            "relative_attention_bias.weight": model.decoder.block[0]
            .layer[0]
            .SelfAttention.relative_attention_bias.weight,
            "encoder_norm.weight": model.encoder.final_layer_norm.weight,
            "decoder_norm.weight": model.decoder.final_layer_norm.weight,
            **{f"block.{k}": v for k, v in model.decoder.block[-1].state_dict().items()},
        }
        if not torch.equal(model.lm_head.weight, model.shared.weight):
            weights["lm_head.weight"] = model.lm_head.weight
        return {k: v.detach().float().cpu().contiguous() for k, v in weights.items()}

    def tail(self, weights: dict[str, Tensor] | None, attention: str) -> T5Tail:
        tied = _scales_outputs(self.config) if weights is None else "lm_head.weight" not in weights
        shared = None if weights is None else weights.get("shared.weight")
        # A store of before the cut holds all rows, and means them.
        tokens = self.config.vocab_size if shared is None else len(shared)
        return filled(lambda: T5Tail(self.config, attention, tied, tokens), weights)

    def norm(self, stream: str) -> nn.Module:
        return T5LayerNorm(self.config.d_model, eps=self.config.layer_norm_epsilon)


Trie = tuple[list[int], list[int]]


def _lengths(tries: Sequence[Trie]) -> dict[str, np.ndarray]:
    return {"decoder": np.asarray([len(t[0]) for t in tries], np.int64)}


def _columns(tries: Sequence[Trie]) -> dict[str, np.ndarray]:
    return {"decoder.ids": ragged([t[0] for t in tries])[0], "decoder.parent": ragged([t[1] for t in tries])[0]}


def _scales_outputs(config: Any) -> bool:
    # transformers ties the head itself and remembers in this flag whether the checkpoint was a tied one (v1.0).
    return bool(getattr(config, "scale_decoder_outputs", config.tie_word_embeddings))


def decoder_config(config: Any, attention: str) -> Any:
    out = copy.deepcopy(config)
    out.is_decoder, out.num_layers, out._attn_implementation = True, config.num_decoder_layers, attention
    return out
