"""PASCAL VOC's annotations as a task: boxes of the objects in images, one XML file an image.

    FOLDER/JPEGImages/NAME.jpg  FOLDER/Annotations/NAME.xml  FOLDER/ImageSets/Main/SPLIT.txt

VOC counts pixels from 1 and a box holds its last ones: xmin 1, xmax 1 is the first column, 0 to 1 here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from pipeline.extract.tasks.base import SPLIT_NAMES, Rows, Task, TaskError, by_split
from pipeline.extract.tasks.files import file_lines
from pipeline.extract.tasks.images import image_files
from pipeline.extract.tasks.names import table_name
from pipeline.extract.tasks.objects import Bad, Read, object_task, sizes_of, wrong_box

VOC = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
CLASSES = "classes.txt"
METRICS = ("voc07_ap50", "voc_ap50")


def is_voc(folder: Path) -> bool:
    """Whether there are VOC's folders of images and of XML files."""
    return (folder / "JPEGImages").is_dir() and (folder / "Annotations").is_dir()


def load_voc(folder: Path, name: str | None = None, skip_bad: bool = False) -> Task:
    """The images and objects of `folder` as a task named after it: split by the lists in ImageSets/Main (`trainval` is
    train where there is no list of that name), without lists a tenth of the images each is held out. `skip_bad`:
    objects that cannot be used are left out and counted.

    Raises `TaskError` naming the file for broken XML, a box outside its image or of no area, a class that training does
    not have, an image or an XML file that is not there.
    """
    if not is_voc(folder):
        raise TaskError(
            f"{folder}: no JPEGImages and Annotations in it; objects are read from these, or from COCO's JSON"
        )
    bad = Bad(skip_bad)
    images: dict[str, list[Path]] = {}
    for path in image_files(folder / "JPEGImages"):
        images.setdefault(path.stem, []).append(path)
    lists = _lists(folder / "ImageSets" / "Main") or {
        "": sorted(p.stem for p in (folder / "Annotations").glob("*.xml"))
    }
    parsed = {}
    for split, stems in lists.items():
        for stem in stems:
            if len(images.get(stem, ())) > 1:
                one, other = images[stem][:2]
                raise TaskError(f"{one} and {other.name}: two images of one name, which one is meant? Keep one of them")
            if stem not in images:
                raise TaskError(f"{folder}: {stem} ({split or 'Annotations'}) has no image in JPEGImages")
        sizes = sizes_of([images[stem][0] for stem in stems])
        parsed[split] = [_parse(folder / "Annotations" / f"{stem}.xml", size, bad) for stem, size in
                         zip(stems, sizes, strict=True)]  # fmt: skip
    classes = _classes(folder, parsed)
    splits = {}
    for split, stems in lists.items():
        rows = Rows([], [], [])
        for stem, objects in zip(stems, parsed[split], strict=True):
            rows.texts.append((images[stem][0].relative_to(folder).as_posix(),))
            rows.labels.append([{**found, "class": _place(found["class"], classes, folder, stem)} for found in objects])
            rows.ids.append(stem)
        splits[split] = rows
    read = Read(splits, classes, metrics=METRICS)
    task = table_name(name or folder.resolve().name)
    return object_task(task, folder.resolve().name, "VOC annotations", str(folder), read, False, bad)


def _lists(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    files = {p.stem: p for p in sorted(folder.glob("*.txt"))} if folder.is_dir() else {}
    # VOC has lists for each class there too.
    for split, stem in by_split(files, folder, {**SPLIT_NAMES, "trainval": "trainval"}).items():
        file, stems = files[stem], [line.split()[0] for line in file_lines(files[stem])]
        if len(set(stems)) < len(stems):
            raise TaskError(f"{file}: {next(s for s in stems if stems.count(s) > 1)} stands twice")
        found[split] = stems
    both = found.pop("trainval", None)
    if both is not None and "train" not in found:
        found["train"] = both
    if found and "train" not in found:
        raise TaskError(f"{folder}: there is no train.txt or trainval.txt in it")
    return {split: found[split] for split in ("train", "validation", "test") if split in found}


def _parse(path: Path, size: tuple[int, int] | None, bad: Bad) -> list[dict[str, Any]]:
    """The objects of one file, their classes by name."""
    try:
        root = ElementTree.parse(path).getroot()
    except FileNotFoundError:
        raise TaskError(f"{path}: there is no such file") from None
    except (ElementTree.ParseError, OSError, ValueError) as error:
        raise TaskError(f"{path}: no XML that can be read ({error})") from None
    said = tuple(_number(root.find("size"), name) for name in ("height", "width"))
    if size is not None and None not in said and said != size:
        raise TaskError(f"{path}: says {said[1]:g}x{said[0]:g} pixels, its image has {size[1]}x{size[0]}")
    if size is None:  # a damaged image, of which extraction says more
        size = (1 << 30, 1 << 30)
    out = []
    for number, entry in enumerate(root.findall("object"), 1):
        where, name = f"{path}: object {number}", (entry.findtext("name") or "").strip()
        if not name:
            raise TaskError(f"{where} has no name")
        corners = [_number(entry.find("bndbox"), side) for side in ("xmin", "ymin", "xmax", "ymax")]
        if None in corners:
            raise TaskError(f"{where} ({name}) has no bndbox of xmin, ymin, xmax, ymax")
        x0, y0, x1, y1 = (float(c) for c in corners if c is not None)
        box = (x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1)
        if wrong := wrong_box(box, size):
            bad.take(f"{where} ({name}; pixels are counted from 1): {wrong}")
            continue
        difficult = (entry.findtext("difficult") or "").strip() or "0"
        if difficult not in ("0", "1"):
            raise TaskError(f"{where} ({name}): difficult is 0 or 1, not {difficult!r}")
        out.append({
            **dict(zip(("left", "top", "width", "height"), box, strict=True)), "area": box[2] * box[3], "class": name,
            "crowd": False, "difficult": difficult == "1",
        })  # fmt: skip
    return out


def _number(element: Any, name: str) -> float | None:
    try:
        return float(element.findtext(name))
    except (AttributeError, TypeError, ValueError):
        return None


def _classes(folder: Path, parsed: dict[str, list[list[dict[str, Any]]]]) -> tuple[str, ...]:
    """Those of classes.txt; else VOC's own where there are no others, else those of the training images."""
    if (file := folder / CLASSES).is_file():
        told = tuple(file_lines(file))
        if not told or len(set(told)) < len(told):
            raise TaskError(f"{file}: names of classes are expected, each once, one a line")
        return told
    first = parsed.get("train") or parsed.get("") or []
    names = {found["class"] for objects in first for found in objects}
    if not names:
        raise TaskError(f"{folder}: there is no object in the training images")
    return VOC if names <= set(VOC) else tuple(sorted(names))


def _place(name: str, classes: tuple[str, ...], folder: Path, stem: str) -> int:
    if name not in classes:
        few = ", ".join(classes[:8]) + (", …" if len(classes) > 8 else "")
        raise TaskError(f"{folder}/Annotations/{stem}.xml: unknown class {name!r}; those of the training images: {few}")
    return classes.index(name)
