"""`Mixture`: a job with several tasks on one backbone, a head and a score each, under one mixing order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch

from pipeline.extract.backbones import Backbone
from pipeline.extract.tasks import canonical_name
from pipeline.extract.tasks.base import TaskSpec
from pipeline.jobs.job import Job, load_job
from pipeline.jobs.joint import Joint, load_joint
from pipeline.jobs.slots import parts_of, slots_of, tasks_of
from pipeline.jobs.sources import live_backbone, sources
from pipeline.recipe import Recipe
from pipeline.store import TaskTable
from pipeline.store.errors import UserError, within
from pipeline.train.data.source import Source
from pipeline.train.data.store_source import StoreSource
from pipeline.train.features import Want
from pipeline.train.mixture import MixedModel, MixedScorer, MixedSource
from pipeline.train.model import drawn_from
from pipeline.train.tuners import TunerConfig, tuner_class

# What the spaces of the tasks may differ in: how texts become inputs, not what the backbone makes of them.
OF_INPUTS = ("prompt", "max_length", "truncation_side", "stride")


@dataclass
class Mixture:
    """A recipe of several tasks with everything it names looked up. `jobs`: name of the task → its own."""

    recipe: Recipe
    jobs: dict[str, Job]

    @property
    def each(self) -> list[Job]:
        return list(self.jobs.values())

    @property
    def first(self) -> Job:
        return self.each[0]

    @property
    def spec(self) -> TaskSpec:
        """That of the task with most training rows."""
        return max(self.each, key=lambda job: len(job.tables.get("train", ()))).spec

    @property
    def tables(self) -> dict[str, TaskTable]:
        """A table of each split that some task has."""
        return {split: table for job in reversed(self.each) for split, table in job.tables.items()}

    @property
    def device(self) -> torch.device:
        return self.first.device

    @property
    def version(self) -> dict[str, str]:
        """Task → which version its tables are of."""
        return {name: job.version for name, job in self.jobs.items()}

    @property
    def spaces(self) -> dict[str, str]:
        """Task → the id of its feature space."""
        return {name: job.found.space.id for name, job in self.jobs.items()}

    @property
    def configs(self) -> dict[str, TunerConfig]:
        return self.first.configs

    @property
    def paper(self) -> bool:
        return self.first.paper

    @property
    def backbones(self) -> list[Backbone]:
        return self.first.backbones

    @property
    def model_name(self) -> str:
        return self.first.model_name

    @property
    def grouped(self) -> bool:
        return self.first.grouped

    @property
    def batch_size(self) -> int:
        return self.first.batch_size

    @cached_property
    def wants(self) -> Want:
        """What the heads of all tasks can read. UserError where only some read a text head."""
        found = {name: job.objective.wants for name, job in self.jobs.items()}
        heads = {name: job.objective.name for name, job in self.jobs.items()}
        if len({wants.text_head for wants in found.values()}) > 1:
            said = ", ".join(f"{name} {objective}" for name, objective in heads.items())
            raise UserError(f"either all tasks are written as text or none ({said}): choose with --objective")
        first, *others = found.values()
        return replace(first, kinds=tuple(k for k in first.kinds if all(k in w.kinds for w in others)))

    def scorer(self) -> MixedScorer:
        return MixedScorer({name: job.scorer() for name, job in self.jobs.items()})

    def model(self, seed: int | None = None) -> MixedModel:
        """One tuner and a head for each task, weights drawn from `seed`."""
        job, tail = self.first, self.first.tail()
        cls = tuner_class(job.recipe.tuner, job.found.backbone)
        with drawn_from(seed):
            tuner = cls(job.config, job.found.backbone, tail, self.wants)
            model = MixedModel(tuner, {name: job.objective for name, job in self.jobs.items()})
        if seed is not None and job.first is not None:
            tuner.begin(job.first())
        return model

    def source(self, split: str) -> MixedSource:
        """Batches of `split` from the store, of the tasks that have it."""
        return _mixed({name: job.source(split) for name, job in self.jobs.items() if split in job.tables})

    def sources(self, live: bool) -> dict[str, Source]:
        """A source for each split, from the store or with the backbone in the loop, which is loaded once."""
        backbone = live_backbone(self.first)[0] if live else None
        found: dict[str, dict[str, Source]] = {}
        for name, job in self.jobs.items():
            with within(f"task {name}"):
                made = sources(job, backbone, live_backbone(job)[1] if live else None)
            for split, source in made.items():
                found.setdefault(split, {})[name] = source
        return {split: _mixed(parts) for split, parts in found.items()}

    def describe(self) -> list[str]:
        """A line about the space of each task, or the only one."""
        return list(dict.fromkeys(line for job in self.each for line in job.describe()))

    def resolved(self) -> dict[str, Any]:
        """Options with their defaults filled in by what was found; of inputs and space only where all agree."""
        first, *others = [job.resolved() for job in self.each]
        return {k: v for k, v in first.items() if k == "views" or all(other.get(k) == v for other in others)}


def _mixed(parts: Mapping[str, Source]) -> MixedSource:
    taken = 0
    for part in parts.values():
        if isinstance(part, StoreSource):  # all keep their blocks in the same memory
            part.beside, taken = taken, taken + part.nbytes
    return MixedSource(parts)


def open_job(recipe: Recipe, version: Any = None, spaces: Any = None) -> Job | Joint | Mixture:
    """Look up what a recipe names: of one backbone and task (`load_job`), of several backbones or of several tasks.
    `version`, `spaces`: those of a finished run."""
    tasks = tasks_of(recipe)
    if len(tasks) > 1:
        return _mixture(recipe, tasks, version or {}, spaces or {})
    if slots_of(recipe):
        return load_joint(recipe, version, spaces)
    parts_of(recipe)  # refuses options of slots
    return load_job(recipe, version, spaces)


def _mixture(recipe: Recipe, tasks: list[str], versions: Mapping[str, str], spaces: Mapping[str, str]) -> Mixture:
    if slots_of(recipe):
        raise UserError(f"--task {recipe.task}: several tasks are for one backbone, and --model names several")
    jobs: dict[str, Job] = {}
    for task in tasks:
        name = canonical_name(task)
        if name in jobs:
            raise UserError(f"--task {recipe.task}: two tasks are called {name}; rename the file of one")
        with within(f"task {name}"):
            jobs[name] = load_job(replace(recipe, task=task), versions.get(name), spaces.get(name))
            job = jobs[name]
            start = tuner_class(recipe.tuner, job.found.backbone).start(job.config, job.found.backbone)
            if start is not None and start.fisher:
                raise UserError("--init fisher is for one task: use --init magnitude with several")
    first, *others = jobs.items()
    mine = first[1].found.space.identity
    for name, job in others:
        theirs = job.found.space.identity
        for field in mine.keys() | theirs.keys():
            if field not in OF_INPUTS and mine.get(field) != theirs.get(field):
                raise UserError(
                    f"tasks {first[0]} and {name} are not of one backbone: {field} is {mine.get(field)!r} and "
                    f"{theirs.get(field)!r}; extract both alike, or say which: --precision, --format and the like"
                )
    return Mixture(recipe, jobs)


def own_options(job: Job | Joint | Mixture) -> dict[str, Any]:
    """The options of the tuner and the objective as a recipe has them; of several by slot and by task."""
    learned = {part.spec.name: part.objective for part in job.each}
    own = Recipe(
        tuner_options=_only({slot: asdict(config) for slot, config in job.configs.items()}),
        objective_options=_only({task: asdict(objective.config) for task, objective in learned.items()}),
    ).to_mapping()
    names = _only({task: objective.name for task, objective in learned.items()})
    return {"objective": names, **{k: own[k] for k in ("tuner_options", "objective_options")}}


def _only(found: Mapping[str, Any]) -> Any:
    """The value of the only key; of several the mapping."""
    return dict(found) if len(found) > 1 else next(iter(found.values()))
