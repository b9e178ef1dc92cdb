"""Which segment holds which sample: bases with their supplements, and the key index over them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.store.errors import StoreError
from pipeline.store.format.keys import Keys
from pipeline.store.format.samples import offsets_of
from pipeline.store.format.sorting import AT_ONCE, sorted_places
from pipeline.store.segments.segment import Segment


@dataclass
class Bundle:
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


def bundles(segments: Sequence[Segment]) -> list[Bundle]:
    """Bundles in the order of their base's id. A supplement whose base is not there yet is left out.

    Raises StoreError for a supplement whose samples are not its base's.
    """
    found = {s.id: Bundle(s, dict.fromkeys((*s.states, *s.columns), s)) for s in segments if s.base is None}
    for segment in segments:
        bundle = found.get(segment.base or "")
        if bundle is None:
            continue
        base = bundle.base
        same = segment.keys == base.keys
        for stream in set(segment.lengths) & set(base.lengths):
            same = same and np.array_equal(segment.lengths[stream], base.lengths[stream])
        if not same:
            raise StoreError(
                f"segment {segment.id} does not hold the samples of its base {base.id}: delete {segment.folder}"
            )
        bundle.supplements.append(segment)
        for name in (*segment.states, *segment.columns):
            bundle.holder.setdefault(name, segment)
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


class KeyIndex:
    """Where keys stand in several lists of them that follow one another: places 0 … n - 1 over all lists.

    The places are sorted by the first four bytes of their keys and searched there; what is found is compared whole.
    That is 8 bytes a key beside the 16 of the keys themselves. Raises ValueError beyond 2³² - 1 keys.
    """

    def __init__(self, lists: Iterable[Keys]) -> None:
        parts = list(lists)
        self.keys = Keys.joined(parts)
        self.starts = offsets_of(np.array([len(part) for part in parts], np.int64))
        if len(self.keys) >= 1 << 32:
            raise ValueError(f"{len(self.keys):,} samples in one feature space are more than an index can hold")
        # Among equal keys the one of the earliest list comes first.
        self._heads, self._order = sorted_places(_heads(self.keys))

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.keys.high, self.keys.low, self._order, self._heads))

    def first(self, keys: Sequence[str], preferred: np.ndarray | None = None) -> np.ndarray:
        """The first place of each of `keys` (n,) int64, -1 where there is none. `preferred`: (lists,) bool; a place in
        such a list goes before one in another."""
        wanted = Keys.of(keys)
        if preferred is not None and preferred.all():
            preferred = None
        found = np.full(len(wanted), -1, np.int64)
        # In ascending order each search begins where the last one ended, in memory that is at hand.
        heads, left = sorted_places(_heads(wanted))
        for start in range(0, len(left), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            self._search(heads[some], left[some], wanted, preferred, found)
        return found

    def _search(
        self, heads: np.ndarray, left: np.ndarray, wanted: Keys, preferred: np.ndarray | None, found: np.ndarray
    ) -> None:
        """Fill in `found` of the `wanted` keys at `left` (k,), whose first bytes are `heads`, ascending."""
        at = np.searchsorted(self._heads, heads)
        while len(left):
            inside = at < len(self._heads)
            inside[inside] = self._heads[at[inside]] == heads[inside]
            if not inside.all():
                left, at, heads = left[inside], at[inside], heads[inside]
            place = self._order[at]
            same = (self.keys.high[place] == wanted.high[left]) & (self.keys.low[place] == wanted.low[left])
            last = same if preferred is None else same & preferred[self.lists(place)]
            taken = last if preferred is None else last | (same & (found[left] < 0))
            found[left[taken]] = place[taken]
            left, at, heads = left[~last], at[~last] + 1, heads[~last]

    def lists(self, places: np.ndarray) -> np.ndarray:
        """The list that each of `places` (n,) int64 is in."""
        after = np.searchsorted(self.starts, places, "right")
        after -= 1
        return after


def _heads(keys: Keys) -> np.ndarray:
    """The first four bytes of each key, (n,) uint32."""
    heads = np.empty(len(keys), np.uint32)
    return np.right_shift(keys.high, np.uint64(32), out=heads, casting="unsafe")


class Index:
    """Sample key → the bundles and positions that hold it. Built once for a set of segments, from their manifests; it
    is no part of the store. 24 bytes a sample, the keys of the segments included."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.bundles = bundles(segments)
        self._keys = KeyIndex(bundle.base.keys for bundle in self.bundles)
        starts = self._keys.starts
        for bundle, start, stop in zip(self.bundles, starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            # The same keys: the segments give up their own, so that each stands in memory once.
            for segment in (bundle.base, *bundle.supplements):
                segment.keys = self._keys.keys[start:stop]

    def __len__(self) -> int:
        return self._keys.keys.distinct()

    @property
    def nbytes(self) -> int:
        """Bytes in memory, the keys of the segments included."""
        return self._keys.nbytes

    def states(self) -> dict[str, frozenset[str]]:
        """Sample key → states and columns stored of it, in the fullest bundle that holds it."""
        out: dict[str, frozenset[str]] = {}
        for bundle in sorted(self.bundles, key=lambda bundle: len(bundle.holder)):
            out |= dict.fromkeys(bundle.base.keys, frozenset(bundle.holder))
        return out

    def locate(self, keys: Sequence[str], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Bundle and position of each key, (n,) int64 each: the first bundle by id that holds all of `names`; where
        none does, the first that holds the sample; -1 where it is not stored."""
        complete = np.array([not bundle.missing(names) for bundle in self.bundles], bool)
        place = self._keys.first(keys, complete)
        bundle = self._keys.lists(place)  # -1 for -1: no list begins before place 0
        place -= self._keys.starts[bundle]
        place[bundle < 0] = -1
        return bundle, place

    def lookup(self, keys: Sequence[str], names: Sequence[str]) -> Lookup:
        """What is stored of `keys` and `names` (states and columns)."""
        bundle, _ = self.locate(keys, names)
        lacking = {int(f): m for f in np.unique(bundle[bundle >= 0]) if (m := self.bundles[f].missing(names))}
        order = {f: i for i, f in enumerate(lacking)}
        table = np.array([order.get(f, -1) for f in range(len(self.bundles))] + [-1], np.int64)
        base = table[bundle]
        return Lookup(
            (bundle >= 0) & (base < 0),
            bundle < 0,
            base,
            [self.bundles[f].base for f in lacking],
            {self.bundles[f].base.id: m for f, m in lacking.items()},
        )
