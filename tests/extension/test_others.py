"""A package of others goes the whole way from the command line, by --import and by entry point, without a line of ours.

Every command runs in a process of its own: what this process has imported is of no help to it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import ElectraConfig, ElectraModel

from tests import tiny

OTHERS = Path(__file__).parent / "others"


@pytest.fixture(scope="module")
def electra(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("electra")
    tokenizer = tiny._tokenizer("bert")
    config = ElectraConfig(
        vocab_size=len(tokenizer), embedding_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=160, pad_token_id=0,
    )  # fmt: skip
    ElectraModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


RUN = """
import json, sys
from click.testing import CliRunner
from pipeline.cli import main
for line in json.loads(sys.argv[1]):
    found = CliRunner().invoke(main, line)
    print(json.dumps([found.exit_code, found.stdout, found.stderr]))
"""


def pipeline(*lines: list[object], path: str = "", cwd: Path) -> list[tuple[int, str, str]]:
    """Status, stdout and stderr of each command line, all in one new process."""
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    words = json.dumps([[str(w) for w in line] for line in lines])
    done = subprocess.run([sys.executable, "-c", RUN, words], env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def results(*lines: list[object], path: str = "", cwd: Path) -> list[dict]:
    found = pipeline(*([*line, "--json"] for line in lines), path=path, cwd=cwd)
    assert [code for code, _, _ in found] == [0] * len(lines), found
    return [json.loads(out) for _, out, _ in found]


@pytest.mark.parametrize("way", ["import", "entry point"])
def test_the_whole_way(electra: Path, tmp_path: Path, way: str) -> None:
    if way == "import":
        package, path = tmp_path / "elsewhere" / "others", ""
        load = ["--import", package]
    else:
        package, load = tmp_path / "site" / "others", []
        path = str(tmp_path / "site")
        info = tmp_path / "site" / "others-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[pipeline.plugins]\nothers = others\n")
    shutil.copytree(OTHERS, package, ignore=shutil.ignore_patterns("__pycache__"))
    common = ["--model", electra, "--task", "word-parity", "--store", tmp_path / "store"]
    run = tmp_path / "run"
    extract = ["extract", *load, *common, "--for", "power"]
    own = ["--tuner", "power", "--exponent", 2, "--tuner-seed", 0.5, "--objective", "margin", "--margin", 0.7]
    train = ["train", *load, *common, *own, "--batch-size", 8, "--epochs", 2, "--out", run]
    extracted, trained = results(extract, train, path=path, cwd=tmp_path)
    assert extracted["computed"] == 40
    kept = yaml.safe_load((run / "recipe.yaml").read_text())
    assert kept["tuner_options"] == {"exponent": 2, "seed": 0.5}
    assert kept["objective_options"] == {"margin": 0.7, "pooling": "mean"}
    assert kept["imports"] == ([str(package)] if load else [])
    # A process that knows the run alone.
    (tmp_path / "new.csv").write_text("sentence\nthe old cat\na red house sees\n")
    scores, told, again, live = results(
        ["evaluate", run],
        ["predict", run, "--input", tmp_path / "new.csv"],
        ["train", "--recipe", run / "recipe.yaml", "--out", tmp_path / "again"],
        ["train", "--recipe", run / "recipe.yaml", "--live", "--out", tmp_path / "live"],
        path=path,
        cwd=tmp_path,
    )
    assert scores["average"] == pytest.approx(trained["test"]["average"])
    assert len(told["predictions"]) == 2 and {e["label"] for e in told["predictions"]} <= {"even", "odd"}
    assert again["test"] == trained["test"] == live["test"]


def test_help_shows_their_options_and_a_mistake_is_one_line(tmp_path: Path) -> None:
    load = ["--import", OTHERS]
    wrong = (
        (["--import", tmp_path / "none.py"], "no such file"),
        (["--import", "no_such_module"], "No module named"),
        ([*load, "--tuner", "power", "--blend", "max"], "--blend is an option of sherl"),
        ([*load, "--tuner", "sherl", "--exponent", 2], "--exponent is an option of power"),
    )
    shown, *refusals = pipeline(
        ["train", *load, "--tuner", "power", "--objective", "margin", "--help"],
        *(["train", *words, "--task", "word-parity"] for words, _ in wrong),
        cwd=tmp_path,
    )
    for word in ("Tuner power:", "--exponent", "--tuner-seed", "Objective margin:", "--margin"):
        assert word in shown[1]
    for (code, _, err), (_, said) in zip(refusals, wrong, strict=True):
        assert code != 0 and said in err and err.count("error:") == 1


def test_a_broken_plug_in_stops_nobody_else(tmp_path: Path) -> None:
    info = tmp_path / "site" / "broken-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pipeline.plugins]\nbroken = not_there\n")
    ((code, out, err),) = pipeline(["tuners"], path=str(tmp_path / "site"), cwd=tmp_path)
    assert code == 0 and "sherl" in out and "plug-in broken (not_there) cannot be imported" in err


def test_their_tuner_goes_through_the_conformance_suite_in_one_line(electra: Path, tmp_path: Path) -> None:
    code = f"import others, pipeline.testing; pipeline.testing.conform('power', {str(electra)!r}, exponent=1)"
    env = {**os.environ, "PYTHONPATH": str(OTHERS.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
