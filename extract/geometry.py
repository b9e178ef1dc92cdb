"""Where a view shows what of its image: boxes and masks are carried into it and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

META = "geometry"  # what a sample's meta calls it
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")  # of images
MOST_PIXELS = 89_478_485  # of an image, a quarter of a gigabyte decoded; what Pillow warns at


@dataclass(frozen=True)
class Geometry:
    """All pairs are (height, width) or (y, x).

    `size`: of the image in its own pixels. `extent`: of what the backbone sees, padding included, which stands at the
    bottom and the right; `seen`: the part of it that shows the image. A point p of the image lies at p · `scale` −
    `offset`, and `flip` then turns left to right within `seen`.
    """

    size: tuple[int, int]
    extent: tuple[int, int]
    seen: tuple[int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)
    flip: bool = False

    def to_meta(self) -> dict[str, Any]:
        """JSON-ready."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> Geometry:
        """That of a sample by its meta. Raises KeyError or TypeError where it says none."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in meta[META].items()}
        return cls(**values)

    @property
    def plain(self) -> bool:
        """Whether a pixel of the view is one of the image."""
        return self.seen == self.size and self.scale == (1, 1) and self.offset == (0, 0) and not self.flip

    @property
    def whole(self) -> bool:
        """Whether the view shows all of the image."""
        shown = (self.size[0] * self.scale[0], self.size[1] * self.scale[1])
        return self.offset == (0, 0) and all(abs(a - b) < 0.5 for a, b in zip(shown, self.seen, strict=True))

    def mask(self, values: np.ndarray, void: int) -> np.ndarray:
        """A mask of the image (height, width) → that of the view (`seen`), by the pixel under the middle of each one;
        `void` where the view shows what is outside of the image."""
        if self.plain:
            return values
        places = []
        for side in (0, 1):
            at = np.floor((np.arange(self.seen[side]) + 0.5 + self.offset[side]) / self.scale[side]).astype(np.int64)
            places.append(at)
        inside = [(at >= 0) & (at < n) for at, n in zip(places, self.size, strict=True)]
        rows, columns = (np.clip(at, 0, n - 1) for at, n in zip(places, self.size, strict=True))
        shown = np.where(inside[0][:, None] & inside[1][None, :], values[rows[:, None], columns[None, :]], void)
        return np.ascontiguousarray(shown[:, ::-1] if self.flip else shown).astype(values.dtype)

    def boxes(self, corners: np.ndarray) -> np.ndarray:
        """Boxes (n, 4) as x0, y0, x1, y1 of the image → of the view, cut at its edges; one outside has no area."""
        scale, offset = (np.array([pair[1], pair[0]] * 2) for pair in (self.scale, self.offset))
        found = np.asarray(corners, np.float64).reshape(-1, 4) * scale - offset
        if self.flip:
            found[:, [0, 2]] = self.seen[1] - found[:, [2, 0]]
        return np.clip(found, 0, np.array([self.seen[1], self.seen[0]] * 2))

    def back(self, corners: np.ndarray) -> np.ndarray:
        """The inverse of `boxes`, cut at the edges of the image."""
        found = np.array(corners, np.float64).reshape(-1, 4)
        if self.flip:
            found[:, [0, 2]] = self.seen[1] - found[:, [2, 0]]
        scale, offset = (np.array([pair[1], pair[0]] * 2) for pair in (self.scale, self.offset))
        return np.clip((found + offset) / scale, 0, np.array([self.size[1], self.size[0]] * 2))
