"""The functions of the public Python API. They take the recipe's options as keywords and raise `UserError`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from extract.backbones import Batch
from extract.tasks.base import Task, TaskSpec
from pipeline.extracting import run_extract
from pipeline.job import limited, tables_of
from pipeline.recipe import Recipe
from pipeline.resolve import find_space, store_path
from pipeline.runs import Run, load_run
from pipeline.training import run_train
from store import Space, Store
from store.errors import UserError
from train.objectives import Answers
from train.objectives.classification import Classification
from train.objectives.pooled import PooledConfig
from train.objectives.regression import Regression
from train.stream import StoreSource
from train.targets import Targets

Say = Callable[[str], None]


def _silent(text: str) -> None:
    """Says nothing."""


def open_store(path: str = "", create: bool = False) -> Store:
    """The store at `path` (default: $PIPELINE_STORE, else ./activations). StoreError when it is none."""
    return Store.open(store_path(Recipe(store=path)), create=create)


def extract(task: str | Task = "", *, say: Say = _silent, **options: Any) -> dict[str, Any]:
    """Run the backbone once over a task's rows and store the states. `task`: a name, a table's path, or a `Task` with
    rows made in Python. Returns what was done (space, rows, samples computed, bytes)."""
    name = task.spec.name if isinstance(task, Task) else task
    recipe = Recipe.from_mapping({**options, "task": name}, "extract()")
    return run_extract(recipe, say, quiet=say is _silent, task=task if isinstance(task, Task) else None)


def train(*, say: Say = _silent, **options: Any) -> dict[str, Any]:
    """Train a tuner from the store. Returns the metrics and the run's folder."""
    return run_train(Recipe.from_mapping(options, "train()"), say, quiet=say is _silent)


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
    (`pipeline store status` lists them). Further options choose task, store and space as in `train`.

    Yields `Batch`: `states[name]` (rows, width) float32, `lengths[stream]` (B,), `targets["label"]` (B,). Raises
    MissingStates for states that were not extracted.
    """
    recipe = Recipe.from_mapping({**options, "batch_size": batch_size, "seed": seed}, "stream()")
    found = find_space(recipe)
    assert isinstance(found.space, Space)
    tables = tables_of(recipe, found)
    if split not in tables:
        raise UserError(f"the store has no {split} rows of {recipe.task}; it has: {', '.join(tables)}")
    table = limited(tables[split], recipe.limit)
    spec = TaskSpec.from_dict(table.header["spec"])
    plain = Classification if spec.kind == "classification" else Regression
    targets = None if None in table.labels else Targets(plain(PooledConfig(), Answers()), table.labels)
    source = StoreSource(
        found.space, table.keys, targets, list(states), found.family.columns, batch_size=batch_size, seed=seed,
        window=recipe.window,
    )  # fmt: skip
    yield from source.epochs(0, epochs)


def evaluate(run: str | Path | Run, split: str = "test") -> dict[str, float]:
    """Metrics of a finished run on `split`, from the store."""
    return (run if isinstance(run, Run) else load_run(run)).evaluate(split)


def predict(run: str | Path | Run, texts: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Label and probability, or a number, for each tuple of text fields, the backbone run live."""
    return (run if isinstance(run, Run) else load_run(run)).predict(texts)
