"""Shapes of well-known checkpoints: what their `config.json` says of size, so that planning needs no download.

Only sizes are here. Weights, tokenizers and everything that decides a number come from the checkpoint itself.
"""

from __future__ import annotations

from typing import Any

from pipeline.extract.short_names import SHORT_NAMES

# model type, width, heads, width of a head, feed-forward width, blocks, vocabulary
_T5 = {
    "t5-small": (512, 8, 64, 2048, 6),
    "t5-base": (768, 12, 64, 3072, 12),
    "t5-large": (1024, 16, 64, 4096, 24),
    "t5-3b": (1024, 32, 128, 16384, 24),
    "t5-11b": (1024, 128, 128, 65536, 24),
}
# gated feed-forward, untied head
_T5_GATED = {
    "t5-v1.1-base": (768, 12, 64, 2048, 12),
    "t5-v1.1-large": (1024, 16, 64, 2816, 24),
    "flan-t5-base": (768, 12, 64, 2048, 12),
    "flan-t5-large": (1024, 16, 64, 2816, 24),
    "flan-t5-xl": (2048, 32, 64, 5120, 24),
}
_BERT = {
    "bert-base": ("bert", 768, 12, 3072, 12, 30522),
    "bert-large": ("bert", 1024, 16, 4096, 24, 30522),
    "roberta-base": ("roberta", 768, 12, 3072, 12, 50265),
    "roberta-large": ("roberta", 1024, 16, 4096, 24, 50265),
    "minilm": ("bert", 384, 12, 1536, 6, 30522),
}
# width, heads, key/value heads, width of a head, feed-forward width, blocks, vocabulary, positions
_DECODERS = {
    "llama-3.2-1b": ("llama", 2048, 32, 8, 64, 8192, 16, 128256, 131072),
    "qwen3-0.6b": ("qwen3", 1024, 16, 8, 128, 3072, 28, 151936, 40960),
}


def known_config(model: str) -> Any | None:
    """The Hugging Face configuration of a short name or its hub id, from the table above; None for any other."""
    from transformers import AutoConfig

    name = next((short for short, hub in SHORT_NAMES.items() if model in (short, hub)), model)
    if name in _T5 or name in _T5_GATED:
        width, heads, head, inner, blocks = (_T5 | _T5_GATED)[name]
        gated = name in _T5_GATED
        return AutoConfig.for_model(
            "t5",
            d_model=width,
            num_heads=heads,
            d_kv=head,
            d_ff=inner,
            num_layers=blocks,
            num_decoder_layers=blocks,
            vocab_size=32128,
            feed_forward_proj="gated-gelu" if gated else "relu",
            tie_word_embeddings=not gated,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        )
    if name in _BERT:
        kind, width, heads, inner, blocks, words = _BERT[name]
        special = {"max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1}
        return AutoConfig.for_model(
            kind,
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=inner,
            num_hidden_layers=blocks,
            vocab_size=words,
            **(special if kind == "roberta" else {"pad_token_id": 0}),
        )
    if name in _DECODERS:
        kind, width, heads, groups, head, inner, blocks, words, positions = _DECODERS[name]
        return AutoConfig.for_model(
            kind,
            hidden_size=width,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=head,
            intermediate_size=inner,
            num_hidden_layers=blocks,
            vocab_size=words,
            max_position_embeddings=positions,
            tie_word_embeddings=True,
            dtype="bfloat16",
        )
    return None
