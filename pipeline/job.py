"""`Job`: a recipe with its feature space, task tables, tuner and sources looked up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from dask.utils import parse_bytes

from pipeline.command_line import NotExtracted
from pipeline.extract.backbones import TextOptions
from pipeline.extract.backbones.live import LiveBackbone
from pipeline.extract.backbones.tail import Tail
from pipeline.extract.checkpoint import Checkpoint, local, resolve
from pipeline.extract.identity import options_of, refuse_other, space_identity
from pipeline.extract.tasks import canonical_name
from pipeline.extract.tasks.base import Rows, TaskSpec
from pipeline.extracting import Split, load_backbone, prepare_split, task_tables
from pipeline.keepsakes import make_start, start_file, stored_late, stored_start
from pipeline.objectives import make_objective
from pipeline.owners import config_of
from pipeline.recipe import Recipe
from pipeline.resolve import (
    SPACE_FIELDS,
    Found,
    Unstored,
    device_of,
    find_space,
    need,
    open_task,
    picture_root,
    space_options,
    store_path,
)
from pipeline.rows import refuse_other_kind
from pipeline.store import Space, Store, TaskTable, digest_json
from pipeline.store.errors import MissingStates, StoreError, UserError
from pipeline.store.tables import version_of
from pipeline.stored import check_columns, check_states, kept_of
from pipeline.train.live import LiveSource
from pipeline.train.model import Model, late_weights, tail_for
from pipeline.train.objectives import Objective
from pipeline.train.order import Order
from pipeline.train.ranks import Ranks
from pipeline.train.source import Source
from pipeline.train.stream import StoreSource
from pipeline.train.targets import Targets
from pipeline.train.tuners import TunerConfig, fitting_tuner, tuner_class
from pipeline.unused import refuse_for_kind
from pipeline.versions import AmbiguousTask, stored_tables


@dataclass
class Job:
    """A recipe with everything it names looked up."""

    recipe: Recipe
    found: Found
    tables: dict[str, TaskTable]
    spec: TaskSpec
    config: TunerConfig
    states: list[str]
    device: torch.device
    live: tuple[LiveBackbone, Checkpoint] | None = None
    late: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)  # live layers before the last
    first: Callable[[], dict[str, torch.Tensor]] | None = None  # weights that training starts from

    @property
    def version(self) -> str:
        """Which version of the task its tables are of."""
        return version_of(next(iter(self.tables.values())).header)

    @cached_property
    def objective(self) -> Objective:
        """What is learned of the targets."""
        header = next(iter(self.tables.values())).header
        backbone = self.found.backbone
        tuner = tuner_class(self.recipe.tuner, backbone)
        return make_objective(self.recipe, self.spec, header.get("candidates", ()), backbone, tuner, self.training)

    @property
    def training(self) -> list[Any]:
        """The targets of the training rows."""
        return self.tables["train"].labels if "train" in self.tables else []

    @property
    def paper(self) -> bool:
        """Whether the papers' protocol for text-to-text backbones gives the defaults."""
        return self.found.backbone.writes_text

    def targets(self, split: str) -> Targets | None:
        """The targets of a split; None where a row has none."""
        table = self.tables[split]
        labelled = all(label is not None for label in table.labels)
        return Targets(self.objective, table.labels, table.metas or None) if labelled else None

    def model(self, seed: int | None = None, tail: Tail | None = None) -> Model:
        """The tuner on the space's tail, weights drawn from `seed`. `tail`: that of another model on the same space
        with the same late layers, for they can share it."""
        name, backbone = self.recipe.tuner, self.found.backbone
        attention = self.found.space.identity["attention"]
        tail = tail or tail_for(name, self.config, backbone, attention, self.found.tail, self.late)
        model = Model.build(name, self.config, backbone, tail, self.objective, seed)
        if seed is not None and self.first is not None:
            model.tuner.begin(self.first())
        return model


