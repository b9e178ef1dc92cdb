"""Extract once on the big GPU, train anywhere: the public Python API.

    import pipeline

    features = pipeline.open_store("features", create=True)
    features.extract(model="minilm", task="sst2", data="glue")
    run = features.train(task="sst2", tuner="lst", out="runs/mine")
    run.predict(["what a film"])
    for batch in features.stream(task="sst2", states="encoder.5", batch_size=32, epochs=2): ...

`pipeline.extract`, `pipeline.train` and `pipeline.store` are packages: how features are made, learned from and kept.

Options are the fields of `Recipe`, with the names of the command line.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.importing import uncollected

if TYPE_CHECKING:
    __version__: str
    from pipeline.api import FeatureStore as FeatureStore
    from pipeline.api import open_store as open_store
    from pipeline.extract.backbones.base import Backbone as Backbone
    from pipeline.extract.backbones.registry import register_backbone as register_backbone
    from pipeline.extract.batch import Batch as Batch
    from pipeline.extract.tasks.registry import register_task as register_task
    from pipeline.recipe import Recipe as Recipe
    from pipeline.runs import Run as Run
    from pipeline.runs import load_run as load_run
    from pipeline.store.errors import UserError as UserError
    from pipeline.store.space import Space as Space
    from pipeline.store.store import Store as Store
    from pipeline.train.data.iterable import Stream as Stream
    from pipeline.train.objectives.base import register_objective as register_objective
    from pipeline.train.tuners.base import Tuner as Tuner
    from pipeline.train.tuners.base import TunerConfig as TunerConfig
    from pipeline.train.tuners.base import register_tuner as register_tuner

if not Path(__file__).with_name("store").is_dir():
    raise ImportError(
        f"{__file__}: symbolic links were checked out as text files; clone again with `git clone -c "
        "core.symlinks=true` (on Windows with Developer Mode on), or install a wheel that was built elsewhere"
    )

# Imported when first used: the command line starts at once, torch is loaded when something needs it.
_HOMES = {
    "Batch": "pipeline.extract.batch",
    "Backbone": "pipeline.extract.backbones.base",
    "FeatureStore": "pipeline.api",
    "Recipe": "pipeline.recipe",
    "Run": "pipeline.runs",
    "Space": "pipeline.store.space",
    "Store": "pipeline.store.store",
    "Stream": "pipeline.train.data.iterable",
    "Tuner": "pipeline.train.tuners.base",
    "TunerConfig": "pipeline.train.tuners.base",
    "UserError": "pipeline.store.errors",
    "load_run": "pipeline.runs",
    "open_store": "pipeline.api",
    "register_backbone": "pipeline.extract.backbones.registry",
    "register_objective": "pipeline.train.objectives.base",
    "register_task": "pipeline.extract.tasks.registry",
    "register_tuner": "pipeline.train.tuners.base",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from pipeline.store.version import project_version

        return project_version()
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    with uncollected():
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
