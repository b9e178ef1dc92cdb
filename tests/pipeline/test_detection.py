"""Detection and instances from the command line on generated scenes of unequal sizes: cached = live, what is told is
what is scored, views, bad input by name."""

from __future__ import annotations

import contextlib
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.cost import rates
from pipeline.store import Store
from tests.objects import write_coco, write_voc
from tests.pipeline.test_segmentation import losses, run


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("objects") / "coco", {"train": 8, "val": 4})


def task(files):
    return ["--task", files["train"], "--data", files["train"].parents[1], "--validation", files["val"]]


EXTRACTED = {"mobilenet": ("fixed", []), "swin": ("fixed,e3va", []), "resnet": ("unipt", []),
             "vit": ("fixed", []), "dinov2": ("fixed", [])}  # fmt: skip
FLIPS = ["--views", 2, "--augment", "flip"]


@pytest.fixture(scope="module")
def stores(coco, checkpoints, tmp_path_factory):
    """Backbone → a store of its states at the images' own sizes, mirror images too, computed one image at a time."""

    class Made(dict):
        def __missing__(self, name):
            folder = self[name] = tmp_path_factory.mktemp("objects") / name
            words = ["--model", checkpoints[name], *task(coco), "--image-size", "own", "--format", "float32", *FLIPS]
            words += ["--batch-size", 1]
            done = run("extract", *words, "--for", EXTRACTED[name][0], "--store", folder)
            assert done["computed"] == 2 * 8 + 4
            return folder

    return Made()


NARROW = ["--head-width", 8]
HEADS = {
    "retinanet": [], "faster-rcnn": ["--proposals", 24], "mask-rcnn": ["--proposals", 24],
    "cascade-rcnn": ["--proposals", 24, "--box-head", "fc"], "cascade-mask-rcnn": ["--proposals", 24],
}  # fmt: skip
CASES = [("mobilenet", "fixed", "cascade-mask-rcnn"), ("swin", "e3va", "retinanet"), ("swin", "fixed", "mask-rcnn"),
         ("resnet", "unipt", "retinanet")]  # fmt: skip
MORE = [
    pytest.param(model, tuner, head, marks=pytest.mark.matrix)
    for model, tuner in (("mobilenet", "fixed"), ("swin", "fixed"), ("swin", "e3va"), ("resnet", "unipt"),
                         ("vit", "fixed"), ("dinov2", "fixed"))
    for head in HEADS if (model, tuner, head) not in CASES
]  # fmt: skip


@pytest.mark.parametrize(("model", "tuner", "head"), [*CASES, *MORE])
def test_cached_is_live_at_unequal_sizes_and_flips(coco, stores, checkpoints, tmp_path, model, tuner, head):
    words = ["train", "--model", checkpoints[model], *task(coco), "--tuner", tuner, "--store", stores[model]]
    # Which proposals a step draws is a matter of yes or no, so states must agree to the last digit, which convolutions
    # of one image and of several do not.
    size = 1 if head != "retinanet" and model in ("mobilenet", "resnet") else 2
    words += ["--head", head, *NARROW, *HEADS[head], "--batch-size", size, "--epochs", 3, "--max-steps", 20]
    cached, live = run(*words, "--out", tmp_path / "a"), run(*words, "--live", "--out", tmp_path / "b")
    one, other = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert len(one) == 20 and np.abs(np.subtract(one, other)).max() <= 1e-5
    assert ("mask_map" in cached["validation"]) == ("mask" in head)  # the objective follows from the head
    assert cached["validation"] == pytest.approx(live["validation"], abs=5e-3, nan_ok=True)


