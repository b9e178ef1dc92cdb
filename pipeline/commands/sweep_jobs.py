"""What the runs of a sweep are made of: everything that each needs looked up, and what they can share shared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from pipeline.checks.unused_options import refuse_for_training
from pipeline.commands.grid import Trial
from pipeline.commands.train import fit_options, refuse_parts
from pipeline.extract.backbones.tail import Tail
from pipeline.jobs.job import Job, load_job
from pipeline.jobs.sources import live_backbone, sources
from pipeline.recipe import Recipe
from pipeline.store.errors import UserError
from pipeline.store.format.digest import digest_json
from pipeline.train.data.source import Source
from pipeline.train.data.store_source import StoreSource
from pipeline.train.fit.loop import FitOptions
from pipeline.train.tuners import tuner_class

# Options that change what a run does with its batches, not which job it is.
_OF_TRAINING = (
    "epochs", "max_steps", "lr", "weight_decay", "schedule", "warmup_steps", "warmup_ratio", "clip", "accumulate",
    "train_precision", "patience", "seed", "out", "overwrite", "tensorboard", "report_to",
)  # fmt: skip


@dataclass
class Prepared:
    """A trial with everything looked up. `parts`: its own source for each split. `tail`: the live end, which runs on
    one space share. `lr`: the tuner's own learning rate."""

    trial: Trial
    job: Job
    parts: dict[str, Source]
    tail: Tail
    lr: float

    def meets(self) -> str:
        """Equal for runs that see the same samples in the same batches of the same space."""
        orders = {split: source.order.digest() for split, source in self.parts.items()}
        return str(digest_json([self.job.found.space.id, orders]))

    def options(self) -> FitOptions:
        """How it is trained."""
        return fit_options(self.trial.recipe, self.job.spec, self.job.paper, self.lr)


def prepare_all(asked: Sequence[Trial]) -> dict[str, Prepared]:
    """Name → what it takes. Runs that differ in training alone share a job and its sources, all that they can share."""
    usual: dict[str, Any] = {f.name: f.default for f in fields(Recipe) if f.name in _OF_TRAINING}
    known: dict[str, Prepared] = {}
    out: dict[str, Prepared] = {}
    for trial in asked:
        recipe = replace(trial.recipe, order_seed=trial.recipe.ordering)
        key = digest_json(replace(recipe, **usual).to_mapping())
        if key not in known:
            try:
                known[key] = _look_up(trial, list(known.values()))
            except UserError as error:
                error.args = (f"{trial.name}: {error}",)
                raise
        job = replace(known[key].job, recipe=trial.recipe)
        out[trial.name] = replace(known[key], trial=trial, job=job)
    return out


def _look_up(trial: Trial, others: Sequence[Prepared]) -> Prepared:
    """A trial with what is found in the store; what `others` on the same space have found already is shared."""
    recipe, tail = trial.recipe, None
    job = load_job(recipe)
    refuse_for_training(recipe, job.backbones)
    refuse_parts(job)
    if "train" not in job.tables:
        raise UserError(f"the store has no train rows of {job.spec.name}")
    for other in others:
        if other.job.found.space.id == job.found.space.id:
            job = replace(job, found=other.job.found, live=other.job.live)
            tail = other.tail if _late(other.job) == _late(job) else tail
    if recipe.live:
        job.live = live_backbone(job)
    tuner = job.model(recipe.seed, tail).tuner
    return Prepared(trial, job, sources(job, *(job.live or (None, None))), tuner.tail, tuner.default_lr())


def _late(job: Job) -> list[int]:
    return tuner_class(job.recipe.tuner, job.found.backbone).late_layers(job.config, job.found.backbone)


def shared(members: Sequence[Prepared]) -> dict[str, Source]:
    """Sources of all states that `members` read, in the order that each has alone."""
    job = members[0].job
    wanted = {state for member in members for state in member.job.states}
    if wanted == set(job.states):
        return members[0].parts
    together = replace(job, states=[s for s in job.found.backbone.states() if s in wanted])
    out = sources(together, *(job.live or (None, None)))
    for split, source in out.items():
        order = members[0].parts[split].order
        if source.order.digest() != order.digest():
            assert isinstance(source, StoreSource)  # what is computed live has one order, whatever is read
            source.follow(order.block)
            source.order = order
    return out
