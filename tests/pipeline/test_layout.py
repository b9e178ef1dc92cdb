"""A teammate compacts the store: an interrupted run goes on as it began, and runs name their layout."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from pipeline.train.tuners.probe import Probe
from tests.pipeline.test_errors import run
from tests.pipeline.test_interrupt import after

WORDS = ["--text", "first", "--text-pair", "second", "--label", "label"]


@pytest.fixture
def options(checkpoints, table, tmp_path) -> list[object]:
    """A store in two segments."""
    options = ["--model", checkpoints["bert"], "--task", table, "--store", tmp_path / "store"]
    for more in (["--limit", 40], []):
        assert run("extract", *options, *WORDS, "--for", "probe", *more).exit_code == 0
    return options


def losses(folder: Path) -> list[float]:
    lines = (json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines())
    return [x["loss"] for x in lines if "loss" in x]


@pytest.mark.parametrize("live", [(), ("--live",)])
def test_an_interrupted_run_goes_on_after_a_compact(options, tmp_path, monkeypatch, live):
    train = ["train", *options, "--tuner", "probe", "--epochs", 3, "--batch-size", 16, *live]
    whole = json.loads(run(*train, "--out", tmp_path / "whole", "--json").stdout)
    real = Probe.forward
    monkeypatch.setattr(Probe, "forward", after(9, real))
    assert run(*train, "--out", tmp_path / "run").exit_code == 130
    monkeypatch.setattr(Probe, "forward", real)
    assert json.loads(run("store", "compact", "--store", tmp_path / "store", "--json").stdout)
    resumed = run(*train, "--out", tmp_path / "run")
    assert resumed.exit_code == 0, resumed.output
    assert whole["layout"]["xxh3"][:12] in resumed.stdout and "2 blocks" in resumed.stdout
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert all(metrics[k] == whole[k] for k in ("layout", "validation", "test"))


def test_compare_names_the_layout(options, tmp_path):
    more = ["--tuners", "probe,norm-tuning", "--epochs", 1, "--max-steps", 2, "--batch-size", 16]
    table = run("compare", *options, *more, "--csv", tmp_path / "t.csv", "--out", tmp_path / "runs")
    assert table.exit_code == 0, table.output
    (line,) = [x for x in table.stdout.splitlines() if x.startswith("layout of the samples:")]
    assert "2 blocks" in line
    with (tmp_path / "t.csv").open() as file:
        assert {row["layout"] for row in csv.DictReader(file)} == {line.partition(": ")[2]}