@pytest.fixture(scope="module")
def trained(coco, stores, checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("objects") / "run"
    words = ["--model", checkpoints["mobilenet"], *task(coco), "--tuner", "fixed", "--store", stores["mobilenet"]]
    done = run("train", *words, "--objective", "instances", "--head-width", 16, "--epochs", 4, "--lr", 1e-2,
               "--score-threshold", 0.01, "--out", folder)  # fmt: skip
    return folder, done


def test_what_is_told_is_what_is_scored(coco, trained, tmp_path):
    folder, done = trained
    images = coco["val"].parents[1] / "val2017"
    told = run("predict", folder, "--input", images, "--out-dir", tmp_path / "told")["predictions"]
    assert len(told) == 4 and all(Image.open(tmp_path / "told" / p["overlay"]).size == Image.open(images / p["id"]).size
                                  for p in told)  # fmt: skip
    figures = run("evaluate", folder, "--split", "validation", "--report")
    rows = figures["report"]["rows"]
    assert [row["name"] for row in rows] == ["red", "green", "blue"]
    for kind, file, part in (("bbox", "detections", "box"), ("segm", "segmentations", "mask")):
        with contextlib.redirect_stdout(io.StringIO()):
            true = COCO(str(coco["val"]))
            evaluation = COCOeval(true, true.loadRes(str(tmp_path / "told" / f"{file}.json")), kind)
            evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
        names = [f"{part}_{name}" for name in ("map", "ap50", "ap75")]
        assert [figures[name] for name in names] == pytest.approx(evaluation.stats[:3].tolist(), abs=2e-3)
        for place, row in enumerate(rows):  # of each category, its precision at 101 recalls
            found = evaluation.eval["precision"][:, :, place, 0, 2].mean(1)
            assert [row[f"{part}_ap50"], row[f"{part}_map"]] == pytest.approx([found[0], found.mean()], abs=2e-3)
        assert np.mean([row[f"{part}_ap50"] for row in rows]) == pytest.approx(figures[f"{part}_ap50"])
        assert [done["validation"][name] for name in names] == pytest.approx([figures[name] for name in names])
    assert figures["box_ap50"] > 0
    kinds = [true.anns[i]["category_id"] for i in true.getAnnIds(iscrowd=False)]
    assert [row["objects"] for row in rows] == [kinds.count(number) for number in (2, 3, 7)]
    first = told[0]["objects"][0]
    assert first["label"] in ("red", "green", "blue") and first["category_id"] in (2, 3, 7) and 0 < first["score"] <= 1
    entry = json.loads((tmp_path / "told" / "detections.json").read_text())[0]
    assert entry.keys() == {"image_id", "category_id", "bbox", "score"} and entry["image_id"] == 1
    assert "--out-dir is missing" in run("predict", folder, "--input", images, ok=False)


def test_a_run_goes_on_where_it_was_killed_number_for_number(coco, stores, checkpoints, tmp_path, monkeypatch):
    from pipeline.train.fit.loop import Training

    words = ["train", "--model", checkpoints["mobilenet"], *task(coco), "--tuner", "fixed"]
    words += ["--store", stores["mobilenet"], "--head", "cascade-mask-rcnn", *NARROW, "--proposals", 16]
    words += ["--epochs", 1, "--batch-size", 4]
    run(*words, "--out", tmp_path / "whole")
    whole = Training.step

    def killed(self, group):
        if self.state.step == 2:
            self.save()
            raise KeyboardInterrupt
        return whole(self, group)

    monkeypatch.setattr(Training, "step", killed)
    with contextlib.suppress(AssertionError):
        run(*words, "--out", tmp_path / "part", ok=False)
    monkeypatch.setattr(Training, "step", whole)
    run(*words, "--out", tmp_path / "part")
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")


def test_voc_is_scored_as_voc(checkpoints, tmp_path):
    folder = write_voc(tmp_path / "voc", {"train": 4, "val": 2, "test": 2})
    (folder / "classes.txt").write_text("red\ngreen\nblue\n")
    words = ["--model", checkpoints["mobilenet"], "--task", folder, "--store", tmp_path / "store"]
    run("extract", *words, "--image-size", "short:48:80", "--for", "fixed")
    done = run("train", *words, "--tuner", "fixed", *NARROW, "--epochs", 1, "--out", tmp_path / "run")
    assert done["test"].keys() == {"voc07_ap50", "voc_ap50"}
    scored = run("evaluate", tmp_path / "run", "--split", "train", "--report")
    there = [row for row in scored["report"]["rows"] if row["objects"]]
    assert len(there) >= 2 and there[0].keys() >= {"voc07_ap50", "voc_ap50", "box_ap50", "box_map"}
    assert np.mean([row["voc_ap50"] for row in there]) == pytest.approx(scored["voc_ap50"])
    done = run("train", *words, "--tuner", "fixed", *NARROW, "--epochs", 1, "--metric", "box_map,voc_ap50",
               "--out", tmp_path / "more")  # fmt: skip
    assert done["test"].keys() == {"box_map", "voc_ap50"}
    space = Store.open(tmp_path / "store").spaces()[0]
    assert space.identity["image_size"] == "short:48:80"
    (table,) = [space.read_table(t) for t in space.tables() if t.split == "train"]
    seen = {tuple(meta["geometry"]["size"]): tuple(meta["geometry"]["seen"]) for meta in table.metas}
    assert seen == {(64, 64): (48, 48), (50, 70): (48, 67), (72, 40): (80, 44)}


@pytest.mark.parametrize("head", ["retinanet", "cascade-mask-rcnn"])
def test_plan_counts_the_parameters_of_heads_at_80_classes(coco, checkpoints, tmp_path, monkeypatch, head):
    of_no_use = [("backbone_rate", 1e12), ("decode_rate", 1e10)]
    of_no_use += [("step_seconds", 0.1)] if head == "retinanet" else []  # of the other a real step is timed
    for name, value in of_no_use:
        monkeypatch.setattr(rates, name, lambda *a, value=value: value)
    monkeypatch.setattr(rates, "disk_rates", lambda *a: (1e9, 1e9, 1e9))
    files = {}
    for split, file in coco.items():
        raw = json.loads(file.read_text())
        raw["categories"] += [{"id": 100 + i, "name": f"more {i}"} for i in range(80 - 3)]
        files[split] = tmp_path / file.name
        files[split].write_text(json.dumps(raw))
    words = ["--model", checkpoints["mobilenet"], "--task", files["train"], "--validation", files["val"]]
    words += ["--data", coco["train"].parents[1], "--image-size", "own", "--head", head, *NARROW, *HEADS[head]]
    words += ["--tuner", "fixed"]
    plan = run("plan", *words)
    done = run("train", *words, "--live", "--epochs", 1, "--max-steps", 1, "--out", tmp_path / "run")
    assert plan["parameters"] == {"tuner": 0, "head": done["trainable_parameters"]}
    assert plan["operations"]["tuner a step"] > 0 and plan["memory"]["kept for the backward pass"] > 0


REFUSED = {
    "--head upernet": "head: one of retinanet, faster-rcnn, cascade-rcnn, not 'upernet'",
    "--objective segmentation": "learns targets of type mask, these are instances",
    "--objective instances --head retinanet": "'retinanet' is not one of 'mask-rcnn'",
    "--head retinanet --proposals 9": "proposals: retinanet has anchors alone",
    "--objective instances --box-head fc": "box_head: a cascade has the choice, mask-rcnn has none",
    "--metric accuracy": "objective detection is scored by box_map",
    "--label x": "--label",
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_does_not_fit_is_refused_in_a_line(coco, stores, checkpoints, tmp_path, options):
    words = [
        "train",
        "--model",
        checkpoints["mobilenet"],
        *task(coco),
        "--store",
        stores["mobilenet"],
        "--tuner",
        "fixed",
    ]
    said = run(*words, "--out", tmp_path / "run", *options.split(), ok=False)
    assert REFUSED[options] in said and "Traceback" not in said and not (tmp_path / "run").exists()


def test_changed_files_are_no_longer_what_was_extracted(coco, checkpoints, tmp_path):
    shutil.copytree(coco["train"].parents[1], tmp_path / "coco")
    files = {split: tmp_path / "coco" / "annotations" / file.name for split, file in coco.items()}
    words = ["--model", checkpoints["mobilenet"], *task(files), "--store", tmp_path / "store"]
    image = tmp_path / "coco" / "train2017" / "000000000002.png"
    kept = image.read_bytes()
    image.write_bytes(b"no image")
    said = run("extract", *words, "--for", "fixed", ok=False)
    assert "000000000002.png" in said and not (tmp_path / "store").exists()
    assert run("extract", *words, "--for", "fixed", "--skip-bad")["skipped"] == 1
    shutil.rmtree(tmp_path / "store")
    image.write_bytes(kept)
    run("extract", *words, "--for", "fixed")
    train = ["train", *words, "--tuner", "fixed", *NARROW, "--max-steps", 1, "--epochs", 1, "--out", tmp_path / "run"]
    for file, change in ((files["val"], lambda raw: raw["annotations"].pop()),
                         (files["train"], lambda raw: raw["annotations"][0].update(area=1.5))):  # fmt: skip
        before = file.read_text()
        raw = json.loads(before)
        change(raw)
        file.write_text(json.dumps(raw))
        assert "has changed" in run(*train, ok=False)
        file.write_text(before)
    Image.open(image).transpose(Image.Transpose.ROTATE_180).save(image)
    assert "images of" in run(*train, ok=False)


def test_the_real_subset_is_read_and_told_back(shared_data, checkpoints, tmp_path):
    """Objects of COCO's own files, as they are, scored against themselves are all found."""
    from pipeline.extract.tasks import load_task

    folder = shared_data / "coco"
    found = load_task(str(folder / "annotations/instances_train2017.json"), folder,
                      validation=folder / "annotations/instances_val2017.json")  # fmt: skip
    assert {split: sum(map(len, rows.labels)) for split, rows in found.splits.items()} == {
        "train": 739,
        "validation": 624,
    }
    assert sum(o["crowd"] for rows in found.splits.values() for objects in rows.labels for o in objects) == 13
