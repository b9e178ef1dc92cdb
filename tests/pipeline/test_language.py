"""Language models by the commands: extract, train, evaluate, generate, compare; live training is cached training."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.cli.main import main
from pipeline.commands.extract import run_extract
from pipeline.commands.train import run_train
from pipeline.jobs.sources import store_source
from pipeline.recipe import Recipe
from pipeline.runs import load_run
from pipeline.store import Store, TaskTable
from pipeline.train.evaluate import predict
from tests import decoders, tiny
from tests.extract.test_completion import CHAT, PLAIN
from tests.pipeline.test_parity import losses, silent, worst_of

TUNERS = "lst,sherl,probe"
QUICK = {("llama", "lst"), ("gemma2", "sherl"), ("gpt_oss", "probe")}
PAIRS = [
    pytest.param(kind, tuner, marks=() if (kind, tuner) in QUICK else pytest.mark.matrix)
    for kind in decoders.TYPES for tuner in TUNERS.split(",")
]  # fmt: skip
# Where Adam's first steps on SHERL's small gradients make 1e-7 into 1e-4: compared without learning.
CHAOTIC = {("gemma3_text", "sherl"), ("arcee", "sherl")}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(*words: object) -> dict:
    result = CliRunner().invoke(main, [*map(str, words), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*words: object) -> str:
    result = CliRunner().invoke(main, [*map(str, words)])
    assert result.exit_code and result.stderr.startswith("error: ") and "Traceback" not in result.output
    return result.stderr


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("texts") / "rows.jsonl", [{"text": t} for t in tiny.sentences(80)])


@pytest.fixture(scope="module")
def llama(tmp_path_factory, texts) -> tuple[Path, Path]:
    """A checkpoint and a store that holds its states of `texts`."""
    home = tmp_path_factory.mktemp("llama")
    folder = decoders.checkpoint(home / "model", template=PLAIN)
    run("extract", "--model", folder, "--task", texts, "--for", TUNERS, "--store", home / "store")
    return folder, home / "store"


def test_the_whole_way(llama, texts, tmp_path):
    folder, store = llama
    common = ("--model", folder, "--task", texts, "--store", store)
    metrics = run("train", *common, "--tuner", "lst", "--epochs", 3, "--batch-size", 8, "--lr", 0.01,
                  "--out", tmp_path / "R")  # fmt: skip
    assert metrics["test"].keys() == {"loss", "perplexity", "token_accuracy"}
    assert metrics["validation"]["loss"] < 5.9  # ln(400) = 6.0 before training
    again = run("evaluate", tmp_path / "R")
    assert {k: again[k] for k in metrics["test"]} == pytest.approx(metrics["test"])
    told = run("generate", tmp_path / "R", "--prompt", "the cat", "--max-new-tokens", 7)
    assert len(told["token_ids"]) == 7 and told["ended"] == "length" and told["generated"][0]["text"] == told["text"]
    both = run("generate", tmp_path / "R", "--prompt", "the cat", "--prompt", "a bird sees", "--max-new-tokens", 7)
    assert both["generated"][0] == told["generated"][0] and both["rows"] == 2
    shown = (
        CliRunner()
        .invoke(main, ["generate", str(tmp_path / "R"), "--prompt", "the cat", "--max-new-tokens", "7"])
        .stdout
    )
    assert shown.rstrip("\n") == told["text"].rstrip("\n")  # as it was written, piece by piece
    rows = [{"text": text} for (text,) in load_run(tmp_path / "R").job.tables["test"].texts]
    found = run("predict", tmp_path / "R", "--input", write(tmp_path / "new.jsonl", rows))["predictions"]
    mean = np.average([f["loss"] for f in found], weights=[f["tokens"] for f in found])
    assert mean == pytest.approx(metrics["test"]["loss"], rel=1e-3)


def test_writing_stops_where_it_is_told_and_reads_files(llama, texts, tmp_path):
    folder, store = llama
    run("train", "--model", folder, "--task", texts, "--store", store, "--tuner", "probe", "--epochs", 1,
        "--out", tmp_path / "R")  # fmt: skip
    whole = run("generate", tmp_path / "R", "--prompt", "the cat", "--max-new-tokens", 20)["text"]
    stop = whole[6:9]
    cut = run("generate", tmp_path / "R", "--prompt", "the cat", "--max-new-tokens", 20, "--stop", stop)
    assert cut["text"] == whole[: whole.index(stop)] and cut["ended"] == "stop"
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "the cat"}, {"prompt": "a bird"}])
    (tmp_path / "prompts.txt").write_text("the cat\n\na bird\n", encoding="utf-8")
    one, two = (
        run("generate", tmp_path / "R", "--input", file, "--max-new-tokens", 4)
        for file in (prompts, tmp_path / "prompts.txt")
    )
    assert one == two and [entry["prompt"] for entry in one["generated"]] == ["the cat", "a bird"]
    (tmp_path / "odd.txt").write_text("\ufeffthe\u2028cat\r\na\x85bird\n", encoding="utf-8", newline="")
    odd = run("generate", tmp_path / "R", "--input", tmp_path / "odd.txt", "--max-new-tokens", 1)["generated"]
    assert [entry["prompt"] for entry in odd] == ["the\u2028cat", "a\x85bird"]
    drawn = ("generate", tmp_path / "R", "--prompt", "the cat", "--max-new-tokens", 9, "--temperature", 2, "--seed")
    assert run(*drawn, 1) == run(*drawn, 1) != run(*drawn, 2)
    chat = write(tmp_path / "chat.jsonl", [{"messages": CHAT[:2]}])
    assert run("generate", tmp_path / "R", "--input", chat, "--max-new-tokens", 3)["rows"] == 1
    run("generate", tmp_path / "R", "--input", prompts, "--output", tmp_path / "out.jsonl")
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    assert "there are no prompts" in refused("generate", tmp_path / "R")
    assert "--top-k" in refused("generate", tmp_path / "R", "--prompt", "a", "--top-k", 3)
    assert "cannot be read" in refused("generate", tmp_path / "R", "--input", tmp_path / "none.txt")


def test_conversations_train_on_the_assistants_tokens(tmp_path):
    chats = write(tmp_path / "chats.jsonl", [{"messages": CHAT}, {"messages": CHAT[:3]}] * 10)
    folder, store = decoders.checkpoint(tmp_path / "model", template=PLAIN), tmp_path / "store"
    run("extract", "--model", folder, "--task", chats, "--for", "probe", "--store", store)
    (space,) = Store.open(str(store)).spaces()
    table = next(space.read_table(t) for t in space.tables() if t.split == "train")
    assert {len(meta["learn"]) for meta in table.metas} == {1, 2} and set(table.labels) == {None}
    assert len(set(table.keys)) == 2  # states of a text are stored once
    metrics = run("train", "--model", folder, "--task", chats, "--store", store, "--tuner", "probe", "--epochs", 2,
                  "--out", tmp_path / "R")  # fmt: skip
    assert run("generate", tmp_path / "R", "--prompt", "a bird?", "--max-new-tokens", 3)["rows"] == 1
    told = run("predict", tmp_path / "R", "--input", chats)["predictions"]
    assert {t["tokens"] for t in told} == {sum(b - a for a, b in m["learn"]) for m in table.metas}
    each = {t["tokens"]: t["loss"] for t in told}  # of the two conversations; stored rows repeat them
    held = next(space.read_table(t) for t in space.tables() if t.split == "validation")
    counts = [sum(b - a for a, b in m["learn"]) for m in held.metas]
    mean = np.average([each[n] for n in counts], weights=counts)
    assert metrics["validation"]["loss"] == pytest.approx(mean, rel=1e-3)
    wrong = write(tmp_path / "wrong.jsonl", [{"messages": "hello"}])
    assert "is no list of messages" in refused("predict", tmp_path / "R", "--input", wrong)
    file = folder / "chat_template.jinja"  # other prompts than the run has learned from
    file.write_text(file.read_text().replace("]: ", "] says: "))
    assert "tokenizer is" in refused("generate", tmp_path / "R", "--prompt", "a bird?")
    assert "tokenizer is" in refused("train", "--model", folder, "--task", chats, "--store", store, "--tuner", "probe")


@pytest.mark.parametrize(("kind", "tuner"), PAIRS)
def test_live_is_cached_over_20_steps(tmp_path, texts, kind, tuner):
    folder = decoders.checkpoint(tmp_path / "model", kind)
    options = {"model": str(folder), "task": str(texts), "store": str(tmp_path / "store"), "format": "float32"}
    run_extract(Recipe(**options, tuners=(tuner,)), silent, quiet=True)
    own = {} if tuner == "probe" else {"reduction": 4}
    # The backbone rounds otherwise in other batches. A small rate keeps that from growing from step to step.
    rate = 1e-12 if (kind, tuner) in CHAOTIC else 3e-4
    how = {"tuner": tuner, "epochs": 5, "max_steps": 20, "batch_size": 16, "seed": 5, "lr": rate, "tuner_options": own}
    for live in (False, True):
        run_train(Recipe(**options, **how, live=live, out=str(tmp_path / f"live-{live}")), silent, quiet=True)
    cached, live = losses(tmp_path / "live-False"), losses(tmp_path / "live-True")
    assert len(cached) == len(live) == 20 and len(set(cached)) > 15
    assert worst_of(cached, live) <= 1e-5


def test_long_texts_in_windows(llama, tmp_path):
    """Perplexity is over whole texts; live training is cached training; a text's windows are one entry of predict."""
    folder, words = llama[0], tiny.sentences(120)
    texts = [" ".join(words[5 * i : 5 * i + 1 + i % 5]) for i in range(24)]
    rows = write(tmp_path / "long.jsonl", [{"text": t} for t in texts])
    common = ("--model", folder, "--task", rows, "--store", tmp_path / "S")
    sized = ("--max-length", 12, "--stride", 8)
    shown = CliRunner().invoke(main, [*map(str, ("extract", *common, *sized, "--for", "lst", "--format", "float32"))])
    told = re.search(r"(\d+) texts longer than 12 tokens became (\d+) samples", shown.output)
    (space,) = Store.open(str(tmp_path / "S")).spaces()
    tables = {t.split: space.read_table(t) for t in space.tables()}
    assert space.identity["stride"] == 8
    metas = [meta for t in tables.values() for meta in t.metas]
    firsts = [meta.get("window", [1, 1])[0] == 1 for meta in metas]
    assert firsts == [bool(fields) for t in tables.values() for fields in t.texts] and sum(firsts) == 24
    pieces = sum("window" in meta for meta in metas)
    assert told and (int(told[1]), int(told[2])) == (
        sum(f and "window" in m for f, m in zip(firsts, metas, strict=True)),
        pieces,
    )
    how = ("--tuner", "lst", "--reduction", 4, "--epochs", 2, "--batch-size", 8, "--seed", 5)
    cached = run("train", *common, *how, "--out", tmp_path / "cached")
    live = run("train", *common, *how, "--live", "--out", tmp_path / "live")
    assert live["test"] == pytest.approx(cached["test"], rel=1e-5)
    assert worst_of(losses(tmp_path / "cached"), losses(tmp_path / "live")) <= 1e-5
    run("train", *common, *how, "--limit", 9, "--live", "--out", tmp_path / "few")  # ends within a text
    assert "stride is 8, asked for 4" in refused("train", *common, *how, "--stride", 4, "--out", tmp_path / "R")
    _frozen_perplexity(folder, common, tables["test"], tmp_path)


