"""What a plan is of: samples with their lengths, a backbone and a tuner, from a recipe and its data alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.checks.rows import refuse_other_kind
from pipeline.checks.unused_options import refuse_for_kind
from pipeline.commands.prepare import candidates_of, prepared
from pipeline.cost.flops import Learned
from pipeline.cost.image_sizes import image_extents, some_pictures
from pipeline.cost.known_shapes import known_config
from pipeline.extract.backbones.base import Backbone
from pipeline.extract.backbones.images import Picture, Preprocess, filled_up
from pipeline.extract.backbones.registry import backbone_for
from pipeline.extract.backbones.vision import Vision
from pipeline.extract.batch import stream_of
from pipeline.extract.batching import extraction_batches
from pipeline.extract.completion import windows
from pipeline.extract.feature_space import chosen_fields
from pipeline.extract.pretrained import Checkpoint, local
from pipeline.extract.projection import MAPS, orthogonal, parse_projection
from pipeline.extract.tasks import Task
from pipeline.extract.tasks.completion import form_of
from pipeline.jobs.sources import batch_size_of, grouped
from pipeline.lookup.objective import answers_in_text, make_objective, objective_name
from pipeline.lookup.recipe import refuse_full_readers, space_options
from pipeline.lookup.task import need, open_task
from pipeline.owners import config_of
from pipeline.recipe import Recipe
from pipeline.store import bytes_per_value
from pipeline.store.errors import UserError
from pipeline.train.data.order import Order
from pipeline.train.objectives import Objective, objective_class
from pipeline.train.tuners import TunerConfig, fitting_tuner, tuner_class

SAMPLED = 2000  # rows whose lengths stand for all
TOKENS_A_WORD = {"t5": 1.45, "bert": 1.3}
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
LARGE_TASKS = ("mnli", "qnli", "qqp", "sst2")


@dataclass
class Workload:
    """What is to be run. `lengths`: split → stream → (n,) positions of sampled rows, of images as `Vision.measure`
    gives them; `rows`: split → rows in all. `classes`: what a step is counted with. `pictures`: a few of the images, to
    time reading them. `views`: of each training image, counted in `rows`. `learned`: of the positions that training
    samples have, the share that are targets, where these are tokens (`classes` is then 0). `maps`: a projection keeps
    maps that heads read in few channels, too. `space`: what the recipe decides of the feature space's identity."""

    backbone: Backbone
    tuner: str
    config: TunerConfig
    states: list[str]
    classes: Learned
    lengths: dict[str, dict[str, np.ndarray]]
    rows: dict[str, int]
    batch_size: int
    grouped: bool
    epochs: int
    estimated: bool
    pictures: list[Picture] = field(default_factory=list)
    views: int = 1
    learned: float = 1.0
    maps: bool = False
    space: dict[str, Any] = field(default_factory=dict)

    @property
    def dense(self) -> Objective | None:
        """The objective, where its own head is counted."""
        return self.classes if isinstance(self.classes, Objective) else None

    @property
    def full(self) -> set[str]:
        """States that the projection leaves as they are, however wide."""
        return set() if self.maps else set(self.backbone.full_states())

    @property
    def samples(self) -> int:
        return sum(self.rows.values())

    def positions(self, split: str) -> dict[str, float]:
        """Mean positions of a sample in each stream."""
        return {s: float(self.lengths[split][s].mean()) for s in self.backbone.streams}

    def sample_bytes(self, fmt: str, split: str, channels: int | None = None, states: Sequence[str] = ()) -> float:
        """Bytes of one sample as stored, the mean over a split. `channels`: of projected states, None for no
        projection. `states`: others than the tuner's."""
        n, full = {s: float(k.mean()) for s, k in self.lengths[split].items()}, self.full
        total = float(sum(4 * n[stream_of(c)] for c in self.backbone.columns))
        for state in states or self.states:
            stream = stream_of(state)
            width = self.backbone.full_width(state)
            width = width if channels is None or state in full else min(width, channels)
            total += n[stream] * (width * bytes_per_value(fmt) + (4 if fmt == "int8" else 0))
        return total

    def bytes(
        self, fmt: str, channels: int | None = None, states: Sequence[str] = (), views: int | None = None
    ) -> float:
        """Bytes of all splits. `views`: others than the recipe's of a training image."""
        rows = {s: n * (views or self.views) / self.views if s == "train" else n for s, n in self.rows.items()}
        return sum(n * self.sample_bytes(fmt, s, channels, states) for s, n in rows.items())

    @property
    def tokens(self) -> float:
        """Positions of all splits in the first stream."""
        return sum(self.rows[s] * self.positions(s)[self.backbone.streams[0]] for s in self.rows)

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
) -> tuple[dict[str, np.ndarray], float]:
    """Positions of up to `SAMPLED` rows of a split: tokenised, or estimated from words; of images by their extents. And
    the share of them that are targets, 1 where it is not known."""
    spec, rows = task.spec, task.rows(split).head(min(SAMPLED, recipe.limit or SAMPLED))
    text = replace(space_options(recipe, spec, backbone).text, form=form_of(spec))
    refuse_other_kind(backbone, rows.texts, text.root, f"the {split} rows of {spec.name}")
    if isinstance(backbone, Vision):
        assert isinstance(tokenizer, Preprocess)
        extents = image_extents(tokenizer.sized(text.image_size, text.dense), rows, text)
        return backbone.measure(filled_up(extents, backbone.padding(text))), 1.0
    if tokenizer is not None:
        candidates = candidates_of(backbone, tokenizer, spec, recipe.objective)
        made = prepared(backbone, tokenizer, spec, split, rows, text, candidates)
        spans = [end - first for meta in made.metas for first, end in meta.get("learn", ())]
        return made.lengths, sum(spans) / float(made.tokens().sum()) if spans else 1.0
    prompted = [text.prompt.format(*t) if backbone.writes_text else " ".join(t) for t in rows.texts]
    words = np.asarray([len(p.split()) for p in prompted], float)
    special = 1 if backbone.writes_text else 1 + len(spec.fields)
    tokens = np.ceil(words * TOKENS_A_WORD.get(backbone.name, 1.4)).astype(np.int64) + special
    if text.stride is not None:
        parts = [windows(int(count), text.max_length, text.stride) for count in tokens]
        tokens = np.asarray([end - first for part in parts for first, _, end in part])
    out = {backbone.streams[0]: np.clip(tokens, 1, text.max_length)}
    for stream in backbone.streams[1:]:
        out[stream] = np.full(len(words), 2 if split == "train" else 1, np.int64)
    return out, 1.0


