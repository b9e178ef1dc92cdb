"""A folder of images as a task: one subfolder a class.

    FOLDER/CLASS/*.png                                     a tenth of the rows each is held out, as of a table
    FOLDER/train/CLASS/*.png, FOLDER/validation/…, …/test  splits as they are; val, valid and dev mean validation

A table of file names with labels is a task like any other table; its first text column holds the names.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import xxhash

from pipeline.extract.geometry import SUFFIXES as SUFFIXES
from pipeline.extract.tasks.base import SPLITS, Rows, Task, TaskError, TaskSpec, by_split, fixed_order
from pipeline.extract.tasks.names import table_name
from pipeline.extract.tasks.splits import HELD_OUT
from pipeline.store.format.digest import digest_file, digest_json


def image_files(folder: Path) -> list[Path]:
    """Every image below `folder` by its suffix, sorted; hidden ones are left out."""
    found = (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def contents(root: Path, names: Iterable[str]) -> str:
    """Digest of what the files `names` below `root` hold, in whichever order they are named; one that cannot be read
    counts as empty."""

    def digest(name: str) -> tuple[str, str]:
        try:
            if (root / name).is_dir():  # of frames
                return name, contents(root / name, [p.name for p in (root / name).iterdir() if p.is_file()])
            about = (root / name).stat()
            return name, _digest(root / name, about.st_size, about.st_mtime_ns, about.st_ino)
        except OSError:
            return name, ""

    with ThreadPoolExecutor(4) as pool:
        return digest_json(list(pool.map(digest, sorted(set(names)))))


@lru_cache(1 << 16)
def _digest(path: Path, size: int, changed: int, inode: int) -> str:
    """Of a file's bytes; one that has not changed is read once in a process."""
    return digest_file(path)


def load_folder(folder: Path, name: str | None = None) -> Task:
    """The images of `folder` as a classification task named after it. Rows hold names relative to the folder.

    Raises `TaskError` where there are no class folders, one class only, a test class that training does not have, or
    too few images to hold any out.
    """
    subfolders = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    parts = {split: folder / name for split, name in by_split((p.name for p in subfolders), folder).items()}
    if "train" in parts:
        classes = _classes(parts["train"])
        splits = {s: _rows(folder, p, classes) for s, p in parts.items()}
        rule = "folders"
        absent = {s: f"no folder {s} in {folder}" for s in ("validation", "test") if s not in splits}
    else:
        classes = _classes(folder)
        everything = _rows(folder, folder, classes)
        held = max(1, int(len(everything) * HELD_OUT))
        if len(everything) < 3:
            raise TaskError(f"{folder} has {len(everything)} images, too few to hold any out; add some")
        order, rule, absent = fixed_order(len(everything)), "held-out", {}
        places = (("train", order[2 * held :]), ("validation", order[:held]), ("test", order[held : 2 * held]))
        splits = {s: everything.take(of) for s, of in places}
    if rule == "folders":
        # A fair sample at any --limit: class folders would come one after the other.
        splits = {s: rows.take(fixed_order(len(rows))) for s, rows in splits.items()}
    names = [
        (s, *t, str(label)) for s, rows in splits.items() for t, label in zip(rows.texts, rows.labels, strict=True)
    ]
    task = table_name(name or folder.resolve().name)
    targets = tuple(str(i) for i in range(len(classes)))
    spec = TaskSpec(task, "class", classes, ("accuracy",), ("image",), f"{task} image: {{0}}", targets)
    provenance = {
        "dataset": folder.resolve().name,
        "revision": xxhash.xxh3_128_hexdigest(repr(sorted(names)).encode()),
        "licence": "not stated",
        "source": "image folder",
        "splits": rule,
    }
    ordered = {s: splits[s] for s in SPLITS if s in splits}
    return Task(spec, ordered, provenance, absent)


def _classes(folder: Path) -> tuple[str, ...]:
    names = [p.name for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".") and image_files(p)]
    if len(names) < 2:
        raise TaskError(f"{folder}: expected a folder of images for each of at least two classes, found {len(names)}")
    return tuple(names)


def _rows(root: Path, folder: Path, classes: tuple[str, ...]) -> Rows:
    rows = Rows([], [])
    for path in image_files(folder):
        name = path.relative_to(folder).parts[0]
        if name not in classes:
            raise TaskError(f"{path}: no class folder of the training images is called {name!r}")
        rows.texts.append((path.relative_to(root).as_posix(),))
        rows.labels.append(classes.index(name))
    return rows
