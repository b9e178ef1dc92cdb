"""COCO's JSON and VOC's XML: objects as they are, splits, and what is refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as library

from pipeline.extract.outlines import compressed, outline_mask, outline_text
from pipeline.extract.tasks import TaskError, load_task
from pipeline.extract.tasks.objects import FIELDS
from tests.objects import CATEGORIES, voc_xml, write_coco, write_voc


@pytest.fixture
def coco(tmp_path):
    return write_coco(tmp_path / "coco", {"train": 6, "val": 3})


def load(files, **more):
    return load_task(str(files["train"]), files["train"].parents[1], validation=files.get("val"), **more)


def edit(file, change):
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))


def test_coco_gives_objects_as_its_file_has_them(coco):
    task = load(coco)
    assert task.spec.target == "instances" and task.spec.labels == ("red", "green", "blue")
    assert task.spec.values == (2, 3, 7) and {s: len(r) for s, r in task.splits.items()} == {
        "train": 6,
        "validation": 3,
    }
    raw = json.loads(coco["train"].read_text())
    rows = task.rows("train")
    for (name,), objects, number in zip(rows.texts, rows.labels, rows.ids, strict=True):
        assert name == f"train2017/{int(number):012d}.png"
        true = [a for a in raw["annotations"] if a["image_id"] == int(number)]
        assert len(objects) == len(true) and (objects or int(number) == 6)  # an image without objects is one
        for found, entry in zip(objects, true, strict=True):
            assert found.keys() == {*FIELDS, "outline"}
            assert [found[k] for k in ("left", "top", "width", "height")] == entry["bbox"]
            assert (found["crowd"], found["area"]) == (bool(entry["iscrowd"]), entry["area"])
            assert list(CATEGORIES)[found["class"]] == entry["category_id"]
            assert json.loads(found["outline"]) == entry["segmentation"]


def test_without_outlines_there_are_boxes_and_a_tenth_is_held_out(coco, tmp_path):
    edit(coco["train"], lambda raw: raw["annotations"][2].pop("segmentation"))
    files = {"train": coco["train"]}
    task = load(files)
    assert task.spec.target == "boxes" and "outline" not in task.rows("train").labels[0]
    assert {s: len(r) for s, r in task.splits.items()} == {"train": 4, "validation": 1, "test": 1}
    with pytest.raises(TaskError, match="annotation 3 has no segmentation; --objective detection"):
        load(files, targets=("instances",))


def wrong_image(raw):
    raw["images"][0]["file_name"] = "absent.png"


WRONG = {
    "annotation 1 .*: box .* reaches outside .* 64x64": lambda r: r["annotations"][0].update(bbox=[0, 0, 65, 9]),
    "annotation 2 .*: box .* has no area": lambda r: r["annotations"][1].update(bbox=[0, 0, 0, 9]),
    "annotation 1 .*is not four finite numbers": lambda r: r["annotations"][0].update(bbox=[0, float("nan"), 1, 9]),
    "annotation 1: there is no category with the id 4": lambda r: r["annotations"][0].update(category_id=4),
    "annotation 1: there is no image with the id 99": lambda r: r["annotations"][0].update(image_id=99),
    "image 1: there is neither .*absent.png": wrong_image,
    "two entries of images have the id 1": lambda r: r["images"][1].update(id=1),
    "two entries of annotations have the id 1": lambda r: r["annotations"][1].update(id=1),
    "two images have the file_name": lambda r: r["images"][1].update(file_name=r["images"][0]["file_name"]),
    "two categories are called 'red'": lambda r: r["categories"][1].update(name="red"),
    "image 2 is said to have 71x50 pixels": lambda r: r["images"][1].update(width=71),
    "categories is missing": lambda r: r.pop("categories"),
    "annotation 1 .*a polygon of its segmentation reaches outside": lambda r: r["annotations"][0].update(
        segmentation=[[0, 0, 1e9, 0, 5, 5]]
    ),
    "annotation 1 .*do not add up": lambda r: r["annotations"][0].update(
        segmentation={"size": [64, 64], "counts": [3, 4]}
    ),
    r"annotation 1: there is no image with the id \[1\]": lambda r: r["annotations"][0].update(image_id=[1]),
    r"annotation 1: there is no category with the id \[2\]": lambda r: r["annotations"][0].update(category_id=[2]),
    "annotation 1 .*box .1000.* is not four finite": lambda r: r["annotations"][0].update(bbox=[10**400, 1, 1, 1]),
    "categories has an id of more than": lambda r: r["categories"].append({"id": 10**400, "name": "vast"}),
    "image 1: there is neither .*aaaa": lambda r: r["images"][0].update(file_name="a" * 5000),
    "annotation 1: iscrowd is 0 or 1": lambda r: r["annotations"][0].update(iscrowd=2),
}  # fmt: skip


@pytest.mark.parametrize("said", WRONG)
def test_what_is_wrong_in_coco_is_named(coco, said):
    edit(coco["train"], WRONG[said])
    with pytest.raises(TaskError, match=said):
        load(coco)


def test_broken_files_are_named(coco):
    whole = coco["val"].read_text()
    coco["val"].write_text(whole[:-20])
    with pytest.raises(TaskError, match=r"instances_val2017.json: broken JSON"):
        load(coco)
    coco["val"].write_text(whole.replace('"blue"', '"violet"'))
    with pytest.raises(TaskError, match=r"category 7 \('violet'\) is unknown to"):
        load(coco)


def test_bad_objects_can_be_left_out(coco):
    edit(coco["train"], lambda r: r["annotations"][0].update(bbox=[60, 60, 9, 9]))
    whole = sum(map(len, load(coco, skip_bad=True).rows("train").labels))
    assert whole == len(json.loads(coco["train"].read_text())["annotations"]) - 1
    assert load(coco, skip_bad=True).provenance["left_out"] == 1


def test_voc_counts_from_one_and_keeps_what_is_difficult(tmp_path):
    folder = write_voc(tmp_path / "voc", {"train": 8, "val": 2, "test": 2})
    (folder / "ImageSets/Main/red_train.txt").write_text("000001 1\n")  # a list of a class, as VOC has
    task = load_task(str(folder))
    assert task.spec.target == "boxes" and task.spec.labels == ("blue", "green", "red")
    assert {s: len(r) for s, r in task.splits.items()} == {"train": 8, "validation": 2, "test": 2}
    for (name,), objects in zip(task.rows("train").texts, task.rows("train").labels, strict=True):
        pixels = np.asarray(Image.open(folder / name)).astype(int)
        assert objects[-1]["difficult"] and not any(o["difficult"] for o in objects[:-1])
        channel = {"red": 0, "green": 1, "blue": 2}[task.spec.labels[objects[-1]["class"]]]
        x0, y0, wide, tall = (int(objects[-1][k]) for k in ("left", "top", "width", "height"))
        inside = pixels[y0 : y0 + tall, x0 : x0 + wide]  # the last one drawn is covered by none
        assert (inside.argmax(2) == channel).all()
    (folder / "ImageSets/Main/train.txt").rename(folder / "ImageSets/Main/trainval.txt")
    assert len(load_task(str(folder)).rows("train")) == 8


VOC_WRONG = {
    "000001.xml: object 1 .*reaches outside": voc_xml((64, 64), [("red", (1, 1, 66, 3), False)]),
    "000001.xml: object 1 .*has no area": voc_xml((64, 64), [("red", (5, 1, 4, 3), False)]),
    "000001.xml: no XML": "<annotation>",
    "000001.xml: says 60x64 pixels": voc_xml((64, 60), []),
    "000001.xml: object 1 has no name": voc_xml((64, 64), [("", (1, 1, 2, 2), False)]),
    "000001.xml: object 1 .red.: difficult is 0 or 1, not 'yes'": voc_xml(
        (64, 64), [("red", (1, 1, 2, 2), True)]
    ).replace("<difficult>1", "<difficult>yes"),
    "no bndbox": "<annotation><object><name>red</name></object></annotation>",
}  # fmt: skip


@pytest.mark.parametrize("said", VOC_WRONG)
def test_what_is_wrong_in_voc_is_named(tmp_path, said):
    folder = write_voc(tmp_path / "voc", {"train": 2, "val": 1})
    (folder / "Annotations/000001.xml").write_text(VOC_WRONG[said])
    with pytest.raises(TaskError, match=said):
        load_task(str(folder))


def test_voc_names_unknown_classes_and_absent_files(tmp_path):
    folder = write_voc(tmp_path / "voc", {"train": 2, "val": 1})
    xml = folder / "Annotations/000003.xml"
    xml.write_text(voc_xml((64, 64), [("cat", (1, 1, 2, 2), False)]))
    with pytest.raises(TaskError, match=r"000003.xml: unknown class 'cat'"):
        load_task(str(folder))
    xml.unlink()
    with pytest.raises(TaskError, match=r"000003.xml: there is no such file"):
        load_task(str(folder))
    (folder / "JPEGImages/000003.png").unlink()
    with pytest.raises(TaskError, match=r"000003 \(validation\) has no image"):
        load_task(str(folder))
    with pytest.raises(TaskError, match="outlines of objects are read from COCO"):
        load_task(str(folder), targets=("instances",))


VOC_FILES = {
    "classes.txt: names of classes are expected, each once": ("classes.txt", "red\ngreen\nred\nblue\n"),
    "classes.txt is not UTF-8: byte 0xe9": ("classes.txt", "gr\xe9en\n"),
    "train.txt is not UTF-8: byte 0xe9": ("ImageSets/Main/train.txt", "000001\n\xe9\n"),
    "val and validation are both validation": ("ImageSets/Main/validation.txt", "000002\n"),
    "000001.bmp and 000001.png: two images of one name": ("JPEGImages/000001.bmp", ""),
}


@pytest.mark.parametrize("said", VOC_FILES)
def test_files_of_voc_that_cannot_be_meant_are_named(tmp_path, said):
    folder = write_voc(tmp_path / "voc", {"train": 2, "val": 1})
    file, text = VOC_FILES[said]
    (folder / file).write_text(text, encoding="latin-1")
    with pytest.raises(TaskError, match=said):
        load_task(str(folder))


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    folder = write_voc(tmp_path / "voc", {"train": 8, "val": 1})
    file = folder / "ImageSets/Main/train.txt"
    file.write_text(file.read_text(), encoding="utf-8-sig")
    assert sorted(load_task(str(folder)).rows("train").ids) == [f"{i:06d}" for i in range(1, 9)]


def test_a_damaged_image_whose_size_is_endless_is_left_to_extraction(tmp_path):
    folder = write_voc(tmp_path / "voc", {"train": 8, "val": 1})
    xml = folder / "Annotations/000001.xml"
    xml.write_text(xml.read_text().replace("<width>64", "<width>1e999"))
    (folder / "JPEGImages/000001.png").write_bytes(b"none")
    assert len(load_task(str(folder)).rows("train")) == 8


def test_run_lengths_are_those_of_pycocotools():
    rng = np.random.default_rng(0)
    for size in ((7, 5), (40, 60), (1, 1)):
        mask = (rng.random(size) < 0.4).astype(np.uint8)
        runs = compressed(mask)
        assert np.array_equal(library.decode(dict(runs)), mask)
        assert np.array_equal(outline_mask(json.dumps(runs), size), mask)
    for polygon in ([[1, 1, 9, 2, 5, 8.5]], [[0, 0, 4, 0, 4, 4], [5, 5, 9, 5, 9, 9, 5, 9]]):
        text = outline_text(polygon, (10, 12))
        filled = library.decode(library.merge(library.frPyObjects(polygon, 10, 12)))
        assert np.array_equal(outline_mask(text, (10, 12)), filled)


@pytest.mark.parametrize("runs", ["!!", "o" * 30, "P" * 9, "é", [1, -1, 35], 5])
def test_damaged_run_lengths_are_never_filled(runs):
    with pytest.raises(ValueError, match="run lengths"):
        outline_mask(json.dumps({"size": [5, 7], "counts": runs}), (5, 7))