def _frozen_perplexity(folder: Path, common: tuple, test: TaskTable, home: Path) -> None:
    """A probe at its start is the frozen model: its figure is that of sliding windows by the library's own model."""
    run("extract", *common, "--max-length", 12, "--stride", 8, "--for", "probe", "--format", "float32")
    run("train", *common, "--tuner", "probe", "--lr", 1e-30, "--max-steps", 1, "--out", home / "frozen")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    nats, count, whole = 0.0, 0, []
    for text in [fields[0] for fields in test.texts if fields]:
        ids = [0, *tokenizer(text, add_special_tokens=False)["input_ids"], 2]
        own, end = [], 1
        for begin in range(0, len(ids), 8):
            part = torch.tensor(ids[begin : begin + 12])
            chance = model(part[None]).logits[0].log_softmax(-1).detach()
            own += [-float(chance[i - 1, part[i]]) for i in range(end - begin, len(part))]
            end = begin + len(part)
            if end == len(ids):
                break
        assert len(own) == len(ids) - 1
        nats, count, whole = nats + sum(own), count + len(own), [*whole, sum(own) / len(own)]
    assert run("evaluate", home / "frozen")["loss"] == pytest.approx(nats / count, rel=1e-4)
    new = write(home / "new.jsonl", [{"text": fields[0]} for fields in test.texts if fields])
    entries = run("predict", home / "frozen", "--input", new)["predictions"]
    assert [entry["loss"] for entry in entries] == pytest.approx(whole, rel=1e-4)
    assert sum(entry["tokens"] for entry in entries) == count


