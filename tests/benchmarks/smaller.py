"""Smaller states: what number formats and projections cost in bytes, speed and task metric, on real data.

    python tests/benchmarks/smaller.py --data GLUE [--rows 4000] [--epochs 3] [--seeds 3] [--folder FOLDER]

Three tables on MiniLM. Direct effect: tuners trained on float32 states, their test states encoded and decoded once in
each format; how many predictions change. Retrained: a store of its own and tuners trained from scratch for each format
and projection. Ideas: what else was tried on the same real states, kept or not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.commands.extract import run_extract
from pipeline.commands.train import run_train
from pipeline.extract.encoding import decode, encode
from pipeline.extract.projection import Moments
from pipeline.jobs.job import Job, load_job
from pipeline.jobs.sources import store_source
from pipeline.recipe import Recipe
from pipeline.runs import load_run
from pipeline.terminal import table_text
from tests.benchmarks import results

TUNERS = ("sherl", "lst")
FORMATS = ("float32", "float16", "bfloat16", "int8")
WIDTH = 384
# (format, projection): the formats alone, then a quarter and an eighth of the channels.
STORES = [(f, "none") for f in FORMATS] + [
    ("float16", f"{kind}:{WIDTH // n}") for n in (4, 8) for kind in ("pca", "orthogonal")
]
Table = tuple[list[str], list[list[str]]]


def quiet(_: str) -> None:
    """Say nothing."""


def recipe(args: argparse.Namespace, task: str, fmt: str, projection: str) -> Recipe:
    name = f"{task}-{fmt}-{projection.replace(':', '')}"
    return Recipe(
        model="minilm", task=task, data=str(args.data), limit=args.rows, store=str(args.folder / name), format=fmt,
        projection=None if projection == "none" else projection, tuners=TUNERS, epochs=args.epochs, overwrite=True,
    )  # fmt: skip


def predictions(model: Any, job: Job, split: str, change: Callable[[Tensor], Tensor] | None) -> Iterator[Tensor]:
    source = store_source(job, split, 64)
    with torch.no_grad():
        for batch in source.sequential():
            if change is not None:
                batch.states = {name: change(rows) for name, rows in batch.states.items()}
            yield model.predict(batch)["label"]


def direct(args: argparse.Namespace) -> Table:
    """Predictions that change when test states go through a format; all rows of GLUE's dev sets."""
    rows = []
    for task, splits in (("sst2", ("test",)), ("cola", ("validation", "test"))):
        run_extract(recipe(args, task, "float32", "none"), quiet, quiet=True)
        for tuner in TUNERS:
            out = args.folder / "runs" / f"{task}-{tuner}"
            run_train(replace(recipe(args, task, "float32", "none"), tuner=tuner, out=str(out)), quiet, quiet=True)
            run = load_run(out)
            run.model.eval()
            plain = torch.cat([p for s in splits for p in predictions(run.model, run.job, s, None)])
            cells = [task, tuner, f"{len(plain):,}"]
            for fmt in FORMATS[1:]:

                def change(x: Tensor, fmt: str = fmt) -> Tensor:
                    return decode(encode(x, fmt))

                other = torch.cat([p for s in splits for p in predictions(run.model, run.job, s, change)])
                changed = int((other != plain).sum())
                cells.append(f"{changed} ({changed / len(plain):.2%})")
            rows.append(cells)
            print(*cells, flush=True)
    return ["task", "tuner", "test rows", *FORMATS[1:]], rows


def samples_a_second(job: Job) -> float:
    """Of the stream alone, from a warm page cache."""
    source = store_source(replace(job, recipe=replace(job.recipe, host_memory="0")), "train", 64)
    best = np.inf
    for epoch in range(3):
        begun = time.perf_counter()
        for _ in source.epoch(epoch):
            pass
        best = min(best, time.perf_counter() - begun)
    return source.n / best


def retrained(args: argparse.Namespace) -> Table:
    """Bytes, speed of the stream and accuracy on SST-2 of every store, tuners trained from scratch."""
    rows, whole = [], 0.0
    for fmt, projection in STORES:
        wanted = recipe(args, "sst2", fmt, projection)
        run_extract(wanted, quiet, quiet=True)
        job = load_job(replace(wanted, tuner="lst"))
        size = store_source(job, "train", 64).nbytes / len(job.tables["train"].keys)
        whole = whole or size
        cells = [f"{fmt}, {projection}" if projection != "none" else fmt, f"{size:,.0f}", f"{size / whole:.3f}"]
        cells.append(f"{samples_a_second(job):,.0f}")
        for tuner in TUNERS:
            scores = []
            for seed in range(args.seeds):
                out = str(args.folder / "runs" / "again")
                done = run_train(replace(wanted, tuner=tuner, seed=seed, out=out), quiet, quiet=True)
                scores.append(100 * done["test"]["accuracy"])
            cells.append(f"{np.mean(scores):.1f} ± {np.std(scores, ddof=1 if len(scores) > 1 else 0):.1f}")
        rows.append(cells)
        print(*cells, flush=True)
    return ["stored as", "bytes a sample", "÷ float32", "samples/s", *(f"{t}, accuracy × 100" for t in TUNERS)], rows


