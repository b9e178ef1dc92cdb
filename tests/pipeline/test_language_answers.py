"""Language models that answer: classes by their names, and what is written after prompts, scored."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.extract.completion import answer_ids, encode_answers
from pipeline.store import Store
from pipeline.store.errors import UserError
from pipeline.train.text_scores import text_scores
from tests import decoders, tiny
from tests.extract.test_completion import CHAT, PLAIN
from tests.pipeline.test_language import refused, run, write
from tests.pipeline.test_parity import losses, worst_of

NAMES = ("dog", "cat", "red house")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return decoders.checkpoint(tmp_path_factory.mktemp("answers") / "model", template=PLAIN)


@pytest.fixture(scope="module")
def common(model, tmp_path_factory) -> tuple:
    """What names a task of three classes, with a store that holds its answered rows."""
    home = tmp_path_factory.mktemp("rows")
    lines = [{"text": text, "label": NAMES[i % 3]} for i, text in enumerate(tiny.sentences(60))]
    found = ("--model", model, "--task", write(home / "rows.jsonl", lines), "--store", home / "store")
    run("extract", *found, "--objective", "label-text", "--for", "probe,lst", "--format", "float32")
    return found


def test_answers_go_on_with_a_text_and_differ_in_their_first_token():
    tokenizer = decoders.tokenizer()
    answers = answer_ids(tokenizer, NAMES)
    assert [tokenizer.decode(ids) for ids in answers] == [f" {name}</s>" for name in NAMES]
    sources = ["the cat sees a dog", "a bird"]
    gold = encode_answers(tokenizer, sources, answers, [2, 0], 100, "right")
    asked = encode_answers(tokenizer, sources, answers, None, 100, "right")
    for i, (taught, alone) in enumerate(zip(gold.ids, asked.ids, strict=True)):
        assert taught[: len(alone)] == alone and tokenizer.decode(alone) == f"<s> {sources[i]}"
        assert gold.metas[i]["decide"] == asked.metas[i]["decide"] == len(alone) - 1
        assert gold.metas[i]["learn"] == [[len(alone), len(taught)]] and asked.metas[i]["learn"] == []
    for side, kept in (("left", "a dog"), ("right", "the cat")):
        cut = encode_answers(tokenizer, sources, answers, [2, 2], len(answers[2]) + 2, side)
        assert cut.truncated == [True, True] and cut.ids[0][2:] == answers[2]
        assert tokenizer.decode(cut.ids[0][:2]).replace("<s>", "").strip() in kept
    with pytest.raises(UserError, match="leaves no token"):
        encode_answers(tokenizer, sources, answers, None, 3, "right")
    with pytest.raises(UserError, match="'red dog' and 'red house' begin with the same token"):
        answer_ids(tokenizer, ("red dog", "a bird", "red house"))
    begun = answer_ids(tokenizer, ("red dog", "red house"))  # all begin alike: what follows tells them apart
    (ids,) = encode_answers(tokenizer, ["a bird"], begun, None, 100, "right").ids
    assert tokenizer.decode(ids) == "<s> a bird red"


def test_a_class_is_answered_by_its_name(common, model, tmp_path):
    (space,) = Store.open(str(common[-1])).spaces()
    tables = {t.split: space.read_table(t) for t in space.tables()}
    assert all(meta["learn"] == [] for split in ("validation", "test") for meta in tables[split].metas)
    how = ("--tuner", "lst", "--reduction", 4, "--epochs", 2, "--batch-size", 8, "--seed", 3)
    cached = run("train", *common, *how, "--out", tmp_path / "cached")
    live = run("train", *common, *how, "--objective", "label-text", "--live", "--out", tmp_path / "live")
    assert cached["test"]["accuracy"] == live["test"]["accuracy"]
    assert worst_of(losses(tmp_path / "cached"), losses(tmp_path / "live")) <= 1e-5
    told = run("evaluate", tmp_path / "cached", "--generate")
    assert told["accuracy"] == cached["test"]["accuracy"]
    assert told["generated"]["accuracy"] <= told["generated"]["in_targets"]  # what is right is a label
    (entry,) = run("predict", tmp_path / "cached", "--input", write(tmp_path / "new.jsonl", [{"text": "a bird"}]))[
        "predictions"
    ]
    assert entry["label"] in NAMES and 1 / 3 <= entry["probability"] <= 1


def test_a_probe_at_its_start_answers_as_the_model_does(common, model, tmp_path):
    run("train", *common, "--tuner", "probe", "--lr", 1e-30, "--max-steps", 1, "--out", tmp_path / "R")
    texts = ["the cat sees a dog", "a bird sleeps", "the red house"]
    entries = run("predict", tmp_path / "R", "--input", write(tmp_path / "new.jsonl", [{"text": t} for t in texts]))
    tokenizer, plain = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    for text, entry in zip(texts, entries["predictions"], strict=True):
        ids = [0, *tokenizer(f"rows text: {text}", add_special_tokens=False)["input_ids"]]
        first = [tokenizer(f"the {name}", add_special_tokens=False)["input_ids"][1] for name in sorted(NAMES)]
        logits = plain(torch.tensor([ids])).logits[0, -1].detach()
        chances = logits[first].softmax(0)
        assert entry["label"] == sorted(NAMES)[int(chances.argmax())]
        assert entry["probability"] == pytest.approx(float(chances.max()), rel=1e-4)


def test_rows_that_hold_their_answers_are_for_nothing_else(common, checkpoints, tmp_path):
    head = ("train", *common, "--tuner", "probe", "--objective", "classification", "--out", tmp_path / "R")
    assert "which it would see" in refused(*head)
    assert "those that do: sherl, head2toe, lst, probe" in refused(
        "train", *common, "--tuner", "unipt", "--out", tmp_path / "R"
    )
    plain = (*common[:-1], tmp_path / "plain")
    run("extract", *plain, "--for", "probe")
    asked = refused("train", *plain, "--tuner", "probe", "--objective", "label-text", "--out", tmp_path / "R")
    assert "extract with --objective label-text" in asked
    assert "--prompt is for language models with --objective label-text" in refused(
        "extract", *plain, "--for", "probe", "--prompt", "say {0}"
    )
    again = ("extract", *plain, "--for", "probe", "--objective", "label-text", "--prompt")
    assert "must hold {0}" in refused(*again, "say it")
    run(*again, "say {0}")  # a space of its own
    assert len(Store.open(str(tmp_path / "plain")).spaces()) == 2


def test_texts_written_after_prompts_are_scored(model, tmp_path):
    words = tiny.sentences(40)
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": a, "completion": f" {b}"} for a, b in pairwise(words)])
    common = ("--model", model, "--task", pairs, "--store", tmp_path / "S")
    run("extract", *common, "--for", "probe")
    run("train", *common, "--tuner", "probe", "--epochs", 1, "--out", tmp_path / "R")
    found = run("evaluate", tmp_path / "R", "--generate", "--max-new-tokens", 5)["generated"]
    assert found.keys() == {"exact_match", "rouge1", "rouge2", "rougeL", "bleu", "rows", "cut"}
    assert found["rows"] == 3 and 0 <= found["cut"] <= 3
    rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
    (space,) = Store.open(str(tmp_path / "S")).spaces()
    test = next(space.read_table(t) for t in space.tables() if t.split == "test")
    asked = [r for fields in test.texts for r in rows if [r["prompt"], r["completion"]] == fields]
    prompts = write(tmp_path / "asked.jsonl", [{"prompt": r["prompt"]} for r in asked])
    told = run("generate", tmp_path / "R", "--input", prompts, "--max-new-tokens", 5)["generated"]
    again = text_scores([t["text"] for t in told], [r["completion"] for r in asked])
    assert {name: found[name] for name in again} == pytest.approx(again)
    assert "for --generate" in refused("evaluate", tmp_path / "R", "--max-new-tokens", 5)


def test_the_last_turn_of_a_conversation_is_written(model, tmp_path):
    chats = write(tmp_path / "chats.jsonl", [{"messages": CHAT}, {"messages": CHAT[:3]}] * 10)
    common = ("--model", model, "--task", chats, "--store", tmp_path / "S")
    run("extract", *common, "--for", "probe")
    run("train", *common, "--tuner", "probe", "--epochs", 1, "--out", tmp_path / "R")
    assert run("evaluate", tmp_path / "R", "--generate", "--max-new-tokens", 3)["generated"]["rows"] == 2


def test_what_cannot_be_written_is_said(model, tmp_path, monkeypatch):
    texts = write(tmp_path / "texts.jsonl", [{"text": t} for t in tiny.sentences(20)])
    common = ("--model", model, "--task", texts, "--store", tmp_path / "S")
    run("extract", *common, "--for", "probe")
    run("train", *common, "--tuner", "probe", "--epochs", 1, "--out", tmp_path / "R")
    assert "texts without a prompt" in refused("evaluate", tmp_path / "R", "--generate")
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError, match="activation-pipeline\\[text-scores\\]"):
        text_scores(["a"], ["a"])


def test_scores_are_those_of_the_libraries():
    told = text_scores(["the cat sat on the mat today", " a b "], ["the cat sat on the mat now", "a b"])
    assert told["exact_match"] == 0.5 and told["rouge1"] == pytest.approx((6 / 7 + 1) / 2)
    assert told["rouge2"] == pytest.approx((5 / 6 + 1) / 2) and told["rougeL"] == pytest.approx((6 / 7 + 1) / 2)
    assert 80 < told["bleu"] < 100
    assert sum(text_scores(["x"], ["y"])[name] for name in ("exact_match", "rouge1")) == 0
