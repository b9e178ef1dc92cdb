"""Accuracy on real data with a real encoder, from the command line: `python tests/benchmarks/real_tasks.py`.

MiniLM on SST-2 (8,000 training rows, 4 epochs, GLUE's 872 validation rows as test; seeds 0, 1, 2) and CoLA (all rows,
5 epochs; seeds 0, 1). Prints every command it runs and writes the section "Real tasks" of RESULTS.md.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.results import write

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "glue"
JOBS: dict[str, dict] = {
    "sst2": {"extract": ["--limit", "8000"], "epochs": 4, "seeds": (0, 1, 2), "metric": "accuracy"},
    "cola": {"extract": [], "epochs": 5, "seeds": (0, 1), "metric": "matthews"},
}
TUNERS = ("probe", "sherl", "lst")


def pipeline(*args: object) -> dict:
    words = ["pipeline", *map(str, args)]
    print("$", " ".join(words), flush=True)
    done = subprocess.run([sys.executable, "-m", *words, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    if not DATA.is_dir():
        raise SystemExit(f"real data is not there: {DATA}")
    rows = []
    commands = []
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        for task, job in JOBS.items():
            common = ["--model", "minilm", "--task", task, "--store", store]
            pipeline("extract", *common, "--data", DATA, *job["extract"])
            commands.append(" ".join(["pipeline extract --model minilm --task", task, "--data GLUE", *job["extract"]]))
            commands.append(
                f"pipeline train --model minilm --task {task} --tuner TUNER --epochs {job['epochs']} --seed SEED"
            )
            for tuner in TUNERS:
                runs = []
                for seed in job["seeds"]:
                    out = Path(folder) / f"{task}-{tuner}-{seed}"
                    options = ["--tuner", tuner, "--epochs", job["epochs"], "--seed", seed, "--out", out]
                    runs.append(pipeline("train", *common, *options))
                    print(f"  test {runs[-1]['test']}", flush=True)
                scores = [100 * r["test"][job["metric"]] for r in runs]
                seconds = statistics.median(r["seconds_per_epoch"] for r in runs)
                each = ", ".join(f"{s:.1f}" for s in scores)
                count = runs[0]["trainable_parameters"]
                rows.append(
                    f"| {task} | {tuner} | {count:,} | {statistics.mean(scores):.1f} | {each} | {seconds:.1f} |"
                )
    head = [
        "MiniLM (all-MiniLM-L6-v2), states from the store as float16, default options. SST-2: 8,000 training rows,",
        "accuracy × 100 on GLUE's 872; CoLA: all rows, Matthews × 100 on half of GLUE's 1,043 (the papers' test half).",
        "",
        "| task | tuner | trainable | mean | seeds | s/epoch |",
        "|---|---|---|---|---|---|",
    ]
    write("Real tasks", "python tests/benchmarks/real_tasks.py", "\n".join([*head, *rows, "", "```", *commands, "```"]))


if __name__ == "__main__":
    main()
