"""A small real language model on real text: `python tests/benchmarks/language.py [--seeds 0,1,2] [--methods …]`.

stories260k (Llama shape, 5 layers, width 64, trained on children's stories) learns SST-2's sentences. Rows: the first
8,000 of GLUE's training sentences in the order of `torch.randperm` with seed 42, without the blank at their end, each
as begin token, tokens, end token, cut to 96; figures are nats a token over the 872 development sentences, best of 3
epochs. Each method is a `pipeline compare`, from the store and, with the first seed, live; memory is that of a step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.extract.tasks import fixed_order
from pipeline.jobs.job import load_job, store_source
from pipeline.recipe import Recipe
from pipeline.terminal import size_text
from pipeline.train.evaluate import evaluate
from tests.benchmarks.results import markdown, write

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
MODEL, SENTENCES, ROWS, LENGTH = SHARED / "weights" / "stories260k", SHARED / "glue" / "SST-2", 8000, 96
# name → tuner or baseline, its options; learning rates were chosen on the first seed.
METHODS: dict[str, tuple[str, list[str]]] = {
    "linear probe": ("probe", ["--lr", "3e-3"]),
    "MLP probe, width 128": ("probe", ["--mlp", "128", "--lr", "3e-3"]),
    "ladder (LST, r 4)": ("lst", ["--reduction", "4", "--lr", "5e-3"]),
    "QST, r 4": ("qst", ["--reduction", "4", "--lr", "5e-3"]),
    "SHERL, r 2, gate 0.1": ("sherl", ["--reduction", "2", "--gate", "0.1", "--lr", "3e-3"]),
    "SHERL, r 2, gate 0": ("sherl", ["--reduction", "2", "--gate", "0", "--lr", "3e-3"]),
    "last block unfrozen": ("partial-1", ["--lr", "1e-3"]),
    "LoRA, rank 8": ("lora", ["--lr", "3e-3"]),
    "full fine-tuning": ("full", ["--lr", "1e-3"]),
}
BASELINES = ("partial-1", "lora", "full")


def pipeline(*args: object) -> dict[str, Any]:
    words = ["pipeline", *map(str, args)]
    print("$", " ".join(words), flush=True)
    done = subprocess.run([sys.executable, "-m", *words, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def sentences(file: Path) -> list[str]:
    lines = file.read_text(encoding="utf-8-sig").split("\n")[1:]
    return [line.split("\t")[0].strip() for line in lines if line]


def rows(folder: Path) -> list[object]:
    """The two files, and the options that name them and the model."""
    train, dev = sentences(SENTENCES / "train.tsv"), sentences(SENTENCES / "dev.tsv")
    for name, texts in (("sst2-text", [train[i] for i in fixed_order(len(train))[:ROWS]]), ("dev", dev)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return ["--model", MODEL, "--task", folder / "sst2-text.jsonl", "--validation", folder / "dev.jsonl",
            "--store", folder / "store", "--max-length", LENGTH]  # fmt: skip


def frozen(folder: Path) -> float:
    """Nats a token of the model as it is: a probe at its start."""
    recipe = Recipe(model=str(MODEL), task=str(folder / "sst2-text.jsonl"), validation=str(folder / "dev.jsonl"),
                    store=str(folder / "store"), tuner="probe")  # fmt: skip
    job = load_job(recipe)
    return evaluate(job.model(0), store_source(job, "validation", 64), job.objective.scorer())["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default="", help="parts of names, with commas between; default: all")
    args = parser.parse_args()
    if not MODEL.is_dir() or not SENTENCES.is_dir():
        raise SystemExit(f"real data is not there: {SHARED}")
    parts = [part.strip().lower() for part in args.methods.split(",") if part.strip()]
    chosen = {n: m for n, m in METHODS.items() if not parts or any(part in n.lower() for part in parts)}
    table = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        common = rows(folder)
        told = pipeline("extract", *common, "--for", "probe,lst,qst,sherl")
        start = frozen(folder)
        for name, (method, options) in chosen.items():
            how = ["--tuners", method, *options, "--epochs", 3, "--batch-size", 32]
            (row,) = pipeline("compare", *common, *how, "--seeds", args.seeds, "--out", folder / name)["rows"]
            live = row
            if method not in BASELINES:
                first = ["--seeds", args.seeds.split(",")[0], "--live", "--out", folder / f"{name} live"]
                (live,) = pipeline("compare", *common, *how, *first)["rows"]
            cached = method not in BASELINES
            table.append(
                (
                    name,
                    f"{row['trainable']:,}",
                    f"{row['metric']:.3f}" + (f" ± {row['spread']:.3f}" if row["spread"] is not None else ""),
                    f"{row['seconds_per_epoch']:.1f}" if cached else "–",
                    f"{live['seconds_per_epoch']:.1f}",
                    size_text(row["memory_bytes"]),
                )
            )
            print(table[-1], flush=True)
    body = (
        f"stories260k on {ROWS:,} sentences of SST-2; of all, {told['truncated']} are cut to {LENGTH} tokens. "
        f"Nats a token on the 872 development sentences, 3 epochs, batch 32, seeds {args.seeds}; frozen: {start:.3f}. "
        "Seconds of an epoch from the store and with the backbone live (of the first seed); memory of a step, counted "
        "from tensors.\n\n"
    )
    head = ("method", "trainable", "nats a token", "s/epoch cached", "live", "memory")
    body += markdown(head, table)
    print(body)
    if not parts:
        write("Language model", f"python tests/benchmarks/language.py --seeds {args.seeds}", body)


if __name__ == "__main__":
    main()
