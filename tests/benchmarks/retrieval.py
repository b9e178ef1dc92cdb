"""Image–text retrieval on 1,000 photographs with five captions each (Flickr8k), from cached states of small encoders.

    python -m tests.benchmarks.retrieval --work DIR              # pooled linear maps, three seeds; cached and live
    python -m tests.benchmarks.retrieval --work DIR --folds 5    # GPO and a side network against pooled maps

Split of the first: of `torch.randperm(1000)` (seed 0) over sorted names the first 800 images train, the last 100 test,
the 100 between choose the epoch. Of the second: 5 times 200 images in that order test, of the others 100 choose; each
side has the options that were best on the 100 of the first fold, of those tried (RESULTS.md names them). What is
printed is a table for RESULTS.md. `--work` keeps the store, so that a second call extracts nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
POOLED = ["--tuner", "probe", "--pooling", "mean"]
SIDE = ["--tuner", "image=probe,text=unipt-vse", "--pooling", "gpo", "--cells", 2, "--drop-cells", 0.2]
SIDES = {  # of --folds
    "pooled": [*POOLED, "--lr", 1e-3, "--epochs", 4],
    "side": [*SIDE, "--joint-width", 512, "--lr", 6e-4, "--epochs", 4],
}


def pipeline(*words: object) -> dict[str, Any]:
    """What a command prints as JSON."""
    line = [sys.executable, "-c", "from pipeline.cli.main import main; main()", *map(str, words), "--json"]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def tables(rows: Sequence[dict[str, str]], parts: dict[str, set[str]], folder: Path) -> list[object]:
    """The table of each split in `folder`, as options."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, names in parts.items():
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "caption"])
            writer.writerows([r["image"], r["caption"]] for r in rows if r["image"] in names)
    held = [("--validation", folder / "validation.csv"), ("--test", folder / "test.csv")]
    return ["--task", folder / "train.csv", *(word for pair in held for word in pair)]


def setting(args: argparse.Namespace, task: list[object]) -> list[object]:
    model = f"image={args.data}/weights/mobilenetv2_035,text=minilm"
    where = ["--data", args.data / "flickr8k" / "images", "--store", args.work / "store"]
    return ["--model", model, *task, "--image", "image", "--text", "caption", *where]


def acceptance(args: argparse.Namespace, rows: list[dict[str, str]], order: list[str]) -> None:
    parts = {"train": order[:800], "validation": order[800:900], "test": order[900:]}
    own = setting(args, tables(rows, {k: set(v) for k, v in parts.items()}, args.work / "accept"))
    begun = time.perf_counter()
    computed = pipeline("extract", *own, "--for", "probe")["computed"]
    print(f"extraction: {computed:,} samples computed, {time.perf_counter() - begun:.0f} s\n")
    print("| objective | seed | test rSum | i2t R@1 / 5 / 10 | t2i R@1 / 5 / 10 | best epoch | s an epoch |")
    print("|---|---|---|---|---|---|---|")
    for objective in args.objectives.split(","):
        sums = []
        for seed in range(args.seeds):
            out = args.work / f"{objective}-{seed}"
            how = [*own, *POOLED, "--objective", objective, *args.how, "--seed", seed, "--out", out, "--overwrite"]
            done = pipeline("train", *how)
            test = done["test"]
            both = [" / ".join(f"{test[f'{way}_r{k}']:.1f}" for k in (1, 5, 10)) for way in ("i2t", "t2i")]
            row = f"| {objective} | {seed} | {test['rsum']:.1f} | {both[0]} | {both[1]} "
            print(f"{row}| {done['best_epoch']} | {done['seconds_per_epoch']:.1f} |", flush=True)
            sums.append(test["rsum"])
        print(f"| {objective} | mean | {statistics.mean(sums):.1f} | | | | |", flush=True)
    timed(args, [*own, *POOLED, "--objective", "hinge", *args.how])


def timed(args: argparse.Namespace, how: list[object]) -> None:
    """Seconds an epoch from the store and with the backbones in the loop."""
    for name, more in (("cached", []), ("live", ["--live"])) if args.live else ():
        out = ["--max-steps", args.live, "--overwrite", "--out", args.work / f"time-{name}"]
        done = pipeline("train", *how, *more, *out)
        print(f"\n{name}: {done['seconds_per_epoch']:.1f} s an epoch, by {args.live} steps", flush=True)


def folds(args: argparse.Namespace, rows: list[dict[str, str]], order: list[str]) -> None:
    print("| fold | pooled maps: validation | test rSum | s an epoch | GPO and UniPT: validation | test rSum ", end="")
    print("| s an epoch | difference of tests |\n|---|---|---|---|---|---|---|---|", flush=True)
    told: list[float] = []
    for fold in range(args.folds):
        test = order[200 * fold : 200 * (fold + 1)]
        rest = [name for name in order if name not in set(test)]
        parts = {"train": set(rest[100:]), "validation": set(rest[:100]), "test": set(test)}
        own = setting(args, tables(rows, parts, args.work / f"fold{fold}"))
        pipeline("extract", *own, "--for", "probe,unipt-vse")
        found, cells = [], []
        for name, how in SIDES.items():
            out = args.work / f"fold{fold}-{name}"
            line = [*own, "--objective", "hinge", *args.how, *how, "--seed", fold, "--out", out, "--overwrite"]
            done = pipeline("train", *line)
            found.append(done["test"]["rsum"])
            cells.append(f"{done['validation']['rsum']:.1f} | {found[-1]:.1f} | {done['seconds_per_epoch']:.1f}")
        told.append(found[1] - found[0])
        print(f"| {fold} | {' | '.join(cells)} | {told[-1]:+.1f} |", flush=True)
    error = statistics.stdev(told) / len(told) ** 0.5 if len(told) > 1 else float("nan")
    print(f"\nmean difference {statistics.mean(told):+.1f}, standard error {error:.1f}", flush=True)
    timed(args, [*own, "--objective", "hinge", *args.how, *SIDES["side"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for tables, store and runs")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with flickr8k and weights")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--objectives", default="hinge,contrastive")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--live", type=int, default=4, help="steps to time with the backbones in the loop; 0: none")
    parser.add_argument("--more", default="", help="further options of train, as one text: '--negatives hardest'")
    parser.add_argument("--folds", type=int, default=0, help="compare over so many folds instead")
    args = parser.parse_args()
    args.how = [
        "--epochs",
        args.epochs,
        "--batch-size",
        args.batch_size,
        "--lr",
        args.lr,
        "--device",
        "cpu",
        *args.more.split(),
    ]
    with (args.data / "flickr8k" / "captions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = sorted({row["image"] for row in rows})
    order = [names[i] for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()]
    (folds if args.folds else acceptance)(args, rows, order)


if __name__ == "__main__":
    main()
