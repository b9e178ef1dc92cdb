"""`pipeline plan`: what a run will cost, before anything is spent.

The model, in full. A sample has n positions in each stream; S states of width D are kept.

    bytes a sample      Σ over streams of S · n · (D · bytes a value + scale) + 4 · columns · n
    extraction          operations of the forward pass ÷ measured FLOP/s, or bytes ÷ disk, whichever is longer;
                        of images and reading each twice, once for its key
    live epoch          batches · (padded forward pass + step); of images and reading each
    cached epoch        batches · step + bytes ÷ decoding rate        host memory (on a CPU both take the same cores)
                        the same, or bytes ÷ rate of the tier         disk, remote: whichever is longer
    break-even          extraction ÷ (live epoch − cached epoch)
    training memory     tail + 16 bytes a trainable value + what a step keeps + two batches + a state widened + blocks

Operations are counted on the meta device, so a `config.json` is enough: no weights are loaded.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import rates as measured
from pipeline.advice import plan_text, recommend
from pipeline.extract.backbones.base import Backbone
from pipeline.extract.backbones.batch import stream_of
from pipeline.extract.backbones.images import Picture, Preprocess
from pipeline.extract.backbones.registry import backbone_for
from pipeline.extract.backbones.vision import Vision
from pipeline.extract.checkpoint import Checkpoint, local
from pipeline.extract.encoding import unscaled_dtype
from pipeline.extract.order import extraction_batches
from pipeline.extract.projection import orthogonal, parse_projection
from pipeline.extract.tasks import Task
from pipeline.image_sizes import image_extents, some_pictures
from pipeline.operations import (
    Operations,
    backbone_model,
    backbone_operations,
    count,
    saved_bytes,
    tuner_model,
    weighted,
)
from pipeline.owners import config_of
from pipeline.preparing import candidates_of, prepared
from pipeline.recipe import Recipe
from pipeline.remembered import Remembered
from pipeline.resolve import device_of, need, open_task, refuse_full_readers, space_options, store_path
from pipeline.rows import refuse_other_kind
from pipeline.shapes import known_config
from pipeline.slots import refuse_slots
from pipeline.sources import batch_size_of, grouped
from pipeline.store import FORMATS, SEGMENT_BYTES, bytes_per_value
from pipeline.store.errors import UserError
from pipeline.store.malloc import keep_freed_memory
from pipeline.train.order import Order
from pipeline.train.tiers import available_memory
from pipeline.train.tuners import TunerConfig, fitting_tuner
from pipeline.unused import refuse_for_kind

SAMPLED = 2000  # rows whose lengths stand for all
TIERS = {"device": "device memory", "host": "host memory", "disk": "disk"}  # of --tier
REMOTE = 125e6  # bytes a second of a remote store: 1 Gbit/s, assumed
TOKENS_A_WORD = {"t5": 1.45, "bert": 1.3}
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
LARGE_TASKS = ("mnli", "qnli", "qqp", "sst2")


@dataclass
class Workload:
    """What is to be run. `lengths`: split → stream → (n,) positions of sampled rows, of images as `Vision.measure`
    gives them; `rows`: split → rows in all. `pictures`: a few of the images, to time reading them."""

    backbone: Backbone
    tuner: str
    config: TunerConfig
    states: list[str]
    classes: int
    lengths: dict[str, dict[str, np.ndarray]]
    rows: dict[str, int]
    batch_size: int
    grouped: bool
    epochs: int
    estimated: bool
    pictures: list[Picture] = field(default_factory=list)

    @property
    def samples(self) -> int:
        return sum(self.rows.values())

    def positions(self, split: str) -> dict[str, float]:
        """Mean positions of a sample in each stream."""
        return {s: float(self.lengths[split][s].mean()) for s in self.backbone.streams}

    def sample_bytes(self, fmt: str, split: str, channels: int | None = None) -> float:
        """Bytes of one sample as stored, the mean over a split. `channels`: of projected states, None for no
        projection."""
        n, full = {s: float(k.mean()) for s, k in self.lengths[split].items()}, set(self.backbone.full_states())
        total = float(sum(4 * n[stream_of(c)] for c in self.backbone.columns))
        for state in self.states:
            stream = stream_of(state)
            width = self.backbone.width_of(stream) if channels is None or state in full else channels
            total += n[stream] * (width * bytes_per_value(fmt) + (4 if fmt == "int8" else 0))
        return total

    def bytes(self, fmt: str, channels: int | None = None) -> float:
        """Bytes of all splits."""
        return sum(self.rows[s] * self.sample_bytes(fmt, s, channels) for s in self.rows)

    def extraction_batch(self, tokens: int) -> dict[str, np.ndarray]:
        """Lengths of a typical batch as extraction makes them: of all, the middle one by its longest sample."""
        part = self.lengths["train" if "train" in self.rows else next(iter(self.rows))]
        positions = positions_of(self.backbone, part)
        batches = sorted(extraction_batches(positions, 0, tokens), key=lambda b: int(positions[b].max()))
        return {s: n[batches[len(batches) // 2]] for s, n in part.items()}

    def training_batches(self) -> list[tuple[float, dict[str, np.ndarray]]]:
        """Lengths of three batches of an epoch, one from each third by positions, nearest to the mean of its third,
        with the share of the epoch's batches it stands for, such that they add up to the epoch's positions: a median
        alone would miss the long ones."""
        part = self.lengths["train" if "train" in self.rows else next(iter(self.rows))]
        rows = positions_of(self.backbone, part)
        size = min(self.batch_size, len(rows))
        order = Order(np.zeros(len(rows), np.int64), size, lengths=rows if self.grouped else None)
        batches = [b for b in order.epoch(0) if len(b) == size]
        sizes = np.array([rows[b].sum() for b in batches])
        thirds = [third for third in np.array_split(np.argsort(sizes, kind="stable"), 3) if len(third)]
        picks = [third[np.abs(sizes[third] - sizes[third].mean()).argmin()] for third in thirds]
        if self.backbone.writes_text and "train" not in self.rows:
            # Only training samples hold a target's positions; elsewhere only the start of one is counted.
            part = part | {s: np.maximum(part[s], 2) for s in self.backbone.streams[1:]}
        shares = np.array([len(third) / len(batches) for third in thirds])
        shares *= size * rows.mean() / (shares @ sizes[picks])
        return [(float(f), {s: n[batches[i]] for s, n in part.items()}) for f, i in zip(shares, picks, strict=True)]


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
    operations: dict[str, float]
    rates: dict[str, float | None]
    rates_of: str | None  # when the oldest of the remembered rates was measured, None where none is
    measured: int | None  # rates that were measured now, None where none may be remembered
    epochs: int
    format: str
    projection: str
    tier: str
    pays: bool
    recommendation: str = ""
    commands: list[str] = field(default_factory=list)


def positions_of(backbone: Backbone, lengths: dict[str, np.ndarray]) -> np.ndarray:
    """(n,) the measure of each sample's cost that batches are made by, see `Inputs.tokens`."""
    streams = [lengths[s] for s in backbone.streams]
    return np.min(streams, axis=0) if backbone.modality == "image" else np.sum(streams, axis=0)