def load_job(recipe: Recipe, version: str | None = None, space: str | None = None) -> Job:
    """Look up space, task tables (those of `version` where given), tuner. `space`: the id of a finished run's, which
    then is not asked for by the recipe's options. A live run needs no store: what is not there is made from the
    checkpoint and the task's own files. Raises UserError for whatever does not fit."""
    need(recipe, "task")
    tuner_class(recipe.tuner)
    try:
        found = find_space(recipe, space)
        assert isinstance(found.space, Space)
        tables = tables_of(recipe, found, version)
    except AmbiguousTask:
        raise
    except StoreError as error:
        if not recipe.live:
            raise
        asked = space or recipe.space or ""
        if (job := unstored_job(recipe, asked)) is None:
            raise StoreError(f"{recipe.model} makes another feature space live than {asked[:12]}; {error}") from None
        return job
    # A run was trained on all the views that its table has, whatever an earlier version wrote in its recipe.
    job = make_job(recipe if space is None else replace(recipe, views=None), found, tables)
    store, digest = Store.open(store_path(recipe)), found.space.identity["weights"]
    named = replace(recipe, model=recipe.model or found.source["names"][0])
    cls = tuner_class(recipe.tuner, found.backbone)
    kept = kept_of(store, found.space.identity)
    job.late = stored_late(named, store, digest, kept, cls.late_layers(job.config, found.backbone))
    if start := cls.start(job.config, found.backbone):
        keys, labels = (tables["train"].keys, tables["train"].labels) if "train" in tables else ([], [])
        file = start_file(start, recipe.task, keys, labels, found.space.identity["precision"], kept)
        job.first = lambda: stored_start(named, store, digest, start, file)
    return job


def tables_of(recipe: Recipe, found: Found, version: str | None = None) -> dict[str, TaskTable]:
    """The stored tables of the recipe's task. StoreError with the command to run where none fits."""
    assert isinstance(found.space, Space)
    try:
        return stored_tables(found.space, recipe, found.backbone.modality == "image", version)
    except AmbiguousTask:
        raise
    except StoreError as error:
        raise NotExtracted(str(error), as_extracted(recipe, found)) from None


def make_job(
    recipe: Recipe,
    found: Found,
    tables: dict[str, TaskTable],
    live: tuple[LiveBackbone, Checkpoint] | None = None,
) -> Job:
    """A job on tables at hand; the recipe's limit is for its training rows."""
    if "train" in tables:
        tables = {**tables, "train": limited(first_views(tables["train"], recipe.views), recipe.limit)}
    spec = TaskSpec.from_dict(next(iter(tables.values())).header["spec"])
    if found.backbone.modality == "text":  # a store of earlier versions may hold names of pictures read as text
        for split, table in tables.items():
            refuse_other_kind(found.backbone, table.texts, "", f"the stored {split} rows of {spec.name}")
    config = config_of(recipe, recipe.tuner)
    tuner = fitting_tuner(recipe.tuner, config, found.backbone)
    states = tuner.states(config, found.backbone)
    projection = found.backbone.projection
    if projection is not None and not tuner.projects and projection.basis.keys() & set(states):
        kind = found.space.identity["projection"]
        raise UserError(f"tuner {recipe.tuner} reads full states; this feature space keeps {kind}: extract without it")
    return Job(recipe, found, tables, spec, config, states, device_of(recipe), live)


def unstored_job(recipe: Recipe, space: str = "") -> Job | None:
    """A live job without a store: tables and tail come from the task's files and the checkpoint. None where that makes
    another feature space than the one asked for by the beginning of its id, `space`."""
    need(recipe, "model", "task")
    checkpoint, task = resolve(recipe.model), open_task(recipe)
    refuse_for_kind(recipe, checkpoint.backbone)
    options = space_options(recipe, task.spec)
    if options.projection != "none":
        raise UserError("--projection: what extract fitted is kept in a store, and there is none here; extract first")
    for upright in (True, False):  # a run of an earlier version did not turn pictures
        text = replace(options.text, upright=upright)
        identity = space_identity(checkpoint, replace(options, text=text))
        if digest_json(identity).startswith(space):
            break
    else:
        return None
    live = load_backbone(checkpoint, options.precision, options.attention, device_of(recipe))
    tables = task_tables(checkpoint, task, recipe, text)
    tail = checkpoint.backbone.tail_weights(live.model)
    found = Found(Unstored(digest_json(identity), identity), checkpoint.backbone, tail, {"names": [checkpoint.name]})
    job = make_job(recipe, found, tables, (live, checkpoint))
    backbone = found.backbone
    job.late = late_weights(recipe.tuner, job.config, backbone, live.model)
    if start := tuner_class(recipe.tuner, backbone).start(job.config, backbone):
        train = relive(job, "train", checkpoint) if start.fisher else None
        job.first = lambda: make_start(start, backbone, live.model, job.objective, train, live.device)
    return job


