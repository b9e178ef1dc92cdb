"""Planning and reading blocks, and what is missing."""

from __future__ import annotations

import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.store import MissingStates, Space, read_block
from tests.store.helpers import key, samples, sealed, space

STATES, COLUMNS = ["encoder.3", "decoder.1"], ["encoder.ids", "decoder.ids"]


def assert_plan_reads(home: Space, numbers: list[int], states: list[str], columns: list[str], limit: int) -> None:
    """Every wanted sample is where the plan says, and bit for bit what was stored."""
    plan = home.plan([key(n) for n in numbers], states, columns, limit)
    blocks = [read_block(pickle.loads(pickle.dumps(b))) for b in plan.blocks]
    assert plan.nbytes == sum(b.nbytes for b in plan.blocks)
    assert sum(b.samples for b in plan.blocks) == len(set(numbers))
    for block, read in zip(plan.blocks, blocks, strict=True):
        assert block.samples == len(read) == len(set(read.keys))
        assert block.nbytes == read.nbytes
        assert block.nbytes <= limit or block.samples == 1
    for i, n in enumerate(numbers):
        read, slot = blocks[plan.block[i]], int(plan.slot[i])
        expected = samples([n], states=tuple(states))
        assert read.keys[slot] == key(n)
        for name in states:
            stream = name.split(".")[0]
            start, stop = read.offsets(stream)[slot : slot + 2]
            assert plan.lengths[stream][i] == stop - start == expected.lengths[stream][0]
            assert np.array_equal(read.states[name].values[start:stop], expected.states[name].values), (n, name)
        for name in columns:
            start, stop = read.offsets(name.split(".")[0])[slot : slot + 2]
            assert np.array_equal(read.columns[name][start:stop], expected.columns[name])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Space:
    """Three segments of 40 samples, the last overlapping the second, and a supplement of the first."""
    home = space(tmp_path_factory.mktemp("blocks"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.store.format.arrays.CHUNK_BYTES", 200)
        first = sealed(home, list(range(40)), large=True)
        sealed(home, list(range(40, 80)))
        sealed(home, list(range(70, 110))[::-1])
        sealed(home, list(range(40)), first, states=("encoder.5",), columns=False)
    return home


@given(numbers=st.lists(st.integers(0, 109), max_size=60), limit=st.integers(1, 3000))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_samples_any_limit(home: Space, numbers: list[int], limit: int) -> None:
    assert_plan_reads(home, numbers, STATES, COLUMNS, limit)


@given(numbers=st.lists(st.integers(0, 39), min_size=1, max_size=60), limit=st.integers(1, 3000))
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_with_supplement(home: Space, numbers: list[int], limit: int) -> None:
    assert_plan_reads(home, numbers, ["encoder.5", "encoder.3", "decoder.1"], ["encoder.ids"], limit)
    assert_plan_reads(home, numbers, ["encoder.5"], [], limit)


def test_a_segment_is_one_block_by_default(home: Space) -> None:
    plan = home.plan([key(n) for n in range(110)], STATES, COLUMNS)
    assert [b.samples for b in plan.blocks] == [40, 40, 30]
    assert plan.blocks[0].runs == ((0, 40),) and plan.block.dtype == plan.slot.dtype == np.int64
    # Shared samples come from the first segment that has them.
    assert set(plan.block[70:80]) == {1}


def test_pieces_are_about_equal(home: Space) -> None:
    whole = home.plan([key(n) for n in range(40)], STATES).blocks[0].nbytes
    plan = home.plan([key(n) for n in range(40)], STATES, max_block_bytes=whole - 1)
    assert len(plan.blocks) == 2 and max(b.nbytes for b in plan.blocks) < 0.7 * whole


def test_nothing_wanted(home: Space) -> None:
    plan = home.plan([], STATES)
    assert plan.blocks == [] and plan.nbytes == 0 and plan.lengths["encoder"].shape == (0,)
    only_keys = home.plan([key(1), key(50)], [])
    assert [read_block(b).keys for b in only_keys.blocks] == [[key(1)], [key(50)]]


def test_missing_samples_and_states(home: Space) -> None:
    with pytest.raises(MissingStates, match="2 of 3 samples are not in this feature space") as caught:
        home.plan([key(500), key(1), key(501)], STATES)
    assert (caught.value.samples, caught.value.states) == (2, ())
    with pytest.raises(MissingStates, match=r"encoder.8, encoder.5 not stored for 2 of 3") as caught:
        home.plan([key(1), key(50), key(500)], ["encoder.3", "encoder.8", "encoder.5"])
    assert caught.value.states == ("encoder.8", "encoder.5")


def test_lookup(home: Space) -> None:
    keys = [key(n) for n in (1, 50, 75, 999)]
    found = home.lookup(keys, ["encoder.3"], ["encoder.ids"])
    assert found.present.tolist() == [True, True, True, False] and found.absent.tolist() == [False] * 3 + [True]
    assert found.base.tolist() == [-1] * 4 and found.missing == {}
    found = home.lookup(keys, ["encoder.5", "encoder.3", "decoder.7"])
    ids = [s.id for s in home.segments() if s.base is None]
    assert found.present.tolist() == [False] * 4
    assert [found.bases[i].id for i in found.base[:3]] == [ids[0], ids[1], ids[1]] and found.base[3] == -1
    assert found.missing == {ids[0]: ("decoder.7",), ids[1]: ("encoder.5", "decoder.7")}


def test_stored(home: Space) -> None:
    stored = home.stored()
    assert len(stored) == 110
    assert stored[key(1)] == {"encoder.3", "encoder.5", "decoder.1", "encoder.ids", "decoder.ids"}
    assert "encoder.5" not in stored[key(75)]


def test_a_later_segment_with_more_states_is_found(tmp_path: Path) -> None:
    """Of racing writers the first by id is taken, but only if it holds what is asked for."""
    home = space(tmp_path)
    first = sealed(home, [1, 2], states=("encoder.3",))
    second = sealed(home, [2, 1], states=("encoder.3", "encoder.4"))
    one, two = (home.plan([key(1)], [s]).blocks[0].parts[0].segment for s in ("encoder.3", "encoder.4"))
    assert (one, two) == (first.id, second.id)
    assert home.lookup([key(1)], ["encoder.3", "encoder.4"]).present.tolist() == [True]
    assert "encoder.4" in home.stored()[key(1)]


def test_new_segments_are_seen(tmp_path: Path) -> None:
    home = space(tmp_path)
    with pytest.raises(MissingStates):
        home.plan([key(1)], STATES)
    sealed(home, [1])
    assert home.plan([key(1)], STATES).blocks


def test_a_supplement_without_its_base_is_ignored(tmp_path: Path) -> None:
    home = space(tmp_path)
    base = sealed(home, [1, 2], states=("encoder.3",))
    sealed(home, [1, 2], base, states=("encoder.4",))
    shutil.rmtree(base.path)
    assert len(home.segments()) == 1 and home.stored() == {}
    assert home.lookup([key(1)], ["encoder.4"]).absent.tolist() == [True]


def test_a_stream_only_in_the_supplement(tmp_path: Path) -> None:
    """A decoder's states may be added to samples of which only the encoder's are there."""
    home = space(tmp_path)
    numbers = list(range(10))
    base = sealed(home, numbers, states=("encoder.3",))
    writer = home.writer({}, base)
    whole = samples(numbers)
    del whole.lengths["encoder"], whole.states["encoder.3"], whole.columns["encoder.ids"]
    writer.add(whole)
    writer.seal()
    assert_plan_reads(home, numbers[::2], STATES, COLUMNS, 1 << 20)


def test_many_writers_and_readers_at_once(tmp_path: Path) -> None:
    """No lock anywhere: threads make the same store and space, seal overlapping samples, and read meanwhile."""

    def work(number: int) -> None:
        home = space(tmp_path)
        numbers = list(range(number * 5, number * 5 + 10))
        sealed(home, numbers)
        plan = home.plan([key(n) for n in numbers], STATES, COLUMNS)
        assert sorted(k for b in plan.blocks for k in read_block(b).keys) == sorted(key(n) for n in numbers)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    home = space(tmp_path)
    assert len(home.segments()) == 8 and len(home.stored()) == 45 and home.verify(deep=True) == []
    assert_plan_reads(home, list(range(45)), STATES, COLUMNS, 1 << 20)
