"""Which segment holds which sample: bases with their supplements, and the key index over them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.store.errors import StoreError
from pipeline.store.segment import Segment

_SHIFT = 32


@dataclass
class Family:
    """A base segment and its supplements: the same samples in the same order. `holder`: state or column → segment."""

    base: Segment
    holder: dict[str, Segment] = field(default_factory=dict)
    supplements: list[Segment] = field(default_factory=list)

    def missing(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(name for name in names if name not in self.holder)

    def lengths(self, stream: str) -> np.ndarray:
        """(n,) int64; a stream may be stored in a supplement only."""
        for segment in (self.base, *self.supplements):
            if stream in segment.lengths:
                return segment.lengths[stream]
        raise KeyError(stream)


def families(segments: Sequence[Segment]) -> list[Family]:
    """Families in the order of their base's id. A supplement whose base is not there yet is left out.

    Raises StoreError for a supplement whose samples are not its base's.
    """
    found = {s.id: Family(s, dict.fromkeys((*s.states, *s.columns), s)) for s in segments if s.base is None}
    for segment in segments:
        family = found.get(segment.base or "")
        if family is None:
            continue
        base = family.base
        same = segment.keys == base.keys
        for stream in set(segment.lengths) & set(base.lengths):
            same = same and np.array_equal(segment.lengths[stream], base.lengths[stream])
        if not same:
            raise StoreError(
                f"segment {segment.id} does not hold the samples of its base {base.id}: delete {segment.folder}"
            )
        family.supplements.append(segment)
        for name in (*segment.states, *segment.columns):
            family.holder.setdefault(name, segment)
    return [found[name] for name in sorted(found)]


@dataclass
class Lookup:
    """What is stored of n samples and some states.

    `present`: (n,) bool, every state is stored. `absent`: (n,) bool, the sample is not stored at all. The rest have
    some of the states: `base`: (n,) int64, an index into `bases` for those, else -1. `missing`: base segment id → the
    states and columns to supplement there, in the order asked for.
    """

    present: np.ndarray
    absent: np.ndarray
    base: np.ndarray
    bases: list[Segment]
    missing: dict[str, tuple[str, ...]]


class Index:
    """Sample key → the families and positions that hold it. Built once for a set of segments."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.families = families(segments)
        self._first: dict[str, int] = {}
        self._more: dict[str, list[int]] = {}
        for number, family in enumerate(self.families):
            codes = range(number << _SHIFT, (number << _SHIFT) + len(family.base))
            if self._first.keys().isdisjoint(family.base.keys):
                self._first.update(zip(family.base.keys, codes, strict=True))
                continue
            for key, code in zip(family.base.keys, codes, strict=True):
                if self._first.setdefault(key, code) != code:
                    self._more.setdefault(key, []).append(code)

    def __len__(self) -> int:
        return len(self._first)

    def states(self) -> dict[str, frozenset[str]]:
        """Sample key → states and columns stored of it, in the fullest family that holds it."""
        names = [frozenset(family.holder) for family in self.families]
        out = {key: names[code >> _SHIFT] for key, code in self._first.items()}
        for key, codes in self._more.items():
            out[key] = max([out[key], *(names[c >> _SHIFT] for c in codes)], key=len)
        return out

    def locate(self, keys: Sequence[str], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Family and position of each key, (n,) int64 each: the first family by id that holds all of `names`; where
        none does, the first that holds the sample; -1 where it is not stored."""
        complete = [not family.missing(names) for family in self.families]
        codes = np.fromiter((self._first.get(key, -1) for key in keys), np.int64, len(keys))
        if self._more:
            for i, key in enumerate(keys):
                if key in self._more and not complete[codes[i] >> _SHIFT]:
                    better = (c for c in self._more[key] if complete[c >> _SHIFT])
                    codes[i] = next(better, codes[i])
        return codes >> _SHIFT, np.where(codes < 0, -1, codes & ((1 << _SHIFT) - 1))

    def lookup(self, keys: Sequence[str], names: Sequence[str]) -> Lookup:
        """What is stored of `keys` and `names` (states and columns)."""
        family, _ = self.locate(keys, names)
        lacking = {int(f): m for f in np.unique(family[family >= 0]) if (m := self.families[f].missing(names))}
        order = {f: i for i, f in enumerate(lacking)}
        table = np.array([order.get(f, -1) for f in range(len(self.families))] + [-1], np.int64)
        base = table[family]
        return Lookup(
            (family >= 0) & (base < 0),
            family < 0,
            base,
            [self.families[f].base for f in lacking],
            {self.families[f].base.id: m for f, m in lacking.items()},
        )
