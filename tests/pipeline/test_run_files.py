"""What a finished run is read from: files as they were written, each option once; scores as at the end of training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import pipeline
from pipeline.recipe import Recipe, read_recipe
from pipeline.store import UserError
from pipeline.store.errors import Notice
from pipeline.train.features import Feature
from pipeline.train.fit import run_files as checkpoint
from pipeline.train.fit.finite import NotFinite
from pipeline.train.model import Model
from pipeline.train.objectives.classification import ClassHead
from pipeline.train.objectives.regression import NumberHead
from pipeline.train.tuners.probe import Probe
from tests.pipeline.test_errors import refused, run

WORDS = ["--text", "first", "--text-pair", "second", "--label", "label"]


@pytest.fixture(scope="module")
def trained(checkpoints, table, tmp_path_factory) -> tuple[Path, dict]:
    """A probe's run in bfloat16, and its metrics."""
    folder = tmp_path_factory.mktemp("trained")
    options = ["--model", checkpoints["bert"], "--task", table, "--store", folder / "store"]
    result = run("extract", *options, *WORDS, "--for", "probe")
    assert result.exit_code == 0, result.output
    more = ["--tuner", "probe", "--epochs", 2, "--batch-size", 16, "--train-precision", "bfloat16", "--pooling", "mean"]
    result = run("train", *options, *more, "--out", folder / "run", "--json")
    assert result.exit_code == 0, result.output
    return folder / "run", json.loads(result.stdout)


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def test_a_flipped_bit_in_a_tuner_is_refused(trained, copy):
    flip(copy / "tuner.safetensors", -9)
    refused(run("evaluate", copy), "tuner.safetensors", "damaged")
    refused(run("predict", copy, "--input", trained[0] / "recipe.yaml"), "tuner.safetensors")


def test_a_changed_recipe_is_refused_as_a_record_and_noted_as_a_recipe(trained, copy, tmp_path):
    recipe = copy / "recipe.yaml"
    text = recipe.read_text()
    assert read_recipe(recipe, record=True)["objective_options"] == {"pooling": "mean"}
    recipe.write_text(text.replace("pooling: mean", "pooling: first"))
    refused(run("evaluate", copy), "recipe.yaml", "digest")
    again = run("train", "--recipe", recipe, "--out", tmp_path / "again", "--epochs", 1)
    assert again.exit_code == 0, again.output
    assert [line for line in again.stderr.splitlines() if line.startswith("note:") and "changed" in line]
    recipe.write_text(text.replace("\n", "\r\n").replace("# probe", "# my favourite probe"))
    assert run("evaluate", copy).exit_code == 0  # what nobody reads may change
    assert "note:" not in run("evaluate", copy).stderr


