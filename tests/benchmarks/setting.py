"""What the benchmarks run on: checkpoints of real shapes with random weights, real or made-up texts, one shared run.

Speed and memory do not depend on the weights, so no download is needed. The tokenizer is trained on the spot on the
texts themselves; lengths are what it gives, and are printed.
"""

from __future__ import annotations

import csv
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from pipeline.commands.extract import run_extract
from pipeline.cost.known_shapes import known_config
from pipeline.extract.backbones import Backbone, Inputs, backbone_for
from pipeline.extract.tasks import load_task
from pipeline.extract.tasks.completion import form_of
from pipeline.lookup.recipe import space_options
from pipeline.lookup.task import open_task
from pipeline.recipe import Recipe

GLUE = Path(__file__).resolve().parents[3] / "shared" / "data" / "glue"
SHAPES = {
    "t5-small": "t5-small",
    "t5-base": "t5-base",
    "t5-large": "t5-large",
    "bert-base": "bert-base",
    "small": "minilm",
    "llama-3.2-1b": "llama-3.2-1b",
    "qwen3-0.6b": "qwen3-0.6b",
}
DECODERS = ("llama", "qwen3")  # model types that learn to go on with the texts
WORDS = ("cat", "dog", "house", "river", "stone", "paper", "light", "water", "north", "green", "old", "never", "always")
LENGTH = 60


def texts_and_task(samples: int, folder: Path, continued: bool = False) -> tuple[list[str], dict[str, Any], str]:
    """Texts to train a tokenizer on, the recipe's options for a task of `samples` rows, and what they are in words.
    `continued`: the rows are texts to go on with, without labels."""
    if continued:
        rows, options, words = texts_and_task(samples, folder)
        if options["task"] == "rte":  # as a T5 gets them, without the label
            task = load_task("rte", GLUE)
            rows = [task.spec.prompt.format(*texts) for texts in task.rows("train").texts]
        path = folder / "texts.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows), encoding="utf-8")
        return rows, {"task": str(path), "limit": samples}, words
    if (GLUE / "RTE" / "train.tsv").is_file():
        rows = (GLUE / "RTE" / "train.tsv").read_text(encoding="utf-8-sig").splitlines()[1:]
        return rows, {"task": "rte", "data": str(GLUE), "limit": samples}, f"{samples} training rows of RTE"
    g = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(samples):
        picks = torch.randint(len(WORDS), (LENGTH,), generator=g).tolist()
        rows.append(" ".join(WORDS[i] for i in picks))
    path = folder / "made_up.tsv"
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, delimiter="\t", lineterminator="\n")
        out.writerows([("text", "label"), *((text, ("yes", "no")[i % 2]) for i, text in enumerate(rows))])
    options = {"task": str(path), "text": "text", "label": "label", "objective": "classification"}
    return rows, options, f"{samples} made-up texts of {LENGTH} words"


def trained_tokenizer(texts: list[str], t5: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of 8,000 pieces that closes texts as T5 does, or pairs them as BERT does."""
    special = ["<pad>", "</s>", "<unk>"] if t5 else ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if t5 else "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if t5:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    else:
        pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    if not t5:
        fast.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return fast


def positions(samples: int) -> tuple[np.ndarray, str]:
    """Encoder positions (samples,) of a T5's prompts for RTE, and what they are in words."""
    if not (GLUE / "RTE" / "train.tsv").is_file():
        return np.clip(
            np.random.default_rng(0).lognormal(4.25, 0.45, samples).astype(np.int64), 20, 128
        ), "made-up lengths"
    task = load_task("rte", GLUE)
    prompts = [task.spec.prompt.format(*t) for t in task.rows("train").texts]
    fast = trained_tokenizer(prompts, True)
    lengths = [len(ids) for ids in fast(prompts[:samples], truncation=True, max_length=128)["input_ids"]]
    return np.asarray(lengths, np.int64), f"the first {samples} training rows of RTE"


def words_of(samples: int) -> str:
    """What the texts of a benchmark are."""
    real = (GLUE / "RTE" / "train.tsv").is_file()
    return f"{samples} training rows of RTE" if real else f"{samples} made-up texts of {LENGTH} words"


def prepared(shape: str, samples: int) -> tuple[Backbone, Inputs, int]:
    """The family of a shape, and the training inputs of `samples` texts as extraction makes them; how many classes."""
    with tempfile.TemporaryDirectory() as folder:
        backbone = backbone_for(known_config(SHAPES[shape]))
        texts, options, _ = texts_and_task(samples, Path(folder), backbone.continues_text)
        task = open_task(Recipe(**options), backbone)
    lm = backbone.writes_text
    fast = trained_tokenizer(texts, lm or backbone.continues_text)
    candidates = backbone.candidates(fast, task.spec.texts) if lm else []
    rows = task.rows("train").head(samples)
    gold = [task.spec.target_index(label) for label in rows.labels if label is not None] if lm else None
    answers = (candidates, gold) if lm else ()
    text = replace(space_options(Recipe(**options), task.spec, backbone).text, form=form_of(task.spec))
    made = backbone.prepare(fast, rows.texts, text, *answers)
    return backbone, made, len(task.spec.labels)


def checkpoint(shape: str, folder: Path, texts: list[str]) -> Path:
    """A checkpoint folder of a real shape: seeded random weights, and a tokenizer trained on `texts`."""
    config = known_config(SHAPES[shape])
    t5, decoder = config.model_type == "t5", config.model_type in DECODERS
    fast = trained_tokenizer(texts, t5 or decoder)
    torch.manual_seed(0)
    maker: Any = AutoModelForSeq2SeqLM if t5 else AutoModelForCausalLM if decoder else AutoModel
    maker.from_config(config, dtype=config.dtype if decoder else None).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def extracted(
    shape: str, samples: int, tuners: tuple[str, ...], folder: Path, fmt: str
) -> tuple[Recipe, dict[str, Any], str]:
    """A store in `folder` with the states of `tuners` for `samples` texts. Returns the recipe to train from it, what
    the extraction reported, and what the texts are."""
    continued = known_config(SHAPES[shape]).model_type in DECODERS
    texts, task, words = texts_and_task(samples, folder, continued)
    model = checkpoint(shape, folder / "checkpoint", texts)
    base: dict[str, Any] = {"model": str(model), "store": str(folder / "store"), "format": fmt, "device": "cpu", **task}
    report = run_extract(Recipe(**base, tuners=tuners, split=("train",)), lambda line: None, quiet=True)
    return Recipe(**base), report, words
