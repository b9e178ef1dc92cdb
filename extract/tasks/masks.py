"""Images with masks as a task: a class for each pixel, in a file of the image's name.

    FOLDER/images/*.jpg  FOLDER/masks/*.png                  a tenth of the images each is held out, as of a table
    FOLDER/images/SPLIT/…  FOLDER/masks/SPLIT/…              splits as they are; `annotations` will do for `masks`
    FOLDER/SPLIT/images/…  FOLDER/SPLIT/masks/…              the same
    FOLDER/SPLIT/…  FOLDER/SPLITannot/…                      CamVid's layout
    FOLDER/JPEGImages  FOLDER/SegmentationClass              PASCAL VOC's, splits by ImageSets/Segmentation/SPLIT.txt
    FOLDER/images/SPLIT/…  FOLDER/annotations/SPLIT/…        with FOLDER/objectInfo150.txt ADE20K's, as of 2016

A mask is an 8-bit image of one channel, or with a palette; a pixel's number is that of its class. 255 is no class, and
so is what the user says is none. FOLDER/classes.txt, a name a line, says which classes there are; without it there are
as many as the largest number of a training mask asks for. Where a number below others is none, as 0 in ADE20K, the
description of the task says which numbers its classes have.
"""

from __future__ import annotations

import io
import struct
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pipeline.extract.geometry import MOST_PIXELS
from pipeline.extract.tasks.ade20k import ade20k_classes, is_ade20k
from pipeline.extract.tasks.base import SPLIT_NAMES, SPLITS, Rows, Task, TaskError, TaskSpec, by_split, fixed_order
from pipeline.extract.tasks.files import file_lines
from pipeline.extract.tasks.images import image_files
from pipeline.extract.tasks.names import table_name
from pipeline.extract.tasks.splits import HELD_OUT

VOID = 255
CLASSES = "classes.txt"
# Brostow et al. (2009) in the 11 classes of Badrinarayanan et al. (2017), whose masks say 11 where there is none.
CAMVID = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
_SPLITS = {**SPLIT_NAMES, "training": "train"}
_MASKS = ("masks", "annotations", "labels")
_LOSSY = (".jpg", ".jpeg", ".webp", ".gif")
_LOSSY_FORMATS = ("JPEG", "MPO", "WEBP", "GIF")
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Pairs:
    """Images with their masks, split → (image, mask) in the order of names; `layout`: how they lie in their folder.
    Images of the split "" are yet to be split."""

    layout: str
    splits: dict[str, list[tuple[Path, Path]]]


