"""What tuners keep in the store of the backbone: pruned first weights, late live layers. Training needs no backbone."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner

from pipeline.cli.main import main
from pipeline.store import Store


def run(*words, ok: bool = True):
    result = CliRunner().invoke(main, [*map(str, words), "--json"])
    assert (result.exit_code == 0) == ok, result.output
    return json.loads(result.stdout) if ok else result.stderr


def losses(folder) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in lines if "loss" in entry]


@pytest.fixture
def common(checkpoints, table, tmp_path):
    def get(backbone: str) -> list:
        # A copy, so that it can be taken away.
        folder = shutil.copytree(checkpoints[backbone], tmp_path / f"{backbone}-model")
        return ["--model", folder, "--task", table, "--text", "first", "--text-pair", "second", "--label", "label",
                "--store", tmp_path / "store"]  # fmt: skip

    return get


STEPS = ("--batch-size", 16, "--max-steps", 4, "--warmup-ratio", 0.1)
CASES = {
    "t5-fisher": ("t5", "lst", ["--init", "fisher"], "lst-fisher-released-r4-pairs-"),
    "t5-aligned": ("t5", "lst", ["--init", "fisher", "--prune", "aligned"], "lst-fisher-aligned-r4"),
    "bert-magnitude": (
        "bert",
        "lst",
        ["--init", "magnitude"],
        "lst-magnitude-released-r4.safetensors",
    ),
    "t5-multi": ("t5", "sherl", ["--insert", "multi:1"], "block-1.safetensors"),
    "bert-single": ("bert", "sherl", ["--insert", "single:2"], "block-2.safetensors"),
    "clip-multi": ("clip_text", "sherl", ["--insert", "multi:2"], "block-2.safetensors"),
}


@pytest.mark.parametrize("case", CASES)
def test_training_says_what_is_missing_then_needs_no_backbone_and_equals_live(common, tmp_path, case):
    backbone, tuner, options, kept = CASES[case]
    base = common(backbone)
    plain = ["train", *base, "--tuner", tuner, "--reduction", 4, *STEPS]
    train = [*plain, *options]
    extract = ["extract", *base, "--format", "float32", "--for", tuner, *(["--reduction", 4] if tuner == "lst" else [])]
    run(*extract)
    said = run(*train, "--out", tmp_path / "early", ok=False)
    assert "run: pipeline extract" in said and " ".join(map(str, options[:2])) in said
    run(*extract, *options)
    store = Store.open(tmp_path / "store")
    files = [p.name for p in (store.path / "weights").glob("*/*")]
    assert any(f.startswith(kept) for f in files), files
    assert run(*extract, *options)["computed"] == 0
    run(*train, "--live", "--out", tmp_path / "live")
    # Without a store: the same weights, made on the spot.
    unstored = [w if w != tmp_path / "store" else tmp_path / "none" for w in train]
    run(*unstored, "--live", "--out", tmp_path / "unstored")
    shutil.rmtree(base[1])
    run(*train, "--out", tmp_path / "cached")
    cached, live = losses(tmp_path / "cached"), losses(tmp_path / "live")
    assert len(cached) == 4 and cached == pytest.approx(live, rel=1e-5)
    assert run("evaluate", tmp_path / "cached")["split"] == "test"
    run(*plain, "--out", tmp_path / "plain")
    assert losses(tmp_path / "plain") != cached


def test_fisher_needs_a_head_and_train_rows(common):
    said = run("extract", *common("bert"), "--for", "lst", "--init", "fisher", ok=False)
    assert "without a head; use --init magnitude" in said
    said = run(
        "extract", *common("t5"), "--for", "lst", "--init", "fisher", "--reduction", 4, "--split", "test", ok=False
    )
    assert "labelled train rows" in said
