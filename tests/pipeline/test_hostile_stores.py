"""Stores whose every digest is right and whose content is not: one line each, at the door, and no memory spent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.cli.command import printable
from pipeline.commands.train import run_train
from pipeline.owners import recipe_of
from pipeline.recipe import Recipe
from pipeline.runs import load_run
from pipeline.store import Store
from pipeline.store.errors import UserError
from pipeline.store.format.digest import canonical_json, digest_bytes
from pipeline.store.format.document import dump_document
from pipeline.store.tables import parquet
from tests.pipeline.test_errors import refused, run
from tests.store.test_damage import rewrite_manifest

Change = Callable[[Any], Any]


@pytest.fixture(scope="module")
def sound(checkpoints, table, tmp_path_factory) -> Path:
    store = tmp_path_factory.mktemp("sound") / "store"
    options = ["--task", table, "--text", "first", "--text-pair", "second", "--label", "label", "--limit", 24]
    assert run("extract", "--model", checkpoints["bert"], *options, "--store", store, "--for", "sherl").exit_code == 0
    return store


@pytest.fixture
def store(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "store"))


def only(store: Path, pattern: str) -> Path:
    (found,) = store.glob(pattern)
    return found


def change_weights(store: Path, name: str, change: Change) -> None:
    """Change a kept file and list it anew."""
    path = only(store, f"weights/*/{name}")
    if name.endswith(".json"):
        document = json.loads(path.read_text())
        path.write_text(json.dumps(change(document) or document))
    else:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
    manifest = path.with_name("manifest.json")
    document = json.loads(manifest.read_text())
    del document["xxh3"]
    for entry in document["files"]:
        data = path.with_name(entry["name"]).read_bytes()
        entry.update(size=len(data), xxh3=digest_bytes(data))
    manifest.write_bytes(dump_document(document))


def change_tables(store: Path, change: Callable[[dict[str, Any], list[Any]], None]) -> None:
    """Change header and rows ([key, label, texts] each) of every task table and name it anew."""
    for path in store.glob("spaces/*/tasks/*/*.parquet"):
        count = int(path.name.rsplit("-", 2)[1])
        header, (keys, labels, texts, *others) = parquet.read_rows(path.read_bytes(), count, str(path))
        rows = [list(row) for row in zip(keys, labels, texts, strict=True)]
        change(header, rows)
        columns = ([row[i] for row in rows] for i in range(3))
        data = parquet.dump(header, *columns, *others)
        path.unlink()
        path.with_name(f"{path.name.rsplit('-', 1)[0]}-{digest_bytes(data)[:16]}.parquet").write_bytes(data)


def change_identity(store: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the identity, and name the space and all its segments after it."""
    path = only(store, "spaces/*/space.json")
    document = json.loads(path.read_text())
    del document["xxh3"]
    change(document["identity"])
    document["id"] = digest_bytes(canonical_json(document["identity"]))
    path.write_bytes(dump_document(document))
    for segment in path.parent.glob("segments/*"):
        rewrite_manifest(segment, lambda d: d.update(space=document["id"]))
    path.parent.rename(path.parent.with_name(document["id"]))


def train(store: Path, *more: object) -> Any:
    return run("train", "--task", "pairs", "--store", store, "--out", store.parent / "run", "--epochs", 1, *more)


