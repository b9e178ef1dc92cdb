"""Extract once on the big GPU, train anywhere: the public Python API.

    import pipeline

    pipeline.extract(model="minilm", task="sst2", data="glue")
    run = pipeline.train(model="minilm", task="sst2", tuner="lst", out="runs/mine")
    pipeline.load_run("runs/mine").predict([("what a film",)])
    for batch in pipeline.stream(task="sst2", states=["encoder.5"], batch_size=32, epochs=2): ...

Options are the fields of `Recipe`, with the names of the command line.
"""

from __future__ import annotations

import importlib.util
import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Threads that wait for each other spin for milliseconds by default. Where another program (or our own thread that makes
# the next batch) holds the processor, a step of small products then takes several times as long. Read by OpenMP when
# torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _check_packages() -> None:
    """The top-level names `extract`, `store` and `train` are common; a script of that name would hide ours."""
    ours = Path(__file__).resolve().parent.parent
    for name in ("extract", "store", "train"):
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin is None or origin != ours / name / "__init__.py":
            from sys import exit, stderr

            message = (
                f"error: `import {name}` finds {origin or 'nothing'}, not this project's package; rename that file or "
                "folder, or run from another directory\n"
            )
            stderr.write(message)
            exit(2)


_check_packages()

if TYPE_CHECKING:
    from pipeline.api import evaluate as evaluate
    from pipeline.api import extract as extract
    from pipeline.api import load_run as load_run
    from pipeline.api import open_store as open_store
    from pipeline.api import predict as predict
    from pipeline.api import stream as stream
    from pipeline.api import train as train
    from pipeline.extract.backbones.base import Family as Family
    from pipeline.extract.backbones.batch import Batch as Batch
    from pipeline.recipe import Recipe as Recipe
    from pipeline.runs import Run as Run
    from pipeline.store.errors import UserError as UserError
    from pipeline.store.space import Space as Space
    from pipeline.store.store import Store as Store
    from pipeline.train.tuners.base import Tuner as Tuner
    from pipeline.train.tuners.base import TunerConfig as TunerConfig
    from pipeline.train.tuners.base import register as register

# Imported when first used: the command line starts at once, torch is loaded when something needs it.
_HOMES = {
    "Batch": "pipeline.extract.backbones.batch",
    "Family": "pipeline.extract.backbones.base",
    "Recipe": "pipeline.recipe",
    "Run": "pipeline.runs",
    "Space": "pipeline.store.space",
    "Store": "pipeline.store.store",
    "Tuner": "pipeline.train.tuners.base",
    "TunerConfig": "pipeline.train.tuners.base",
    "UserError": "pipeline.store.errors",
    "evaluate": "pipeline.api",
    "extract": "pipeline.api",
    "load_run": "pipeline.api",
    "open_store": "pipeline.api",
    "predict": "pipeline.api",
    "register": "pipeline.train.tuners.base",
    "stream": "pipeline.api",
    "train": "pipeline.api",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
