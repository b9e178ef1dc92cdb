"""What `plan` predicts against what `bench` measures, over five pairs of model and task.

    python tests/benchmarks/plan_accuracy.py --data GLUE [--pairs minilm/sst2/sherl,…]

MiniLM with its own weights; the other shapes with random weights and a tokenizer trained on the spot, on which neither
speed nor size depends.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.commands.bench import run_bench, shown
from pipeline.recipe import Recipe
from pipeline.terminal import table_text
from tests.benchmarks import results, setting

# model or shape, task, tuner, rows: as many as keep a pair within two minutes on two cores
PAIRS = (
    ("minilm", "sst2", "sherl", 1024),
    ("minilm", "rte", "lst", 256),
    ("bert-base", "cola", "sherl", 256),
    ("t5-small", "stsb", "lst", 256),
    ("t5-base", "rte", "sherl", 64),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pairs", default="", help="only these, as MODEL/TASK/TUNER with commas")
    parser.add_argument("--dry", action="store_true", help="do not write RESULTS.md")
    args = parser.parse_args()
    wanted = {tuple(p.split("/")) for p in args.pairs.split(",") if p}
    rows, worst = [], 1.0
    for model, task, tuner, limit in PAIRS:
        if wanted and (model, task, tuner) not in wanted:
            continue
        folder = Path(tempfile.mkdtemp())
        try:
            name = model
            if model != "minilm":
                texts, _, _ = setting.texts_and_task(64, folder)
                name = str(setting.checkpoint(model, folder / "checkpoint", texts))
            recipe = Recipe(
                model=name, task=task, data=str(args.data), tuner=tuner, limit=limit, batch_size=32, device="cpu",
                store=str(folder / "store"),
            )  # fmt: skip
            result, _ = run_bench(recipe, lambda line: None)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        for what, found in result["compared"].items():
            ratio = found["ratio"]
            if what != "bytes":
                worst = max(worst, ratio, 1 / ratio)
            pair = f"{model}, {task}, {tuner}, {limit} rows"
            rows.append((pair, what, shown(what, found["predicted"]), shown(what, found["measured"]), f"{ratio:.3f}"))
            print(*rows[-1], flush=True)
    head = ["pair", "what", "predicted", "measured", "measured ÷ predicted"]
    about = f"Batch 32, float16, on this machine's CPU. The worst time is off by a factor of {worst:.2f}."
    print(f"\n{about}\n" + table_text(head, [list(r) for r in rows]))
    if not args.dry:
        command = "python tests/benchmarks/plan_accuracy.py --data GLUE"
        results.write("Plan and bench", command, f"{about}\n\n{results.markdown(head, rows)}")


if __name__ == "__main__":
    main()
