"""`pipeline compare`: tuners from the store and live baselines side by side, one table."""

from __future__ import annotations

import copy
import csv
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.catalog import is_baseline
from pipeline.checks.unused_options import refuse_for_training
from pipeline.command_lines import NotExtracted
from pipeline.commands.compare_table import compared_text, settings
from pipeline.commands.extract import Say
from pipeline.commands.prepare import load_backbone
from pipeline.commands.train import fit_options, job_doubts, make_folder, refuse_parts, run_train, usual_lr
from pipeline.cost.flops import backbone_model, kept_bytes
from pipeline.extract.backbones import Backbone, Batch
from pipeline.jobs.job import Job, load_job, stated
from pipeline.jobs.joint import Joint, load_joint
from pipeline.jobs.mixture import Mixture, open_job
from pipeline.jobs.slots import by_slot, names_in, refuse_tasks, slots_of
from pipeline.jobs.sources import live_backbone, live_source
from pipeline.lookup.objective import make_objective
from pipeline.owners import for_tuner
from pipeline.recipe import Recipe
from pipeline.store.errors import UserError
from pipeline.terminal import layout_text
from pipeline.train.baselines.methods import BASELINES, BaselineModel, Inside, baseline, input_source
from pipeline.train.data.source import Source
from pipeline.train.features import Want
from pipeline.train.fit.at_work import at_work, refuse_lost
from pipeline.train.fit.log import finite
from pipeline.train.fit.loop import FitOptions, fit
from pipeline.train.model import Model
from pipeline.train.tuners import Tuner, tuner_names


def run_compare(
    recipe: Recipe,
    methods: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    csv_file: str | None,
    say: Say,
    preset: str = "ours",
) -> tuple[dict[str, Any], str]:
    """Train each of `methods` once for each of `seeds` and tabulate. Runs go to `folder`/METHOD-sSEED. With several
    backbones a method is for every slot, or names one for each: "image=probe+text=lora".

    `preset`: whose settings the baselines have, see `train.baselines.methods`; the table says which.

    The metric is what selects the best epoch, of the test split, else of validation; the spread is the standard
    deviation over seeds; seconds an epoch are the fastest seed's, which other work on the machine disturbed least.
    The share is that of the papers: trainable parameters but those of the task's head, which every method trains, of
    the backbone's. Memory of one training step: on a GPU the measured peak; on a CPU the tensors counted, that is
    weights, gradients, Adam's two moments, the batch, and what the backward pass keeps. The layout says which blocks
    the order of samples followed: a seed gives the same run on the same layout only.
    """
    refuse_tasks(recipe, "compare")
    unknown = [n for m in methods for n in names_in(m) if not is_baseline(n) and n not in tuner_names()]
    if not methods or unknown:
        known = ", ".join([*tuner_names(), *BASELINES])
        raise UserError(
            f"--tuners: {'name at least one' if not unknown else f'unknown {unknown[0]!r}'}; there are: {known}"
        )
    if preset != "ours" and not any(map(_live, methods)):
        raise UserError(f"--preset {preset}: it is for {', '.join(BASELINES)}, and --tuners names none of them")
    if csv_file and not Path(csv_file).parent.is_dir():
        raise UserError(f"--csv {csv_file}: no such folder: {Path(csv_file).parent}")
    try:
        jobs = [_refuse(recipe, method, preset) for method in methods]
    except NotExtracted as error:
        reading = [m for m in methods if slots_of(recipe) or not _live(m)]  # alone a baseline reads no states
        names = [name for method in reading for name in _read(recipe, method).split(",")]
        plain = {name for name in names if "=" not in name}  # what every slot has is not named for one
        names = [name for name in dict.fromkeys(names) if name in plain or name.partition("=")[2] not in plain]
        raise error.for_all(tuple(names), recipe.tuner_options) from None
    for sentence in job_doubts(jobs[0]):
        say(f"warning: {sentence}")
    make_folder(folder)
    rows, total = [], 0
    with at_work(folder, [_run_folder(folder, method, seed) for method in methods for seed in seeds]):
        for method in methods:
            runs = _runs(recipe, method, seeds, folder, say, preset)
            total = total or runs[0]["backbone"]
            rows.append(_row(method, runs, total, _live(method) or recipe.live))
    if csv_file:
        try:
            with Path(csv_file).open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        except OSError as error:  # what was measured is not lost
            say(f"warning: --csv {csv_file}: cannot be written: {error.strerror or error}")
    result = {"task": recipe.task, "preset": preset, "backbone_parameters": total, "rows": rows}
    return finite(result), compared_text(rows, preset, total)


