"""COCO's JSON as a task: boxes of the objects in images, and their outlines where every object has one.

`--task coco/annotations/instances_train2017.json --data coco` finds an image as coco/train2017/FILE (what follows the
last _ in the JSON's name), coco/FILE or coco/images/FILE.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.extract.outlines import outline_text
from pipeline.extract.tasks.base import Rows, Task, TaskError
from pipeline.extract.tasks.files import file_bytes
from pipeline.extract.tasks.names import table_name
from pipeline.extract.tasks.objects import Bad, Read, is_number, object_task, sizes_of, wrong_box
from pipeline.store.format.digest import digest_bytes

_LARGEST = 1 << 53  # number that JSON is sure to keep, and a float
_BEGIN = re.compile(r'\s*\{\s*"(info|licenses|images|annotations|categories|type)"\s*:\s*(\[|\{|"instances")')


def is_coco(path: Path) -> bool:
    """Whether the file is one of COCO's, whole or broken: by its first words, not by all of it."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    with path.open("rb") as file:
        return _BEGIN.match(file.read(1 << 12).decode("utf-8-sig", "replace")) is not None


def load_coco(
    path: Path,
    root: Path,
    *,
    validation: Path | None = None,
    test: Path | None = None,
    name: str | None = None,
    instances: bool = False,
    skip_bad: bool = False,
) -> Task:
    """The images and objects of `path` as a task named after it, images below `root`. `validation`, `test`: files of
    these splits; without the first a tenth of the images each is held out. `instances`: outlines are needed.
    `skip_bad`: objects that cannot be used are left out and counted.

    Raises `TaskError` naming file and entry for broken JSON, an id or a file that stands twice, an unknown image or
    category, a box outside its image or of no area, an outline that is none, an image that is not there or of another
    size.
    """
    bad, files = Bad(skip_bad), {"": path, "validation": validation, "test": test}
    named = {split: file for split, file in files.items() if file is not None}
    raw = {split: _read(file) for split, file in named.items()}
    digests = {split or "train": digest for split, (_, digest) in raw.items()}
    categories = _categories(path, raw[""][0])
    outlined = all(a.get("segmentation") for file, _ in raw.values() for a in file["annotations"])
    if instances and not outlined:
        entries = [(named[split], entry) for split, (file, _) in raw.items() for entry in file["annotations"]]
        first = next(f"{file}: annotation {entry['id']}" for file, entry in entries if not entry.get("segmentation"))
        raise TaskError(f"{first} has no segmentation; --objective detection learns boxes alone")
    splits = {}
    for split, (file, _) in raw.items():
        own = _categories(named[split], file)
        if other := [n for n, label in own.items() if categories.get(n) != label]:
            raise TaskError(f"{named[split]}: category {other[0]} ({own[other[0]]!r}) is unknown to {path}")
        splits[split] = _rows(named[split], file, list(categories), root, outlined, bad)
    read = Read(splits, tuple(categories.values()), tuple(categories), digests)
    return object_task(table_name(name or path.stem), path.name, "COCO annotations", str(path), read, outlined, bad)


def image_names(path: Path, root: Path) -> list[str]:
    """Names below `root` of the images that the file is of, whether they are there or not."""
    files = (entry.get("file_name") for entry in _read(path)[0]["images"])
    return [_name(path, root, file) or file for file in files if isinstance(file, str)]


def _name(path: Path, root: Path, file: str) -> str | None:
    """Where below `root` the image `file` is; None where it is not."""
    tried = (Path(folder) / file for folder in (_folder(path), "", "images"))
    return next((t.as_posix() for t in tried if _is_file(root / t)), None)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for one
        return False


