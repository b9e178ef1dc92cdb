"""Several tasks under one mixing order: each batch of one task, every sample once an epoch, resume exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import store
from pipeline.store.upkeep.rewrite import compact
from pipeline.train.data.order import Order
from pipeline.train.data.store_source import StoreSource, StreamOptions
from pipeline.train.fit.loop import FitOptions, fit
from pipeline.train.mixture import MixedOrder, MixedScorer, MixedSource
from tests.train.test_layout import space as space  # the fixture
from tests.train.test_loop import Killed, Stopping, course, kill, scorer
from tests.train.toys import COLUMNS, STATES, ToyModel, check, key, targets

TASKS = {"big": list(range(40)), "small": list(range(30, 43))}


def source(space: store.Space, **options: Any) -> MixedSource:
    chosen = StreamOptions(**{"batch_size": 6, "seed": 1, "window": 2, "ahead": 0, **options})
    return MixedSource(
        {
            name: StoreSource(space, [key(i) for i in ids], targets([i % 2 for i in ids]), STATES, COLUMNS, chosen)
            for name, ids in TASKS.items()
        }
    )


def test_batches_are_of_one_task_and_all_come_once(space: store.Space) -> None:
    mixed, turns = source(space), []
    for _ in range(2):
        seen: dict[str, list[int]] = {name: [] for name in TASKS}
        epoch = len(turns)
        for batch in mixed.epochs(epoch, epoch + 1):
            check(batch, TASKS[batch.task], "float16")
            seen[batch.task] += batch.index.tolist()
        assert {n: sorted(i) for n, i in seen.items()} == {n: list(range(len(ids))) for n, ids in TASKS.items()}
        turns.append(mixed.order.turns(epoch).tolist())
    assert turns[0] != turns[1] and sorted(turns[0]) == sorted(turns[1]) == [0] * 7 + [1] * 3
    assert [b.task for b in mixed.sequential()] == ["big"] * 7 + ["small"] * 3
    whole = [(b.task, b.index.tolist()) for b in mixed.epochs(0, 3)]
    assert [(b.task, b.index.tolist()) for b in source(space).epochs(1, 3, 4)] == whole[14:]  # the middle of an epoch


def test_the_order_numbers_samples_task_after_task(space: store.Space) -> None:
    mixed = source(space)
    batches = [(b.index + (40 if b.task == "small" else 0)).tolist() for b in mixed.epochs(2, 3)]
    assert [b.tolist() for b in mixed.order.epoch(2)] == batches and len(mixed) == 10 and mixed.n == 53
    assert sorted(np.concatenate(mixed.order.sequential())) == list(range(53))


def test_ranks_take_the_same_turns(space: store.Space) -> None:
    alone = [(b.task, b.index.tolist()) for b in source(space).epochs(0, 2)]
    shares = [[(b.task, b.index.tolist()) for b in source(space, rank=r, world=2).epochs(0, 2)] for r in range(2)]
    assert [(name, one + two) for (name, one), (_, two) in zip(*shares, strict=True)] == alone


def test_tasks_are_drawn_in_proportion() -> None:
    """Over many epochs the first batch is of a task as often as the task has batches."""
    order = MixedOrder.of([Order(np.zeros(n, np.int64), 10, 3) for n in (300, 100)])
    first = np.array([order.turns(epoch)[0] for epoch in range(2000)])
    assert abs(first.mean() - 0.25) < 0.03


def told() -> MixedScorer:
    return MixedScorer({name: scorer() for name in TASKS})


def train(space: store.Space, run: Path, stop: int | None = None) -> dict[str, Any]:
    first: Any = source(space) if stop is None else Stopping(source(space), stop, kill)  # type: ignore[arg-type]
    options = FitOptions(epochs=3, lr=1e-2, checkpoint_every=2)
    return fit(ToyModel(), first, source(space), source(space), options, run, told, progress=False)


@pytest.mark.parametrize("stop", [1, 5, 17])
def test_a_run_goes_on(space: store.Space, tmp_path: Path, stop: int) -> None:
    """Bit for bit, though the store was compacted in between."""
    straight = train(space, tmp_path / "straight")
    with pytest.raises(Killed):
        train(space, tmp_path / "cut", stop)
    before = source(space).order
    compact(space)
    assert source(space).order.digest() != before.digest()
    found = train(space, tmp_path / "cut")
    assert course(tmp_path / "cut") == course(tmp_path / "straight")
    assert found["test"] == straight["test"] and found["layout"] == straight["layout"] == before.layout()
    scores = straight["test"]
    assert scores.keys() == {"big.accuracy", "small.accuracy", "average"}
    assert scores["average"] == pytest.approx((scores["big.accuracy"] + scores["small.accuracy"]) / 2)