def _runs(recipe: Recipe, method: str, seeds: Sequence[int], folder: Path, say: Say, preset: str) -> list[Any]:
    """What the run of each seed ended with."""
    runs: list[dict[str, Any]] = []
    for seed in seeds:
        refuse_lost(folder)
        one = replace(recipe, seed=seed, out=str(_run_folder(folder, method, seed)), overwrite=True)
        own = for_tuner(one, _read(recipe, method))
        runs.append(_baseline(one, method, preset) if _live(method) else _tuner(own))
        say(f"{method}, seed {seed}: {runs[-1]['metric']:.4f}, {runs[-1]['seconds_per_epoch']:.2f} s an epoch")
    return runs


def _row(method: str, runs: Sequence[dict[str, Any]], total: int, live: bool) -> dict[str, Any]:
    """The row of the table that a method's `runs` make. `total`: parameters of the backbone."""
    metrics = [r["metric"] for r in runs]
    return {
        "method": method,
        "trainable": runs[0]["trainable"],
        "head": runs[0]["trainable"] - runs[0]["beside"],
        "share": runs[0]["beside"] / total,
        "memory_bytes": max(r["memory"] for r in runs),
        "seconds_per_epoch": min(r["seconds_per_epoch"] for r in runs),
        "metric": statistics.mean(metrics),
        "figure": runs[0]["figure"],
        "spread": statistics.stdev(metrics) if len(metrics) > 1 else None,
        "seeds": len(metrics),
        "live": live,
        "layout": " ".join(dict.fromkeys(layout_text(r["layout"]) for r in runs)),
        "settings": runs[0]["settings"],
    }


def _run_folder(folder: Path, method: str, seed: int) -> Path:
    return folder / f"{method}-s{seed}"


def _live(method: str) -> bool:
    """Whether something of it trains inside a backbone."""
    return any(map(is_baseline, names_in(method)))


def _read(recipe: Recipe, method: str) -> str:
    """`--tuner` of what a method reads of the store: with a probe where it trains inside the backbone."""
    if "=" not in method:
        return "probe" if is_baseline(method) else method
    named = by_slot(recipe, method).items()
    return ",".join(f"{slot}={'probe' if is_baseline(name) else name}" for slot, name in named)


def _refuse(recipe: Recipe, method: str, preset: str) -> Job | Joint:
    """The job of `method`. Raises before hours are spent what it would end in: a tuner without a form for the backbone
    or with states that are not stored, a baseline that the backbone has no place for or whose package is missing."""
    if not _live(method):
        job = _opened(for_tuner(recipe, _read(recipe, method)))
        refuse_for_training(job.recipe, job.backbones)
        refuse_parts(job)
        job.model(recipe.seed)
        if not recipe.live:
            job.sources(False)
        return job
    return (_refuse_joint if slots_of(recipe) else refuse_baseline)(recipe, method, preset)


def refuse_baseline(recipe: Recipe, name: str, preset: str) -> Job:
    """The job of a baseline. UserError where the backbone has no place for it, or its package is missing."""
    job = _probe(recipe)
    refuse_parts(job)
    baseline(name, preset).prepare(job.found.backbone, copy.deepcopy(_shape(job.found.backbone)))
    return job


def _refuse_joint(recipe: Recipe, name: str, preset: str) -> Joint:
    """`refuse_baseline` of several backbones."""
    job, inside = _beside(recipe, name), _inside(recipe, name)
    refuse_parts(job)
    shapes = {slot: copy.deepcopy(_shape(job.jobs[slot].found.backbone)) for slot in inside}
    try:
        _joint_model(job, inside, preset, shapes)
    except UserError as error:
        fits = {slot: _has_place(job.jobs[slot].found.backbone, inside[slot], preset) for slot in inside}
        if "=" in name or not any(fits.values()) or all(fits.values()):
            raise
        offered = "+".join(f"{slot}={name if fit else 'probe'}" for slot, fit in fits.items())
        raise UserError(f"{error}; {offered} has it where it has a place") from None
    if not job.recipe.live:
        job.sources(False)
    return job


