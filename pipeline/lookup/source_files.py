"""The data that a recipe names, where it is on this machine: stored rows must have been made of it.

What a teammate does not have is not compared. Whoever names a file or folder has it read, and images byte for byte:
training on a folder of images costs one reading of it, naming the stored task instead costs none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.extract.tasks import TaskError, is_named
from pipeline.extract.tasks.base import Task
from pipeline.extract.tasks.coco import image_names, is_coco
from pipeline.extract.tasks.hub_images import PREFIX
from pipeline.extract.tasks.images import contents, image_files
from pipeline.extract.tasks.registry import is_folder, is_table, table_path
from pipeline.extract.tasks.sheet import read_sheet, sheet_digest
from pipeline.lookup.task import open_task, picture_root
from pipeline.recipe import Recipe


class AtHand:
    """What is here of the files of `recipe`. `images`: the texts of its rows are names of images."""

    def __init__(self, recipe: Recipe, images: bool) -> None:
        self.recipe, self.images = recipe, images
        self._contents: dict[tuple[str, ...], str] = {}

    def __bool__(self) -> bool:
        return "train" in self.files or self.task is not None

    @cached_property
    def files(self) -> dict[str, tuple[Path, str]]:
        """Of a table of the user's own: split → (file, its digest). One that is asked for by name or id is without the
        file of its training rows."""
        recipe = self.recipe
        paths = {split: Path(p) for split, p in self._beside.items()}
        if is_table(recipe.task):
            paths["train"] = table_path(recipe.task, Path(recipe.data) if recipe.data else None)
        return {split: (p, sheet_digest(p)) for split, p in paths.items() if p.is_file()}

    @property
    def _beside(self) -> dict[str, str]:
        """The files that are named beside the task's own, here or not."""
        return {split: path for split in ("validation", "test") if (path := getattr(self.recipe, split))}

    @cached_property
    def task(self) -> Task | None:
        """A named task below --data, or a folder of images, with its rows. Raises TaskError for damaged files, and
        for options that are for a table."""
        recipe = self.recipe
        if is_folder(recipe.task):
            try:
                return open_task(recipe)
            except TaskError:
                if image_files(Path(recipe.task)):
                    raise
                return None  # a folder that happens to be called as a stored task is
        if recipe.task.startswith(PREFIX):
            return open_task(recipe) if Path(picture_root(recipe)).is_dir() else None
        return open_task(recipe) if is_named(recipe.task) and recipe.data and Path(recipe.data).is_dir() else None

    def differs(self, header: Mapping[str, Any], names: Callable[[], tuple[str, ...]] = tuple) -> str:
        """In what the table with `header` was not made of the data at hand, "" where it was. What the header does not
        say fits. `names`: those of the stored rows' images, where files that were read then are not named now."""
        made: Any = header.get("provenance")
        if not isinstance(made, dict):
            return ""
        when = f"extracted on {str(header.get('created'))[:10]}"
        files: Any = made.get("files")
        for split, given in self._beside.items():
            if not isinstance(files, dict) or split not in files:
                return f"it was {when} without --{split}, now --{split} {given}"
        for split, (path, digest) in self.files.items() if isinstance(files, dict) else ():
            if files.get(split) != digest:
                return f"{path} is not the file that was {when}, or has changed"
        if self.dataset is not None and "hub" in made and made.get("revision") != self._revision(header, made):
            return f"{self.dataset} does not hold what was {when}, or has changed"
        where = self.recipe.data or self.recipe.task
        revision = made.get("revision")
        if self.task is not None and revision is not None and revision != self.task.provenance.get("revision"):
            return f"{where} does not hold what was {when}, or has changed"
        if self.task is not None and (other := _called_otherwise(header["spec"], self.task.spec.to_dict())):
            return f"class {other!r}, as it was {when}, is called otherwise in {where} now"
        held = made.get("contents")
        if self.images and held is not None and held != self._held(header, held, names):
            return f"images of {self.recipe.task} are not those that were {when}, or have changed"
        return ""

    def _names(self, path: Path, header: Mapping[str, Any]) -> list[str]:
        """The names of images in a file."""
        if is_coco(path):
            return image_names(path, Path(picture_root(self.recipe)))
        return [str(name) for name in read_sheet(path, _names_of(header)).column(header["spec"]["fields"][0])]

    @property
    def dataset(self) -> Path | None:
        """The folder of a dataset of texts, where that is here."""
        folder = Path(self.recipe.task.removeprefix(PREFIX))
        own = self.recipe.task.startswith(PREFIX) and folder.is_dir() and not Path(picture_root(self.recipe)).is_dir()
        return folder if own else None

    def _revision(self, header: Mapping[str, Any], made: Mapping[str, Any]) -> str:
        """Of the dataset's rows, read as the stored ones were."""
        fields = [*header["spec"]["fields"], None][:2]
        how: dict[str, Any] = {
            "label": made.get("label"),
            "separator": made.get("separator"),
            "stratify": made.get("stratified"),
        }
        try:
            task = open_task(replace(self.recipe, text=fields[0], text_pair=fields[1], **how))
        except TaskError:
            return ""
        return str(task.provenance.get("revision"))

    def _held(self, header: Mapping[str, Any], unknown: str, stored: Callable[[], tuple[str, ...]]) -> str:
        """What the images at hand hold; `unknown` where there are none."""
        if self.task is not None:
            names = tuple(t[0] for rows in self.task.splits.values() for t in rows.texts)
        elif self.files and set(self.files) == set(header["provenance"].get("files") or ()):
            names = tuple(n for path, _ in self.files.values() for n in self._names(path, header))
        else:
            names = stored() if self.files else ()
        root = Path(picture_root(self.recipe))
        if not any((root / name).exists() for name in names):
            return unknown
        if names not in self._contents:
            self._contents[names] = contents(root, names)
        return self._contents[names]


def _called_otherwise(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first class of masks that had another name `then`, "" where the numbers of classes are others too: ADE20K's
    names are no part of its revision."""
    if then.get("target") != "mask" or then.get("values") != now.get("values"):
        return ""
    pairs = zip(then.get("labels") or (), now["labels"], strict=False)
    return next((old for old, new in pairs if old != new), "")


def _names_of(header: Mapping[str, Any]) -> list[str] | None:
    """What the columns of a table's files are called that have no header; None for others."""
    return list(header["provenance"].get("columns") or ()) or None
