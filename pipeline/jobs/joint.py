"""`Joint`: a job with several backbones, one a slot of the task, whose samples stand in pairs.

Each slot is a `Job` of its own on its own feature space; here they meet: rows, objective, towers and pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from pipeline.checks.doubtful_rows import shown
from pipeline.checks.unused_options import for_kind
from pipeline.command_lines import NotExtracted
from pipeline.commands.prepare import Split, joint_tables, of_slot
from pipeline.extract.backbones import Backbone
from pipeline.extract.tasks.base import TaskSpec
from pipeline.jobs.extracted import as_extracted
from pipeline.jobs.job import Job, agreed, rows_options, stored_job, targets_of, unstored_jobs
from pipeline.jobs.slots import parts_of
from pipeline.jobs.sources import (
    Live,
    batch_size_of,
    checked_relive,
    fresh,
    grouped,
    live_backbone,
    store_slot,
    stream_options,
)
from pipeline.lookup.objective import joint_objective
from pipeline.lookup.recipe import Found, Unstored, find_space
from pipeline.lookup.task import need
from pipeline.lookup.task_versions import AmbiguousTask, chosen_tables, stored_versions, written_beside
from pipeline.recipe import Recipe
from pipeline.store import Space, TaskTable
from pipeline.store.errors import MissingStates, SeveralSpaces, StoreError, UserError
from pipeline.store.tables.table import version_of
from pipeline.train.baselines.methods import InputSlot
from pipeline.train.data.live_source import LiveSlot
from pipeline.train.data.order import Order
from pipeline.train.data.pairs import PairSource, distinct
from pipeline.train.data.source import Slot, Source
from pipeline.train.data.targets import Targets
from pipeline.train.features import Want
from pipeline.train.model import Model, drawn_from
from pipeline.train.objectives import Objective, Scorer
from pipeline.train.tuners import Towers, Tuner, TunerConfig, fitting_tuner, tuner_class


@dataclass
class Joint:
    """A recipe of several backbones with everything it names looked up. `jobs`: slot → what is of that slot alone.
    `tables`: the rows by split, with the fields of all slots."""

    recipe: Recipe
    jobs: dict[str, Job]
    tables: dict[str, TaskTable]
    _live: dict[str, Live] = field(default_factory=dict)

    @property
    def first(self) -> Job:
        return next(iter(self.jobs.values()))

    @property
    def spec(self) -> TaskSpec:
        """The task as the first slot reads it; name and targets are those of all."""
        return self.first.spec

    @property
    def device(self) -> torch.device:
        return self.first.device

    @property
    def version(self) -> str:
        """Which version of the task its tables are of."""
        return version_of(next(iter(self.tables.values())).header)

    @property
    def configs(self) -> dict[str, TunerConfig]:
        """Slot → the options of its tuner."""
        return {slot: job.config for slot, job in self.jobs.items()}

    @property
    def paper(self) -> bool:
        """No paper's protocol is for several backbones."""
        return False

    @cached_property
    def objective(self) -> Objective:
        """What is learned of the label."""
        return joint_objective(self.recipe, self.spec, tuple(self.jobs), self.first.training)

    @property
    def backbones(self) -> list[Backbone]:
        return [job.found.backbone for job in self.jobs.values()]

    @property
    def spaces(self) -> dict[str, str]:
        """Slot → the id of its feature space."""
        return {slot: job.found.space.id for slot, job in self.jobs.items()}

    @property
    def model_name(self) -> str:
        return "+".join(job.model_name for job in self.jobs.values())

    @property
    def batch_size(self) -> int:
        return batch_size_of(self.recipe, self.paper, self.spec.target)

    @property
    def grouped(self) -> bool:
        """Whether batches hold samples of like length; by default not where these are compared with each other."""
        return grouped(self.recipe, self.objective.coupled)

    @property
    def each(self) -> list[Joint]:
        return [self]

    def scorer(self) -> Scorer:
        return self.objective.scorer()

    def targets(self, split: str) -> Targets | None:
        """The targets of a split; None where a row has none."""
        known = {slot: job.tables[split].metas for slot, job in self.jobs.items()}
        return targets_of(self.objective, self.tables[split], by_row(known))

    def model(self, seed: int | None = None, own: Mapping[str, Callable[[Want], Tuner]] | None = None) -> Model:
        """A tuner a slot under one head, weights drawn from `seed`. `own`: slot → what makes another in its place."""
        wants, tails = self.objective.wants, {slot: job.tail() for slot, job in self.jobs.items()}

        made: dict[str, Tuner] = {}
        with drawn_from(seed):
            for slot, job in self.jobs.items():
                with of_slot(slot):
                    if own and slot in own:
                        made[slot] = own[slot](wants)
                        continue
                    cls = fitting_tuner(job.recipe.tuner, job.config, job.found.backbone)
                    made[slot] = cls(job.config, job.found.backbone, tails[slot], wants)
            model = Model(Towers(made), self.objective)
        for slot, tuner in made.items():
            if seed is not None and slot not in (own or ()) and (first := self.jobs[slot].first) is not None:
                tuner.begin(first())
        return model

    def source(self, split: str) -> PairSource:
        """Pairs of `split` from the store. Raises MissingStates naming the slot and the first row without states."""
        slots, places, group = {}, {}, self.grouped
        for slot, job in self.jobs.items():
            keys, places[slot] = distinct(job.tables[split].keys)
            with of_slot(slot):
                self._refuse_missing(slot, split, keys, places[slot])
                slots[slot] = store_slot(job, split, keys, self.batch_size, group)
        options = stream_options(self.first, split, self.batch_size, group)
        return PairSource.of_store(slots, places, self.targets(split), options)

    def _refuse_missing(self, slot: str, split: str, keys: Sequence[str], place: np.ndarray) -> None:
        job = self.jobs[slot]
        if isinstance(job.found.space, Unstored):
            return
        absent = job.found.space.lookup(list(keys), job.states).absent
        if len(rows := np.flatnonzero(absent[place])):
            raise NotExtracted(
                f"{len(rows):,} of {len(place):,} {split} rows have no states here, the first is row {rows[0] + 1} "
                f"({shown(job.tables[split], int(rows[0]))})",
                self.as_extracted(),
                int(absent.sum()),
            )

    def live_source(self, split: str, inside: Collection[str] = ()) -> PairSource:
        """Pairs computed now from the texts of the task tables, in the order of the store where it has them. `inside`:
        slots without states, whose backbone the model itself runs; those of the others then are the store's, but in a
        live run."""
        cached = bool(inside) and not self.recipe.live
        try:
            stored = None if isinstance(self.first.found.space, Unstored) else self.source(split)
        except MissingStates:
            if cached:
                raise
            stored = None
        parts = {}
        for slot in inside if cached else self.jobs:
            with of_slot(slot):
                parts[slot] = checked_relive(self.jobs[slot], split, self.live()[slot][1])
        if stored is not None:
            order = stored.order
        else:
            options = stream_options(self.first, split, self.batch_size, self.grouped)
            lengths = np.sum([part.inputs.tokens() for part in parts.values()], axis=0)
            order = options.order(np.zeros(len(lengths), np.int64), lambda: lengths)
        return self._live_pairs(parts, stored, order, self.targets(split), inside)

    def fresh_source(self, texts: Any, root: str, say: Callable[[str], None]) -> PairSource:
        """New rows, see `Run.predict`, the backbones run live. UserError where slots have other numbers of rows."""
        given = texts if isinstance(texts, Mapping) else dict.fromkeys(self.jobs, texts)
        if given.keys() != self.jobs.keys():
            raise UserError(f"predict: rows are needed for the slots {', '.join(self.jobs)}, not {', '.join(given)}")
        parts = {}
        for slot, job in self.jobs.items():
            with of_slot(slot):
                parts[slot] = fresh(job, self.live()[slot], given[slot], root, say)
        if len({len(part.keys) for part in parts.values()}) > 1:
            raise UserError("predict: the slots have other numbers of rows; row i of each belongs together")
        order = Order(np.sum([part.inputs.tokens() for part in parts.values()], axis=0), self.batch_size)
        metas = by_row({slot: part.inputs.metas for slot, part in parts.items()})
        return self._live_pairs(parts, None, order, Targets(self.objective, None, metas) if metas else None)

    def _live_pairs(
        self,
        parts: Mapping[str, Split],
        stored: PairSource | None,
        order: Order,
        targets: Targets | None,
        inside: Collection[str] = (),
    ) -> PairSource:
        """Pairs computed from prepared rows; of slots without such they are those `stored`."""
        slots: dict[str, Slot] = {} if stored is None else dict(stored.slots)
        places = {} if stored is None else dict(stored.places)
        for slot, part in parts.items():
            _, places[slot] = distinct(part.keys)
            inputs = part.inputs.take(np.unique(places[slot], return_index=True)[1])
            make = InputSlot if slot in inside else LiveSlot
            slots[slot] = make(self.live()[slot][0], inputs, self.jobs[slot].states)
        leading = next(iter(slots)) if stored is None else stored.leading
        return PairSource(slots, places, leading, targets, order)

    def sources(self, live: bool, inside: Collection[str] = ()) -> dict[str, Source]:
        """A source for each split with targets, and for train. `inside`: see `live_source`."""
        splits = [split for split in self.tables if split == "train" or self.targets(split) is not None]
        return {s: self.live_source(s, inside) if live or inside else self.source(s) for s in splits}

    def live(self) -> dict[str, Live]:
        """Slot → its backbone, loaded once."""
        for slot, job in self.jobs.items():
            if slot not in self._live:
                with of_slot(slot):
                    self._live[slot] = live_backbone(job)
        return self._live

    def as_extracted(self) -> Recipe:
        """The recipe of the extraction that it reads."""
        return as_extracted(self.first.recipe, self.first.found)

    def describe(self) -> list[str]:
        """A line about the space of each slot."""
        return [f"{slot}: {line}" for slot, job in self.jobs.items() for line in job.describe()]

    def resolved(self) -> dict[str, Any]:
        """Options with their defaults filled in by what was found, where one value is true of every slot."""
        identities = [job.found.space.identity for job in self.jobs.values()]
        same = {
            name: identities[0][name]
            for name in ("format", "precision", "attention")
            if len({identity[name] for identity in identities}) == 1
        }
        return {
            "space": ",".join(f"{slot}={space}" for slot, space in self.spaces.items()),
            "tuner_options": agreed(list(self.configs.values()), self.recipe.tuner_options),
            **rows_options(self.recipe, self.spec, self.tables["train"].header),
            **same,
        }


