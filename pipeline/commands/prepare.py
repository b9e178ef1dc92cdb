"""What an extraction is of, before the backbone runs: rows, inputs, keys and task tables, for each slot of the task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.checks.rows import refuse_other_kind, refuse_unknown_ids
from pipeline.checks.unused_options import for_kind, refuse_for_kind, refuse_for_slots
from pipeline.extract.backbones import Backbone, Inputs, TextOptions
from pipeline.extract.backbones.capabilities import Answers, WritesText
from pipeline.extract.backbones.live import LiveBackbone
from pipeline.extract.completion import RowError
from pipeline.extract.feature_space import PRECISIONS, SpaceOptions, space_identity
from pipeline.extract.pretrained import Checkpoint, checkpoint_for
from pipeline.extract.projection import Projection
from pipeline.extract.tasks.base import SPLITS, Rows, Task, TaskSpec
from pipeline.extract.tasks.completion import form_of
from pipeline.extract.tasks.images import contents
from pipeline.jobs.slots import SlotRecipe, parts_of, slots_of
from pipeline.lookup.objective import answers_in_text, answers_of
from pipeline.lookup.recipe import device_of, refuse_full_readers, space_options, wanted_states
from pipeline.lookup.task import open_task
from pipeline.owners import config_of
from pipeline.recipe import Recipe
from pipeline.store import TaskTable, digest_json
from pipeline.store.errors import UserError, within
from pipeline.train.tuners import fitting_tuner, tuner_class, tuner_config, tuner_names


@dataclass
class Split:
    """One split ready for the backbone. `inputs` and `keys` are in the order of `rows`; `total` before any limit."""

    name: str
    rows: Rows
    inputs: Inputs
    keys: list[str]
    total: int

    def head(self, count: int) -> Split:
        """The first `count` samples, all where there are no more."""
        if count >= len(self.keys):
            return self
        return Split(
            self.name, self.rows.head(count), self.inputs.take(np.arange(count)), self.keys[:count], self.total
        )

    @property
    def windows(self) -> tuple[int, int, int]:
        """How many texts are more than one window, how many windows of them are samples, and how many are not, with
        nothing to be learned in them."""
        several = [
            (meta["window"], texts)
            for meta, texts in zip(self.inputs.metas or [{}] * len(self.rows), self.rows.texts, strict=True)
            if "window" in meta
        ]
        whole = [window[1] for window, texts in several if texts]
        return len(whole), len(several), sum(whole) - len(several)


def prepare_split(
    backbone: Backbone,
    tokenizer: Any,
    spec: TaskSpec,
    name: str,
    rows: Rows,
    options: TextOptions,
    candidates: Sequence[Sequence[int]],
    total: int | None = None,
) -> Split:
    """Tokenise a split. Training rows of a text-to-text backbone get their own target's decoder positions, other rows
    those that scoring all targets needs. Raises UserError for rows that the backbone cannot read."""
    refuse_other_kind(backbone, rows.texts, options.root, f"the {name} rows of {spec.name}")
    options = replace(options, words=spec.target == "tags", form=form_of(spec))
    if spec.target == "tokens" and not backbone.continues_text:
        raise UserError(f"the texts of {spec.name} are to be gone on with, which {backbone.name} backbones do not do")
    if options.views > 1 and name == "train":
        rows = with_views(rows, options.views)
    try:
        inputs = prepared(backbone, tokenizer, spec, name, rows, options, candidates)
    except RowError as error:
        raise UserError(f"{spec.name}, {name} {error}") from None
    refuse_unknown_ids(backbone, inputs, f"the {name} rows of {spec.name}")
    if inputs.skipped:
        rows = rows.take([i for i in range(len(rows)) if i not in inputs.skipped])
    total = len(rows) if total is None else total
    if len(inputs.of):
        total += len(inputs) - len(rows)
        rows = with_windows(rows, inputs.of.tolist())
    return Split(name, rows, inputs, inputs.keys(), total)


def candidates_of(backbone: Backbone, tokenizer: Any, spec: TaskSpec, objective: str | None) -> list[list[int]]:
    """Token ids of each target text; none where the backbone does not answer with one."""
    if not isinstance(backbone, Answers) or not answers_in_text(objective, spec, backbone):
        return []
    return backbone.candidates(tokenizer, answers_of(spec, backbone))


def prepared(
    backbone: Backbone,
    tokenizer: Any,
    spec: TaskSpec,
    split: str,
    rows: Rows,
    options: TextOptions,
    candidates: Sequence[Sequence[int]],
) -> Inputs:
    """The rows of a split as inputs; those of a backbone that writes text as `prepare_split` says."""
    if not isinstance(backbone, Answers) or not (candidates or backbone.writes_text):
        return backbone.prepare(tokenizer, rows.texts, options)
    gold = None
    if split == "train" and candidates:
        gold = [spec.target_index(label) for label in rows.labels if isinstance(label, int | float)]
    return backbone.prepare(tokenizer, rows.texts, options, candidates, gold)


def with_windows(rows: Rows, of: Sequence[int]) -> Rows:
    """The row of each sample. A text stands with the first of its windows alone."""
    several = rows.take(of)
    several.texts = [text if i == 0 or of[i] != of[i - 1] else () for i, text in enumerate(several.texts)]
    return several


def with_views(rows: Rows, views: int) -> Rows:
    """Each image `views` times, with the number of the view as a second field: 0 is the plain image."""
    several = rows.take([i for i in range(len(rows)) for _ in range(views)])
    several.texts = [(name, str(i % views)) for i, (name, *_) in enumerate(several.texts)]
    return several


def load_backbone(
    checkpoint: Checkpoint,
    precision: str,
    attention: str,
    device: torch.device,
    projection: Projection | None = None,
) -> LiveBackbone:
    """The checkpoint's backbone, loaded when first used; what it hands out is projected as the feature space's states
    are. One that writes text has a row for each token, no more."""
    backbone = checkpoint.backbone.projected(projection)

    def load() -> Any:
        model = backbone.load(checkpoint.folder, PRECISIONS[precision], attention, device)
        if isinstance(backbone, WritesText):
            backbone.keep_tokens(model, checkpoint.tokens)
        return model

    return LiveBackbone(backbone, load, device)


@dataclass
class Making:
    """One slot of an extraction (the only one has no name): its recipe, backbone and rows. `candidates`: token ids of
    each target, which a text-to-text backbone writes where it is the only one."""

    recipe: Recipe
    checkpoint: Checkpoint
    task: Task
    options: SpaceOptions
    identity: dict[str, Any]
    candidates: list[list[int]]
    splits: list[Split]
    states: list[str]
    live: LiveBackbone

    @property
    def backbone(self) -> Backbone:
        return self.checkpoint.backbone

    @property
    def inputs(self) -> Inputs:
        return Inputs.concat([s.inputs for s in self.splits])

    @property
    def keys(self) -> list[str]:
        return [k for s in self.splits for k in s.keys]


def prepare(recipe: Recipe, task: Task | None = None, upright: bool = True) -> dict[str, Making]:
    """Slot → what is extracted there, the rows being the same in all. `task`: rows at hand, instead of those the recipe
    names; `upright`: images are turned as their EXIF orientation says."""
    parts = parts_of(recipe)
    checkpoints = {slot: checkpoint_for(part.model) for slot, part in parts.items()}
    if slots_of(recipe):
        refuse_for_slots(recipe, [point.backbone for point in checkpoints.values()])
    made = {}
    for slot, part in parts.items():
        with of_slot(slot):
            made[slot] = _prepare(part, checkpoints[slot], task, upright)
    _align(made)
    return made


def of_slot(slot: str) -> AbstractContextManager[None]:
    """Errors within it say the slot, where it has a name."""
    return within(f"slot {slot}") if slot else nullcontext()


def _prepare(recipe: Recipe, checkpoint: Checkpoint, task: Task | None, upright: bool) -> Making:
    backbone, device = checkpoint.backbone, device_of(recipe)
    recipe = own_tuners(for_kind(recipe, backbone), backbone)
    if recipe.frames and not isinstance(recipe, SlotRecipe):
        raise UserError("--frames: videos are for one slot of several: --model video=NAME,text=NAME")
    states = wanted_states(recipe, backbone)
    refuse_full_readers(recipe, recipe.tuners, backbone)
    refuse_for_kind(recipe, backbone)
    task = task or open_task(recipe, backbone)
    options = space_options(recipe, task.spec, backbone)
    if not upright:  # of a space made before images were turned
        options = replace(options, text=replace(options.text, upright=False))
    task = with_contents(task, backbone, options.text)
    single = not isinstance(recipe, SlotRecipe)
    candidates = candidates_of(backbone, checkpoint.tokenizer, task.spec, recipe.objective) if single else []
    names = _splits(task, recipe)
    splits = [_split(backbone, checkpoint, task, name, recipe.limit, options.text, candidates) for name in names]
    live = load_backbone(checkpoint, options.precision, options.attention, device)
    identity = space_identity(checkpoint, options)
    return Making(recipe, checkpoint, task, options, identity, candidates, splits, states, live)


def own_tuners(recipe: Recipe, backbone: Backbone) -> Recipe:
    """The recipe of a slot with those tuners of `--for` that work on its backbone, one at least."""
    if not isinstance(recipe, SlotRecipe) or not recipe.tuners:
        return recipe
    for name in recipe.tuners:
        tuner_class(name)  # there is one of that name, on whatever backbone
    names = tuple(name for name in recipe.tuners if _works_on(name, backbone))
    if not names:
        only = recipe.tuners[0]
        fitting_tuner(only, config_of(recipe, only, len(recipe.tuners) > 1), backbone)  # says why
    for name in names:
        config = config_of(recipe, name, len(names) > 1)
        start = fitting_tuner(name, config, backbone).start(config, backbone)
        if start is not None and start.fisher:
            raise UserError("--init fisher is for a backbone that answers alone: use --init magnitude with several")
    return replace(recipe, tuners=names)


def _works_on(name: str, backbone: Backbone) -> bool:
    """Whether a tuner works on a backbone, whatever its options say: it has a form there, which takes this shape."""
    if name not in tuner_names(type(backbone)):
        return False
    return tuner_class(name, backbone).refuse(tuner_config(name, {}), backbone) is None


def _align(made: Mapping[str, Making]) -> None:
    """Leave out everywhere the rows that one slot had to leave out. UserError where slots disagree on the rows."""
    first, *others = made.items()
    for slot, making in others:
        mine, theirs = making.task.splits, first[1].task.splits
        if {n: rows.labels for n, rows in mine.items()} != {n: rows.labels for n, rows in theirs.items()}:
            raise UserError(f"slots {first[0]} and {slot} read other rows of the task: give them one table")
    for place in range(len(first[1].splits) if others else 0):
        splits = [making.splits[place] for making in made.values()]
        skipped = set().union(*(split.inputs.skipped for split in splits))
        if not skipped:
            continue
        for split in splits:
            here = [i for i in range(len(split.rows) + len(split.inputs.skipped)) if i not in split.inputs.skipped]
            kept = [at for at, row in enumerate(here) if row not in skipped]
            split.rows, split.keys = split.rows.take(kept), [split.keys[i] for i in kept]
            split.inputs = replace(split.inputs.take(np.asarray(kept, np.int64)), skipped=split.inputs.skipped)


def _splits(task: Task, recipe: Recipe) -> list[str]:
    names = list(recipe.split) or [s for s in SPLITS if s in task.splits]
    if not names:
        raise UserError(f"task {task.spec.name} has no rows to extract: {'; '.join(task.absent.values())}")
    for name in names:
        task.rows(name)
    return names


def _split(
    backbone: Backbone,
    checkpoint: Checkpoint,
    task: Task,
    name: str,
    limit: int | None,
    options: TextOptions,
    candidates: Sequence[Sequence[int]],
) -> Split:
    rows = task.rows(name)
    if not len(rows):
        raise UserError(f"task {task.spec.name}: the {name} split is empty")
    head = rows.head(limit)
    return prepare_split(backbone, checkpoint.tokenizer, task.spec, name, head, options, candidates, len(rows))


def joint_tables(tables: Mapping[str, Mapping[str, TaskTable]]) -> dict[str, TaskTable]:
    """Slot → split → table: the rows of all slots by split, with the fields of each slot side by side, those that
    several read once. The keys are the first slot's. UserError where the slots were not written together."""
    (first, mine), *others = tables.items()
    joined = dict(mine)
    for slot, theirs in others:
        for split, table in mine.items():
            other = theirs.get(split)
            if other is None or table.joined.get(slot) != other.keys or other.joined.get(first) != table.keys:
                raise UserError(
                    f"the {split} rows of slots {first} and {slot} were not extracted together: extract with both again"
                )
            if other.texts != table.texts:
                texts = [[*a, *b] for a, b in zip(joined[split].texts, other.texts, strict=True)]
                joined[split] = replace(joined[split], texts=texts)
    return joined


