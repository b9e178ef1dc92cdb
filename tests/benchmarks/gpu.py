"""The claims about GPUs, measured on one: memory, epochs live and cached, extraction, with their floors beside them.

    python tests/benchmarks/gpu.py --shapes t5-base [--lengths rte] [--samples 1000] [--folder FOLDER]

Random weights of the real shape are made on the device and nothing is downloaded. One call takes one shape (a few
minutes) and adds its section to RESULTS-gpu.md: peak allocated memory, seconds an epoch, samples a second, the share of
time spent waiting for data, and the floors: operations at the rate of the bare forward pass, bytes at the rate of the
tier. Cached runs read from device memory, host memory and disk; baselines run while they fit. Without a GPU the
script runs with `--device cpu` on small shapes, which checks the script and nothing else.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.cost.flops import counts
from pipeline.cost.known_shapes import known_config
from pipeline.extract.backbones.base import Backbone
from pipeline.extract.backbones.live import LiveBackbone
from pipeline.extract.backbones.registry import backbone_for
from pipeline.extract.batching import extraction_batches
from pipeline.extract.extraction import compute
from pipeline.extract.inputs import Inputs
from pipeline.lookup.objective import class_objective
from pipeline.store import Store
from pipeline.terminal import table_text
from pipeline.train.baselines.methods import BaselineModel, baseline, input_source
from pipeline.train.data.live_source import LiveSource
from pipeline.train.data.store_source import StoreSource, StreamOptions
from pipeline.train.data.targets import Targets
from pipeline.train.fit.loop import FitOptions, fit
from pipeline.train.model import Model, state_names
from pipeline.train.tuners import tuner_class, tuner_config
from tests.benchmarks import results

PAGE = Path(__file__).parent / "RESULTS-gpu.md"
LENGTHS = {"rte": (4.25, 0.45), "mnli": (3.7, 0.4)}  # of a lognormal: means of about 77 and 44 positions, at most 128
CHAINS = ((209, 1), (3, 1))
EXTRACT_TOKENS = 32768


@dataclass
class Setting:
    """One shape with its inputs, ready to run."""

    backbone: Backbone
    live: LiveBackbone
    inputs: Inputs
    labels: np.ndarray
    device: torch.device
    dtype: torch.dtype
    batch: int


def make(shape: str, lengths: str, samples: int, batch: int, device: torch.device, dtype: torch.dtype) -> Setting:
    """The backbone of `shape` on the device, random ids of the wanted lengths, two classes."""
    from transformers import AutoModel, AutoModelForSeq2SeqLM

    config = known_config(shape)
    if config is None:
        raise SystemExit(f"{shape}: not a known shape")
    backbone = backbone_for(config)
    maker: Any = AutoModelForSeq2SeqLM if backbone.writes_text else AutoModel

    def load() -> Any:
        with torch.device(device):
            torch.manual_seed(0)
            model = maker.from_config(config, attn_implementation="sdpa", dtype=dtype)
        return model.eval().requires_grad_(False)

    g = np.random.default_rng(0)
    mean, deviation = LENGTHS[lengths]
    n = np.clip(g.lognormal(mean, deviation, samples).astype(np.int64), 12, 128)
    columns = {c: g.integers(5, 5000, int(n.sum())).astype(np.int32) for c in backbone.columns if c == "encoder.ids"}
    counts, labels = {"encoder": n}, g.integers(0, 2, samples)
    if "encoder.types" in backbone.columns:
        columns["encoder.types"] = np.zeros(int(n.sum()), np.int32)
    if "decoder" in backbone.streams:
        counts["decoder"] = np.full(samples, 2, np.int64)
        first = np.asarray([c[0] for c in CHAINS], np.int32)[labels]
        columns["decoder.ids"] = np.stack([np.zeros(samples, np.int32), first], 1).ravel()
        columns["decoder.parent"] = np.tile(np.asarray([-1, 0], np.int32), samples)
    inputs = Inputs(counts, columns, np.zeros(samples, bool))
    return Setting(backbone, LiveBackbone(backbone, load, device), inputs, labels, device, dtype, batch)


def clock(device: torch.device, run: Callable[[], Any]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def extraction(s: Setting, states: list[str], space: Any) -> tuple[float, float]:
    """(seconds of the bare forward pass, seconds until all is sealed) over the same batches."""
    batches = [s.inputs.take(b) for b in extraction_batches(s.inputs.tokens(), 0, EXTRACT_TOKENS)]
    last = [f"{stream}.{s.backbone.depth(stream) - 1}" for stream in s.backbone.streams]

    def bare() -> None:
        with torch.inference_mode():
            for part in batches:
                s.backbone.run(s.live.model, part.batch(s.device), last)

    bare()
    plain = min(clock(s.device, bare) for _ in range(2))
    how = {"tokens": EXTRACT_TOKENS, "quiet": True}
    return plain, clock(s.device, lambda: compute(space, s.inputs, s.inputs.keys(), states, s.live, **how))  # type: ignore[arg-type]


def train(s: Setting, model: Any, source: Any, epochs: int, folder: Path) -> dict[str, float]:
    """The last of `epochs` epochs (those before fill tiers and warm up), and the peak of memory over all."""
    options = FitOptions(epochs=epochs, lr=1e-4, precision="bfloat16" if s.device.type == "cuda" else "float32")
    if s.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(s.device)
    fit(model, source, None, None, options, folder, model.objective.scorer, s.device, progress=False)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    shutil.rmtree(folder)
    steps = [e for e in log if "loss" in e]
    if not all(np.isfinite(e["loss"]) for e in steps):
        raise SystemExit("a loss is not finite")
    last = [e for e in steps if e["epoch"] == epochs]
    seconds = sum(e["seconds"] for e in last)
    peak = torch.cuda.max_memory_allocated(s.device) / 1e9 if s.device.type == "cuda" else float("nan")
    return {
        "seconds": seconds,
        "samples/s": len(s.labels) / seconds,
        "waiting": sum(e["wait_seconds"] for e in last) / seconds,
        "peak": peak,
        "first loss": steps[0]["loss"],
    }


def tuned(s: Setting, name: str, space: Any, tail: Any, folder: Path, say: Callable[..., None]) -> list[list[str]]:
    """Rows of one tuner: live, then cached from each tier."""
    config = tuner_config(name, {})
    states, keys = state_names(name, config, s.backbone), s.inputs.keys()
    objective = class_objective(s.backbone, tuner_class(name, s.backbone), CHAINS)
    told = Targets(objective, s.labels)

    def model() -> Model:
        return Model.build(name, config, s.backbone, s.backbone.tail(tail, "sdpa"), objective, 0)

    def stored(tier: str) -> StoreSource:
        columns = list(s.backbone.columns)
        return StoreSource(
            space, keys, told, states, columns,
            StreamOptions(s.batch, tier=tier, device=s.device, pin=s.device.type == "cuda", dtype=None),
        )  # fmt: skip

    order = stored("disk").order
    live = train(s, model(), LiveSource(s.live, s.inputs, told, states, order), 2, folder / "run")
    lengths = {k: v[order.epoch(0)[0]] for k, v in s.inputs.lengths.items()}
    operations = counts(s.backbone, name, config, [lengths])[0]
    rows = [row(f"{name}, live", live, live, f"{operations.ratio:.1f}", "–")]
    say(*rows[-1])
    s.live._model = None  # a cached run holds no backbone
    for tier in ("device", "host", "disk"):
        source = stored(tier)
        found = train(s, model(), source, 3, folder / "run")
        # Half precision and another batch of the backbone: bf16's tolerance.
        off = abs(found["first loss"] - live["first loss"]) / abs(live["first loss"])
        if off > (0.05 if s.dtype == torch.bfloat16 else 1e-3):
            raise SystemExit(f"{name}: the first loss from {tier} is {off:.1%} from the live one")
        rows.append(row(f"{name}, cached, {source.tier}", found, live, "", f"{source.nbytes / 1e9:.2f}"))
        say(*rows[-1])
        source.forget()
    return rows


def row(name: str, found: dict[str, float], live: dict[str, float], operations: str, size: str) -> list[str]:
    return [
        name, f"{found['seconds']:.2f}", f"{found['samples/s']:,.0f}", f"{live['seconds'] / found['seconds']:.1f}",
        operations, f"{found['waiting']:.1%}", f"{found['peak']:.2f}", size,
    ]  # fmt: skip


def inside(s: Setting, name: str, folder: Path) -> list[str]:
    """A row of a method that trains inside the backbone, or that it does not fit; its second epoch, as of live ones."""
    objective = class_objective(s.backbone, tuner_class("sherl" if s.backbone.writes_text else "probe"), CHAINS)
    try:
        model = BaselineModel(baseline(name), s.backbone, s.live.load(), objective)
        source = LiveSource(s.live, s.inputs, Targets(objective, s.labels), [], StoreOrder(s).order)
        found = train(s, model.to(s.device), input_source(source, s.live), 2, folder / "run")
    except torch.OutOfMemoryError:
        return [name, "does not fit", *["–"] * 6]
    return [c if i != 3 else "–" for i, c in enumerate(row(name, found, found, "", "–"))]


class StoreOrder:
    """The order of batches without a store."""

    def __init__(self, s: Setting) -> None:
        from pipeline.train.data.order import Order

        self.order = Order(np.zeros(len(s.labels), np.int64), s.batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="t5-base")
    parser.add_argument("--lengths", default="rte", choices=list(LENGTHS))
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--tuners", default="sherl,lst")
    parser.add_argument("--baselines", default="lora,full")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--folder", default=None, help="where the store is made: the disk that is measured")
    parser.add_argument("--dry", action="store_true", help="do not write RESULTS-gpu.md")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here; --device cpu runs the script on small shapes, for a check")
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def say(*cells: str) -> None:
        print(*cells, flush=True)

    head = ["run", "s/epoch", "samples/s", "live ÷ this", "operations ÷", "waits", "peak GB", "GB stored"]
    for shape in args.shapes.split(","):
        s = make(shape, args.lengths, args.samples, args.batch_size, device, dtype)
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        try:
            store = Store.create(folder / "store")
            identity = {"format": "bfloat16" if device.type == "cuda" else "float16", "weights": "random"}
            space = store.create_space(identity)
            tuners = args.tuners.split(",")
            union = {n for t in tuners for n in state_names(t, tuner_config(t, {}), s.backbone)}
            plain, whole = extraction(s, [n for n in s.backbone.states() if n in union], space)
            tail = s.backbone.tail_weights(s.live.model)
            rows = [
                ["bare forward pass", f"{plain:.2f}", f"{args.samples / plain:,.0f}", *["–"] * 5],
                ["extraction", f"{whole:.2f}", f"{args.samples / whole:,.0f}", f"{plain / whole:.2f}", *["–"] * 4],
            ]
            for found in rows:
                say(*found)
            for name in tuners:
                rows += tuned(s, name, space, tail, folder, say)
            for name in filter(None, args.baselines.split(",")):
                rows.append(inside(s, name, folder))
                say(*rows[-1])
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        mean = float(s.inputs.lengths["encoder"].mean())
        about = (
            f"{shape}, random weights; {args.samples} samples of {mean:.0f} positions on average ({args.lengths} "
            f"lengths), batch {args.batch_size}, {str(dtype).removeprefix('torch.')}; Python "
            f"{platform.python_version()}. Peak: torch's allocator."
        )
        print(f"\n{about}\n" + table_text(head, rows))
        if not args.dry and device.type == "cuda":
            command = " ".join(["python tests/benchmarks/gpu.py", *sys.argv[1:]])
            body = f"{about}\n\n{results.markdown(head, rows)}"
            results.write(f"{shape}, {args.lengths}", command, body, PAGE)


if __name__ == "__main__":
    main()
