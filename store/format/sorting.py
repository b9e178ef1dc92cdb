"""Sorting of many small numbers with their places, in joined 64-bit numbers: a quarter of the time of argsort."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

_BITS = np.uint64(32)


def sorted_places(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`values` (n,), whole numbers of [0, 2³²), in ascending order as (n,) uint32, and the place of each before, (n,)
    uint32; equal ones keep their order. Raises ValueError beyond 2³² - 1 values."""
    if len(values) >= 1 << 32:
        raise ValueError(f"{len(values):,} numbers are more than can be sorted at once")
    joined = values.astype(np.uint64)
    joined <<= _BITS
    joined |= np.arange(len(values), dtype=np.uint64)
    joined.sort()
    return (joined >> _BITS).astype(np.uint32), joined.astype(np.uint32)


def stable_order(values: np.ndarray) -> np.ndarray:
    """As `np.argsort(values, kind="stable")`, (n,) int64: with NumPy's faster sort, which decides nothing among equal
    ones, where there are none."""
    order = np.argsort(values)
    ordered = values[order]
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