def limited(table: TaskTable, limit: int | None) -> TaskTable:
    """The first `limit` rows, of pictures all views of the first `limit`, as an extraction with it stores."""
    count = len(table) if limit is None else limit * views_of(table)
    if count >= len(table):
        return table
    return table.take(range(count))


def views_of(table: TaskTable) -> int:
    """How many views of each picture a table has; 1 of a table of texts."""
    if len(table.header["spec"]["fields"]) > 1:  # a pair of texts, not a picture and the number of its view
        return 1
    return 1 + max((int(t[1]) for t in table.texts if len(t) > 1), default=0)


def first_views(table: TaskTable, views: int | None) -> TaskTable:
    """The first `views` views of each picture, all where None. UserError where fewer are stored."""
    if views is None or views == (there := views_of(table)):
        return table
    if views > there:
        raise UserError(f"--views {views}: the store has {there} views of each training picture; extract with --views")
    return table.take([i for i, t in enumerate(table.texts) if int(t[1]) < views])


def batch_size_of(recipe: Recipe, paper: bool) -> int:
    """Training batch size: 100 under the papers' protocol for text-to-text backbones, else 64."""
    return recipe.batch_size or (100 if paper else 64)


def grouped(recipe: Recipe, paper: bool) -> bool:
    """Whether batches hold samples of like length: by default, but not under the papers' protocol."""
    return not paper if recipe.group_by_length is None else recipe.group_by_length


def store_source(job: Job, split: str, batch_size: int) -> StoreSource:
    """Batches of `split` from the store. Raises UserError with the command to run when something is not there."""
    table, recipe = job.tables[split], job.recipe
    if isinstance(job.found.space, Unstored):
        raise NotExtracted(f"nothing of {job.spec.name} is in a store yet", recipe)
    ranks = Ranks.from_environment()
    # Every rank evaluates alike; of training batches each reads its share.
    options: dict[str, Any] = {"rank": ranks.rank, "world": ranks.world} if split == "train" else {}
    check_states(job.found.space, job.found.backbone, job.states)
    if recipe.host_memory is not None:
        options["host_bytes"] = parse_size(recipe.host_memory)
    try:
        return StoreSource(
            job.found.space,
            table.keys,
            job.targets(split),
            job.states,
            list(job.found.backbone.columns),
            batch_size=batch_size,
            seed=recipe.ordering,
            window=recipe.window,
            group_by_length=grouped(recipe, job.paper),
            scheduler=recipe.scheduler,
            tier=recipe.tier,
            device=job.device,
            pin=job.device.type == "cuda",
            dtype=None,
            check=lambda samples: check_columns(job.found.backbone, samples),
            **options,
        )
    except MissingStates as error:
        known = as_extracted(recipe, job.found)
        raise NotExtracted(f"{split}: {error}", known, error.samples, error.states) from None


