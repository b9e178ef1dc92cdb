"""Rates of this machine, measured in a few seconds at the shapes that matter.

The backbone's rate comes from a backbone of the real width with two blocks and random weights; the step's time from the
real tuner with random weights on random states of the real shape; both are the best of a few runs.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.cost.disk import disk_rates
from pipeline.cost.flops import Learned, backbone_operations, fresh_backbone, learned_objective
from pipeline.cost.remembered import Figures, Remembered
from pipeline.extract.backbones.base import Backbone
from pipeline.extract.backbones.images import Picture, load_pixels
from pipeline.extract.backbones.shell import cut
from pipeline.extract.backbones.tail import Tail
from pipeline.extract.batch import Batch, stream_of
from pipeline.extract.encoding import decode, encode, unscaled_dtype
from pipeline.train.fit.optimizer import adamw
from pipeline.train.fit.options import FitOptions
from pipeline.train.model import Model, late_weights, tail_for
from pipeline.train.objectives import Objective
from pipeline.train.tuners import TunerConfig, tuner_class

RATE_TOKENS = 2048  # positions of a batch that the backbone's rate is measured on, at most


@dataclass(frozen=True)
class Rates:
    """`backbone`: FLOP/s of the frozen forward pass on a training batch, `extraction` on a batch as extraction makes
    them (of short texts it holds many more). `step`: seconds of one training step on states at hand, for the
    batch it was measured on. `decode`: bytes as stored a second, gathered for a batch. `disk_write` (with fsync),
    `disk_warm`, `disk_cold`: bytes a second; cold is None where the page cache cannot be dropped. `image`: seconds to
    read an image and make it into pixels, 0 for texts."""

    backbone: float
    extraction: float
    step: float
    decode: float
    disk_write: float
    disk_warm: float
    disk_cold: float | None
    image: float = 0.0


@dataclass(frozen=True)
class Measured:
    """What the rates are measured on. `batch` and `extraction`: stream → lengths of a batch of training and of
    extraction; `steps`: batches of training, each with its share of an epoch's. `folder`: on the disk of the store.
    `learned`: the share of positions that are targets, where these are tokens."""

    backbone: Backbone
    tuner: str
    config: TunerConfig
    classes: Learned
    batch: dict[str, np.ndarray]
    extraction: dict[str, np.ndarray]
    steps: list[tuple[float, dict[str, np.ndarray]]]
    format: str
    folder: Path
    pictures: Sequence[Picture] = ()
    learned: float = 1.0

    def rates(self, device: torch.device, known: Remembered | None) -> Rates:
        """The rates on `device`: those that `known` has, and the others measured. Images are always read anew."""
        dtype = unscaled_dtype(self.format)
        config = json.loads(self.backbone.config.to_json_string())
        same = {"family": self.backbone.name, "config": {k: v for k, v in config.items() if k[0] != "_"}}
        if self.backbone.projection is not None:
            same["widths"] = {n: self.backbone.state_width(n) for n in self.backbone.states()}

        def rate(what: str, measure: Callable[[], Figures], **about: Any) -> Figures:
            return measure() if known is None else known.rate(what, about, measure)

        def one(what: str, measure: Callable[[], float], **about: Any) -> float:
            (figure,) = rate(what, lambda: (measure(),), **about)
            assert figure is not None
            return figure

        def backbone(lengths: dict[str, np.ndarray]) -> float:
            about = {**same, "lengths": _lists(lengths)}
            return one("backbone", lambda: backbone_rate(self.backbone, lengths, device), **about)

        def step(lengths: dict[str, np.ndarray]) -> float:
            learned: Any = self.classes if isinstance(self.classes, int) else _said(self.classes)
            known = {"tuner": self.tuner, "options": asdict(self.config), "classes": learned, "type": str(dtype)}
            about: dict[str, Any] = {**same, **known, "lengths": _lists(lengths)}
            about |= {} if self.classes else {"learned": self.learned}
            given = self.backbone, self.tuner, self.config, lengths, self.classes, device, dtype, self.learned
            return one("step", lambda: step_seconds(*given), **about)

        width = self.backbone.width
        written, warm, cold = rate("disk", lambda: disk_rates(self.folder), mount=_mount(self.folder))
        return Rates(
            backbone(self.batch),
            backbone(self.extraction),
            sum(share * step(lengths) for share, lengths in self.steps),
            one("decode", lambda: decode_rate(width, self.format), width=width, format=self.format),
            written or 0.0,
            warm or 0.0,
            cold,
            image_seconds(self.pictures) if self.pictures else 0.0,
        )


def _said(objective: Objective) -> dict[str, Any]:
    """What the time of a step depends on of an objective."""
    return {"objective": objective.name, "labels": len(objective.answers.labels), **asdict(objective.config)}


def _lists(lengths: dict[str, np.ndarray]) -> dict[str, list[int]]:
    return {stream: n.tolist() for stream, n in lengths.items()}


def _mount(folder: Path) -> str:
    """Where the file system of `folder`, or of what is there of it, is mounted."""
    return next(str(p) for p in (folder.resolve(), *folder.resolve().parents) if p.is_mount())


def runs(run: Callable[[], Any], device: torch.device, seconds: float = 1.0, least: int = 2) -> list[float]:
    """Seconds of each of several runs, after one that does not count; stops after `seconds`."""
    run()
    found: list[float] = []
    while len(found) < least or (sum(found) < seconds and len(found) < 20):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - begun)
    return found


def best(run: Callable[[], Any], device: torch.device, seconds: float = 1.0) -> float:
    """Seconds of the fastest of several runs."""
    return min(runs(run, device, seconds))


def shallow(backbone: Backbone, blocks: int) -> Backbone:
    """The same backbone at the same width with few blocks."""
    config = copy.deepcopy(backbone.config)
    if backbone.continues_text:
        config = cut(config, range(blocks), backbone.attentions[0])
        config.pad_token_id = None  # of a smaller table it may not be a row
    config.vocab_size = min(config.vocab_size, 1024)
    for name in ("num_layers", "num_decoder_layers", "num_hidden_layers"):
        if hasattr(config, name):
            setattr(config, name, blocks)
    return type(backbone)(config)


def head(lengths: dict[str, np.ndarray], samples: int) -> dict[str, np.ndarray]:
    """The lengths of some `samples`, evenly over the sorted ones."""
    longest = next(iter(lengths.values()))
    pick = np.argsort(longest, kind="stable")[np.linspace(0, len(longest) - 1, min(samples, len(longest))).astype(int)]
    return {s: n[pick] for s, n in lengths.items()}


def random_batch(
    backbone: Backbone,
    lengths: dict[str, np.ndarray],
    states: list[str],
    classes: Learned,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    learned: float = 1.0,
) -> Batch:
    """A batch of random states in `dtype`; decoder positions are chains, as those of one target a sample. Of no classes
    the targets are tokens, a share `learned` of all."""
    g = torch.Generator().manual_seed(0)
    rows = {s: int(n.sum()) for s, n in lengths.items()}
    batch = backbone.made_up(lengths)
    for name, column in batch.columns.items():
        stream, what = name.split(".")
        if what == "parent":
            column.copy_(torch.from_numpy(np.concatenate([np.arange(n) - 1 for n in lengths[stream]])))
        elif what == "ids":
            column.random_(2, min(1000, backbone.config.vocab_size), generator=g)
    for name in states:
        batch.states[name] = torch.randn(rows[stream_of(name)], backbone.state_width(name), generator=g).to(dtype)
    if isinstance(classes, Objective):
        batch.targets = classes.made_up(batch)
    elif classes:
        batch.targets = {"label": torch.randint(classes, (len(batch),), generator=g)}
    else:
        first, steps = batch.layout(backbone.streams[-1]).first, torch.arange(rows[backbone.streams[-1]] + 1)
        learn = (steps * learned).floor().diff() > 0  # evenly, so many of them
        batch.targets = {"learn": learn.index_fill(0, first, False)}
    return batch.to(device)


def backbone_rate(backbone: Backbone, lengths: dict[str, np.ndarray], device: torch.device) -> float:
    """FLOP/s of the frozen forward pass of two blocks; of an image backbone, which is smaller and whose stages differ,
    of all."""
    positions = sum(float(lengths[s].mean()) for s in backbone.streams)
    lengths = head(lengths, max(4, int(RATE_TOKENS / positions)))
    small = backbone if backbone.modality == "image" else shallow(backbone, 2)
    model = fresh_backbone(small, small.attentions[0]).to(device)
    batch = random_batch(small, lengths, [], 2, device)
    states = small.states()
    with torch.inference_mode():
        seconds = best(lambda: small.run(model, batch, states), device)
    return backbone_operations(small, lengths, states) / seconds


def random_tail(backbone: Backbone, name: str, config: TunerConfig) -> Tail:
    """The tail that tuner `name` needs, of no particular weights. An image family takes it out of a whole backbone,
    whose buffers (statistics, shift masks) have to make sense; a text family builds it by itself, however large."""
    if backbone.modality == "text":
        return tail_for(name, config, backbone, backbone.attentions[0])
    model = fresh_backbone(backbone, backbone.attentions[0])
    late = late_weights(name, config, backbone, model)
    return tail_for(name, config, backbone, backbone.attentions[0], backbone.tail_weights(model), late)


def step_seconds(
    backbone: Backbone,
    name: str,
    config: TunerConfig,
    lengths: dict[str, np.ndarray],
    classes: Learned,
    device: torch.device,
    dtype: torch.dtype,
    learned: float = 1.0,
) -> float:
    """Seconds of one training step as the loop makes it, on states in `dtype`, the fixed cost of a step included."""
    objective = learned_objective(backbone, name, classes, 2)
    tail = random_tail(backbone, name, config)
    for parameter in tail.parameters():
        parameter.data.normal_(std=0.02)
    model = Model.build(name, config, backbone, tail, objective, 0).to(device).train()
    options = FitOptions(lr=1e-6)
    optimizer, _ = adamw(model, options)

    def seconds(part: dict[str, np.ndarray]) -> float:
        batch = random_batch(
            backbone, part, tuner_class(name, backbone).states(config, backbone), classes, device, dtype, learned
        )
        if objective.wants.text_head and not objective.continues_text:
            # Inputs of the target's own chain, so that every row is a target row, as in training.
            assert batch.targets is not None
            batch.columns["decoder.ids"][batch.columns["decoder.parent"] == 0] = 2 + batch.targets["label"]

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            model.loss(batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        return statistics.median(runs(step, device))  # an epoch has slow steps, too

    samples = len(next(iter(lengths.values())))
    if device.type != "cpu" or samples <= 32:
        return seconds(lengths)
    small, large = head(lengths, 8), head(lengths, 24)
    sizes = [sum(int(part[s].sum()) for s in backbone.streams) for part in (small, large, lengths)]
    first, second = seconds(small), seconds(large)
    return second + max(0.0, second - first) / (sizes[1] - sizes[0]) * (sizes[2] - sizes[1])


def image_seconds(pictures: Sequence[Picture]) -> float:
    """Seconds to read one of `pictures` and make it into pixels, several at once as a batch is."""
    begun = time.perf_counter()
    load_pixels(pictures)
    return (time.perf_counter() - begun) / len(pictures)


def decode_rate(width: int, fmt: str) -> float:
    """Bytes as stored a second: rows gathered in random order, as a batch is made for training."""
    rows = max(1, (32 << 20) // (width * 4))
    encoded = encode(torch.randn(rows, width), fmt)
    order = torch.randperm(rows)
    return encoded.nbytes / best(lambda: decode(encoded.take(order), None), torch.device("cpu"), 0.3)
