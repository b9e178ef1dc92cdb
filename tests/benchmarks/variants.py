"""Variants of LST, SHERL and Head2Toe on MiniLM: `python tests/benchmarks/variants.py --data GLUE --out FOLDER`.

Writes the section "Variants" of RESULTS.md. Runs that are finished in FOLDER are not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.extracting import run_extract
from pipeline.recipe import Recipe
from pipeline.training import run_train
from tests.benchmarks.results import markdown, write

TASK, ROWS, EPOCHS, SEEDS = "sst2", 2000, 4, (0, 1)
VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    ("lst, random start", "lst", {}),
    ("lst, magnitude, running set", "lst", {"init": "magnitude"}),
    ("lst, magnitude, aligned set", "lst", {"init": "magnitude", "prune": "aligned"}),
    ("sherl, last layer", "sherl", {}),
    ("sherl, single:4", "sherl", {"insert": "single:4"}),
    ("sherl, multi:4", "sherl", {"insert": "multi:4"}),
    ("sherl, tail lora", "sherl", {"tail": "lora"}),
    ("sherl, tail bitfit", "sherl", {"tail": "bitfit"}),
    ("sherl, tail adapter", "sherl", {"tail": "adapter"}),
    ("sherl, tail prompt", "sherl", {"tail": "prompt"}),
    ("head2toe, a tenth of the features", "head2toe", {}),
    ("head2toe, all features", "head2toe", {"features": 1.0}),
    ("probe", "probe", {}),
]
NOTE = """all-MiniLM-L6-v2 (six layers), SST-2, 2,000 training rows, 4 epochs of batch 32, default learning rates,
accuracy × 100 on GLUE's 872, seeds 0 and 1; the machine was shared, so seconds are upper bounds. Two seeds tell no
variants apart that lie within a point of each other."""


def silent(line: str) -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of GLUE tasks")
    parser.add_argument("--out", type=Path, required=True, help="folder for the store and runs")
    args = parser.parse_args()
    common: dict[str, Any] = {"model": "minilm", "task": TASK, "store": str(args.out / "store"), "limit": ROWS}
    rows = []
    for name, tuner, options in VARIANTS:
        run_extract(Recipe(**common, data=str(args.data), tuners=(tuner,), **known(options)), silent, quiet=True)
        runs = []
        for seed in SEEDS:
            out = args.out / "runs" / f"{name.replace(', ', '-').replace(' ', '_').replace(':', '')}-s{seed}"
            if not (out / "metrics.json").exists():
                recipe = Recipe(**common, tuner=tuner, seed=seed, epochs=EPOCHS, batch_size=32, out=str(out), **options)
                run_train(recipe, silent, quiet=True)
            runs.append(json.loads((out / "metrics.json").read_text(encoding="utf-8")))
        scores = [100 * r["test"]["accuracy"] for r in runs]
        seconds = min(r["seconds_per_epoch"] for r in runs)
        count = f"{runs[0]['trainable_parameters']:,}"
        rows.append(
            (name, count, f"{statistics.mean(scores):.1f}", ", ".join(f"{s:.1f}" for s in scores), f"{seconds:.1f}")
        )
        print(*rows[-1], flush=True)
    table = markdown(("variant", "trainable", "mean", "seeds", "s/epoch"), rows)
    write("Variants", "python tests/benchmarks/variants.py --data GLUE --out FOLDER", f"{NOTE}\n\n{table}")


def known(options: dict[str, Any]) -> dict[str, Any]:
    """Those that an extraction must know as well."""
    return {k: v for k, v in options.items() if k in ("init", "prune", "insert")}


if __name__ == "__main__":
    main()
