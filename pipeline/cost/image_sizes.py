"""What `plan` reads of a task's images: how large they are, and a few of them to time reading."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.extract.backbones.base import TextOptions
from pipeline.extract.backbones.images import Picture, Preprocess, header_extent, look_all
from pipeline.extract.tasks.base import Rows
from pipeline.store.errors import UserError

PICTURES = 16  # images that reading is timed on


def image_extents(preprocess: Preprocess, rows: Rows, options: TextOptions) -> np.ndarray:
    """(n, 2) height and width that the images of `rows` have when the backbone sees them. Only where each keeps its own
    are the files looked at, their headers alone; with `skip_bad` those that have none are left out."""
    if preprocess.size:
        return np.tile(np.array(preprocess.size, np.int64), (len(rows), 1))
    found = []
    for name, *_ in rows.texts:
        try:
            found.append(preprocess.extent(*header_extent(Path(options.root) / name)))
        except UserError:
            if not options.skip_bad:
                raise
    return np.array(found, np.int64).reshape(-1, 2)


def some_pictures(preprocess: Preprocess, rows: Rows, options: TextOptions) -> list[Picture]:
    """The first few images of `rows`. UserError for one that cannot be read, unless `skip_bad` leaves it out."""
    paths = [Path(options.root) / name for name, *_ in rows.texts[:PICTURES]]
    found = look_all(paths, preprocess.sized(options.image_size), [0] * len(paths), 0)
    for picture in found:
        if isinstance(picture, UserError) and not options.skip_bad:
            raise picture
    return [p for p in found if not isinstance(p, UserError)]