def tables_of(made: Mapping[str, Making]) -> dict[str, dict[str, TaskTable]]:
    """Slot → split → task table. Of several slots each table knows the keys of the others, and all are one version."""
    tables: dict[str, dict[str, TaskTable]] = {}
    several = {slot: making for slot, making in made.items() if slot}
    fields = {slot: list(making.task.spec.fields) for slot, making in several.items()}
    version = digest_json({slot: making.task.version for slot, making in several.items()})
    for slot, making in made.items():
        tables[slot] = {split.name: _table(making, split) for split in making.splits}
        for place, table in enumerate(tables[slot].values()):
            if several:
                table.header |= {"slot": slot, "slots": fields, "version": version}
                table.joined = {s: other.splits[place].keys for s, other in several.items() if s != slot}
    return tables


def with_contents(task: Task, backbone: Backbone, options: TextOptions) -> Task:
    """A task with images, what their files hold being part of its provenance: they may change under their names."""
    if backbone.modality != "image":
        return task
    held = contents(Path(options.root), (t[0] for rows in task.splits.values() for t in rows.texts))
    return replace(task, provenance={**task.provenance, "contents": held})


def _table(making: Making, split: Split) -> TaskTable:
    task, candidates = making.task, making.candidates
    header = {
        "task": task.spec.name,
        "split": split.name,
        "rows": len(split.rows),
        "total": split.total,
        "spec": task.spec.to_dict(),
        "version": task.version,
        "candidates": [list(c) for c in candidates],
        "decoder": "gold" if split.name == "train" and candidates else "trie" if candidates else "",
        "model": making.checkpoint.name,
        "beside": {s.name: len(s.rows) for s in making.splits},
        "provenance": task.provenance,
        "origin": task.origin,
        "truncated": int(split.inputs.truncated.sum()),
        "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    rows = split.rows
    texts, metas = [list(t) for t in rows.texts], [dict(meta) for meta in split.inputs.metas]
    return TaskTable(header, split.keys, list(rows.labels), texts, list(rows.ids), metas)
