"""Ctrl-C: what is finished is kept, the message says how to go on, and going on gives the uninterrupted result.

Also here: a user's own `train.py` must not silently stand in for the project's package.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.extract.backbones.live import LiveBackbone
from pipeline.store import Store
from pipeline.train.tuners.probe import Probe
from tests.pipeline.test_errors import run

WORDS = ["--text", "first", "--text-pair", "second", "--label", "label"]


def after(calls: int, real):
    """`real`, until it has been called `calls` times; then Ctrl-C."""
    count = 0

    def inner(*args, **kwargs):
        nonlocal count
        count += 1
        if count > calls:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    return inner


def test_extraction_goes_on_where_ctrl_c_stopped_it(checkpoints, table, tmp_path, monkeypatch):
    options = ["--model", checkpoints["bert"], "--task", table, *WORDS, "--store", tmp_path / "store"]
    options += ["--batch-size", 16]
    real = LiveBackbone.states
    monkeypatch.setattr(LiveBackbone, "states", after(3, real))
    stopped = run("extract", *options)
    assert stopped.exit_code == 130
    assert "the same command goes on from there" in stopped.stderr
    assert len([x for x in stopped.stderr.splitlines() if x.startswith("error:")]) == 1
    monkeypatch.setattr(LiveBackbone, "states", real)
    (space,) = Store.open(tmp_path / "store").spaces()
    stored = sum(len(s) for s in space.segments())
    assert 32 < stored <= 48 and not space.tables()
    assert f"stopped: {stored} of" in stopped.stderr
    result = json.loads(run("extract", *options, "--json").stdout)
    assert result["computed"] == result["samples"] - stored
    assert not space.verify(deep=True) and len(space.tables()) == 3


def test_training_goes_on_where_ctrl_c_stopped_it(checkpoints, table, tmp_path, monkeypatch):
    options = ["--model", checkpoints["bert"], "--task", table, "--store", tmp_path / "store"]
    assert run("extract", *options, *WORDS, "--for", "probe").exit_code == 0
    train = ["train", *options, "--tuner", "probe", "--epochs", 4, "--batch-size", 16]
    assert run(*train, "--out", tmp_path / "whole").exit_code == 0
    real = Probe.forward
    monkeypatch.setattr(Probe, "forward", after(9, real))
    stopped = run(*train, "--out", tmp_path / "run")
    assert stopped.exit_code == 130
    monkeypatch.setattr(Probe, "forward", real)
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert run(*train, "--out", tmp_path / "run").exit_code == 0

    def losses(folder: Path) -> list[float]:
        lines = (json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines())
        return [x["loss"] for x in lines if "loss" in x]

    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
