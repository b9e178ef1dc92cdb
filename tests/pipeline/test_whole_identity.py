"""What a store's numbers depend on is checked whole: at training as at extraction, of images as of texts, and of the
checkpoint that computes live; what differs is named."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.extract.feature_space import differences_of, options_of, space_identity
from pipeline.extract.pretrained import Checkpoint
from pipeline.runs import load_run
from pipeline.store import Store, UserError
from tests.pipeline.test_errors import refused, run


@pytest.fixture(scope="module")
def made(checkpoints, table, pictures, tmp_path_factory) -> dict[str, list[object]]:
    """Options of a store with states of texts, and of one with images of 64 pixels in 3 views of seed 9."""
    base = tmp_path_factory.mktemp("whole")
    text = ["--model", checkpoints["bert"], "--task", table, "--text", "first", "--label", "label", "--store",
            base / "texts"]  # fmt: skip
    assert run("extract", *text, "--for", "probe", "--limit", 24).exit_code == 0
    images = ["--model", checkpoints["cifar"], "--task", pictures, "--store", base / "pictures"]
    views = ["--image-size", 64, "--views", 3, "--view-seed", 9]
    assert run("extract", *images, *views, "--for", "probe", "--limit", 16).exit_code == 0
    for name, options in (("texts", text), ("pictures", images)):
        assert run("train", *options, "--tuner", "probe", "--epochs", 1, "--out", base / f"{name}-run").exit_code == 0
    return {"texts": text, "pictures": images}


def run_of(options: list[object]) -> Path:
    store = Path(str(options[-1]))
    return store.with_name(f"{store.name}-run")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--image-size", 96], ["image_size", "64x64", "96x96"]),
        (["--image-size", "own"], ["image_size", "64x64", "own"]),
        (["--image-size", "wide"], ["image-size", "wide"]),
        (["--views", 4, "--view-seed", 9], ["--views", "3", "4"]),
        (["--views", 1], ["views", "none", "seed 9"]),
        (["--view-seed", 8], ["views", "seed 8", "seed 9"]),
    ],
)
def test_how_pictures_are_made_is_checked_at_training(made, asked, words, tmp_path):
    options = ["train", *made["pictures"], "--tuner", "probe", "--epochs", 1, "--out", tmp_path / "run"]
    refused(run(*options, *asked), *words)
    assert not (tmp_path / "run").exists()


def test_image_options_for_texts_and_text_options_for_pictures_are_refused(made, tmp_path):
    texts, images = (["extract", *made[k][:-1], tmp_path / "store", "--for", "probe"] for k in ("texts", "pictures"))
    for asked in (["--image-size", 64], ["--views", 2], ["--skip-bad"]):
        refused(run(*texts, *asked), str(asked[0]), "bert", "text")
    refused(run(*texts, "--prompt", "say: {0}"), "--prompt", "bert")
    for asked in (["--max-length", 64], ["--truncation-side", "left"], ["--prompt", "say: {0}"]):
        refused(run(*images, *asked), str(asked[0]), "resnet", "images")
    refused(run(*images, "--view-seed", 3), "--view-seed", "--views")
    assert not (tmp_path / "store").exists()
    refused(run("train", *made["texts"], "--image-size", 64), "image_size", "absent")
    refused(run("train", *made["texts"], "--skip-bad"), "--skip-bad", "bert", "text")


def test_fewer_views_than_stored_are_the_first_ones_and_the_recipe_says_what_was(made, tmp_path):
    options = ["train", *made["pictures"], "--tuner", "probe", "--epochs", 1]
    fewer = run(*options, "--views", 2, "--view-seed", 9, "--image-size", 64, "--out", tmp_path / "two")
    assert fewer.exit_code == 0 and "32 train rows" in fewer.stderr.replace(" of 48", "")
    assert run(*options, "--out", tmp_path / "all").exit_code == 0
    kept = [yaml.safe_load((tmp_path / name / "recipe.yaml").read_text()) for name in ("two", "all")]
    assert [(k["image_size"], k["views"], k["view_seed"]) for k in kept] == [("64x64", 2, 9), ("64x64", 3, 9)]
    assert run("train", "--recipe", tmp_path / "all" / "recipe.yaml", "--out", tmp_path / "again").exit_code == 0
    scores = [json.loads((tmp_path / name / "metrics.json").read_text())["validation"] for name in ("all", "again")]
    assert scores[0] == scores[1]


def test_the_command_for_what_is_missing_says_how_pictures_are_made(made):
    line = refused(run("train", *made["pictures"], "--tuner", "sherl"), "pipeline extract", "--image-size 64x64")
    assert "--views 3" in line and "--view-seed 9" in line and "--for sherl" in line


def test_a_recipe_of_before_says_one_view_of_pairs_too(checkpoints, table, tmp_path):
    pairs = ["--model", checkpoints["bert"], "--task", table, "--text", "first", "--text-pair", "second", "--label",
             "label", "--store", tmp_path / "store"]  # fmt: skip
    assert run("extract", *pairs, "--for", "probe", "--limit", 12).exit_code == 0
    done = run("train", *pairs, "--tuner", "probe", "--views", 1, "--epochs", 1, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.stderr


def test_a_limit_counts_pictures_not_their_views(made, tmp_path):
    train = ["train", *made["pictures"], "--tuner", "probe", "--max-steps", 1]
    few = run(*train, "--limit", 2, "--out", tmp_path / "few")
    assert few.exit_code == 0 and ": 6 of " in few.stderr and "warning" not in few.stderr, few.stderr
    many = run(*train, "--limit", 40, "--out", tmp_path / "many")
    assert many.exit_code == 0 and "--limit 40" in many.stderr, many.stderr


def test_the_views_of_another_task_are_not_those_of_this_one(made, pictures, tmp_path):
    options = [*made["pictures"][:-1], shutil.copytree(str(made["pictures"][-1]), tmp_path / "store")]
    other = [*options[:3], shutil.copytree(str(pictures), tmp_path / "others"), *options[4:]]
    more = ["--image-size", 64, "--views", 5, "--view-seed", 9, "--limit", 16]
    assert run("extract", *other, *more, "--for", "probe").exit_code == 0
    line = refused(run("train", *options, "--tuner", "sherl"), "pipeline extract")
    assert "--views 3" in line and "--views 5" not in line


def changed(checkpoint: object, folder: Path, file: str, change) -> Path:
    shutil.copytree(Path(str(checkpoint)), folder)
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))
    return folder


def other_eps(config) -> None:
    config["layer_norm_eps"] = 0.5


def other_words(tokenizer) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


@pytest.mark.parametrize(
    ("field", "file", "change"), [("config", "config.json", other_eps), ("tokenizer", "tokenizer.json", other_words)]
)
def test_predict_and_live_check_more_than_the_weights(made, table, tmp_path, field, file, change):
    options = made["texts"]
    other = changed(options[1], tmp_path / "bert", file, change)
    said = refused(run("predict", run_of(options), "--input", table, "--model", other), field, "bert")
    assert "tokenizer" in said if field == "tokenizer" else "tokenizer" not in said
    (space,) = Store.open(options[-1]).spaces()
    live = ["train", "--model", other, *options[2:], "--tuner", "probe", "--live", "--out", tmp_path / "run"]
    refused(run(*live, "--space", space.id), field)
    assert not (tmp_path / "run").exists()


def test_other_preprocessing_is_noticed(made, pictures, tmp_path):
    options = made["pictures"]
    other = changed(
        options[1], tmp_path / "cifar", "preprocessor_config.json", lambda c: c.update(image_mean=[0.5] * 3)
    )
    refused(run("predict", run_of(options), "--input", pictures, "--model", other), "mean", "0.485,0.456,0.406")


def test_a_space_and_another_model_contradict_each_other(made, checkpoints, tmp_path):
    options = made["texts"]
    (space,) = Store.open(options[-1]).spaces()
    other = changed(options[1], tmp_path / "bert", "config.json", other_eps)
    for model, word in ((checkpoints["roberta"], "weights"), (other, "config"), ("roberta-base", "'roberta-base'")):
        given = ["train", "--model", model, *options[2:], "--tuner", "probe", "--space", space.id[:8]]
        refused(run(*given, "--out", tmp_path / "run"), word)
    assert not (tmp_path / "run").exists()
    given = ["train", *options, "--tuner", "probe", "--epochs", 1, "--space", space.id[:8], "--out", tmp_path / "run"]
    assert run(*given).exit_code == 0


def test_a_run_is_scored_without_its_checkpoint_and_says_when_its_space_is_gone(made, checkpoints, tmp_path):
    options = made["texts"]
    folder = tmp_path / "run"
    shutil.copytree(run_of(options), folder)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    # The checkpoint's folder may hold something else by now: scores come from the store.
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "model": str(checkpoints["roberta"])}))
    assert run("evaluate", folder).exit_code == 0
    refused(run("evaluate", folder, "--store", made["pictures"][-1]), "run")
    refused(run("predict", folder, "--input", options[3], "--text", "first"), "weights")


def test_a_live_run_without_a_store_is_read_with_the_checkpoint_it_had(made, tmp_path):
    options = [*made["texts"][:-1], tmp_path / "nowhere", "--limit", 24]
    live = ["train", *options, "--tuner", "probe", "--live", "--epochs", 1, "--out", tmp_path / "run"]
    assert run(*live).exit_code == 0
    given = ["--input", options[3], "--text", "first"]
    assert run("predict", tmp_path / "run", *given).exit_code == 0
    other = changed(options[1], tmp_path / "bert", "config.json", other_eps)
    refused(run("predict", tmp_path / "run", *given, "--model", other), "another feature space", "nowhere")


def test_the_options_of_an_identity_give_it_again(made):
    for options in made.values():
        (space,) = Store.open(options[-1]).spaces()
        checkpoint = Checkpoint(Path(str(options[1])), "it")
        assert space_identity(checkpoint, options_of(space.identity)) == dict(space.identity)
        assert not differences_of(checkpoint, space.identity)
        assert [name for name, *_ in differences_of(checkpoint, {**space.identity, "later": 1})] == ["later"]
        for wrong in ({"views": None}, {"max_length": "x"}):
            with pytest.raises(UserError, match="does not say"):
                options_of({**space.identity, **wrong})
        with pytest.raises(UserError, match="projection_fit"):
            options_of({k: v for k, v in space.identity.items() if k != "projection_fit"})


def turned(path: Path, orientation: int, seed: int = 0) -> np.ndarray:
    """An image wider than tall, its EXIF orientation set; the pixels as they are in the file (H, W, 3)."""
    values = np.random.default_rng(seed).integers(0, 255, (24, 40, 3)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(values).save(path, exif=exif)
    return values


def test_a_space_of_before_orientation_keeps_meaning_pixels_as_they_are(checkpoints, tmp_path, monkeypatch):
    for i in range(12):
        turned(tmp_path / "photos" / ("a", "b")[i % 2] / f"{i}.png", 6, i)
    common = ["--model", checkpoints["cifar"], "--task", tmp_path / "photos", "--store", tmp_path / "store"]
    train = ["train", *common, "--tuner", "probe", "--epochs", 1, "--format", "float32"]
    with monkeypatch.context() as patch:  # as an earlier version extracted
        from pipeline.extract.backbones.base import TextOptions

        usual = [False if f.name == "upright" else f.default for f in fields(TextOptions)]
        patch.setattr(TextOptions.__init__, "__defaults__", tuple(usual))
        assert run("extract", *common, "--for", "probe", "--format", "float32").exit_code == 0
    (old,) = Store.open(tmp_path / "store").spaces()
    assert "orientation" not in old.identity
    assert run(*train, "--out", tmp_path / "old").exit_code == 0
    assert run(*train, "--live", "--out", tmp_path / "old-live").exit_code == 0
    log = [json.loads((tmp_path / name / "metrics.json").read_text())["validation"] for name in ("old", "old-live")]
    assert log[0] == log[1]
    assert run("extract", *common, "--for", "probe", "--format", "float32").exit_code == 0
    assert {s.identity.get("orientation") for s in Store.open(tmp_path / "store").spaces()} == {None, "exif"}
    refused(run(*train, "--out", tmp_path / "which"), "orientation", "--space")
    upright = Image.open(tmp_path / "photos" / "a" / "0.png").transpose(Image.Transpose.ROTATE_270)
    upright.save(tmp_path / "upright.png")
    answers = [load_run(tmp_path / "old").predict([("upright.png",)], tmp_path)]
    assert answers[0][0]["label"] in ("a", "b")
    with pytest.raises(UserError, match="no such file"):
        load_run(tmp_path / "old").predict([("gone.png",)], tmp_path)
