"""A small real language model on real text: `python tests/benchmarks/language.py [--seeds 0,1,2] [--methods …]`.

stories260k (Llama shape, 5 layers, width 64, trained on children's stories) learns SST-2's sentences. Rows: the first
8,000 of GLUE's training sentences in the order of `torch.randperm` with seed 42, without the blank at their end, each
as begin token, at most 94 tokens, end token; figures are nats a token over the 872 development sentences, best of 3
epochs. A method's learning rate is the best of three on training sentences that are none of these 8,000, after an
epoch of half of the rows, so that the development sentences choose nothing but the epoch. Each method is a `pipeline
compare`, from the store and, for seconds alone, one epoch live; memory is that of a step. `--keep FOLDER` goes on where
an earlier call ended; `--rows` and `--rates 1` make it small.
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

from transformers import AutoTokenizer

from pipeline.extract.tasks import fixed_order
from pipeline.jobs.job import load_job, store_source
from pipeline.recipe import Recipe
from pipeline.terminal import size_text
from pipeline.train.evaluate import evaluate
from tests.benchmarks.results import markdown, write

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
MODEL, SENTENCES, ROWS, LENGTH = SHARED / "weights" / "stories260k", SHARED / "glue" / "SST-2", 8000, 96
HELD = 500  # training sentences after the rows, on which learning rates are chosen
RATES = ("1e-3", "3e-3", "1e-2")
# name → tuner or baseline, its options.
METHODS: dict[str, tuple[str, list[str]]] = {
    "linear probe": ("probe", []),
    "ladder (LST, r 4)": ("lst", ["--reduction", "4"]),
    "SHERL, r 2, gate 0.1": ("sherl", ["--reduction", "2", "--gate", "0.1"]),
    "full fine-tuning": ("full", []),
    "last block unfrozen": ("partial-1", []),
    "SHERL, r 2, gate 0": ("sherl", ["--reduction", "2", "--gate", "0"]),
    "SHERL, r 2, gate 0.1, layers 2, 3": ("sherl", ["--reduction", "2", "--gate", "0.1", "--layers", "2,3"]),
    "QST, r 4": ("qst", ["--reduction", "4"]),
    "MLP probe, width 128": ("probe", ["--mlp", "128"]),
    "linear probe of layer 2": ("probe", ["--layers", "2"]),
    "all-layer probe (Head2Toe)": ("head2toe", []),
    "LoRA, rank 8": ("lora", []),
}
WEIGHTS = 4 * 260_032  # bytes of the backbone, which a live run holds too
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


def shortened(tokenizer: Any, text: str) -> str:
    """The text of its first tokens, so that begin and end token find room beside them."""
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = made["input_ids"][: LENGTH - 2]
    short: str = text[: made["offset_mapping"][len(ids) - 1][1]]
    assert tokenizer(short, add_special_tokens=False)["input_ids"] == ids, text
    return short


def rows(folder: Path, count: int) -> dict[str, list[object]]:
    """For "rates" and "dev" the files, as options that name them and the model."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    train, dev = sentences(SENTENCES / "train.tsv"), sentences(SENTENCES / "dev.tsv")
    order = fixed_order(len(train))
    files = {
        "sst2-text": [train[i] for i in order[:count]],
        "sst2-half": [train[i] for i in order[: count // 2]],
        "held": [train[i] for i in order[ROWS : ROWS + HELD]],
        "dev": dev,
    }
    for name, texts in files.items():
        lines = [json.dumps({"text": shortened(tokenizer, text)}) + "\n" for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    common = ["--model", MODEL, "--store", folder / "store", "--max-length", LENGTH]
    pairs = {"rates": ("sst2-half", "held"), "dev": ("sst2-text", "dev")}
    return {
        use: [*common, "--task", folder / f"{task}.jsonl", "--validation", folder / f"{held}.jsonl"]
        for use, (task, held) in pairs.items()
    }


def frozen(folder: Path) -> float:
    """Nats a token of the model as it is: a probe at its start."""
    recipe = Recipe(model=str(MODEL), task=str(folder / "sst2-text.jsonl"), validation=str(folder / "dev.jsonl"),
                    store=str(folder / "store"), tuner="probe")  # fmt: skip
    job = load_job(recipe)
    return evaluate(job.model(0), store_source(job, "validation", 64), job.objective.scorer())["loss"]


class Kept:
    """What was measured, by its name, in a file of `folder`."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "measured.json"
        self.found: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def compare(self, name: str, *args: object) -> dict[str, Any]:
        """The one row of a comparison, run if it is not there yet."""
        if name not in self.found:
            out = self.file.parent / "runs" / name
            out.parent.mkdir(exist_ok=True)
            (self.found[name],) = pipeline("compare", *args, "--batch-size", 32, "--out", out)["rows"]
            self.file.write_text(json.dumps(self.found, indent=1))
        row: dict[str, Any] = self.found[name]
        print(f"{name}: {row['metric']:.4f}, {row['seconds_per_epoch']:.1f} s an epoch", flush=True)
        return row


def measure(name: str, files: dict[str, list[object]], kept: Kept, seeds: str, rates: int) -> tuple[str, ...]:
    """The table's row of a method."""
    method, options = METHODS[name]
    how = ["--tuners", method, *options]
    among = RATES if rates == 3 else RATES[1:2]
    tried = {
        rate: kept.compare(f"{name}, rate {rate}", *files["rates"], *how, "--lr", rate, "--epochs", 1)["metric"]
        for rate in (among if len(among) > 1 else ())
    }
    rate = min(tried, key=lambda r: tried[r]) if tried else among[0]
    how += ["--lr", rate]
    row = kept.compare(name, *files["dev"], *how, "--epochs", 3, "--seeds", seeds)
    cached = method not in BASELINES
    live = kept.compare(f"{name}, live", *files["dev"], *how, "--epochs", 1, "--live") if cached else row
    return (
        name,
        f"{row['trainable']:,}",
        rate,
        f"{row['metric']:.3f}" + (f" ± {row['spread']:.3f}" if row["spread"] is not None else ""),
        f"{row['seconds_per_epoch']:.1f}" if cached else "–",
        f"{live['seconds_per_epoch']:.1f}",
        size_text(row["memory_bytes"]),
        size_text(row["memory_bytes"] + (WEIGHTS if cached else 0)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default="", help="names or parts of them, with semicolons between; default: all")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--rates", type=int, default=3, choices=(1, 3), help="learning rates to choose from")
    parser.add_argument("--keep", type=Path, help="folder to work in, and to go on from")
    args = parser.parse_args()
    if not MODEL.is_dir() or not SENTENCES.is_dir():
        raise SystemExit(f"real data is not there: {SHARED}")
    parts = [part.strip() for part in args.methods.split(";") if part.strip()]
    chosen = [n for n in METHODS if not parts or n in parts or any(p in n for p in parts if p not in METHODS)]
    with tempfile.TemporaryDirectory() as made:
        folder: Path = args.keep or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        files = rows(folder, args.rows)
        for use in files.values():
            told = pipeline("extract", *use, "--for", "probe,lst,qst,sherl,head2toe")
        assert not told["truncated"], told
        start = frozen(folder)
        kept = Kept(folder)
        table = [measure(name, files, kept, args.seeds, args.rates) for name in chosen]
    body = (
        f"stories260k on {args.rows:,} sentences of SST-2, at most {LENGTH} tokens with begin and end token. Nats a "
        f"token on the 872 development sentences, 3 epochs, batch 32, seeds {args.seeds}, mean ± standard deviation; "
        f"frozen: {start:.3f}. Learning rates: the best of three on {HELD} other training sentences (half of the rows, "
        "one epoch, seed 0). Seconds of an epoch and memory of a step, counted from tensors, from the store and with "
        "the backbone live, whose weights are then counted, its forward pass is not.\n\n"
    )
    head = ("method", "trainable", "rate", "nats a token", "s/epoch cached", "live", "memory cached", "live")
    body += markdown(head, table)
    print(body)
    if args.rows == ROWS and args.rates == 3:
        some = f' --methods "{args.methods}"' if parts else ""
        write("Language model", f"python tests/benchmarks/language.py --seeds {args.seeds}{some}", body)


if __name__ == "__main__":
    main()
