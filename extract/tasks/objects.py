"""Objects in images: boxes with a class, and an outline where there are instances. What the readers of COCO's and VOC's
files have in common.

An object is a dict of `FIELDS`, as it stands in a task table: `left`, `top`, `width`, `height` in pixels of the image
(continuous: a box that covers the first pixel alone is 0, 0, 1, 1), `class` (an index into the task's labels), `crowd`
(COCO's iscrowd: many of a class in one box) and `difficult` (VOC's), neither of which is learned nor counts as a miss,
`area` (as the file says it, by which COCO's sizes go), and of instances `outline`, see `extract.outlines`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from pipeline.extract.tasks.base import SPLITS, Rows, Task, TaskError, TaskSpec, fixed_order
from pipeline.extract.tasks.splits import hold_out
from pipeline.store.errors import UserError
from pipeline.store.format.digest import digest_json

NUMBERS = ("left", "top", "width", "height", "area")
FIELDS = (*NUMBERS, "class", "crowd", "difficult")
# Files give coordinates rounded to two decimals, and VOC's are whole pixels; what reaches further is another image's.
SLACK = 0.5
_LARGEST = 1e300  # what is greater may be no float


@dataclass
class Bad:
    """What is wrong with single objects. Without `skip` the first one stops the reading; else they are counted."""

    skip: bool = False
    found: list[str] = field(default_factory=list)

    def take(self, what: str) -> None:
        """Raises TaskError unless such objects are left out."""
        if not self.skip:
            raise TaskError(f"{what}; correct it, or leave such objects out: --skip-bad")
        self.found.append(what)


def wrong_box(box: Sequence[Any], size: tuple[int, int]) -> str:
    """What keeps `box` (left, top, width, height) from being one of an image of `size` (height, width), "" where
    nothing does."""
    if len(box) != 4 or not all(is_number(value) for value in box):
        return f"box {str(list(box))[:60]} is not four finite numbers"
    left, top, width, height = box
    shown = ", ".join(f"{value:g}" for value in box)
    if not (width > 0 and height > 0):
        return f"box [{shown}] has no area"
    if min(left, top) < -SLACK or left + width > size[1] + SLACK or top + height > size[0] + SLACK:
        return f"box [{shown}] (left, top, width, height) reaches outside its image of {size[1]}x{size[0]} pixels"
    return ""


def is_number(value: object) -> bool:
    """Whether it is a finite number, and no truth value."""
    return isinstance(value, int | float) and type(value) is not bool and -_LARGEST < value < _LARGEST


def wrong_object(found: Any, classes: int, size: tuple[int, int], outlined: bool) -> str:
    """What keeps `found` from being an object of a task table, "" where nothing does."""
    names = {*FIELDS, "outline"} if outlined else set(FIELDS)
    if not isinstance(found, dict) or found.keys() != names:
        return "an object has other fields than objects have"
    flags = type(found["crowd"]) is bool and type(found["difficult"]) is bool
    known = type(found["class"]) is int and 0 <= found["class"] < classes
    if not flags or not known or not is_number(found["area"]) or found["area"] < 0:
        return f"an object is of none of the {classes} classes, or makes no sense"
    if outlined and not isinstance(found["outline"], str):
        return "an object has no outline"
    return wrong_box([found[name] for name in NUMBERS[:4]], size)


def sizes_of(paths: Sequence[Path]) -> list[tuple[int, int] | None]:
    """(height, width) of images by their headers, upright; None of one that cannot be read, which is said where it is
    decoded. Raises TaskError naming the first that is not there."""
    from pipeline.extract.backbones.images import header_extent

    def look(path: Path) -> tuple[int, int] | None:
        if not path.is_file():
            raise TaskError(f"{path}: there is no such image")
        try:
            width, height = header_extent(path)
        except UserError:
            return None
        return height, width

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(look, paths))


@dataclass
class Read:
    """What files say of the images of each split ("" is yet to be split), and how: `labels`, by index, with the
    `numbers` that the files know them by, () where they have none; `digests`: split → that of its file, {} where there
    is a folder."""

    splits: dict[str, Rows]
    labels: tuple[str, ...]
    numbers: tuple[int, ...] = ()
    digests: dict[str, str] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()


def object_task(name: str, dataset: str, source: str, where: str, read: Read, instances: bool, bad: Bad) -> Task:
    """A task of what was `read`; where there are no validation rows a tenth of the images each is held out.
    `dataset` and `where`: what it is called, in its provenance and in messages."""
    splits, rule = dict(read.splits), "files" if read.digests else "folders"
    everything = splits.pop("", None)
    absent: dict[str, str] = {}
    if everything is not None:
        rule = "files" if {"validation", "test"} <= splits.keys() else "held-out"
        given = {split: rows.take(fixed_order(len(rows))) for split, rows in splits.items()}
        splits, absent = hold_out(everything, given, where)
    else:
        absent = {s: f"no list of {s} images in {where}" for s in SPLITS if s not in splits}
        splits = {s: rows.take(fixed_order(len(rows))) for s, rows in splits.items()}
    provenance: dict[str, Any] = {
        "dataset": dataset,
        "revision": _revision(splits, read.labels),
        "licence": "not stated",
        "source": source,
        "splits": rule,
        "label": "instances" if instances else "boxes",
        **({"files": dict(read.digests)} if read.digests else {}),
        **({"left_out": len(bad.found)} if bad.found else {}),
    }
    spec = TaskSpec(
        name, "instances" if instances else "boxes", read.labels, read.metrics, ("image",), f"{name} image: {{0}}",
        values=tuple(float(n) for n in read.numbers),
    )  # fmt: skip
    return Task(spec, {s: splits[s] for s in SPLITS if s in splits}, provenance, absent)


def _revision(splits: Mapping[str, Rows], labels: Sequence[str]) -> str:
    """Of images' names, their objects, and the classes."""
    hashed = xxhash.xxh3_128(digest_json(list(labels)).encode())
    rows = (
        (split, texts, label) for split, r in splits.items() for texts, label in zip(r.texts, r.labels, strict=True)
    )
    for entry in sorted(digest_json([split, list(texts), label]) for split, texts, label in rows):
        hashed.update(entry.encode())
    return hashed.hexdigest()
