"""Tuners and live baselines on MiniLM: `python tests/benchmarks/side_by_side.py --data GLUE --out FOLDER`.

Writes the section "Side by side" of RESULTS.md from the tables that `pipeline compare --csv` makes in FOLDER; a table
that is there already is not made again.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.results import markdown, write

# Few rows and epochs, so that all of it ends in a quarter of an hour on one core: compared are cost and order.
JOBS = {"sst2": (1000, 4, "accuracy"), "cola": (1000, 4, "Matthews"), "rte": (160, 2, "accuracy")}
METHODS = "probe,sherl,lst,unipt,lora,full"
SEEDS = "0,1"


def pipeline(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "pipeline", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of GLUE tasks")
    parser.add_argument("--out", type=Path, required=True, help="folder for stores, runs and tables")
    args = parser.parse_args()
    body = []
    for task, (rows, epochs, metric) in JOBS.items():
        table = args.out / f"cmp_{task}.csv"
        common = ["--model", "minilm", "--task", task, "--store", args.out / "store", "--limit", rows]
        if not table.exists():
            pipeline("extract", *common, "--data", args.data, "--for", "probe,sherl,lst,unipt")
            options = ["--tuners", METHODS, "--seeds", SEEDS, "--epochs", epochs, "--batch-size", 32, "--csv", table]
            pipeline("compare", *common, "--data", args.data, *options, "--out", args.out / "runs" / task)
        with table.open(encoding="utf-8") as file:
            found = list(csv.DictReader(file))
        cells = [
            (
                r["method"] + (" (live)" if r["live"] == "True" else ""),
                f"{int(r['trainable']):,}",
                f"{100 * float(r['share']):.2f} %",
                f"{float(r['memory_bytes']) / 1e6:.0f} MB",
                f"{float(r['seconds_per_epoch']):.1f}",
                f"{100 * float(r['metric']):.1f} ± {100 * float(r['spread'] or 0):.1f}",
            )
            for r in found
        ]
        head = ("method", "trainable", "share", "memory of a step", "s/epoch", f"{metric} × 100")
        body += [f"**{task}**, {rows:,} training rows, {epochs} epochs", "", markdown(head, cells), ""]
    note = """all-MiniLM-L6-v2, batch 32, seeds 0 and 1, default learning rates, one thread. A subset and few epochs, so
that full fine-tuning ends: scores order the methods under this budget and are no more than that; with about 120 steps
the side networks are far from their best (see "Real tasks"), and 0.0 on CoLA is a method that still answers one class.
RTE is at chance for every method with this encoder. Memory is counted, not measured, on a CPU. Seconds are the
faster seed's; the machine was shared with other work, so they are upper bounds."""
    write(
        "Side by side", "python tests/benchmarks/side_by_side.py --data GLUE --out FOLDER", "\n".join([note, "", *body])
    )


if __name__ == "__main__":
    main()
