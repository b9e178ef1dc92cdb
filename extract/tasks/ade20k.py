"""ADE20K as its scene parsing benchmark of 2016 hands it out: 150 classes numbered from 1, 0 for none of them.

ADEChallengeData2016/images/{training,validation}/*.jpg  annotations/{training,validation}/*.png  objectInfo150.txt
"""

from __future__ import annotations

from pathlib import Path

from pipeline.extract.tasks.base import TaskError

TABLE = "objectInfo150.txt"  # a line a class: number, shares and counts, names; tabs between, a header first
COUNT = 150


def is_ade20k(folder: Path) -> bool:
    """Whether the file that says what the numbers are is there."""
    return (folder / TABLE).is_file()


def ade20k_classes(folder: Path) -> list[str]:
    """The first name of each class, in the order of their numbers from 1. Raises `TaskError` for a file that does not
    number 150 classes."""
    lines = (folder / TABLE).read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    cells = [line.split("\t") for line in lines if line.strip()]
    names = [row[-1].split(",")[0].strip() for row in cells]
    if [row[0].strip() for row in cells] != [str(i) for i in range(1, COUNT + 1)] or not all(names):
        raise TaskError(f"{folder / TABLE}: {COUNT} lines were expected after the first, numbered 1 to {COUNT}")
    # Some names are of two classes (screen): the number tells them apart.
    return [name if names.count(name) == 1 else f"{name} {i}" for i, name in enumerate(names, start=1)]
