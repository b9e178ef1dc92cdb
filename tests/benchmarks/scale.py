"""Stores of many samples and many segments: what opening, listing, planning and checking them costs.

    python -m tests.benchmarks.scale --samples 100000,1000000 --segments 100,1000 --folder /tmp/scale

Each store is synthetic: one row of 8 float16 channels a sample. Each figure is of a process of its own: seconds of its
processor time and of the wall clock, without those of its imports, and its largest memory. What is derived from a store
is kept in a cache of its own, empty at first; "open again" and all after it find it there. The files are in the page
cache, as they were just written. A store that is there already is used again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.store import Encoded, Samples, Space, Store, TaskTable
from pipeline.store.format.keys import Keys
from pipeline.store.segments.index import Index

WIDTH, BATCH = 8, 64
STATE = "encoder.0"


def build(folder: Path, samples: int, segments: int) -> None:
    """A store of `samples` in `segments`, a task table over them in another order."""
    space = Store.create(folder).create_space({"format": "float16", "format_version": 1})
    draws = np.random.default_rng(0)
    keys = Keys(*draws.integers(0, 1 << 64, (2, samples), np.uint64))
    writer = space.writer({"note": "synthetic"})
    for some in np.array_split(np.arange(samples), segments):
        states = {STATE: Encoded(draws.normal(size=(len(some), WIDTH)).astype(np.float16))}
        part = keys[int(some[0]) : int(some[-1]) + 1]
        writer.add(Samples(part, {"encoder": np.ones(len(some), np.int64)}, states))
        writer.seal()
    order = draws.permutation(samples)
    spec = {"name": "t", "kind": "classification", "labels": ["a", "b"], "metrics": ["accuracy"], "fields": ["text"]}
    header = {"task": "t", "split": "train", "spec": {**spec, "prompt": "", "targets": [], "values": []}}
    space.save_table(TaskTable(header, list(keys.take(order)), (order % 2).tolist(), [["x"]] * samples))


def asked(space: Space) -> Keys:
    """The samples of the run, in the order of no segment."""
    keys = Keys.joined(s.keys for s in space.segments())
    return keys.take(np.random.default_rng(1).permutation(len(keys)))


def step_open(space: Space) -> Callable[[], Any]:
    return space.segments


def step_index(space: Space) -> Callable[[], Any]:
    space.segments()
    return space.index


def step_status(space: Space) -> Callable[[], Any]:
    from pipeline.cli.store_report import status_text, status_what

    store = Store(space.files)
    return lambda: status_text(status_what(store))


def step_verify(space: Space) -> Callable[[], Any]:
    return space.verify


def step_table(space: Space) -> Callable[[], Any]:
    return lambda: space.load_table("t", "train")


def step_plan(space: Space) -> Callable[[], Any]:
    keys = asked(space)
    return lambda: space.plan(keys, [STATE])


def step_batch(space: Space) -> Callable[[], Any]:
    """The first batch of a training whose table is read and whose segments are open."""
    import torch  # noqa: F401

    from pipeline.train.data.store_source import StoreSource, StreamOptions

    keys = asked(space)
    return lambda: next(iter(StoreSource(space, keys, None, [STATE], (), StreamOptions(BATCH)).epoch(0)))


STEPS = {
    "open": step_open,
    "open again": step_open,
    "status": step_status,
    "table": step_table,
    "index": step_index,
    "plan": step_plan,
    "first batch": step_batch,
    "verify, sizes": step_verify,
}


def measure(place: str, step: str) -> dict[str, float]:
    """Seconds and megabytes of one step on the store at `place`, in this process."""
    (space,) = Store.open(place).spaces()
    run = STEPS[step](space)
    wall, cpu = time.perf_counter(), time.process_time()
    made = run()
    out = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    if isinstance(made, Index):
        print(f"index: {made.nbytes / len(made):.0f} bytes a sample", file=sys.stderr)
    return {**out, "MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", default="100000,1000000,10000000")
    parser.add_argument("--segments", default="100,1000,10000")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/scale"))
    parser.add_argument("--limit", type=float, default=600, help="seconds that one step may take")
    parser.add_argument("--steps", help=f"only these, with commas between: {', '.join(STEPS)}")
    parser.add_argument("--bucket", action="store_true", help="in a bucket, too")
    parser.add_argument("--step", choices=[*STEPS, "build"], help="only this, of the store at --place, in this process")
    parser.add_argument("--place")
    options = parser.parse_args()
    if options.step == "build":
        build(Path(options.place), int(options.samples), int(options.segments))
        return
    if options.step:
        print(json.dumps(measure(options.place, options.step)))
        return
    steps = options.steps.split(",") if options.steps else list(STEPS)
    print(f"{'samples':>10} {'segments':>9}  {'step':<22}{'cpu s':>8}{'wall s':>8}{'MB':>8}")
    for samples in map(int, options.samples.split(",")):
        for segments in map(int, options.segments.split(",")):
            folder = options.folder / f"{samples}-{segments}"
            if not (folder / "done").exists():
                shutil.rmtree(folder, ignore_errors=True)
                more = ["--samples", str(samples), "--segments", str(segments)]
                run(str(folder), "build", {}, None, more)
                (folder / "done").touch()
            cache = {"PIPELINE_CACHE": str(options.folder / "cache")}
            table(f"{samples:>10,} {segments:>9,}  ", str(folder), steps, cache, options.limit)
            if options.bucket:
                from tests.store.servers import s3

                with tempfile.TemporaryDirectory(dir=options.folder) as top, s3(Path(top), "1h") as environment:
                    folder = folder.rename(Path(top, "team", folder.name))
                    try:
                        before = f"{samples:>10,} {segments:>9,}  bucket: "
                        table(before, f"s3://team/{folder.name}", steps, cache | environment, options.limit)
                    finally:
                        folder.rename(options.folder / folder.name)


def run(place: str, step: str, environment: dict[str, str], limit: float | None, more: Sequence[str] = ()) -> str:
    """What a process of its own prints of one step. Raises subprocess.SubprocessError."""
    words = [sys.executable, "-m", "tests.benchmarks.scale", "--place", place, "--step", step, *more]
    done = subprocess.run(
        words, stdout=subprocess.PIPE, text=True, timeout=limit, env={**os.environ, **environment}, check=True
    )
    return done.stdout


def table(before: str, place: str, steps: Sequence[str], environment: dict[str, str], limit: float) -> None:
    """Print a line a step, the cache of this machine empty at first."""
    shutil.rmtree(environment["PIPELINE_CACHE"], ignore_errors=True)
    for step in steps:
        try:
            found = json.loads(run(place, step, environment, limit))
            text = "".join(f"{found[k]:>8.{d}f}" for k, d in (("cpu", 2), ("wall", 2), ("MB", 0)))
        except subprocess.TimeoutExpired:
            text = f"  more than {limit:.0f} s"
        except subprocess.CalledProcessError as error:
            text = f"  ended with {error.returncode}"
        print(f"{before + step:<43}{text}", flush=True)


if __name__ == "__main__":
    main()
