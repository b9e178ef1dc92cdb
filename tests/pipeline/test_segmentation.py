"""Segmentation from the command line on generated scenes of unequal sizes: cached = live, what is told is what is
scored, bad input by name."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from pipeline.cli.main import main
from pipeline.extract.backbones import TextOptions
from pipeline.extract.geometry import Geometry
from pipeline.extract.pretrained import Checkpoint
from pipeline.extract.tasks import load_task
from pipeline.extract.tasks.masks import read_mask
from pipeline.runs import file_names
from pipeline.store import Store
from pipeline.train.objective_configs import SegmentationConfig
from pipeline.train.objectives import Answers
from pipeline.train.objectives.segmentation import Segmentation
from tests.scenes import COLOURS, write_scenes
from tests.vision import MEAN, STD


def run(*words, ok: bool = True):
    result = CliRunner().invoke(main, [*map(str, words), "--json"])
    assert (result.exit_code == 0) == ok, result.output
    return json.loads(result.stdout) if ok else result.stderr


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("dense") / "scenes", {"train": 8, "val": 4, "test": 4})


@pytest.fixture(scope="module")
def extracted(scenes, checkpoints, tmp_path_factory):
    """A store of the images of unequal sizes and their mirror images, by backbone and tuner; made when asked for."""
    folder, there = tmp_path_factory.mktemp("dense") / "mirrored", set()

    def made(model, tuner):
        if (model, tuner) not in there:
            words = ["--model", checkpoints[model], "--task", scenes, "--image-size", "own", "--for", tuner]
            run("extract", *words, "--views", 2, "--augment", "flip", "--format", "float32", "--store", folder)
            there.add((model, tuner))
        return folder

    return made


@pytest.fixture(scope="module")
def store(scenes, checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "store"
    done = run(
        "extract", "--model", checkpoints["mobilenet"], "--task", scenes, "--objective", "segmentation", "--image-size",
        "own", "--for", "fixed", "--format", "float32", "--store", folder,
    )  # fmt: skip
    assert done["computed"] == 16
    return folder


def losses(folder):
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


QUICK = [("mobilenet", "fixed", "fcn"), ("swin", "e3va", "upernet"), ("vit", "fixed", "upernet"),
         ("swin_hf", "fixed", "linear")]  # fmt: skip
GRID = [(model, "fixed", head) for model in ("swin", "swin_hf", "mobilenet", "vit", "clip", "dinov2", "dinov3")
        for head in ("upernet", "fcn", "linear")]  # fmt: skip
GRID += [("swin_hf", "e3va", "upernet"), ("vit", "sherl", "upernet"), ("dinov3", "unipt", "upernet")]


@pytest.mark.parametrize(
    ("model", "tuner", "head"), [*QUICK, *(pytest.param(*c, marks=pytest.mark.matrix) for c in GRID if c not in QUICK)]
)
def test_cached_is_live_at_unequal_sizes_and_mirrored(scenes, extracted, checkpoints, tmp_path, model, tuner, head):
    words = ["train", "--model", checkpoints[model], "--task", scenes, "--tuner", tuner]
    words += ["--store", extracted(model, tuner), "--head", head, "--batch-size", 3, "--epochs", 4, "--max-steps", 20]
    words += ["--no-group-by-length", *([] if head == "linear" else ["--head-width", 8])]
    cached, live = run(*words, "--out", tmp_path / "a"), run(*words, "--live", "--out", tmp_path / "b")
    one, other = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert len(one) == 20 and np.abs(np.subtract(one, other)).max() <= 1e-5
    assert cached["test"].keys() == {"miou", "pixel_accuracy"}
    assert cached["test"] == pytest.approx(live["test"], abs=1e-3)


def test_what_is_told_is_what_is_scored(scenes, store, checkpoints, tmp_path):
    words = ["--model", checkpoints["mobilenet"], "--task", scenes, "--store", store]
    trained = run("train", *words, "--tuner", "fixed", "--head-width", 16, "--epochs", 4, "--out", tmp_path / "run")
    told = run("predict", tmp_path / "run", "--input", scenes / "test", "--out-dir", tmp_path / "told")
    assert [p["mask"] for p in told["predictions"]] == [f"{i:03d}.png" for i in range(4)]
    counts = np.zeros((4, 4), np.int64)
    rows = load_task(str(scenes)).rows("test")
    for (name,), data in zip(rows.texts, rows.labels, strict=True):
        truth, guess = read_mask(data, ""), np.asarray(Image.open(tmp_path / "told" / name.split("/")[1]))
        assert guess.shape == truth.shape and guess.dtype == np.uint8
        known = truth != 255
        np.add.at(counts, (truth[known], guess[known]), 1)
        overlay = Image.open(tmp_path / "told" / "overlays" / name.split("/")[1].replace("png", "jpg"))
        assert overlay.size == truth.shape[::-1]
    right, there = np.diag(counts), (counts.sum(0) + counts.sum(1)) > 0
    union = counts.sum(0) + counts.sum(1) - right
    expected = {"miou": (right[there] / union[there]).mean(), "pixel_accuracy": right.sum() / counts.sum()}
    assert trained["test"] == pytest.approx(expected, abs=2e-3)  # the backbone ran on other batches
    scored = run("evaluate", tmp_path / "run")
    assert {k: scored[k] for k in expected} == pytest.approx(trained["test"])
    assert "--out-dir is missing" in run("predict", tmp_path / "run", "--input", scenes / "test", ok=False)
    shutil.copytree(scenes / "test", tmp_path / "mine")
    before = {path: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    refusal = run("predict", tmp_path / "run", "--input", tmp_path / "mine", "--out-dir", tmp_path / "mine", ok=False)
    assert "000.png is an image to be read; name another folder" in refusal
    assert {path: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == before


def test_files_of_two_images_have_two_names():
    assert file_names(["a/1.png", "b/1.png", "2.jpg", "2.jpg"]) == ["a/1", "b/1", "2", "2"]
    assert file_names(["a.jpg", "a.png"]) == ["a.jpg", "a.png"]
    assert file_names(["../x/a.png", "../y/a.png", "../x/a.png"]) == ["a.png", "a.png-2", "a.png"]
    assert len(set(file_names(["a.jpg", "a.png", "a.jpg.png"]))) == 3


def test_a_class_that_is_ignored_is_neither_learned_nor_told(scenes, store, checkpoints, tmp_path):
    words = ["--model", checkpoints["mobilenet"], "--task", scenes, "--store", store, "--tuner", "fixed"]
    run("train", *words, "--head", "linear", "--ignore-index", 0, "--epochs", 2, "--out", tmp_path / "run")
    told = run("predict", tmp_path / "run", "--input", scenes / "test" / "001.png", "--out-dir", tmp_path / "told")
    (entry,) = told["predictions"]
    assert "0" not in entry["shares"] and np.asarray(Image.open(tmp_path / "told" / "001.png")).min() > 0


def test_projected_branches_train_as_live(scenes, checkpoints, tmp_path):
    words = ["--model", checkpoints["swin"], "--task", scenes, "--store", tmp_path / "store"]
    extract = ["extract", *words, "--image-size", "own", "--format", "float32"]
    for projection, tuner in (("pca:12", "fixed"), ("pca:99", "e3va")):
        said = run(*extract, "--projection", projection, "--for", tuner, ok=False)
        assert ("read full states alone" if tuner == "fixed" else "choose fewer") in said
    assert not (tmp_path / "store").exists()
    done = run(*extract, "--projection", "pca:12", "--for", "e3va")
    (space,) = Store.open(tmp_path / "store").spaces()
    widths = {name: len(next(space.samples(name))[1][0]) for name in ("stage1.0.msa", "stage3.0.msa", "stage3.1")}
    assert done["computed"] == 16 and widths == {"stage1.0.msa": 8, "stage3.0.msa": 12, "stage3.1": 32}
    train = ["train", *words, "--head", "linear", "--epochs", 1, "--batch-size", 3]
    for name, more in (("a", []), ("b", ["--live"])):
        run(*train, "--tuner", "e3va", "--alpha", 2, *more, "--out", tmp_path / name)
    one, other = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert np.abs(np.subtract(one, other)).max() <= 1e-5
    for options in ("--start zero", "--fusion highway", "--order stacked"):
        said = run(*train, "--tuner", "e3va", *options.split(), "--out", tmp_path / "e", ok=False)
        assert "E³VA reads projected branches with" in said


@pytest.mark.parametrize(("name", "tuner"), [("mobilenet", "fixed"), ("swin", "e3va"),
                                                pytest.param("vit", "fixed", marks=pytest.mark.matrix)])  # fmt: skip
def test_maps_of_few_channels_train_as_live(scenes, checkpoints, tmp_path, name, tuner):
    """What heads read is stored in six channels and of full width to them: cached = live, parameters are as many."""
    words = ["--model", checkpoints[name], "--task", scenes, "--store", tmp_path / "store"]
    extract = ["extract", *words, "--image-size", "own", "--format", "float32", "--projection", "pca-maps:6"]
    assert "reads full states, not pca-maps:6" in run(*extract, "--for", "probe", ok=False)
    run(*extract, "--for", tuner)
    (space,) = Store.open(tmp_path / "store").spaces()
    names = {s for segment in space.segments() for s in segment.states}
    assert {len(next(space.samples(state))[1][0]) for state in names} == {6}
    train = ["train", *words, "--head", "linear", "--tuner", tuner, "--epochs", 1, "--batch-size", 3]
    cached, live = (run(*train, *more, "--out", tmp_path / at) for at, more in (("a", []), ("b", ["--live"])))
    one, other = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert len(one) > 1 and np.abs(np.subtract(one, other)).max() <= 1e-5
    full = run(*train, "--live", "--projection", "none", "--store", tmp_path / "none", "--image-size", "own",
               "--max-steps", 1, "--out", tmp_path / "c")  # fmt: skip
    if tuner == "fixed":  # adapters read the six channels of branches
        assert full["trainable_parameters"] == cached["trainable_parameters"] == live["trainable_parameters"]
    scored = run("evaluate", tmp_path / "a")
    assert scored["miou"] == pytest.approx(cached["test"]["miou"])


def test_what_was_said_to_be_no_class_when_extracting_is_none_ever_after(scenes, checkpoints, tmp_path):
    words = ["--model", checkpoints["mobilenet"], "--task", scenes, "--store", tmp_path / "store"]
    run("extract", *words, "--for", "fixed", "--ignore-index", 0, "--image-size", "own")
    train = ["train", *words, "--tuner", "fixed", "--head", "linear", "--epochs", 1]
    run(*train, "--out", tmp_path / "run"), run(*train, "--live", "--out", tmp_path / "live")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "live"), abs=1e-2)
    told = run("predict", tmp_path / "run", "--input", scenes / "test", "--out-dir", tmp_path / "told")
    assert all(entry["shares"].keys() <= {"1", "2", "3"} for entry in told["predictions"])
    assert np.asarray(Image.open(tmp_path / "told" / "001.png")).min() > 0


def test_whole_images_at_a_size_of_ones_own(scenes, checkpoints, tmp_path):
    words = ["--model", checkpoints["mobilenet"], "--task", scenes, "--store", tmp_path / "store"]
    run("extract", *words, "--image-size", "48x80", "--for", "fixed")
    trained = run("train", *words, "--tuner", "fixed", "--head", "linear", "--epochs", 1, "--out", tmp_path / "run")
    told = run("predict", tmp_path / "run", "--input", scenes / "val", "--out-dir", tmp_path / "told")
    run("predict", tmp_path / "run", "--input", scenes / "test", "--out-dir", tmp_path / "test")
    drawn, truth = (
        np.concatenate([np.asarray(Image.open(file)).ravel() for file in sorted(folder.glob("*.png"))])
        for folder in (tmp_path / "test", scenes / "testannot")
    )
    right = np.mean((drawn == truth)[truth != 255])
    assert trained["test"]["pixel_accuracy"] == pytest.approx(right, abs=1e-3)
    for entry in told["predictions"]:
        assert Image.open(tmp_path / "told" / entry["mask"]).size == Image.open(scenes / "val" / entry["id"]).size


REFUSED = {
    "--tuner sherl": "SHERL's live layer is the last of two blocks",
    "--tuner fixed --layers 1": "layers: the head reads the backbone's feature pyramid",
    "--head fcn --auxiliary-weight 0.4": "auxiliary_weight: upernet has an auxiliary head, fcn has none",
    "--head linear --head-width 8": "head_width: a linear head is a single linear map",
    "--objective classification": "learns targets of type class, these are mask",
    "--metric accuracy": "objective segmentation is scored by miou, pixel_accuracy",
    "--ignore-index 300": "ignore_index: at least 0 and at most 255",
    "--head unet": "Invalid value for '--head'",
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_does_not_fit_is_refused_in_a_line(scenes, store, checkpoints, tmp_path, options):
    words = [
        "train",
        "--model",
        checkpoints["mobilenet"],
        "--task",
        scenes,
        "--store",
        store,
        "--out",
        tmp_path / "run",
    ]
    words += ["--tuner", "fixed"] if "--tuner" not in options else []
    if "--objective" not in options:
        words += ["--objective", "segmentation"]
    said = run(*words, *options.split(), ok=False)
    assert REFUSED[options] in said and "Traceback" not in said and not (tmp_path / "run").exists()


def test_an_unreadable_image_stops_extraction_by_name(scenes, checkpoints, tmp_path):
    folder = write_scenes(tmp_path / "scenes", {"train": 3, "val": 1})
    (folder / "train" / "001.png").write_bytes(b"no image")
    words = ["extract", "--model", checkpoints["mobilenet"], "--task", folder, "--store", tmp_path / "store", "--for",
             "fixed"]  # fmt: skip
    assert "001.png: damaged image" in run(*words, ok=False) and not (tmp_path / "store").exists()
    done = run(*words, "--skip-bad")
    assert done["rows"] == {"train": 2, "validation": 1} and done["skipped"] == 1


def test_a_flip_is_stored_beside_the_picture_and_trained_on_as_live(scenes, checkpoints, tmp_path):
    words = ["--model", checkpoints["mobilenet"], "--task", scenes, "--store", tmp_path / "store"]
    views = ["--views", 2, "--augment", "flip"]
    done = run("extract", *words, *views, "--image-size", "own", "--for", "fixed", "--format", "float32")
    assert done["computed"] == 2 * 8 + 4 + 4 and done["rows"] == {"train": 16, "validation": 4, "test": 4}
    train = ["train", *words, "--tuner", "fixed", "--head", "linear", "--epochs", 3, "--batch-size", 4]
    run(*train, "--out", tmp_path / "a"), run(*train, "--live", "--out", tmp_path / "b")
    one, other = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert len(one) == 12 and np.abs(np.subtract(one, other)).max() <= 1e-5
    space = Store.open(tmp_path / "store").spaces()[0]
    assert space.identity["views"] == "flip" and space.identity["padding"] == "zeros to 32"
    for more in (["--views", 3], ["--views", 2, "--view-seed", 1], []):
        said = run("extract", *words, *more, "--augment", "flip", "--for", "fixed", ok=False)
        assert "--augment flip: there are two views" in said


def test_seeded_views_carry_their_masks(scenes, checkpoints, tmp_path):
    views = 3
    words = ["--model", checkpoints["mobilenet"], "--task", scenes, "--store", tmp_path / "store"]
    run("extract", *words, "--views", views, "--image-size", "own", "--for", "fixed", "--format", "float32")
    train = ["train", *words, "--tuner", "fixed", "--head", "linear", "--epochs", 1]
    run(*train, "--out", tmp_path / "a"), run(*train, "--live", "--out", tmp_path / "b")
    assert np.abs(np.subtract(losses(tmp_path / "a"), losses(tmp_path / "b"))).max() <= 1e-5
    space = Store.open(tmp_path / "store").spaces()[0]
    (table,) = [space.read_table(t) for t in space.tables() if t.split == "train"]
    assert len(table) == 8 * views and len({bytes(label) for label in table.labels}) == 8
    assert sum(Geometry.of(meta).plain for meta in table.metas) == 8
    objective = Segmentation(SegmentationConfig(), Answers.of_classes(4))
    options = TextOptions(root=str(scenes), image_size="own", views=views, dense=True)
    point = Checkpoint(checkpoints["mobilenet"], "mobilenet")
    for texts, label, meta in zip(table.texts, table.labels, table.metas, strict=True):
        (shown,) = point.backbone.prepare(point.tokenizer, [texts], options).pictures
        tall, wide = Geometry.of(meta).seen
        pixels = shown.pixels()[:, :tall, :wide].permute(1, 2, 0) * torch.tensor(STD) + torch.tensor(MEAN)
        # What is painted in a view, by the colours of its pixels, which a view may have made brighter or paler.
        seen = torch.cdist(pixels.view(-1, 3), torch.from_numpy((COLOURS + 15) / 255).float()).argmin(1).numpy()
        carried = objective.encode(label, meta)["mask"]
        known = carried != 255
        assert (seen == carried)[known].mean() > 0.95 and known.mean() > 0.9


def test_a_folder_that_has_changed_is_no_longer_what_was_extracted(checkpoints, tmp_path):
    """Also where it is none that could be extracted any more."""
    folder = write_scenes(tmp_path / "scenes", {"train": 4, "val": 1, "test": 1})
    words = ["--model", checkpoints["mobilenet"], "--task", folder, "--store", tmp_path / "store"]
    run("extract", *words, "--for", "fixed")
    train = ["train", *words, "--tuner", "fixed", "--head", "linear", "--epochs", 1, "--out", tmp_path / "run"]
    names = folder / "classes.txt"
    names.write_text("ground\nred\ngreen\nblue\n")
    assert "has changed" in run(*train, ok=False)
    names.unlink()
    mask = folder / "trainannot" / "000.png"
    kept = mask.read_bytes()
    mask.write_bytes(b"no mask")
    assert "000.png: no mask that can be read" in run(*train, ok=False)
    mask.unlink()
    assert "there is no mask of this name" in run(*train, ok=False)
    mask.write_bytes(kept)
    assert "--separator is for a table" in run(*train, "--separator", ";", ok=False)
    assert run(*train)["steps"] == 2