def by_row(metas: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Slot → the meta of each row → for each row slot → meta; [] where no slot knows anything."""
    known = {slot: column for slot, column in metas.items() if column}
    return [dict(zip(known, row, strict=True)) for row in zip(*known.values(), strict=True)]


def load_joint(recipe: Recipe, version: str | None = None, spaces: Any = None) -> Joint:
    """Look up what a recipe of several backbones names. `version`, `spaces`: those of a finished run."""
    need(recipe, "task")
    asked = spaces if isinstance(spaces, dict) else {}
    try:
        jobs = _stored(recipe, version, asked)
    except (AmbiguousTask, SeveralSpaces):
        raise
    except StoreError as error:
        if not recipe.live:
            raise
        known = asked or {slot: part.space or "" for slot, part in parts_of(recipe).items()}
        found = unstored_jobs(recipe, known)
        if found is None:
            raise StoreError(f"{recipe.model} makes other feature spaces live than those asked for; {error}") from None
        jobs = found
    return Joint(recipe, jobs, joint_tables({slot: job.tables for slot, job in jobs.items()}))


def _stored(recipe: Recipe, version: str | None, spaces: Mapping[str, str]) -> dict[str, Job]:
    """Slot → its job in the store, all of one version of the task."""
    parts, found, versions = parts_of(recipe), {}, {}
    for slot, part in parts.items():
        with of_slot(slot):
            tuner_class(part.tuner)
            found[slot] = find_space(part, spaces.get(slot))
            parts[slot] = part = for_kind(part, found[slot].backbone)
            versions[slot] = stored_versions(
                _space(found[slot]), part, found[slot].backbone.modality == "image", version
            )
    common = set.intersection(*({v.id for v in of} for of in versions.values()))
    if not common:
        raise NotExtracted(
            f"the slots {', '.join(parts)} have no rows of {recipe.task}, as asked for, that were extracted together",
            recipe,
        )
    tables: dict[str, dict[str, TaskTable]] = {}
    for slot, part in parts.items():
        with of_slot(slot):
            fitting = [v for v in versions[slot] if v.id in common]
            tables[slot] = chosen_tables(_space(found[slot]), part, fitting)
            common = {version_of(next(iter(tables[slot].values())).header)}
    jobs: dict[str, Job] = {}
    for slot, part in parts.items():
        with of_slot(slot):
            others = {other: of for other, of in tables.items() if other != slot}
            own = written_beside(_space(found[slot]), tables[slot], others)
            jobs[slot] = stored_job(part, found[slot], own, bool(spaces))
    return jobs


def _space(found: Found) -> Space:
    assert isinstance(found.space, Space)
    return found.space
