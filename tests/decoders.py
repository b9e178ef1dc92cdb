"""Small decoder-only checkpoints of many model types, with seeded random weights, and a tokenizer for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests import tiny

EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOW = {"sliding_window": 4}
LATE_WINDOW = {**WINDOW, "use_sliding_window": True, "max_window_layers": 2}
GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 160}
# Model type → what its small configuration has beside the common shape: windows shorter than the texts, experts, and
# constants that are no identity.
TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": WINDOW,  # soft-capped, windows in every other layer, tied
    "gpt_oss": {**WINDOW, **EXPERTS},  # sinks, experts
    "mistral": WINDOW, "mixtral": EXPERTS, "qwen2": LATE_WINDOW, "qwen3": LATE_WINDOW, "qwen3_moe": EXPERTS,
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32}, "gemma": {}, "gemma3_text": WINDOW, "phi": {},
    "phi3": WINDOW, "olmo": {}, "olmo2": {}, "olmo3": WINDOW, "olmoe": EXPERTS, "smollm3": LATE_WINDOW,
    "granite": {
        "logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3,
    },
    "granitemoe": EXPERTS, "gpt2": GPT2, "gpt_bigcode": GPT2, "gpt_neox": {}, "stablelm": {}, "starcoder2": WINDOW,
    "cohere": {"logit_scale": 0.5}, "cohere2": WINDOW, "glm": {}, "glm4": {}, "helium": {}, "nemotron": {},
    "ministral": WINDOW, "exaone4": WINDOW, "ernie4_5": {}, "seed_oss": {}, "arcee": {}, "apertus": {},
    "hunyuan_v1_dense": {},
}  # fmt: skip
USUAL = ("llama", "gemma2", "gpt_oss")  # in every run of the tests; the others by `-m matrix`


def config(kind: str, words: int = 64) -> Any:
    """Width 32, 4 layers, 4 heads of width 8, grouped by two where the type can."""
    shape = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "max_position_embeddings": 160,
    }  # fmt: skip
    special = {"vocab_size": words, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    extra = TYPES[kind]
    return AutoConfig.for_model(kind, **special, **(extra if "n_embd" in extra else {**shape, **extra}))


def model(kind: str, words: int = 64, seed: int = 0) -> Any:
    """A model whose weights are large enough that a wrong mask shows."""
    own = config(kind, words)
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(own, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.2) if parameter.dim() > 1 else parameter.uniform_(0.8, 1.2)
    return made


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, with <s> and </s>, which it does not put around texts by itself."""
    made = tiny._tokenizer("roberta")
    made._tokenizer.post_processor = None
    return made


def checkpoint(folder: Path, kind: str = "llama", template: str = "") -> Path:
    """A checkpoint of `kind` with a tokenizer, which has `template` as its chat template."""
    words = tokenizer()
    if template:
        words.chat_template = template
    model(kind, len(words)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
