"""Finds a task by name: a GLUE task, or the file of a table. A new task family is one `register_task` call."""

from __future__ import annotations

import difflib
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from pipeline.extract.plugins import load_installed
from pipeline.extract.tasks.base import Task, TaskError
from pipeline.extract.tasks.captions import Paired, load_msvd
from pipeline.extract.tasks.coco import is_coco, load_coco
from pipeline.extract.tasks.completion import load_hub_texts
from pipeline.extract.tasks.glue import GLUE, USUAL_GRID, load_glue, refuse_step
from pipeline.extract.tasks.hub_images import PREFIX, has_images, hub_name, load_hub_images
from pipeline.extract.tasks.hub_table import load_hub_table
from pipeline.extract.tasks.images import load_folder
from pipeline.extract.tasks.masks import load_masks, mask_pairs
from pipeline.extract.tasks.names import table_name
from pipeline.extract.tasks.pair_files import is_msvd
from pipeline.extract.tasks.sheet import SUFFIXES
from pipeline.extract.tasks.table import load_table
from pipeline.extract.tasks.voc import is_voc, load_voc
from pipeline.store.format.digest import digest_json

Loader = Callable[[Path | None, float], Task]

_ID = re.compile(r"(.+)@([0-9a-f]{6,32})")
_TASKS: dict[str, tuple[str, Loader]] = {}


def register_task(name: str, about: str, load: Loader) -> None:
    """Adds a named task. `load(data, grid)`: `data` is the folder given with --data, or None for the public source."""
    if name in _TASKS or Path(name).suffix in SUFFIXES:
        raise ValueError(f"task name {name!r} is taken or looks like a file")
    _TASKS[name] = (about, load)


for _task in GLUE.values():
    register_task(_task.name, _task.about, partial(load_glue, _task.name))


def task_names() -> list[tuple[str, str]]:
    """(name, one-line description) of every named task. Any table is a task too, by its path."""
    return [(name, about) for name, (about, _) in _TASKS.items()]


def load_task(
    name: str,
    data: Path | None = None,
    *,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    separator: str | None = None,
    targets: Sequence[str] = (),
    validation: Path | None = None,
    test: Path | None = None,
    stratify: bool = False,
    metrics: Sequence[str] = (),
    task_name: str | None = None,
    columns: Sequence[str] = (),
    grid: float = USUAL_GRID,
    continues: bool = False,
    void: int | None = None,
    skip_bad: bool = False,
    paired: Paired | None = None,
) -> Task:
    """The task called `name`, the table at the path `name` (.csv, .tsv, .jsonl, .json, .parquet, .conll), the images in
    that folder, with masks or objects beside them or in folders of classes, the images or texts of a Hugging Face
    dataset (hub:DATASET), or the images of COCO's JSON.

    `data`: folder of the task's files, instead of the Hugging Face hub. `grid`: spacing of the STS-B targets, 0.1 as in
    the official LST and SHERL code (a quirk) or 0.2 as in T5. `targets`: types of target that will do, () for any.
    `void`: a number in masks that is no class. `skip_bad`: leave out objects in images that cannot be used. `paired`:
    see `load_table`. All other options are for a table; see `load_table`. Raises `TaskError` with one line for anything
    wrong with the name, the options or the files.
    """
    refuse_grid(name, grid)
    options = {"text": text, "text-pair": text_pair, "label": label, "separator": separator,
               "validation": validation, "test": test, "stratify": stratify, "metrics": metrics,
               "columns": columns, "task-name": task_name}  # fmt: skip
    texts = name.startswith(PREFIX) and (continues or "tokens" in targets)
    coco = paired is None and is_table(name) and is_coco(table_path(name, data))
    if coco:
        options = {k: v for k, v in options.items() if k not in ("validation", "test", "task-name")}
    if name.startswith(PREFIX) and not texts and not has_images(name, data):
        if beside := [f"--{o}" for o in ("validation", "test", "columns", "task-name") if options[o]]:
            raise TaskError(f"task {name} has its own splits and columns; {', '.join(beside)} is for a table")
        found = load_hub_table(
            name, text=text, text_pair=text_pair, label=label, separator=separator, targets=targets,
            stratify=stratify, metrics=metrics,
        )  # fmt: skip
        return replace(found, origin=digest_json(["hub", name]))
    pairs = paired is not None and is_folder(name) and is_msvd(Path(name))
    pictures = not texts and not pairs and (coco or name.startswith(PREFIX) or is_folder(name))
    given = [f"--{option}" for option, value in options.items() if value and not (pictures and option == "task-name")]
    if given and (pictures or is_named(name)):
        what = "of COCO's annotations" if coco else "images in folders" if pictures else "a public task"
        raise TaskError(f"task {name} is {what}; {', '.join(given)} is for a table of your own (--task my.csv)")
    if texts:
        return replace(load_hub_texts(name.removeprefix(PREFIX), text), origin=digest_json(["hub", name]))
    if name.startswith(PREFIX):
        return replace(load_hub_images(name, data), origin=digest_json(["hub", name]))
    if coco:
        path = table_path(name, data)
        made = load_coco(
            path, data or path.parent, validation=validation, test=test, name=task_name, skip_bad=skip_bad,
            instances="instances" in targets and "boxes" not in targets,
        )  # fmt: skip
        return replace(made, origin=_origin(path, validation, test))
    if is_table(name):
        path = table_path(name, data)
        made = load_table(
            path, text=text, text_pair=text_pair, label=label, separator=separator, targets=targets,
            validation=validation, test=test, stratify=stratify, metrics=metrics, name=task_name, continues=continues,
            columns=columns, paired=paired,
        )  # fmt: skip
        return replace(made, origin=_origin(path, validation, test))
    if pairs and paired is not None:
        return replace(load_msvd(Path(name), text, paired, task_name), origin=_origin(Path(name)))
    if is_folder(name):
        return replace(_in_folder(Path(name), targets, task_name, void, skip_bad), origin=_origin(Path(name)))
    known = _registered(name)
    origin = digest_json(["hub", known]) if data is None else _origin(data)
    return replace(_TASKS[known][1](data, grid), origin=origin)


