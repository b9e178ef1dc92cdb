"""`Texts`: the texts of many samples in Arrow's memory, which read like a list of lists of strings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_ESCAPE = re.compile(r"\\(?:\\|u([0-9a-f]{4}))")
_AT_ONCE = 4096  # samples made into strings at a time


class Texts(Sequence[list[str]]):
    """The fields of n samples. `column`: list<string>, without nulls. `escaped`: whether halves of surrogate pairs
    stand in it as escapes."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, column: pa.ChunkedArray, escaped: bool) -> None:
        self._column, self._escaped = column, escaped

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, place: int) -> list[str]: ...
    @overload
    def __getitem__(self, place: slice) -> list[list[str]]: ...
    def __getitem__(self, place: int | slice) -> list[str] | list[list[str]]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        return self._plain([self._column[place].as_py()])[0]

    def __iter__(self) -> Iterator[list[str]]:
        for start in range(0, len(self), _AT_ONCE):
            yield from self._plain(self._column.slice(start, _AT_ONCE).to_pylist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    def __repr__(self) -> str:
        return f"Texts({len(self):,})"

    def counts(self) -> np.ndarray:
        """(n,) int64, how many texts each sample has."""
        # By DLPack: Arrow's own conversion to numpy imports pandas where that is installed, which costs a second.
        chunks = [np.from_dlpack(chunk) for chunk in pc.list_value_length(self._column).chunks]
        return np.concatenate([np.empty(0, np.int64), *chunks])

    def _plain(self, rows: list[list[str]]) -> list[list[str]]:
        return [[_unescaped(text) for text in row] for row in rows] if self._escaped else rows


def _unescaped(text: str) -> str:
    return _ESCAPE.sub(lambda m: chr(int(m[1], 16)) if m[1] else "\\", text)