def test_odd_texts_are_said_or_read_as_they_are(llama, tmp_path):
    """A special token spelled out is said; a line separator inside a text ends no row; a long prompt is said."""
    words = tiny.sentences(30)
    common = ("extract", "--model", llama[0], "--store", tmp_path / "S", "--for", "probe", "--task")
    texts = [f"{a}\u2028{a}" for a in words[:20]] + ["the </s> cat"]
    rows = tmp_path / "odd.jsonl"
    rows.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), encoding="utf-8")
    shown = CliRunner().invoke(main, [*map(str, (*common, rows))])
    assert shown.exit_code == 0 and "rows: train 17, validation 2, test 2" in shown.output
    assert "1 row with a special token of the tokenizer spelled out, such as '</s>'" in shown.output
    pairs = [{"prompt": a, "completion": " a dog"} for a in words]
    long = write(tmp_path / "long.jsonl", [*pairs[:12], {"prompt": " ".join(words), "completion": " a dog"}])
    assert "--stride N splits a text instead" in refused(*common, long, "--max-length", 20)
    split = CliRunner().invoke(main, [*map(str, (*common, long, "--max-length", 20, "--stride", 10))])
    assert re.search(r"1 text longer than 20 tokens became 1 sample; \d+ more hold no token to learn", split.output), (
        split.output
    )
    empty = write(tmp_path / "empty.jsonl", [*pairs[:12], {"prompt": "a", "completion": ""}])
    assert "has no token to learn" in refused(*common, empty)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--max-length", 8, "--stride", 8), "--stride: from 1 to below --max-length 8"),
        (("--stride", 0), "--stride: at least 1"),
        (("--stride", 4, "--truncation-side", "left"), "nothing is cut"),
    ],
)
def test_a_stride_that_cannot_be_is_refused(llama, texts, tmp_path, given, said):
    assert said in refused("extract", "--model", llama[0], "--task", texts, "--store", tmp_path / "S", *given)
    assert not (tmp_path / "S").exists()


