"""Several training processes see the batches of one, and take the same steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.store.errors import UserError
from pipeline.train.data.store_source import StoreSource, StreamOptions
from pipeline.train.fit.loop import FitOptions, NotFinite, fit
from pipeline.train.fit.ranks import Ranks
from tests import forks
from tests.pipeline.test_errors import run
from tests.store.servers import free_port
from tests.train.test_loop import SPACE, scorer, source
from tests.train.toys import Told, ToyModel


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, checkpoints: Any, table: Path) -> Path:
    store = tmp_path_factory.mktemp("ranks") / "store"
    words = ["--text", "first", "--text-pair", "second", "--label", "label"]
    result = run(
        "extract", "--model", checkpoints["bert"], "--task", table, *words, "--for", "lst,probe", "--store", store
    )
    assert result.exit_code == 0, result.output
    return store


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("grouped", [False, True])
def test_ranks_see_together_what_one_process_sees(stored: Path, world: int, grouped: bool) -> None:
    from pipeline.store import Store

    (space,) = Store.open(stored).spaces()
    table = space.load_table("pairs", "train")
    options: dict[str, Any] = {"batch_size": 10, "seed": 3, "block_bytes": 4000, "group_by_length": grouped}

    def epoch(rank: int, of: int, number: int) -> list[np.ndarray]:
        source = StoreSource(space, table.keys, None, ["encoder.1"], (), StreamOptions(rank=rank, world=of, **options))
        return [batch.index for batch in source.epoch(number)]

    for number in range(2):
        alone = epoch(0, 1, number)
        shares = [epoch(rank, world, number) for rank in range(world)]
        assert all(len(s) == len(alone) for s in shares)
        for place, batch in enumerate(alone):
            assert np.concatenate([s[place] for s in shares]).tolist() == batch.tolist()
        assert sorted(np.concatenate(alone).tolist()) == list(range(len(table.keys)))


def forked(monkeypatch: pytest.MonkeyPatch, work: Callable[[int], int]) -> list[int]:
    """`work(rank)` in two forks of this process, which find each other as ranks; the exit status of each."""
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(free_port())), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)

    def as_rank(rank: int) -> int:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return work(rank)

    children = [forks.begun(partial(as_rank, rank)) for rank in (0, 1)]
    return [forks.ended(child) for child in children]


@forks.needed
@pytest.mark.parametrize("launcher", ["fork", pytest.param("torchrun", marks=pytest.mark.matrix)])
def test_two_processes_take_the_steps_of_one(
    stored: Path, tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    """`torchrun --nproc-per-node 2 -m pipeline train …`, with a last batch too small for both."""
    options = ["train", "--task", table, "--tuner", "probe", "--epochs", 1, "--batch-size", 19,
               "--store", stored, "--device", "cpu"]  # fmt: skip
    two = [*map(str, options), "--out", str(tmp_path / "two"), "--json"]
    if launcher == "fork":
        with monkeypatch.context() as patch:
            assert forked(patch, lambda rank: run(*two).exit_code) == [0, 0]
    else:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [*launch, "-m", "pipeline", *two]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    assert run(*options, "--out", tmp_path / "one").exit_code == 0

    def losses(out: str) -> list[float]:
        lines = (tmp_path / out / "log.jsonl").read_text().splitlines()
        return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]

    np.testing.assert_allclose(losses("two"), losses("one"), rtol=2e-4)
    names = {p.name for p in (tmp_path / "one").iterdir()}
    assert {p.name for p in (tmp_path / "two").iterdir()} == names


@forks.needed
def test_a_loss_that_is_not_finite_on_one_rank_stops_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither waits for the other; both say why."""
    monkeypatch.setattr("pipeline.store.read_block", SPACE.read_block)

    def work(rank: int) -> int:
        try:
            model = ToyModel(poison=3 if rank else None)
            options = FitOptions(epochs=2, lr=0.01)
            fit(model, source(), None, None, options, tmp_path / "run", scorer, progress=False)
        except NotFinite as error:
            (tmp_path / f"{rank}").write_text(str(error))
            return 7
        return 1

    assert forked(monkeypatch, work) == [7, 7]
    assert "another rank's loss is not finite at step 3" in (tmp_path / "0").read_text()
    assert "the loss is nan at step 3" in (tmp_path / "1").read_text()


class Stated(ToyModel):
    """With running statistics behind the dropout, which ranks draw apart, and a parameter that no batch reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = torch.nn.Parameter(torch.ones(3))
        self.body.insert(3, torch.nn.BatchNorm1d(16))

    def trainable_state(self) -> dict[str, Any]:
        return {name: value.clone() for name, value in self.state_dict().items() if name != "frozen"}


@forks.needed
def test_ranks_agree_and_leave_alone_what_one_process_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.store.read_block", SPACE.read_block)

    def work(rank: int) -> int:
        options, model = FitOptions(epochs=3, lr=0.01, weight_decay=0.1, patience=1), Stated()
        figures = iter([0.1, 0.2, 0.3] if rank == 0 else [0.3, 0.2, 0.1])  # alone, rank 1 would stop early
        held, told = source(range(80, 95)), partial(Told, lambda p, y, given=figures: {"average": next(given)})
        done = fit(model, source(), held, None, options, tmp_path / "run", told, progress=False)
        torch.save(model.state_dict(), tmp_path / f"{rank}.pt")
        return 0 if done["best_epoch"] == 3 else 2

    assert forked(monkeypatch, work) == [0, 0]
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one["body.3.running_mean"].abs().max() > 0 and torch.equal(one["idle"], torch.ones(3))


def test_a_wrong_environment_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun"):
        Ranks.from_environment()
    monkeypatch.setenv("RANK", "two")
    with pytest.raises(UserError, match="integers"):
        Ranks.from_environment()
