"""Rates of a disk; without torch, so that `pipeline doctor` has them everywhere."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from timeit import repeat

import numpy as np

DISK_SAMPLE = 256 << 20


def disk_rates(folder: Path) -> tuple[float, float, float | None]:
    """Bytes a second written with fsync, read from the page cache, and read past it, in `folder`'s file system; the
    last is None where the page cache cannot be dropped."""
    while not folder.exists():
        folder = folder.resolve().parent
    data = np.random.default_rng(0).integers(0, 256, DISK_SAMPLE, np.uint8)
    out = np.empty_like(data)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".pipeline-plan-") as file:
        begun = time.perf_counter()
        file.write(data.data)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - begun

        def read() -> None:
            file.seek(0)
            file.readinto(out.data)

        read()
        warm = min(repeat(read, number=1, repeat=4))
        cold = None
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            begun = time.perf_counter()
            read()
            cold = max(time.perf_counter() - begun, warm)
    return DISK_SAMPLE / written, DISK_SAMPLE / warm, None if cold is None else DISK_SAMPLE / cold
