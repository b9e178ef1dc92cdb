"""What further runs of a sweep cost: n runs in one pass over the store beside one, in one run on the same batches.

    python tests/benchmarks/sweep.py [--shape small] [--samples 768] [--epochs 2] [--rounds 3] [--only probe] [--write]

A store with random weights of a real shape and the texts of RTE, read in every epoch (`tier` disk; page cache or, with
cold, files dropped from it before each epoch). Seconds are those of whole epochs, reading included, the best of the
rounds, one run and many taking turns; `processor` is the ratio of the processor time of the same two, which a loaded
machine changes less. `operations` is the most that sharing can cost: that of so many single runs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.jobs.job import load_job, sources
from pipeline.recipe import Recipe
from pipeline.train.fit.loop import FitOptions, Training
from pipeline.train.fit.together import fit_all
from tests.benchmarks import results
from tests.benchmarks.setting import SHAPES, extracted

CASES = (("probe", 16, False), ("probe", 16, True), ("lst", 8, False), ("sherl", 8, False))


def drop_cache(folder: Path) -> None:
    """Ask the kernel to forget the files of `folder`."""
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


class Cold:
    """A source whose files are dropped from the page cache before each epoch."""

    def __init__(self, inner: Any, folder: Path) -> None:
        self.inner, self.folder, self.order, self.n = inner, folder, inner.order, inner.n

    def __len__(self) -> int:
        return len(self.inner)

    def epochs(self, first: int, end: int, start: int = 0) -> Any:
        for epoch in range(first, end):
            drop_cache(self.folder)
            yield from self.inner.epochs(epoch, epoch + 1, start if epoch == first else 0)


def seconds(recipe: Recipe, runs: int, epochs: int, cold: bool) -> tuple[float, float, float]:
    """Of all epochs of `runs` runs that differ in their seed, together: (seconds, share of them waiting for data,
    processor seconds). AssertionError where they did not step as one."""
    job = load_job(recipe)
    source: Any = sources(job, None)["train"]
    if cold:
        source = Cold(source, Path(recipe.store))
    folder = Path(tempfile.mkdtemp())
    made = []
    for seed in range(runs):
        options, own = FitOptions(epochs=epochs, lr=1e-4, seed=seed), folder / str(seed)
        model = job.model(seed, made[0].model.tuner.tail if made else None)
        run = Training(model, source, None, None, options, own, job.objective.scorer, job.device)
        run.alike = recipe.tuner
        made.append(run)
    begun, used = time.perf_counter(), time.process_time()
    ended = fit_all(made, progress=False)
    taken, used = time.perf_counter() - begun, time.process_time() - used
    for end in ended if runs > 1 else ():
        assert isinstance(end, dict) and end["stacked"] > 1 and not end["in_turn"], end
    shutil.rmtree(folder)
    waited = sum(e["wait_share"] * e["seconds"] for e in ended if isinstance(e, dict))
    return taken, waited / taken, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--samples", type=int, default=768)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=(), help="probe, lst, sherl")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        cases = [case for case in CASES if not asked.only or case[0] in asked.only]
        tuners = tuple(dict.fromkeys(tuner for tuner, *_ in cases))
        base, _, words = extracted(asked.shape, asked.samples, tuners, Path(name), "float16")
        rows = []
        for tuner, count, cold in cases:
            recipe = replace(base, tuner=tuner, tier="disk", batch_size=32)
            one, many = [], []
            for _ in range(asked.rounds):
                one.append(seconds(recipe, 1, asked.epochs, cold))
                many.append(seconds(recipe, count, asked.epochs, cold))
            (single, waited, alone), (together, _, used) = min(one), min(many)
            where = "cold disk" if cold else "page cache"
            rows.append(
                (f"{count} × {tuner}, {where}", f"{single:.2f}", f"{100 * waited:.0f} %", f"{together:.2f}",
                 f"{together / single:.2f}", f"{used / alone:.2f}", f"{count:.1f}")
            )  # fmt: skip
            print(*rows[-1], sep="  ", flush=True)
    head = ("runs", "one, s", "of it waiting", "together, s", "together / one", "processor", "operations")
    text = f"{asked.shape}, {words}, batch 32, {asked.epochs} epochs, {torch.get_num_threads()} threads"
    print(f"\n{text}\n{results.markdown(head, rows)}")
    if asked.write:
        command = "python tests/benchmarks/sweep.py --write"
        results.write("Runs of a sweep in one pass", command, f"{text}\n\n{results.markdown(head, rows)}")


if __name__ == "__main__":
    main()
