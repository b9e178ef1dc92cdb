"""Hugging Face datasets of images, from files at hand: the hub's own loader, no network."""

from __future__ import annotations

import json
import shutil

import datasets
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from pipeline.cli.main import main
from pipeline.extract.tasks import canonical_name, load_task
from pipeline.store import UserError

FEATURES = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light/bright"])})


def picture(value: int, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-20, 20, (12, 12, 3))
    return Image.fromarray((value + noise).astype(np.uint8))


def write(folder, features=FEATURES, **counts: int):
    folder.mkdir()
    for k, (split, n) in enumerate(counts.items()):
        rows = {"img": [picture(60 + 120 * (i % 2), 100 * k + i) for i in range(n)], "label": [i % 2 for i in range(n)]}
        made = datasets.Dataset.from_dict({k: v for k, v in rows.items() if k in features}, features=features)
        made.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_splits_and_classes_are_the_datasets_own(tmp_path):
    source = write(tmp_path / "shades", train=10, validation=4, test=6)
    task = load_task(f"hub:{source}", tmp_path / "out")
    assert canonical_name(f"hub:{source}") == task.spec.name == "shades"
    assert task.spec.labels == ("dark", "light_bright")
    assert {s: len(r) for s, r in task.splits.items()} == {"train": 10, "validation": 4, "test": 6}
    name, label = task.splits["test"].texts[0][0], task.splits["test"].labels[0]
    assert np.asarray(Image.open(tmp_path / "out" / name)).mean() == pytest.approx(60 + 120 * label, abs=10)
    before = sorted(p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.png"))
    write(tmp_path / "other", train=4)
    load_task(f"hub:{source}", tmp_path / "out")  # used again
    assert before == sorted(p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.png")) and len(before) == 20
    with pytest.raises(UserError, match="holds something else"):
        load_task(f"hub:{tmp_path / 'other'}", tmp_path / "out")


def test_train_alone_is_split_and_what_has_no_classes_is_refused(tmp_path):
    task = load_task(f"hub:{write(tmp_path / 'one', train=20)}", tmp_path / "out")
    assert {s: len(r) for s, r in task.splits.items()} == {"train": 16, "validation": 2, "test": 2}
    bare = write(tmp_path / "bare", features=datasets.Features({"img": datasets.Image()}), train=4)
    with pytest.raises(UserError, match="one of class labels"):
        load_task(f"hub:{bare}", tmp_path / "none")
    with pytest.raises(UserError, match="cannot fetch"):
        load_task(f"hub:{tmp_path / 'absent'}", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_from_the_command_line(tmp_path, checkpoints):
    source = write(tmp_path / "shades", train=24, test=8)
    common = ["--model", checkpoints["cifar"], "--task", f"hub:{source}", "--data", tmp_path / "out",
              "--store", tmp_path / "store", "--json"]  # fmt: skip
    for words in (
        ["extract", "--for", "probe"],
        ["train", "--tuner", "probe", "--epochs", 3, "--out", tmp_path / "run"],
    ):
        result = CliRunner().invoke(main, [str(w) for w in [words[0], *common, *words[1:]]])
        assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["test"]
    found = CliRunner().invoke(
        main, ["predict", str(tmp_path / "run"), "--input", str(tmp_path / "out" / "test"), "--json"]
    )
    assert {p["label"] for p in json.loads(found.stdout)["predictions"]} <= {"dark", "light_bright"}
    # Training needs the store alone.
    shutil.rmtree(tmp_path / "out")
    again = ["train", *map(str, common), "--tuner", "probe", "--epochs", "1", "--out", str(tmp_path / "again")]
    assert CliRunner().invoke(main, again).exit_code == 0