def backbone_and_tokenizer(model: str) -> tuple[Backbone, Any | None]:
    """The backbone from a `config.json` alone, and a tokenizer where there is one. Nothing is downloaded."""
    folder = Path(model).expanduser()
    if folder.name == "config.json":
        folder = folder.parent
    point = Checkpoint(folder, folder.name) if (folder / "config.json").is_file() else local(model)
    if point is not None and point.backbone.modality == "image":
        return point.backbone, point.tokenizer
    if point is not None:
        # Asked for the tokenizer of a folder that has none, transformers makes an empty one up.
        has_words = any((point.folder / name).is_file() for name in VOCABULARIES)
        return point.backbone, point.tokenizer if has_words else None
    config = known_config(model)
    if config is None:
        raise UserError(f"{model}: not on this machine and its shape is not known; give a folder with its config.json")
    return backbone_for(config), None


def sample_lengths(
    backbone: Backbone, tokenizer: Any | None, task: Task, split: str, recipe: Recipe
) -> dict[str, np.ndarray]:
    """Positions of up to `SAMPLED` rows of a split: tokenised, or estimated from words; of images by their extents."""
    spec, rows = task.spec, task.rows(split).head(min(SAMPLED, recipe.limit or SAMPLED))
    text = space_options(recipe, spec).text
    refuse_other_kind(backbone, rows.texts, text.root, f"the {split} rows of {spec.name}")
    if isinstance(backbone, Vision):
        assert isinstance(tokenizer, Preprocess)
        return backbone.measure(image_extents(tokenizer.sized(text.image_size), rows, text))
    if tokenizer is not None:
        return prepared(backbone, tokenizer, spec, split, rows, text, candidates_of(backbone, tokenizer, spec)).lengths
    prompted = [text.prompt.format(*t) if backbone.writes_text else " ".join(t) for t in rows.texts]
    words = np.asarray([len(p.split()) for p in prompted], float)
    special = 1 if backbone.writes_text else 1 + len(spec.fields)
    tokens = np.ceil(words * TOKENS_A_WORD.get(backbone.name, 1.4)).astype(np.int64) + special
    out = {backbone.streams[0]: np.clip(tokens, 1, text.max_length)}
    for stream in backbone.streams[1:]:
        out[stream] = np.full(len(words), 2 if split == "train" else 1, np.int64)
    return out


