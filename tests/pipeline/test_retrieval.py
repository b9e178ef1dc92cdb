"""Two towers from the command line: tables of pairs, hinge and contrastive objectives, ranks, search; and what is
refused. Images and captions show the same colour, so that which belong together can be learned."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pipeline
from pipeline.commands.train import next_commands
from pipeline.extract.tasks import load_task
from pipeline.extract.tasks.captions import Paired
from pipeline.runs import load_run
from pipeline.store.errors import UserError
from pipeline.train.fit import loop
from tests import forks
from tests.pipeline.test_errors import refused
from tests.pipeline.test_errors import run as invoke
from tests.pipeline.test_objectives import run
from tests.pipeline.test_slots import losses
from tests.train.test_ranks import forked

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "old": (30, 200, 30), "young": (200, 200, 40)}
CAPTIONS = 3
KEYS = ["i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "rsum", "i2t_median", "t2i_median"]
FAST = ["--batch-size", 16, "--joint-width", 32, "--device", "cpu"]


def captioned(folder: Path, images: int = 30, seed: int = 0, suffix: str = ".png") -> list[tuple[str, str]]:
    """Images of unequal sizes below `folder`, and pairs of a name and a caption, CAPTIONS an image."""
    rng, rows = np.random.default_rng(seed), []
    folder.mkdir(parents=True)
    for i in range(images):
        colour = list(COLOURS)[i % len(COLOURS)]
        shape = (32 + 32 * (i % 2), 32 + 32 * (i % 3), 3)
        pixels = np.clip(rng.normal(COLOURS[colour], 40, shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}{suffix}")
        told = f"{' sleeps' * (i % 4)} number {i}"
        rows += [(f"{i:02}{suffix}", f"the {colour} {word}{told}") for word in ("cat", "dog", "tree")]
    return rows


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    return path


@pytest.fixture(scope="module")
def made(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A table of pairs through a CNN that sees images at their own sizes, and a text encoder."""
    folder = tmp_path_factory.mktemp("retrieval")
    rows = captioned(folder / "images")
    table = write(folder / "captions.csv", rows)
    options = ["--model", f"image={checkpoints['resnet']},text={checkpoints['bert']}", "--task", table]
    options += ["--image", "image", "--text", "caption", "--data", folder / "images", "--image-size", "own"]
    options += ["--store", folder / "store"]
    tuners = "probe,sherl,unipt,sherl-vse,unipt-vse"
    done = run("extract", *options, "--for", tuners, "--format", "float32")
    return {"options": options, "folder": folder, "rows": rows, "done": done}


def test_a_table_of_pairs_is_split_by_image(made: dict[str, Any]) -> None:
    assert made["done"]["rows"] == {"train": 72, "validation": 9, "test": 9}
    assert made["done"]["samples"] == made["done"]["computed"] == 30 + 90  # an image is stored once for its captions
    path = made["folder"] / "captions.csv"
    texts = load_task(str(path), text="caption", paired=Paired("image"))
    images = load_task(str(path), text="image", paired=Paired("image", files=True))
    guessed = load_task(str(path), paired=Paired(files=True))
    assert guessed.splits["test"].texts == images.splits["test"].texts
    seen: dict[str, str] = {}
    for split, rows in images.splits.items():
        pairs = list(zip(rows.texts, texts.splits[split].texts, strict=True))
        assert all((name, text) in made["rows"] for (name,), (text,) in pairs)
        assert all(seen.setdefault(name, split) == split for (name,), _ in pairs)
    assert len(seen) == 30


