"""Batches of a job: from the store, or from the backbone in the loop; both in the same order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.checks.doubtful_rows import blank_doubt
from pipeline.checks.rows import checked_rows, token_doubts
from pipeline.checks.stored import check_columns, check_states
from pipeline.command_lines import NotExtracted
from pipeline.commands.prepare import Split, load_backbone, prepare_split
from pipeline.extract.backbones import TextOptions
from pipeline.extract.backbones.live import LiveBackbone
from pipeline.extract.feature_space import options_of, refuse_other
from pipeline.extract.pretrained import Checkpoint, checkpoint_for
from pipeline.extract.tasks.base import DENSE, Rows
from pipeline.jobs.extracted import as_extracted
from pipeline.lookup.recipe import Found, Unstored
from pipeline.lookup.task import picture_root
from pipeline.recipe import Recipe
from pipeline.store import Space
from pipeline.store.errors import MissingStates, StoreError
from pipeline.store.sizes import parse_size
from pipeline.train.data.live_source import LiveSource
from pipeline.train.data.order import Order
from pipeline.train.data.source import Source
from pipeline.train.data.store_source import StoreSlot, StoreSource, StreamOptions
from pipeline.train.data.targets import Targets
from pipeline.train.fit.ranks import Ranks

if TYPE_CHECKING:
    from pipeline.jobs.job import Job

Live = tuple[LiveBackbone, Checkpoint]


def batch_size_of(recipe: Recipe, paper: bool, target: str) -> int:
    """Training batch size: 100 under the papers' protocol for text-to-text backbones, 2 images where targets are dense,
    as in those papers, else 64."""
    return recipe.batch_size or (100 if paper else 2 if target in DENSE else 64)


def grouped(recipe: Recipe, mixed: bool) -> bool:
    """Whether batches hold samples of like length: by default, unless they are to be `mixed`, as under the papers'
    protocol."""
    return not mixed if recipe.group_by_length is None else recipe.group_by_length


def store_source(job: Job, split: str, batch_size: int) -> StoreSource:
    """Batches of `split` from the store. Raises UserError with the command to run when something is not there."""
    options = stream_options(job, split, batch_size, job.grouped)
    keys, columns = job.tables[split].keys, list(job.found.backbone.columns)
    with stored_states(job, split) as space:
        return StoreSource(space, keys, job.targets(split), job.states, columns, options)


def store_slot(job: Job, split: str, keys: Sequence[str], batch_size: int, group: bool) -> StoreSlot:
    """The samples `keys` of a slot from the store, for a source of several. Raises as `store_source`."""
    with stored_states(job, split) as space:
        options = stream_options(job, split, batch_size, group)
        return StoreSlot(space, keys, job.states, list(job.found.backbone.columns), options)


def stream_options(job: Job, split: str, batch_size: int, group: bool) -> StreamOptions:
    """How the samples of `split` are read, and become batches of `batch_size`, of like length where `group`."""
    recipe, ranks = job.recipe, Ranks.from_environment()
    return StreamOptions(
        batch_size,
        seed=recipe.ordering,
        window=recipe.window,
        group_by_length=group,
        scheduler=recipe.scheduler,
        tier=recipe.tier,
        host_bytes=None if recipe.host_memory is None else parse_size(recipe.host_memory),
        device=job.device,
        pin=job.device.type == "cuda",
        dtype=None,
        check=lambda samples: check_columns(job.found.backbone, samples),
        # Every rank evaluates alike; of training batches each reads its share.
        rank=ranks.rank if split == "train" else 0,
        world=ranks.world if split == "train" else 1,
    )


@contextmanager
def stored_states(job: Job, split: str) -> Iterator[Space]:
    """The job's feature space; what is missing in it is said with the command to run."""
    space, recipe = job.found.space, job.recipe
    if isinstance(space, Unstored):
        raise NotExtracted(f"nothing of {job.spec.name} is in a store yet", recipe)
    check_states(space, job.found.backbone, job.states)
    try:
        yield space
    except MissingStates as error:
        known = as_extracted(recipe, job.found)
        raise NotExtracted(f"{split}: {error}", known, error.samples, error.states) from None


