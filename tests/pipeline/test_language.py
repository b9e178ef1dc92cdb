"""Language models by the commands: extract, train, evaluate, generate, compare; live training is cached training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.cli.main import main
from pipeline.commands.extract import run_extract
from pipeline.commands.train import run_train
from pipeline.recipe import Recipe
from pipeline.store import Store
from tests import decoders, tiny
from tests.extract.test_completion import CHAT, PLAIN
from tests.pipeline.test_parity import losses, silent, worst_of

TUNERS = "lst,sherl,probe"
QUICK = {("llama", "lst"), ("gemma2", "sherl"), ("gpt_oss", "probe")}
PAIRS = [
    pytest.param(kind, tuner, marks=() if (kind, tuner) in QUICK else pytest.mark.matrix)
    for kind in decoders.TYPES for tuner in TUNERS.split(",")
]  # fmt: skip


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
    found = run("predict", tmp_path / "R", "--input", write(tmp_path / "new.jsonl", [{"text": "the cat sleeps"}]))
    assert found["predictions"][0]["tokens"] >= 4 and found["predictions"][0]["loss"] > 0


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
    assert metrics["validation"]["loss"] > 0
    assert run("generate", tmp_path / "R", "--prompt", "a bird?", "--max-new-tokens", 3)["rows"] == 1
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
    how = {"tuner": tuner, "epochs": 5, "max_steps": 20, "batch_size": 16, "seed": 5, "tuner_options": own}
    for live in (False, True):
        run_train(Recipe(**options, **how, live=live, out=str(tmp_path / f"live-{live}")), silent, quiet=True)
    cached, live = losses(tmp_path / "live-False"), losses(tmp_path / "live-True")
    assert len(cached) == len(live) == 20 and len(set(cached)) == 20
    assert worst_of(cached, live) <= 1e-5


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
    assert "unipt does not; those that do: sherl, lst, probe" in refused("train", *common, "--tuner", "unipt")
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
    assert 0 <= found["test"]["accuracy"] <= 1
    assert "this one's is classification" in refused("generate", tmp_path / "R", "--prompt", "a")
