"""The key index against a dictionary, and what it may cost."""

from __future__ import annotations

import gc
import pickle
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.store.format.keys import Keys
from pipeline.store.segments.index import Index, KeyIndex
from tests.store.helpers import key, most_memory, sealed, space

# Few first bytes and trailing zeros, so that heads collide and equal keys stand in several lists.
TEXT = st.builds(
    lambda a, b, c: f"{a:08x}{b:08x}{c:016x}",
    st.integers(0, 2),
    st.integers(0, 2),
    st.sampled_from([0, 1 << 8, 1 << 63]),
)
LISTS = st.lists(st.lists(TEXT, max_size=6, unique=True), max_size=5)


@given(LISTS, st.lists(TEXT, max_size=12), st.data())
@settings(max_examples=200, deadline=None)
def test_index_is_a_dictionary(lists: list[list[str]], asked: list[str], data: st.DataObject) -> None:
    preferred = data.draw(st.lists(st.booleans(), min_size=len(lists), max_size=len(lists)))
    index = KeyIndex(map(Keys.of, lists))
    places = [(text, number) for number, part in enumerate(lists) for text in part]
    first: dict[str, int] = {}
    best: dict[str, int] = {}
    for place, (text, number) in enumerate(places):
        first.setdefault(text, place)
        if preferred[number]:
            best.setdefault(text, place)
    assert index.first(asked).tolist() == [first.get(k, -1) for k in asked]
    found = index.first(Keys.of(asked), np.array(preferred, bool))
    assert found.tolist() == [best.get(k, first.get(k, -1)) for k in asked]
    assert index.lists(np.arange(len(index))).tolist() == [number for _, number in places]
    assert index.keys.distinct() == len(first)


@given(st.lists(TEXT, max_size=9), st.integers(0, 9), st.integers(0, 9))
def test_keys_read_like_a_list(texts: list[str], a: int, b: int) -> None:
    keys = Keys.of(texts)
    assert list(keys) == texts and keys == texts and texts == keys and keys[a:b] == texts[a:b]
    assert [keys[i] for i in range(len(texts))] == texts and keys != [*texts, "x"]
    assert pickle.loads(pickle.dumps(keys)) == keys
    assert Keys.joined([keys[:a], keys[a:]]) == texts


@pytest.mark.parametrize("bad", ["", "0" * 31, "0" * 33, "G" + "0" * 31, "A" * 32, " " * 2 + "0" * 30, 7, None])
def test_what_is_no_key_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match="32 lower hex"):
        Keys.of([key(1), bad])  # type: ignore[list-item]


def test_every_key_stands_in_memory_once(tmp_path: Path) -> None:
    home = space(tmp_path)
    base = sealed(home, [1, 2, 3])
    sealed(home, [1, 2, 3], base, states=("encoder.5",))
    sealed(home, [4])
    before = [weakref.ref(s.keys.high) for s in home.segments()]
    index = home.index()
    gc.collect()
    assert len(before) == 3 and not any(keys() is not None for keys in before)
    kept = [s.keys for s in home.segments()]
    assert all(k.high.base is kept[0].high.base and k.low.base is kept[0].low.base for k in kept)
    assert list(kept[0]) == [key(i) for i in (1, 2, 3)] and len(index) == 4


def test_looking_up_takes_little_beside_what_it_gives() -> None:
    draws = np.random.default_rng(0)
    index = KeyIndex([Keys(*draws.integers(0, 1 << 64, (2, 2_000_000), np.uint64))])
    asked = index.keys.take(draws.permutation(len(index)))
    places, peak = most_memory(lambda: index.first(asked))
    assert index.keys.take(places) == asked and peak < 34 * len(index)  # 8 of them given, 47 when searched at once


def test_an_index_takes_24_bytes_a_sample() -> None:
    draws = np.random.default_rng(0)
    index = KeyIndex([Keys(*draws.integers(0, 1 << 64, (2, 1000), np.uint64)) for _ in range(10)])
    arrays = [index.keys.high, index.keys.low, *(v for v in vars(index).values() if isinstance(v, np.ndarray))]
    assert sum(a.nbytes for a in arrays) <= 24 * len(index) + 8 * 11
    asked = index.keys.take(draws.permutation(len(index)))
    assert (index.keys.take(index.first(asked)) == asked) and isinstance(Index([]).locate([], []), tuple)
