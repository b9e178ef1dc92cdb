"""Regression: a table of numbers on both kinds of backbone, and STS-B's grid of target texts on T5."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pipeline.jobs.sources import store_source
from pipeline.runs import load_run
from pipeline.store import Store
from pipeline.train.evaluate import predict
from tests import tiny
from tests.pipeline.test_errors import refused, run


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    path = tmp_path_factory.mktemp("numbers") / "numbers.csv"
    texts = tiny.sentences(80, longest=8)
    path.write_text("words,score\n" + "".join(f"{t},{0.25 + t.count('cat') + 0.5 * t.count('the')}\n" for t in texts))
    return path


@pytest.mark.parametrize("backbone", ["t5", "bert"])
def test_a_table_of_numbers(checkpoints, numbers, tmp_path, backbone):
    options = ["--model", checkpoints[backbone], "--task", numbers, "--store", tmp_path / "store"]
    assert run("extract", *options, "--text", "words", "--label", "score", "--for", "lst").exit_code == 0
    train = ["--tuner", "lst", "--reduction", 4, "--epochs", 2, "--batch-size", 16, "--out", tmp_path / "run"]
    result = run("train", *options, *train, "--json")
    assert result.exit_code == 0, result.output
    assert {"pearson", "spearman", "average"} == set(json.loads(result.stdout)["test"])
    loaded = load_run(tmp_path / "run")
    texts = [{"words": text} for (text,) in loaded.job.tables["test"].texts]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    found = run("predict", tmp_path / "run", "--input", tmp_path / "new.jsonl", "--json")
    assert found.exit_code == 0, found.output
    stored = predict(loaded.model, store_source(loaded.job, "test", 16))
    told = json.loads(found.stdout)["predictions"]
    assert [p["label"] for p in told] == pytest.approx([p["label"] for p in stored], abs=1e-2)


def test_stsb_on_t5_scores_the_whole_grid(checkpoints, shared_data, tmp_path):
    options = ["--model", checkpoints["t5"], "--task", "stsb", "--store", tmp_path / "store"]
    extracted = run("extract", *options, "--data", shared_data / "glue", "--limit", 40, "--for", "sherl")
    assert extracted.exit_code == 0, extracted.output
    (space,) = Store.open(tmp_path / "store").spaces()
    tables = {s: space.load_table("stsb", s) for s in ("train", "validation", "test")}
    assert len(tables["train"].header["candidates"]) == 51
    # Training rows hold their own target's positions, scored rows every prefix at which two targets part.
    lengths = {s: space.plan(t.keys, ["decoder.0"], ["decoder.ids"]).lengths["decoder"] for s, t in tables.items()}
    longest = max(len(c) for c in tables["train"].header["candidates"])
    assert lengths["train"].max() <= longest and len(set(lengths["test"].tolist())) == 1
    assert lengths["test"][0] > longest
    train = ["--tuner", "sherl", "--reduction", 4, "--epochs", 1, "--batch-size", 16, "--warmup-ratio", 0.1]
    result = run("train", *options, *train, "--out", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["test"].keys() == {"pearson", "spearman", "average"}


def test_a_step_that_the_task_has_not_is_refused_before_a_command_with_it_is_told(checkpoints, numbers, tmp_path):
    """Extraction and training say the same, whether or not anything is stored."""
    words = ["--model", checkpoints["t5"], "--store", tmp_path / "store"]
    cases = [(numbers, 2, "leave it out"), ("stsb", 2, "0.1 or 0.2"), ("rte", 0.2, "labels are classes")]
    told = {}
    for task, grid, why in cases:
        own = [*words, "--task", task, "--target-step", grid]
        lines = [refused(run("extract", *own, "--for", "lst"), "--target-step", why)]
        lines += [
            refused(run("train", *own, "--tuner", "lst", *live), "--target-step", why) for live in ((), ("--live",))
        ]
        assert len(set(lines)) == 1 and "pipeline extract" not in lines[0]
        told[task] = lines[0]
    assert (
        run("extract", *words, "--task", numbers, "--text", "words", "--label", "score", "--for", "probe").exit_code
        == 0
    )
    assert refused(run("train", *words, "--task", numbers, "--tuner", "lst", "--target-step", 2)) == told[numbers]


def test_the_grid_of_a_sweep_is_no_step_of_targets(checkpoints, table, tmp_path):
    """Of two options only one is called so, and a sweep takes both."""
    words = ["--model", checkpoints["t5"], "--task", table, "--store", tmp_path / "store"]
    refused(run("train", *words, "--grid", 0.2), "--grid", "sweep", "--target-step")
    refused(run("extract", *words, "--grid", "lr=1e-3,3e-3"), "--grid", "sweep", "--target-step")
    refused(
        run("sweep", *words, "--tuner", "probe", "--grid", "lr=1e-3", "--target-step", 2), "--target-step 2", "leave it"
    )


def test_real_glue_folders_run_on_a_real_encoder(shared_data, tmp_path):
    """RTE is a smoke test: with this encoder nothing beats chance."""
    from pipeline.extract.pretrained import local

    if local("minilm") is None:
        pytest.skip("the extra `demo` is not installed: no real encoder to test with")
    options = ["--model", "minilm", "--task", "rte", "--store", tmp_path / "store"]
    assert run("extract", *options, "--data", shared_data / "glue", "--limit", 48, "--for", "probe,lst").exit_code == 0
    result = run("train", *options, "--tuner", "lst", "--epochs", 1, "--out", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.output
    job = load_run(tmp_path / "run").job
    table = job.tables["test"]
    rows = [dict(zip(job.spec.fields, texts, strict=True)) for texts in table.texts]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = run("predict", tmp_path / "run", "--input", tmp_path / "new.jsonl", "--json")
    told = json.loads(found.stdout)["predictions"]
    right = [entry["label"] == job.spec.labels[label] for entry, label in zip(told, table.labels, strict=True)]
    assert json.loads(result.stdout)["test"]["accuracy"] == pytest.approx(np.mean(right), abs=1.5 / len(right))
