"""Small stand-ins for the tests of this folder: samples with known numbers, a space in memory, a model with dropout."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.extract.batch import Batch
from pipeline.extract.encoding import decode, encode
from pipeline.store.format.samples import Samples
from pipeline.train.configs import PooledConfig
from pipeline.train.data.targets import Targets
from pipeline.train.objectives.base import Answers, Scorer
from pipeline.train.objectives.classification import Classification
from pipeline.train.objectives.scores import ScalarScorer

STATES = ("encoder.0", "encoder.2", "decoder.1")
COLUMNS = ("encoder.ids", "decoder.ids")
WIDTH = 5


def key(i: int) -> str:
    return f"{i:032x}"


def sample(i: int) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """Sample `i`: lengths by stream and rows by name; the same numbers wherever they are asked for."""
    draws = np.random.default_rng(i)
    lengths = {"encoder": int(draws.integers(1, 9)), "decoder": int(draws.integers(1, 4))}
    rows: dict[str, np.ndarray] = {}
    for name in STATES:
        rows[name] = draws.normal(size=(lengths[name.split(".")[0]], WIDTH)).astype(np.float32)
    if i % 5 == 0:  # a row that float16 can only hold with an exponent
        rows["encoder.2"][0] *= 1e5
    for name in COLUMNS:
        rows[name] = draws.integers(0, 1000, lengths[name.split(".")[0]]).astype(np.int32)
    return lengths, rows


def samples(ids: list[int], fmt: str = "float32") -> Samples:
    made = [sample(i) for i in ids]
    return Samples(
        [key(i) for i in ids],
        {s: np.array([m[0][s] for m in made], np.int64) for s in ("encoder", "decoder")},
        {name: encode(torch.from_numpy(np.concatenate([m[1][name] for m in made])), fmt).numpy() for name in STATES},
        {name: np.concatenate([m[1][name] for m in made]) for name in COLUMNS},
    )


def check(batch: Batch, ids: list[int], fmt: str = "float32") -> None:
    """The batch holds exactly the samples `ids[index]`, decoded."""
    want = samples([ids[i] for i in batch.index], fmt)
    assert batch.states.keys() == set(STATES)
    for name in STATES:
        assert batch.states[name].dtype == torch.float32
        # Encoding works row by row, so encoding the samples alone gives the same numbers.
        assert torch.equal(batch.states[name], decode(want.states[name])), name
    for name in COLUMNS:
        assert batch.columns[name].dtype == torch.int64
        assert torch.equal(batch.columns[name], torch.from_numpy(want.columns[name]).long())
    for stream, lengths in want.lengths.items():
        assert np.array_equal(batch.lengths[stream], lengths)


@dataclass(frozen=True)
class ToyBlock:
    number: int
    nbytes: int


@dataclass
class ToyPlan:
    blocks: list[ToyBlock]
    block: np.ndarray
    slot: np.ndarray


@dataclass
class ToySpace:
    """Blocks in memory with a count of reads; `fail` is the number of a block that cannot be read."""

    sizes: list[int]
    fmt: str = "float32"
    fail: int | None = None
    delay: float = 0.0
    reads: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        ends = np.cumsum(self.sizes)
        self.held = [list(range(end - size, end)) for end, size in zip(ends, self.sizes, strict=True)]

    def plan(self, keys: list[str], states: list[str], columns: list[str], max_block_bytes: int = 0) -> ToyPlan:
        where = {key(i): (b, s) for b, ids in enumerate(self.held) for s, i in enumerate(ids)}
        place = np.array([where[k] for k in keys])
        return ToyPlan([ToyBlock(b, 1000) for b in range(len(self.sizes))], place[:, 0], place[:, 1])

    def read_block(self, block: ToyBlock) -> Samples:
        from pipeline.store.errors import StoreError

        time.sleep(self.delay)
        self.reads.append(block.number)
        if block.number == self.fail:
            raise StoreError(f"block {block.number} is damaged")
        return samples(self.held[block.number], self.fmt)


def targets(labels: Sequence[Any]) -> Targets:
    """Labels as a classification's targets."""
    return Targets(Classification(PooledConfig(), Answers.of_classes(2)), labels)


class Told(Scorer):
    """What `figures` makes of the predictions and the truth of a split."""

    def __init__(self, figures: Callable[[list[Any], list[Any]], dict[str, float]]) -> None:
        self.figures, self.seen = figures, ScalarScorer(())

    def update(self, out: dict[str, Any], batch: Batch) -> None:
        self.seen.update(out, batch)

    def merge(self, other: Any) -> None:
        self.seen.merge(other.seen)

    def compute(self) -> dict[str, float]:
        parts = self.seen._seen
        index, guess, truth = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = index.argsort()
        return self.figures(guess[order].tolist(), truth[order].tolist())


class ToyModel(nn.Module):
    """Mean pooling, dropout, a linear classifier; `poison` makes the loss NaN at that training step (from 1)."""

    def __init__(self, seed: int = 0, poison: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 2))
        self.norm = nn.LayerNorm(WIDTH)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.poison, self.calls = poison, 0

    def forward(self, batch: Batch) -> Tensor:
        grid = batch.layout("encoder").pad(batch.states["encoder.0"])
        return self.body(self.norm(grid.sum(1) / batch.layout("encoder").lengths[:, None]))

    def loss(self, batch: Batch) -> Tensor:
        assert batch.targets is not None
        self.calls += 1
        loss = nn.functional.cross_entropy(self(batch), batch.targets["label"])
        return loss * float("nan") if self.calls == self.poison else loss

    def weight(self, batch: Batch) -> float:
        return float(len(batch))

    def begin_step(self, step: int, steps: int, an_epoch: int) -> None:
        pass

    def stepped(self) -> None:
        pass

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        return {"label": self(batch).argmax(-1).cpu()}

    def trainable_state(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self.named_parameters() if p.requires_grad}

    def load_trainable(self, state: dict[str, Tensor]) -> None:
        self.load_state_dict(state, strict=False)
