"""Objects drawn over their image, to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pipeline.extract.backbones.images import open_image
from pipeline.extract.outlines import mask_library
from pipeline.store.errors import UserError
from pipeline.train.objectives.overlays import OPACITY, palette

SHOWN = 0.3  # score from which an object is drawn; all are told


def save_objects(
    objects: Sequence[Mapping[str, Any]], labels: Sequence[str], image: Path, folder: Path, name: str
) -> dict[str, str]:
    """Draw `objects` (`label`, `score`, `bbox`, perhaps `segmentation`) from the weakest to the best over their image,
    into `folder`/overlays/NAME.jpg. Returns its name. Raises UserError where it cannot be written."""
    shown, colours = np.asarray(open_image(image)).copy(), palette(len(labels))
    drawn = [found for found in reversed(objects) if found["score"] >= SHOWN]
    for found in drawn:
        if "segmentation" in found:
            inside = mask_library().decode(dict(found["segmentation"])).astype(bool)
            colour = colours[labels.index(found["label"])]
            shown[inside] = ((1 - OPACITY) * shown[inside] + OPACITY * colour).round().astype(np.uint8)
    picture = Image.fromarray(shown)
    pen = ImageDraw.Draw(picture)
    for found in drawn:
        left, top, width, height = found["bbox"]
        colour = tuple(int(c) for c in colours[labels.index(found["label"])])
        pen.rectangle((left, top, left + width, top + height), outline=colour, width=2)
        text = f"{found['label']} {found['score']:.2f}"
        pen.rectangle(pen.textbbox((left + 2, top), text), fill=colour)
        pen.text((left + 2, top), text, fill=(0, 0, 0))
    path = folder / "overlays" / f"{name}.jpg"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except OSError as error:
        raise UserError(f"--out-dir {folder}: cannot be written: {error.strerror or error}") from None
    return {"overlay": f"overlays/{name}.jpg"}