def test_a_run_without_digests_loads_with_one_line(trained, copy):
    tuner, recipe = copy / "tuner.safetensors", copy / "recipe.yaml"
    tensors, info = checkpoint.load(tuner)
    save_file(tensors, tuner, metadata={"pipeline": json.dumps(info)})
    recipe.write_text("".join(x for x in recipe.read_text().splitlines(True) if "xxh3" not in x))
    found = run("evaluate", copy, "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["accuracy"] == trained[1]["test"]["accuracy"]
    assert len([line for line in found.stderr.splitlines() if "no digest" in line]) == 1
    with pytest.warns(Notice, match="no digest"):
        pipeline.load_run(copy)


def test_a_run_is_scored_in_the_precision_it_was_trained_in(trained, monkeypatch):
    folder, metrics = trained
    seen = []
    real = Probe.forward

    def forward(self, batch):
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return real(self, batch)

    monkeypatch.setattr(Probe, "forward", forward)
    loaded = pipeline.load_run(folder)
    assert loaded.evaluate("test") == metrics["test"]
    assert set(seen) == {torch.bfloat16}


def test_predictions_are_never_made_of_nan(trained, monkeypatch):
    loaded = pipeline.load_run(trained[0])
    with torch.no_grad():
        loaded.model.head.linear.weight.fill_(torch.nan)
    with pytest.raises(NotFinite, match=r"NaN in \d+ of \d+ rows"):
        loaded.evaluate("test")


@pytest.mark.parametrize("kind", [ClassHead, NumberHead])
def test_one_nan_among_many_is_refused(kind):
    from pipeline.extract.batch import Batch

    head = kind({"a": Feature(4)}, 3 if kind is ClassHead else 1, "mean")
    rows = torch.randn(5, 4)
    batch = Batch({}, {}, {"encoder": np.ones(5, np.int64)})
    assert head.predict({"a": rows}, batch)["label"].shape == (5,)
    rows[3, 1] = torch.nan
    with pytest.raises(NotFinite, match="in 1 of 5 rows"):
        head.predict({"a": rows}, batch)


def test_a_text_to_text_head_refuses_nan_too(checkpoints, pictures):
    from pipeline.extract.pretrained import Checkpoint
    from tests.train.conformance import Case

    case = Case(Checkpoint(checkpoints["t5"], "t5"), "sherl", pictures)
    model: Model = case.model().eval()
    rows = {name: torch.full_like(rows, torch.nan) for name, rows in model(case.batch()).items()}
    with pytest.raises(NotFinite, match="NaN"):
        model.head.predict(rows, case.batch())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: 0.1\nseed: 3\nlr: 0.2\n", ("lr", "lines 1 and 3")),
        ("{lr: 0.1, lr: 0.2}\n", ("lr", "line 1")),
        ("max-length: 7\nmax_length: 9\n", ("--max-length", "max_length")),
        ("for: probe\ntuners: lst\n", ("--for", "tuners")),
    ],
)
def test_an_option_given_twice_is_refused(tmp_path, text, words):
    (tmp_path / "twice.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_recipe(tmp_path / "twice.yaml")
    assert all(word in str(caught.value) for word in (*words, "twice")) and "\n" not in str(caught.value)


def test_every_flipped_bit_in_a_recipe_that_says_something_is_noticed(tmp_path):
    path = tmp_path / "recipe.yaml"
    text = Recipe(task="rte", lr=0.25, tuner_options={"layers": (1, 2)}).to_yaml("a run").encode()
    path.write_bytes(text)
    whole = read_recipe(path, record=True)
    for place in range(0, len(text), 7):
        damaged = bytearray(text)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            assert read_recipe(path, record=True) == whole, damaged[place - 20 : place + 20]
        except UserError as error:
            assert "\n" not in str(error)


def more_of(trained: tuple[Path, dict]) -> list[object]:
    """The options of `trained`, all but its folder."""
    store = trained[0].parent / "store"
    task = read_recipe(trained[0] / "recipe.yaml")["task"]
    fixed = ["--tuner", "probe", "--epochs", 2, "--batch-size", 16, "--train-precision", "bfloat16"]
    return ["train", "--task", task, "--store", store, *WORDS, *fixed]


def test_a_refused_training_leaves_the_recipe_as_it_was(trained, tmp_path, monkeypatch):
    """Of an unfinished run, which may hold a tuner already."""
    from pipeline.train.fit.loop import Training

    def stop(self, test) -> None:
        raise UserError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(Training, "finish", stop)
        first = run(*more_of(trained), "--pooling", "mean", "--out", tmp_path / "run")
    assert first.exit_code != 0 and (tmp_path / "run/resume.safetensors").exists(), first.output
    before = (tmp_path / "run/recipe.yaml").read_bytes()
    refused(run(*more_of(trained), "--pooling", "last", "--out", tmp_path / "run"), "unfinished run", "pooling")
    assert (tmp_path / "run/recipe.yaml").read_bytes() == before
    done = run(*more_of(trained), "--pooling", "mean", "--out", tmp_path / "run", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["validation"] == trained[1]["validation"]


def test_a_recipe_never_stands_beside_the_tuner_of_another(trained, copy, monkeypatch):
    """--overwrite that is killed at any moment: the old tuner goes before the new recipe comes."""
    from pipeline.commands import train

    seen = []
    real = train.write_recipe

    def looked(folder, *more):
        seen.append(sorted(p.name for p in folder.iterdir() if p.name.endswith(("safetensors", "metrics.json"))))
        real(folder, *more)

    monkeypatch.setattr(train, "write_recipe", looked)
    done = run(*more_of(trained), "--pooling", "last", "--overwrite", "--out", copy)
    assert done.exit_code == 0 and seen == [[]], done.output


def test_a_recipe_and_a_tuner_of_two_runs_are_refused(trained, copy, tmp_path):
    """Each whole: restored from two copies of one folder, say."""
    done = run(*more_of(trained), "--pooling", "last", "--out", tmp_path / "other")
    assert done.exit_code == 0, done.output
    shutil.copy(tmp_path / "other/recipe.yaml", copy / "recipe.yaml")
    refused(run("evaluate", copy), "pooling", "'last'", "'mean'", "of two runs")
