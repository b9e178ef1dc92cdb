"""`pipeline plan`: what a run will cost, before anything is spent.

The model, in full. A sample has n positions in each stream; S states of width D are kept.

    bytes a sample      Σ over streams of S · n · (D · bytes a value + scale) + 4 · columns · n
    extraction          operations of the forward pass ÷ measured FLOP/s, or bytes ÷ disk, whichever is longer;
                        of images and reading each twice, once for its key
    live epoch          batches · (padded forward pass + step); of images and reading each
    cached epoch        batches · step + bytes ÷ decoding rate        host memory (on a CPU both take the same cores)
                        the same, or bytes ÷ rate of the tier         disk, remote: whichever is longer
    break-even          extraction ÷ (live epoch − cached epoch)
    training memory     live end + 16 bytes a trainable value + what a step keeps + two batches + a state widened +
                        blocks
    largest batch       what fits beside live end and trainable values, a sample counted as the mean of the batch

Operations are counted on the meta device, so a `config.json` is enough: no weights are loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.cost import rates as measured
from pipeline.cost.advice import BRANCHES, PYRAMID, plan_text, recommend
from pipeline.cost.flops import (
    Operations,
    backbone_model,
    backbone_operations,
    counts,
    head_operations,
    saved_bytes,
    tuner_model,
    weighted,
)
from pipeline.cost.remembered import Remembered
from pipeline.cost.slots_plan import plan_slots
from pipeline.cost.workload import Workload, positions_of, workload
from pipeline.extract.backbones.capabilities import Levels
from pipeline.extract.batch import stream_of
from pipeline.extract.batching import extraction_batches
from pipeline.extract.encoding import unscaled_dtype
from pipeline.extract.kernels.memory import keep_freed_memory
from pipeline.extract.projection import parse_projection
from pipeline.jobs.slots import refuse_slots, slots_of
from pipeline.lookup.recipe import device_of, store_path
from pipeline.recipe import Recipe
from pipeline.store import FORMATS, SEGMENT_BYTES
from pipeline.store.errors import UserError
from pipeline.train.data.memory import available_memory
from pipeline.train.model import Model
from pipeline.train.tuners import tuner_class, tuner_config, tuner_names

TIERS = {"device": "device memory", "host": "host memory", "disk": "disk"}  # of --tier
GPUS = (11, 16, 24, 32)  # GB of memory that the largest batch is told for
REMOTE = 125e6  # bytes a second of a remote store: 1 Gbit/s, assumed
LIVE_END = "frozen live end"  # the backbone's last layer, what embeds and what reads it, as far as the tuner needs them
GAIN = 1.05  # of live ÷ cached: less is no gain, shown as 1.0


@dataclass
class Plan:
    """Everything predicted; see the module for how. Seconds, bytes; `epochs` is what break-even is compared with."""

    samples: int
    rows: dict[str, int]
    positions: dict[str, float]
    estimated_lengths: bool
    states: list[str]
    formats: dict[str, dict[str, float]]
    extraction_seconds: float
    live_epoch: float
    cached_epoch: dict[str, float | None]
    break_even: dict[str, float | None]
    memory: dict[str, float]
    parameters: dict[str, int]
    largest_batch: dict[str, int]
    operations: dict[str, float]
    rates: dict[str, float | None]
    rates_of: str | None  # when the oldest of the remembered rates was measured, None where none is
    measured: int | None  # rates that were measured now, None where none may be remembered
    epochs: int
    format: str
    projection: str
    tier: str
    as_fast: bool  # live epochs are no slower, nor faster, than this can tell
    pays: bool
    recommendation: str = ""
    commands: list[str] = field(default_factory=list)


def forward_operations(work: Workload, tokens: int) -> float:
    """Operations of extracting every sample: batches bucketed by length, as extraction makes them."""
    total, model = 0.0, backbone_model(work.backbone)
    for split, lengths in work.lengths.items():
        positions = positions_of(work.backbone, lengths)
        batches = extraction_batches(positions, 0, tokens)
        # A few batches over the middle of the range of lengths stand for all.
        ascending = sorted(batches, key=lambda b: int(positions[b].max()))
        picks = [ascending[i] for i in np.unique(np.linspace(0, len(batches) - 1, 6).astype(int)[1:-1])]
        found = sum(
            backbone_operations(work.backbone, {s: n[b] for s, n in lengths.items()}, work.states, model) for b in picks
        )
        share = sum(int(positions[b].sum()) for b in picks) / float(positions.sum())
        total += found / share * work.rows[split] / len(positions)
    return total


def training_memory(
    work: Workload, model: Model, batch: dict[str, np.ndarray], dtype: torch.dtype, held: float
) -> dict[str, float]:
    """Bytes by what they are for, computed from the tensors of `model`, a `tuner_model`. `dtype`: of a batch's states.
    `held`: the tier's blocks, or those in flight."""
    rows = {s: int(n.sum()) for s, n in batch.items()}
    values = [rows[stream_of(s)] * work.backbone.state_width(s) for s in work.states]
    parts = {
        LIVE_END: sum(p.numel() * 4 for p in model.tuner.tail.parameters()),
        "trainable, gradients, Adam": model.trainable_parameters() * 16,
        "kept for the backward pass": saved_bytes(work.backbone, work.tuner, work.config, batch, work.classes, dtype),
        "two batches": 2 * sum(values) * dtype.itemsize,
        "a state widened": 4 * max(values) if dtype.itemsize < 4 else 0,
        "blocks": held,
    }
    return {k: float(v) for k, v in parts.items()} | {"total": float(sum(parts.values()))}