@pytest.mark.parametrize(
    ("tuner", "more"),
    [
        ("probe", ["--objective", "hinge"]),
        (
            "image=sherl-vse,text=unipt-vse",
            ["--objective", "hinge", "--pooling", "gpo", "--drop-cells", 0.2, "--cells", 2, "--negatives", "hardest"],
        ),
        pytest.param("unipt-vse", ["--objective", "contrastive"], marks=pytest.mark.matrix),
        pytest.param("image=unipt-vse,text=sherl-vse", ["--pooling", "max"], marks=pytest.mark.matrix),
    ],
)
def test_cached_is_live(made: dict[str, Any], tmp_path: Path, tuner: str, more: list[Any]) -> None:
    """20 steps and more on images and texts of unequal sizes; scores, and what is predicted of new pairs."""
    how = [*made["options"], "--tuner", tuner, *more, *FAST, "--epochs", 4, "--lr", 1e-3]
    cached = run("train", *how, "--out", tmp_path / "cached")
    live = run("train", *how, "--live", "--out", tmp_path / "live")
    assert list(cached["test"]) == KEYS
    assert cached["test"]["rsum"] == pytest.approx(sum(cached["test"][k] for k in KEYS[:6]))
    one, other = losses(tmp_path / "cached"), losses(tmp_path / "live")
    assert len(one) >= 20 and one == pytest.approx(other, abs=1e-4)
    assert cached["test"] == live["test"]
    again = run("evaluate", tmp_path / "cached")
    assert {k: again[k] for k in KEYS} == cached["test"]
    if tuner == "probe":
        new = write(made["folder"] / "images" / "new.csv", made["rows"][:7])
        told = [run("predict", tmp_path / name, "--input", new)["predictions"] for name in ("cached", "live")]
        for a, b in zip(*told, strict=True):
            assert a["similarity"] == pytest.approx(b["similarity"], abs=1e-4) and -1 <= a["similarity"] <= 1


@pytest.fixture(scope="module")
def trained(made: dict[str, Any]) -> Path:
    folder = made["folder"] / "run"
    how = ["--tuner", "probe", "--objective", "contrastive", *FAST, "--epochs", 20, "--lr", 0.01]
    done = run("train", *made["options"], *how, "--out", folder)
    assert done["test"]["t2i_r1"] > 50  # of 3 images of three colours
    return folder


def test_search_both_ways(made: dict[str, Any], trained: Path) -> None:
    found = run("search", trained, "--query", "the red cat", "--top", 5)
    assert found["among"] == 30 and [r["rank"] for r in found["results"]] == [1, 2, 3, 4, 5]
    reds = {name for name, caption in made["rows"] if " red " in caption}
    assert sum(r["image"] in reds for r in found["results"]) >= 4
    similar = [r["similarity"] for r in found["results"]]
    assert similar == sorted(similar, reverse=True)
    back = run("search", trained, "--image", made["folder"] / "images" / "01.png", "--top", 3, "--split", "train")
    assert back["among"] == 72 and all(" blue " in r["text"] and r["split"] == "train" for r in back["results"])


def test_what_comes_next_is_a_search_too(made: dict[str, Any], trained: Path) -> None:
    lines = next_commands(load_run(trained).job, trained)
    assert lines[-1] == f"pipeline search {trained} --query TEXT" and len(lines) == 3
    assert invoke(*lines[-1].split()[1:-1], "a red cat").exit_code == 0


def test_search_gives_what_predict_says(made: dict[str, Any], trained: Path) -> None:
    """A stored caption as a query is embedded live; its similarity to stored images is that of the pair."""
    name, caption = made["rows"][0]
    first = run("search", trained, "--query", caption, "--top", 30)["results"]
    new = write(made["folder"] / "images" / "pair.csv", [(name, caption)])
    (told,) = run("predict", trained, "--input", new)["predictions"]
    (here,) = [r for r in first if r["image"] == name]
    assert here["similarity"] == pytest.approx(told["similarity"], abs=1e-5)


def test_a_table_of_pairs_lies_anywhere(made: dict[str, Any], trained: Path, tmp_path: Path) -> None:
    """Its images are named from --data."""
    new = write(tmp_path / "pair.csv", made["rows"][:2])
    there = write(made["folder"] / "images" / "same.csv", made["rows"][:2])
    told = run("predict", trained, "--input", new, "--data", made["folder"] / "images")["predictions"]
    assert told == run("predict", trained, "--input", there)["predictions"]
    refused(invoke("predict", trained, "--input", new, "--data", tmp_path / "gone"), "--data", "no such folder")
    refused(invoke("predict", trained, "--input", there.parent, "--data", tmp_path), "--data", "a table names")


