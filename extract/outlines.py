"""Outlines of objects: COCO's polygons and run lengths (RLE), which become masks of pixels.

An outline is kept as the JSON text that the user's file has: a list of polygons, each x0, y0, x1, y1, … in pixels of
the image, or an object of `size` (height, width) and `counts`, the lengths of runs of 0 and 1, column by column, as
numbers or in COCO's compressed text. Run lengths are read here, for the library takes whatever they are; polygons are
filled by pycocotools, so that masks are to the pixel those that COCO scores by.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from pipeline.extract.geometry import MOST_PIXELS
from pipeline.store.errors import UserError

_OUTSIDE = 2.0  # pixels that a polygon may reach beyond its image


def mask_library() -> Any:
    """pycocotools.mask. Raises UserError where it is not installed."""
    try:
        from pycocotools import mask
    except ImportError:
        raise UserError(
            "objects in images are scored, and their outlines read, by pycocotools, which is not installed: "
            "pip install 'activation-pipeline[dense]'"
        ) from None
    return mask


def outline_text(given: Any, size: tuple[int, int]) -> str:
    """The outline `given` of an object in an image of `size` (height, width) as text. Raises ValueError saying what is
    wrong with it."""
    if wrong := _wrong(given, size):
        raise ValueError(wrong)
    return json.dumps(given, separators=(",", ":"))


def outline_mask(text: str, size: tuple[int, int]) -> np.ndarray:
    """(height, width) uint8, 1 within the outline. Raises ValueError for what is none of an image of `size`."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("an outline is no JSON") from None
    if wrong := _wrong(given, size):
        raise ValueError(wrong)
    if isinstance(given, dict):
        counts = _counts(given["counts"])
        values = np.arange(len(counts)) % 2
        return np.repeat(values.astype(np.uint8), counts).reshape(size[1], size[0]).T
    library = mask_library()
    polygons = [[float(value) for value in polygon] for polygon in given]
    found: np.ndarray = library.decode(library.merge(library.frPyObjects(polygons, *size)))
    return found


def compressed(mask: np.ndarray) -> dict[str, Any]:
    """A mask (height, width) as COCO's compressed run lengths, ready for JSON."""
    found = mask_library().encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(n) for n in found["size"]], "counts": found["counts"].decode("ascii")}


def _wrong(given: Any, size: tuple[int, int]) -> str:
    if size[0] * size[1] > MOST_PIXELS:
        return f"an outline in an image of more than {MOST_PIXELS:,} pixels"
    return _wrong_runs(given, size) if isinstance(given, dict) else _wrong_polygons(given, size)


def _wrong_polygons(given: Any, size: tuple[int, int]) -> str:
    if not isinstance(given, list) or not given:
        return "its segmentation is neither a list of polygons nor run lengths"
    low, high = -_OUTSIDE, (size[1] + _OUTSIDE, size[0] + _OUTSIDE)
    for polygon in given:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            return "a polygon of its segmentation is not x, y of at least three points"
        if not all(type(value) in (int, float) and low <= value <= high[i % 2] for i, value in enumerate(polygon)):
            return f"a polygon of its segmentation reaches outside its image of {size[1]}x{size[0]} pixels"
    return ""


def _wrong_runs(given: dict[str, Any], size: tuple[int, int]) -> str:
    if given.get("size") != list(size):
        return f"the run lengths of its segmentation are not of an image of {size[1]}x{size[0]} pixels"
    try:
        counts = _counts(given.get("counts"))
    except ValueError:
        return "the run lengths of its segmentation cannot be read"
    if min(counts, default=-1) < 0 or sum(counts) != size[0] * size[1]:
        return f"the run lengths of its segmentation do not add up to its image's {size[0] * size[1]:,} pixels"
    return ""


def _counts(given: Any) -> list[int]:
    """Lengths of runs from numbers or from COCO's text: 5 bits a character, lowest first, the sixth for more to come;
    from the fourth length on the difference to the last but one is kept."""
    if isinstance(given, list):
        if not all(type(count) is int for count in given):
            raise ValueError
        return given
    if not isinstance(given, str):
        raise ValueError
    counts: list[int] = []
    value = shift = 0
    for code in given.encode("ascii"):
        bits = code - 48
        if not 0 <= bits < 64 or shift > 40:
            raise ValueError
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError
    return counts


def bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of the pixels that are set; all 0 where none is."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
