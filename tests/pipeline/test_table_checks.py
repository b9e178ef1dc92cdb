"""A table checked by whole columns is refused exactly where a row is wrong."""

import math
from itertools import product
from typing import Any

import pytest

from pipeline.checks.stored import check_table
from pipeline.store import TaskTable
from pipeline.store.errors import StoreError

LABELS = [0, 1, 2, -1, True, 0.5, math.nan, math.inf, -math.inf, None, "x", [0]]
SOUND: dict[str, list[Any]] = {"class": [0, 1, None], "number": [0, 1, 2, -1, 0.5, None]}


def table(target: str, label: Any, texts: int) -> TaskTable:
    """Three rows, the last of them with `label` and `texts` texts."""
    labels = ["a", "b"] if target == "class" else []
    spec = {
        "name": "t",
        "labels": labels,
        "metrics": ["accuracy"],
        "fields": ["text"],
        "texts": labels or ["-1", "0.5", "2"],
        "values": [] if labels else [-1, 0.5, 2],
    }
    header = {"task": "t", "split": "train", "spec": {**spec, "prompt": "{0}", "target": target}}
    return TaskTable(header, [f"{n:032x}" for n in range(3)], [0, 1, label], [["x"], ["y"], ["z"] * texts])


@pytest.mark.parametrize("target", SOUND)
def test_a_table_is_refused_for_its_last_row_alone(target: str) -> None:
    for label, texts in product(LABELS, range(4)):
        sound = any(label is s or (type(label) is type(s) and label == s) for s in SOUND[target]) and texts in (1, 2)
        made = table(target, label, texts)
        if sound:
            assert check_table(made, "here") is made
        else:
            with pytest.raises(StoreError, match=r"here is malformed: .*row 3"):
                check_table(made, "here")
