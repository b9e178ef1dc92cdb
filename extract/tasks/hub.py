"""Reads a public dataset with Hugging Face `datasets`."""

from __future__ import annotations

import re
from typing import Any

from pipeline.extract.tasks.base import Rows, TaskError, by_split


def read_hub(dataset: str, config: str, fields: tuple[str, ...]) -> tuple[dict[str, Rows], str]:
    """All splits of a public dataset with a `label` column (-1 = unlabelled), and the hub's commit it was read at.

    Raises `TaskError` where it is neither cached nor to be fetched: no network, or the hub refuses.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(dataset, config)
    except Exception as error:  # httpx, huggingface_hub, datasets and the file system each raise their own
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise TaskError(
            f"cannot fetch {dataset} ({config}) from the Hugging Face hub: {reason}; "
            f"without network give a folder in GLUE's layout with --data FOLDER"
        ) from error
    made: dict[str, Rows] = {}
    revision = ""
    for split, rows in loaded.items():
        columns = [list(rows[field]) for field in fields]
        labels = [None if label == -1 else label for label in rows["label"]]
        made[str(split)] = Rows(list(zip(*columns, strict=True)), labels)
        for source in rows.info.download_checksums or {}:
            found = re.search(r"@([0-9a-f]{40})/", source)
            revision = found.group(1) if found else revision
    return made, revision or "unknown"


def fetch(dataset: str) -> dict[str, Any]:
    """The splits train, validation and test of `dataset`, a name on the hub or the path of a dataset's files.

    Raises `TaskError` where it cannot be fetched or has no train split.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(dataset)
    except Exception as error:  # httpx, huggingface_hub, datasets and the file system each raise their own
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise TaskError(f"cannot fetch {dataset} from the Hugging Face hub: {reason}") from error
    splits = {split: loaded[name] for split, name in by_split(map(str, loaded), dataset).items()}
    if "train" not in splits:
        raise TaskError(f"{dataset} has no train split; it has: {', '.join(map(str, loaded)) or 'none'}")
    return splits
