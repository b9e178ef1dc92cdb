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
# What `str.strip` takes away; Arrow's own notion of whitespace is another.
_BLANKS = "".join(c for c in map(chr, range(0x3001)) if c.isspace())


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

    def blank(self) -> np.ndarray:
        """(n,) bool, of which samples a text is empty or blanks only."""
        rows, start, ends = np.zeros(len(self), bool), 0, np.cumsum(self.counts())
        for texts in self._flat().chunks:
            # Compared by NumPy: a number that is given to Arrow imports pandas where that is installed.
            found = start + np.flatnonzero(np.from_dlpack(pc.binary_length(pc.utf8_trim(texts, _BLANKS))) == 0)
            rows[np.searchsorted(ends, found, side="right")] = True
            start += len(texts)
        return rows

    def _flat(self, escaped: bool = False) -> pa.ChunkedArray:
        """All texts, one after the other; with `escaped` as they stand in a column with escapes."""
        flat = pc.list_flatten(self._column)
        return pc.replace_substring(flat, "\\", "\\\\") if escaped and not self._escaped else flat

    def _plain(self, rows: list[list[str]]) -> list[list[str]]:
        return [[_unescaped(text) for text in row] for row in rows] if self._escaped else rows


def _unescaped(text: str) -> str:
    return _ESCAPE.sub(lambda m: chr(int(m[1], 16)) if m[1] else "\\", text)


def numbered(columns: Sequence[Texts]) -> list[np.ndarray]:
    """(n,) int64 for each of `columns`: a number a sample, the same for samples of equal texts, in any of them. Equal
    texts are found in Arrow's memory, without a string in Python."""
    escaped = any(texts._escaped for texts in columns)
    chunks = [chunk for texts in columns for chunk in texts._flat(escaped).chunks]
    # 64-bit offsets: all texts that differ stand in one array.
    flat = pc.dictionary_encode(pa.chunked_array(chunks, pa.string()).cast(pa.large_string()))
    found = np.concatenate([np.zeros(0, np.int32), *(np.from_dlpack(chunk.indices) for chunk in flat.chunks)])
    counts = np.concatenate([np.zeros(0, np.int64), *(texts.counts() for texts in columns)])
    first, numbers = np.cumsum(counts) - counts, np.zeros(len(counts), np.int64)
    kinds = int(found.max(initial=-1)) + 2
    for field in range(counts.max(initial=0)):
        own = np.zeros(len(counts), np.int64)  # 0: no such field
        there = counts > field
        own[there] = found[first[there] + field] + 1
        numbers = own if not field else np.unique(numbers * kinds + own, return_inverse=True)[1]
    return np.split(numbers, np.cumsum([len(texts) for texts in columns])[:-1])
