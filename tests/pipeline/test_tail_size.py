"""The size of what trains in a live layer: asked for, or that of a run made when the default was another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.pipeline.test_errors import run


@pytest.fixture(scope="module")
def options(checkpoints, table, tmp_path_factory):
    store = tmp_path_factory.mktemp("tails") / "store"
    options = ["--model", checkpoints["bert"], "--task", table, "--store", store]
    columns = ["--text", "first", "--text-pair", "second", "--label", "label"]
    assert run("extract", *options, *columns, "--for", "sherl").exit_code == 0
    return options


@pytest.mark.parametrize(("tail", "size"), [("lora", 8), ("adapter", 4), ("prompt", 20)])
def test_a_run_keeps_the_size_that_it_was_made_with(options, tmp_path, tail, size):
    folder: Path = tmp_path / "run"
    train = ["--tuner", "sherl", "--reduction", 4, "--epochs", 1, "--tail", tail, "--tail-size", size]
    made = run("train", *options, *train, "--out", folder, "--json")
    assert made.exit_code == 0, made.output
    recipe = folder / "recipe.yaml"
    kept = [line for line in recipe.read_text().splitlines() if not line.startswith(("tail_size:", "# "))]
    recipe.write_text("\n".join(kept) + "\n")  # as runs were written before there was such an option
    found = run("evaluate", folder, "--json")
    assert found.exit_code == 0, found.output
    own = json.loads(made.stdout)
    scores = own["test"] or own["validation"]
    assert json.loads(found.stdout)["average"] == pytest.approx(scores["average"])


def test_a_size_of_nothing_is_refused(options, tmp_path):
    result = run("train", *options, "--tuner", "sherl", "--reduction", 4, "--tail-size", 8, "--out", tmp_path / "run")
    assert result.exit_code != 0 and "tail_size: a number above 0, with tail lora or adapter or prompt" in result.output
    assert not (tmp_path / "run").exists()
