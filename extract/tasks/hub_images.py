"""A Hugging Face dataset of labelled images as a task: written out once as a folder of images, a subfolder a class.

The bytes are the dataset's own. A folder is complete when it holds `.source.json`, which says what it was written from;
it is used again without the hub. Splits called train, validation (val, valid, dev) and test are taken; where there is
no other than train, its rows are split as any folder's are.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

from pipeline.extract.tasks.base import Task, TaskError
from pipeline.extract.tasks.hub import fetch
from pipeline.extract.tasks.images import load_folder
from pipeline.extract.tasks.names import table_name
from pipeline.store.files.places import cache_folder

PREFIX = "hub:"
MARK = ".source.json"


def hub_name(task: str) -> str:
    """The task's name: the last part of the dataset's. "hub:uoft-cs/cifar10" is cifar10."""
    return table_name(task.removeprefix(PREFIX).rstrip("/").rpartition("/")[2])


def hub_folder(task: str, data: str | Path | None) -> Path:
    """Where the images of `task` are written: `data`, else a folder of the user's cache."""
    return Path(data) if data else cache_folder() / "pictures" / hub_name(task)


def has_images(task: str, data: str | Path | None) -> bool:
    """Whether `hub:DATASET` is of images: its files lie there as such, or it has a column of them. `TaskError` where it
    cannot be fetched."""
    if (hub_folder(task, data) / MARK).is_file():
        return True
    import datasets

    return any(isinstance(f, datasets.Image) for f in fetch(task.removeprefix(PREFIX))["train"].features.values())


def load_hub_images(task: str, data: Path | None) -> Task:
    """The task of `hub:DATASET`, a name on the hub or the path of a dataset's files.

    Raises `TaskError` where it cannot be fetched, has no image or no class labels, or where `data` holds something
    else.
    """
    folder, source = hub_folder(task, data), {"dataset": task.removeprefix(PREFIX)}
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARK).is_file() or json.loads((folder / MARK).read_text(encoding="utf-8")) != source:
            raise TaskError(f"{folder} holds something else than the images of {task}; give another --data FOLDER")
    else:
        _write(source["dataset"], folder)
        (folder / MARK).write_text(json.dumps(source), encoding="utf-8")
    return load_folder(folder, hub_name(task))


def _write(dataset: str, folder: Path) -> None:
    import datasets

    splits = fetch(dataset)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for split, rows in splits.items():
        features: dict[str, Any] = rows.features
        image = next((n for n, f in features.items() if isinstance(f, datasets.Image)), None)
        label = next((n for n, f in features.items() if isinstance(f, datasets.ClassLabel)), None)
        if image is None or label is None:
            raise TaskError(f"{dataset}: a column of images and one of class labels are needed, not {list(features)}")
        names = [name.replace("/", "_").strip(". ") or str(i) for i, name in enumerate(features[label].names)]
        if len(set(names)) < len(names):
            raise TaskError(f"{dataset}: class names are not distinct as names of folders")
        home = part / split if len(splits) > 1 else part
        for i, row in enumerate(rows.cast_column(image, datasets.Image(decode=False))):
            if row[label] is None or row[label] < 0:  # unlabelled
                continue
            raw = row[image]["bytes"] or Path(row[image]["path"]).read_bytes()
            place = home / names[row[label]] / f"{i:07d}.{_suffix(raw, f'{dataset}: {split} row {i}')}"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(raw)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        folder.rmdir()
    part.rename(folder)


def _suffix(raw: bytes, where: str) -> str:
    from PIL import Image, UnidentifiedImageError

    try:
        kind = (Image.open(io.BytesIO(raw)).format or "").lower()
    except UnidentifiedImageError:
        raise TaskError(f"{where} is not an image") from None
    return "jpg" if kind == "jpeg" else kind
