"""Two checkouts against each other: what a change cost in extraction, loading and training.

    python tests/benchmarks/before_after.py --before-python PYTHON --data GLUE [--rounds 5] [--rows 600] [--only stream]

`--before-python` is that of an environment in which the earlier checkout is installed; the later one is installed in
that which runs this. In each round both do the same work one after the other, in processes of their own, by what both
have: the command line and `open_store`. Training texts of SST-2 through a real MiniLM. `extract`: the states of SHERL,
LST and the probe into a new store. `stream`: seconds of an epoch of shuffled batches, the best of eight, each from a
stream of its own; `stream again`: the same where a stream may be iterated again, which the earlier one's cannot;
`stream opened`: seconds until there is a stream, the best of eight.
`lst cached`, `sherl cached`: seconds of an epoch of training, the median of the last two of three; `lst live`: the same
with the backbone in the loop. With `--processor` seconds are the processor's, not the wall clock's. Each figure is the
median over the rounds of before ÷ after: above 1, the change made it faster.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CLOCK = "import time; time.perf_counter = time.process_time; "
COMMAND = "import runpy, sys; sys.argv[0] = 'pipeline'; runpy.run_module('pipeline', run_name='__main__')"
STREAM = """
import json, sys, time
import pipeline
store, states = pipeline.open_store(sys.argv[1]), ["encoder.0", "encoder.2", "encoder.4"]
found, last, opened = {}, None, []
for name in ("stream", "stream again"):
    seconds = []
    for epoch in range(8):
        once = name == "stream" or iter(last) is last
        begun = time.perf_counter()
        stream = last = store.stream(task="sst2", states=states, batch_size=64) if once else last
        if name == "stream":
            opened.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        for batch in stream:
            pass
        seconds.append(time.perf_counter() - begun)
    found[name] = min(seconds)
found["stream opened"] = min(opened)
print(json.dumps(found))
"""


def run(python: Path, *arguments: str) -> str:
    """Standard output of a Python of one of the checkouts; outside both, so that the installed one is imported."""
    command = [str(python), *arguments]
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(command, capture_output=True, text=True, cwd=empty, env=os.environ)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr.strip()}")
    return done.stdout


def figures(python: Path, data: Path, rows: int, folder: Path, only: list[str], processor: bool) -> dict[str, float]:
    """One round of one checkout: name → seconds of the figures `only`, of all if it is empty."""
    store, clock = str(folder / "store"), CLOCK if processor else ""
    common = ["--model", "minilm", "--task", "sst2", "--data", str(data), "--store", store, "--limit", str(rows)]
    made = json.loads(run(python, "-c", clock + COMMAND, "extract", *common, "--for", "sherl,lst,probe", "--json"))
    found = {"extract": float(made["seconds"])}
    if not only or "stream" in only:
        found |= json.loads(run(python, "-c", clock + STREAM, store))
    for name, options in {
        "lst cached": ["--tuner", "lst"],
        "sherl cached": ["--tuner", "sherl"],
        "lst live": ["--tuner", "lst", "--live"],
    }.items():
        if only and name not in only:
            continue
        out = folder / name.replace(" ", "-")
        run(python, "-c", clock + COMMAND, "train", *common, *options, "--epochs", "3", "--out", str(out), "--json")
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        found[name] = statistics.median(seconds_of_epochs(lines)[1:])
    return found


def seconds_of_epochs(log: list[dict[str, float]]) -> list[float]:
    """Seconds of each epoch's steps, from a run's log."""
    epochs: dict[int, float] = {}
    for line in log:
        if "seconds" in line and "loss" in line:
            epochs[int(line["epoch"])] = epochs.get(int(line["epoch"]), 0.0) + float(line["seconds"])
    return list(epochs.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before-python", type=Path, required=True, help="of the environment of the earlier checkout")
    parser.add_argument("--after-python", type=Path, default=Path(sys.executable))
    parser.add_argument("--data", type=Path, required=True, help="folder with SST-2 in GLUE's layout")
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="these figures, with commas between; always extraction")
    parser.add_argument("--processor", action="store_true", help="processor time of all threads, for a busy machine")
    args = parser.parse_args()
    only = [name for name in args.only.split(",") if name]
    ratios: dict[str, list[float]] = {}
    for number in range(args.rounds):
        pair = []
        for python in (args.before_python, args.after_python):
            folder = Path(tempfile.mkdtemp())
            pair.append(figures(python.absolute(), args.data.resolve(), args.rows, folder, only, args.processor))
            shutil.rmtree(folder)
        for name, before in pair[0].items():
            ratios.setdefault(name, []).append(before / pair[1][name])
        print(f"round {number + 1}: " + ", ".join(f"{n} {r[-1]:.3f}" for n, r in ratios.items()), flush=True)
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    about = ", ".join(f"{name} {value:.3f}" for name, value in medians.items())
    print(f"before ÷ after, medians of {args.rounds} rounds: {about}")


if __name__ == "__main__":
    main()
