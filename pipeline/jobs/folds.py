"""Folds: the training and validation rows together, cut anew into rows to train on and rows to choose by.

`--fold 2/5` holds out the second of five parts of them, `--fold all` none. Parts are of samples, not of rows: rows with
the same input, and so the same key, stand on one side, rows that share it in one of several slots too, and
so do all windows of a text. The cut does not depend on the run's seed. The test split stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pipeline.extract.tasks.base import fixed_order
from pipeline.store import TaskTable
from pipeline.store.errors import UserError

T = TypeVar("T")


def parsed(fold: str) -> tuple[int, int] | None:
    """ "2/5" → (1, 5); None for "all". UserError for what is neither."""
    if fold == "all":
        return None
    number, mark, count = fold.partition("/")
    if not (mark and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count) and int(count) > 1):
        raise UserError(f"--fold {fold}: expected I/K, such as 2/5 for the second of five parts, or all")
    return int(number) - 1, int(count)


def folded(tables: Mapping[str, TaskTable], fold: str) -> dict[str, TaskTable]:
    """The tables of a task with the training and validation rows cut as `fold` says. UserError where there are too few
    samples, or where rows of one split cannot stand in the other."""
    if "train" not in tables:
        raise UserError(f"--fold {fold}: the store has no train rows of this task")
    asked, train = parsed(fold), tables["train"]
    if any(table.header.get("candidates") for table in tables.values()):
        raise UserError(
            f"--fold {fold}: rows of a backbone that writes text are stored with their own answer for training and "
            "with all answers for validation, so that one cannot stand for the other"
        )
    dev = tables.get("validation")
    labelled = any(label is not None for label in train.labels)  # texts that are learned, and pairs, never are
    if dev is not None and labelled and any(label is None for label in dev.labels):
        dev = None  # unlabelled: nothing to train on
    both = train if dev is None else joined(train, dev)
    out = {split: table for split, table in tables.items() if split not in ("train", "validation")}
    if asked is None:
        return {"train": both, **out}
    number, count = asked
    units = _units(both)
    samples = list(dict.fromkeys(units))
    if len(samples) < count:
        hang = " that share no input" if len(samples) < len(both) else ""
        raise UserError(f"--fold {fold}: there are {len(samples)} different samples{hang}, fewer than parts")
    held = {samples[place] for place in fixed_order(len(samples))[number::count]}
    header = {**train.header, "split": "validation"} if dev is None else dev.header
    kept = both.take([i for i, unit in enumerate(units) if unit not in held])
    left = both.take([i for i, unit in enumerate(units) if unit in held])
    return {"train": kept, "validation": replaced(left, header), **out}


def _units(table: TaskTable) -> list[int]:
    """For each row the first of those that it must stand on one side with: rows that share a sample in any slot, and
    the windows of one text, of which all but the first have no text of their own."""
    first: dict[tuple[int, str], int] = {}
    above = list(range(len(table)))

    def top(row: int) -> int:
        while above[row] != row:
            above[row] = row = above[above[row]]
        return row

    for row, keys in enumerate(zip(table.keys, *table.joined.values(), strict=True)):
        others = [first.setdefault(key, row) for key in enumerate(keys)]
        if row and table.texts and not table.texts[row]:
            others.append(row - 1)
        tops = [top(other) for other in others]
        for other in (*tops, top(row)):
            above[other] = min(tops)
    return [top(row) for row in range(len(table))]


def replaced(table: TaskTable, header: dict[str, Any]) -> TaskTable:
    """`table` under another header."""
    return TaskTable(header, table.keys, table.labels, table.texts, table.ids, table.metas, table.joined)


def joined(one: TaskTable, other: TaskTable) -> TaskTable:
    """The rows of both, under the header of the first."""

    def both(a: Sequence[T], b: Sequence[T]) -> list[T]:
        # A column that one of them lacks says nothing of the rows of both.
        return [*a, *b] if len(a) == len(one) and len(b) == len(other) else []

    return TaskTable(
        one.header, both(one.keys, other.keys), both(one.labels, other.labels), both(one.texts, other.texts),
        both(one.ids, other.ids), both(one.metas, other.metas),
        {slot: both(keys, other.joined.get(slot, ())) for slot, keys in one.joined.items()},
    )  # fmt: skip
