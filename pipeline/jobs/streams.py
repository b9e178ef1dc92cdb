"""Batches of any states of a stored task, for `pipeline.api.stream`: of one backbone, or of several under one order."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from pipeline.checks.doubtful_rows import limit_doubt
from pipeline.command_lines import NotExtracted
from pipeline.commands.prepare import of_slot
from pipeline.extract.tasks.base import TaskSpec
from pipeline.jobs.extracted import first_views, limited, views_of
from pipeline.jobs.job import found_tables
from pipeline.jobs.joint import by_row, load_joint
from pipeline.jobs.slots import refuse_slots, slots_of
from pipeline.lookup.objective import plain_objective
from pipeline.lookup.recipe import find_space
from pipeline.recipe import Recipe
from pipeline.store import Space, TaskTable
from pipeline.store.errors import Notice, UserError
from pipeline.store.sizes import parse_size
from pipeline.train.data.pairs import PairSource, distinct
from pipeline.train.data.store_source import StoreSlot, StoreSource, StreamOptions
from pipeline.train.data.targets import Targets

States = str | Sequence[str]


def stream_source(
    recipe: Recipe, split: str, states: States | Mapping[str, States], batch_size: int, device: torch.device
) -> tuple[StoreSource | PairSource, str]:
    """Shuffled batches of `states`, of each slot where the recipe has several, and what to call them. Raises
    MissingStates for states that were not extracted, SpaceMismatch where no feature space is as asked for, UserError
    for what does not fit the recipe otherwise."""
    options = StreamOptions(
        batch_size, recipe.ordering, recipe.window, bool(recipe.group_by_length), tier=recipe.tier, device=device,
        host_bytes=None if recipe.host_memory is None else parse_size(recipe.host_memory),
        scheduler=recipe.scheduler, pin=device.type == "cuda",
    )  # fmt: skip
    try:
        return (_pairs if slots_of(recipe) else _single)(recipe, split, states, options)
    except NotExtracted as error:
        raise error.for_states() from None


def _single(
    recipe: Recipe, split: str, states: States | Mapping[str, States], options: StreamOptions
) -> tuple[StoreSource, str]:
    refuse_slots(recipe, "stream()")
    if isinstance(states, Mapping):
        raise UserError(
            f"stream(): states: {', '.join(map(str, states))} are slots, and model names none: a name or several"
        )
    found = find_space(recipe)
    assert isinstance(found.space, Space)
    tables = found_tables(recipe, found)
    chosen = _of_split(tables, split, recipe)
    chosen = first_views(chosen, recipe.views) if split == "train" else chosen
    table = limited(chosen, recipe.limit)
    if sentence := limit_doubt(recipe.limit, chosen, views_of(chosen)):
        warnings.warn(sentence, Notice, stacklevel=4)
    targets = _targets(table, split, table.metas)
    source = StoreSource(found.space, table.keys, targets, _names(states), found.backbone.columns, options)
    return source, f"{table.header['spec']['name']} {split}"


def _pairs(
    recipe: Recipe, split: str, states: States | Mapping[str, States], options: StreamOptions
) -> tuple[PairSource, str]:
    names = slots_of(recipe)
    if not isinstance(states, Mapping) or set(states) != set(names):
        raise UserError(
            f"stream(): states: model has the slots {', '.join(names)}: give the states of each, as "
            "{'" + names[0] + "': 'encoder.5', …}"
        )
    joint = load_joint(replace(recipe, tuner="probe"))  # every backbone has one; no state of its own is read
    chosen = _of_split(joint.tables, split, recipe)
    slots, places, metas = {}, {}, {}
    for slot, job in joint.jobs.items():
        with of_slot(slot):
            assert isinstance(job.found.space, Space)
            table = limited(job.tables[split], recipe.limit)
            keys, places[slot] = distinct(table.keys)
            metas[slot] = table.metas
            slots[slot] = StoreSlot(job.found.space, keys, _names(states[slot]), job.found.backbone.columns, options)
    targets = _targets(limited(chosen, recipe.limit), split, by_row(metas))
    return PairSource.of_store(slots, places, targets, options), f"{joint.spec.name} {split}"


def _names(states: States) -> list[str]:
    return [states] if isinstance(states, str) else list(states)


def _of_split(tables: Mapping[str, TaskTable], split: str, recipe: Recipe) -> TaskTable:
    if split not in tables:
        raise UserError(f"the store has no {split} rows of {recipe.task}; it has: {', '.join(tables)}")
    return tables[split]


def _targets(table: TaskTable, split: str, metas: list[dict[str, Any]]) -> Targets | None:
    """What a batch has to learn; None where not every row has a label."""
    unlabelled = table.labels.count(None)
    if 0 < unlabelled < len(table.labels):
        sentence = f"{unlabelled} of {len(table.labels)} {split} rows have no label: the batches have no targets"
        warnings.warn(sentence, Notice, stacklevel=5)
    spec = TaskSpec.from_dict(table.header["spec"])
    return None if unlabelled else Targets(plain_objective(spec), table.labels, metas or None)