def setting(*path: Any) -> Change:
    *way, last, value = path

    def change(document: Any) -> None:
        for step in way:
            document = document[step]
        document[last] = value

    return change


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("config.json", setting("num_hidden_layers", 10**9), ["config.json", "num_hidden_layers is 1000000000"]),
        ("config.json", setting("num_hidden_layers", 0), ["config.json", "layers"]),
        ("config.json", setting("num_hidden_layers", "four"), ["config.json"]),
        ("config.json", setting("vocab_size", 10**12), ["config.json", "vocab_size"]),
        ("config.json", setting("vocab_size", 1 << 24), ["word_embeddings", "instead of (16777216, 32)"]),
        ("config.json", setting("hidden_size", 1 << 20), ["live layer", "instead of"]),
        ("config.json", setting("hidden_size", None), []),
        ("config.json", setting("model_type", 5), ["config.json", "model_type"]),
        ("config.json", setting("model_type", "unheard-of"), ["unheard-of"]),
        ("source.json", setting("names", []), ["source.json", "names"]),
        ("source.json", setting("names", [7]), ["source.json", "names"]),
        ("source.json", setting("names", ["a\nspace b"]), ["source.json", "names"]),
        ("tail.safetensors", lambda t: t.pop("layer.output.dense.weight"), ["layer.output.dense.weight is missing"]),
        ("tail.safetensors", lambda t: t.update({"layer.output.dense.weight": torch.zeros(1)}), ["(1,) instead of"]),
        ("tail.safetensors", lambda t: t.update(more=torch.zeros(1)), ["more"]),
    ],
)
def test_kept_of_the_checkpoint(store, name, change, words):
    change_weights(store, name, change)
    assert Store.open(store).verify(deep=True) == []
    refused(train(store), *words)
    assert not (store.parent / "run").exists()


def test_as_many_class_names_as_a_configuration_likes_are_not_made(store):
    change_weights(store, "config.json", setting("num_labels", 10**9))
    result = train(store)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h, rows: rows[0].__setitem__(1, 2), ["label 2 is none of the 2 classes (row 1)"]),
        (lambda h, rows: rows[1].__setitem__(1, -1), ["label -1", "row 2"]),
        (lambda h, rows: (h["spec"].pop("target"), [r.__setitem__(1, 0.5) for r in rows]), ["lacks target"]),
        (lambda h, rows: rows[0].__setitem__(2, []), ["row 1 has 0 texts"]),
        (lambda h, rows: h.update(spec=[]), ["describes no task"]),
        (lambda h, rows: h["spec"].pop("labels"), ["spec.labels"]),
        (lambda h, rows: h["spec"].update(labels=["yes", 4]), ["spec.labels"]),
        (lambda h, rows: h["spec"].update(target="ranking"), ["type of a target"]),
        (lambda h, rows: h["spec"].update(labels=[], values=[1, 1]), ["spec.values"]),
        (lambda h, rows: h["spec"].update(metrics=[]), ["metrics"]),
        (lambda h, rows: h.update(total="many"), ["total"]),
        (lambda h, rows: h.update(version="mine"), ["version"]),
        (lambda h, rows: h.update(provenance="mine"), ["provenance"]),
        (lambda h, rows: h.update(beside=[1]), ["beside"]),
        (lambda h, rows: h.update(candidates=[[1], ["x"]]), ["candidates"]),
        (lambda h, rows: h.update(candidates=[[1]]), ["candidates"]),
        (lambda h, rows: h.update(slots=["a"]), ["slots"]),
        (lambda h, rows: h.update(slots={"a": ["text"]}), ["slots"]),
    ],
)
def test_task_tables(store, change, words):
    change_tables(store, change)
    refused(train(store), "task", *words)


@pytest.mark.parametrize(
    "change",
    [
        setting("max_length", "long"),
        setting("precision", "float8"),
        setting("attention", None),
        setting("prompt", "{0:999999999}"),
        setting("prompt", "{0.__class__}"),
        setting("weights", 5),
        setting("projection", "pca:4"),
    ],
)
def test_identities(store, change):
    change_identity(store, change)
    refused(train(store), "malformed", "identity")


def test_states_of_another_width(store):
    """The store is right in itself; it is not what its backbone gives."""
    change_weights(store, "config.json", lambda c: c.update(hidden_size=64))
    refused(train(store, "--tuner", "probe"))


