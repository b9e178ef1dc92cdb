"""Data at hand that is not what was extracted is noticed: GLUE's layout, folders of images, tables of file names."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.jobs.job import load_job
from pipeline.recipe import Recipe
from pipeline.store import StoreError
from tests import vision
from tests.pipeline.test_errors import refused, run
from tests.pipeline.test_versions import extract


def write_rte(folder: Path, flipped: bool = False) -> Path:
    names = ("not_entailment", "entailment")
    (folder / "RTE").mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", 24), ("dev", 12)):
        lines = [f"{i}\tthe cat sleeps {split}\ta dog runs {i}\t{names[(i + flipped) % 2]}" for i in range(rows)]
        text = "\n".join(["index\tsentence1\tsentence2\tlabel", *lines]) + "\n"
        (folder / "RTE" / f"{split}.tsv").write_text(text, encoding="utf-8")
    return folder


def options_of(checkpoint: Path, folder: Path) -> dict[str, str]:
    return {"model": str(checkpoint), "store": str(folder / "store"), "tuner": "probe"}


def test_flipped_labels_of_a_named_task(checkpoints, tmp_path):
    options = options_of(checkpoints["bert"], tmp_path)
    data = {"data": str(write_rte(tmp_path / "glue"))}
    extract(options, Path("rte"), **data)
    before = load_job(Recipe(task="rte", **options, **data)).tables["train"].labels
    write_rte(tmp_path / "glue", flipped=True)
    words = ["--task", "rte", "--data", data["data"], "--model", options["model"], "--store", options["store"]]
    refused(
        run("train", *words, "--tuner", "probe", "--out", tmp_path / "run"), data["data"], "changed", "pipeline extract"
    )
    assert not (tmp_path / "run").exists()
    extract(options, Path("rte"), **data)
    after = load_job(Recipe(task="rte", **options, **data)).tables["train"].labels
    assert sorted(before) == sorted(after) and before != after
    assert load_job(Recipe(task="rte", **options)).tables["train"].labels == after  # the same folder, later


@pytest.fixture
def folder(tmp_path) -> Path:
    return vision.write_folder(tmp_path / "halves", 20)


def changes(folder: Path) -> dict[str, object]:
    left, upper = sorted((folder / "left").iterdir()), sorted((folder / "upper").iterdir())
    return {
        "replaced": lambda: shutil.copyfile(upper[0], left[0]),
        "moved": lambda: left[0].rename(folder / "upper" / f"x{left[0].name}"),
        "gone": left[0].unlink,
    }


@pytest.mark.parametrize("change", ["replaced", "moved", "gone"])
def test_a_changed_picture(checkpoints, tmp_path, folder, change):
    options = options_of(checkpoints["cifar"], tmp_path)
    extract(options, folder)
    assert len(load_job(Recipe(task=str(folder), **options)).tables) == 3
    changes(folder)[change]()
    with pytest.raises(StoreError, match=r"halves.*changed.*pipeline extract"):
        load_job(Recipe(task=str(folder), **options))
    extract(options, folder)
    job = load_job(Recipe(task=str(folder), **options))
    assert sum(map(len, job.tables.values())) == (19 if change == "gone" else 20)
    assert load_job(Recipe(task="halves", **options)).version == job.version


def test_a_replaced_picture_of_a_table_of_names(checkpoints, tmp_path, folder):
    options = options_of(checkpoints["cifar"], tmp_path)
    names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*.png"))]
    rows = "\n".join(f"{name},{name.split('/')[0]}" for name in names)
    (folder / "labels.csv").write_text(f"file,label\n{rows}\n", encoding="utf-8")
    given = {"text": "file"}
    extract(options, folder / "labels.csv", limit=5, **given)
    assert load_job(Recipe(task=str(folder / "labels.csv"), **options))
    changes(folder)["replaced"]()
    with pytest.raises(StoreError, match=r"labels.csv.*changed"):
        load_job(Recipe(task=str(folder / "labels.csv"), **options, **given))


@pytest.mark.parametrize("limit", [None, 5])
def test_a_replaced_picture_of_the_validation_file_that_training_does_not_name(checkpoints, tmp_path, folder, limit):
    """The stored rows name it. Where a limit left rows out, the digest of all images needs the file that names all."""
    options = options_of(checkpoints["cifar"], tmp_path)
    names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*.png"))]
    changed = next(name for name in names if name.startswith("left"))
    for file, own in (("train.csv", [n for n in names if n != changed][::2]), ("val.csv", [changed, *names[1::2]])):
        rows = "\n".join(f"{name},{name.split('/')[0]}" for name in own)
        (folder / file).write_text(f"file,label\n{rows}\n", encoding="utf-8")
    beside = {"validation": str(folder / "val.csv")}
    extract(options, folder / "train.csv", text="file", **beside, **({"limit": limit} if limit else {}))
    asked = Recipe(task=str(folder / "train.csv"), **options)
    assert load_job(asked).tables
    shutil.copyfile(next((folder / "upper").iterdir()), folder / changed)
    with pytest.raises(StoreError, match=r"train.csv.*changed"):
        load_job(asked if limit is None else replace(asked, **beside))


def test_without_the_files_nothing_is_compared(checkpoints, tmp_path, folder):
    options = options_of(checkpoints["cifar"], tmp_path)
    extract(options, folder)
    shutil.rmtree(folder)
    assert load_job(Recipe(task="halves", **options)).tables


def test_a_class_folder_that_is_gone(checkpoints, tmp_path, folder):
    """What is left is no task any more, which is no reason to train on what was there."""
    options = options_of(checkpoints["cifar"], tmp_path)
    extract(options, folder)
    shutil.move(next(p for p in folder.iterdir() if p.is_dir()), tmp_path / "elsewhere")
    words = ["--task", folder, "--model", options["model"], "--store", options["store"], "--tuner", "probe"]
    refused(run("train", *words, "--out", tmp_path / "run"), str(folder), "at least two classes, found 1")


def test_classes_of_masks_that_are_called_otherwise(checkpoints, tmp_path):
    """ADE20K's names stand in a file beside the masks."""
    folder, names = tmp_path / "ade", [f"n{i}" for i in range(1, 151)]
    for split in ("training", "validation"):
        for place, shape in (("images", (32, 32, 3)), ("annotations", (32, 32))):
            (folder / place / split).mkdir(parents=True)
            Image.fromarray(np.full(shape, 2, np.uint8)).save(folder / place / split / "1.png")

    def name(called: list[str]) -> None:
        lines = ["Idx\tName", *(f"{i}\t{n}" for i, n in enumerate(called, 1))]
        (folder / "objectInfo150.txt").write_text("\n".join(lines))

    name(names)
    options = {**options_of(checkpoints["mobilenet"], tmp_path), "tuner": "fixed"}
    extract(options, folder)
    assert load_job(Recipe(task=str(folder), **options))
    name([*names[:2], "sky", *names[3:]])
    with pytest.raises(StoreError, match=r"class 'n3', as it was extracted on .*, is called otherwise"):
        load_job(Recipe(task=str(folder), **options))
