"""What is told of an image, as images: masks as PNG files, and laid over the image to look at."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.extract.backbones.images import open_image
from pipeline.store.errors import UserError

OPACITY = 0.5


def palette(count: int) -> np.ndarray:
    """(count, 3) uint8: colours far apart, in turns of the golden angle, the same ones every time."""
    turns = [(i * 0.61803398875) % 1 for i in range(count)]
    shades = [colorsys.hsv_to_rgb(t, 0.85 if i % 2 else 0.6, 1.0 if i % 3 else 0.75) for i, t in enumerate(turns)]
    return (np.array(shades).reshape(-1, 3) * 255).round().astype(np.uint8)


def save_mask(mask: np.ndarray, classes: int, image: Path, folder: Path, name: str) -> dict[str, str]:
    """Write `mask` (height, width) uint8 to `folder`/NAME.png, and over its image to `folder`/overlays/NAME.jpg.
    Returns the two names. Raises UserError where they cannot be written."""
    files = {"mask": f"{name}.png", "overlay": f"overlays/{name}.jpg"}
    shown = np.asarray(open_image(image), np.float32)
    colours = palette(classes)[np.minimum(mask, classes - 1)]
    mixed = ((1 - OPACITY) * shown + OPACITY * colours).round().astype(np.uint8)
    try:
        for file, values in ((files["mask"], mask), (files["overlay"], mixed)):
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(path)
    except OSError as error:
        raise UserError(f"--out-dir {folder}: cannot be written: {error.strerror or error}") from None
    return files
