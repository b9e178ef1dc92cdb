"""Processor seconds and memory of commands that do next to nothing: what a user waits for each time.

    python -m tests.benchmarks.startup [--store PLACE] [--encoder FOLDER]

With `--encoder` (a BERT-like checkpoint) also of `predict` on 200 short texts and of `plan`, the first time, when it
measures the machine, and again. `before`: seconds before issue 13, on the two cores that RESULTS.md names.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

COMMANDS = (
    "--help", "--version", "tuners", "models", "tasks", "train --help", "extract --help", "store --help",
    "store status --store {store}", "store verify --store {store}", "store du --store {store}",
    "store gc --store {store}",
)  # fmt: skip

WORK = {
    "predict": "predict {run} --input {rows} --store {store} --output {out}",
    "plan": "{plan}",
    "plan again": "{plan}",
}
BEFORE = {"predict": 10.0, "plan": 19.0, "plan again": 19.0}


def trained(encoder: str, folder: Path) -> dict[str, str]:
    """A run on 200 generated texts, and what the lines of `WORK` name."""
    draws, words = random.Random(0), ("film", "plot", "good", "bad", "dull", "bright", "slow", "quick", "scene", "end")
    lines = [" ".join(draws.choices(words, k=12)) + "," + draws.choice("ab") for _ in range(200)]
    (folder / "rows.csv").write_text("\n".join(["text,label", *lines]))
    given = {n: str(folder / n) for n in ("run", "store", "out.csv", "rows.csv")}
    task = f"--model {encoder} --task {given['rows.csv']} --text text --label label --store {given['store']}"
    cost(f"extract {task} --for probe".split())
    cost(f"train {task} --tuner probe --epochs 1 --out {given['run']}".split())
    return {
        "run": given["run"],
        "rows": given["rows.csv"],
        "out": given["out.csv"],
        "plan": f"plan {task} --tuner probe",
    }


def cost(words: list[str]) -> tuple[float, float]:
    """Seconds of processor time and megabytes of `pipeline` with `words`, its status being 0."""
    child = subprocess.Popen([sys.executable, "-m", "pipeline", *words], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"pipeline {' '.join(words)}: status {child.returncode}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", help="Default: an empty one.")
    parser.add_argument("--encoder", help="A checkpoint folder, or a short name.")
    options = parser.parse_args()
    given = options.store
    with tempfile.TemporaryDirectory() as folder:
        place = given or str(Path(folder) / "store")
        # Made elsewhere: the largest memory of a child is at least what this process has when it forks.
        make = "import sys; from pipeline.store import Store; Store.create(sys.argv[1])"
        if not given:
            subprocess.run([sys.executable, "-c", make, place], check=True)
        print(f"{'command':<28}{'cpu s':>7}{'MB':>7}{'before':>8}")
        for command in COMMANDS:
            seconds, size = min(cost(command.format(store=place).split()) for _ in range(3))
            print(f"{command.removesuffix(' --store {store}'):<28}{seconds:>7.2f}{size:>7.0f}", flush=True)
        if options.encoder:
            os.environ["PIPELINE_CACHE"] = str(Path(folder) / "cache")
            names = trained(options.encoder, home := Path(folder)) | {"store": str(home / "store")}
            for name, command in WORK.items():
                words = command.format(**names).split()
                seconds, size = min(cost(words) for _ in range(1 if name == "plan" else 3))
                print(f"{name:<28}{seconds:>7.2f}{size:>7.0f}{BEFORE[name]:>8.1f}", flush=True)


if __name__ == "__main__":
    main()
