"""Columns of texts: what is found in Arrow's memory is what Python finds in lists of strings."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.store.format.keys import Keys
from pipeline.store.tables.parquet import dump, read_rows
from pipeline.store.tables.texts import Texts, numbered

# Backslashes and halves of surrogate pairs are escaped in a column; Arrow's whitespace is not Python's.
LETTERS = st.sampled_from([*"ab \\\t\n\x00\x1c\x1f\x85\u00a0\u2028\u200b\u3000\u180e", "\ud800", "u00e9"])
ROWS = st.lists(st.lists(st.lists(LETTERS, max_size=3).map("".join), max_size=3), max_size=12)


def column(rows: list[list[str]], cut: int = 0) -> Texts:
    """`rows` as a table's file gives them, in chunks that end at `cut`."""
    keys = [f"{i:032x}" for i in range(len(rows))]
    data = dump({"spec": {"target": "none"}}, keys, [None] * len(rows), rows, [], [], {})
    read = read_rows(data, len(rows), "here")[1][2]
    parts = [read._column.slice(0, cut), read._column.slice(cut)]
    return Texts(pa.chunked_array([c for part in parts for c in part.chunks], pa.list_(pa.string())), read._escaped)


@settings(deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=3), st.integers(0, 12))
def test_equal_texts_have_equal_numbers(all_rows: list[list[list[str]]], cut: int) -> None:
    columns = [column(rows, min(cut, len(rows))) for rows in all_rows]
    assert [list(texts) for texts in columns] == all_rows
    numbers = numbered(columns)
    assert [len(own) for own in numbers] == [len(rows) for rows in all_rows]
    flat, plain = np.concatenate(numbers).tolist(), [tuple(row) for rows in all_rows for row in rows]
    assert len(set(zip(flat, plain, strict=True))) == len(set(flat)) == len(set(plain))


@settings(deadline=None)
@given(ROWS, st.integers(0, 12))
def test_blank_texts_are_those_that_python_strips_to_nothing(rows: list[list[str]], cut: int) -> None:
    found = column(rows, min(cut, len(rows))).blank()
    assert found.tolist() == [any(not text.strip() for text in row) for row in rows]


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), max_size=20))
def test_equal_keys_have_equal_numbers(draws: list[int]) -> None:
    keys = Keys.of([f"{n % 2:016x}{n // 2:016x}" for n in draws])
    numbers = keys.numbers().tolist()
    assert len(set(zip(numbers, draws, strict=True))) == len(set(numbers)) == len(set(draws))
