"""The main job from the command line: extract once, train from the store alone, evaluate, predict."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.store import Store, read_block
from tests import tiny
from tests.pipeline.test_errors import run

WORDS = ["--text", "first", "--text-pair", "second", "--label", "label"]


@pytest.fixture(scope="module", params=["t5", "bert"])
def trained(request, tmp_path_factory, table):
    """(family, folder): a store extracted from a checkpoint that is then removed, and an LST run trained from it."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = tiny.CHECKPOINTS[request.param](folder / "backbone")
    kept = folder / "elsewhere" / "backbone"
    shutil.copytree(checkpoint, kept)
    options = ["--model", checkpoint, "--task", table, "--store", folder / "store"]
    result = run("extract", *options, *WORDS, "--format", "float32")
    assert result.exit_code == 0, result.output
    shutil.rmtree(checkpoint)
    more = ["--tuner", "lst", "--reduction", 4, "--epochs", 3, "--batch-size", 16, "--warmup-ratio", 0.1]
    result = run("train", *options, *more, "--out", folder / "run", "--json")
    assert result.exit_code == 0, result.output
    return request.param, folder, kept, json.loads(result.stdout)


def test_train_works_with_the_checkpoint_gone(trained):
    _, folder, _, result = trained
    assert {p.name for p in (folder / "run").iterdir()} == {
        "tuner.safetensors",
        "recipe.yaml",
        "log.jsonl",
        "metrics.json",
    }
    entries = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    steps = [e for e in entries if "loss" in e]
    assert {"step", "epoch", "loss", "lr", "seconds", "wait_seconds"} <= set(steps[0])
    assert [e["step"] for e in steps] == list(range(1, len(steps) + 1))
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    assert metrics["trainable_parameters"] == result["trainable_parameters"]


