"""Small generated scenes: rectangles of a colour a class on noise, with their masks, in several sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = np.array([[40, 40, 40], [220, 60, 40], [60, 200, 80], [50, 80, 220]], np.uint8)
SIZES = ((64, 64), (50, 70), (64, 64), (72, 40))  # (height, width)


def scene(size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[tuple[int, ...]]]:
    """An image (h, w, 3), its mask (h, w), and its rectangles (x0, y0, x1, y1, class)."""
    mask, boxes = np.zeros(size, np.uint8), []
    for number in rng.permutation([1, 2, 3])[: rng.integers(1, 4)].tolist():
        tall, wide = (int(rng.integers(n // 4, n // 2)) for n in size)
        top, left = int(rng.integers(size[0] - tall)), int(rng.integers(size[1] - wide))
        mask[top : top + tall, left : left + wide] = number
        boxes.append((left, top, left + wide, top + tall, number))
    return (COLOURS[mask] + rng.integers(0, 30, (*size, 3))).astype(np.uint8), mask, boxes


def write_scenes(folder: Path, counts: dict[str, int], seed: int = 0, sizes=SIZES) -> Path:
    """`counts` scenes a split in CamVid's layout; number 255 in the first row of each mask."""
    rng = np.random.default_rng(seed)
    for split, count in counts.items():
        for i in range(count):
            image, mask, _ = scene(sizes[i % len(sizes)], rng)
            mask[0] = 255
            for place, values in ((folder / split, image), (folder / f"{split}annot", mask)):
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(place / f"{i:03d}.png")
    return folder
