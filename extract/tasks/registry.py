"""Finds a task by name: a GLUE task, or the file of a table. A new task family is one `register` call."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from extract.tasks.base import Task, TaskError
from extract.tasks.glue import GLUE, load_glue
from extract.tasks.hub_images import PREFIX, hub_name, load_hub_images
from extract.tasks.images import load_folder
from extract.tasks.sheet import SUFFIXES
from extract.tasks.table import load_table, table_name

Loader = Callable[[Path | None, float], Task]

_TASKS: dict[str, tuple[str, Loader]] = {}


def register(name: str, about: str, load: Loader) -> None:
    """Adds a named task. `load(data, grid)`: `data` is the folder given with --data, or None for the public source."""
    if name in _TASKS or Path(name).suffix in SUFFIXES:
        raise ValueError(f"task name {name!r} is taken or looks like a file")
    _TASKS[name] = (about, load)


for _task in GLUE.values():
    register(_task.name, _task.about, partial(load_glue, _task.name))


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
    kind: str | None = None,
    validation: Path | None = None,
    test: Path | None = None,
    metrics: Sequence[str] = (),
    task_name: str | None = None,
    grid: float = 0.1,
) -> Task:
    """The task called `name`, the table at the path `name` (.csv, .tsv, .jsonl, .json), the pictures in that folder, or
    those of a Hugging Face dataset (hub:DATASET).

    `data`: folder of the task's files, instead of the Hugging Face hub. `grid`: spacing of the STS-B targets, 0.1 as in
    the official LST and SHERL code (a quirk) or 0.2 as in T5. All other options are for a table; see `load_table`.
    Raises `TaskError` with one line for anything wrong with the name, the options or the files.
    """
    options = {"text": text, "text-pair": text_pair, "label": label, "kind": kind, "validation": validation,
               "test": test, "metrics": metrics, "task-name": task_name}  # fmt: skip
    if name.startswith(PREFIX):
        return load_hub_images(name, data)
    if _is_table(name):
        path = Path(name)
        if data is not None and not path.exists():
            path = data / name
        return load_table(
            path, text=text, text_pair=text_pair, label=label, kind=kind, validation=validation, test=test,
            metrics=metrics, name=task_name,
        )  # fmt: skip
    if _is_folder(name):
        return load_folder(Path(name), task_name)
    known = _resolve(name)
    given = [f"--{option}" for option, value in options.items() if value]
    if given:
        raise TaskError(f"task {known} is a public task; {', '.join(given)} is for a table of your own (--task my.csv)")
    return _TASKS[known][1](data, grid)


def canonical_name(name: str) -> str:
    """`TaskSpec.name` of what `load_task(name)` would load, without reading anything: "SST-2" is sst2, "my data.csv" is
    my-data. Any other name is returned as it is: a store may hold tables of tasks that are not registered here."""
    if name.startswith(PREFIX):
        return hub_name(name)
    if _is_folder(name):
        return table_name(Path(name).resolve().name)
    return table_name(Path(name).stem) if _is_table(name) else _known(name) or name


def _is_folder(name: str) -> bool:
    return not _known(name) and Path(name).is_dir()


def _is_table(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


def _known(name: str) -> str | None:
    """The registered name, None where there is none; "SST-2" and "sst2" are the same."""
    plain = {known.lower().replace("-", "").replace("_", ""): known for known in _TASKS}
    return plain.get(name.lower().replace("-", "").replace("_", ""))


def _resolve(name: str) -> str:
    if known := _known(name):
        return known
    near = difflib.get_close_matches(name.lower(), _TASKS, n=3, cutoff=0.5)
    offer = f"did you mean {' or '.join(near)}?" if near else f"tasks: {', '.join(_TASKS)}."
    raise TaskError(f"unknown task {name!r}; {offer} A table of your own is given by its file: --task my.csv")