def test_evaluate_gives_the_metrics_of_training(trained):
    _, folder, _, result = trained
    found = run("evaluate", folder / "run", "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["accuracy"] == result["test"]["accuracy"]


def test_predict_on_the_test_rows_gives_the_labels_of_evaluate(trained, tmp_path):
    from pipeline.jobs.sources import store_source
    from pipeline.runs import load_run
    from pipeline.train.evaluate import predict

    _, folder, kept, _ = trained
    loaded = load_run(folder / "run")
    table = loaded.job.tables["test"]
    lines = ["first\tsecond", *("\t".join(t) for t in table.texts)]
    (tmp_path / "new.tsv").write_text("\n".join(lines) + "\n")
    result = run("predict", folder / "run", "--input", tmp_path / "new.tsv", "--model", kept, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["predictions"]
    stored = predict(loaded.model, store_source(loaded.job, "test", 16))
    assert [e["label"] for e in found] == [e["label"] for e in stored] and len(table.keys) == len(found)
    assert [e["probability"] for e in found] == pytest.approx([e["probability"] for e in stored], abs=1e-3)
    assert [e["id"] for e in found] == list(range(1, len(found) + 1))


def test_free_generation_is_offered_on_text_to_text(trained):
    backbone, folder, kept, _ = trained
    result = run("evaluate", folder / "run", "--generate", "--model", kept, "--json")
    if backbone == "t5":
        assert result.exit_code == 0, result.output
        generated = json.loads(result.stdout)["generated"]
        # Nothing but labels is written, and then the likeliest is what is scored.
        assert generated["in_targets"] == 1 and generated["accuracy"] == json.loads(result.stdout)["accuracy"]
    else:
        assert result.exit_code != 0 and "runs of objective label-text and completion write text" in result.stderr


def test_another_checkpoint_is_refused_for_prediction(trained, tmp_path):
    backbone, folder, _, _ = trained
    other = tiny.CHECKPOINTS[backbone](tmp_path / "other", seed=5)
    (tmp_path / "new.tsv").write_text("first\tsecond\na\tb\n")
    result = run("predict", folder / "run", "--input", tmp_path / "new.tsv", "--model", other)
    assert result.exit_code != 0 and "weights" in result.stderr


def test_extracting_again_computes_nothing(trained, table):
    _, folder, kept, _ = trained
    result = run(
        "extract",
        "--model",
        kept,
        "--task",
        table,
        "--store",
        folder / "store",
        *WORDS,
        "--format",
        "float32",
        "--json",
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["computed"] == 0


def test_a_smaller_format_is_another_space(trained, table):
    _, folder, kept, _ = trained
    options = ["--model", kept, "--task", table, "--store", folder / "store"]
    result = run("extract", *options, *WORDS, "--format", "bfloat16", "--limit", 10, "--json")
    spaces = {space.format: space for space in Store.open(folder / "store").spaces()}
    assert set(spaces) == {"float32", "bfloat16"}
    assert json.loads(result.stdout)["computed"] == len(spaces["bfloat16"].index()) <= 30


def test_further_states_are_a_supplement(tmp_path, checkpoints, table):
    options = ["--model", checkpoints["bert"], "--task", table, "--store", tmp_path / "store", *WORDS]
    assert run("extract", *options, "--for", "sherl").exit_code == 0
    (space,) = Store.open(tmp_path / "store").spaces()
    before = {s.id: s.nbytes for s in space.segments()}
    result = json.loads(run("extract", *options, "--for", "lst", "--json").stdout)
    segments = space.segments()
    added = [s for s in segments if s.id not in before]
    assert [list(s.states) for s in added] == [["encoder.3"]] and all(s.base in before for s in added)
    assert result["computed"] == result["samples"]
    # Read together, both kinds of segment give one sample's states row for row.
    plan = space.plan(segments[0].keys[:5], ["encoder.0", "encoder.3"], ["encoder.ids"])
    block = read_block(plan.blocks[0])
    assert block.states["encoder.0"].rows == block.states["encoder.3"].rows == len(block.columns["encoder.ids"])


def test_a_second_task_on_the_same_texts_is_stored_once(tmp_path, checkpoints, table):
    store = tmp_path / "store"
    first = ["--model", checkpoints["bert"], "--store", store, *WORDS]
    assert run("extract", *first, "--task", table).exit_code == 0
    copy = tmp_path / "renamed.tsv"
    shutil.copy(table, copy)
    result = json.loads(run("extract", *first, "--task", copy, "--json").stdout)
    assert result["computed"] == 0
    (space,) = Store.open(store).spaces()
    assert {t.task for t in space.tables()} == {"pairs", "renamed"}


def test_recipe_file_and_command_line(trained, tmp_path):
    _, folder, _, result = trained
    recipe = folder / "run" / "recipe.yaml"
    again = run("train", "--recipe", recipe, "--out", tmp_path / "again", "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["test"] == result["test"]
    log = [Path(p) / "log.jsonl" for p in (folder / "run", tmp_path / "again")]
    losses = [[json.loads(x).get("loss") for x in p.read_text().splitlines()] for p in log]
    assert losses[0] == losses[1]
    shorter = run("train", "--recipe", recipe, "--out", tmp_path / "short", "--epochs", 1, "--json")
    assert json.loads(shorter.stdout)["epochs"] == 1


def test_listings_and_status(trained):
    _, folder, _, _ = trained
    for name, word in (("models", "t5-base"), ("tasks", "sst2"), ("tuners", "sherl")):
        assert word in run(name).stdout
        json.loads(run(name, "--json").stdout)
    status = run("store", "status", "--store", folder / "store")
    assert "pairs: " in status.stdout and "samples" in status.stdout
    assert json.loads(run("store", "status", "--store", folder / "store", "--json").stdout)["spaces"]
    assert "pipeline demo" in run().stdout


def test_live_needs_no_store(tmp_path, checkpoints, table):
    options = ["--model", checkpoints["bert"], "--task", table, *WORDS, "--store", tmp_path / "none", "--tuner", "lst"]
    more = ["--reduction", 4, "--epochs", 1, "--batch-size", 16, "--limit", 40]
    result = run("train", *options, *more, "--live", "--out", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["steps"] == 3
    assert not (tmp_path / "none").exists()
    (tmp_path / "new.tsv").write_text("first\tsecond\na cat\tthe dog\n")
    found = run("predict", tmp_path / "run", "--input", tmp_path / "new.tsv")
    assert found.exit_code == 0 and found.stdout.split()[-2] in ("yes", "no")
    refused = run("evaluate", tmp_path / "run")
    assert refused.exit_code != 0 and "pipeline extract" in refused.stderr