def error(found: Tensor, x: Tensor) -> float:
    """Root mean square of the difference over that of the values."""
    return float(((found - x).square().mean() / x.square().mean()).sqrt())


def own(x: Tensor) -> Any:
    """The 96 channels of largest variance of `x`."""
    moments = Moments()
    moments.add({"x": x})
    return moments.pca(96)


def ideas(args: argparse.Namespace) -> Table:
    """Bytes against float16 and error of other ways to store the same rows, and how fast they come back."""
    job = load_job(replace(recipe(args, "sst2", "float32", "none"), tuner="lst"))
    batch = next(store_source(job, "train", 1000).sequential())
    states = [batch.states[f"encoder.{i}"] for i in range(6)]
    x, before = states[3], states[2]
    half = x.half().numpy()
    bits, size = half.view(np.uint16), half.nbytes
    rows = []

    def add(name: str, stored: float, back: Callable[[], Any], found: Tensor, verdict: str) -> None:
        seconds = []
        for _ in range(5):
            begun = time.perf_counter()
            back()
            seconds.append(time.perf_counter() - begun)
        rate = f"{size / min(seconds) / 1e9:.1f}"
        rows.append([name, f"{stored / size:.3f}", f"{error(found, x):.1e}", rate, verdict])
        print(*rows[-1], flush=True)

    def packed(codec: Any, data: np.ndarray) -> tuple[int, Callable[[], Any]]:
        stored = codec.encode(np.ascontiguousarray(data))
        return len(stored), lambda: codec.decode(stored)

    exact = torch.from_numpy(half).float()
    add("float16 as it is", size, lambda: half.copy(), exact, "kept: the default")
    for name in ("lz4", "zstd"):
        codec = numcodecs.Blosc(name, 5, numcodecs.Blosc.SHUFFLE)
        add(f"float16, bytes shuffled, {name}", *packed(codec, bits), exact, "no: slow, saves little")
    zstd = numcodecs.Blosc("zstd", 5, numcodecs.Blosc.SHUFFLE)
    delta = (x - before).half().numpy()
    add("float16 difference to the layer before, zstd", *packed(zstd, delta), before + torch.from_numpy(delta), "no")
    for keep in (7, 5):
        rounder = numcodecs.BitRound(keepbits=keep)
        cut = rounder.decode(rounder.encode(half.copy()))
        found = torch.from_numpy(np.asarray(cut).view(np.float16).reshape(half.shape).copy()).float()
        verdict = "no: int8 is smaller, faster"
        add(f"float16 rounded to {keep} bits, zstd", *packed(zstd, found.half().numpy()), found, verdict)
    small = encode(x, "int8")
    add("int8, a scale a row", small.nbytes, lambda: decode(small), decode(small), "kept: `--format int8`")
    channel = x.abs().amax(0) / 127
    number = (x / channel).round().to(torch.int8)
    stored = number.numel() + 4 * len(channel)
    add(
        "int8, a scale a channel",
        stored,
        lambda: number.float() * channel,
        number.float() * channel,
        "half the error: not built, it needs a fit",
    )
    half_of, rest = len(x) // 2, x[len(x) // 2 :]  # fitted on one half, the error is that of the other
    for name, fitted in (("own", own(x[:half_of])), ("shared", own(torch.cat([s[:half_of] for s in states[:4]])))):
        mean, basis = fitted.mean["x"], fitted.basis["x"]
        z = ((rest - mean) @ basis).half()
        off = error(z.float() @ basis.T + mean, rest)
        verdict = "kept: `--projection pca:96`" if name == "own" else "no: worse for equal bytes"
        about = "a basis a layer" if name == "own" else "one basis for four layers"
        rows.append([f"pca:96 as float16, {about}", "0.250", f"{off:.1e}", "as float16", verdict])
        print(*rows[-1], flush=True)
    return ["stored as", "bytes ÷ float16", "relative error", "GB/s back", "verdict"], rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="do not write RESULTS.md")
    args = parser.parse_args()
    args.folder = args.folder or Path(tempfile.mkdtemp())
    tables = [direct(args), retrained(args), ideas(args)]
    heads = (
        f"Direct effect: tuners trained for {args.epochs} epochs on float32 states of {args.rows:,} rows; predictions "
        "of GLUE's dev rows that change when their states go through a format.",
        f"Retrained from scratch: SST-2, {args.rows:,} training rows, {args.epochs} epochs, accuracy on GLUE's 872, "
        f"mean and deviation of {args.seeds} seeds. Projections as float16; the last two of MiniLM's six states stay "
        "full, so the bytes shrink by less than the channels. samples/s: the stream alone, warm page cache.",
        "Other ideas, on one layer's states of 1,000 texts.",
    )
    body = []
    for about, (head, rows) in zip(heads, tables, strict=True):
        print(f"\n{about}\n" + table_text(head, rows))
        body += [about, "", results.markdown(head, rows), ""]
    if not args.dry:
        results.write("Smaller states", "python tests/benchmarks/smaller.py --data GLUE", "\n".join(body))


if __name__ == "__main__":
    main()