def trainable(model: Model) -> dict[str, int]:
    """Trainable parameters of the tuner, of the head, and of modules of it that are there in training alone."""
    more = {n: part for n in model.head.training_only if (part := getattr(model.head, n)) is not None}
    parts: dict[str, Any] = {"tuner": model.tuner, "head": model.head, **{f"{n} head": p for n, p in more.items()}}
    found = {name: sum(p.numel() for p in part.parameters() if p.requires_grad) for name, part in parts.items()}
    found["head"] -= sum(found[f"{n} head"] for n in more)
    return found


def largest_batches(memory: dict[str, float], size: int) -> dict[str, int]:
    """How many samples a batch can have on a device of so many GB, trained from stored states; `memory`: of a batch of
    `size`. Blocks lie in the host's memory."""
    fixed = memory[LIVE_END] + memory["trainable, gradients, Adam"]
    each = (memory["total"] - fixed - memory["blocks"]) / size
    return {f"{gb} GB": max(0, int((gb * 1e9 - fixed) / each)) for gb in GPUS}


def predict(
    work: Workload,
    recipe: Recipe,
    budget: float | None = None,
    memory: float | None = None,
    known: Remembered | None = None,
) -> Plan:
    """Measure this machine, as far as `known` has not its rates, and predict. `budget`: bytes of disk, `memory`: bytes
    of memory that may be taken."""
    keep_freed_memory()  # as extraction and training do
    device, training = device_of(recipe), work.training_batches()
    batch = training[len(training) // 2][1]  # the middle one stands for a typical batch
    kept = parse_projection(recipe.projection or "none", work.backbone.width)
    channels = kept[1] if kept else None
    fmt = recipe.format or choose_format(work, budget, channels)
    dtype = unscaled_dtype(fmt)
    tokens = recipe.batch_tokens or (32768 if device.type == "cuda" else 4096)
    model = (work.backbone, work.tuner, work.config)
    folder, filled = Path(store_path(recipe)), work.extraction_batch(tokens)
    shapes = measured.Measured(*model, work.classes, batch, filled, training, fmt, folder, work.pictures, work.learned)
    speed = shapes.rates(device, known)
    ops = step_of(work, training)
    train = "train" if "train" in work.rows else next(iter(work.rows))
    batches = -(-work.rows[train] // work.batch_size)
    full = work.rows[train] / work.batch_size  # a last, smaller batch costs its share
    epoch_bytes = work.rows[train] * work.sample_bytes(fmt, train, channels)
    extraction = max(forward_operations(work, tokens) / speed.extraction, work.bytes(fmt, channels) / speed.disk_write)
    extraction += 2 * work.samples * speed.image  # once to be known by its bytes, once to be run
    live = full * (ops.backbone / speed.backbone + speed.step) + work.rows[train] * speed.image
    room = min(memory or np.inf, available_memory()) / 2
    cached = cached_epochs(full * speed.step, epoch_bytes, speed, device, room)
    gains = {tier: None if s is None or s >= live else extraction / (live - s) for tier, s in cached.items()}
    order = [TIERS[recipe.tier]] if recipe.tier != "auto" else list(TIERS.values())
    tier = next((t for t in order if cached[t] is not None), "disk")
    even, ratio = gains[tier], live / (cached[tier] or live)
    as_fast = 1 / GAIN < ratio < GAIN
    held = epoch_bytes if tier == "host memory" else min(epoch_bytes, 12 * SEGMENT_BYTES)
    shape = tuner_model(*model, work.classes)
    needed = training_memory(work, shape, batch, dtype, held)
    plan = Plan(
        samples=work.samples,
        rows=work.rows,
        positions=work.positions(train),
        estimated_lengths=work.estimated,
        states=work.states,
        formats=sizes(work, recipe.projection, channels),
        extraction_seconds=extraction,
        live_epoch=live,
        cached_epoch=cached,
        break_even=gains,
        memory=needed,
        parameters=trainable(shape),
        largest_batch=largest_batches(needed, len(next(iter(batch.values())))),
        operations=described(work, ops, batches),
        rates=asdict(speed),
        rates_of=min(known.dates, default=None) if known else None,
        measured=known.measured if known else None,
        epochs=work.epochs,
        format=fmt,
        projection=recipe.projection or "none",
        tier=tier,
        as_fast=as_fast,
        pays=even is not None and even <= work.epochs and not as_fast,
    )
    recommend(plan, work, recipe, budget, memory)
    return plan


def sizes(work: Workload, projection: str | None, channels: int | None) -> dict[str, dict[str, float]]:
    """Bytes a sample and in all of every format, then of float16 in a quarter and an eighth of the channels."""
    table = {f: work.bytes(f) for f in FORMATS}
    if work.backbone.shape == "sequence" or set(work.states) - work.full:
        if not work.maps:
            table |= {f"float16, pca:{k}": work.bytes("float16", k) for n in (4, 8) if (k := work.backbone.width // n)}
        if channels is not None:
            table |= {f"{f}, {projection}": work.bytes(f, channels) for f in FORMATS}
    if work.dense and isinstance(work.backbone, Levels):
        kinds = {PYRAMID: "fixed", BRANCHES: "e3va"}
        for what, tuner in kinds.items():
            if tuner == work.tuner or tuner not in tuner_names(type(work.backbone)):
                continue
            states = tuner_class(tuner).states(tuner_config(tuner, {}), work.backbone)
            table |= {f"{f}, {what}": work.bytes(f, states=states) for f in ("float16", "int8")}
    if work.views > 1:
        table["float16, one view"] = work.bytes("float16", views=1)
    if work.backbone.continues_text:
        table["float16, all layers"] = work.bytes("float16", states=work.backbone.states())
        each = {"bytes a token": work.tokens}
    else:
        each = {}
    each |= {"bytes a sample": work.samples, "total": 1}
    return {name: {what: size / count for what, count in each.items()} for name, size in table.items()}


def step_of(work: Workload, batches: Sequence[tuple[float, dict[str, np.ndarray]]]) -> Operations:
    """Operations of a mean step of `batches`, each with its share. Where tokens are targets, the head reads the rows
    of targets alone."""
    shares, lengths = zip(*batches, strict=True)
    each = counts(work.backbone, work.tuner, work.config, lengths, work.classes)
    found = weighted(zip(shares, each, strict=True))
    if work.classes or work.learned >= 1:
        return found
    idle = head_step(work, batches, 1 - work.learned)
    return Operations(found.backbone, found.step - idle)


def head_step(work: Workload, batches: Sequence[tuple[float, dict[str, np.ndarray]]], share: float) -> float:
    """Operations of the frozen head on a share of the positions of a mean batch."""
    rows = sum(part * float(n[work.backbone.streams[-1]].sum()) for part, n in batches)
    return head_operations(work.backbone, round(share * rows)) if round(share * rows) else 0.0


def described(work: Workload, ops: Operations, batches: int) -> dict[str, float]:
    """Operations of a mean step. Where tokens are targets, the head's, which is live in every step whatever the tuner,
    and what live ÷ cached is at most on its account."""
    told = {"backbone a step": ops.backbone, "tuner a step": ops.step, "ratio": ops.ratio, "steps an epoch": batches}
    if not work.classes:
        head = head_step(work, work.training_batches(), work.learned)
        told |= {"head a step": head, "bound": (ops.backbone + head) / head}
    return told


def cached_epochs(
    steps: float, size: float, speed: measured.Rates, device: torch.device, room: float
) -> dict[str, float | None]:
    """Seconds of an epoch from each tier; None where the states do not fit or there is no such tier."""
    gpu = device.type == "cuda"
    decode = size / speed.decode
    # On a CPU the batch is made by the cores that compute; on a GPU beside it.
    busy = max(steps, decode) if gpu else steps + decode
    fits_device = gpu and size < torch.cuda.mem_get_info(device)[0] / 2
    return {
        "device memory": steps if fits_device else None,
        "host memory": busy if size < room else None,
        "disk": max(busy, size / (speed.disk_warm if size < room else speed.disk_cold or speed.disk_warm)),
        "remote": max(busy, size / REMOTE),
    }


def choose_format(work: Workload, budget: float | None, channels: int | None = None) -> str:
    """float16, or int8 when only that fits the budget."""
    return "int8" if budget is not None and work.bytes("float16", channels) > budget else "float16"


def run_plan(
    recipe: Recipe, budget: float | None, memory: float | None, measure: bool = False
) -> tuple[dict[str, Any], str]:
    """The plan as a mapping and as text. `measure`: measure this machine although its rates are remembered."""
    if slots_of(recipe):
        for option, value in (("--budget", budget), ("--memory", memory), ("--measure", measure)):
            if value:
                raise UserError(f"{option}: of several backbones the bytes of their states are told, and nothing else")
        return plan_slots(recipe)
    refuse_slots(recipe, "plan")
    work = workload(recipe)
    known = Remembered(device_of(recipe), again=measure)
    plan = predict(work, recipe, budget, memory, known)
    known.save()
    return asdict(plan), plan_text(plan, work)