def _folder(path: Path) -> str:
    return path.stem.rpartition("_")[2]


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """What the file holds, and its digest."""
    data = file_bytes(path)
    try:
        found = json.loads(data)
    except UnicodeDecodeError:
        raise TaskError(f"{path}: not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{path}: broken JSON: {error}") from None
    parts = ("images", "annotations", "categories")
    for part in parts:
        entries = found.get(part) if isinstance(found, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise TaskError(f"{path}: {part} is missing or no list of objects; COCO's format has {', '.join(parts)}")
        _refuse_twice(path, part, entries)
    if not found["images"]:
        raise TaskError(f"{path}: there are no images in it")
    return found, digest_bytes(data)


def _refuse_twice(path: Path, part: str, entries: Sequence[dict[str, Any]]) -> None:
    seen: set[Any] = set()
    for entry in entries:
        number = entry.get("id")
        if type(number) not in ((int, str) if part == "images" else (int,)):
            raise TaskError(f"{path}: an entry of {part} has no id, or one that is no number: {str(entry)[:80]}")
        if isinstance(number, int) and abs(number) > _LARGEST:
            raise TaskError(f"{path}: an entry of {part} has an id of more than {_LARGEST}")
        if number in seen:
            raise TaskError(f"{path}: two entries of {part} have the id {number}")
        seen.add(number)


def _categories(path: Path, raw: dict[str, Any]) -> dict[int, str]:
    """Id → name, by id."""
    found = {entry["id"]: entry.get("name") for entry in sorted(raw["categories"], key=lambda entry: entry["id"])}
    if not found:
        raise TaskError(f"{path}: there are no categories in it")
    for number, name in found.items():
        if not isinstance(name, str) or not name:
            raise TaskError(f"{path}: category {number} has no name")
    if len(set(found.values())) < len(found):
        twice = next(name for name in found.values() if list(found.values()).count(name) > 1)
        raise TaskError(f"{path}: two categories are called {twice!r}")
    return found


def _rows(path: Path, raw: dict[str, Any], numbers: list[int], root: Path, outlined: bool, bad: Bad) -> Rows:
    images = _images(path, raw["images"], root)
    place = {number: i for i, number in enumerate(numbers)}
    objects: dict[Any, list[dict[str, Any]]] = {number: [] for number in images}
    for entry in raw["annotations"]:
        where = f"{path}: annotation {entry['id']}"
        image = entry.get("image_id")
        if isinstance(image, list | dict) or image not in images:
            raise TaskError(f"{where}: there is no image with the id {image}")
        if isinstance(entry.get("category_id"), list | dict) or entry.get("category_id") not in place:
            raise TaskError(f"{where}: there is no category with the id {entry.get('category_id')}")
        name, size = images[image]
        box = entry.get("bbox")
        wrong = wrong_box(box, size) if isinstance(box, list) else "there is no bbox"
        if wrong:
            bad.take(f"{where} ({name}): {wrong}")
            continue
        found = _object(where, entry, place[entry["category_id"]])
        if outlined:
            try:
                found["outline"] = outline_text(entry["segmentation"], size)
            except ValueError as error:
                bad.take(f"{where} ({name}): {error}")
                continue
        objects[image].append(found)
    names = [images[number][0] for number in images]
    return Rows([(name,) for name in names], [objects[number] for number in images], [str(n) for n in images])


def _object(where: str, entry: dict[str, Any], index: int) -> dict[str, Any]:
    left, top, width, height = map(float, entry["bbox"])
    crowd, area = entry.get("iscrowd", 0), entry.get("area", width * height)
    if crowd not in (0, 1) or not is_number(area) or area < 0:
        raise TaskError(f"{where}: iscrowd is 0 or 1, and area a number that is not below 0")
    return {
        "left": left, "top": top, "width": width, "height": height, "area": float(area), "class": index,
        "crowd": bool(crowd), "difficult": False,
    }  # fmt: skip


def _images(path: Path, entries: Sequence[dict[str, Any]], root: Path) -> dict[Any, tuple[str, tuple[int, int]]]:
    """Image id → its name below `root` and its size (height, width)."""
    names: list[str] = []
    for entry in entries:
        file = entry.get("file_name")
        if not isinstance(file, str) or not file:
            raise TaskError(f"{path}: image {entry['id']} has no file_name")
        name = _name(path, root, file)
        if name is None:
            also = "" if root != path.parent else "; give the folder of the images with --data"
            raise TaskError(
                f"{path}: image {entry['id']}: there is neither {root / _folder(path) / file} nor {root / file}{also}"
            )
        names.append(name)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise TaskError(f"{path}: two images have the file_name {twice}")
    found: dict[Any, tuple[str, tuple[int, int]]] = {}
    for entry, name, size in zip(entries, names, sizes_of([root / name for name in names]), strict=True):
        said: tuple[Any, Any] = (entry.get("height"), entry.get("width"))
        if size is not None and None not in said and said != size:
            raise TaskError(
                f"{path}: image {entry['id']} is said to have {said[1]}x{said[0]} pixels, {root / name} has "
                f"{size[1]}x{size[0]}"
            )
        if size is None and not all(type(n) is int and n > 0 for n in said):
            raise TaskError(f"{root / name}: no image that can be read")
        found[entry["id"]] = name, size or (int(said[0]), int(said[1]))
    return found