def mask_pairs(folder: Path) -> Pairs | None:
    """The images with masks of `folder`; None where it is laid out in no way that is known. Raises `TaskError` naming
    an image without a mask or a mask without an image."""
    here = {p.name: p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")}
    if beside := by_split((n for n in here if f"{n}annot" in here), folder, _SPLITS):
        return Pairs("annot", {s: _paired(here[n], here[f"{n}annot"]) for s, n in beside.items()})
    if "JPEGImages" in here and "SegmentationClass" in here:
        return Pairs("voc", _voc(folder, here["JPEGImages"], here["SegmentationClass"]))
    if "images" in here and (name := _first(here)):
        within = (p.name for p in here["images"].iterdir() if p.is_dir())
        if parts := by_split(within, here["images"], _SPLITS):
            return Pairs("images", {s: _paired(here["images"] / n, here[name] / n) for s, n in parts.items()})
        return Pairs("images", {"": _paired(here["images"], here[name])})
    found = {}
    for split, place in by_split(here, folder, _SPLITS).items():
        inner = {p.name: p for p in here[place].iterdir() if p.is_dir()}
        if "images" in inner and (name := _first(inner)):
            found[split] = _paired(inner["images"], inner[name])
    return Pairs("images", found) if found else None


def _first(folders: dict[str, Path]) -> str | None:
    return next((name for name in _MASKS if name in folders), None)


def _stems(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in image_files(folder) if folder.is_dir() else ():
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            raise TaskError(
                f"{found[stem]} and {path.name}: two files of one name, which one is meant? Keep one of them"
            )
        found[stem] = path
    return found


def _paired(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    here, there = _stems(images), _stems(masks)
    if without := sorted(here.keys() - there.keys()):
        raise TaskError(f"{here[without[0]]}: there is no mask of this name in {masks}")
    if without := sorted(there.keys() - here.keys()):
        raise TaskError(f"{there[without[0]]}: there is no image of this name in {images}")
    return [(here[stem], there[stem]) for stem in sorted(here)]


def _voc(folder: Path, images: Path, masks: Path) -> dict[str, list[tuple[Path, Path]]]:
    here, there = _stems(images), _stems(masks)
    found = {}
    lists = {p.stem: p for p in sorted((folder / "ImageSets" / "Segmentation").glob("*.txt"))}
    for split, stem in by_split(lists, folder / "ImageSets" / "Segmentation", _SPLITS).items():
        file, names = lists[stem], file_lines(lists[stem])
        if twice := next((n for n, count in Counter(names).items() if count > 1), None):
            raise TaskError(f"{file}: {twice} stands twice")
        if lost := next((n for n in names if n not in here or n not in there), None):
            raise TaskError(f"{file}: {lost} has no image in {images.name} or no mask in {masks.name}")
        found[split] = [(here[n], there[n]) for n in names]
    return found


def load_masks(folder: Path, name: str | None = None, void: int | None = None) -> Task:
    """The images of `folder` with their masks as a task named after it. Rows hold names relative to the folder, and the
    bytes of the mask as a PNG file. `void`: a number in masks that is no class, beside 255.

    Raises `TaskError` naming a mask that is damaged, of another size than its image, of several channels or with a
    number that is no class; and where there are no masks, or too few to hold any out.
    """
    pairs = mask_pairs(folder)
    if pairs is None or not pairs.splits:
        raise TaskError(
            f"{folder}: no masks found; expected images/ and masks/ (or SPLIT/ and SPLITannot/), files of equal names"
        )
    read = {split: _read(files) for split, files in pairs.splits.items()}
    if not any(read.values()):
        raise TaskError(f"{folder}: there are no images in it")
    _refuse_other_palettes(
        [f for files in pairs.splits.values() for f in files], [m for ms in read.values() for m in ms]
    )
    classes, none = _classes(folder, pairs, read, void)
    splits = {split: _rows(folder, pairs.splits[split], masks, set(classes), none) for split, masks in read.items()}
    absent: dict[str, str] = {}
    if "" in splits:
        everything, rule = splits.pop(""), "held-out"
        held = max(1, int(len(everything) * HELD_OUT))
        if len(everything) < 3:
            raise TaskError(f"{folder} has {len(everything)} images, too few to hold any out; add some")
        order = fixed_order(len(everything))
        parts = (("train", order[2 * held :]), ("validation", order[:held]), ("test", order[held : 2 * held]))
        splits = {split: everything.take(places) for split, places in parts}
    else:
        rule = "folders"
        absent = {s: f"no folder of {s} images in {folder}" for s in SPLITS if s not in splits}
        splits = {s: rows.take(fixed_order(len(rows))) for s, rows in splits.items()}
    task = table_name(name or folder.resolve().name)
    provenance = {
        "dataset": folder.resolve().name,
        "revision": _revision(splits, _told(folder)),
        "licence": "not stated",
        "source": "mask folder",
        "splits": rule,
        "label": "mask",
    }
    numbers = tuple(map(float, classes)) if any(n != place for place, n in enumerate(classes)) else ()
    spec = TaskSpec(task, "mask", tuple(classes.values()), (), ("image",), f"{task} image: {{0}}", values=numbers)
    return Task(spec, {s: splits[s] for s in SPLITS if s in splits}, provenance, absent)


@dataclass(frozen=True)
class _Mask:
    """`data`: as the bytes of a PNG file. `numbers`: which occur, ascending; `colours` of them, where it has a
    palette."""

    data: bytes
    numbers: tuple[int, ...]
    colours: tuple[tuple[int, ...], ...] = ()


def _read(files: Sequence[tuple[Path, Path]]) -> list[_Mask]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(_read_pair, files))


def _refuse_other_palettes(files: Sequence[tuple[Path, Path]], masks: Sequence[_Mask]) -> None:
    """`TaskError` where a number has another colour in one mask than in another: it may not be the same class."""
    known: dict[int, tuple[tuple[int, ...], Path]] = {}
    for (_, path), mask in zip(files, masks, strict=True):
        for number, colour in zip(mask.numbers, mask.colours, strict=False):
            first, where = known.setdefault(number, (colour, path))
            if first != colour:
                raise TaskError(
                    f"{path}: {number} is of colour {colour}, in {where} of colour {first}: do numbers mean the same "
                    "class in all masks? Save them with one palette, or without palettes if they do"
                )


def _read_pair(pair: tuple[Path, Path]) -> _Mask:
    image, path = pair
    if path.suffix.lower() in _LOSSY:
        raise TaskError(f"{path}: a mask in a format that does not keep its numbers; save it as PNG")
    data = path.read_bytes()
    values = read_mask(data, str(path))
    if png_size(data) is None:  # another lossless format
        data = _png(values)
    if (seen := _size(image)) is not None and seen != values.shape:
        tall, wide = values.shape
        raise TaskError(f"{path}: a mask of {tall}x{wide} pixels, its image {image.name} has {seen[0]}x{seen[1]}")
    numbers = np.flatnonzero(np.bincount(values.reshape(-1), minlength=256)).tolist()
    return _Mask(data, tuple(numbers), _colours(data, numbers))


def _size(image: Path) -> tuple[int, int] | None:
    """(height, width) of an image, upright; None of one that cannot be read, which is said where it is."""
    from pipeline.extract.backbones.images import header_extent
    from pipeline.store.errors import UserError

    try:
        width, height = header_extent(image)
    except UserError:
        return None
    return height, width


def _colours(data: bytes, numbers: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Red, green and blue of each of `numbers`; () of an image without a palette."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        palette = image.getpalette("RGB") or []
    return tuple(tuple(palette[3 * number : 3 * number + 3]) for number in numbers) if palette else ()


def _png(values: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG")
    return out.getvalue()


def png_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) that a PNG file says it has; None of what is none."""
    if len(data) < 24 or not data.startswith(_SIGNATURE) or data[12:16] != b"IHDR":
        return None
    width, height = struct.unpack(">II", data[16:24])
    return height, width


def _grey_step(data: bytes) -> int:
    """How far apart two neighbouring numbers of a grey PNG image stand once it is read as 8 bits."""
    depth = data[24] if png_size(data) is not None else 8
    return 255 // ((1 << depth) - 1) if depth in (2, 4) else 1


def read_mask(data: bytes, where: str) -> np.ndarray:
    """(height, width) uint8, the numbers of a mask's pixels. Raises `TaskError` naming `where` for what is none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise TaskError(f"{where}: more than {MOST_PIXELS:,} pixels")
            if image.format in _LOSSY_FORMATS:  # whatever the file is called
                raise TaskError(f"{where}: {image.format} does not keep the numbers of a mask; save it as PNG")
            if image.mode not in ("L", "P", "1"):
                raise TaskError(f"{where}: a mask has one channel of 8 bits, the numbers of classes; not {image.mode}")
            # Grey of 2 or 4 bits is read as brightness, 0 to 255.
            return np.asarray(image).astype(np.uint8) // (_grey_step(data) if image.mode == "L" else 1)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise TaskError(f"{where}: no mask that can be read ({str(error).splitlines()[0][:80]})") from None


def _told(folder: Path) -> tuple[str, ...]:
    """The names that classes.txt gives, in the order of numbers from 0; () where there is no such file."""
    file = folder / CLASSES
    if not file.is_file():
        return ()
    names = tuple(file_lines(file))
    if len(set(names)) < len(names) or len(names) > VOID:
        raise TaskError(f"{file}: at most {VOID} names, each once, one a line")
    return names


def _classes(
    folder: Path, pairs: Pairs, read: dict[str, list[_Mask]], void: int | None
) -> tuple[dict[int, str], set[int]]:
    """Number → name of each class, ascending, and the numbers that are no class."""
    none = {VOID} if void is None else {VOID, void}
    first = read.get("train") or read.get("") or [m for masks in read.values() for m in masks]
    numbers = {n for mask in first for n in mask.numbers} - {VOID}
    names = _told(folder)
    if not names and void is None and is_ade20k(folder):
        return dict(enumerate(ade20k_classes(folder), start=1)), {*none, 0}
    if not names and void is None and pairs.layout == "annot" and max(numbers, default=0) == len(CAMVID):
        return dict(enumerate(CAMVID)), {*none, len(CAMVID)}
    names = names or tuple(str(i) for i in range(max(numbers - none, default=0) + 1))
    return {i: name for i, name in enumerate(names) if i not in none}, none


def _rows(
    folder: Path, files: Sequence[tuple[Path, Path]], masks: Sequence[_Mask], classes: set[int], none: set[int]
) -> Rows:
    rows = Rows([], [])
    for (image, path), mask in zip(files, masks, strict=True):
        if wrong := [n for n in mask.numbers if n not in classes and n not in none]:
            raise TaskError(
                f"{path}: {wrong[0]} is no class, there are {len(classes)} ({min(classes, default=0)} to "
                f"{max(classes, default=0)}); say which number is none with --ignore-index, or name all classes in "
                "classes.txt"
            )
        rows.texts.append((image.relative_to(folder).as_posix(),))
        rows.labels.append(mask.data)
    return rows


def _revision(splits: dict[str, Rows], classes: Sequence[str]) -> str:
    """Of images' names, masks, and `classes` that a file names."""
    named: list[Any] = [("", "classes", *classes)] if classes else []
    for split, rows in splits.items():
        for texts, data in zip(rows.texts, rows.labels, strict=True):
            assert isinstance(data, bytes)
            named.append((split, *texts, xxhash.xxh3_128_hexdigest(data)))
    return xxhash.xxh3_128_hexdigest(repr(sorted(named)).encode())
