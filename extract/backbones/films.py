"""Frames of video files, decoded by PyAV (the extra `video`): a few, evenly spread, each an image like any other.

FFmpeg, on which PyAV stands, steps over damage where it can: frames are missing or half made up, and all that it does
is to mark a frame or to log a line. Either refuses the file here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
MOST_OPEN = 8  # videos of which some frames wait to be asked for


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
        """It is decoded when the first of its video's frames is asked for; then the others wait for who asks."""
        about = self.path.stat()
        key = (self.path, about.st_size, about.st_mtime_ns, self.most)
        with _OPENING:
            film = _open.setdefault(key, _Film(Lock(), {}))
            while len(_open) > MOST_OPEN:  # of those who were interrupted
                del _open[next(iter(_open))]
        with film.lock:
            if self.place not in film.waiting:
                film.waiting = dict(enumerate(decoded(self.path, self.most)))
            if self.place not in film.waiting:
                raise UserError(f"{self.path}: it has fewer frames than when it was looked at; leave it as it is")
            image = film.waiting.pop(self.place)
            if not film.waiting:
                _open.pop(key, None)
        return image


@dataclass
class _Film:
    """The frames of a video that were decoded and not asked for yet."""

    lock: Lock
    waiting: dict[int, Image.Image]


_OPENING, _open = Lock(), dict[tuple[Path, int, int, int], _Film]()


def film_frames(path: Path, preprocess: Preprocess, most: int) -> list[FilmFrame]:
    """The frames that are shown of a video's file, `spread`. UserError for one that cannot be decoded to its end."""
    content, found = digest_file(path), []
    for place, image in enumerate(decoded(path, most)):
        key = xxhash.xxh3_128(f"{content}:{preprocess.digest}:frame {place} of {most}".encode())
        size, extent = (image.height, image.width), preprocess.extent(*image.size)
        found.append(FilmFrame(path, preprocess, 0, 0, key.hexdigest(), extent, size=size, place=place, most=most))
    return found


def decoded(path: Path, most: int) -> list[Image.Image]:
    """The frames themselves, as RGB images; all frames are decoded, once where each is a packet of the file. UserError
    where something is damaged or missing, with the second where it is."""
    try:
        import av
    except ImportError:
        raise UserError(
            f"{path}: video files need PyAV: pip install 'activation-pipeline[video]'; or make a folder of frames of it"
        ) from None
    try:
        count = _packets(path)
        found, frames = _shown(path, spread(count, most))
        if frames != count:  # some packets show nothing, or several frames
            found, _ = _shown(path, spread(frames, most))
    except av.FFmpegError as error:
        raise _damaged(path, str(error)[:80]) from None
    if not found:
        raise UserError(f"{path}: there are no frames in this file; replace it, {LEFT_OUT}")
    return found


def _packets(path: Path) -> int:
    """How many packets of pictures there are; nothing is decoded. UserError for a file that ends long before it says
    that it does: of some containers reading on for what was cut off is no error."""
    with _opened(path) as (film, _):
        if not film.streams.video:
            raise UserError(f"{path}: there are no pictures in this file; replace it, {LEFT_OUT}")
        if film.streams.video[0].codec_context is None:
            raise UserError(f"{path}: its pictures are of a codec that PyAV cannot decode; convert it, {LEFT_OUT}")
        shown, count, end = film.streams.video[0].index, 0, 0.0
        for packet in film.demux():
            count += packet.stream.index == shown and packet.size > 0
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        said = _stated(film)
        if end < NEARLY * said:
            raise UserError(f"{path}: the file ends after {end:.1f} of {said:.1f} seconds; copy it again, {LEFT_OUT}")
        return count


def _stated(film: Any) -> float:
    """How many seconds the head of the file says there are; 0 where it does not, or FFmpeg tells what it found."""
    stream = film.streams.video[0]
    if film.format.name == "avi":
        return float(stream.frames / stream.average_rate) if stream.average_rate else 0.0
    return (film.duration or 0) / 1e6 if film.format.name.startswith(("matroska", "flv", "mov")) else 0.0


def _shown(path: Path, places: np.ndarray) -> tuple[list[Image.Image], int]:
    """The frames of the numbers `places`, and how many there are in all."""
    found, count, wanted = [], 0, set(places.tolist())
    with _opened(path) as (film, check):
        check()
        for packet in film.demux(video=0):
            for frame in packet.decode():
                if count in wanted:
                    found.append(_image(path, frame))
                count += 1
                check(packet, frame.is_corrupt)
            check(packet)
    return found, count


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Callable[..., None]]]:
    """A video's file, and what refuses it where a packet or what has been logged until now tells of damage."""
    import av

    with _LOG.heard() as lines, av.open(str(path)) as film:
        names = {film.format.name}
        codec = film.streams.video[0].codec_context if film.streams.video else None
        if codec is not None:
            codec.thread_count = 1  # what it says is heard in this thread alone
            names |= {codec.name, codec.codec.name}

        def check(packet: Any = None, corrupt: bool = False) -> None:
            told = next(
                (text.strip() for level, name, text in lines if level <= av.logging.ERROR and name in names), ""
            )
            if corrupt or told or (packet is not None and packet.is_corrupt):
                raise _damaged(path, told[:80] or "a frame is not whole", packet)

        yield film, check


def _damaged(path: Path, why: str, packet: Any = None) -> UserError:
    at = next((t for t in (packet.pts, packet.dts) if t is not None), None) if packet is not None else None
    where = "" if at is None else f" at {float(at * packet.time_base):.1f} seconds"
    return UserError(f"{path}: damaged video{where} ({why}); repair it, {LEFT_OUT}")


class _Log:
    """What FFmpeg logs, to whoever asks; PyAV's settings are as they were when nobody does."""

    def __init__(self) -> None:
        self._lock, self._hearing = Lock(), 0
        self._before: tuple[int | None, bool] = (None, True)

    @contextmanager
    def heard(self) -> Iterator[list[tuple[int, str, str]]]:
        """Level, who says it, and what, of this thread."""
        from av import logging

        with self._lock:
            if not self._hearing:
                self._before = (logging.get_level(), logging.get_skip_repeated())
                logging.set_level(logging.ERROR)
                logging.set_skip_repeated(False)  # the same of another file is another's
            self._hearing += 1
        try:
            with logging.Capture() as lines:
                yield lines
        finally:
            with self._lock:
                self._hearing -= 1
                if not self._hearing:
                    logging.set_level(self._before[0])
                    logging.set_skip_repeated(self._before[1])


_LOG = _Log()


def _image(path: Path, frame: Any) -> Image.Image:
    if frame.width * frame.height > MOST_PIXELS:
        raise UserError(f"{path}: frames of more than {MOST_PIXELS:,} pixels; make them smaller, {LEFT_OUT}")
    image: Image.Image = frame.to_image()
    # A telephone held upright writes its frames lying, and beside them by how far a player is to turn them.
    return image.convert("RGB").rotate(90 * round(frame.rotation / 90), expand=True)
