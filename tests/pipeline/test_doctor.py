"""`pipeline doctor`: what it finds is so."""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch

from pipeline import installation
from pipeline.commands import doctor
from pipeline.store import Store
from tests.pipeline.test_errors import run

WORDS = ["--text", "first", "--text-pair", "second", "--label", "label", "--for", "probe"]


@pytest.fixture(autouse=True)
def no_timing(monkeypatch):
    monkeypatch.setattr(doctor, "disk_rates", lambda place: (1e8, 2e9, None))


def found(*words: object) -> dict:
    done = run("doctor", *words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_store_is_counted_and_its_damage_named(checkpoints, table, tmp_path, monkeypatch):
    monkeypatch.setenv("PIPELINE_STORE", str(tmp_path / "store"))
    assert "tmp" in found()["problems"][0]  # named, and not there
    assert run("extract", "--model", checkpoints["bert"], "--task", table, *WORDS).exit_code == 0
    told = found()
    (space,) = Store.open(tmp_path / "store").spaces()
    assert told["store"]["samples"] == sum(len(s) for s in space.segments()) and not told["problems"]
    assert torch.__version__.startswith(told["versions"]["torch"]) and told["devices"][0]["cores"] >= 1
    assert told["rates"]["float32 FLOP/s"] > 0 and told["memory"]["available"] > 0
    files = (path for path in Path(space.path).glob("segments/**/*") if path.is_file())
    victim = max(files, key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1])
    told = found()
    assert told["store"]["damaged"] == 1 and "verify" in told["problems"][0]
    text = run("doctor")
    assert text.exit_code == 0 and "problems:" in text.stdout and "1 problems" in text.stdout


def test_a_usual_place_that_is_no_store_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PIPELINE_STORE", raising=False)
    (tmp_path / "activations").mkdir()
    (tmp_path / "activations" / "store.json").write_text("{")
    (problem,) = found()["problems"]
    assert "activations" in problem


def test_what_is_missing_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "peft" else real(name, *more))
    told = run("doctor")
    assert told.exit_code == 0 and "pip install 'activation-pipeline[baselines]'" in told.stdout
    assert "none at activations" in told.stdout and "no problem found" in told.stdout
    assert not list(tmp_path.iterdir())


def test_every_extra_and_every_dependency_is_known():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    wanted = {re.split("[^a-z0-9-]", line)[0] for line in project["dependencies"]}
    brought = packages_distributions()
    known = {name: {package.lower() for package in brought[name]} for name in installation.MODULES}
    assert known.pop("aiohttp") and {p.replace("_", "-") for ps in known.values() for p in ps} == wanted
    assert doctor.EXTRAS.keys() == project["optional-dependencies"].keys() - {"test"}
