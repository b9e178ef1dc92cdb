"""`Keys`: sample keys in 16 bytes each, which reads like a list of their 32 hex characters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np

_AT_ONCE = 4096  # keys written out as text at a time


class Keys(Sequence[str]):
    """n sample keys: the first and the last eight bytes of each, `high` and `low`, (n,) uint64.

    In two numbers rather than NumPy's `S16`, which drops trailing zero bytes.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, high: np.ndarray, low: np.ndarray) -> None:
        self.high, self.low = high, low

    @classmethod
    def of(cls, keys: Sequence[str]) -> Keys:
        """`keys` as 16 bytes each. Raises ValueError for what is no sample key."""
        if isinstance(keys, Keys):
            return keys
        keys = keys if isinstance(keys, list) else list(keys)
        # Many at once, far faster than one by one.
        sound = set(map(type, keys)) <= {str} and set(map(len, keys)) <= {32}
        return cls.of_text("".join(keys) if sound else "?")

    @classmethod
    def of_text(cls, text: str) -> Keys:
        """The keys whose hex characters follow one another in `text`. Raises ValueError as `of` does."""
        try:
            data = bytes.fromhex(text)
        except ValueError:
            data = b""
        if data.hex() != text or len(data) % 16:  # upper case and blanks are read as well
            raise ValueError("a sample key is the 32 lower hex characters of an xxh3-128")
        return cls.of_bytes(data)

    @classmethod
    def of_bytes(cls, data: bytes) -> Keys:
        """The keys whose 16 bytes each follow one another in `data`."""
        words = np.frombuffer(data, ">u8").reshape(-1, 2)
        return cls(words[:, 0].astype(np.uint64), words[:, 1].astype(np.uint64))

    @classmethod
    def joined(cls, parts: Iterable[Keys]) -> Keys:
        """All keys of `parts`, one after the other."""
        parts = list(parts) or [cls.of([])]
        return cls(np.concatenate([p.high for p in parts]), np.concatenate([p.low for p in parts]))

    def __len__(self) -> int:
        return len(self.high)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> Keys: ...
    def __getitem__(self, place: int | slice) -> str | Keys:
        if isinstance(place, slice):
            return Keys(self.high[place], self.low[place])
        return f"{int(self.high[place]):016x}{int(self.low[place]):016x}"

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _AT_ONCE):
            some = self[start : start + _AT_ONCE]
            text = np.stack([some.high, some.low], 1).astype(">u8").tobytes().hex()
            yield from (text[i : i + 32] for i in range(0, len(text), 32))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Keys):
            return np.array_equal(self.high, other.high) and np.array_equal(self.low, other.low)
        return isinstance(other, Sequence) and len(self) == len(other) and list(self) == list(other)

    def __repr__(self) -> str:
        return f"Keys({len(self):,})"

    def take(self, places: np.ndarray) -> Keys:
        """The keys at `places` (k,) int64."""
        return Keys(self.high[places], self.low[places])

    def distinct(self) -> int:
        """How many different keys there are."""
        high = np.sort(self.high)
        if not len(high) or not np.any(high[1:] == high[:-1]):
            return len(high)
        return 1 + int(self.numbers().max())

    def numbers(self) -> np.ndarray:
        """(n,) int64: a number each from 0, by their order; the same for equal keys."""
        order = np.lexsort((self.low, self.high))
        high, low = self.high[order], self.low[order]
        numbers = np.zeros(len(self), np.int64)
        numbers[order[1:]] = np.cumsum((high[1:] != high[:-1]) | (low[1:] != low[:-1]))
        return numbers