def test_ids_beyond_the_vocabulary(store):
    (segment,) = store.glob("spaces/*/segments/*")
    path = segment / "encoder.ids" / "c.0"
    values = np.frombuffer(path.read_bytes()[:-4], "<i4").copy()
    values[3] = 10**6
    import google_crc32c

    path.write_bytes(values.tobytes() + int(google_crc32c.value(values.tobytes())).to_bytes(4, "little"))
    rewrite_manifest(segment, lambda d: None)
    assert Store.open(store).verify(deep=True) == []
    refused(train(store), "encoder.ids", "1000000")


def test_provenance_is_shown_and_does_not_act(store):
    """A title bar, a cleared screen, a line drawn over, text that runs backwards: all as what they are."""
    bad = "\x1b]0;owned\x07\x1b[2J\nspace 000000000000  trusted \x9b31m\u202e"
    for segment in store.glob("spaces/*/segments/*"):
        rewrite_manifest(segment, lambda d: d["provenance"].update(user=bad, dataset={"dataset": bad, "licence": bad}))
    result = run("store", "status", "--store", store)
    assert result.exit_code == 0, result.output
    assert not set(result.stdout) & set("\x1b\x07\x9b\u202e")
    assert "\\u001b]0;owned\\u0007" in result.stdout
    assert not any(line.startswith("space 0000") for line in result.stdout.splitlines())
    asked = run("store", "status", "--store", store, "--json")
    assert json.loads(asked.stdout)["spaces"][0]["written"]["by"][0].startswith("\x1b]0;owned")
    assert not set(asked.stdout) & set("\x1b\x07\x9b\u202e")


@pytest.mark.parametrize("provenance", [{"rewritten": 5}, {"rewritten": {"others": 7}}, {"dataset": [1]}, {}])
def test_provenance_of_any_shape(store, provenance):
    for segment in store.glob("spaces/*/segments/*"):
        rewrite_manifest(segment, lambda d: d.update(provenance=provenance))
    assert run("store", "status", "--store", store).exit_code == 0


def test_printable_keeps_what_people_write():
    text = "naïve — 猫 🙂 नमस्ते\n\ttab"
    assert printable(text) == text
    assert printable("\ud800\x00\x7f") == "\\ud800\\u0000\\u007f"


@pytest.mark.parametrize("text", ["[" * 50_000, "task: " + "[" * 50_000 + "]" * 50_000, "{a: " * 20_000])
def test_a_recipe_of_brackets(tmp_path, text):
    (tmp_path / "deep.yaml").write_text(text)
    refused(run("train", "--recipe", tmp_path / "deep.yaml"), "deep.yaml", "nested too deep")


def test_a_recipe_whose_references_nest(tmp_path):
    """Nine lines that would be 10^9 words when written out."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    (tmp_path / "laughs.yaml").write_text("\n".join(["layers: &i0 [1]", *lines]).replace("i: &i", "layers2: &i"))
    refused(run("train", "--recipe", tmp_path / "laughs.yaml"), "laughs.yaml")
    nested: Any = ["x"]
    for _ in range(30):
        nested = [nested] * 10
    with pytest.raises(UserError, match="layers") as error:
        recipe_of("train", ("recipe", {"layers": nested}))
    assert len(str(error.value)) < 5000


@pytest.mark.parametrize("row", [r'{"first": "a \ud800 b", "label": "x"}', r'{"fir\udc00st": "a", "label": "x"}'])
def test_half_a_surrogate_pair_in_json_lines(checkpoints, tmp_path, row):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"first": "good \\ud83d\\ude42", "label": "y"}\n' * 3 + row + "\n")
    options = ["--task", file, "--text", "first", "--label", "label", "--store", tmp_path / "store"]
    refused(run("extract", "--model", checkpoints["bert"], *options), "bad.jsonl, line 4", "surrogate")
    assert not (tmp_path / "store").exists()


def test_what_is_sound_still_trains(store):
    result = run_train(
        Recipe(task="pairs", store=str(store), epochs=1, out=str(store.parent / "run")), lambda text: None
    )
    assert result["stopped"] == "done" and result["test"].items() <= load_run(result["run"]).evaluate("test").items()
