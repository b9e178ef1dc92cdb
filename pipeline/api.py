"""The public Python API: a store is opened, and what is done with it are its methods. They take the recipe's options as
keywords and raise `UserError`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.extract.tasks.base import Task
from pipeline.importing import uncollected
from pipeline.lookup.store_folder import store_place
from pipeline.option_names import named
from pipeline.owners import recipe_of
from pipeline.store import Space, Store
from pipeline.store.errors import NoStore, UserError

if TYPE_CHECKING:
    from pipeline.runs import Run
    from pipeline.train.data.iterable import Stream

# What imports torch is imported by those who need it: a store is opened and looked at without.
Say = Callable[[str], None]


def _silent(text: str) -> None:
    """Says nothing."""


def extract(task: str | Task = "", *, say: Say = _silent, **options: Any) -> dict[str, Any]:
    """Run the backbone once over a task's rows and store the states. `task`: a name, a table's path, or a `Task` with
    rows made in Python. Returns what was done (space, rows, samples computed, bytes)."""
    with uncollected():
        from pipeline.checks.unused_options import TABLE_OPTIONS, refuse_for_command
        from pipeline.commands.extract import run_extract

    options = named(options, "extract()")
    refuse_for_command("extract", options)
    if isinstance(task, Task) and (vain := [option for option in TABLE_OPTIONS if option in options]):
        raise UserError(f"extract(): {vain[0]}: it says how a table is read, and here a Task with its rows is given")
    name = task.spec.name if isinstance(task, Task) else task
    recipe = recipe_of("extract", ("extract()", {**options, "task": name}))
    return run_extract(recipe, say, quiet=say is _silent, task=task if isinstance(task, Task) else None)


def train(*, say: Say = _silent, **options: Any) -> dict[str, Any]:
    """Train a tuner from the store. Returns the metrics and the run's folder."""
    with uncollected():
        from pipeline.checks.unused_options import refuse_for_command
        from pipeline.commands.train import run_train

    options = named(options, "train()")
    refuse_for_command("train", options)
    return run_train(recipe_of("train", ("train()", options)), say, quiet=say is _silent)


def stream(
    *,
    states: str | Sequence[str] | Mapping[str, str | Sequence[str]],
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
    as in `train`; `device` ("cpu" if not given) is where the batches are. With several backbones
    (`model="a=NAME,b=NAME"`) `states` has a name or several for each slot; `batch.of("a")` is the batch of its distinct
    samples, and `batch.ids["a"]` (B,) says which of them each row has.

    A `Batch` has `mean`, `max`, `first`, `last` and `pad` of a state's rows; `states[name]` (rows, width) float32 as
    they lie; `targets`: `label` (B,) for a class or a number, `labels` (B, classes) for several, for tags `tag`, one a
    position (-100 where no word begins); None where rows have none. Raises MissingStates for states that were not
    extracted, UserError for options that are wrong or would do nothing.
    """
    with uncollected():
        from pipeline.checks.unused_options import refuse_for_stream, refuse_host_memory
        from pipeline.jobs.streams import stream_source
        from pipeline.lookup.recipe import device_of
        from pipeline.train.data.iterable import Stream

    options = named(options, "stream()")
    refuse_for_stream(options)
    recipe = recipe_of("train", ("stream()", {"device": "cpu", **options, "batch_size": batch_size, "seed": seed}))
    refuse_host_memory(recipe)
    device = device_of(recipe)
    source, name = stream_source(recipe, split, states, batch_size, device)
    return Stream(source, epochs, device, name)


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
        from pipeline.runs import load_run

        return load_run(train(say=say, store=self.store.where, **options)["run"])

    def stream(self, **options: Any) -> Stream:
        """Shuffled batches of any states of a task, see `stream`."""
        return stream(store=self.store.where, **options)


def open_store(path: str | Path = "", create: bool = False) -> FeatureStore:
    """The store at `path` (default: $PIPELINE_STORE, else ./activations); with `create` it is made where there is none.
    StoreError when there is none, or something else."""
    try:
        return FeatureStore(Store.open(store_place(str(path)), create=create))
    except NoStore as error:
        raise NoStore(f"{str(error).split(': ')[0]}: check the path, or make one: open_store(…, create=True)") from None
