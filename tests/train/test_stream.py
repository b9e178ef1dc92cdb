"""Stream: right rows in right batches, bounded memory, exact resume, nothing left behind."""

import threading
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import store
from pipeline.store.errors import MissingStates, StoreError, UserError
from pipeline.train.configs import PooledConfig
from pipeline.train.data.store_source import StoreSource, StreamOptions
from pipeline.train.data.targets import Targets
from pipeline.train.objectives import Answers
from pipeline.train.objectives.regression import Regression
from tests.train.toys import COLUMNS, STATES, WIDTH, ToySpace, check, key, samples, targets

SIZES = [7, 3, 12, 1, 9, 5, 8, 11, 4, 6]


def make(monkeypatch: pytest.MonkeyPatch, space: ToySpace | None = None, **options: object) -> tuple[StoreSource, list]:
    """A source over two thirds of the space's samples, in mixed order, with one repeated."""
    space = space or ToySpace(SIZES)
    monkeypatch.setattr(store, "read_block", space.read_block)
    ids = [i for i in np.random.default_rng(0).permutation(sum(space.sizes)).tolist() if i % 3]
    ids.append(ids[0])
    settings = {"batch_size": 6, "seed": 3, "window": 3, "lookahead_bytes": 2000, "host_bytes": 0, **options}
    source = StoreSource(
        space, [key(i) for i in ids], targets([i % 2 for i in ids]), STATES, COLUMNS, StreamOptions(**settings)
    )  # type: ignore[arg-type]
    return source, ids


def real_space(path: Path, fmt: str, segments: int = 4, each: int = 20) -> store.Space:
    """A real store with samples 0 … in segments of `each`."""
    space = store.Store.create(path).create_space({"format": fmt, "format_version": 1})
    for number in range(segments):
        writer = space.writer({})
        writer.add(samples(list(range(number * each, (number + 1) * each)), fmt))
        writer.seal()
    return space


def indices(batches: Iterator) -> list[list[int]]:
    return [b.index.tolist() for b in batches]