def test_changed_images_are_noticed_without_the_files_of_the_extraction(made: dict[str, Any], tmp_path: Path) -> None:
    """Which images there were the stored rows say."""
    shutil.copytree(made["folder"] / "images", tmp_path / "images")
    parts = {"train": made["rows"][:60], "validation": made["rows"][60:75], "test": made["rows"][75:]}
    train, validation, test = (write(tmp_path / f"{name}.csv", rows) for name, rows in parts.items())
    options = [*made["options"], "--data", tmp_path / "images", "--store", tmp_path / "store", "--task", train]
    run("extract", *options, "--validation", validation, "--test", test, "--for", "probe")
    how = [*options, "--tuner", "probe", "--objective", "hinge", *FAST, "--epochs", 1]
    assert run("train", *how, "--out", tmp_path / "one")["stopped"] == "done"
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / "29.png")  # of the test split
    refused(invoke("train", *how, "--out", tmp_path / "two"), "slot image", "have changed")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], ["one of --query", "--image"]),
        (["--query", "a", "--image", "b.png"], ["one of"]),
        (["--query", "  "], ["--query", "blank"]),
        (["--image", "nowhere.png"], ["nowhere.png", "no such file"]),
        (["--query", "a", "--split", "dev"], ["--split dev", "validation"]),
        (["--query", "a", "--slot", "image"], ["--slot image", "text"]),
    ],
)
def test_searches_that_are_refused(trained: Path, more: list[str], words: list[str]) -> None:
    refused(invoke("search", trained, *more), *words)


def test_a_run_that_compares_nothing_is_not_searched(checkpoints: dict[str, Path], table: Path, tmp_path: Path) -> None:
    options = ["--model", checkpoints["bert"], "--task", table, "--text", "first", "--label", "label"]
    options += ["--store", tmp_path / "s"]
    run("extract", *options, "--for", "probe")
    run("train", *options, "--tuner", "probe", "--epochs", 1, "--out", tmp_path / "run")
    refused(invoke("search", tmp_path / "run", "--query", "a"), "compares no slots", "hinge, contrastive"[:5])
    refused(invoke("train", *options, "--tuner", "probe", "--objective", "hinge", "--out", tmp_path / "x"), "hinge")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--objective", "hinge", "--accumulate", 2], ["--accumulate", "hinge", "each other"]),
        (["--objective", "contrastive", "--batch-size", 1], ["--batch-size 1", "contrastive", "2 at least"]),
        (["--objective", "hinge", "--metric", "accuracy"], ["--metric accuracy", "rsum"]),
        (["--objective", "hinge", "--logit-scale", 20], ["--logit-scale is an option of contrastive"]),
        (["--objective", "hinge", "--eval-folds", 5], ["--eval-folds 5", "3 distinct"]),
    ],
)
def test_training_that_is_refused(made: dict[str, Any], tmp_path: Path, more: list[Any], words: list[str]) -> None:
    how = ["--tuner", "probe", *FAST, "--epochs", 1, "--out", tmp_path / "run"]
    refused(invoke("train", *made["options"], *how, *more), *words)


def test_an_objective_for_labels_is_refused(made: dict[str, Any], tmp_path: Path) -> None:
    how = ["--tuner", "probe", "--objective", "classification", "--out", tmp_path / "run"]
    refused(invoke("train", *made["options"], *how), "classification", "pair")


def test_widths_that_do_not_fit(made: dict[str, Any], tmp_path: Path) -> None:
    how = [*made["options"], "--objective", "hinge", "--device", "cpu", "--out", tmp_path / "run"]
    refused(invoke("train", *how, "--tuner", "unipt-vse", "--joint-width", 33), "reduction", "33")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("gone.png", "a cat")], ["slot image", "gone.png", "no such file"]),
        ([("00.png", " ")], ["row 91", "'caption'", "empty"]),
        ([("", "a cat")], ["row 91", "'image'", "empty"]),
    ],
)
def test_a_pair_that_is_not_whole(made: dict[str, Any], tmp_path: Path, rows: Any, words: list[str]) -> None:
    table = write(tmp_path / "lost.csv", [*made["rows"], *rows])
    options = [table if o == made["folder"] / "captions.csv" else o for o in made["options"]]
    options[-1] = tmp_path / "store"
    refused(invoke("extract", *options, "--for", "probe"), *words)
    assert not (tmp_path / "store").exists()


