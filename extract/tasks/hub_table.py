"""A Hugging Face dataset of texts and labels as a task: `hub:DATASET`, a name on the hub or a folder of its files.

Its columns are read as those of a table of the user's own; numbers that are names of classes become these names, and -1
is no label. Splits called train, validation (val, valid, dev) and test are taken; what is not there is held out as of a
table.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.extract.tasks.base import Task
from pipeline.extract.tasks.hub import fetch
from pipeline.extract.tasks.hub_images import PREFIX, hub_name
from pipeline.extract.tasks.sheet import Sheet, named_class
from pipeline.extract.tasks.splits import Parted, hold_out
from pipeline.extract.tasks.table import made_task, read_as, rows_of
from pipeline.store.format.digest import digest_json


def load_hub_table(
    task: str,
    *,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    separator: str | None = None,
    targets: Sequence[str] = (),
    stratify: bool = False,
    metrics: Sequence[str] = (),
) -> Task:
    """The task of `hub:DATASET`; options and errors as of `table.load_table`. `TaskError`, too, where it cannot be
    fetched or has no train split."""
    dataset = task.removeprefix(PREFIX)
    sheets = {split: _sheet(dataset, split, rows) for split, rows in fetch(dataset).items()}
    reading = read_as(sheets["train"], text, text_pair, label, separator, targets, stratify)
    read = rows_of(reading)
    made = {split: read(sheet, split) for split, sheet in sheets.items()}
    everything = made.pop("train")
    splits, absent = hold_out(everything, made, task, stratify)
    revision = digest_json([[split, list(rows.texts), list(rows.labels)] for split, rows in splits.items()])
    about: dict[str, Any] = {
        "dataset": dataset, "revision": revision, "licence": "not stated", "source": "table",
        "splits": "held-out" if "validation" not in made else "files", "hub": sorted(sheets),
        **({"stratified": True} if stratify else {}),
    }  # fmt: skip
    return made_task(hub_name(task), reading, Parted(everything, splits, absent, about), metrics)


def _sheet(dataset: str, split: str, rows: Any) -> Sheet:
    import datasets

    path, columns = Path(f"{dataset} {split}"), []
    for name, feature in rows.features.items():
        values = list(rows[name])
        inner = getattr(feature, "feature", None)  # of a list: of tags, say
        if isinstance(feature, datasets.ClassLabel):
            values = [named_class(path, feature.names, value) for value in values]
        elif isinstance(inner, datasets.ClassLabel):
            values = [None if v is None else [named_class(path, inner.names, part) for part in v] for v in values]
        columns.append(values)
    table = [list(row) for row in zip(*columns, strict=True)]
    return Sheet(path, list(rows.features), table, list(range(1, len(table) + 1)), "")