def _has_place(backbone: Backbone, name: str, preset: str) -> bool:
    """Whether a backbone has one for a baseline."""
    try:
        baseline(name, preset).prepare(backbone, copy.deepcopy(_shape(backbone)))
    except UserError:
        return False
    return True


def _tuner(recipe: Recipe) -> dict[str, Any]:
    metrics = run_train(recipe, lambda text: None, quiet=True)
    job = _opened(recipe)
    model = job.model(recipe.seed).to(job.device)
    batch = next(iter(job.sources(recipe.live)["train"].epochs(0, 1)))
    said = {slot: ", ".join(f"{k} {v}" for k, v in stated(own).items()) for slot, own in job.configs.items()}
    what = (_by_slot(said) or "no options") + _weighing(job)
    options = fit_options(recipe, job.spec, job.paper, usual_lr(job, model))
    made = settings(what, options, job.batch_size)
    return _summary(job, model, batch, metrics, [model.tuner.tail]) | {"settings": made}


@dataclass(frozen=True)
class Fitted:
    """A baseline that was trained, and what it was trained with."""

    job: Job | Joint
    model: Model
    train: Source
    options: FitOptions
    metrics: dict[str, Any]


def fit_baseline(recipe: Recipe, name: str, preset: str) -> Fitted:
    """Train a baseline with the splits, the order and the options of a probe's run on the same store. Of several
    backbones those that it leaves frozen are read from the store, but in a live run."""
    job: Job | Joint
    parts: Mapping[str, Source]
    if slots_of(recipe):
        joint, inside = _beside(recipe, name), _inside(recipe, name)
        modules = {slot: _loaded(joint.jobs[slot]) for slot in inside}
        model: Model = _joint_model(joint, inside, preset, modules).to(joint.device)
        job, parts = joint, joint.sources(recipe.live, inside)
    else:
        job = _probe(recipe)
        live, checkpoint = live_backbone(job)
        method, size = baseline(name, preset), job.batch_size
        model = BaselineModel(method, job.found.backbone, _loaded(job), job.objective, recipe.seed).to(job.device)
        parts = {
            split: input_source(live_source(job, split, live, checkpoint, size), live)
            for split in job.tables
            if split == "train" or job.targets(split) is not None
        }
    options = fit_options(recipe, job.spec, job.paper, usual_lr(job, model))
    folder = Path(recipe.out or f"runs/{name}")
    metrics = fit(
        model, parts["train"], parts.get("validation"), parts.get("test"), options, folder, job.objective.scorer,
        job.device, progress=False, resume=False,
        info={"baseline": name, "preset": preset, "space": job.spaces},
    )  # fmt: skip
    return Fitted(job, model, parts["train"], options, metrics)


def _loaded(job: Job) -> nn.Module:
    """The backbone of a job with its weights, nobody else's."""
    identity = job.found.space.identity
    made = load_backbone(live_backbone(job)[1], identity["precision"], identity["attention"], job.device)
    model: nn.Module = made.model
    return model


def _inside(recipe: Recipe, name: str) -> dict[str, str]:
    """Slot → the baseline that it has."""
    return {slot: part for slot, part in by_slot(recipe, name).items() if is_baseline(part)}


def _joint_model(job: Joint, inside: Mapping[str, str], preset: str, modules: Mapping[str, nn.Module]) -> Model:
    """The model of a method that trains `inside` the backbones `modules` of some slots."""

    def tower(slot: str) -> Callable[[Want], Tuner]:
        method, backbone = baseline(inside[slot], preset), job.jobs[slot].found.backbone
        return lambda wants: Inside(method, backbone, modules[slot], wants)

    return job.model(job.recipe.seed, {slot: tower(slot) for slot in inside})


def _baseline(recipe: Recipe, name: str, preset: str) -> dict[str, Any]:
    made = fit_baseline(recipe, name, preset)
    batch = next(iter(made.train.epochs(0, 1)))
    slots = by_slot(recipe, name).items()
    what = {slot: baseline(n, preset).description if is_baseline(n) else n for slot, n in slots}
    told = settings(_by_slot(what) + _weighing(made.job), made.options, made.job.batch_size)
    return _summary(made.job, made.model, batch, made.metrics, [made.model.tuner.tail]) | {"settings": told}


