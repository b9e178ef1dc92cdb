"""Folders of images with masks: layouts, classes, and what is refused by name."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.extract.tasks import TaskError, load_task
from pipeline.extract.tasks.masks import CAMVID, read_mask
from tests.scenes import write_scenes


def _save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def _image(path, size=(8, 10)):
    _save(path, np.zeros((*size, 3), np.uint8))


def _mask(path, *numbers, size=(8, 10)):
    values = np.zeros(size, np.uint8)
    values.reshape(-1)[: len(numbers)] = numbers
    _save(path, values)


def test_camvids_layout_gives_its_splits_and_the_files_as_they_are(tmp_path):
    folder = write_scenes(tmp_path / "scenes", {"train": 6, "val": 2, "test": 3})
    task = load_task(str(folder))
    assert task.spec.target == "mask" and task.spec.labels == ("0", "1", "2", "3")
    assert {split: len(rows) for split, rows in task.splits.items()} == {"train": 6, "validation": 2, "test": 3}
    for rows in task.splits.values():
        for (name,), data in zip(rows.texts, rows.labels, strict=True):
            split, file = name.split("/")
            assert data == (folder / f"{split}annot" / file).read_bytes()
            assert np.array_equal(read_mask(data, ""), np.asarray(Image.open(folder / f"{split}annot" / file)))


@pytest.mark.parametrize("layout", ["images/{s}/{n}.jpg masks/{s}/{n}.png", "{s}/images/{n}.jpg {s}/masks/{n}.png",
                                    "images/{s}ing/{n}.jpg annotations/{s}ing/{n}.png"])  # fmt: skip
def test_other_layouts_with_splits(tmp_path, layout):
    for i in range(3):
        image, mask = (tmp_path / part.format(s="train", n=i) for part in layout.split())
        _image(image), _mask(mask, i)
    (tmp_path / "classes.txt").write_text("ground\nroad\nsky\nnever seen\n")
    task = load_task(str(tmp_path), targets=("mask",))
    assert len(task.splits["train"]) == 3 and task.spec.labels == ("ground", "road", "sky", "never seen")
    assert "validation" in task.absent


def test_voc_has_its_splits_in_files_and_palettes(tmp_path):
    for i in range(3):
        _image(tmp_path / "JPEGImages" / f"{i}.jpg")
        if i < 2:
            shown = Image.fromarray(np.full((8, 10), 2 - i, np.uint8), "L").convert("P")
            shown.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
            (tmp_path / "SegmentationClass").mkdir(exist_ok=True)
            shown.save(tmp_path / "SegmentationClass" / f"{i}.png")
    listed = tmp_path / "ImageSets" / "Segmentation"
    listed.mkdir(parents=True)
    (listed / "train.txt").write_text("0\n"), (listed / "val.txt").write_text("1\n")
    task = load_task(str(tmp_path))
    assert task.rows("train").texts == [("JPEGImages/0.jpg",)] and len(task.rows("validation")) == 1
    (listed / "val.txt").write_text("2\n")
    with pytest.raises(TaskError, match="2 has no image in JPEGImages or no mask"):
        load_task(str(tmp_path))


def test_a_folder_without_splits_is_always_split_the_same_way(tmp_path):
    for i in range(20):
        _image(tmp_path / "images" / f"{i:02d}.jpg"), _mask(tmp_path / "masks" / f"{i:02d}.png", i % 3)
    first, second = (load_task(str(tmp_path)) for _ in range(2))
    assert {s: len(r) for s, r in first.splits.items()} == {"train": 16, "validation": 2, "test": 2}
    assert [r.texts for r in first.splits.values()] == [r.texts for r in second.splits.values()]
    _mask(tmp_path / "masks" / "03.png", 2, 2)
    assert load_task(str(tmp_path)).version != first.version  # other masks are another task


def test_eleven_is_no_class_in_camvids_own_masks_alone(tmp_path):
    for i in range(3):
        _image(tmp_path / "train" / f"{i}.jpg"), _mask(tmp_path / "trainannot" / f"{i}.png", 11, 4, 10)
    assert load_task(str(tmp_path)).spec.labels == CAMVID
    assert len(load_task(str(tmp_path), void=4).spec.labels) == 11  # of 12 numbers without 4
    _mask(tmp_path / "trainannot" / "1.png", 12)
    assert len(load_task(str(tmp_path)).spec.labels) == 13


BAD = {
    "a mask of another size": (lambda f: _mask(f / "masks/1.png", 1, size=(8, 11)), "1.png: a mask of 8x11 pixels"),
    "a class out of range": (lambda f: _mask(f / "masks/1.png", 7), "1.png: 7 is no class, there are 2"),
    "a colour mask": (lambda f: _image(f / "masks/1.png"), "1.png: a mask has one channel"),
    "a damaged mask": (lambda f: (f / "masks/1.png").write_bytes(b"no"), "1.png: no mask that can be read"),
    "no mask": (lambda f: (f / "masks/1.png").unlink(), "1.jpg: there is no mask of this name"),
    "no image": (lambda f: (f / "images/1.jpg").unlink(), "1.png: there is no image of this name"),
    "a lossy mask": (lambda f: (f / "masks/1.png").rename(f / "masks/1.jpg"), "1.jpg: a mask in a format"),
    "a class named twice": (lambda f: (f / "classes.txt").write_text("a\na"), "classes.txt: at most 255 names"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_masks_are_refused_by_name(tmp_path, what):
    (tmp_path / "classes.txt").write_text("ground\nroad")
    for i in range(4):
        _image(tmp_path / "images" / f"{i}.jpg"), _mask(tmp_path / "masks" / f"{i}.png", i % 2, 255)
    assert len(load_task(str(tmp_path)).rows("train")) == 2
    make, said = BAD[what]
    make(tmp_path)
    with pytest.raises(TaskError) as error:
        load_task(str(tmp_path))
    assert said in str(error.value) and "\n" not in str(error.value)


def _grey_png(values: np.ndarray, depth: int) -> bytes:
    """A grey PNG file of `depth` bits, which Pillow reads but does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    bits = np.unpackbits(values[..., None], axis=2)[..., 8 - depth :].reshape(len(values), -1)
    lines = b"".join(b"\0" + row.tobytes() for row in np.packbits(bits, axis=1))
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_numbers_of_few_bits_are_not_read_as_brightness(depth):
    values = (np.arange(35, dtype=np.uint8) % min(16, 1 << depth)).reshape(5, 7)
    assert np.array_equal(read_mask(_grey_png(values, depth), ""), values)