def counted_with(recipe: Recipe, task: Task, backbone: Backbone) -> Learned:
    """What a step is counted with: the recipe's own objective where it can make up targets, else classes."""
    spec = task.spec
    name = objective_name(recipe, spec, backbone, tuner_class(recipe.tuner, backbone)) if spec.target != "none" else ""
    if not name or not objective_class(name).counted:
        return 0 if spec.target == "tokens" else max(2, len(spec.labels))
    train = task.splits.get("train")
    return make_objective(
        recipe, spec, (), backbone, tuner_class(recipe.tuner, backbone), train.labels if train else ()
    )


def workload(recipe: Recipe, task: Task | None = None) -> Workload:
    """The recipe's task and model as numbers."""
    need(recipe, "model", "task")
    backbone, tokenizer = backbone_and_tokenizer(recipe.model)
    task = task or open_task(recipe, backbone)
    refuse_full_readers(recipe, (recipe.tuner,), backbone)
    refuse_for_kind(recipe, backbone)
    if kept := parse_projection(recipe.projection or "none", backbone.width):
        # Of a projection the widths alone matter here.
        backbone = backbone.projected(orthogonal(backbone.narrowed(kept[1], kept[0] == MAPS), kept[1], 0))
    config = config_of(recipe, recipe.tuner)
    splits = [s for s in (recipe.split or task.splits) if len(task.rows(s))]
    found = {s: sample_lengths(backbone, tokenizer, task, s, recipe) for s in splits}
    lengths = {s: each for s, (each, _) in found.items()}
    rows = {s: min(len(task.rows(s)), recipe.limit or len(task.rows(s))) for s in splits}
    if recipe.stride is not None:  # a text may be several samples
        counts = {s: (len(lengths[s][backbone.streams[0]]), min(rows[s], SAMPLED)) for s in splits}
        rows = {s: round(rows[s] * samples / sampled) for s, (samples, sampled) in counts.items()}
    answered = backbone.continues_text and answers_in_text(recipe.objective, task.spec, backbone)
    pictures: list[Picture] = []
    chosen = space_options(recipe, task.spec, backbone)
    space = chosen_fields(backbone, chosen)
    if isinstance(backbone, Vision):
        assert isinstance(tokenizer, Preprocess)
        space["image_size"] = tokenizer.sized(chosen.text.image_size, chosen.text.dense).extent_text
        first = task.rows("train" if "train" in splits else splits[0])
        pictures = some_pictures(tokenizer, first, chosen.text)
        if "train" in rows:
            rows["train"] *= recipe.views or 1
    return Workload(
        backbone,
        recipe.tuner,
        config,
        fitting_tuner(recipe.tuner, config, backbone).states(config, backbone),
        0 if answered else counted_with(recipe, task, backbone),
        lengths,
        rows,
        batch_size_of(recipe, backbone.writes_text, task.spec.target),
        grouped(recipe, backbone.writes_text),
        recipe.epochs or (10 if task.spec.name in LARGE_TASKS else 20),
        tokenizer is None,
        pictures,
        recipe.views or 1,
        found["train" if "train" in splits else splits[0]][1],
        kept is not None and kept[0] == MAPS,
        space,
    )
