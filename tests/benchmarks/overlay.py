"""The pictures in docs/dense.md and docs/tutorials/detection.md: what `predict` draws over a generated street, by a
head trained in a minute or two.

Streets are drawn here, so that the picture is nobody else's. The backbone is the MobileNetV2 of the shared data.

    python -m tests.benchmarks.overlay --data ../shared/data --out FOLDER --picture docs/overlay.jpg
    python -m tests.benchmarks.overlay --objects --data ../shared/data --out FOLDER --picture docs/images/objects.jpg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

import pipeline
from pipeline.commands.extract import run_extract
from pipeline.commands.train import run_train
from pipeline.recipe import Recipe

CLASSES = ("sky", "building", "road", "tree", "car")
SIZE = (224, 160)  # (width, height)
SPLITS = {"validation": "val", "test": "test"}


def shade(rng: np.random.Generator, low: tuple[int, ...], high: tuple[int, ...]) -> tuple[int, ...]:
    """A colour between two."""
    return tuple(int(rng.integers(a, b + 1)) for a, b in zip(low, high, strict=True))


def street(rng: np.random.Generator) -> tuple[Image.Image, Image.Image, list[tuple[int, ...]]]:
    """A street, its mask, and the boxes (left, top, right, bottom, class) of its trees and cars."""
    (wide, tall), image, mask = SIZE, Image.new("RGB", SIZE), Image.new("L", SIZE)
    boxes: list[tuple[int, ...]] = []
    horizon = int(rng.integers(tall * 5 // 10, tall * 6 // 10))
    paint, number = ImageDraw.Draw(image), ImageDraw.Draw(mask)
    light, deep = shade(rng, (190, 200, 215), (225, 230, 240)), shade(rng, (90, 130, 190), (150, 180, 220))
    for y in range(horizon):
        paint.line((0, y, wide, y), tuple(d + (c - d) * y // horizon for c, d in zip(light, deep, strict=True)))
    left = 0
    while left < wide:
        broad, top = int(rng.integers(28, 60)), int(rng.integers(12, horizon - 20))
        wall = shade(rng, (110, 90, 80), (190, 165, 150))
        for draw, colour in ((paint, wall), (number, 1)):
            draw.rectangle((left, top, left + broad, horizon + 6), colour)
        for y in range(top + 6, horizon - 6, 12):
            for x in range(left + 5, left + broad - 7, 11):
                paint.rectangle((x, y, x + 5, y + 7), shade(rng, (40, 50, 60), (90, 110, 130)))
        left += broad + int(rng.integers(0, 14))
    ground = [(0, horizon + 6), (wide, horizon + 6), (wide, tall), (0, tall)]
    paint.polygon(ground, shade(rng, (80, 80, 82), (115, 112, 110)))
    number.polygon(ground, 2)
    for y in range(horizon + 12, tall, 18):
        paint.line((wide // 2, y, wide // 2, y + 9), (215, 215, 205), 1 + (y - horizon) // 24)
    for _ in range(int(rng.integers(1, 4))):
        x, radius = int(rng.integers(0, wide)), int(rng.integers(12, 24))
        blobs = []
        paint.rectangle((x - 2, horizon - 14, x + 2, horizon + 10), (80, 60, 45))
        for _ in range(14):
            at = x + rng.integers(-radius, radius) // 2, horizon - 24 + rng.integers(-radius, radius) // 2
            box = [int(v) for v in (at[0] - radius // 2, at[1] - radius // 2, at[0] + radius // 2, at[1] + radius // 2)]
            paint.ellipse(box, shade(rng, (35, 75, 30), (80, 130, 60)))
            number.ellipse(box, 3)
            blobs.append(box)
        number.rectangle((x - 2, horizon - 14, x + 2, horizon + 10), 3)
        left, top, right, _ = zip(*blobs, strict=True)
        if max(left) < wide - 8 and max(right) > 8:  # what stands outside is no object
            boxes.append((max(0, min(left)), max(0, min(top)), min(wide, max(right)), horizon + 10, 3))
    for _ in range(int(rng.integers(1, 4))):
        scale, x = float(rng.uniform(0.7, 1.5)), int(rng.integers(0, wide - 30))
        long, high, bottom = int(36 * scale), int(12 * scale), int(horizon + 14 + 26 * scale)
        body, cabin = (
            (x, bottom - high, x + long, bottom),
            (x + long // 5, bottom - 2 * high, x + long * 4 // 5, bottom),
        )
        paint.rectangle(cabin, (60, 75, 90))
        paint.rectangle(body, shade(rng, (120, 20, 20), (230, 200, 190)))
        for wheel in (x + long // 5, x + long * 4 // 5):
            paint.ellipse((wheel - 4, bottom - 4, wheel + 4, bottom + 4), (20, 20, 22))
            number.ellipse((wheel - 4, bottom - 4, wheel + 4, bottom + 4), 4)
        number.rectangle(cabin, 4)
        number.rectangle(body, 4)
        boxes.append((x, bottom - 2 * high, min(wide, x + long), bottom + 4, 4))
    noise = rng.normal(0, 7, (tall, wide, 3))
    shown = np.asarray(image.filter(ImageFilter.GaussianBlur(0.7)), np.float64) + noise
    return Image.fromarray(shown.clip(0, 255).astype(np.uint8)), mask, boxes


def write_streets(folder: Path, counts: dict[str, int]) -> None:
    """`counts` streets a split, as images and masks, with the names of the classes."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for i in range(count):
            image, mask, _ = street(rng)
            for place, picture in (("images", image), ("masks", mask)):
                (folder / place / split).mkdir(parents=True, exist_ok=True)
                picture.save(folder / place / split / f"{i:02d}.png")
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")