def test_masks_whose_numbers_may_mean_anything_are_refused(tmp_path):
    for i in range(3):
        _image(tmp_path / "images" / f"{i}.png"), _mask(tmp_path / "masks" / f"{i}.png", 0, 1)
    load_task(str(tmp_path), targets=("mask",))
    for i, colour in enumerate(([9, 0, 0], [9, 0, 0], [0, 9, 0])):
        shown = Image.fromarray(np.eye(8, 10, dtype=np.uint8), "L").convert("P")
        shown.putpalette([0, 0, 0, *colour, 5, 5, i])  # the last is used nowhere
        shown.save(tmp_path / "masks" / f"{i}.png")
    with pytest.raises(TaskError, match=r"2\.png: 1 is of colour \(0, 9, 0\), in .*0\.png of colour \(9, 0, 0\)"):
        load_task(str(tmp_path), targets=("mask",))
    _mask(tmp_path / "masks" / "2.png", 0, 1)
    load_task(str(tmp_path), targets=("mask",))  # grey has no colours to differ
    Image.fromarray(np.eye(8, 10, dtype=np.uint8)).save(tmp_path / "masks" / "2.png", "JPEG")
    with pytest.raises(TaskError, match=r"2\.png: JPEG does not keep the numbers"):
        load_task(str(tmp_path), targets=("mask",))
    _mask(tmp_path / "masks" / "2.png", 0, 1), _mask(tmp_path / "masks" / "2.bmp", 1)
    with pytest.raises(TaskError, match=r"2\.bmp and 2\.png: two files of one name"):
        load_task(str(tmp_path), targets=("mask",))