def workload(recipe: Recipe, task: Task | None = None) -> Workload:
    """The recipe's task and model as numbers."""
    need(recipe, "model", "task")
    backbone, tokenizer = backbone_and_tokenizer(recipe.model)
    task = task or open_task(recipe)
    refuse_full_readers(recipe, (recipe.tuner,), backbone)
    refuse_for_kind(recipe, backbone)
    if kept := parse_projection(recipe.projection or "none", backbone.width):
        # Of a projection the widths alone matter here.
        small = {n: backbone.width for n in backbone.states() if n not in backbone.full_states()}
        backbone = backbone.projected(orthogonal(small, kept[1], 0))
    config = config_of(recipe, recipe.tuner)
    splits = [s for s in (recipe.split or task.splits) if len(task.rows(s))]
    rows = {s: min(len(task.rows(s)), recipe.limit or len(task.rows(s))) for s in splits}
    pictures: list[Picture] = []
    if isinstance(backbone, Vision):
        assert isinstance(tokenizer, Preprocess)
        first = task.rows("train" if "train" in splits else splits[0])
        pictures = some_pictures(tokenizer, first, space_options(recipe, task.spec).text)
        if "train" in rows:
            rows["train"] *= recipe.views or 1
    return Workload(
        backbone,
        recipe.tuner,
        config,
        fitting_tuner(recipe.tuner, config, backbone).states(config, backbone),
        max(2, len(task.spec.labels)),
        {s: sample_lengths(backbone, tokenizer, task, s, recipe) for s in splits},
        rows,
        batch_size_of(recipe, backbone.writes_text),
        grouped(recipe, backbone.writes_text),
        recipe.epochs or (10 if task.spec.name in LARGE_TASKS else 20),
        tokenizer is None,
        pictures,
    )


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


def training_memory(work: Workload, batch: dict[str, np.ndarray], dtype: torch.dtype, held: float) -> dict[str, float]:
    """Bytes by what they are for, computed from the tensors. `dtype`: of a batch's states. `held`: the tier's blocks,
    or those in flight."""
    model = tuner_model(work.backbone, work.tuner, work.config, work.classes)
    rows = {s: int(n.sum()) for s, n in batch.items()}
    values = [rows[stream_of(s)] * work.backbone.state_width(s) for s in work.states]
    parts = {
        "tail": sum(p.numel() * 4 for p in model.tuner.tail.parameters()),
        "trainable, gradients, Adam": model.trainable_parameters() * 16,
        "kept for the backward pass": saved_bytes(work.backbone, work.tuner, work.config, batch, work.classes, dtype),
        "two batches": 2 * sum(values) * dtype.itemsize,
        "a state widened": 4 * max(values) if dtype.itemsize < 4 else 0,
        "blocks": held,
    }
    return {k: float(v) for k, v in parts.items()} | {"total": float(sum(parts.values()))}


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
    shapes = measured.Measured(*model, work.classes, batch, filled, training, fmt, folder, work.pictures)
    speed = shapes.rates(device, known)
    ops = weighted((share, count(*model, b, work.classes)) for share, b in training)
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
    even = gains[tier]
    held = epoch_bytes if tier == "host memory" else min(epoch_bytes, 12 * SEGMENT_BYTES)
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
        memory=training_memory(work, batch, dtype, held),
        operations=described(ops, batches),
        rates=asdict(speed),
        rates_of=min(known.dates, default=None) if known else None,
        measured=known.measured if known else None,
        epochs=work.epochs,
        format=fmt,
        projection=recipe.projection or "none",
        tier=tier,
        pays=even is not None and even <= work.epochs,
    )
    recommend(plan, work, recipe, budget, memory)
    return plan


def sizes(work: Workload, projection: str | None, channels: int | None) -> dict[str, dict[str, float]]:
    """Bytes a sample and in all of every format, then of float16 in a quarter and an eighth of the channels."""
    table = {f: work.bytes(f) for f in FORMATS}
    if work.backbone.shape == "sequence":
        table |= {f"float16, pca:{k}": work.bytes("float16", k) for n in (4, 8) if (k := work.backbone.width // n)}
        if channels is not None:
            table |= {f"{f}, {projection}": work.bytes(f, channels) for f in FORMATS}
    return {name: {"bytes a sample": size / work.samples, "total": size} for name, size in table.items()}


def described(ops: Operations, batches: int) -> dict[str, float]:
    return {"backbone a step": ops.backbone, "tuner a step": ops.step, "ratio": ops.ratio, "steps an epoch": batches}


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
    refuse_slots(recipe, "plan")
    work = workload(recipe)
    known = Remembered(device_of(recipe), again=measure)
    plan = predict(work, recipe, budget, memory, known)
    known.save()
    return asdict(plan), plan_text(plan, work)
