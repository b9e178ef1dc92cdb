"""Processor seconds and memory of commands that do next to nothing: what a user waits for each time.

    python -m tests.benchmarks.startup [--store PLACE] [--encoder FOLDER] [--before PYTHON]

With `--encoder` (a BERT-like checkpoint) also of `predict` on 200 short texts and of `plan`, the first time, when it
measures the machine, and again. With `--before` the same of an older version, whose interpreter PYTHON is (one where
`import pipeline` finds it), in turns with this one, each with a store of its own. The least of the rounds counts.
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
FAILED = (float("nan"), float("nan"))


def trained(python: str, encoder: str, folder: Path) -> dict[str, str]:
    """A run on 200 generated texts, and what the lines of `WORK` name."""
    draws, words = random.Random(0), ("film", "plot", "good", "bad", "dull", "bright", "slow", "quick", "scene", "end")
    lines = [" ".join(draws.choices(words, k=12)) + "," + draws.choice("ab") for _ in range(200)]
    folder.mkdir()
    (folder / "rows.csv").write_text("\n".join(["text,label", *lines]))
    given = {n: str(folder / n) for n in ("run", "store", "out.csv", "rows.csv")}
    task = f"--model {encoder} --task {given['rows.csv']} --text text --label label --store {given['store']}"
    for line in (f"extract {task} --for probe", f"train {task} --tuner probe --epochs 1 --out {given['run']}"):
        if cost(python, line, str(folder)) is FAILED:
            raise SystemExit(f"{python}: pipeline {line}: failed")
    return {
        "run": given["run"],
        "rows": given["rows.csv"],
        "out": given["out.csv"],
        "store": given["store"],
        "plan": f"plan {task} --tuner probe",
    }


def cost(python: str, line: str, folder: str) -> tuple[float, float]:
    """Seconds of processor time and megabytes of `pipeline` with the words of `line`; FAILED where its status is not
    0."""
    words = [python, "-m", "pipeline", *line.split()]
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return FAILED if child.returncode else (used.ru_utime + used.ru_stime, used.ru_maxrss / 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", help="Default: an empty one of each version.")
    parser.add_argument("--encoder", help="A checkpoint folder, or a short name.")
    parser.add_argument("--before", help="The interpreter of an older version.")
    options = parser.parse_args()
    versions = [sys.executable, *([options.before] if options.before else [])]
    with tempfile.TemporaryDirectory() as top:
        homes = [Path(top, str(i)) for i in range(len(versions))]
        # Made elsewhere: the largest memory of a child is at least what this process has when it forks.
        make = "import sys; from pipeline.store import Store; Store.create(sys.argv[1])"
        for python, home in zip(versions, homes, strict=True):
            subprocess.run([python, "-c", make, str(home)], check=True, cwd=top)
        head = f"{'cpu s':>7}{'MB':>7}"
        print(f"{'command':<16}{head}" + (f"  before:{head}{'ratio':>9}" if options.before else ""))
        stores = [{"store": options.store or str(home)} for home in homes]
        for command in COMMANDS:
            show(command.removesuffix(" --store {store}"), versions, [command.format(**names) for names in stores], top)
        if options.encoder:
            os.environ["PIPELINE_CACHE"] = str(Path(top) / "cache")
            work = [trained(p, options.encoder, h / "work") for p, h in zip(versions, homes, strict=True)]
            for name, command in WORK.items():
                show(name, versions, [command.format(**n) for n in work], top, 1 if name == "plan" else 3)


def show(name: str, versions: list[str], lines: list[str], folder: str, rounds: int = 3) -> None:
    """Print a row: the least of each version's rounds, the versions in turns."""
    found = [[cost(python, line, folder) for python, line in zip(versions, lines, strict=True)] for _ in range(rounds)]
    best = [min(own) for own in zip(*found, strict=True)]
    texts = [f"{seconds:>7.2f}{size:>7.0f}" for seconds, size in best]
    ratio = f"{best[0][0] / best[1][0]:>9.2f}" if len(best) > 1 else ""
    print(f"{name:<16}" + "         ".join(texts) + ratio, flush=True)


if __name__ == "__main__":
    main()
