"""CamVid from cached features: UPerNet of width 64 on a frozen MobileNetV2, 360 × 480, 12 epochs, by number format.

Everything runs through the public commands' functions. Cached and live epochs are timed in one process; accuracies
are of the test split, at the epoch that was best on the validation split.

    python -m tests.benchmarks.segmentation --data ../shared/data --out /tmp/camvid --seeds 2
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.commands.extract import run_extract
from pipeline.commands.train import run_train
from pipeline.jobs.job import load_job
from pipeline.recipe import Recipe
from pipeline.train.fit.optimizer import adamw
from pipeline.train.fit.options import FitOptions
from tests.benchmarks.results import markdown, write

NOTE = """Frozen MobileNetV2 × 0.35 with ImageNet features, UPerNet of width 64 with its auxiliary head (514,166
trainable parameters), 92 / 34 / 39 images of CamVid at 360 × 480, padded to 384 × 480; 11 classes, batch 2, {epochs}
epochs, the defaults of `pipeline train`. Seconds an epoch are of processor time, training alone, one thread, from
{steps} steps each, states from the store and the backbone in the loop in turn, in one process. pca-maps:K keeps each
map that is wider in K channels, float16, widened again before the head reads it (the maps are 8 to 112 channels wide).
"""


def epoch_seconds(recipe: Recipe, steps: int) -> tuple[float, float]:
    """Processor seconds of an epoch's training, cached and live."""
    job = load_job(recipe)
    found = []
    for source in (job.sources(False)["train"], job.sources(True)["train"]):
        model = job.model(0).train()
        optimizer, _ = adamw(model, FitOptions(lr=1e-6))
        # The first batches also warm up.
        for number, batch in enumerate(itertools.islice(source.epochs(0, 2), steps + 2)):
            if number == 2:
                began = time.process_time()
            optimizer.zero_grad(set_to_none=True)
            model.loss(batch).backward()
            optimizer.step()
        found.append((time.process_time() - began) / steps * len(source))
    return found[0], found[1]


def trained(recipe: Recipe) -> dict[str, Any]:
    """The metrics of a run, which is trained unless its folder holds it finished."""
    done = Path(str(recipe.out)) / "metrics.json"
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    return run_train(recipe, lambda text: None, quiet=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--formats", nargs="+", default=["float16", "int8", "pca-maps:8"], help="or projections")
    parser.add_argument("--steps", type=int, default=20, help="of training that are timed")
    args = parser.parse_args()
    task = {"model": str(args.data / "weights/mobilenetv2_035"), "task": str(args.data / "camvid")}
    rows = []
    for fmt in args.formats:
        stored = {"format": "float16", "projection": "none"} | {"projection" if ":" in fmt else "format": fmt}
        common = {**task, "store": str(args.out / "store"), **stored, "image_size": "own"}
        done = run_extract(Recipe(**common, tuners=("fixed",)), print, quiet=True)
        sizes = args.out / f"bytes-{fmt}.json"  # a command that was stopped goes on where it was
        if done["computed"]:
            sizes.write_text(json.dumps(done["bytes"]))
        size = f"{json.loads(sizes.read_text()) / 1e6:.0f} MB"
        print(f"{fmt}: extracted {done['computed']} images, {size}, {done['seconds']:.1f} s", flush=True)
        options = {**common, "tuner": "fixed", "epochs": args.epochs, "objective_options": {"head_width": 64}}
        runs = []
        for seed in range(args.seeds):
            runs.append(trained(Recipe(**options, seed=seed, out=str(args.out / f"runs/{fmt}-{seed}"))))
            print(f"{fmt} seed {seed}: {runs[-1]['test']}", flush=True)
        cached, live = (f"{s:.1f}" for s in epoch_seconds(Recipe(**options), args.steps))
        cells = [f"{100 * np.mean([r[s]['miou'] for r in runs]):.1f}" for s in ("validation", "test")]
        each = ", ".join(f"{100 * r['test']['miou']:.1f}" for r in runs)
        accuracy = f"{100 * np.mean([r['test']['pixel_accuracy'] for r in runs]):.1f}"
        rows.append((fmt, size, *cells, each, accuracy, cached, live))
        print(*rows[-1], flush=True)
    head = ("format", "store", "validation mIoU", "test mIoU", "by seed", "pixel accuracy", "s/epoch cached", "live")
    note = NOTE.format(steps=args.steps, epochs=args.epochs)
    said = f"--formats {' '.join(args.formats)} --seeds {args.seeds} --epochs {args.epochs} --steps {args.steps}"
    command = f"python -m tests.benchmarks.segmentation --data DATA --out FOLDER {said}"
    write("Segmentation", command, f"{note}\n\n{markdown(head, rows)}")


if __name__ == "__main__":
    main()