def test_states_of_both_slots_are_computed_again(made: dict[str, Any]) -> None:
    """By the checkpoints as extract takes them: folders have no name that says where they are."""
    verify = [
        "store",
        "verify",
        "--store",
        made["folder"] / "store",
        "--recompute",
        3,
        "--data",
        made["folder"] / "images",
    ]
    done = run(*verify, "--model", made["options"][1])
    assert [found["samples"] for found in done["recomputed"]] == [3, 3] and all(f["ok"] for f in done["recomputed"])
    alone = made["options"][1].partition(",")[0].partition("=")[2]
    refused(invoke(*verify, "--model", alone), "is not what the feature space was extracted with")


def test_folds_are_told_beside_the_whole(made: dict[str, Any], tmp_path: Path) -> None:
    how = ["--tuner", "probe", "--objective", "hinge", *FAST, "--epochs", 1, "--eval-folds", 2]
    done = run("train", *made["options"], *how, "--out", tmp_path / "run")
    assert list(done["test"]) == [*KEYS, *(f"fold_{k}" for k in KEYS)]
    assert done["test"]["fold_rsum"] >= done["test"]["rsum"]  # fewer candidates


def test_a_run_goes_on_in_the_epoch_of_the_ramp(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hinge loss follows epochs; cut in the second one, a run gives the losses of one that was not."""
    how = [*made["options"], "--tuner", "probe", "--objective", "hinge", "--negatives", "hardest", *FAST, "--epochs", 3]
    run("train", *how, "--out", tmp_path / "whole")
    step, left = loop.Training.made, [8]

    def stop(self: Any, *given: Any) -> None:
        step(self, *given)
        left[0] -= 1
        if not left[0]:
            self.save()
            raise loop.Interrupted("stopped")

    monkeypatch.setattr(loop.Training, "made", stop)
    assert invoke("train", *how, "--out", tmp_path / "cut").exit_code != 0
    monkeypatch.undo()
    run("train", *how, "--out", tmp_path / "cut")
    whole = losses(tmp_path / "whole")
    assert losses(tmp_path / "cut") == whole and len(whole) == 15
    assert whole[5] == 0 < whole[6]  # the ramp begins at nothing


def test_an_image_is_encoded_once_in_evaluation(made: dict[str, Any], trained: Path) -> None:
    found = pipeline.load_run(trained)
    seen: dict[str, int] = {"image": 0, "text": 0}
    for slot, tuner in found.model.tuner.each().items():
        tuner.register_forward_pre_hook(lambda _m, args, slot=slot: seen.__setitem__(slot, seen[slot] + len(args[0])))
    found.evaluate("train")
    assert seen == {"image": 24, "text": 72}


def test_a_batch_that_not_every_rank_has_a_part_of(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    how = ["--tuner", "probe", "--objective", "hinge", *FAST, "--batch-size", 71, "--out", tmp_path / "run"]
    refused(invoke("train", *made["options"], *how), "--batch-size 71", "72 pairs", "2 processes")


@forks.needed
@pytest.mark.parametrize("more", [["--objective", "hinge"], ["--objective", "contrastive", "--pooling", "gpo"]])
def test_two_ranks_take_the_steps_of_one(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[Any]
) -> None:
    """Unequal shares of 17, captions of one image on both: the loss is of all pairs, gradients are of one process."""
    how = [*made["options"], "--tuner", "probe", *more, *FAST, "--batch-size", 17, "--epochs", 2, "--lr", 1e-2]
    with monkeypatch.context() as patch:
        assert forked(patch, lambda rank: invoke("train", *how, "--out", tmp_path / "two").exit_code) == [0, 0]
    run("train", *how, "--out", tmp_path / "one")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 10 and two == pytest.approx(one, rel=1e-4)
    for entry, other in zip(*(norms(tmp_path / name) for name in ("one", "two")), strict=True):
        assert entry == pytest.approx(other, rel=1e-3)


def norms(folder: Path) -> list[float]:
    """Of the gradient of each step."""
    return [e["grad_norm"] for e in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in e]


def test_images_on_both_sides_of_a_split_are_said(made: dict[str, Any], tmp_path: Path) -> None:
    held = write(tmp_path / "held.csv", [(name, f"{text} again") for name, text in made["rows"][:6]])
    options = [*made["options"], "--validation", held, "--test", held]
    options[options.index("--store") + 1] = tmp_path / "store"
    said = run("extract", *options, "--for", "image=probe,text=probe")["warnings"]
    assert any("2 of the 2 images of validation stand in train too" in line for line in said), said


def test_rows_of_which_nothing_can_be_told_apart_are_said(made: dict[str, Any], tmp_path: Path) -> None:
    table = write(tmp_path / "same.csv", [(name, "a photo") for name, _ in made["rows"][::3]])
    options = [*made["options"], "--task", table, "--store", tmp_path / "store"]
    said = run("extract", *options, "--for", "probe")["warnings"]
    assert said == ["all 24 train rows have one and the same text: nothing is told from anything else"]


def test_three_slots_are_not_compared(made: dict[str, Any], checkpoints: dict[str, Path], tmp_path: Path) -> None:
    options = [*made["options"], "--tuner", "probe", "--objective", "hinge", "--live", "--out", tmp_path / "run"]
    options[1] = f"{options[1]},other={checkpoints['roberta']}"
    options[options.index("--store") + 1] = tmp_path / "none"
    refused(invoke("train", *options), "two slots, not 3")


def test_python_takes_pairs(made: dict[str, Any], trained: Path) -> None:
    rows = {"image": ["00.png", "01.png"], "text": ["the red cat", "the blue dog"]}
    told = pipeline.load_run(trained).predict(rows, root=made["folder"] / "images")
    assert [list(entry) for entry in told] == [["similarity"]] * 2
    with pytest.raises(UserError, match="slots image, text"):
        pipeline.load_run(trained).predict({"image": rows["image"]})
    assert torch.is_tensor(torch.zeros(1)) and json.dumps(told)


def test_tuners_that_one_slot_alone_can_have(
    made: dict[str, Any], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """SHERL has no live block in a MobileNet: its states are those of the text; asked for alone, the slot says why."""
    options = [*made["options"], "--store", tmp_path / "store", "--image-size", "32"]
    options[1] = f"image={checkpoints['mobilenet']},text={checkpoints['bert']}"
    done = run("extract", *options, "--for", "probe,sherl")
    assert len(done["states"]["image"]) == 1 < len(done["states"]["text"])
    refused(invoke("extract", *options, "--for", "sherl"), "slot image", "live layer")
    train = ["train", *options, "--objective", "hinge", *FAST, "--epochs", 1, "--out", tmp_path / "run"]
    refused(invoke(*train, "--tuner", "sherl"), "slot image", "live layer")
    assert run(*train, "--tuner", "image=probe,text=sherl")["stopped"] == "done"
    written = tmp_path / "report.html"
    assert invoke("report", tmp_path / "run", "-o", written).exit_code == 0 and written.stat().st_size > 1000
    refused(invoke("evaluate", tmp_path / "run", "--report"), "--report", "hinge")
    assert invoke("store", "verify", "--deep", "--store", tmp_path / "store").exit_code == 0


def test_texts_beside_a_second_backbone_of_images_stand_beside_the_first_too(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """One space of texts, two of images whose samples are others because they are seen at other sizes."""
    table = write(tmp_path / "captions.csv", captioned(tmp_path / "images"))
    rows = ["--task", table, "--data", tmp_path / "images", "--store", tmp_path / "store"]
    models = [f"text={checkpoints['bert']},image={checkpoints[name]}" for name in ("resnet", "vit")]
    for model in models:
        run("extract", "--model", model, *rows, "--for", "probe")
    for model in (*models, ",".join(reversed(models[0].split(",")))):
        how = ["--model", model, *rows, "--tuner", "probe", "--epochs", 1, "--out", tmp_path / "run", "--overwrite"]
        assert "rsum" in run("train", *how)["test"]