def test_a_stride_is_for_texts_that_are_gone_on_with(llama, checkpoints, table, tmp_path):
    common = ("--task", table, "--text", "first", "--label", "label", "--store", tmp_path / "S", "--stride", 4)
    assert "judged as a whole" in refused("extract", "--model", llama[0], *common)
    assert "bert ones do not" in refused("extract", "--model", checkpoints["bert"], *common)


def test_live_baselines_stand_beside_tuners(llama, texts, tmp_path):
    folder, store = llama
    told = run("compare", "--model", folder, "--task", texts, "--store", store, "--epochs", 1,
               "--tuners", "probe,lora,full,norm-tuning", "--out", tmp_path / "both")  # fmt: skip
    by_name = {row["method"]: row for row in told["rows"]}
    assert by_name["full"]["share"] == 1.0 and all(row["figure"] == "loss" for row in told["rows"])
    assert by_name["norm-tuning"]["trainable"] == 9 * 32


def test_what_cannot_be_is_said(llama, texts, tmp_path, checkpoints):
    folder, store = llama
    common = ("--model", folder, "--task", texts, "--store", store, "--out", tmp_path / "R")
    assert "unipt does not; those that do: sherl, head2toe, lst, probe" in refused("train", *common, "--tuner", "unipt")
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "a", "completion": "b"}] * 9)
    other = ("extract", "--model", checkpoints["bert"], "--task", pairs, "--store", tmp_path / "S")
    assert "bert backbones do not" in refused(*other)
    assert not (tmp_path / "S").exists()
    short = ("extract", "--model", folder, "--task", texts, "--store", tmp_path / "S", "--max-length", 1)
    assert "rows, train row 1 has no token to learn" in refused(*short)
    chats = write(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 9)
    bare = decoders.checkpoint(tmp_path / "bare")
    assert "chats, train row 1: the tokenizer has no chat template" in refused(
        "extract", "--model", bare, "--task", chats, "--store", tmp_path / "S"
    )


def test_a_class_can_be_read_off_the_last_token(llama, tmp_path, table):
    folder, _ = llama
    common = ("--model", folder, "--task", table, "--text", "first", "--label", "label", "--store", tmp_path / "S")
    run("extract", *common, "--for", "probe")
    found = run("train", *common, "--tuner", "probe", "--pooling", "last", "--epochs", 1, "--out", tmp_path / "R")
    loaded = load_run(tmp_path / "R")
    rows = loaded.job.tables["test"]
    new = write(tmp_path / "new.jsonl", [{"first": text} for (text,) in rows.texts])
    told = run("predict", tmp_path / "R", "--input", new)["predictions"]
    stored = predict(loaded.model, store_source(loaded.job, "test", 16))
    assert [t["probability"] for t in told] == pytest.approx([s["probability"] for s in stored], abs=1e-3)
    right = [entry["label"] == loaded.job.spec.labels[label] for entry, label in zip(told, rows.labels, strict=True)]
    assert found["test"]["accuracy"] == pytest.approx(np.mean(right))
    assert "this one's is classification" in refused("generate", tmp_path / "R", "--prompt", "a")