def ade20k(folder, last="flag"):
    lines = [f"{i}\t0.1\t9\t9\t0\t{'screen' if i in (131, 142) else f'thing{i}'}, other" for i in range(1, 150)]
    text = "\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *lines, f"150\t0.1\t9\t9\t0\t{last}"])
    for split in ("training", "validation"):
        for i in range(3):
            _image(folder / f"images/{split}/ADE_{i}.jpg"), _mask(folder / f"annotations/{split}/ADE_{i}.png", 150, i)
    (folder / "objectInfo150.txt").write_text(text)
    return folder


def test_ade20k_counts_its_classes_from_one(tmp_path):
    spec = load_task(str(ade20k(tmp_path))).spec
    assert len(spec.labels) == 150 and spec.values == tuple(map(float, range(1, 151)))
    assert spec.labels[0] == "thing1" and spec.labels[149] == "flag" and spec.labels[130] == "screen 131"
    assert {s: len(r) for s, r in load_task(str(tmp_path)).splits.items()} == {"train": 3, "validation": 3}
    _mask(tmp_path / "annotations/validation/ADE_1.png", 151)
    with pytest.raises(TaskError, match=r"ADE_1.png: 151 is no class, there are 150 \(1 to 150\)"):
        load_task(str(tmp_path))
    (tmp_path / "objectInfo150.txt").write_text("Idx\n1\twall\n")
    with pytest.raises(TaskError, match=r"objectInfo150\.txt: 150 lines were expected"):
        load_task(str(tmp_path))


def test_a_number_below_others_that_is_none_is_no_class_of_the_task(tmp_path):
    for i in range(3):
        _image(tmp_path / f"images/{i}.jpg"), _mask(tmp_path / f"masks/{i}.png", 1, 2)
    spec = load_task(str(tmp_path), void=0).spec
    assert spec.labels == ("1", "2") and spec.values == (1.0, 2.0)
    assert load_task(str(tmp_path)).spec.values == () == load_task(str(tmp_path), void=3).spec.values
    (tmp_path / "classes.txt").write_text("nothing\nroad\nsky\n")
    assert load_task(str(tmp_path), void=0).spec.labels == ("road", "sky")


@pytest.mark.parametrize(
    "layout", ["{s}/{n} {s}annot/{n}", "images/{s}/{n} masks/{s}/{n}", "{s}/images/{n} {s}/masks/{n}"]
)
def test_two_folders_of_one_split_are_refused(tmp_path, layout):
    for split in ("train", "val", "valid"):
        image, mask = (tmp_path / part.format(s=split, n="0.png") for part in layout.split())
        _image(image), _mask(mask, 1)
    with pytest.raises(TaskError, match=r"val.* are both validation, which one is meant"):
        load_task(str(tmp_path), targets=("mask",))


def test_lists_of_voc_name_each_image_once_in_utf8(tmp_path):
    _image(tmp_path / "JPEGImages" / "a.jpg"), _mask(tmp_path / "SegmentationClass" / "a.png", 1)
    file = tmp_path / "ImageSets" / "Segmentation" / "train.txt"
    file.parent.mkdir(parents=True)
    for text, said in (("a\na\n", "a stands twice"), ("a\n\xe9\n", "not UTF-8")):
        file.write_text(text, encoding="latin-1")
        with pytest.raises(TaskError, match=f"train.txt.*{said}"):
            load_task(str(tmp_path), targets=("mask",))
