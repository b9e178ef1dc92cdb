"""Images: from a file to the pixels a backbone is fed, the same ones every time.

`Preprocess` is the backbone's own (size, crop, interpolation, normalisation). A `Picture` is one file under one
preprocessing and one *view*: view 0 is the plain image, the others are fixed random crops, flips and colour changes
drawn from (seed, view, file). Its key is the xxh3-128 of the file's bytes, the preprocessing and the view. An image is
turned as its EXIF orientation says before anything else is done to it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pipeline.extract.backbones.views import POLICIES, View
from pipeline.extract.geometry import MOST_PIXELS, Geometry
from pipeline.store.errors import UserError

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_PIL_NAMES = {int(v): k for k, v in INTERPOLATIONS.items()}
_SHORT = "short:"
LEFT_OUT = "or leave it out: --skip-bad of `pipeline extract`"  # what to do about a file that cannot be read
FILMS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp")
# EXIF 2.3, tag 0x0112: how the stored pixels are to be turned for a viewer.
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Preprocess:
    """`size`: (height, width) of what the backbone sees, or () to keep each image's own, `fit`ted: its shorter side as
    the first of the two, its longer one at most as the second (() leaves it as it is). With a `size` the short side is
    resized to size / `crop` and the middle cut out; with `crop` 0 the image is stretched to `size`. `mean`, `std`: of
    the three channels, in 0..1."""

    size: tuple[int, ...] = (224, 224)
    crop: float = 1.0
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    fit: tuple[int, ...] = ()

    @classmethod
    def of(cls, folder: Path, config: Any) -> Preprocess:
        """What a checkpoint folder says: timm's `pretrained_cfg`, or `preprocessor_config.json`; else ImageNet's at the
        configuration's own size. Raises UserError for values that make no sense."""
        raw = getattr(config, "pretrained_cfg", None)
        file = folder / "preprocessor_config.json"
        try:
            if raw:
                size = tuple(raw.get("input_size", (3, 224, 224)))[1:]
                found = cls(size, float(raw.get("crop_pct") or 1.0), raw.get("interpolation", "bicubic"))
                return replace(found, mean=tuple(raw.get("mean", cls.mean)), std=tuple(raw.get("std", cls.std)))
            if file.is_file():
                return cls._hugging_face(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{folder}: preprocessing cannot be read: {error}") from None
        side = getattr(config, "image_size", 224)
        return cls((side, side) if isinstance(side, int) else tuple(side))

    @classmethod
    def _hugging_face(cls, raw: dict[str, Any]) -> Preprocess:
        size, crop = raw.get("size", 224), raw.get("crop_size")
        if not raw.get("do_resize", True) and not raw.get("do_center_crop"):
            target: tuple[int, ...] = ()
            share = 1.0
        else:
            short = size if isinstance(size, int) else size.get("shortest_edge")
            final = crop if raw.get("do_center_crop") and crop else size
            edge = final if isinstance(final, int) else final.get("shortest_edge")
            target = (edge, edge) if edge else (final["height"], final["width"])
            share = target[0] / short if raw.get("do_center_crop") and short else 0.0
        name = _PIL_NAMES.get(int(raw.get("resample", 2)), "bilinear")
        normal = raw.get("do_normalize", True)
        mean, std = (tuple(raw.get(k, d)) if normal else n for k, d, n in
                     (("image_mean", cls.mean, (0.0,) * 3), ("image_std", cls.std, (1.0,) * 3)))  # fmt: skip
        return cls(target, share, name, mean, std)

    @property
    def extent_text(self) -> str:
        """`size` as text: "224x224", "own", or "short:800:1333"."""
        fitted = f"{_SHORT}{':'.join(map(str, self.fit))}" if self.fit else "own"
        return "x".join(map(str, self.size)) or fitted

    def sized(self, text: str, whole: bool = False) -> Preprocess:
        """The same at another size as `extent_text` writes it; "" changes nothing. `whole`: the whole image stretched
        to it. Raises UserError otherwise."""
        if whole:
            return replace(self, crop=0.0).sized(text)
        if not text:
            return self
        short = text.startswith(_SHORT)
        parts = text.removeprefix(_SHORT).split(":" if short else "x")
        wrong = not all(p.isdecimal() and int(p) for p in parts) or len(parts) not in ((1, 2) if short else (2,))
        sides = () if wrong else tuple(int(p) for p in parts)
        if (wrong and text != "own") or (short and list(sides) != sorted(sides)):
            raise UserError(
                f"image-size: a number, HEIGHTxWIDTH, own, or short:SIDE or short:SIDE:LONGEST, not {text!r}"
            )
        if short:
            return replace(self, size=(), fit=sides)
        return replace(self, size=sides, fit=())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; without `fit` where there is none, as before there was any."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {k: v for k, v in values.items() if k != "fit" or v}

    @cached_property
    def digest(self) -> str:
        """xxh3-128 over every field."""
        return xxhash.xxh3_128_hexdigest(json.dumps(self.to_dict(), sort_keys=True).encode())

    def extent(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) that an image of this size has after preprocessing."""
        if self.size:
            return self.size[0], self.size[1]
        if not self.fit:
            return height, width
        scale = self.fit[0] / min(height, width)
        if len(self.fit) > 1:
            scale = min(scale, self.fit[1] / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    def frame(self, image: Image.Image) -> Image.Image:
        """The image at its final extent."""
        height, width = self.extent(*image.size)
        how = INTERPOLATIONS[self.interpolation]
        if not self.size:
            return image.resize((width, height), how) if self.fit else image
        if not self.crop:
            return image.resize((width, height), how)
        tall, wide = self._resized(*image.size)
        if (wide, tall) != image.size:
            image = image.resize((wide, tall), how)
        left, top = (wide - width) // 2, (tall - height) // 2
        return image.crop((left, top, left + width, top + height))

    def geometry(self, width: int, height: int) -> Geometry:
        """Where `frame` puts what of an image of this size."""
        tall, wide = self.extent(width, height)
        if not self.size or not self.crop:
            return Geometry((height, width), (tall, wide), (tall, wide), (tall / height, wide / width))
        high, broad = self._resized(width, height)
        cut = (float((high - tall) // 2), float((broad - wide) // 2))
        return Geometry((height, width), (tall, wide), (tall, wide), (high / height, broad / width), cut)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) before the middle is cut out."""
        scale = max(self.size[0] / height, self.size[1] / width) / self.crop
        return max(self.size[0], round(height * scale)), max(self.size[1], round(width * scale))

    def pixels(self, image: Image.Image) -> Tensor:
        """(3, height, width) float32, normalised."""
        values = torch.from_numpy(np.asarray(image, np.uint8).copy()).permute(2, 0, 1).float().div_(255)
        return (values - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


@dataclass(frozen=True)
class Picture:
    """One file under one preprocessing and one view. `extent`: (height, width) of what the backbone sees; `size`: of
    the file's image, upright. `stride`: extents are filled up with zeros, the mean colour, to multiples of it.
    `augment`: how views but the plain one are made, of `POLICIES`."""

    path: Path
    preprocess: Preprocess
    view: int
    seed: int
    key: str
    extent: tuple[int, int]
    upright: bool = True
    size: tuple[int, int] = (0, 0)
    stride: int = 1
    augment: str = "random"

    def pixels(self) -> Tensor:
        """(3, height, width) float32. Raises UserError for a file that cannot be read any more."""
        image = self.image()
        if self.view:
            image = self._view(image.size).apply(image)
        shown = self.preprocess.pixels(self.preprocess.frame(image))
        if self.stride == 1:
            return shown
        out = shown.new_zeros(3, *self.extent)
        out[:, : shown.shape[1], : shown.shape[2]] = shown
        return out

    def image(self) -> Image.Image:
        """What the file shows, in RGB."""
        return open_image(self.path, self.upright)

    def _view(self, size: tuple[int, int]) -> View:
        if self.augment == "flip":
            return View.mirror(size)
        return View.draw(size, np.random.default_rng(int(self.key[:16], 16)))

    def geometry(self) -> Geometry:
        """What of the image stands where in `pixels`."""
        height, width = self.size
        found = replace(self.preprocess.geometry(width, height), extent=self.extent)
        return self._view((width, height)).geometry(found) if self.view else found


@dataclass(frozen=True)
class Blank:
    """An image of nothing, for counting and timing what a backbone does with one of this (height, width)."""

    extent: tuple[int, int]

    def pixels(self) -> Tensor:
        """(3, height, width) zeros that take no memory."""
        return torch.zeros(()).expand(3, *self.extent)


def header_extent(path: Path, upright: bool = True) -> tuple[int, int]:
    """(width, height) of an image by its header alone, `upright` as `open_image` turns it. Raises UserError for a file
    that has none."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = upright and image.getexif().get(ORIENTATION, 1) >= 5
            return (height, width) if turned else (width, height)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: no image that can be read ({_short(error)})") from None


def open_image(path: Path, upright: bool = True) -> Image.Image:
    """An RGB image, decoded whole; `upright`: turned as its EXIF orientation says. Raises UserError naming the file
    that is absent, damaged, not RGB, or of more than `MOST_PIXELS`, which is not decoded."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path}: not a regular file; replace it, {LEFT_OUT}")
    try:
        with Image.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            if image.mode != "RGB":
                raise UserError(f"{path}: not an RGB image but {image.mode}; convert it, {LEFT_OUT}")
            turn = TURNS.get(image.getexif().get(ORIENTATION, 1)) if upright else None
            return image.copy() if turn is None else image.transpose(turn)
    except Image.DecompressionBombError:
        most = f"more than {MOST_PIXELS:,} pixels"
        raise UserError(f"{path}: {most}; make it smaller, {LEFT_OUT}") from None
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        why = f"damaged image ({_short(error)}); repair it"
        if isinstance(error, FileNotFoundError):
            why = "no such file; add it, name its folder by --data"
        elif is_film(path):
            why = "a video, not an image; of one slot of several backbones, --frames N reads it"
        raise UserError(f"{path}: {why}, {LEFT_OUT}") from None


def is_film(path: Path) -> bool:
    """Whether it is a video's file, by its name."""
    return path.suffix.lower() in FILMS and path.is_file()


def filled_up(extent: Sequence[int] | np.ndarray, stride: int) -> np.ndarray:
    """Extents in pixels, (…, 2) or (2,), as the least multiples of `stride` that hold them."""
    return -(-np.asarray(extent, np.int64) // stride) * stride


def look(
    path: Path,
    preprocess: Preprocess,
    view: int,
    seed: int,
    upright: bool = True,
    stride: int = 1,
    augment: str = "random",
) -> Picture | UserError:
    """The image at `path`, decoded once to be sure that it can be; or what is wrong with it."""
    try:
        image = open_image(path, upright)
    except UserError as error:
        return error
    drawn = f"{POLICIES[augment]}, seed {seed}" if augment == "random" else POLICIES[augment]
    what = f"{preprocess.digest}:view {view}" + (f" of {drawn}" if view else "")
    h = xxhash.xxh3_128(path.read_bytes())
    h.update(what.encode())
    height, width = filled_up(preprocess.extent(*image.size), stride).tolist()
    size = (image.height, image.width)
    return Picture(path, preprocess, view, seed, h.hexdigest(), (height, width), upright, size, stride, augment)


def look_all(
    paths: Sequence[Path],
    preprocess: Preprocess,
    views: Sequence[int],
    seed: int,
    upright: bool = True,
    stride: int = 1,
    augment: str = "random",
) -> list[Any]:
    """`look` at many, on a few threads, in order; at one that is named more than once, such as an image with several
    captions, once."""
    asked = list(zip(paths, views, strict=True))
    distinct = list(dict.fromkeys(asked))
    with warnings.catch_warnings(), ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such images are refused by name
        found = pool.map(lambda p: look(p[0], preprocess, p[1], seed, upright, stride, augment), distinct)
        seen = dict(zip(distinct, found, strict=True))
    return [seen[one] for one in asked]


def load_pixels(pictures: Sequence[Picture | Blank]) -> list[Tensor]:
    """Pixels of many, on a few threads, in order."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda picture: picture.pixels(), pictures))


def _short(error: BaseException) -> str:
    return str(error).split("\n")[0].replace(str(getattr(error, "filename", "") or ""), "")[:80] or type(error).__name__
