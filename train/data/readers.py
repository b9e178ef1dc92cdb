"""Who reads blocks: Dask, one task a block (a task costs about 0.3 ms, a block is tens of megabytes).

On this machine each task runs in one of a few threads; with the address of a `distributed` scheduler it runs on that
cluster, whose workers must see the store under the same path.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from pipeline import store
from pipeline.store.errors import UserError


class BlockReader(Protocol):
    """Reads blocks in the background until closed."""

    def submit(self, block: Any) -> Any:
        """Begin to read `block`. The future has `result()` → Samples and `cancel()`."""
        ...

    def close(self) -> None:
        """Drop what has not begun, wait for what has; no thread, task or connection is left."""
        ...


class ThreadReader:
    """Dask's synchronous scheduler in each of `workers` threads: no task waits for another block's."""

    def __init__(self, workers: int) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="read-block")

    def submit(self, block: Any) -> Future[Any]:
        return self._pool.submit(_read, block)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class ClusterReader:
    """The workers of a `distributed` scheduler."""

    def __init__(self, address: str) -> None:
        try:
            from distributed import Client
        except ImportError:
            raise UserError(
                "a scheduler address needs distributed: pip install 'activation-pipeline[distributed]'"
            ) from None
        try:
            self._client = Client(address, timeout=10, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            raise UserError(f"no Dask scheduler answers at {address} ({error}): start one, or leave it out") from error

    def submit(self, block: Any) -> Any:
        return self._client.compute(_task(block))

    def close(self) -> None:
        self._client.close()


def _task(block: Any) -> Any:
    import dask  # late: predict and evaluate of a live backbone read no block

    return dask.delayed(store.read_block, pure=False, traverse=False)(block)


def _read(block: Any) -> Any:
    import dask

    # The function: by the name "synchronous" Dask would first import `distributed`, where it is installed.
    return _task(block).compute(scheduler=dask.get)


def make_reader(scheduler: str | None, workers: int | None = None) -> BlockReader:
    """A reader on the cluster at `scheduler`, else in `workers` threads (Dask's `num_workers`, else up to 4)."""
    if scheduler is not None:
        return ClusterReader(scheduler)
    import dask

    return ThreadReader(workers or dask.config.get("num_workers", None) or min(4, os.cpu_count() or 1))
