"""Sorting of many small numbers with their places, in joined 64-bit numbers: a quarter of the time of argsort."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

AT_ONCE = 1 << 20  # numbers that are looked at side by side, so that what is needed in between stays small


def sorted_places(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`values` (n,), whole numbers of [0, 2³²), in ascending order as (n,) uint32, and the place of each before, (n,)
    uint32; equal ones keep their order. Raises ValueError beyond 2³² - 1 values."""
    if len(values) >= 1 << 32:
        raise ValueError(f"{len(values):,} numbers are more than can be sorted at once")
    # Both numbers in one, sorted at once; written and read as the halves that they are, without a copy of all between.
    joined = np.empty(len(values), "<u8")
    halves = joined.view("<u4")
    halves[1::2] = values
    halves[::2] = np.arange(len(values), dtype=np.uint32)
    joined.sort()
    return halves[1::2].astype(np.uint32), halves[::2].astype(np.uint32)


def stable_order(values: np.ndarray) -> np.ndarray:
    """As `np.argsort(values, kind="stable")`, (n,) int64: with NumPy's faster sort, which decides nothing among equal
    ones, where there are none."""
    order = np.argsort(values)
    for start in range(0, len(order), AT_ONCE):
        ordered = values[order[start : start + AT_ONCE + 1]]
        if np.any(ordered[1:] == ordered[:-1]):
            return np.argsort(values, kind="stable")
    return order


def distinct(parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """`np.unique` of each of `parts`, (k,) int64 of numbers from 0: all of them in one sort."""
    sizes = np.array([len(part) for part in parts], np.int64)
    if not sizes.any():
        return [np.zeros(0, np.int64) for _ in parts]
    joined = np.concatenate(parts).astype(np.int64, copy=False)
    span = int(joined.max()) + 1
    joined = joined + np.repeat(np.arange(len(parts)) * span, sizes)
    joined.sort()
    joined = joined[np.concatenate([[True], joined[1:] != joined[:-1]])]
    cuts = np.searchsorted(joined, np.arange(len(parts) + 1) * span).tolist()
    joined %= span
    return [joined[a:b] for a, b in pairwise(cuts)]
