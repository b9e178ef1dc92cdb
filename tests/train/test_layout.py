"""A store is compacted while a run is interrupted: the run goes on in the order it began with, and names its layout."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import store
from pipeline.store.errors import UserError
from pipeline.store.upkeep.rewrite import compact
from pipeline.train.data.live_source import LiveSource
from pipeline.train.data.order import Order
from pipeline.train.data.store_source import StoreSource, StreamOptions
from pipeline.train.fit import run_files as checkpoint
from pipeline.train.fit.loop import FitOptions, fit
from tests.train.test_loop import Killed, Stopping, course, kill, scorer
from tests.train.toys import COLUMNS, STATES, ToyModel, check, key, samples, targets

# Writers that raced: some samples are stored twice, which compacting undoes.
SEGMENTS = (range(20), range(10, 34), range(34, 52), range(50, 70))


@pytest.fixture
def space(tmp_path: Path) -> store.Space:
    space = store.Store.create(tmp_path / "store").create_space({"format": "float16", "format_version": 1})
    for ids in SEGMENTS:
        writer = space.writer({})
        writer.add(samples(list(ids), "float16"))
        writer.seal()
    return space


def source(space: store.Space, low: int = 0, high: int = 60, **options: object) -> StoreSource:
    ids = (np.random.default_rng(0).permutation(high - low) + low).tolist()
    settings = {"batch_size": 7, "seed": 1, "window": 2, "ahead": 0, **options}
    return StoreSource(
        space, [key(i) for i in ids], targets([i % 2 for i in ids]), STATES, COLUMNS, StreamOptions(**settings)
    )  # type: ignore[arg-type]


def train(space: store.Space, run: Path, stop: int | None = None, **options: object) -> dict:
    first = source(space, **options)
    return fit(
        ToyModel(),
        first if stop is None else Stopping(first, stop, kill),
        source(space, 55, 64),
        source(space, 60, 70),
        FitOptions(epochs=3, lr=1e-2, checkpoint_every=2),
        run,
        scorer,
        progress=False,
    )


@pytest.mark.parametrize("stop", [1, 4, 13])  # the first before any step is in a checkpoint
@pytest.mark.parametrize("options", [{}, {"group_by_length": True, "host_bytes": 0, "ahead": 1}])
def test_a_run_goes_on_after_a_compact(space: store.Space, tmp_path: Path, stop: int, options: dict) -> None:
    straight = train(space, tmp_path / "straight", **options)
    with pytest.raises(Killed):
        train(space, tmp_path / "cut", stop, **options)
    assert compact(space)["new"] == 1
    cut = train(space, tmp_path / "cut", **options)
    assert course(tmp_path / "cut") == course(tmp_path / "straight")
    assert [cut[k] for k in ("validation", "test", "layout")] == [straight[k] for k in ("validation", "test", "layout")]
    a, b = (checkpoint.load(tmp_path / run / checkpoint.TUNER) for run in ("straight", "cut"))
    assert all(torch.equal(a[0][name], b[0][name]) for name in a[0]) and a[1] == b[1]


def test_a_run_without_a_step_may_be_started_with_other_options(space: store.Space, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(space, tmp_path / "run", 1)
    compact(space)
    train(space, tmp_path / "run", window=1)
    train(space, tmp_path / "other", window=1)
    assert course(tmp_path / "run") == course(tmp_path / "other")


def test_the_layout_is_named_and_another_gives_another_order(space: store.Space, tmp_path: Path) -> None:
    before = train(space, tmp_path / "before")
    compact(space)
    after = train(space, tmp_path / "after")
    assert (before["layout"]["blocks"], after["layout"]["blocks"]) == (4, 1)
    assert before["layout"]["xxh3"] != after["layout"]["xxh3"]
    assert json.loads((tmp_path / "after" / "metrics.json").read_text())["layout"] == after["layout"]
    assert checkpoint.load(tmp_path / "after" / checkpoint.TUNER)[1]["layout"] == after["layout"]
    assert course(tmp_path / "before") != course(tmp_path / "after")


def test_a_followed_order_reads_each_block_of_then_alone(space: store.Space) -> None:
    then = source(space)
    compact(space)
    now = source(space)
    assert len(now.plan.blocks) == 1
    now.follow(then.order.block)
    # No block of now spans two of then, so no more is open at once than was.
    assert all(len(set(then.order.block[now.plan.block == b])) == 1 for b in range(len(now.plan.blocks)))
    assert sum(b.nbytes for b in now.plan.blocks) == sum(b.nbytes for b in then.plan.blocks)
    ids = np.random.default_rng(0).permutation(60).tolist()
    for a, b in zip(then.epochs(0, 2), now.epochs(0, 2), strict=True):
        assert a.index.tolist() == b.index.tolist()
        check(b, ids, "float16")


def test_a_checkpoint_of_before_layouts_needs_the_same_blocks(space: store.Space, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(space, tmp_path / "run", 9)
    path = tmp_path / "run" / checkpoint.RESUME
    parts, info = checkpoint.load_run(path)
    checkpoint.save_run(path, {**parts, "layout": {}}, info)
    compact(space)
    with pytest.raises(UserError, match="unfinished run over an order of other blocks"):
        train(space, tmp_path / "run")


def test_other_validation_rows_are_noticed(space: store.Space, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(space, tmp_path, 9)
    with pytest.raises(UserError, match="unfinished run with 9 validation samples, now 5"):
        fit(
            ToyModel(), source(space), source(space, 55, 60), source(space, 60, 70),
            FitOptions(epochs=3, lr=1e-2, checkpoint_every=2), tmp_path, scorer, progress=False,
        )  # fmt: skip


def test_a_live_source_follows_too() -> None:
    live = LiveSource(None, None, None, [], Order(np.zeros(12, np.int64), 5, seed=3, window=2))  # type: ignore[arg-type]
    block = np.arange(12, dtype=np.int64) // 4
    live.follow(block)
    assert live.order.digest() == Order(block, 5, seed=3, window=2).digest()
