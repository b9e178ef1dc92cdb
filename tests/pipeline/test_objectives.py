"""Several labels a row and a tag a word, from the command line: extract, train, evaluate, predict; and rows without
labels. The label of a row follows from its text, so that one can be learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import pipeline
from pipeline.extract.tasks import load_task
from pipeline.recipe import Recipe, read_recipe
from pipeline.store.errors import UserError
from tests import tiny
from tests.pipeline.test_errors import refused
from tests.pipeline.test_errors import run as invoke

ANIMALS = {"cat": "B-CAT", "dog": "B-DOG", "old": "B-AGE", "young": "B-AGE"}


def run(*args: object) -> dict[str, Any]:
    """What a command that succeeds prints as JSON."""
    result = invoke(*args, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def tags(text: str) -> list[str]:
    """A word of ANIMALS begins a span; what follows "old" or "young" is inside it."""
    found: list[str] = []
    for word in text.split():
        found.append(ANIMALS.get(word, "I-AGE" if found and found[-1] == "B-AGE" else "O"))
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints and one file of each kind."""
    folder = tmp_path_factory.mktemp("objectives")
    tiny.bert(folder / "bert")
    tiny.t5(folder / "t5")
    texts = tiny.sentences(60)
    with (folder / "words.conll").open("w") as file:
        for text in texts:
            file.write("".join(f"{w}\tX\t{t}\n" for w, t in zip(text.split(), tags(text), strict=True)) + "\n")
    lines = [{"id": f"n{i}", "words": t.split(), "tags": tags(t)} for i, t in enumerate(texts)]
    (folder / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    topics = [[a for a in ("cat", "dog", "bird") if a in t] for t in texts]
    rows = [f"{t},{'; '.join(of)}\n" for t, of in zip(texts, topics, strict=True)]
    (folder / "topics.csv").write_text("text,topics\n" + "".join(rows))
    (folder / "plain.csv").write_text("text\n" + "".join(f"{t}\n" for t in texts))
    return folder


def cached_is_live(made: Path, task: list[Any], model: str, tuner: str, out: Path) -> dict[str, Any]:
    """Extract, train from the store and live; losses and scores must be the same. Returns the figures."""
    options = ["--model", made / model, *task, "--store", out / "store"]
    run("extract", *options, "--for", tuner, "--format", "float32")
    train = ["--tuner", tuner, "--epochs", 2, "--batch-size", 16, "--lr", 0.02, "--warmup-steps", 0, "--device", "cpu"]
    cached = run("train", *options, *train, "--out", out / "cached")
    live = run("train", *options, *train, "--out", out / "live", "--live")
    assert cached["validation"] == pytest.approx(live["validation"], abs=1e-6)
    losses = [
        [line["loss"] for line in map(json.loads, (out / f / "log.jsonl").read_text().splitlines()) if "loss" in line]
        for f in ("cached", "live")
    ]
    assert losses[0] and losses[0] == pytest.approx(losses[1], rel=1e-4)
    scored = run("evaluate", out / "cached")
    assert {k: v for k, v in scored.items() if k in cached["test"]} == cached["test"]
    return cached


@pytest.mark.parametrize(("model", "file"), [("bert", "words.conll"), ("t5", "words.jsonl")])
def test_tags(made: Path, tmp_path: Path, model: str, file: str) -> None:
    task = ["--task", made / file, *(["--text", "words", "--label", "tags"] if "json" in file else [])]
    figures = cached_is_live(made, task, model, "probe", tmp_path)
    assert {"f1", "precision", "recall", "accuracy"} <= figures["test"].keys() and figures["test"]["accuracy"] > 0.5
    new = tmp_path / "new.jsonl"
    new.write_text(json.dumps({"id": "mine", "1": "a cat sees", "words": ["a", "cat", "sees"]}) + "\n")
    (entry,) = run("predict", tmp_path / "cached", "--input", new)["predictions"]
    assert entry["id"] == "mine" and len(entry["tags"]) == 3
    assert set(entry["tags"]) <= {"O", "B-CAT", "B-DOG", "B-AGE", "I-AGE"}


def test_several_labels(made: Path, tmp_path: Path) -> None:
    task = ["--task", made / "topics.csv", "--label", "topics", "--separator", ";"]
    figures = cached_is_live(made, task, "bert", "sherl", tmp_path)
    assert {"micro_f1", "macro_f1", "map"} <= figures["test"].keys()
    told = run("predict", tmp_path / "cached", "--input", made / "plain.csv")["predictions"]
    assert len(told) == 60 and all(set(t["labels"]) <= {"cat", "dog", "bird"} for t in told)


def test_rows_without_labels(made: Path, tmp_path: Path) -> None:
    """Their states can be streamed; training says what is missing."""
    options = ["--model", made / "bert", "--task", made / "plain.csv", "--store", tmp_path / "store"]
    run("extract", *options, "--for", "probe")
    states = ["encoder.3"]
    batches = list(pipeline.open_store(tmp_path / "store").stream(task="plain", states=states, batch_size=16))
    assert sum(len(b) for b in batches) == 48 and all(b.targets is None for b in batches)
    refused(invoke("train", *options, "--tuner", "probe", "--out", tmp_path / "run"), "no targets", "--label")
    assert not (tmp_path / "run").exists()


def test_an_objective_for_other_targets_is_refused(made: Path, tmp_path: Path) -> None:
    where = ["--model", made / "bert", "--store", tmp_path / "store"]
    text = ["--task", made / "plain.csv", "--label", "text"]
    refused(invoke("extract", *where, *text, "--objective", "multilabel"), "--separator")
    refused(invoke("extract", *where, *text, "--objective", "ranking"), "unknown objective 'ranking'")
    refused(invoke("extract", *where, "--task", made / "words.conll", "--objective", "regression"), "type tags")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("bad", [["a", ""], ["a b"], []])
def test_what_is_no_word_is_refused(tmp_path: Path, bad: list[str]) -> None:
    lines = [{"words": words, "tags": ["O", "B"][: len(words)]} for words in (["x", "y"], bad)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"row 2 \(line 2\)"):
        load_task(str(tmp_path / "t.jsonl"))


def test_what_recipes_called_kind_is_the_objective(tmp_path: Path) -> None:
    old = {"task": "t", "kind": "regression"}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old))
    assert read_recipe(tmp_path / "old.yaml") == {"task": "t", "objective": "regression"}
    assert "kind" not in Recipe().to_mapping()
