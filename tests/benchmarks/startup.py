"""Processor seconds and memory of commands that do next to nothing: what a user waits for each time.

python -m tests.benchmarks.startup [--store PLACE]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

COMMANDS = (
    "--help", "--version", "tuners", "models", "tasks", "train --help", "extract --help", "store --help",
    "store status --store {store}", "store verify --store {store}", "store du --store {store}",
    "store gc --store {store}",
)  # fmt: skip


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
    given = parser.parse_args().store
    with tempfile.TemporaryDirectory() as folder:
        place = given or str(Path(folder) / "store")
        # Made elsewhere: the largest memory of a child is at least what this process has when it forks.
        make = "import sys; from pipeline.store import Store; Store.create(sys.argv[1])"
        if not given:
            subprocess.run([sys.executable, "-c", make, place], check=True)
        print(f"{'command':<28}{'cpu s':>7}{'MB':>7}")
        for command in COMMANDS:
            seconds, size = min(cost(command.format(store=place).split()) for _ in range(3))
            print(f"{command.removesuffix(' --store {store}'):<28}{seconds:>7.2f}{size:>7.0f}")


if __name__ == "__main__":
    main()