def _by_slot(said: Mapping[str, str]) -> str:
    """What is said of each slot; of a single backbone without its name."""
    return "; ".join(f"{slot}: {text}" if slot else text for slot, text in said.items() if text)


def _weighing(job: Job | Joint) -> str:
    """What the objective was set to beside its defaults, as it ends a list; what is scored stands in the table."""
    config = job.objective.config
    set_to = {k: v for k, v in stated(config).items() if k != "metric" and v != getattr(type(config)(), k)}
    return "".join(f", {k} {' '.join(v) if isinstance(v, tuple) else v}" for k, v in set_to.items())


def _opened(recipe: Recipe) -> Job | Joint:
    job = open_job(recipe)
    assert not isinstance(job, Mixture)  # refused before
    return job


def _beside(recipe: Recipe, name: str) -> Joint:
    """What a method that trains inside some of several backbones reads; of those that it does not, stored states."""
    whole = all(map(is_baseline, by_slot(recipe, name).values()))
    return load_joint(replace(for_tuner(recipe, _read(recipe, name)), live=recipe.live or whole))


def _probe(recipe: Recipe) -> Job:
    """What a baseline shares with a probe's live run: the splits and the order. What it learns is the backbone's own
    way: a text-to-text one writes the label."""
    job = load_job(replace(recipe, tuner="probe", tuner_options={}, live=True))
    header = next(iter(job.tables.values())).header
    job.objective = make_objective(
        recipe, job.spec, header.get("candidates", ()), job.found.backbone, None, job.training
    )
    return job


def _summary(
    job: Job | Joint, model: Any, batch: Batch, metrics: dict[str, Any], more: list[nn.Module]
) -> dict[str, Any]:
    scores = metrics["test"] or metrics["validation"]
    if scores is None:
        raise UserError(f"task {job.spec.name} has neither test nor validation labels: there is nothing to compare")
    first = job.objective.scorer().first
    return {
        "metric": math.nan if scores[first] is None else scores[first],
        "figure": next((n for n in scores if n != first), first) if first == "average" and len(scores) == 2 else first,
        "seconds_per_epoch": metrics["seconds_per_epoch"],
        "trainable": metrics["trainable_parameters"],
        "beside": sum(p.numel() for p in model.tuner.parameters() if p.requires_grad),
        "layout": metrics["layout"],
        "memory": step_memory(model, batch.to(job.device), more),
        "backbone": sum(map(backbone_parameters, job.backbones)),
    }


def backbone_parameters(backbone: Backbone) -> int:
    """Parameters of the whole backbone without a task head, counted without loading it."""
    return sum(p.numel() for n, p in _shape(backbone).named_parameters() if "pooler" not in n)


def _shape(backbone: Backbone) -> nn.Module:
    """The backbone without its values; shared, so not to be changed."""
    model: nn.Module = getattr(backbone, "skeleton", None) or backbone_model(backbone)
    return model


def step_memory(model: Any, batch: Batch, more: Sequence[nn.Module] = ()) -> float:
    """Bytes of one training step on `batch` with Adam; see `run_compare`. `more`: modules that are not among the
    model's own (a tail). The model must not be trained afterwards: it has gradients."""
    model.train()
    if batch.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(batch.device)
        model.loss(batch).backward()
        torch.cuda.synchronize(batch.device)
        return float(torch.cuda.max_memory_allocated(batch.device)) + 8.0 * model.trainable_parameters()
    own = {id(p): p for m in (model, *more) for p in (*m.parameters(), *m.buffers())}
    given = [*own.values(), *batch.states.values(), *batch.columns.values()]
    kept = kept_bytes(given, lambda: model.loss(batch))
    return float(sum(t.nbytes for t in given) + 12 * model.trainable_parameters() + kept)


def default_folder(recipe: Recipe) -> Path:
    """Where runs go when no folder is given."""
    return Path(recipe.out or f"runs/compare-{time.strftime('%Y%m%d-%H%M%S')}")
