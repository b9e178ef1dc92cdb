"""Frames of video files, decoded by PyAV (the extra `video`): a few, evenly spread, each an image like any other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import xxhash
from PIL import Image

from pipeline.extract.backbones.images import LEFT_OUT, MOST_PIXELS, Picture, Preprocess
from pipeline.store.errors import UserError

SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp")
_ONE_BY_ONE = Lock()  # the frames of a video are asked for at once: it is decoded by one thread for all


def spread(count: int, most: int) -> np.ndarray:
    """Which of `count` frames are shown: all where there are no more than `most`, else so many, the first and the last
    among them (as CLIP4Clip takes them)."""
    return np.arange(count) if count <= most else np.linspace(0, count - 1, most, dtype=np.int64)


@dataclass(frozen=True)
class FilmFrame(Picture):
    """The frame `place` of those of a video's file that are shown, whose numbers are `shown`."""

    place: int = 0
    shown: tuple[int, ...] = ()

    def image(self) -> Image.Image:
        about = self.path.stat()
        with _ONE_BY_ONE:
            return _kept(self.path, self.shown, about.st_size, about.st_mtime_ns)[self.place]


def is_film(path: Path) -> bool:
    """Whether it is a video's file, by its name."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def film_frames(path: Path, preprocess: Preprocess, most: int) -> list[FilmFrame]:
    """The frames that are shown of a video's file, `spread`. UserError for one that cannot be decoded to its end. All
    are decoded, for no container can be trusted to know how many it holds."""
    content = xxhash.xxh3_128()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            content.update(part)
    sizes = [(frame.width, frame.height) for frame in _frames(path)]
    if not sizes:
        raise UserError(f"{path}: there are no frames in this file; replace it, {LEFT_OUT}")
    if any(width * height > MOST_PIXELS for width, height in sizes):
        raise UserError(f"{path}: frames of more than {MOST_PIXELS:,} pixels; make them smaller, {LEFT_OUT}")
    shown, found = tuple(spread(len(sizes), most).tolist()), []
    for place, number in enumerate(shown):
        key = xxhash.xxh3_128(f"{content.hexdigest()}:{preprocess.digest}:frame {place} of {most}".encode())
        (width, height), extent = sizes[number], preprocess.extent(*sizes[number])
        frame = FilmFrame(
            path, preprocess, 0, 0, key.hexdigest(), extent, size=(height, width), place=place, shown=shown
        )
        found.append(frame)
    return found


def _frames(path: Path) -> Iterator[Any]:
    """PyAV's frames of a video's file, in order."""
    try:
        import av
    except ImportError:
        raise UserError(
            f"{path}: video files need PyAV: pip install 'activation-pipeline[video]'; or make a folder of frames of it"
        ) from None
    try:
        with av.open(str(path)) as film:
            if not film.streams.video:
                raise UserError(f"{path}: there are no pictures in this file; replace it, {LEFT_OUT}")
            yield from film.decode(video=0)
    except av.FFmpegError as error:
        raise UserError(f"{path}: damaged video ({str(error)[:80]}); repair it, {LEFT_OUT}") from None


@lru_cache(2)
def _kept(path: Path, shown: tuple[int, ...], size: int, changed: int) -> list[Image.Image]:
    """The frames `shown` in RGB, of a file that has not changed, while they are asked for one by one."""
    found = [frame.to_image().convert("RGB") for number, frame in enumerate(_frames(path)) if number in shown]
    if len(found) < len(shown):
        raise UserError(f"{path}: the file has fewer frames than when it was looked at; extract again")
    return found
