"""Frames of video files, decoded by PyAV (the extra `video`): a few, evenly spread, each an image like any other."""

from __future__ import annotations

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
from pipeline.store.format.digest import digest_file

NEARLY = 0.9  # of the length that a file states: less was cut off
_ONE_BY_ONE = Lock()  # the frames of a video are asked for at once: it is decoded by one thread for all


def spread(count: int, most: int) -> np.ndarray:
    """Which of `count` frames are shown: all where there are no more than `most`, else so many, the first and the last
    among them (as CLIP4Clip takes them)."""
    return np.arange(count) if count <= most else np.linspace(0, count - 1, most, dtype=np.int64)


@dataclass(frozen=True)
class FilmFrame(Picture):
    """The frame `place` of those that are shown, `most`, of a video's file."""

    place: int = 0
    most: int = 0

    def image(self) -> Image.Image:
        about = self.path.stat()
        with _ONE_BY_ONE:
            return _kept(self.path, self.most, about.st_size, about.st_mtime_ns)[self.place]


def film_frames(path: Path, preprocess: Preprocess, most: int) -> list[FilmFrame]:
    """The frames that are shown of a video's file, `spread`. UserError for one that cannot be decoded to its end."""
    content, found = digest_file(path), []
    for place, image in enumerate(decoded(path, most)):
        key = xxhash.xxh3_128(f"{content}:{preprocess.digest}:frame {place} of {most}".encode())
        size, extent = (image.height, image.width), preprocess.extent(*image.size)
        found.append(FilmFrame(path, preprocess, 0, 0, key.hexdigest(), extent, size=size, place=place, most=most))
    return found


def decoded(path: Path, most: int) -> list[Image.Image]:
    """The frames themselves, as RGB images; all are decoded, for no container can be trusted to know how many it
    holds."""
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
            count = _whole(path, film)
        shown = set(spread(count, most).tolist())
        with av.open(str(path)) as film:
            found = [_image(path, frame) for i, frame in enumerate(film.decode(video=0)) if i in shown]
    except av.FFmpegError as error:
        raise UserError(f"{path}: damaged video ({str(error)[:80]}); repair it, {LEFT_OUT}") from None
    if not found:
        raise UserError(f"{path}: there are no frames in this file; replace it, {LEFT_OUT}")
    return found


def _whole(path: Path, film: Any) -> int:
    """How many frames there are. UserError for a file that ends long before it says that it does: of Matroska (WebM
    too) reading on for what was cut off is no error."""
    shown, count, end = film.streams.video[0].index, 0, 0.0
    for packet in film.demux():
        if packet.stream.index == shown:
            count += len(packet.decode())
        if packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    said = (film.duration or 0) / 1e6 if "matroska" in film.format.name else 0.0
    if end < NEARLY * said:
        raise UserError(f"{path}: the file ends after {end:.1f} of {said:.1f} seconds; copy it again, {LEFT_OUT}")
    return count


def _image(path: Path, frame: Any) -> Image.Image:
    if frame.is_corrupt:
        raise UserError(f"{path}: damaged video (a frame is not whole); repair it, {LEFT_OUT}")
    if frame.width * frame.height > MOST_PIXELS:
        raise UserError(f"{path}: frames of more than {MOST_PIXELS:,} pixels; make them smaller, {LEFT_OUT}")
    image: Image.Image = frame.to_image()
    # A telephone held upright writes its frames lying, and beside them by how far a player is to turn them.
    return image.convert("RGB").rotate(90 * round(frame.rotation / 90), expand=True)


@lru_cache(2)
def _kept(path: Path, most: int, size: int, changed: int) -> list[Image.Image]:
    """Of a file that has not changed, while its frames are asked for one by one."""
    return decoded(path, most)
