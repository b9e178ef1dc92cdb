"""Stores of many samples and many segments: what opening, listing, planning and checking them costs.

    python -m tests.benchmarks.scale [--samples 100000,1000000] [--segments 100,1000] [--before PYTHON] [--bucket]

Each store is synthetic: one row of 8 float16 channels a sample, and a task table over all of them in another order.
Each figure is of a process of its own: seconds of its processor time and of the wall clock, without those of its
imports, and its largest memory. What is derived from a store is kept in a cache of its own, empty at first; "open
again" and all after it find it there. The files are in the page cache, as they were just written. A store that is there
already is used again.

`--before`: the Python of an environment in which an earlier checkout is installed. It does the same on a store that it
wrote itself, and its figures stand first; they are kept beside that store, and are not measured again. `--bucket`: once
more in a bucket, with the requests of each process, those that open the store among them. The server is `rclone serve
s3` on this machine, whose own processor time is not counted.
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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.store import Encoded, Samples, Space, Store, TaskTable

WIDTH, BATCH = 8, 64
STATE = "encoder.0"
Figures = dict[str, Any]
EARLIER = find_spec("pipeline.store.format") is None  # the code from before `store/` had rooms: tensors and lists
BUILD_SECONDS = 3600.0


def build(folder: Path, samples: int, segments: int) -> None:
    """A store of `samples` in `segments`, a task table over them in another order."""
    space = Store.create(folder).create_space({"format": "float16", "format_version": 1})
    vars(space.files)["sync"] = lambda names: None  # none of it is to survive a power cut
    draws = np.random.default_rng(0)
    keys = [f"{high:016x}{low:016x}" for high, low in draws.integers(0, 1 << 64, (samples, 2), np.uint64).tolist()]
    writer = space.writer({"note": "synthetic"})
    for some in np.array_split(np.arange(samples), segments):
        rows: Any = draws.normal(size=(len(some), WIDTH)).astype(np.float16)
        if EARLIER:
            import torch

            rows = torch.from_numpy(rows)
        part = keys[int(some[0]) : int(some[-1]) + 1]
        writer.add(Samples(part, {"encoder": np.ones(len(some), np.int64)}, {STATE: Encoded(rows)}))
        writer.seal()
    order = draws.permutation(samples)
    spec = {"name": "t", "kind": "classification", "labels": ["a", "b"], "metrics": ["accuracy"], "fields": ["text"]}
    header = {"task": "t", "split": "train", "spec": {**spec, "prompt": "", "targets": [], "values": []}}
    space.save_table(TaskTable(header, [keys[i] for i in order.tolist()], (order % 2).tolist(), [["x"]] * samples))


def asked(space: Space) -> Sequence[str]:
    """The samples of the run, in the order of no segment, as a table gives them."""
    segments = space.segments()
    order = np.random.default_rng(1).permutation(sum(len(s) for s in segments))
    if EARLIER:
        keys = [key for s in segments for key in s.keys]
        return [keys[i] for i in order.tolist()]
    from pipeline.store.format.keys import Keys

    return Keys.joined(s.keys for s in segments).take(order)


def step_open(space: Space) -> Callable[[], Any]:
    return space.segments


def step_index(space: Space) -> Callable[[], Any]:
    space.segments()
    return space.index


def step_status(space: Space) -> Callable[[], Any]:
    if EARLIER:
        from pipeline.store_report import status_text, status_what  # type: ignore[import-not-found]
    else:
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

    keys = asked(space)
    if EARLIER:
        from pipeline.train.stream import StoreSource as Earlier  # type: ignore[import-not-found]

        return lambda: next(iter(Earlier(space, keys, None, [STATE], batch_size=BATCH).epoch(0)))
    from pipeline.train.data.store_source import StoreSource, StreamOptions

    return lambda: next(iter(StoreSource(space, keys, None, [STATE], (), StreamOptions(BATCH)).epoch(0)))


STEPS = {
    "open": step_open,
    "open again": step_open,
    "status": step_status,
    "table": step_table,
    "index": step_index,
    "plan": step_plan,
    "first batch": step_batch,
    "verify sizes": step_verify,
}


def measure(place: str, step: str, gigabytes: float) -> Figures:
    """Seconds and megabytes of one step on the store at `place`, in this process, and the requests that it made."""
    most = int(gigabytes * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    requests = counted_requests(place) if "://" in place else {}
    try:
        (space,) = Store.open(place).spaces()
        run = STEPS[step](space)
        wall, cpu = time.perf_counter(), time.process_time()
        made = run()
    except MemoryError:
        return {"over": f"over {gigabytes:g} GB"}
    out: Figures = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    if step == "index" and hasattr(made, "nbytes"):
        out["bytes"] = round(made.nbytes / len(made), 1)
    return {**out, "MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, "requests": requests}


def counted_requests(place: str) -> Counter[str]:
    """The requests to the bucket of `place` from now on, by kind."""
    if EARLIER:
        from pipeline.store.places import open_files  # type: ignore[import-not-found]
    else:
        from pipeline.store.files.places import open_files

    count: Counter[str] = Counter()

    def sent(request: Any, **_: Any) -> None:
        count["LIST" if "list-type" in request.url else request.method] += 1

    open_files(place).fs.s3.meta.events.register("before-send.s3", sent)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", default="100000,1000000,10000000")
    parser.add_argument("--segments", default="100,1000,10000")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/scale"))
    parser.add_argument("--limit", type=float, default=600, help="seconds that one step may take")
    parser.add_argument("--memory", type=float, default=20, help="gigabytes that one step may take")
    parser.add_argument("--steps", default=",".join(STEPS), help=f"only these, of {', '.join(STEPS)}")
    parser.add_argument("--before", type=Path, help="Python of an earlier checkout's environment, to stand beside")
    parser.add_argument("--only-before", action="store_true", help="only the earlier one's figures, for a later run")
    parser.add_argument("--bucket", action="store_true", help="in a bucket, too")
    parser.add_argument("--step", choices=[*STEPS, "build"], help="only this, of the store at --place, in this process")
    parser.add_argument("--place")
    options = parser.parse_args()
    if options.step == "build":
        build(Path(options.place), int(options.samples), int(options.segments))
        return
    if options.step:
        print(json.dumps(measure(options.place, options.step, options.memory)))
        return
    pythons = {"before": options.before} if options.before else {}
    pythons |= {} if options.only_before else {"now": Path(sys.executable)}
    head = [f"{what}, {name}" for what in ("cpu s", "wall s", "MB") for name in pythons]
    more = [f"requests, {name}" for name in pythons] if options.bucket else []
    print("| samples | segments | step | " + " | ".join([*head, *more]) + " |")
    print("| --: | --: | :-- " + "| --: " * len(head) + "| :-- " * len(more) + "|", flush=True)
    for samples in map(int, options.samples.split(",")):
        for segments in map(int, options.segments.split(",")):
            shape = f"{samples}-{segments}"
            folders = {name: options.folder / name / shape for name in pythons}
            for name, folder in folders.items():
                made(pythons[name], folder, samples, segments)
            cell = f"{samples:,} | {segments:,}"
            table(cell, "", pythons, folders, options)
            if options.bucket:
                table(cell, " (bucket)", pythons, folders, options)


def made(python: Path, folder: Path, samples: int, segments: int) -> None:
    """The store at `folder`, written anew unless it is there whole."""
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        shape = ["--samples", str(samples), "--segments", str(segments)]
        child(python, ["--step", "build", "--place", str(folder), *shape], {}, BUILD_SECONDS)
        (folder / "done").touch()


def child(python: Path, words: Sequence[str], environment: dict[str, str], limit: float) -> str:
    """What this file prints in a process of `python`. Raises subprocess.SubprocessError."""
    command = [str(python), "-I", __file__, *words]
    environment = {**os.environ, **environment}
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=limit, env=environment, check=True).stdout


def table(cell: str, where: str, pythons: dict[str, Path], folders: dict[str, Path], options: Any) -> None:
    """Print a line a step, of one shape; the caches of this machine are empty at first."""
    found = {name: figures(pythons[name], folders[name], bool(where), options) for name in pythons}
    for step, *each in zip(options.steps.split(","), *found.values(), strict=True):
        cells = [cell, step + where]
        for what, digits in (("cpu", 2), ("wall", 2), ("MB", 0)):
            cells += [f"{one[what]:,.{digits}f}" if what in one else one["over"] for one in each]
        if options.bucket:
            cells += [", ".join(f"{n:,} {kind}" for kind, n in sorted(one.get("requests", {}).items())) for one in each]
        print("| " + " | ".join(cells) + " |", flush=True)
        for one in each:
            if "bytes" in one:
                print(f"index: {one['bytes']:.0f} bytes a sample", file=sys.stderr)


def figures(python: Path, folder: Path, bucket: bool, options: Any) -> list[Figures]:
    """Those of each step, of one checkout on its store; an earlier checkout's as they were measured once."""
    kept = folder.with_name(f"{folder.name}{'-bucket' * bucket}.json")
    known: dict[str, Figures] = json.loads(kept.read_text()) if python == options.before and kept.exists() else {}
    steps = options.steps.split(",")
    if not known.keys() >= set(steps):
        # Far from the stores: where tens of thousands of files lie near, a file system takes longer to make another.
        with (
            tempfile.TemporaryDirectory() as cache,
            served(folder) if bucket else plain(folder) as (place, environment),
        ):
            for step in steps:
                words = ["--step", step, "--place", place, "--memory", str(options.memory)]
                environment["PIPELINE_CACHE"] = cache
                try:
                    known[step] = json.loads(child(python, words, environment, options.limit))
                except subprocess.TimeoutExpired:
                    known[step] = {"over": f"over {options.limit:g} s"}
                except subprocess.CalledProcessError as error:
                    known[step] = {"over": f"ended with {error.returncode}"}
                if python == options.before:
                    kept.write_text(json.dumps(known))
    return [known[step] for step in steps]


@contextmanager
def plain(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The store where it lies."""
    yield str(folder), {}


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The store in a bucket, for as long as this lasts, and the environment to reach it."""
    from tests.store.servers import s3

    with tempfile.TemporaryDirectory(dir=folder.parent) as top, s3(Path(top), "1h") as environment:
        moved = folder.rename(Path(top, "team", folder.name))
        try:
            yield f"s3://team/{folder.name}", environment
        finally:
            moved.rename(folder)


if __name__ == "__main__":
    main()
