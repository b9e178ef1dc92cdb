"""What is installed: a small install looks after a store, the full one does everything."""

from __future__ import annotations

import importlib.util

from pipeline.store.errors import UserError

INSTALL = "pip install activation-pipeline"  # where it was installed without its dependencies, it brings them
# Modules that `INSTALL` brings, of its own dependencies and of theirs (aiohttp, of fsspec[http]).
MODULES = (
    *("PIL", "aiohttp", "click", "dask", "datasets", "fsspec", "google_crc32c", "huggingface_hub", "ml_dtypes"),
    *("numcodecs", "numpy", "psutil", "pyarrow", "safetensors", "scipy", "sentencepiece", "sklearn", "threadpoolctl"),
    *("timm", "torch", "torchvision", "tqdm", "transformers", "xxhash", "yaml", "zarr"),
)


def missing() -> list[str]:
    """Those that are not there."""
    return [name for name in MODULES if importlib.util.find_spec(name) is None]


def full_install(error: ModuleNotFoundError) -> UserError | None:
    """What to say where one of them is needed; None for any other module, such as a user's own."""
    if error.name not in MODULES:
        return None
    return UserError(f"this command needs the full install, {error.name} is missing here: {INSTALL}")
