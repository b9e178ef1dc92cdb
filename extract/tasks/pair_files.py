"""Files that public data sets of images or videos and their captions come as, as the rows of a table of pairs.

| data set | file | columns | |---|---|---| | Flickr8K, Flickr30K, COCO | Karpathy's `dataset_*.json`: `images` with
`sentences` and a `split` | image, caption, split | | MSR-VTT | `MSRVTT_data.json`: `videos` and `sentences` | video_id,
sentence | | MSVD | a folder with `AllVideoDescriptions.txt` and `train_list.txt`, `val_list.txt`, `test_list.txt` |
video, caption, split |

Nothing is read from pickle files (MSVD's `raw-captions.pkl`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.extract.tasks.base import TaskError
from pipeline.extract.tasks.files import decoded, field_text, file_bytes, file_lines

MSRVTT = ["video_id", "sentence"]
DESCRIPTIONS = "AllVideoDescriptions.txt"
_LISTS = {"train": "train_list.txt", "val": "val_list.txt", "test": "test_list.txt"}


def public_rows(path: Path, text: str) -> list[dict[str, Any]] | None:
    """The rows of a JSON object of a public layout; None for any other text. `TaskError` naming the first entry of such
    a layout that lacks something."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return None  # JSON lines, perhaps
    if not isinstance(whole, dict):
        return None
    images, said = whole.get("images"), whole.get("sentences")
    if isinstance(images, list) and images and isinstance(images[0], dict) and "sentences" in images[0]:
        return [row for n, image in enumerate(images) for row in _entry(f"{path}, images[{n}]", _captioned, image)]
    if isinstance(said, list) and isinstance(whole.get("videos"), list):
        return [row for n, entry in enumerate(said) for row in _entry(f"{path}, sentences[{n}]", _told, entry)]
    return None


def _entry(where: str, rows: Callable[[Any], list[dict[str, Any]]], entry: Any) -> list[dict[str, Any]]:
    try:
        found = rows(entry)
    except KeyError as error:
        raise TaskError(f"{where}: there is no {error.args[0]!r}, which every entry of this layout has") from None
    except (TypeError, AttributeError):
        raise TaskError(f"{where}: it is not what an entry of this layout is") from None
    for number, row in enumerate(found):
        for name, value in row.items():
            if not field_text(value).strip():
                some = f", caption {number + 1}" if len(found) > 1 else ""
                raise TaskError(f"{where}{some}: {name} must be text, not {repr(value)[:80]}")
    return found


def _captioned(image: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"image": _file(image), "caption": s["raw"], "split": image["split"]} for s in image["sentences"]]


def _told(said: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"video_id": said["video_id"], "sentence": said["caption"]}]


def _file(image: dict[str, Any]) -> str:
    """COCO's images lie in a folder a year and part."""
    folder = str(image.get("filepath") or "")
    return f"{folder}/{image['filename']}" if folder else str(image["filename"])


def is_msvd(folder: Path) -> bool:
    """Whether `folder` has MSVD's descriptions and lists."""
    return all((folder / name).is_file() for name in (DESCRIPTIONS, *_LISTS.values()))


def msvd_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of MSVD's files: lines `VIDEO caption`, and a video a line in the list of its split. Raises `TaskError`
    naming a line that is none, or a video that stands in two lists."""
    split: dict[str, str] = {}
    for part, name in _LISTS.items():
        for video in file_lines(folder / name):
            if split.setdefault(video, part) != part:
                raise TaskError(f"{folder / name}: {video} stands in {_LISTS[split[video]]} too")
    rows = []
    told = folder / DESCRIPTIONS
    for number, line in enumerate(decoded(told, file_bytes(told)).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        video, _, caption = line.partition(" ")
        if not caption.strip():
            raise TaskError(f"{told}, line {number}: a video and its caption are expected")
        if video in split:
            rows.append({"video": video, "caption": caption.strip(), "split": split[video]})
    return rows
