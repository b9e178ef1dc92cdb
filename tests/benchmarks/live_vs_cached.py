"""Seconds per epoch with the backbone live and from the store, and the ratio of operations, which is its limit.

    python tests/benchmarks/live_vs_cached.py [--shape t5-base] [--tuners sherl,lst,probe] [--samples 256]
    python tests/benchmarks/live_vs_cached.py --count [--shapes t5-base,bert-base]      the operations alone, in seconds

Live is shown twice. `at its best`: batches of texts of like length, hardly any padding, in the precision of the store.
`as published`: the official loops' batches, drawn at random and each padded to its longest text. The cached run has the
same batches as the live one beside it, and so have the operations.

The real training loop runs on the same samples in the same batches, live and from the store in turn; each figure is the
best of its epochs. Beside the ratio of seconds stands that of processor seconds, which other programs on the machine
hardly disturb. `host`: blocks kept in memory after the first epoch. `disk`: read again in every epoch, from a warm page
cache; a run's first epoch, which waits for its first blocks, and its last, which reads none for another, do not count.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.cost.flops import Operations, backbone_model, backbone_operations, step_operations, tuner_model
from pipeline.cost.known_shapes import known_config
from pipeline.extract.backbones import Backbone
from pipeline.jobs.job import Job, load_job
from pipeline.jobs.sources import live_backbone, sources
from pipeline.store import bytes_per_value
from pipeline.terminal import table_text
from pipeline.train.data.order import Order
from pipeline.train.fit.loop import FitOptions, fit
from pipeline.train.tuners import TunerConfig, tuner_class, tuner_config
from tests.benchmarks import results, setting

# What live is → whether batches hold texts of like length. The harder one to beat comes first.
LIVE = {"at its best": True, "as published": False}


@dataclass
class Timed:
    """Best seconds and processor seconds of an epoch, and the share of the best one spent waiting for data."""

    seconds: float = float("inf")
    waiting: float = 0.0
    processor: float = float("inf")

    def add(self, epochs: list[tuple[float, float, float]]) -> None:
        for seconds, waited, processor in epochs:
            self.processor = min(self.processor, processor)
            if seconds < self.seconds:
                self.seconds, self.waiting = seconds, waited / seconds


class Clocked:
    """A source that notes the processor seconds of each epoch, all threads and the steps between batches included."""

    def __init__(self, source: Any) -> None:
        self.source, self.seconds = source, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)

    def epochs(self, first: int, end: int, start: int = 0) -> Iterator[Any]:
        begun = time.process_time()
        stream = self.source.epochs(first, end, start)
        try:
            for number, batch in enumerate(stream, 1):
                yield batch
                if number % len(self) == 0 and number < len(self) * (end - first):
                    self.seconds.append(time.process_time() - begun)
                    begun = time.process_time()
        finally:  # the loop closes the last epoch of a run early
            stream.close()
            self.seconds.append(time.process_time() - begun)


def epochs_of(job: Job, source: Any, epochs: int, folder: Path) -> list[tuple[float, float, float]]:
    """Train `epochs` epochs as `pipeline train` does; (seconds, those waiting for data, processor seconds) of each."""
    source = Clocked(source)
    options = FitOptions(epochs=epochs, lr=1e-4, seed=0)
    fit(job.model(0), source, None, None, options, folder, job.objective.scorer, "cpu", progress=False)
    steps = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [s for s in steps if "loss" in s]
    shutil.rmtree(folder)
    return [
        (sum(s["seconds"] for s in part), sum(s["wait_seconds"] for s in part), source.seconds[e])
        for e, part in enumerate([s for s in steps if s["epoch"] == e + 1] for e in range(epochs))
    ]


def operations(job: Job, order: Order, lengths: dict[str, np.ndarray]) -> Operations:
    """Of one epoch, see `epoch_operations`."""
    return epoch_operations(job.found.backbone, job.recipe.tuner, job.config, order, lengths, len(job.spec.labels))


def epoch_operations(
    backbone: Backbone, tuner: str, config: TunerConfig, order: Order, lengths: dict[str, np.ndarray], classes: int
) -> Operations:
    """Of one epoch, summed over its batches with their padding. `lengths`: stream → (n,)."""
    total, states = Operations(0.0, 0.0), tuner_class(tuner, backbone).states(config, backbone)
    frozen, model = backbone_model(backbone), tuner_model(backbone, tuner, config, classes)
    for index in order.epoch(0):
        batch = {s: n[index] for s, n in lengths.items()}
        run = backbone_operations(backbone, batch, states, frozen)
        total += Operations(run, step_operations(backbone, batch, states, model))
    return total


def counted(shape: str, tuners: Sequence[str], samples: int, batch_size: int) -> list[list[str]]:
    """Operations live ÷ cached of an epoch for each tuner, at its best and as published. No weights are made."""
    backbone, inputs, classes = setting.prepared(shape, samples)
    rows = []
    for tuner in tuners:
        cells = [shape, tuner]
        for grouped in LIVE.values():
            order = Order(np.zeros(samples, np.int64), batch_size, 0, 4, inputs.tokens() if grouped else None)
            ops = epoch_operations(backbone, tuner, tuner_config(tuner, {}), order, inputs.lengths, classes)
            cells.append(ratio_text(ops.ratio))
        rows.append(cells)
    return rows


def ratio_text(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 1e4 else f"{ratio:.1e}"


def formula_bytes(job: Job, source: Any) -> float:
    """methods §6.2: bytes a value · width · (states of each stream · positions of it), the mean over samples."""
    backbone, fmt = job.found.backbone, job.found.space.identity["format"]
    states = {s: sum(n.startswith(s) for n in job.states) for s in backbone.streams}
    return sum(
        bytes_per_value(fmt) * backbone.width * states[s] * float(np.mean(source.plan.lengths[s]))
        for s in backbone.streams
        if states[s]
    )


def measure(
    job: Job, live_is: str, rounds: int, folder: Path, say: Any, with_live: bool, epochs: int, with_disk: bool
) -> dict[str, Any]:
    """All figures of one tuner with batches as `live_is`, one of `LIVE`, has them. `epochs`: cached ones of a round."""
    job = replace(job, recipe=replace(job.recipe, group_by_length=LIVE[live_is]))
    live = None
    if with_live:
        frozen, point = live_backbone(job)
        live = sources(job, frozen, point)["train"]
    host = sources(replace(job, recipe=replace(job.recipe, host_memory="1TB")), None)["train"]
    disk = sources(replace(job, recipe=replace(job.recipe, host_memory="0")), None)["train"]
    timed = {"live": Timed(), "host": Timed(), "disk": Timed()}
    for number in range(rounds):
        if live is not None:
            timed["live"].add(epochs_of(job, live, 1, folder / "run"))
        if with_disk:
            timed["disk"].add(epochs_of(job, disk, epochs + 2, folder / "run")[1:-1])
        # The first epoch fills the tier; only those that find it filled count.
        timed["host"].add(epochs_of(job, host, epochs + (number == 0), folder / "run")[number == 0 :])
        say(f"  round {number + 1}: " + ", ".join(f"{k} {t.seconds:.2f} s" for k, t in timed.items()))
    ops = operations(job, host.order, host.plan.lengths)
    sizes = sum(
        f.stat().st_size for s in job.found.space.segments() for n in job.states for f in (s.path / n).glob("c.*")
    )
    return {
        "tuner": job.recipe.tuner,
        "live is": live_is,
        "live": timed["live"].seconds,
        "host": timed["host"].seconds,
        "disk": timed["disk"].seconds,
        "ratio_host": timed["live"].seconds / timed["host"].seconds,
        "ratio_disk": timed["live"].seconds / timed["disk"].seconds if with_disk else float("inf"),
        "ratio_processor": timed["live"].processor / timed["host"].processor,
        "operations_ratio": ops.ratio,
        "operations": {"backbone": ops.backbone, "step": ops.step},
        "waiting_host": timed["host"].waiting,
        "waiting_disk": timed["disk"].waiting,
        "bytes": sizes / host.n,
        "bytes_formula": formula_bytes(job, host),
        "lengths": {s: float(np.mean(v)) for s, v in host.plan.lengths.items()},
    }


HEAD = [
    "tuner", "live", "live s/epoch", "host s/epoch", "disk s/epoch", "live ÷ host", "live ÷ disk", "processor ÷",
    "operations ÷", "waits host", "waits disk", "bytes a sample", "÷ formula",
]  # fmt: skip


def seconds(value: float, digits: int = 2) -> str:
    """Of what was not measured, a dash."""
    return f"{value:.{digits}f}" if np.isfinite(value) else "–"


def row(r: dict[str, Any]) -> list[str]:
    return [
        r["tuner"],
        r["live is"],
        seconds(r["live"]),
        f"{r['host']:.3f}",
        seconds(r["disk"], 3),
        seconds(r["ratio_host"], 1),
        seconds(r["ratio_disk"], 1),
        seconds(r["ratio_processor"], 1),
        ratio_text(r["operations_ratio"]),
        f"{r['waiting_host']:.1%}",
        f"{r['waiting_disk']:.1%}" if np.isfinite(r["disk"]) else "–",
        f"{r['bytes']:,.0f}",
        f"{r['bytes'] / r['bytes_formula']:.3f}",
    ]


def tell(line: str) -> None:
    print(line, flush=True)


def command_of() -> str:
    return " ".join(["python tests/benchmarks/live_vs_cached.py", *sys.argv[1:]])


def count_only(args: argparse.Namespace) -> None:
    """Print, and unless --dry write, the table of operations."""
    rows = []
    for shape in args.shapes.split(","):
        rows += counted(shape, args.tuners.split(","), args.samples, args.batch_size)
    head = ["shape", "tuner", *(f"live {name}" for name in LIVE)]
    about = (
        f"Operations live ÷ cached of an epoch, {setting.words_of(args.samples)}, batch {args.batch_size}: matrix "
        "products and attention with the padding of each batch, counted from shapes."
    )
    print(f"{about}\n" + table_text(head, rows))
    if not args.dry:
        continued = known_config(setting.SHAPES[args.shapes.split(",")[0]]).model_type in setting.DECODERS
        title = "Operations, live and cached" + (", language models" if continued else "")
        results.write(title, command_of(), f"{about}\n\n{results.markdown(head, rows)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="t5-base", choices=list(setting.SHAPES))
    parser.add_argument("--tuners", default="sherl,lst,probe")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--format", default="float16")
    parser.add_argument("--rounds", type=int, default=2, help="live and cached in turn, this many times")
    parser.add_argument("--no-disk", action="store_true", help="no epochs that read from disk")
    parser.add_argument("--live-is", default=",".join(LIVE), help="which of the two ways, with commas between")
    parser.add_argument("--cached-epochs", type=int, default=4, help="cached epochs of a round that count")
    parser.add_argument("--no-live", action="store_true", help="cached epochs alone: how long a step waits for data")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch; its own choice by default")
    parser.add_argument("--folder", default=None, help="where the temporary store is made: the disk that is measured")
    parser.add_argument("--dry", action="store_true", help="do not write RESULTS.md")
    parser.add_argument("--count", action="store_true", help="count operations only: no weights, no seconds")
    parser.add_argument("--shapes", default="t5-large,t5-base,bert-base,small", help="of --count")
    args = parser.parse_args()
    if args.count:
        count_only(args)
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        tuners = tuple(args.tuners.split(","))
        print(f"{args.shape}: making a checkpoint of random weights and extracting {args.samples} samples", flush=True)
        recipe, report, words = setting.extracted(args.shape, args.samples, tuners, folder, args.format)
        print(f"extracted {words} in {report['seconds']:.0f} s, {report['bytes'] / 1e6:.0f} MB", flush=True)
        rows = []
        for tuner in tuners:
            job = load_job(replace(recipe, tuner=tuner, batch_size=args.batch_size))
            for live_is in args.live_is.split(",") if not args.no_live else ("as published",):
                print(f"{tuner}, live {live_is}:", flush=True)
                rows.append(
                    measure(
                        job, live_is, args.rounds, folder, tell, not args.no_live, args.cached_epochs, not args.no_disk
                    )
                )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    lengths = ", ".join(f"{s} {n:.1f}" for s, n in rows[0]["lengths"].items())
    about = (
        f"Shape {args.shape}, random weights; {words}, mean positions {lengths}; batch {args.batch_size}, "
        f"{args.format}, backbone in {job.found.space.identity['precision']}, {torch.get_num_threads()} threads; "
        f"best of {0 if args.no_live else args.rounds} live and {args.cached_epochs * args.rounds} cached epochs each."
    )
    print(f"\n{about}\n" + table_text(HEAD, [row(r) for r in rows]))
    if not args.dry:
        losses = [f"{r['tuner']} beside live {r['live is']}" for r in rows if min(r["ratio_host"], r["ratio_disk"]) < 1]
        title = "Waiting for data" if args.no_live else "Live and cached epochs"
        note = f"Caching loses for: {', '.join(losses)}." if losses else "Caching wins in every row."
        table = results.markdown(HEAD, [row(r) for r in rows])
        about = about if args.no_live else f"{about} {note}"
        results.write(f"{title}, {args.shape}", command_of(), f"{about}\n\n{table}")


if __name__ == "__main__":
    main()
