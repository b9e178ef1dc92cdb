"""Spans in sequences of tags, and their F1, by the rules of CoNLL's evaluation (IOB1, IOB2, IOBES, BILOU)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

OUTSIDE = "O"
_OPENS, _CLOSES = frozenset("BSU"), frozenset("ESLU")  # prefixes that always begin a span, and that always end one


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first, last) of each span, last included.

    A span begins at a tag that is not outside where its prefix says so, or the tag before is outside, ends a span or is
    of another type; so a stray "I-" begins one, as in CoNLL's own script. A tag without a prefix is a type of its own.
    """
    found: set[tuple[str, int, int]] = set()
    begun: tuple[str, int] | None = None
    closed = False
    for place, tag in enumerate([*tags, OUTSIDE]):
        prefix, _, kind = tag.partition("-") if "-" in tag else ("I", "", tag)
        outside = tag == OUTSIDE
        if begun is not None and (outside or prefix in _OPENS or kind != begun[0] or closed):
            found.add((begun[0], begun[1], place - 1))
            begun = None
        if begun is None and not outside:
            begun = (kind, place)
        closed = not outside and prefix in _CLOSES
    return found


class SpanCounts:
    """Spans found, told and right, by type."""

    def __init__(self) -> None:
        self.right: Counter[str] = Counter()
        self.told: Counter[str] = Counter()
        self.there: Counter[str] = Counter()

    def update(self, told: Sequence[str], truth: Sequence[str]) -> None:
        """One sequence of tags, as predicted and as they are."""
        guess, real = spans(told), spans(truth)
        self.told.update(kind for kind, _, _ in guess)
        self.there.update(kind for kind, _, _ in real)
        self.right.update(kind for kind, _, _ in guess & real)

    def merge(self, other: SpanCounts) -> None:
        """Add another's counts."""
        self.right += other.right
        self.told += other.told
        self.there += other.there

    def figures(self) -> dict[str, float]:
        """Precision, recall and F1 over all spans; 0 where a denominator is."""
        right, told, there = (sum(c.values()) for c in (self.right, self.told, self.there))
        precision, recall = right / told if told else 0.0, right / there if there else 0.0
        both = precision + recall
        return {"f1": 2 * precision * recall / both if both else 0.0, "precision": precision, "recall": recall}

    def by_type(self) -> tuple[tuple[str, ...], np.ndarray]:
        """The types of spans, and (types, 2, 2) how many of each are there and told, as `reports.shares` reads them;
        of what is neither there nor told there is no number, 0 stands there."""
        kinds = tuple(sorted(self.there.keys() | self.told.keys()))
        rows = [[[0, self.told[k] - self.right[k]], [self.there[k] - self.right[k], self.right[k]]] for k in kinds]
        return kinds, np.array(rows, np.int64).reshape(-1, 2, 2)
