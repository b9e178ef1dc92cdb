"""A store is looked after without torch: on a login node, on a NAS, with a small install."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.store import Store, TaskTable
from tests.store.helpers import key, sealed, space

# All that the README's small install leaves out.
HEAVY = ("torch", "transformers", "tokenizers", "datasets", "timm", "scipy", "sklearn", "PIL", "dask")
HEAVY += ("huggingface_hub", "sentencepiece", "psutil", "threadpoolctl")

# Runs the words after it as command lines in an environment without what is heavy.
COMMANDS = """
import json, sys
from click.testing import CliRunner
from pipeline.cli.main import main
heavy, *lines = map(json.loads, sys.argv[1:])
sys.modules |= dict.fromkeys(heavy)
for words in lines:
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, f"{words}: {done.output} {done.exception!r}"
"""

# The same, of command lines that need what is missing.
REFUSED = """
import json, sys
from click.testing import CliRunner
from pipeline.cli.main import main
heavy, *lines = map(json.loads, sys.argv[1:])
sys.modules |= dict.fromkeys(heavy)
line = "error: this command needs the full install, {} is missing here: pip install activation-pipeline\\n"
for words in lines:
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2 and done.stderr in {line.format(name) for name in heavy}, f"{words}: {done.output}"
    assert not done.stdout
"""


def run(code: str, *words: object, **environment: str) -> None:
    command = [sys.executable, "-c", code, *map(json.dumps, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def store(tmp_path: Path) -> str:
    """Two small segments, a supplement, a table and weights."""
    home = space(tmp_path, weights="ab" * 16)
    opened = Store.open(tmp_path / "store")
    source = {"names": ["tiny"], "revision": ""}
    opened.save_weights("ab" * 16, {"tail.safetensors": {"w": np.ones(3)}, "source.json": source})
    sealed(home, [1, 2], sealed(home, [1, 2]), states=("encoder.5",))
    sealed(home, [3])
    spec = {"name": "t", "kind": "classification", "labels": ["a"], "metrics": ["accuracy"], "fields": ["text"]}
    header = {"task": "t", "split": "train", "spec": {**spec, "prompt": "", "targets": [], "values": []}}
    home.save_table(TaskTable(header, [key(i) for i in (1, 2, 3)], [0, 0, 0], [["x"]] * 3))
    return str(opened.path)


def test_every_store_command(store: str, tmp_path: Path) -> None:
    other, third = str(tmp_path / "other"), str(tmp_path / "third")
    run(
        COMMANDS,
        HEAVY,
        ["store", "status", "--store", store],
        ["store", "verify", "--deep", "--store", store],
        ["store", "push", other, "--store", store],
        ["store", "pull", other, "--store", store],
        ["store", "merge", other, "--store", store],
        ["store", "push", third, "--store", store],
        ["store", "compact", "--store", store],
        ["store", "gc", "--older-than", "0s", "--store", store],
        ["store", "repair", "--dry-run", "--store", store],
        ["store", "du", "--store", store],
        *([name] for name in ("models", "tasks", "tuners", "--version")),
        ["store", "rm", Store.open(store).spaces()[0].id, "--yes", "--store", third],
    )


def test_what_needs_more_says_so_in_a_line(store: str, tmp_path: Path) -> None:
    task = ["--task", "rte", "--store", store]
    run(
        REFUSED,
        HEAVY,
        ["extract", "--model", "minilm", *task],
        ["train", "--tuner", "lst", *task],
        ["train", "--tuner", "somebody's", *task],
        *([name, *task] for name in ("plan", "bench", "compare")),
        ["sweep", "--tuner", "lst", "--out", str(tmp_path / "sweep"), *task],
        *([name, "runs/none"] for name in ("evaluate", "report")),
        ["predict", "runs/none", "--input", "rows.csv"],
        ["generate", "runs/none", "--prompt", "Once"],
        ["search", "runs/none", "--query", "a dog"],
        ["store", "verify", "--recompute", "2", "--store", store],
        ["demo", "--out", str(tmp_path / "demo")],
    )


def test_doctor_works_there_and_says_what_is_missing(store: str) -> None:
    code = """
import json, sys
from click.testing import CliRunner
from pipeline.cli.main import main
store, heavy = map(json.loads, sys.argv[1:])
sys.modules |= dict.fromkeys(heavy)
from pipeline.commands import doctor
doctor.disk_rates = lambda place: (1e8, 2e9, None)
told = json.loads(CliRunner().invoke(main, ["doctor", "--store", store, "--json"]).stdout)
assert {"torch", "dask", "psutil"} <= set(told["missing"]) <= set(heavy) and told["store"]["samples"] == 5, told
text = CliRunner().invoke(main, ["doctor", "--store", store]).stdout
assert "\\nmissing    PIL, " in text and "  all but `pipeline store`  " in text, text
assert "pip install activation-pipeline\\n" in text, text
"""
    run(code, store, HEAVY)


def test_a_module_of_somebody_else_is_not_ours() -> None:
    code = """
import click, pytest
from pipeline.cli.command import Commands

@click.group(cls=Commands)
def main(): pass

@main.command()
@click.argument("name")
def load(name): __import__(name)

for name in ("nobody_has_this", "torch.nobody_has_this"):
    with pytest.raises(ModuleNotFoundError, match=name):
        main(["load", name], standalone_mode=False)
"""
    run(code)


def test_the_size_of_the_cache_is_read_there(tmp_path: Path) -> None:
    """It bounds the copies of a remote store, which need no Dask."""
    code = """
import json, sys
sys.modules |= dict.fromkeys(json.loads(sys.argv[1]))
from pipeline.store.files.places import cache_bytes
assert cache_bytes() == 50 * 10**9
"""
    run(code, HEAVY, PIPELINE_CACHE_SIZE="50GB")


def test_a_store_is_opened_and_looked_at_in_python(store: str) -> None:
    code = """
import json, sys
store, heavy = map(json.loads, sys.argv[1:])
sys.modules |= dict.fromkeys(heavy)
import pipeline
features = pipeline.open_store(store)
(space,) = features.spaces()
assert len(space.stored()) == 3 and [t.task for t in space.tables()] == ["t"] and not features.store.verify()
"""
    run(code, store, HEAVY)


def test_reading_and_writing_states(store: str) -> None:
    """Not only commands: who reads states with NumPy needs no torch, bfloat16 included."""
    code = """
import json, sys
import numpy as np
from pipeline.store import Encoded, Samples, Store, decode, read_block
store, key = map(json.loads, sys.argv[1:])
home = Store.open(store).spaces()[0]
plan = home.plan([key], ["encoder.3"])
assert np.isfinite(decode(read_block(plan.blocks[0]).states["encoder.3"])).all()
import ml_dtypes
other = Store.open(store).create_space({"format": "bfloat16"})
writer = other.writer({})
writer.add(Samples([key], {"encoder": np.array([1])}, {"encoder.0": Encoded(np.ones((1, 4), ml_dtypes.bfloat16))}))
assert decode(writer.seal().read(["encoder.0"]).states["encoder.0"]).tolist() == [[1.0] * 4]
assert "torch" not in sys.modules
"""
    run(code, store, key(1))
