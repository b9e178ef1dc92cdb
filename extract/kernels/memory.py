"""Large buffers that come and go with every batch: keep their memory instead of giving it back to the system.

glibc maps each large buffer anew and the system zeroes it page by page at first touch, which on a CPU costs more than
what is then done with it: gathering rows into fresh memory ran at 1.6 GB/s against 9 into memory used before.
"""

from __future__ import annotations

import ctypes
from functools import cache

from pipeline.extract.kernels import enabled

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # <malloc.h>
KEEP_BYTES = (1 << 31) - 1  # at the end of the heap; the largest that mallopt takes


@cache
def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees for its next buffers; returns whether it does.

    Asked for by whatever computes, once: extraction, training, plan, evaluate, predict and generate. It is a setting
    of the whole process. `return_freed_memory` gives back what is free. glibc only: elsewhere, and where kernels are
    switched off, nothing changes.
    """
    if not enabled():
        return False
    # One arena, so that what the reading thread freed serves the computing one; arenas of threads are small, too.
    settings = ((_ARENA_MAX, 1), (_TRIM_THRESHOLD, KEEP_BYTES), (_MMAP_MAX, 0))
    return all(_libc("mallopt", what, value) for what, value in settings)


def keeps_freed_memory() -> bool:
    """Whether this process does so already; does not ask for it."""
    return bool(keep_freed_memory.cache_info().currsize) and keep_freed_memory()


def return_freed_memory() -> None:
    """Give what is free back to the system: when a tier is emptied, or a long run has ended."""
    if keeps_freed_memory():
        _libc("malloc_trim", 0)


def _libc(name: str, *values: int) -> int:
    try:
        return int(getattr(ctypes.CDLL(None), name)(*values))
    except (OSError, AttributeError, TypeError):
        return 0
