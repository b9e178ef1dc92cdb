"""The public Python API: a store is opened, and what is done with it are its methods. They take the recipe's options as
keywords and raise `UserError`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.checks.doubtful_rows import limit_doubt
from pipeline.checks.unused_options import TABLE_OPTIONS, refuse_for_command, refuse_for_stream, refuse_host_memory
from pipeline.commands.extract import run_extract
from pipeline.commands.train import run_train
from pipeline.extract.tasks.base import Task, TaskSpec
from pipeline.jobs.extracted import first_views, limited, views_of
from pipeline.jobs.job import found_tables
from pipeline.jobs.slots import refuse_slots
from pipeline.jobs.sources import parse_size
from pipeline.lookup.objective import plain_objective
from pipeline.lookup.recipe import device_of, find_space, store_path
from pipeline.owners import recipe_of
from pipeline.recipe import Recipe, named
from pipeline.runs import Run, load_run
from pipeline.store import Space, Store
from pipeline.store.errors import Notice, UserError
from pipeline.train.data.iterable import Stream
from pipeline.train.data.store_source import StoreSource, StreamOptions
from pipeline.train.data.targets import Targets

Say = Callable[[str], None]


def _silent(text: str) -> None:
    """Says nothing."""


def extract(task: str | Task = "", *, say: Say = _silent, **options: Any) -> dict[str, Any]:
    """Run the backbone once over a task's rows and store the states. `task`: a name, a table's path, or a `Task` with
    rows made in Python. Returns what was done (space, rows, samples computed, bytes)."""
    options = named(options, "extract()")
    refuse_for_command("extract", options)
    if isinstance(task, Task) and (vain := [option for option in TABLE_OPTIONS if option in options]):
        raise UserError(f"extract(): {vain[0]}: it says how a table is read, and here a Task with its rows is given")
    name = task.spec.name if isinstance(task, Task) else task
    recipe = recipe_of("extract", ("extract()", {**options, "task": name}))
    return run_extract(recipe, say, quiet=say is _silent, task=task if isinstance(task, Task) else None)


def train(*, say: Say = _silent, **options: Any) -> dict[str, Any]:
    """Train a tuner from the store. Returns the metrics and the run's folder."""
    options = named(options, "train()")
    refuse_for_command("train", options)
    return run_train(recipe_of("train", ("train()", options)), say, quiet=say is _silent)


def stream(
    *,
    states: str | Sequence[str],
    split: str = "train",
    batch_size: int = 64,
    epochs: int = 1,
    seed: int = 0,
    **options: Any,
) -> Stream:
    """Shuffled batches of any states of a task, for a side network of your own: a `Stream`, which can be iterated again
    and again, in a loop or in the workers of a `DataLoader` (`batch_size=None`). `states`: a name such as `encoder.5`,
    or several (`pipeline store status` lists them). `epochs`: that one iteration passes through. Further options choose
    task, store and space, and say how they are read (`tier`, `host_memory`, `scheduler`, `window`, `group_by_length`),
    as in `train`; `device` ("cpu" if not given) is where the batches are.

    A `Batch` has `mean`, `max`, `first`, `last` and `pad` of a state's rows; `states[name]` (rows, width) float32 as
    they lie; `targets`: `label` (B,) for a class or a number, `labels` (B, classes) for several, for tags `tag`, one a
    position (-100 where no word begins); None where rows have none. Raises MissingStates for states that were not
    extracted, UserError for options that are wrong or would do nothing.
    """
    options = named(options, "stream()")
    refuse_for_stream(options)
    recipe = recipe_of("train", ("stream()", {"device": "cpu", **options, "batch_size": batch_size, "seed": seed}))
    refuse_host_memory(recipe)
    refuse_slots(recipe, "stream()")
    device = device_of(recipe)
    found = find_space(recipe)
    assert isinstance(found.space, Space)
    tables = found_tables(recipe, found)
    if split not in tables:
        raise UserError(f"the store has no {split} rows of {recipe.task}; it has: {', '.join(tables)}")
    chosen = first_views(tables[split], recipe.views) if split == "train" else tables[split]
    if sentence := limit_doubt(recipe.limit, chosen, views_of(chosen)):
        warnings.warn(sentence, Notice, stacklevel=2)
    table = limited(chosen, recipe.limit)
    spec = TaskSpec.from_dict(table.header["spec"])
    unlabelled = sum(label is None for label in table.labels)
    if 0 < unlabelled < len(table.labels):
        sentence = f"{unlabelled} of {len(table.labels)} {split} rows have no label: the batches have no targets"
        warnings.warn(sentence, Notice, stacklevel=2)
    targets = None if unlabelled else Targets(plain_objective(spec), table.labels, table.metas or None)
    names = [states] if isinstance(states, str) else list(states)
    source = StoreSource(
        found.space, table.keys, targets, names, found.backbone.columns, StreamOptions(
            batch_size, seed, recipe.window, bool(recipe.group_by_length), tier=recipe.tier, device=device,
            host_bytes=None if recipe.host_memory is None else parse_size(recipe.host_memory),
            scheduler=recipe.scheduler, pin=device.type == "cuda",
        )
    )  # fmt: skip
    return Stream(source, epochs, device, f"{spec.name} {split}")


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

    def stream(self, **options: Any) -> Stream:
        """Shuffled batches of any states of a task, see `stream`."""
        return stream(store=self.store.where, **options)


def open_store(path: str | Path = "", create: bool = False) -> FeatureStore:
    """The store at `path` (default: $PIPELINE_STORE, else ./activations); with `create` it is made where there is none.
    StoreError when there is none, or something else."""
    return FeatureStore(Store.open(store_path(Recipe(store=str(path))), create=create))
