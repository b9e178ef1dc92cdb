"""From a command to its first batch, on a store of many samples, the whole way that a user goes.

    python -m tests.benchmarks.first_batch [--samples 100000,1000000,10000000] [--segments 100] [--folder FOLDER]

The store is that of a BERT of width 32: 200 texts that it has read, and samples of one row that are made up, each
with a text of its own. `train`: `pipeline train --max-steps 1` with validation and test, to its end. `stream`: a
process that imports pipeline, opens the stream and takes a batch. Each from the start of the process to its end: with
nothing kept in the user's cache, and again. Files are in the page cache, as they were just written.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from pipeline.store import Encoded, Samples, Store, TaskTable
from pipeline.store.format.keys import Keys
from tests import tiny

STATE = "encoder.3"
STREAM = """
import sys, pipeline
model, task, store = sys.argv[1:]
stream = pipeline.open_store(store).stream(model=model, task=task, text="text", label="label", states="encoder.3")
print(next(iter(stream)))
"""


def build(folder: Path, samples: int, segments: int) -> None:
    """A checkpoint, a table of 200 rows, and a store whose training rows are `samples` others."""
    checkpoint, table = tiny.bert(folder / "bert"), folder / "t.csv"
    table.write_text("text,label\n" + "".join(f"text number {i},{'ab'[i % 2]}\n" for i in range(200)))
    words = ["extract", *options(folder), "--model", str(checkpoint), "--for", "probe", "--quiet"]
    subprocess.run([sys.executable, "-m", "pipeline", *words], check=True)
    (space,) = Store.open(folder / "store").spaces()
    draws = np.random.default_rng(0)
    keys = Keys(*draws.integers(0, 1 << 64, (2, samples), np.uint64))
    writer = space.writer({"note": "synthetic"})
    for some in np.array_split(np.arange(samples), segments):
        part = keys[int(some[0]) : int(some[-1]) + 1]
        rows = Encoded(draws.normal(size=(len(some), 32)).astype(np.float16))
        ids = {name: np.ones(len(some), np.int32) for name in ("encoder.ids", "encoder.types")}
        writer.add(Samples(part, {"encoder": np.ones(len(some), np.int64)}, {STATE: rows}, ids))
        writer.seal()
    small = next(info for info in space.tables() if info.split == "train")
    header = {**space.read_header(small), "total": samples}
    texts = [[f"a text of some forty characters, the {i}th of many"] for i in range(samples)]
    order = draws.permutation(samples)
    space.save_table(TaskTable(header, keys.take(order), (order % 2).tolist(), texts))
    (folder / "store" / small.path).unlink()


def options(folder: Path) -> list[str]:
    return ["--task", str(folder / "t.csv"), "--text", "text", "--label", "label", "--store", str(folder / "store")]


def measured(command: list[str], cache: Path) -> str:
    """Processor seconds, megabytes and wall seconds of a process."""

    begun = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "PIPELINE_CACHE": str(cache)})
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)}: status {child.returncode}")
    wall = time.perf_counter() - begun
    return f"{used.ru_utime + used.ru_stime:.1f} | {wall:.1f} | {used.ru_maxrss / 1e3:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", default="100000,1000000,10000000")
    parser.add_argument("--segments", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/first-batch"))
    asked = parser.parse_args()
    print("| samples | what | cpu s | wall s | MB |\n| --: | :-- | --: | --: | --: |", flush=True)
    for samples in map(int, asked.samples.split(",")):
        folder = asked.folder / f"{samples}-{asked.segments}"
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            build(folder, samples, asked.segments)
            (folder / "done").touch()
        shutil.rmtree(folder / "cache", ignore_errors=True)
        model = str(folder / "bert")
        train = ["train", *options(folder), "--model", model, "--tuner", "probe", "--max-steps", "1", "--overwrite"]
        lines = {
            "train": [sys.executable, "-m", "pipeline", *train, "--quiet", "--out", str(folder / "run")],
            "stream": [sys.executable, "-c", STREAM, model, str(folder / "t.csv"), str(folder / "store")],
        }
        for name, command in lines.items():
            for again in ("", ", again"):
                print(f"| {samples:,} | {name}{again} | {measured(command, folder / 'cache')} |", flush=True)
            shutil.rmtree(folder / "cache", ignore_errors=True)


if __name__ == "__main__":
    main()