def sources(job: Job, live: LiveBackbone | None, checkpoint: Checkpoint | None = None) -> dict[str, Source]:
    """A source for each split: from the store, or live when there is a backbone. Both give the same batches."""
    size = job.batch_size
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
    part = checked_relive(job, split, checkpoint)
    try:
        stored = isinstance(job.found.space, Space)
        order = store_source(job, split, batch_size).order if stored else None
    except MissingStates:
        order = None
    if order is None:
        options = stream_options(job, split, batch_size, job.grouped)
        order = options.order(np.zeros(len(part.keys), np.int64), part.inputs.tokens)
    return LiveSource(live, part.inputs, job.targets(split), job.states, order)


def checked_relive(job: Job, split: str, checkpoint: Checkpoint) -> Split:
    """`relive`; StoreError where it gives other samples than those of the table."""
    part = relive(job, split, checkpoint)
    if part.keys != list(job.tables[split].keys):
        raise StoreError(f"{split}: the checkpoint's tokenizer gives other inputs than the store holds")
    return part


def relive(job: Job, split: str, checkpoint: Checkpoint) -> Split:
    """A stored split prepared again from its texts."""
    table = job.tables[split]
    # A later window of a text has no text of its own, and of the last text there may be fewer in the table.
    kept = [(tuple(texts), label) for texts, label in zip(table.texts, table.labels, strict=True) if texts]
    rows = Rows([texts for texts, _ in kept], [label for _, label in kept])
    candidates = table.header.get("candidates", [])
    options = replace(text_options(job.found), root=picture_root(job.recipe))
    part = prepare_split(job.found.backbone, checkpoint.tokenizer, job.spec, split, rows, options, candidates)
    return part.head(len(table))


def fresh(job: Job, live: Live, texts: Any, root: str, say: Callable[[str], None]) -> Split:
    """New rows of the job's task, see `Run.predict`, as the inputs of its backbone."""
    rows = checked_rows(texts, job.spec)
    backbone, checkpoint = live[0].backbone, live[1]
    candidates = next(iter(job.tables.values())).header.get("candidates", [])
    options, unlabelled = replace(text_options(job.found), root=root), Rows(rows, [None] * len(rows))
    part = prepare_split(backbone, checkpoint.tokenizer, job.spec, "predict", unlabelled, options, candidates)
    blank = blank_doubt(rows, "rows") if backbone.modality == "text" else ""
    for line in [*token_doubts(checkpoint.tokenizer, backbone, [part]), *([blank] if blank else [])]:
        say(f"warning: {line}")
    return part


def fresh_source(job: Job, live: Live, texts: Any, root: str, say: Callable[[str], None]) -> LiveSource:
    """New rows, the backbone run live, by length, so that batches hold little padding."""
    part = fresh(job, live, texts, root, say)
    order = Order(part.inputs.tokens(), job.batch_size)
    known = Targets(job.objective, None, part.inputs.metas) if part.inputs.metas else None
    return LiveSource(live[0], part.inputs, known, job.states, order)


def text_options(found: Found) -> TextOptions:
    """How the space's rows were made into inputs; the rows of a stored table hold their views already."""
    return replace(options_of(found.space.identity).text, views=1)


def live_backbone(job: Job) -> Live:
    """The backbone of the job's space. Raises UserError when the checkpoint at hand is another one."""
    if job.live is not None:
        return job.live
    identity = job.found.space.identity
    checkpoint = checkpoint_for(job.recipe.model or job.found.source["names"][0])
    refuse_other(checkpoint, identity)
    projection = job.found.backbone.projection
    return load_backbone(checkpoint, identity["precision"], identity["attention"], job.device, projection), checkpoint