def refuse_grid(name: str, grid: float) -> None:
    """TaskError where the targets of the task called `name` have no such step; nothing is read. A task of others knows
    its own."""
    known = _known(split_id(name)[0])
    if known in GLUE:
        refuse_step(GLUE[known], grid)
    elif known is None and grid != USUAL_GRID and (name.startswith(PREFIX) or is_folder(name) or is_table(name)):
        raise TaskError(
            f"--target-step {grid:g}: task {name} has no such step, as STS-B has: targets of a table follow its range; "
            "leave it out"
        )


def _in_folder(folder: Path, targets: Sequence[str], name: str | None, void: int | None, skip_bad: bool) -> Task:
    """The images of `folder` with targets of these types, else with what lies beside them: masks first."""
    if "mask" in targets or (not targets and mask_pairs(folder) is not None):
        return load_masks(folder, name, void)
    if "boxes" in targets or (not targets and is_voc(folder)):
        return load_voc(folder, name, skip_bad)
    if "instances" in targets:
        raise TaskError(
            f"{folder}: outlines of objects are read from COCO's JSON: --task instances.json --data {folder}"
        )
    return load_folder(folder, name)


def table_path(name: str, data: Path | None) -> Path:
    """The file of the table `name`: below `data` where it is not there as it is."""
    path = Path(name)
    return data / name if data is not None and not path.exists() else path


def _origin(*places: Path | None) -> str:
    return digest_json([socket.gethostname(), *(str(place.resolve()) if place else "" for place in places)])


def canonical_name(name: str) -> str:
    """`TaskSpec.name` of what `load_task(name)` would load, without reading anything: "SST-2" is sst2, "my data.csv" is
    my-data. Of a stored task's id, train@3f2a91bc, it is the part before the @. Any other name is returned as it is: a
    store may hold tables of tasks that are not registered here."""
    if name.startswith(PREFIX):
        return hub_name(name)
    if is_folder(name):
        return table_name(Path(name).resolve().name)
    if is_table(name):
        return table_name(Path(name).stem)
    name = split_id(name)[0]
    return _known(name) or name


def split_id(name: str) -> tuple[str, str]:
    """A stored task's name and the beginning of its id: "train@3f2a91bc" is ("train", "3f2a91bc"), "train" ("train",
    "")."""
    found = None if is_folder(name) or is_table(name) else _ID.fullmatch(name)
    return (found[1], found[2]) if found else (name, "")


def is_folder(name: str) -> bool:
    """Whether `name` is a folder (of images) and no named task."""
    return not _known(name) and Path(name).is_dir()


def is_table(name: str) -> bool:
    """Whether `name` is the file of a table, there or not."""
    return Path(name).suffix.lower() in SUFFIXES


def is_named(name: str) -> bool:
    """Whether `name` is that of a registered task."""
    return _known(name) is not None


def _known(name: str) -> str | None:
    """The registered name, None where there is none; "SST-2" and "sst2" are the same."""

    def look() -> str | None:
        plain = {known.lower().replace("-", "").replace("_", ""): known for known in _TASKS}
        return plain.get(name.lower().replace("-", "").replace("_", ""))

    if (found := look()) is None and not is_table(name) and not Path(name).exists():
        load_installed()
        found = look()
    return found


def _registered(name: str) -> str:
    if known := _known(name):
        return known
    if split_id(name)[1]:
        raise TaskError(f"{name} names rows that are in a store; here the task's own file is needed: --task FILE")
    near = difflib.get_close_matches(name.lower(), _TASKS, n=3, cutoff=0.5)
    offer = f"did you mean {' or '.join(near)}?" if near else f"tasks: {', '.join(_TASKS)}."
    raise TaskError(f"unknown task {name!r}; {offer} A table of your own is given by its file: --task my.csv")
