"""Views: the mirror image, or fixed random crops, flips and changes of colour, each drawn once for an image."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageEnhance

from pipeline.extract.geometry import Geometry

# How views of a name are made, as the identity of a feature space says it.
POLICIES = {"random": "crop0.6-1,flip0.5,color0.2", "flip": "flip"}
_ENHANCE = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@dataclass(frozen=True)
class View:
    """What is done to an image: cut out (left, top, width, height), stretched to the image's size, turned left to
    right or not, and brightness, contrast and colour changed by factors; () leaves them."""

    box: tuple[int, int, int, int]
    flip: bool
    colours: tuple[float, ...]

    @classmethod
    def mirror(cls, size: tuple[int, int]) -> View:
        """The mirror image of one of `size` (width, height), exactly."""
        return cls((0, 0, *size), True, ())

    @classmethod
    def draw(cls, size: tuple[int, int], rng: np.random.Generator) -> View:
        """A random view of an image of `size` (width, height): a crop of 0.6 to 1 of the area, a flip half of the time,
        brightness, contrast and colour within 0.8 to 1.2."""
        width, height = size
        share, ratio = rng.uniform(0.6, 1.0), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        wide = min(width, max(1, round(width * (share * ratio) ** 0.5)))
        tall = min(height, max(1, round(height * (share / ratio) ** 0.5)))
        left, top = int(rng.integers(width - wide + 1)), int(rng.integers(height - tall + 1))
        flip = bool(rng.random() < 0.5)
        return cls((left, top, wide, tall), flip, tuple(float(rng.uniform(0.8, 1.2)) for _ in range(3)))

    def apply(self, image: Image.Image) -> Image.Image:
        """The view of `image`, of its size."""
        left, top, wide, tall = self.box
        out = image.crop((left, top, left + wide, top + tall)).resize(image.size, Image.Resampling.BILINEAR)
        if self.flip:
            out = out.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for enhance, factor in zip(_ENHANCE, self.colours, strict=False):
            out = enhance(out).enhance(factor)
        return out

    def geometry(self, framed: Geometry) -> Geometry:
        """Where the view shows what, `framed` being where the image as it is would."""
        left, top, wide, tall = self.box
        height, width = framed.size
        scale = (framed.scale[0] * height / tall, framed.scale[1] * width / wide)
        offset = (framed.offset[0] + top * scale[0], framed.offset[1] + left * scale[1])
        if self.flip:  # turned before the frame cuts: what is cut off on the left is then of the right
            uncut = framed.scale[1] * width
            offset = (offset[0], left * scale[1] + uncut - framed.seen[1] - framed.offset[1])
        return replace(framed, scale=scale, offset=offset, flip=self.flip)
