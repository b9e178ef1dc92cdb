"""The generated scenes with their objects, as COCO's JSON and as VOC's XML."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.scenes import SIZES, scene

CATEGORIES = {2: "red", 3: "green", 7: "blue"}  # of classes 1 to 3 of the scenes; ids with gaps, as COCO's


def coco_entry(number: int, image: int, box: tuple[int, ...], **more) -> dict:
    """An annotation of a rectangle x0, y0, x1, y1, class; its outline is that of the box."""
    x0, y0, x1, y1, kind = box
    return {
        "id": number, "image_id": image, "category_id": list(CATEGORIES)[kind - 1], "iscrowd": 0,
        "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0),
        "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]], **more,
    }  # fmt: skip


def write_coco(folder: Path, counts: dict[str, int], seed: int = 0, sizes=SIZES) -> dict[str, Path]:
    """`counts` scenes a split, COCO's layout. Every third image has a crowd too, its outline in run lengths, and the
    last of each split has no object. Returns the JSON of each split."""
    rng, files = np.random.default_rng(seed), {}
    (folder / "annotations").mkdir(parents=True)
    for split, count in counts.items():
        images, annotations = [], []
        (folder / f"{split}2017").mkdir()
        for i in range(count):
            pixels, _, boxes = scene(sizes[i % len(sizes)], rng)
            height, width = pixels.shape[:2]
            name, number = f"{i + 1:012d}.png", i + 1
            Image.fromarray(pixels).save(folder / f"{split}2017" / name)
            images.append({"id": number, "file_name": name, "height": height, "width": width})
            for box in boxes if i < count - 1 else ():
                annotations.append(coco_entry(len(annotations) + 1, number, box))
            if i % 3 == 0 and i < count - 1:
                runs = {"size": [height, width], "counts": [0, 5 * height, (width - 5) * height]}
                entry = coco_entry(len(annotations) + 1, number, (0, 0, 5, height, 1), iscrowd=1, segmentation=runs)
                annotations.append(entry)
        files[split] = folder / "annotations" / f"instances_{split}2017.json"
        categories = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
        found = {"images": images, "annotations": annotations, "categories": categories}
        files[split].write_text(json.dumps(found))
    return files


def voc_xml(size: tuple[int, int], objects: list[tuple[str, tuple[float, ...], bool]]) -> str:
    """An annotation of objects: name, xmin, ymin, xmax, ymax counted from 1, whether difficult."""
    parts = [
        f"<object><name>{name}</name><difficult>{int(hard)}</difficult><bndbox>"
        + "".join(
            f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        )
        + "</bndbox></object>"
        for name, box, hard in objects
    ]
    shape = f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>"
    return f"<annotation>{shape}{''.join(parts)}</annotation>"


def write_voc(folder: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """`counts` scenes a split (train, val, test), VOC's layout; the last object of each image is difficult."""
    rng, number = np.random.default_rng(seed), 0
    for place in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / place).mkdir(parents=True)
    for split, count in counts.items():
        names = []
        for i in range(count):
            pixels, _, boxes = scene(SIZES[i % len(SIZES)], rng)
            number += 1
            names.append(f"{number:06d}")
            Image.fromarray(pixels).save(folder / "JPEGImages" / f"{names[-1]}.png")
            objects = [
                (list(CATEGORIES.values())[kind - 1], (x0 + 1, y0 + 1, x1, y1), k == len(boxes) - 1)
                for k, (x0, y0, x1, y1, kind) in enumerate(boxes)
            ]
            (folder / "Annotations" / f"{names[-1]}.xml").write_text(voc_xml(pixels.shape[:2], objects))
        (folder / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return folder
