"""Videos: a folder of frames, or a file, as one sample, of which a backbone of images sees a few frames, evenly spread.

A video's rows are those of its frames, one frame after the other; `grid.sizes` has the map sizes of each frame. What
works on images works on the frames of a batch of videos: `frames_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash

from pipeline.extract.backbones.films import film_frames, spread
from pipeline.extract.backbones.grids import COLUMN
from pipeline.extract.backbones.images import LEFT_OUT, Picture, Preprocess, is_film, look
from pipeline.extract.batch import Batch, Layout
from pipeline.extract.geometry import SUFFIXES
from pipeline.store.errors import UserError

FRAMES = 12  # of a video, as in CLIP4Clip


@dataclass(frozen=True)
class Video:
    """The frames that are shown of a folder or file, in order. `key`: of their keys."""

    frames: tuple[Picture, ...]

    @cached_property
    def key(self) -> str:
        return xxhash.xxh3_128_hexdigest("".join(frame.key for frame in self.frames).encode() + b":video")


def look_at_videos(
    paths: Sequence[Path], preprocess: Preprocess, most: int, upright: bool = True
) -> list[Video | UserError]:
    """The videos at `paths`, a folder of frames or a file each, each frame decoded once; or what is wrong with one."""
    distinct = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(distinct, pool.map(lambda p: _look(p, preprocess, most, upright), distinct), strict=True))
    return [found[path] for path in paths]


def frames_in(folder: Path) -> list[Path]:
    """The images directly in `folder`, by name: numbers in names count as numbers."""
    found = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
    return sorted(found, key=lambda p: ([int(n) for n in _numbers(p.stem)], p.name))


def _numbers(text: str) -> list[str]:
    return "".join(c if c.isdecimal() else " " for c in text).split()


def _look(path: Path, preprocess: Preprocess, most: int, upright: bool) -> Video | UserError:
    if is_film(path):
        try:
            return Video(tuple(film_frames(path, preprocess, most)))
        except UserError as error:
            return error
    if not path.is_dir():
        what = "no video and no folder of frames" if path.exists() else "no such folder of frames, and no such file"
        return UserError(f"{path}: {what}; make one image a frame (one a second, say), {LEFT_OUT}")
    frames = frames_in(path)
    if not frames:
        return UserError(f"{path}: there are no frames in this folder; add images, {LEFT_OUT}")
    seen = [look(frames[i], preprocess, 0, 0, upright) for i in spread(len(frames), most)]
    wrong = next((frame for frame in seen if isinstance(frame, UserError)), None)
    return wrong or Video(tuple(frame for frame in seen if isinstance(frame, Picture)))


@dataclass(frozen=True)
class Frames:
    """The frames of a batch of videos. `batch`: each a sample of its own, the rows being the same; `layout`: which
    frames are whose."""

    batch: Batch
    layout: Layout


def frames_of(batch: Batch, streams: int) -> Frames | None:
    """The frames of the videos in `batch`, of a backbone with so many streams; None where its samples are images."""
    grid = batch.lengths.get("grid")
    if not streams or grid is None or bool((grid == 2 * streams).all()):
        return None

    def make(of: Batch) -> Frames:
        counts = np.asarray(of.lengths["grid"], np.int64) // (2 * streams)
        maps = of.columns[COLUMN].cpu().numpy().reshape(-1, streams, 2).prod(2)
        lengths = {"grid": np.full(len(maps), 2 * streams, np.int64)}
        for stream in (name for name in of.lengths if name != "grid"):
            own = maps[:, place_of(stream)]
            lengths[stream] = own + (int(of.lengths[stream].sum()) - int(own.sum())) // max(1, len(own))
        pictures = None if of.pictures is None else [frame for video in of.pictures for frame in video.frames]
        return Frames(Batch(of.states, of.columns, lengths, pictures=pictures), Layout.of(counts, of.device))

    return batch.derive(f"frames of {streams}", make)


def place_of(stream: str) -> int:
    """Which of a sample's maps are those of `stream`: `stageN` is the Nth; of a single stream the only one."""
    number = stream.removeprefix("stage")
    return int(number) - 1 if number.isdigit() else 0
