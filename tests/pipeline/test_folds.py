"""Folds of rows that are no plain samples: windows of long texts, rows without labels."""

from __future__ import annotations

from pipeline.jobs.folds import folded
from pipeline.store import TaskTable


def windowed(split: str, texts: int, first: int) -> TaskTable:
    """`texts` of three windows each, without labels; the last window of each even one is the same everywhere."""
    rows = [(of, at) for of in range(first, first + texts) for at in range(3)]
    keys = ["same" if at == 2 and of % 2 == 0 else f"{of}/{at}" for of, at in rows]
    header = {"split": split, "spec": {"target": "tokens"}}
    return TaskTable(header, keys, [None] * len(rows), [[] if at else [f"text {of}"] for of, at in rows], [], [])


def test_windows_of_a_text_stand_on_one_side_of_a_fold() -> None:
    tables = {"train": windowed("train", 20, 0), "validation": windowed("validation", 10, 20)}
    every = {*tables["train"].keys, *tables["validation"].keys}
    held: list[str] = []
    for i in range(1, 5):
        cut = folded(tables, f"{i}/4")
        sides = [{key.partition("/")[0] for key in cut[split].keys} for split in ("train", "validation")]
        assert not sides[0] & sides[1]
        assert {*cut["train"].keys, *cut["validation"].keys} == every
        held += dict.fromkeys(cut["validation"].keys)
    assert sorted(held) == sorted(every)


def test_rows_whose_targets_lie_in_themselves_are_all_trained_on() -> None:
    tables = {"train": windowed("train", 4, 0), "validation": windowed("validation", 2, 4)}
    assert len(folded(tables, "all")["train"]) == 18