def write_objects(folder: Path, counts: dict[str, int]) -> None:
    """`counts` streets a split, with the boxes of their trees and cars in COCO's format."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        images, boxes = [], list[dict[str, object]]()
        (folder / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image, _, found = street(rng)
            image.save(folder / split / f"{i:02d}.png")
            images.append({"id": i, "file_name": f"{i:02d}.png", "height": SIZE[1], "width": SIZE[0]})
            for left, top, right, bottom, kind in found:
                box = [left, top, right - left, bottom - top]
                boxes.append({"id": len(boxes) + 1, "image_id": i, "category_id": kind, "bbox": box, "iscrowd": 0,
                              "area": box[2] * box[3]})  # fmt: skip
        classes = [{"id": kind, "name": CLASSES[kind]} for kind in (3, 4)]
        told = {"images": images, "annotations": boxes, "categories": classes}
        (folder / f"instances_{split}.json").write_text(json.dumps(told), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--epochs", type=int, help="default: 6, of objects 24")
    parser.add_argument("--objects", action="store_true", help="boxes in place of masks")
    args = parser.parse_args()
    task, head = args.out / "streets", {"head_width": 32}
    common = {"model": str(args.data / "weights/mobilenetv2_035"), "task": str(task), "image_size": "own"}
    common |= {"store": str(args.out / "store")}
    if args.objects:
        write_objects(task, {"train": 96, "val": 12, "test": 6})
        common |= {"task": str(task / "instances_train.json"), "data": str(task)}
        common |= {split: str(task / f"instances_{short}.json") for split, short in SPLITS.items()}
        head["head"], folder = "retinanet", task / "test"
    else:
        write_streets(task, {"train": 24, "val": 6, "test": 6})
        folder = task / "images/test"
    run_extract(Recipe(**common, tuners=("fixed",)), print, quiet=True)
    recipe = Recipe(**common, tuner="fixed", epochs=args.epochs or (24 if args.objects else 6), objective_options=head,
                    out=str(args.out / "run"), overwrite=True)  # fmt: skip
    print(run_train(recipe, print, quiet=True)["test"])
    image = folder / "00.png"
    pipeline.load_run(args.out / "run").predict([str(image)], out_dir=args.out / "told")
    parts = [Image.open(image), Image.open(args.out / "told/overlays/00.jpg")]
    both = Image.new("RGB", (2 * SIZE[0] + 4, SIZE[1]), "white")
    for place, part in enumerate(parts):
        both.paste(part, (place * (SIZE[0] + 4), 0))
    both.save(args.picture, quality=85)
    print(f"{args.picture}: {args.picture.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