def as_extracted(recipe: Recipe, found: Found) -> Recipe:
    """The recipe of the extraction that made the space of `found`: what the space says wins over what was left out."""
    identity = found.space.identity
    named = {k: identity[k] for k in SPACE_FIELDS if k in identity and k != "prompt"} | picture_options(identity)
    known = {k: v for k, v in named.items() if getattr(recipe, k) is None}
    task, space = canonical_name(recipe.task), found.space
    tables = [t for t in space.tables() if t.task == task] if isinstance(space, Space) else []
    if "view_seed" in known and recipe.views is None and isinstance(space, Space):
        # Views of 2 or more share a space, however many there are.
        known["views"] = max((views_of(space.read_table(t)) for t in tables if t.split == "train"), default=2)
    usual: dict[str, Any] = {"format": "float16", "projection": "none", "precision": "float32", "attention": "sdpa"}
    usual |= {"max_length": 128, "truncation_side": "right", "view_seed": 0}
    name = recipe.model or found.source["names"][0]
    checkpoint = local(name) if "image_size" in known else None
    if checkpoint is not None and checkpoint.tokenizer.extent_text == known["image_size"]:
        usual["image_size"] = known["image_size"]
    stated = {k: v for k, v in known.items() if v != usual.get(k)}
    if recipe.prompt is None and identity["prompt"] and isinstance(space, Space):
        usual_prompts = {space.read_header(t)["spec"]["prompt"] for t in tables}
        stated |= {"prompt": identity["prompt"]} if identity["prompt"] not in usual_prompts else {}
    return replace(recipe, model=name, **stated)


def picture_options(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's options that say how the pictures of a space were made, nothing for texts. How many views there are
    is of the task's table."""
    if "image_size" not in identity:
        return {}
    text = options_of(identity).text
    return {"image_size": text.image_size, **({"view_seed": text.view_seed} if text.views > 1 else {})}


def sources(job: Job, live: LiveBackbone | None, checkpoint: Checkpoint | None = None) -> dict[str, Source]:
    """A source for each split: from the store, or live when there is a backbone. Both give the same batches."""
    size = batch_size_of(job.recipe, job.paper)
    out: dict[str, Source] = {}
    for split in job.tables:
        if split == "train" or job.targets(split) is not None:
            if live is None:
                out[split] = store_source(job, split, size)
            else:
                assert checkpoint is not None
                out[split] = live_source(job, split, live, checkpoint, size)
    return out


def live_source(job: Job, split: str, live: LiveBackbone, checkpoint: Checkpoint, batch_size: int) -> LiveSource:
    """Batches computed now from the texts of the task table, in the order of the store where it holds the samples."""
    part = relive(job, split, checkpoint)
    if part.keys != list(job.tables[split].keys):
        raise StoreError(f"{split}: the checkpoint's tokenizer gives other inputs than the store holds")
    try:
        stored = isinstance(job.found.space, Space)
        order = store_source(job, split, batch_size).order if stored else None
    except MissingStates:
        order = None
    if order is None:
        lengths = part.inputs.tokens() if grouped(job.recipe, job.paper) else None
        recipe = job.recipe
        order = Order(np.zeros(len(part.keys), np.int64), batch_size, recipe.ordering, recipe.window, lengths)
    return LiveSource(live, part.inputs, job.targets(split), job.states, order)


def relive(job: Job, split: str, checkpoint: Checkpoint) -> Split:
    """A stored split prepared again from its texts."""
    table = job.tables[split]
    rows = Rows([tuple(t) for t in table.texts], list(table.labels))
    candidates = table.header.get("candidates", [])
    options = replace(text_options(job.found), root=picture_root(job.recipe))
    return prepare_split(job.found.backbone, checkpoint.tokenizer, job.spec, split, rows, options, candidates)


def text_options(found: Found) -> TextOptions:
    """How the space's rows were made into inputs; the rows of a stored table hold their views already."""
    return replace(options_of(found.space.identity).text, views=1)


def live_backbone(job: Job) -> tuple[LiveBackbone, Checkpoint]:
    """The backbone of the job's space. Raises UserError when the checkpoint at hand is another one."""
    if job.live is not None:
        return job.live
    identity = job.found.space.identity
    checkpoint = resolve(job.recipe.model or job.found.source["names"][0])
    refuse_other(checkpoint, identity)
    projection = job.found.backbone.projection
    return load_backbone(checkpoint, identity["precision"], identity["attention"], job.device, projection), checkpoint


def parse_size(text: str) -> int:
    """ "4GB", "500 MB", "0" → bytes (decimal units). UserError otherwise, below zero too."""
    try:
        size = int(parse_bytes(text))
    except ValueError:
        size = -1
    if size < 0:
        raise UserError(f"size {text!r}: expected something like 4GB or 500MB")
    return size
