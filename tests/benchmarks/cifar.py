"""Transfer on real images: published CIFAR-10 networks, the ten classes re-mapped to five pairs of unlike ones.

3,000 images train, 1,000 test, no validation split: the last epoch counts. The networks saw these images under
their own ten labels when they were trained, so accuracies say that the tuners train, not how they generalise.

    python -m tests.benchmarks.cifar --data ../shared/data --out /tmp/cifar --depth 20 --seeds 2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from pipeline.commands.extract import run_extract
from pipeline.commands.train import run_train
from pipeline.recipe import Recipe
from tests import vision
from tests.benchmarks.results import markdown, write

NOTE = """Published CIFAR-10 networks, the ten classes re-mapped to five pairs of unlike ones; 3,000 images train,
1,000 test (the largest class has 22 %), 10 epochs, float16 store, seeds 0 and 1. The networks saw these images under
their own ten labels, so this says that the tuners train from the store, not how they generalise. The machine was
shared with other work: seconds are upper bounds."""
PAIRS = {label: f"pair{label % 5}" for label in range(10)}  # airplane and dog, car and frog, …
WEIGHTS = {20: "resnet20-12fca82f.th", 56: "resnet56-4bfd9763.th"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--depth", type=int, nargs="+", default=[20, 56])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    task = args.out / "pairs"
    if not task.exists():
        vision.unpack_cifar(args.data / "cifar10", task / "train", PAIRS, 0, 3000)
        vision.unpack_cifar(args.data / "cifar10", task / "test", PAIRS, 3000, 4000)
    rows = []
    for depth in args.depth:
        model = args.out / f"resnet{depth}"
        if not model.exists():
            vision.cifar(model, depth, args.data / "weights" / WEIGHTS[depth])
        common = {"model": str(model), "task": str(task), "store": str(args.out / "store")}
        done = run_extract(Recipe(**common, tuners=("probe", "sherl", "unipt")), print, quiet=True)
        print(f"extracted {done['computed']} images, {done['bytes'] / 1e6:.0f} MB, {done['seconds']:.1f} s")
        for tuner in ("probe", "sherl", "unipt"):
            runs = []
            for seed in range(args.seeds):
                out = str(args.out / f"runs/{depth}-{tuner}-{seed}")
                recipe = Recipe(**common, tuner=tuner, seed=seed, epochs=args.epochs, out=out, overwrite=True)
                runs.append(run_train(recipe, lambda text: None, quiet=True))
            scores = [100 * r["test"]["accuracy"] for r in runs]
            seconds = np.mean([r["seconds_per_epoch"] for r in runs])
            count = f"{runs[0]['trainable_parameters']:,}"
            accuracy = f"{np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f}"
            rows.append((f"ResNet-{depth}", tuner, count, accuracy, f"{seconds:.2f}"))
            print(*rows[-1], flush=True)
    table = markdown(("backbone", "tuner", "trainable", "accuracy × 100", "s/epoch"), rows)
    write("Pictures", "python -m tests.benchmarks.cifar --data DATA --out FOLDER", f"{NOTE}\n\n{table}")


if __name__ == "__main__":
    main()