@pytest.mark.parametrize("fmt", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("host_bytes", [0, 1 << 30])
@pytest.mark.parametrize("long", [0, 1 << 30])  # all samples are copied one by one, or all gathered by row
def test_batches_hold_the_right_rows(monkeypatch: pytest.MonkeyPatch, fmt: str, host_bytes: int, long: int) -> None:
    monkeypatch.setattr("pipeline.train.data.assemble.LONG", long)
    source, ids = make(monkeypatch, ToySpace(SIZES, fmt), host_bytes=host_bytes)
    for epoch in range(2):
        seen = []
        for batch in source.epoch(epoch):
            check(batch, ids, fmt)
            assert batch.targets is not None
            assert batch.targets["label"].tolist() == [ids[i] % 2 for i in batch.index]
            seen += batch.index.tolist()
        assert sorted(seen) == list(range(len(ids)))
    assert sorted(chain(*indices(source.sequential()))) == list(range(len(ids)))


@pytest.mark.parametrize("fmt", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("long", [0, 1 << 30])
def test_states_as_stored(monkeypatch: pytest.MonkeyPatch, fmt: str, long: int) -> None:
    """The numbers of the store where rows have no scales, float32 where they do, and the same values."""
    monkeypatch.setattr("pipeline.train.data.assemble.LONG", long)
    source, ids = make(monkeypatch, ToySpace(SIZES, fmt), dtype=None)
    kinds = set()
    for batch in source.epoch(0):
        kinds |= {(name, state.dtype) for name, state in batch.states.items()}
        batch.states = {name: state.float() for name, state in batch.states.items()}
        check(batch, ids, fmt)
    stored = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(fmt, torch.float32)
    assert {kind for name, kind in kinds if name != "encoder.2"} == {stored}
    # Some rows of this one are beyond float16's range.
    assert {kind for name, kind in kinds if name == "encoder.2"} <= {stored, torch.float32}
    assert fmt != "float16" or ("encoder.2", torch.float32) in kinds


@pytest.mark.parametrize("fmt", ["float32", "bfloat16", "float16", "int8"])
def test_a_real_store(tmp_path: Path, fmt: str) -> None:
    space = real_space(tmp_path / "store", fmt)
    ids = [i for i in np.random.default_rng(0).permutation(80).tolist() if i % 4]
    runs = []
    for options in ({"host_bytes": 0}, {"host_bytes": 1 << 30}):
        source = StoreSource(
            space, [key(i) for i in ids], None, STATES, COLUMNS, StreamOptions(7, window=3, block_bytes=2000, **options)
        )
        assert len(source.plan.blocks) > 4 and source.tier == ("host" if options["host_bytes"] else "disk")
        runs.append([])
        for epoch in range(2):
            for batch in source.epoch(epoch):
                check(batch, ids, fmt)
                runs[-1].append(batch.index.tolist())
    assert runs[0] == runs[1] and len(list(chain(*runs[0]))) == 2 * len(ids)


def test_a_flipped_bit_stops_the_epoch(tmp_path: Path) -> None:
    space = real_space(tmp_path / "store", "float32")
    chunk = next(p for p in sorted((tmp_path / "store").rglob("encoder.2/c*")) if p.is_file())
    raw = bytearray(chunk.read_bytes())
    raw[5] ^= 1
    chunk.write_bytes(raw)
    source = StoreSource(space, [key(i) for i in range(80)], None, STATES, (), StreamOptions(8))
    with pytest.raises(StoreError, match=r"encoder\.2"):
        list(source.epoch(0))


def test_what_is_not_stored_is_said(tmp_path: Path) -> None:
    space = real_space(tmp_path / "store", "float32")
    with pytest.raises(MissingStates) as caught:
        StoreSource(space, [key(i) for i in range(70, 90)], None, ["encoder.0", "encoder.9"], (), StreamOptions(8))
    assert caught.value.samples == 10 and caught.value.states == ("encoder.9",)


@pytest.mark.parametrize("shares", [1, 2, 5, 12])  # 12: more than an epoch has batches
def test_readers_that_take_turns_get_the_batches_of_one(monkeypatch: pytest.MonkeyPatch, shares: int) -> None:
    source, _ = make(monkeypatch)
    assert len(source) < 12
    whole = indices(source.epochs(0, 3, 2))
    parts = [indices(make(monkeypatch)[0].epochs(0, 3, 2, (i, shares))) for i in range(shares)]
    assert [parts[n % shares][n // shares] for n in range(len(whole))] == whole
    assert sum(map(len, parts)) == len(whole)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_resume_gives_the_remaining_batches(monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    source, _ = make(monkeypatch, ahead=ahead)
    whole = list(source.epoch(4))
    assert len(whole) == len(source)
    for start in (0, 1, 4, len(source)):
        rest = list(source.epoch(4, start))
        assert [b.index.tolist() for b in rest] == [b.index.tolist() for b in whole[start:]]
        for a, b in zip(rest, whole[start:], strict=True):
            assert all(torch.equal(a.states[s], b.states[s]) for s in STATES)


def test_the_tier_and_the_threads_do_not_change_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(**options: object) -> list[list[list[int]]]:
        source, _ = make(monkeypatch, **options)
        return [indices(source.epoch(e)) for e in range(2)]

    base = run()
    for options in ({"host_bytes": 1 << 30}, {"workers": 1}, {"lookahead_bytes": 0}, {"ahead": 0}):
        assert run(**options) == base


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_share_each_batch(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    base = indices(make(monkeypatch)[0].epoch(1))
    shares = []
    for rank in range(world):
        source, ids = make(monkeypatch, rank=rank, world=world)
        batches = list(source.epoch(1))
        for batch in batches:
            assert all(batch.states[name].shape[1] == WIDTH for name in STATES)  # also of an empty share
            if len(batch):
                check(batch, ids)
        shares.append([b.index.tolist() for b in batches])
    assert [list(chain(*parts)) for parts in zip(*shares, strict=True)] == base


@pytest.mark.parametrize("options", [{}, {"ahead": 0}, {"lookahead_bytes": 0}, {"workers": 1}, {"host_bytes": 1 << 30}])
def test_epochs_on_end_are_those_one_by_one(monkeypatch: pytest.MonkeyPatch, options: dict) -> None:
    one_by_one = make(monkeypatch)[0]
    want = indices(chain(one_by_one.epoch(1, 2), one_by_one.epoch(2), one_by_one.epoch(3)))
    before = set(threading.enumerate())
    space = ToySpace(SIZES)
    source, ids = make(monkeypatch, space, **options)
    got = []
    for batch in source.epochs(1, 4, 2):
        check(batch, ids)
        got.append(batch.index.tolist())
    assert got == want
    assert set(threading.enumerate()) == before
    counts = np.bincount(space.reads, minlength=len(SIZES))
    if options.get("host_bytes"):
        assert (counts == 1).all()
    else:  # of epoch 1 the rest alone
        assert ((counts == 2) | (counts == 3)).all()
    assert list(source.epochs(2, 2)) == [] and len(list(source.epochs(2, 4, len(source)))) == len(source)


def test_the_next_epoch_is_read_while_one_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    for end, more in ((1, False), (2, True)):
        space = ToySpace(SIZES)
        source, _ = make(monkeypatch, space)
        stream = source.epochs(0, end)
        for _ in range(len(source)):
            next(stream)
        deadline = time.monotonic() + 20
        while more and len(space.reads) == len(SIZES) and time.monotonic() < deadline:
            time.sleep(0.01)
        stream.close()  # type: ignore[attr-defined]
        assert (len(space.reads) > len(SIZES)) == more


def test_a_block_that_is_being_read_is_not_read_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    space = ToySpace([30])
    source, ids = make(monkeypatch, space)
    for batch in source.epochs(0, 3):
        check(batch, ids, "float32")
    assert space.reads == [0]  # the next epoch asks for it while the present one waits


def test_each_block_is_read_once_an_epoch_and_few_are_open(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.train.data import store_source as stream

    made = []

    class Watched(stream.LookAhead):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            made.append(self)

    monkeypatch.setattr(stream, "LookAhead", Watched)
    space = ToySpace([5] * 40)
    source, _ = make(monkeypatch, space)
    for _ in source.epoch(0):
        pass
    assert sorted(space.reads) == list(range(40))
    assert made[0].most_open <= 1.5 * 3 + 2 + 3  # window, look-ahead of two blocks, those a batch opens at once
    for _ in source.epochs(1, 5):
        pass
    shared = 5 * 40 - len(space.reads)  # with the epoch before, which had not taken them yet
    assert set(space.reads) == set(range(40)) and 0 <= shared <= 4 * 2
    assert made[1].most_open <= 2 * 3 + 2 + 3
    assert not made[1]._first.keys() - made[1]._open.keys()  # what is done with is forgotten


def test_the_host_tier_reads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    space = ToySpace(SIZES)
    source, _ = make(monkeypatch, space, host_bytes=1 << 30)
    assert source.tier == "host"
    for epoch in range(3):
        for _ in source.epoch(epoch):
            pass
    assert sorted(space.reads) == list(range(len(SIZES)))
    source.forget()
    list(source.sequential())
    assert len(space.reads) == 2 * len(SIZES)


def test_leaving_early_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(threading.enumerate())
    space = ToySpace(SIZES, delay=0.01)
    source, _ = make(monkeypatch, space)
    batches = source.epoch(0)
    next(batches)
    assert set(threading.enumerate()) > before
    batches.close()  # type: ignore[attr-defined]
    assert set(threading.enumerate()) == before
    for _ in source.epoch(1):
        break
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_damaged_block_is_reported_and_ends_the_epoch(monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    before = set(threading.enumerate())
    source, _ = make(monkeypatch, ToySpace(SIZES, fail=4), ahead=ahead)
    with pytest.raises(StoreError, match="block 4 is damaged"):
        list(source.epoch(0))
    assert set(threading.enumerate()) == before


def test_a_cluster_gives_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed")
    base = indices(make(monkeypatch)[0].epoch(0))
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None, protocol="tcp", host="127.0.0.1"
    ) as cluster:
        source, ids = make(monkeypatch, scheduler=cluster.scheduler_address)
        batches = list(source.epoch(0))
        for batch in batches:
            check(batch, ids)
        assert indices(iter(batches)) == base
        for _ in source.epoch(1):
            break
        clients = [c for c in cluster.scheduler.clients if c.startswith("Client-") and "worker" not in c]
        assert len(cluster.scheduler.tasks) == 0
        assert not clients


def test_no_scheduler_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    source, _ = make(monkeypatch, scheduler="not-an-address")
    with pytest.raises(UserError, match="no Dask scheduler answers at not-an-address"):
        next(source.epoch(0))


def test_targets_are_what_the_objective_makes_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    space = ToySpace([3])
    monkeypatch.setattr(store, "read_block", space.read_block)
    number = Regression(PooledConfig(), Answers())
    for given, found in (
        (targets([0, 1, 2]), torch.tensor([0, 1, 2])),
        (Targets(number, [0.5, 1, 4.35]), torch.tensor([0.5, 1.0, 4.35], dtype=torch.float64)),
    ):
        source = StoreSource(space, [key(i) for i in range(3)], given, STATES, COLUMNS, StreamOptions(3))
        (batch,) = source.sequential()
        assert batch.targets is not None
        assert torch.equal(batch.targets["label"], found[batch.index]) and batch.targets["label"].dtype == found.dtype
    (batch,) = StoreSource(space, [key(i) for i in range(3)], None, STATES, COLUMNS, StreamOptions(3)).sequential()
    assert batch.targets is None


def test_wrong_options_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({"batch_size": 0}, {"window": 0}, {"seed": -1}, {"lookahead_bytes": -1}, {"rank": 1}):
        with pytest.raises(UserError, match=next(iter(options))):
            make(monkeypatch, **options)
    space = ToySpace([3])
    with pytest.raises(UserError, match="no samples"):
        StoreSource(space, [], None, STATES, (), StreamOptions(2))
    with pytest.raises(UserError, match="1 of 3 samples have no target, the first is row 1"):
        targets([0, None, 1])
    with pytest.raises(UserError, match="2 targets for 3 samples"):
        StoreSource(space, [key(i) for i in range(3)], targets([0, 1]), STATES, (), StreamOptions(2))
    with pytest.raises(UserError, match="start"):
        make(monkeypatch)[0].epoch(0, 99)


def test_a_forced_tier_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, found in (("disk", "disk"), ("host", "host"), ("device", "host")):  # on a CPU they are the same memory
        source, ids = make(monkeypatch, ToySpace(SIZES), tier=asked, host_bytes=0 if asked != "disk" else 1 << 40)
        assert source.tier == found
        assert len(ids) == sum(len(b) for b in source.epoch(0))


@pytest.mark.parametrize("long", [0, 1 << 30])
def test_all_of_a_batch_is_where_its_blocks_are(monkeypatch: pytest.MonkeyPatch, long: int) -> None:
    monkeypatch.setattr("pipeline.train.data.assemble.LONG", long)
    source, _ = make(monkeypatch, ToySpace(SIZES), device="meta", dtype=None)
    monkeypatch.setattr(source, "_tier", "device")
    batch = next(source.epoch(0))
    assert {t.device.type for t in (*batch.states.values(), *batch.columns.values(), *batch.targets.values())} == {
        "meta"
    }


def test_blocks_on_a_device_give_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = make(monkeypatch, ToySpace(SIZES), tier="disk")
    moved, _ = make(monkeypatch, ToySpace(SIZES))
    monkeypatch.setattr(moved, "_tier", "device")  # of a CPU: the way is the same
    for a, b in zip(plain.epoch(0), moved.epoch(0), strict=True):
        assert all(torch.equal(a.states[n], b.states[n]) for n in a.states)
        assert all(torch.equal(a.columns[n], b.columns[n]) for n in a.columns)
