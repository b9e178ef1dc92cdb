"""Speed of the store: encoding, sealing, reading a block, beside zarr-python on the same segment.

    python tests/benchmarks/store_speed.py [FOLDER]

One block of 64 MB: two float16 states, 26,200 rows of 640 channels each. FOLDER (a temporary one by default) decides
which disk is measured; a folder in /dev/shm measures memory. Each figure is the best of several runs: reading is from
the page cache, sealing includes fsync.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import zarr

from pipeline.extract.encoding import decode, encode
from pipeline.store import FORMATS, Encoded, Samples, Store, digest_bytes, read_block

ROWS, WIDTH, STATES, SAMPLES = 26_200, 640, 2, 100


def best(run: Callable[[], Any], count: int = 9) -> float:
    """Seconds of the fastest of `count` runs."""
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    torch.set_num_threads(1)
    folder = tempfile.mkdtemp(dir=sys.argv[1] if len(sys.argv) > 1 else None)
    try:
        measure(folder)
    finally:
        shutil.rmtree(folder)


def measure(folder: str) -> None:
    x = torch.randn(ROWS, WIDTH)
    print(f"{'format':<10}{'encode':>10}{'decode':>10}   (GB/s of float32)")
    for fmt in FORMATS:
        encoded = encode(x, fmt)
        rate = [x.nbytes / 1e9 / best(run) for run in (lambda: encode(x, fmt), lambda: decode(encoded))]  # noqa: B023
        print(f"{fmt:<10}{rate[0]:>10.2f}{rate[1]:>10.2f}")

    space = Store.create(f"{folder}/store").create_space({"format": "float16"})
    states = {f"encoder.{i}": encode(torch.randn(ROWS, WIDTH), "float16").numpy() for i in range(STATES)}
    keys = [digest_bytes(str(i).encode()) for i in range(SAMPLES)]
    samples = Samples(keys, {"encoder": np.full(SAMPLES, ROWS // SAMPLES, np.int64)}, states)
    size = samples.nbytes / 1e9
    writer = space.writer({})

    def seal() -> None:
        for segment in space.segments():
            shutil.rmtree(space.path / "segments" / segment.id)
        writer.add(samples)
        writer.seal()

    print(f"{size * 1e3:.0f} MB: seal {size / best(seal, 5):.2f} GB/s")
    plan = space.plan(keys, list(states))
    assert len(plan.blocks) == 1
    print(f"read_block {size / best(lambda: read_block(plan.blocks[0])):.2f} GB/s")
    shuffled = space.plan(keys[::2], list(states)).blocks[0]
    print(f"read_block of every second sample {shuffled.nbytes / 1e9 / best(lambda: read_block(shuffled)):.2f} GB/s")
    path = str(space.path / "segments" / space.segments()[0].id)

    def through_zarr() -> dict[str, Encoded]:
        group = zarr.open_group(path, mode="r")
        return {name: Encoded(np.asarray(group[name][:])) for name in states}  # type: ignore[index]

    print(f"zarr-python {size / best(through_zarr):.2f} GB/s")
    out = np.empty(samples.nbytes, np.uint8)
    print(f"memory copy, for comparison {size / best(lambda: out.fill(1)):.2f} GB/s written")


if __name__ == "__main__":
    main()
