"""Extraction against the bare forward pass over the same batches.

    python tests/benchmarks/extraction.py --data GLUE [--rows 2000] [--rounds 5] [--model minilm]

Real texts of SST-2 through a real MiniLM, the states of SHERL, LST and the probe as float16. `bare`: the frozen modules
on the padded batches, nothing collected, nothing kept. `extraction`: hooks, packing, encoding, checks for NaN, digests,
writing and sealing with fsync, until everything is on the disk. In turn, in one process; ratios of each round.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.commands.prepare import load_backbone
from pipeline.extract.batching import extraction_batches
from pipeline.extract.extraction import compute
from pipeline.extract.feature_space import SpaceOptions, space_identity
from pipeline.extract.kernels.memory import keep_freed_memory
from pipeline.extract.pretrained import checkpoint_for
from pipeline.extract.tasks import load_task
from pipeline.lookup.recipe import wanted_states
from pipeline.recipe import Recipe
from pipeline.store import Store
from tests.benchmarks import results

TOKENS = 4096  # the default of `extract` on a CPU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None, help="where the temporary stores are made")
    parser.add_argument("--dry", action="store_true", help="do not write RESULTS.md")
    args = parser.parse_args()
    keep_freed_memory()
    checkpoint = checkpoint_for(args.model)
    backbone = checkpoint.backbone
    task = load_task("sst2", args.data)
    options = SpaceOptions()
    inputs = backbone.prepare(checkpoint.tokenizer, task.rows("train").head(args.rows).texts, options.text)
    keys = inputs.keys()
    states = wanted_states(Recipe(), backbone)
    live = load_backbone(checkpoint, options.precision, options.attention, torch.device("cpu"))
    batches = [inputs.take(b) for b in extraction_batches(inputs.tokens(), 0, TOKENS)]

    def bare() -> None:
        with torch.inference_mode():
            for part in batches:
                batch: Any = part.batch()
                # The last state alone: every block runs, one output is picked up.
                backbone.run(live.model, batch, backbone.states()[-1:])

    bare()
    seconds: list[tuple[float, float]] = []
    for number in range(args.rounds):
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        begun = time.perf_counter()
        bare()
        middle = time.perf_counter()
        space = Store.open(folder / "store", create=True).create_space(space_identity(checkpoint, options))
        report = compute(space, inputs, keys, states, live, tokens=TOKENS, quiet=True)
        end = time.perf_counter()
        shutil.rmtree(folder)
        seconds.append((middle - begun, end - middle))
        line = f"bare {middle - begun:.2f} s, extraction {end - middle:.2f} s"
        print(f"round {number + 1}: {line}, ratio {(end - middle) / (middle - begun):.3f}", flush=True)
    ratio = statistics.median(b / a for a, b in seconds)
    fastest = [min(column) for column in zip(*seconds, strict=True)]
    about = (
        f"{args.rows} training texts of SST-2, {args.model}, {len(states)} states, {report.bytes / 1e6:.0f} MB, "
        f"{len(batches)} batches of at most {TOKENS} padded tokens, {torch.get_num_threads()} threads, computed in "
        f"float32. Fastest of {args.rounds} rounds: bare forward {fastest[0]:.2f} s, extraction {fastest[1]:.2f} s, "
        f"ratio {fastest[1] / fastest[0]:.3f}; median of the rounds' ratios {ratio:.3f}."
    )
    print(about)
    if not args.dry:
        command = " ".join(["python tests/benchmarks/extraction.py --data GLUE", *sys.argv[3:]])
        results.write("Extraction", command, about)


if __name__ == "__main__":
    main()
