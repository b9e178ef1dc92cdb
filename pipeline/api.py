"""The public Python API: a store is opened, and what is done with it are its methods. They take the recipe's options as
keywords and raise `UserError`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import get_worker_info

from pipeline.doubts import limit_doubt
from pipeline.extract.backbones import Batch
from pipeline.extract.tasks.base import Task, TaskSpec
from pipeline.extracting import run_extract
from pipeline.job import first_views, limited, parse_size, tables_of
from pipeline.owners import recipe_of
from pipeline.recipe import Recipe, named
from pipeline.resolve import device_of, find_space, store_path
from pipeline.runs import Run, load_run
from pipeline.store import Space, Store
from pipeline.store.errors import Notice, UserError
from pipeline.train.objectives import Answers
from pipeline.train.objectives.classification import Classification
from pipeline.train.objectives.pooled import PooledConfig
from pipeline.train.objectives.regression import Regression
from pipeline.train.stream import StoreSource
from pipeline.train.targets import Targets
from pipeline.training import run_train
from pipeline.unused import refuse_for_stream

Say = Callable[[str], None]


def _silent(text: str) -> None:
    """Says nothing."""


def extract(task: str | Task = "", *, say: Say = _silent, **options: Any) -> dict[str, Any]:
    """Run the backbone once over a task's rows and store the states. `task`: a name, a table's path, or a `Task` with
    rows made in Python. Returns what was done (space, rows, samples computed, bytes)."""
    name = task.spec.name if isinstance(task, Task) else task
    recipe = recipe_of("extract", ("extract()", {**options, "task": name}))
    return run_extract(recipe, say, quiet=say is _silent, task=task if isinstance(task, Task) else None)


def train(*, say: Say = _silent, **options: Any) -> dict[str, Any]:
    """Train a tuner from the store. Returns the metrics and the run's folder."""
    return run_train(recipe_of("train", ("train()", options)), say, quiet=say is _silent)


def stream(
    *,
    states: Sequence[str],
    split: str = "train",
    batch_size: int = 64,
    epochs: int = 1,
    seed: int = 0,
    **options: Any,
) -> Iterator[Batch]:
    """Shuffled batches of any states of a task, for a side network of your own. `states`: names such as `encoder.5`
    (`pipeline store status` lists them). Further options choose task, store and space, and say how they are read
    (`tier`, `host_memory`, `scheduler`, `window`, `group_by_length`), as in `train`; `device` ("cpu" if not given) is
    where the batches are.

    Yields `Batch`: `states[name]` (rows, width) float32, `lengths[stream]` (B,), `targets["label"]` (B,). The workers
    of a `DataLoader` (an iterable data set that calls this, `batch_size=None`) take turns, so that the loader hands out
    the same batches in the same order as one process. Raises MissingStates for states that were not extracted,
    UserError for options that are wrong or would do nothing.
    """
    options = named(options, "stream()")
    refuse_for_stream(options)
    recipe = recipe_of("train", ("stream()", {"device": "cpu", **options, "batch_size": batch_size, "seed": seed}))
    device = device_of(recipe)
    found = find_space(recipe)
    assert isinstance(found.space, Space)
    tables = tables_of(recipe, found)
    if split not in tables:
        raise UserError(f"the store has no {split} rows of {recipe.task}; it has: {', '.join(tables)}")
    chosen = first_views(tables[split], recipe.views) if split == "train" else tables[split]
    if sentence := limit_doubt(recipe.limit, chosen):
        warnings.warn(sentence, Notice, stacklevel=2)
    table = limited(chosen, recipe.limit)
    spec = TaskSpec.from_dict(table.header["spec"])
    plain = Classification if spec.kind == "classification" else Regression
    targets = None if None in table.labels else Targets(plain(PooledConfig(), Answers()), table.labels)
    worker = get_worker_info()
    source = StoreSource(
        found.space, table.keys, targets, list(states), found.family.columns, batch_size=batch_size, seed=seed,
        window=recipe.window, group_by_length=bool(recipe.group_by_length), tier=recipe.tier, device=device,
        host_bytes=None if recipe.host_memory is None else parse_size(recipe.host_memory), scheduler=recipe.scheduler,
        pin=device.type == "cuda", share=(worker.id, worker.num_workers) if worker else (0, 1),
    )  # fmt: skip
    return (batch.to(device) for batch in source.epochs(0, epochs))


class FeatureStore:
    """A store and what is done with it. `store` is the store itself: its feature spaces, tables and upkeep."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __repr__(self) -> str:
        return f"FeatureStore({self.store.where!r})"

    def spaces(self) -> list[Space]:
        """Its feature spaces."""
        return self.store.spaces()

    def extract(self, task: str | Task = "", *, say: Say = _silent, **options: Any) -> dict[str, Any]:
        """Run the backbone once over a task's rows and store the states, see `extract`."""
        return extract(task, say=say, store=self.store.where, **options)

    def train(self, *, say: Say = _silent, **options: Any) -> Run:
        """Train a tuner from the store. Returns the finished run; `Run.metrics` are its scores."""
        return load_run(train(say=say, store=self.store.where, **options)["run"])

    def stream(self, **options: Any) -> Iterator[Batch]:
        """Shuffled batches of any states of a task, see `stream`."""
        return stream(store=self.store.where, **options)


def open_store(path: str | Path = "", create: bool = False) -> FeatureStore:
    """The store at `path` (default: $PIPELINE_STORE, else ./activations); with `create` it is made where there is none.
    StoreError when there is none, or something else."""
    return FeatureStore(Store.open(store_path(Recipe(store=str(path))), create=create))
