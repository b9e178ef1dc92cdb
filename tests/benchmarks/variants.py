"""Variants of LST, SHERL and Head2Toe on MiniLM: `python tests/benchmarks/variants.py --data GLUE --out FOLDER`.

Writes the section "Variants" of RESULTS.md, or with `--only NAME` "Variants of NAME". Runs that are finished in FOLDER
are not made again. What a pruned start of LST is worth:
`python tests/benchmarks/variants.py --data GLUE --out FOLDER --only lst --tasks sst2,cola --seeds 0,1,2`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.commands.extract import run_extract
from pipeline.commands.train import run_train
from pipeline.recipe import Recipe
from tests.benchmarks.results import markdown, write

EPOCHS = 4
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
    ("sherl, no live layer", "sherl", {"insert": "none"}),
    ("sherl, blend mhsa", "sherl", {"blend": "mhsa"}),
    ("sherl, blend linear-learned", "sherl", {"blend": "linear-learned"}),
    ("head2toe, a tenth of the features", "head2toe", {}),
    ("head2toe, all features", "head2toe", {"features": 1.0}),
    ("probe", "probe", {}),
]
NOTE = """all-MiniLM-L6-v2 (six layers), {rows:,} training rows, {epochs} epochs of batch 32, default learning rates,
seeds {seeds}; the task's own metric × 100 (sst2: accuracy on GLUE's 872; cola: Matthews on half of its 1,043). The
machine was shared, so seconds are upper bounds. So few seeds tell no variants apart that lie within a point of each
other."""


def silent(line: str) -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of GLUE tasks")
    parser.add_argument("--out", type=Path, required=True, help="folder for the store and runs")
    parser.add_argument("--only", default="", metavar="NAME", help="variants of this tuner alone")
    parser.add_argument("--tasks", default="sst2", help="GLUE tasks, with commas between")
    parser.add_argument("--seeds", default="0,1", help="with commas between")
    parser.add_argument("--rows", type=int, default=2000, help="training rows")
    args = parser.parse_args()
    seeds = [int(s) for s in args.seeds.split(",")]
    variants = [v for v in VARIANTS if args.only in ("", v[1])]
    rows = []
    for task, (name, tuner, options) in itertools.product(args.tasks.split(","), variants):
        common: dict[str, Any] = {"model": "minilm", "task": task, "store": str(args.out / "store"), "limit": args.rows}
        asked = Recipe(**common, data=str(args.data), tuners=(tuner,), tuner_options=options)
        run_extract(asked, silent, quiet=True)
        runs = []
        for seed in seeds:
            out = args.out / "runs" / f"{task}-{name.replace(', ', '-').replace(' ', '_').replace(':', '')}-s{seed}"
            if not (out / "metrics.json").exists():
                own = {"tuner": tuner, "tuner_options": options, "seed": seed, "out": str(out)}
                run_train(Recipe(**common, **own, epochs=EPOCHS, batch_size=32), silent, quiet=True)
            runs.append(json.loads((out / "metrics.json").read_text(encoding="utf-8")))
        scores = [100 * r["test"]["average"] for r in runs]
        seconds = min(r["seconds_per_epoch"] for r in runs)
        count = f"{runs[0]['trainable_parameters']:,}"
        each = ", ".join(f"{s:.1f}" for s in scores)
        rows.append((task, name, count, f"{statistics.mean(scores):.1f}", each, f"{seconds:.1f}"))
        print(*rows[-1], flush=True)
    table = markdown(("task", "variant", "trainable", "mean", "seeds", "s/epoch"), rows)
    note = NOTE.format(rows=args.rows, epochs=EPOCHS, seeds=", ".join(map(str, seeds)))
    asked = {k: getattr(args, k) for k in ("only", "tasks", "seeds", "rows")}
    words = [f"--{k} {v}" for k, v in asked.items() if v != parser.get_default(k)]
    command = " ".join(["python tests/benchmarks/variants.py --data GLUE --out FOLDER", *words])
    write(f"Variants of {args.only}" if args.only else "Variants", command, f"{note}\n\n{table}")


if __name__ == "__main__":
    main()
