"""Small checkpoints with seeded random weights and real tokenizers, and a small task, made on the spot."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = [
    "a", "the", "cat", "dog", "bird", "sees", "hears", "likes", "old", "young", "red", "blue", "house", "tree", "not",
    "never", "always", "in", "on", "under", "sleeps", "runs",
]  # fmt: skip


def sentences(n: int, seed: int = 0, longest: int = 12) -> list[str]:
    """`n` distinct-ish nonsense sentences of 2 to `longest` words."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        k = int(torch.randint(2, longest + 1, (1,), generator=g))
        words = [WORDS[int(w)] for w in torch.randint(len(WORDS), (k,), generator=g)]
        out.append(" ".join([*words, f"number {i}"]))
    return out


def write_table(path: Path, n: int = 60, seed: int = 0, pair: bool = True) -> Path:
    """A TSV with columns first, second, label (yes / no by whether "cat" comes before "dog"-like words)."""
    a, b = sentences(n, seed), sentences(n, seed + 1, longest=6)
    lines = ["first\tsecond\tlabel"]
    lines += [f"{x}\t{y}\t{'yes' if ('cat' in x) != ('the' in y) else 'no'}" for x, y in zip(a, b, strict=True)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _tokenizer(kind: str) -> PreTrainedTokenizerFast:
    special = {
        "t5": ["<pad>", "</s>", "<unk>"],
        "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
        "roberta": ["<s>", "<pad>", "</s>", "<unk>"],
    }[kind]
    unknown = next(s for s in special if "unk" in s.lower())
    tok = Tokenizer(models.BPE(unk_token=unknown))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tok.decoder = decoders.ByteLevel()
    corpus = sentences(200) + ["first second sentence sentence1 sentence2 label 0 1 2 3 4 5 . :"] * 20
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(corpus, trainer)
    ids = {s: tok.token_to_id(s) for s in special}
    if kind == "t5":
        tok.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", ids["</s>"])])
        return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    if kind == "bert":
        tok.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
        )  # fmt: skip
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tok, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
        )
        fast.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        return fast
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", ids["<s>"]), ("</s>", ids["</s>"])],
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        cls_token="<s>", sep_token="</s>",
    )  # fmt: skip


def t5(folder: Path, seed: int = 0, layers: int = 4, tied: bool = True, gated: bool = False) -> Path:
    """A T5 checkpoint of `layers` + `layers` blocks, width 32."""
    tokenizer = _tokenizer("t5")
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=layers, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        feed_forward_proj="gated-gelu" if gated else "relu", tie_word_embeddings=tied,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    model.save_pretrained(folder)
    if not tied:
        _untie(folder, config)
    tokenizer.save_pretrained(folder)
    return folder


def _untie(folder: Path, config: T5Config) -> None:
    """Make the folder look as v1.1 checkpoints do: a head of its own, and a config that says so."""
    import json

    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(config.vocab_size, config.d_model) * 0.05
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    raw["tie_word_embeddings"] = False
    raw.pop("scale_decoder_outputs", None)
    (folder / "config.json").write_text(json.dumps(raw))


def bert(folder: Path, seed: int = 0, layers: int = 4) -> Path:
    """A BERT checkpoint of width 32."""
    tokenizer = _tokenizer("bert")
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=160, pad_token_id=0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def roberta(folder: Path, seed: int = 0, layers: int = 4) -> Path:
    """A RoBERTa checkpoint of width 32."""
    tokenizer = _tokenizer("roberta")
    torch.manual_seed(seed)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=160, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        type_vocab_size=1,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def clip_text(folder: Path, seed: int = 0, layers: int = 4) -> Path:
    """A CLIP text tower of width 32, with a tokenizer that is not CLIP's."""
    tokenizer = _tokenizer("roberta")
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=160, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


CHECKPOINTS = {"t5": t5, "bert": bert, "roberta": roberta, "clip_text": clip_text}
